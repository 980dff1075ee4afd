"""What the Triton kernels take, and sizes of what they work on and keep for the backward pass, known without them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.registry import KERNEL_DTYPES


def kernels_cover(q: Tensor, substeps: int = 1) -> bool:
    """Whether the Triton kernels take this call; the chunked PyTorch form takes the others."""
    return q.dtype in KERNEL_DTYPES and q.shape[-1] <= 256 and substeps <= 16


def chunk_rows(K: int, dtype: torch.dtype) -> int:
    """Rows (tokens times substeps) of a chunk in the kernels, the same in every pass of a call."""
    if dtype == torch.float32:
        return 32 if K <= 128 else 16
    return 64


def kept(q: Tensor, v: Tensor, substeps: int, cu_host: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what the kernels keep for the backward pass, for as many chunks as a call has at most: matrices in q's
    dtype and numbers of each row in fp32, by chunk and head."""
    B, T, H = q.shape[0], q.shape[1], v.shape[2]
    rows = chunk_rows(q.shape[3], q.dtype)
    tokens = rows // substeps
    chunks = B * -(-T // tokens) if cu_host is None else T // tokens + cu_host.shape[0] - 1
    return (chunks, H, 2, rows, rows), (chunks, H, 8, rows)
