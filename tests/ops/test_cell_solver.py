"""The integer solver, on the published constraint system of FlashRNN's kernels and on linnet's own."""

from __future__ import annotations

import time

import pytest

from linnet.ops.cell.solver import divisors, solutions

SMS, REGS, SHARED, THREADS, PAD, E, EA = 132, 2 * 65536, min(232448 - 1024, 227000), 1024 // 4, 8, 2, 4


def flash_system(D: int, heads: int, batch: int, gates: int, *, backward: bool):
    """FlashRNN's constraints (arXiv 2412.07752, appendix) for 16-bit weights on an H100. ``rows`` are what the blocks
    of a launch share out, the gates (backward: the hidden channels), ``cols`` what a row is summed over."""
    rows, cols = (D, gates * D) if backward else (gates * D, D)
    batch += -batch % 8

    def warps(dimR, tcR, wtC, wtB, wlR):
        count = wtC * wtB * rows
        return [count // (tcR * wlR * dimR)] if count % (tcR * wlR * dimR) == 0 else []

    def shared(tcR, tcC, btB, wtB, wlB, wtC, cache, NW, dimB, dimR, mh):
        registers = 16 * dimR * cache * NW // wtB
        weights = E * gates * btB * D * D + E * D * gates * PAD * btB + 64 - E * registers * btB * tcR * tcC
        sums = EA * wtC * tcC * btB * wtB * wlB * dimB * (rows + tcR * PAD)
        return weights >= 0 and mh * (weights + sums) <= SHARED * tcR * tcC * btB * mh

    domains = {
        "dimB": [32, 16, 8],
        "dimR": lambda dimB: [256 // dimB],
        "mh": divisors(heads),
        "tcR": lambda dimR: divisors(rows // dimR) if rows % dimR == 0 else [],
        "tcC": sorted(divisors(cols // 16)),
        "btB": lambda dimB: divisors(batch // dimB) if batch % dimB == 0 else [],
        "wlB": [4, 3, 2, 1],
        "wlR": lambda dimR, tcR: sorted(divisors(rows // dimR // tcR)),
        "wtC": lambda tcC: divisors(cols // 16 // tcC),
        "wtB": lambda dimB, btB: divisors(batch // dimB // btB),
        "NW": warps,
        "cache": lambda tcC, wtC: range(cols // (tcC * wtC * 16), 0, -1),
    }
    constraints = [
        lambda tcR, tcC, btB, mh: tcR * tcC * btB * mh <= SMS,
        lambda btB, wtB, wlB, dimB: batch % (btB * wtB * wlB * dimB) == 0,
        lambda NW: NW * 32 <= THREADS,
        lambda dimB, dimR, cache, NW, wtB, wlB: (
            16 * dimR * cache * NW // wtB + NW * dimB * dimR * wlB * EA // E + NW * dimB * 16 <= REGS
        ),
        shared,
    ]
    return domains, constraints


@pytest.mark.parametrize(
    ("D", "heads", "batch", "backward", "expected"),
    [
        (768, 1, 16, False, {"dimB": 16, "dimR": 16, "tcR": 96, "tcC": 1, "wtC": 4, "cache": 12, "mh": 1}),
        (768, 1, 16, True, {"dimB": 16, "dimR": 16, "tcR": 48, "tcC": 1, "wtC": 8, "cache": 24, "mh": 1}),
        (64, 12, 16, False, {"tcR": 8, "wtC": 4, "cache": 1, "mh": 12}),
        (64, 12, 16, True, {"tcR": 4, "wtC": 8, "cache": 2, "mh": 12}),
        (1024, 1, 8, False, {"dimB": 8, "dimR": 32, "tcR": 128, "wtC": 8, "cache": 8}),
        (1024, 1, 8, True, {"dimB": 8, "dimR": 32, "tcR": 32, "wtC": 8, "cache": 30}),
    ],
)
def test_published_solutions_in_under_a_second(D, heads, batch, backward, expected):
    domains, constraints = flash_system(D, heads, batch, 4, backward=backward)
    begin = time.process_time()
    found = next(solutions(domains, constraints))
    assert time.process_time() - begin < 1
    assert found | expected == found
    assert all(found[name] == 1 for name in ("btB", "wlB", "wlR", "wtB"))


def test_all_solutions_come_once_and_in_order():
    found = list(solutions({"a": [3, 2, 1], "b": lambda a: divisors(6 // a)}, [lambda a, b: a * b <= 3]))
    assert found == [{"a": 3, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 3}, {"a": 1, "b": 2}, {"a": 1, "b": 1}]
    assert list(solutions({"a": [1]}, [lambda a: a > 1])) == []


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"variables: expected one of a, got 'b'"):
        solutions({"a": [1]}, [lambda b: True])
    with pytest.raises(ValueError, match=r"variables: expected one of none, got 'b'"):
        solutions({"a": lambda b: [1], "b": [1]}, [])


def test_wide_settings_fit_a_launch():
    pytest.importorskip("triton")
    from linnet.ops.cell.launch import SHARED as BUDGET
    from linnet.ops.cell.launch import wide_settings

    for D in (160, 256, 384, 768, 1024):
        for units in (1, 3, 8, 100):
            for gates in (1, 3, 4):
                forward, backward = (wide_settings(D, gates, side, units) for side in (False, True))
                assert forward["BLOCKS"] <= 4 and forward["BLOCKS"] * forward["BK"] >= D
                assert backward["BLOCKS"] <= 4 and backward["BLOCKS"] * backward["BK"] * 8 >= gates * D
                for tile in (forward, backward):
                    assert -(-D // tile["BC"]) <= SMS
                    assert 2 * D * gates * tile["BC"] <= BUDGET
    assert wide_settings(256, 4, False, 12)["BC"] == 32  # 12 heads of 8 programs rather than of 16, in two launches
    assert wide_settings(768, 4, False, 1)["BC"] == 16
