"""Engine `attention`: causal softmax attention over a growing cache.

It is plain traceable PyTorch around PyTorch's own kernels, not a registered torch.library op: torch.compile must see
through it to reach those kernels, and does so without a graph break.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..core import Cost, Segments, Shapes, check_number, check_segments, common_dtype, no_autocast, resolve_backend
from .chunked import attention_chunked
from .merge import merge
from .reference import attention_reference
from .rotary import rotary
from .state import AttentionState

__all__ = ["AttentionState", "attention", "cost", "merge", "rotary"]

BACKENDS = ("reference", "chunked")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    segments: Segments | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> tuple[Tensor, AttentionState]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    segments: Segments | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[tuple[Tensor, Tensor], AttentionState]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    state: AttentionState | None = None,
    segments: Segments | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor | tuple[Tensor, Tensor], AttentionState]:
    """Causal softmax attention. Per head, over the tokens s <= t of the same sequence (of the last ``window`` when
    given; the cached ones included)::

        lse_t = log sum_s exp(scale * q_t.k_s)
        o_t   = sum_s exp(scale * q_t.k_s - lse_t) v_s

    The plain causal case runs on `scaled_dot_product_attention`. Windows, segments, caches and the log-sum-exp run on
    FlexAttention on a GPU (compiled on first use), elsewhere in blocks of queries with work ``O(T * window)`` and, for
    packed rows, at most ``O(T * longest segment)``.

    Args:
        q: ``[B, T, H, K]``.
        k: ``[B, T, Hkv, K]``; ``H`` must be a multiple of ``Hkv`` (consecutive query heads share a key head).
        v: ``[B, T, Hkv, V]``.
        window: number of tokens a query sees, itself included; all when None.
        scale: factor of the scores; ``K ** -0.5`` when None.
        state: the cache before the first token, one row a sequence, or a segment; empty when None. Its padding (see
            :class:`AttentionState`) must be finite.
        segments: packing of ``[1, total, ...]`` inputs.
        return_lse: also return ``lse``, with which :func:`merge` joins attention over disjoint sets of keys.
        backend: "auto", "reference" (all scores written out) or "chunked" (PyTorch's kernels).

    Returns:
        ``o`` ``[B, T, H, V]`` in the input dtype, or ``(o, lse)`` with ``lse`` ``[B, T, H]`` in fp32 (float64 for
        float64 inputs), and the cache after the last token, of at most ``window - 1`` slots. Differentiable in q, k, v
        and the cache, through o, lse and the returned cache.

    Raises:
        ValueError: on shapes, dtypes, devices or a window below 1; the message names the argument.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); grouped heads: Ainslie et al. 2023 (2305.13245); sliding window:
    Beltagy et al. 2020 (2004.05150).
    """
    shapes = Shapes()
    shapes("q", q, "B T H K")
    shapes("k", k, "B T Hkv K")
    shapes("v", v, "B T Hkv V")
    if shapes["Hkv"] < 1 or shapes["H"] % shapes["Hkv"]:
        raise ValueError(f"k: expected a number of heads that divides q's {shapes['H']}, got {shapes['Hkv']}")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window: expected None or an integer >= 1, got {window!r}")
    rows = check_segments(segments, q)
    if state is None:
        q, k, v = common_dtype(q=q, k=k, v=v)  # type: ignore[assignment]
    else:
        _check_state(state, rows, shapes, q.device)
        tensors = {"q": q, "k": k, "v": v, "state.k": state.k, "state.v": state.v}
        q, k, v, *cache = common_dtype(**tensors)  # type: ignore[assignment]
        state = AttentionState(*cache, state.length)  # type: ignore[arg-type]
    scale = check_number("scale", shapes["K"] ** -0.5 if scale is None else scale)
    name = resolve_backend(backend, BACKENDS, q)
    with no_autocast(q):
        if name == "reference":
            o, lse, after = attention_reference(q, k, v, window, scale, state, segments)
        else:
            o, lse, after = attention_chunked(q, k, v, window, scale, state, segments, return_lse)
    if return_lse:
        assert lse is not None
        return (o, lse), after
    return o, after


def _check_state(state: AttentionState, rows: int, shapes: Shapes, device: torch.device) -> None:
    if not isinstance(state, AttentionState):
        raise ValueError(f"state: expected an AttentionState, got {type(state).__name__}")
    sizes = Shapes(N=rows, Hkv=shapes["Hkv"], K=shapes["K"], V=shapes["V"])
    sizes("state.k", state.k, "N S Hkv K")
    sizes("state.v", state.v, "N S Hkv V")
    sizes("state.length", state.length, "N")
    if state.length.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"state.length: expected int64, got {state.length.dtype}")
    if state.length.device != device:
        raise ValueError(f"state.length: expected device {device} like q, got {state.length.device}")


def cost(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    *,
    key_heads: int | None = None,
    window: int | None = None,
    cached: int = 0,
    itemsize: int = 2,
    backward: bool = False,
) -> Cost:
    """Floor of one call on ``B`` rows of ``T`` new tokens that each follow ``cached`` earlier ones: two products a
    visible pair of tokens, each input and cached token read once, each output written once. ``key_heads`` is ``H`` when
    None; ``itemsize`` the bytes of an element. With ``backward``, of forward and backward together (five more products
    a pair, of which one repeats the scores). ``state_bytes`` is the cache after the call."""
    Hkv = H if key_heads is None else key_heads
    reach = cached + T if window is None else min(window, cached + T)
    short = min(max(reach - cached, 0), T)  # queries that still see everything before them
    pairs = short * cached + short * (short + 1) // 2 + (T - short) * reach
    flops = 2 * pairs * B * H * (K + V)
    kept = cached if window is None else min(cached, window - 1)
    queries, outputs, keys = T * H * K, T * H * V, (kept + T) * Hkv * (K + V)
    moved = queries + outputs + keys
    if backward:  # again q, k, v, o and its gradient; the gradients written
        flops += 2 * pairs * B * H * (3 * K + 2 * V)
        moved += 2 * queries + 2 * outputs + 2 * keys
    slots = cached + T if window is None else min(cached + T, window - 1)
    return Cost(flops, B * moved * itemsize, B * slots * Hkv * (K + V) * itemsize + 8 * B)


from . import cases as _cases  # noqa: E402,F401  (registers the op and its sample inputs)
