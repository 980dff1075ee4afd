"""FlashRNN: all tokens of a recurrent network in one launch."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from linnet.ops import cell

from .base import Bar, Experiment, Outcome, register_reproduction

ROWS, LENGTH, WIDTH = 16, 1024, 768


def _milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the GPU, after three that do not count."""
    times = []
    for repeat in range(-3, repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 0:
            times.append(start.elapsed_time(end))
    return median(times)


def _loop(x: Tensor, R: Tensor) -> Tensor:
    """The LSTM in plain PyTorch, a few launches a token."""
    h = c = x.new_zeros(x.shape[2], x.shape[0], R.shape[1])
    for token in x.unbind(1):
        i, f, z, o = torch.baddbmm(token.transpose(0, 1), h, R).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
    return h


@register_reproduction(
    "flashrnn",
    title="FlashRNN: recurrent networks in one launch",
    paper="Pöppel, Beck & Hochreiter 2024, FlashRNN: I/O-Aware Optimization of Traditional RNNs on Modern Hardware"
    " (arXiv 2412.07752)",
    claim="A kernel that keeps the recurrent weights of a head on chip and runs all tokens in one launch is about fifty"
    " times as fast as a loop of PyTorch operations over the tokens.",
    published="LSTM, bf16, 16 rows of 1,024 tokens, heads of 64 channels, 768 in all: Triton 1.99 ms forward and 18.94"
    " ms with backward, CUDA 3.10 and 8.20 ms, PyTorch's loop 152 and 480 to 542 ms; claimed speed-up 50.",
    setup="The same shapes with heads of 16 to 128 channels; median of 20 calls, host included. The loop is one batched"
    " product and the pointwise operations a token, without gradients, 3 calls.",
    needs=("lstm",),
    budgets=("gpu",),
)
def run(experiment: Experiment) -> Outcome:
    forward, both, loop = {}, {}, float("nan")
    repeats = 3 if experiment.quick else 20
    new = {"device": "cuda", "dtype": torch.bfloat16}
    for D in (16, 32, 64, 128):
        H = WIDTH // D
        x = torch.randn(ROWS, LENGTH, H, 4 * D, **new).requires_grad_()
        R = (torch.randn(H, D, 4 * D, **new) * D**-0.5).requires_grad_()
        weight = torch.randn(ROWS, LENGTH, H, D, **new)

        def backward(x: Tensor = x, R: Tensor = R, weight: Tensor = weight) -> None:
            torch.autograd.grad(cell(x, R, kind="lstm")[0], (x, R), weight)

        both[D] = _milliseconds(backward, repeats)
        with torch.no_grad():
            forward[D] = _milliseconds(lambda x=x, R=R: cell(x, R, kind="lstm"), repeats)
            if D == 64:
                loop = _milliseconds(lambda x=x, R=R: _loop(x, R), 3)
    bars = [
        Bar("forward in ms, heads of 64", forward[64], at_most=2.5, published="1.99 (Triton), 3.10 (CUDA)"),
        Bar("forward and backward in ms, heads of 64", both[64], at_most=10, published="8.20 (CUDA)"),
        Bar("loop over forward, heads of 64", loop / forward[64], at_least=50, published="50 (152 ms over 3.10)"),
    ]
    curves = {
        "forward": [(float(D), value) for D, value in forward.items()],
        "forward and backward": [(float(D), value) for D, value in both.items()],
    }
    return Outcome(bars, curves, x="channels of a head", y="milliseconds", log_x=True, limits=None)
