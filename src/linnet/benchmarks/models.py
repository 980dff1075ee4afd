"""Whole models with random weights: tokens a second in decoding and in training, recurrent beside softmax attention.

Times are of the clock on the wall. Decoding is greedy, one token a row and step, by
:class:`~linnet.models.DecodingStep`. Softmax attention has a static cache, so that its step is captured in a graph as
well: it writes the newest token over the last of ``T`` slots and reads all of them, which is what a step at context
``T`` costs. Training is forward, backward and a fused AdamW update under bf16 autocast, as `linnet train` runs it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import presets
from linnet.mixers.attention import Attention
from linnet.models import Decoder, DecoderConfig, DecodingStep, parameter_groups
from linnet.ops import backend
from linnet.ops.attention import cost as attention_cost
from linnet.ops.core import check_choice, state_bytes

from .protocol import Ceilings, Timer, Timing, reason

__all__ = ["MODEL_SUITES", "cells", "measure"]

_SOFTMAX = "transformer-1.3b"  # gla-1.3b with softmax attention of 64 channels a head in place of its mixers
# Suite -> implementations: a preset, and how it is run.
MODEL_SUITES: dict[str, dict[str, tuple[str, str]]] = {
    "decode": {
        "gla-1.3b": ("gla-1.3b", "graph"),
        "gla-1.3b-eager": ("gla-1.3b", "eager"),
        "mamba2-1.3b": ("mamba2-1.3b", "graph"),
        "mamba2-1.3b-eager": ("mamba2-1.3b", "eager"),
        "retnet-1.3b": ("retnet-1.3b", "graph"),
        "retnet-1.3b-eager": ("retnet-1.3b", "eager"),
        _SOFTMAX: (_SOFTMAX, "graph"),
    },
    "train": {
        "gla-340m": ("gla-340m", "auto"),
        "gla-340m-chunked": ("gla-340m", "chunked"),
        "default-340m": ("default-340m", "auto"),
        "default-340m-chunked": ("default-340m", "chunked"),
        "transformer-340m": ("transformer-340m", "auto"),
    },
}
_CELLS = {
    "decode": {"main": tuple((B, T) for T in (2048, 32768) for B in (1, 32, 256)), "tiny": ((1, 16), (3, 16))},
    "train": {"main": ((8, 2048), (2, 8192)), "tiny": ((2, 32),)},
}
_PROMPT = 16  # tokens read before a step is timed; the state of a recurrent model does not grow with them


def cells(suite: str, grid: str) -> tuple[tuple[int, int], ...]:
    """(batch, context) pairs of a grid; "tiny" also shrinks the models, so that a CPU can run them."""
    check_choice(f"grid of the suite {suite!r}", grid, _CELLS[suite])
    return _CELLS[suite][grid]


def measure(
    job: dict[str, Any],
    timer: Timer,
    ceilings: Ceilings,
    about: dict[str, Any],
    done: set[tuple[str, ...]],
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Measure what ``done`` does not hold, model by model."""
    import linnet

    from .results import key

    decoding = job["suite"] == "decode"
    for name, (preset, how) in MODEL_SUITES[job["suite"]].items():
        if job["impls"] is not None and name not in job["impls"]:
            continue
        rows = {}
        for B, T in job["shapes"]:
            row = about | {"op": job["suite"], "impl": name, "pass": "fwd" if decoding else "fwdbwd", "B": B, "T": T}
            row |= {"dtype": job["dtype"], "version": linnet.__version__}
            row |= {"copy_tbs": ceilings.copy_tbs, "matmul_tflops": ceilings.matmul_tflops}
            if key(row) not in done:
                rows[B, T] = row
        if not rows:
            continue
        for (B, T), row in rows.items():
            emit({"begin": [job["suite"], name, f"{B}x{T}"], "rows": [row]})
            if [job["suite"], name] in job["banned"]:
                row["note"] = "not run: it ended the process before"
            elif timer.device.type != "cuda" and job["small"] is False:
                row["note"] = "runs on GPUs only"
            else:
                try:
                    config = _config(preset, job["small"])
                    run = _decode if decoding else _train
                    with _told() as said:
                        row |= run(config, how, B, T, timer, ceilings, getattr(torch, job["dtype"]))
                    if said:
                        row["note"] = said[0]
                except Exception as error:
                    row["note"] = reason(error)
                if timer.cuda:
                    torch.cuda.empty_cache()
            emit({"row": row})


def _config(preset: str, small: bool) -> DecoderConfig:
    config = presets.load("gla-1.3b" if preset == _SOFTMAX else preset)
    if preset == _SOFTMAX:
        config = dataclasses.replace(config, mixers=[f"attention(num_heads={config.d_model // 64})"])
    if small:
        config = dataclasses.replace(config, vocab_size=128, d_model=64, num_layers=2, mlp_hidden=64)
    return config


def _model(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    model = Decoder.meta(config).to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    model.reset_parameters()
    return model


@contextmanager
def _told() -> Iterator[list[str]]:
    """The warnings given inside, as text: a step that falls back says so in its row."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="cuda_graph")
        yield said
    said += [str(w.message)[:160] for w in caught]


def _decode(
    config: DecoderConfig, how: str, B: int, T: int, timer: Timer, ceilings: Ceilings, dtype: torch.dtype
) -> dict[str, Any]:
    before = torch.cuda.memory_allocated() if timer.cuda else 0
    if timer.cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        model = _model(config, timer.device, dtype).eval()
    softmax = isinstance(model.layers[0].mixer, Attention)
    step = DecodingStep(model, cuda_graph=how == "graph" and timer.cuda)
    prompt = torch.randint(config.vocab_size, (B, 1 if softmax else _PROMPT), device=timer.device)
    if softmax:
        state = _use_static_cache(model, B, T)
        step(prompt, state)
    else:
        step(prompt)

    def token() -> None:
        step.advance(step.logits[:, -1].argmax(-1, keepdim=True))

    token()  # eager
    token()  # captured, if it is
    timing = timer.wall(token)
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed_tokens" not in name)
    if config.tie_embeddings:  # then the table is the head
        weights += model.embed_tokens.weight.numel() * model.embed_tokens.weight.element_size()
    # Weights and state are read once; a recurrent state is also written, of a cache only the newest token.
    moved = weights + state_bytes(step.state()) * (1 if softmax else 2)
    peak = torch.cuda.max_memory_allocated() - before if timer.cuda else None
    return _timing(timing, B) | {"limit_ms": ceilings.limit_ms(0, moved), "peak_bytes": peak}


class _Cache(NamedTuple):
    """Keys and values ``[B, H, T, K]`` of all slots, and the position of the newest token ``[B]``."""

    k: Tensor
    v: Tensor
    length: Tensor


class _StaticAttention(nn.Module):
    """An attention mixer at one position: the newest token takes the last slot, in place, and reads all."""

    def __init__(self, mixer: Attention):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: _Cache, segments: None = None) -> tuple[Tensor, _Cache]:
        mixer = self.mixer
        q, k, v = (
            proj(x).unflatten(-1, (heads, mixer.head_dim))
            for proj, heads in (
                (mixer.q_proj, mixer.num_heads),
                (mixer.k_proj, mixer.num_kv_heads),
                (mixer.v_proj, mixer.num_kv_heads),
            )
        )
        q, k = (mixer.rotate(y, state.length[:, None]) for y in (q, k))
        state.k[:, :, -1] = k[:, 0]
        state.v[:, :, -1] = v[:, 0]
        o = F.scaled_dot_product_attention(q.transpose(1, 2), state.k, state.v)
        return mixer.o_proj(o.transpose(1, 2).flatten(2)), state


def _use_static_cache(model: Decoder, B: int, T: int) -> tuple[_Cache, ...]:
    caches = []
    with torch.inference_mode():
        for layer in model.layers:
            mixer = layer.mixer
            assert isinstance(mixer, Attention)
            like = mixer.o_proj.weight
            k, v = (
                torch.randn(B, mixer.num_kv_heads, T, mixer.head_dim, dtype=like.dtype, device=like.device)
                for _ in range(2)
            )
            caches.append(_Cache(k, v, torch.full((B,), T - 1, device=like.device)))
            layer.mixer = _StaticAttention(mixer)
    return tuple(caches)


def _train(
    config: DecoderConfig, how: str, B: int, T: int, timer: Timer, ceilings: Ceilings, dtype: torch.dtype
) -> dict[str, Any]:
    model = _model(config, timer.device, torch.float32).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, lr=1e-4), fused=True)
    tokens = torch.randint(config.vocab_size, (B, T + 1), device=timer.device)

    def update() -> None:
        with torch.autocast(timer.device.type, dtype, enabled=dtype != torch.float32), backend(how):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()  # the optimiser's moments exist from now on
    peak = timer.peak_bytes(update)
    timing = timer.wall(update)
    done = _training_flops(model, B, T) / timing.ms * 1e-9
    return _timing(timing, B * T) | {"peak_bytes": peak, "mfu": done / ceilings.matmul_tflops}


def _training_flops(model: Decoder, B: int, T: int) -> float:
    """Of one update: six a token and weight that is multiplied with (2 forward, 4 backward), and the products of
    softmax attention. The recurrences' own few percent are left out."""
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    if model.lm_head is None:
        weights += model.embed_tokens.weight.numel()
    flops = 6.0 * weights * B * T
    for layer in model.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention):
            sizes = B, T, mixer.num_heads, mixer.head_dim, mixer.head_dim
            flops += attention_cost(*sizes, window=mixer.window, backward=True).flops
    return flops


def _timing(timing: Timing, tokens: int) -> dict[str, Any]:
    return {
        "ms": timing.ms,
        "ms_low": timing.low,
        "ms_high": timing.high,
        "samples": timing.samples,
        "tokens_per_s": 1e3 * tokens / timing.ms,
    }
