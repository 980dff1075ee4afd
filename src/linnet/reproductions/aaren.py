"""Aaren: softmax attention with one query is a recurrence with a state of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.mixers import build_mixer
from linnet.ops import softmax_scan

from .base import Bar, Experiment, Outcome, register_reproduction

LENGTHS = (256, 1024, 4096)


def _bytes(state: object) -> int:
    """Memory of a state of any nesting."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(_bytes(part) for part in state) if isinstance(state, tuple) else 0


def _errors(length: int) -> tuple[float, float]:
    """Largest difference of all prefixes from softmax attention, in float64 and fp32; scores of -30 to 30."""
    generator = torch.Generator().manual_seed(length)
    s = 60 * torch.rand(1, length, 2, generator=generator, dtype=torch.float64) - 30
    v = torch.randn(1, length, 2, 8, generator=generator, dtype=torch.float64)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    scores = s.transpose(1, 2)[:, :, None].expand(-1, -1, length, -1).masked_fill(~visible, -torch.inf)
    exact = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)
    return (
        float((softmax_scan(s, v)[0] - exact).abs().max()),
        float((softmax_scan(s.float(), v.float())[0] - exact).abs().max()),
    )


@register_reproduction(
    "aaren",
    title="Aaren: attention as a recurrence",
    paper="Feng et al. 2024, Attention as an RNN (arXiv 2405.13956)",
    claim="Softmax attention with a learned query is computed for all prefixes by one scan and updated by a further"
    " token with a state of constant size, exactly.",
    published="Exact by construction; the memory of a stream is constant where that of a Transformer with a cache grows"
    " linearly. No figures were at hand.",
    setup="Largest difference of the scan from masked softmax attention over rows of 256, 1,024 and 4,096 tokens,"
    " scores uniform in [-30, 30]; then a layer of width 64 reads a stream in pieces, its memory beside the cache of"
    " softmax attention. Nothing is trained.",
    needs=("aaren", "attention"),
)
def run(experiment: Experiment) -> Outcome:
    lengths = LENGTHS[:2] if experiment.quick else LENGTHS
    errors = [_errors(n) for n in lengths]
    torch.manual_seed(0)
    layers = {name: build_mixer(f"{name}(num_heads=4)", 64) for name in ("aaren", "attention")}
    x = torch.randn(1, lengths[-1], 64)
    curves, apart = {name: [] for name in layers}, {}
    with torch.no_grad():
        for name, layer in layers.items():
            whole, pieces, state, before = layer(x)[0], [], None, 0
            for n in lengths:
                y, state = layer(x[:, before:n], state)
                pieces.append(y)
                before = n
                curves[name].append((float(n), _bytes(state) / 1024))
            apart[name] = float((torch.cat(pieces, 1) - whole).abs().max())
    grown = {name: points[-1][1] / points[0][1] for name, points in curves.items()}
    bars = [
        Bar("difference from softmax attention, float64, in 1e-12", max(e[0] for e in errors) * 1e12, at_most=1),
        Bar("difference from softmax attention, fp32, in 1e-5", max(e[1] for e in errors) * 1e5, at_most=1),
        Bar("read in pieces less read at once, fp32, in 1e-5", apart["aaren"] * 1e5, at_most=1),
        Bar("growth of Aaren's memory over the stream", grown["aaren"], at_most=1, published="constant"),
        Bar("growth of the cache of softmax attention", grown["attention"], at_least=3.9, published="linear"),
    ]
    return Outcome(bars, curves, x="tokens read", y="state of a layer in KiB", log_x=True, limits=None)
