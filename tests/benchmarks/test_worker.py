"""The measuring process and who watches it."""

from __future__ import annotations

import pytest
import torch

from linnet.benchmarks import models, peers, protocol, worker
from linnet.benchmarks.results import Results, key
from linnet.ops import decay

JOB = {
    "suite": "decay",
    "ops": ["simple_gla"],
    "shapes": [[1, 8, 2, 4, 4], [1, 9, 2, 4, 4, [5, 4]]],
    "passes": ["fwd", "fwdbwd"],
    "impls": None,
    "dtype": "float32",
    "device": "cpu",
    "backend": "auto",
    "rounds": 1,
    "first_call": [],
    "done": [],
    "banned": [],
    "first": {},
}


def swap(inputs):
    return {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()}


def a_peer(name, run, **options):
    return peers.Peer(
        name, "linnet", "linnet", run, options.pop("convert", lambda x: x), lambda o: o, cpu=True, **options
    )


@pytest.fixture
def rivals(monkeypatch):
    def heads_first(x, cu):
        return decay(**{name: y.transpose(1, 2) for name, y in x.items()})[0]

    def fails(x, cu):
        raise RuntimeError("no such kernel")

    def forward_only(x, cu):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients")
        return x["v"] + 1

    found = [
        a_peer("same", heads_first, convert=swap, packed=False),
        a_peer("wrong", lambda x, cu: 2 * x["v"]),
        a_peer("broken", fails),
        a_peer("inference", forward_only),
        peers.Peer("absent", "no-such-package", "no_such_package", fails, swap, lambda o: o, cpu=True),
    ]
    monkeypatch.setattr(peers, "peers", lambda workload: found)
    monkeypatch.setattr(protocol.Timer, "ceilings", lambda self: protocol.Ceilings(1.0, 1.0))


def measured(job):
    said = []
    worker._measure(job, said.append)
    return said, {key(m["row"]): m["row"] for m in said if "row" in m}


def test_every_implementation_has_its_row(rivals):
    said, rows = measured(JOB)
    assert len(rows) == 6 * 2 * 2
    by = {(r["impl"], r["pass"], r["segments"]): r for r in rows.values()}
    for p in ("fwd", "fwdbwd"):
        for segments in (None, 2):
            linnet, wrong = by["linnet", p, segments], by["wrong", p, segments]
            assert linnet["ms"] > 0 and linnet["difference"] == 0 and linnet["samples"] > 0
            assert linnet["limit_ms"] > 0 and linnet["tokens_per_s"] > 0 and linnet["peak_bytes"] is None
            assert wrong["ms"] > 0 and wrong["difference"] > 0.1
            assert by["broken", p, segments]["note"] == "RuntimeError: no such kernel"
            assert by["absent", p, segments]["note"] == "no-such-package is not installed"
        assert by["same", p, None]["difference"] < 1e-6 and by["same", p, None]["ms"] > 0
        assert by["same", p, 2]["note"] == "does not take packed sequences"
        assert (by["inference", p, None].get("note") == "RuntimeError: no gradients") == (p == "fwdbwd")
    assert by["inference", "fwd", None]["ms"] > 0
    begun = [m for m in said if "begin" in m]
    assert begun[0] == {"begin": ["ceilings", "", ""]} and ["simple_gla", "wrong", "1x9x2x4x4 in 2"] in [
        m["begin"] for m in begun
    ]
    assert all({r["impl"] for r in m["rows"]} <= {m["begin"][1]} for m in begun[1:])


def test_only_what_is_open(rivals):
    _, rows = measured(JOB)
    left = [k for k, r in rows.items() if r["impl"] == "wrong" and r["pass"] == "fwd" and r["segments"] is None]
    _, again = measured(JOB | {"done": [list(k) for k in rows if k not in left]})
    assert list(again) == left
    _, banned = measured(JOB | {"banned": [["simple_gla", "wrong"]], "impls": ["wrong"]})
    assert len(banned) == 4 and all(r["note"].startswith("not run: it ended the process") for r in banned.values())


def test_a_crash_costs_its_own_row(monkeypatch):
    rows = [{"op": "gla", "impl": "bad", "pass": p} for p in ("fwd", "fwdbwd")]
    asked = []

    def converse(job, timeout):
        asked.append(job)
        yield {"begin": ["gla", "linnet", "1x2"], "rows": [{"op": "gla", "impl": "linnet", "pass": "fwd"}]}
        if len(asked) <= 2:
            T = len(asked)
            yield {"first": {"gla bad": 1.5}}
            yield {"begin": ["gla", "bad", "1x2"], "rows": [row | {"T": T} for row in rows]}
            yield {"end": "the process ended with code -6", "rows": [row | {"T": T} for row in rows]}
        else:
            yield {"row": {"op": "gla", "impl": "linnet", "pass": "fwd", "ms": 1.0}}
            yield {"end": None, "rows": []}

    monkeypatch.setattr(worker, "_converse", converse)
    results, told = Results(None), []
    worker.run({"suite": "decay"}, results, told.append)
    assert [r["note"] for r in results.rows] == ["the process ended with code -6"] * 4 + [""]
    assert asked[0]["banned"] == asked[1]["banned"] == [] and asked[2]["banned"] == [["gla", "bad"]]
    assert len(asked[2]["done"]) == 4 and asked[2]["first"] == {"gla bad": 1.5}
    assert told[:2] == ["gla linnet 1x2", "gla bad 1x2"]


def test_what_is_not_compiled_in_time_is_not_run(monkeypatch, rivals):
    said = []
    kept = Results(None)
    ours = JOB | {"impls": ["linnet"]}
    assert worker._compile_ahead(ours | {"shapes": JOB["shapes"][:1]}, kept, said.append, 1, 100) == []
    assert said[0] == "compiling ahead: 0 of 1 are ready" and said[-1] == "compiling ahead: 1 of 1 are ready"
    monkeypatch.setattr(worker, "_converse", lambda job, timeout: said.append(job) or iter([{"end": None}]))
    worker.run(JOB | {"impls": ["wrong"]}, kept, said.append, ahead=1, patience=0)
    late, why = said[-1]["unready"], "not compiled and tuned within 0 s"
    assert late == dict.fromkeys((f"simple_gla wrong 2 4 4 {packed} float32" for packed in (False, True)), why)
    rows = measured(said[-1])[1].values()
    assert len(rows) == 4 and {r["note"] for r in rows} == {why}


def test_only_locks_of_its_own_are_taken_away(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    before, since = (tmp_path / name / "lock" for name in ("before", "since"))
    for lock in (before, since):
        lock.parent.mkdir()
    before.touch()
    with worker._children() as start:
        start(JOB)
        since.touch()
    assert before.exists() and not since.exists()


def test_a_process_that_says_nothing_is_ended():
    with pytest.raises(RuntimeError, match="before it measured anything: no answer within 0 s"):
        worker.run(JOB, Results(None), lambda line: None, timeout=0.01)


@pytest.mark.parametrize("suite", ["decode", "train"])
def test_models(suite):
    job = {"suite": suite, "shapes": models.cells(suite, "tiny"), "small": True, "banned": [], "dtype": "float32"}
    names = ["gla-340m", "transformer-340m"] if suite == "train" else ["retnet-1.3b-eager", "transformer-1.3b"]
    timer = protocol.Timer(torch.device("cpu"), rounds=1)
    said = []
    arguments = timer, protocol.Ceilings(1.0, 1.0), {"gpu": "cpu"}
    models.measure(job | {"impls": names}, *arguments, set(), said.append)
    rows = [m["row"] for m in said if "row" in m]
    assert [r["impl"] for r in rows] == [name for name in names for _ in job["shapes"]]
    for r in rows:
        assert r["ms"] > 0 and r["tokens_per_s"] > 0 and (r["mfu"] > 0 if suite == "train" else r["limit_ms"] > 0)
    models.measure(job | {"impls": names}, *arguments, {key(r) for r in rows}, lambda m: pytest.fail(str(m)))
    with pytest.raises(ValueError, match=r"^grid of the suite '.*': expected one of main, tiny"):
        models.cells(suite, "wide")


def test_static_cache_is_attention():
    """A step of the baseline reads what linnet's growing cache holds."""
    model = models._model(models._config("transformer-1.3b", True), torch.device("cpu"), torch.float64).eval()
    ids = torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = model(ids[:, :8]).state, model(ids).logits[:, -1:]
        caches = models._use_static_cache(model, 2, 9)
        for cache, old in zip(caches, before, strict=True):
            cache.k[:, :, :8], cache.v[:, :, :8] = old.k.transpose(1, 2), old.v.transpose(1, 2)
        torch.testing.assert_close(model(ids[:, 8:], caches).logits, after)
