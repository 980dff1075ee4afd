"""Boundaries of packed sequences: where they are, and what a call needs of them on the device is there before it."""

from __future__ import annotations

import pytest
import torch

from linnet.ops import cell, decay, delta
from linnet.ops.core import Segments, uploaded
from linnet.ops.core.segments import chunk_table


def test_the_host_part_is_on_the_host_under_any_default_device():
    with torch.device("meta"):
        built = Segments.from_lengths([2, 0, 3], "cpu")
        again = Segments.from_document_ids(torch.tensor([4, 4, 7, 7, 7], device="cpu"))
        table = chunk_table(built.cu_seqlens_host, 2, "cpu")
    assert built.cu_seqlens_host.tolist() == built.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert Segments.from_cu_seqlens(built.cu_seqlens).ids.tolist() == [0, 0, 2, 2, 2]
    assert again.lengths == [2, 3]
    assert table.tolist() == [[0, 0], [2, 0], [2, 1]]


@pytest.mark.parametrize(
    ("build", "bad", "name"),
    [
        *(
            (Segments.from_lengths, bad, "lengths")
            for bad in ([1.5], [-1], [], [[1]], 3, None, torch.tensor([1.0, 2.0]))
        ),
        *((Segments.from_cu_seqlens, bad, "cu_seqlens") for bad in ([0, 3], torch.tensor([0.0, 3.0]))),
        (Segments.from_document_ids, [0, 0, 1], "ids"),
    ],
)
def test_bad_boundaries_are_named(build, bad, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got "):
        build(bad)


def test_integers_are_uploaded_once(device):
    host = torch.tensor([0, 3, 7])
    first = uploaded(host, device)
    assert first.dtype == torch.int32 and first.device.type == device.type and first.tolist() == [0, 3, 7]
    assert uploaded(torch.tensor([0, 3, 7], dtype=torch.int32), device) is first
    host[1] = 4  # the same buffer, filled anew
    assert uploaded(host, device).tolist() == [0, 4, 7]


def test_what_was_uploaded_in_inference_serves_training(device):
    segments = Segments.from_lengths([3, 2], device)
    x, R = torch.randn(1, 5, 2, 3 * 4, device=device), torch.randn(2, 4, 3 * 4, device=device)
    with torch.inference_mode():
        cell(x, R, kind="gru", segments=segments)
    cell(x.requires_grad_(), R, kind="gru", segments=segments)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("op", [decay, delta])
def test_packed_calls_do_not_wait_for_the_device(op, device):
    if device.type != "cuda":
        pytest.skip("there is nothing to wait for on a CPU")
    segments = Segments.from_lengths([70, 1, 130], device)
    q, k, v = (torch.randn(1, 201, 2, 64, device=device, requires_grad=True) for _ in range(3))
    more = {"beta": torch.rand(1, 201, 2, device=device)} if op is delta else {}

    def both():
        o = op(q, k, v, segments=segments, **more)[0]
        return torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
