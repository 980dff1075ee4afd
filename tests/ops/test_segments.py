"""Boundaries of packed sequences."""

from __future__ import annotations

import torch

from linnet.ops import Segments
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
