"""Sampling from a decoder: one packed or batched prefill, then one step a token through the same forward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from linnet.ops import Segments
from linnet.ops.core import map_state, overwriting_states, state_tensors

from .decoder import Decoder, DecoderOutput

__all__ = ["DecodingStep", "Generation", "GenerationStep", "generate", "sample", "stream"]

Prompt = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


class GenerationStep(NamedTuple):
    """One step of :func:`stream`.

    Attributes:
        tokens: int64 ``[B]``, the token each row got. A finished row repeats its stop token.
        finished: bool ``[B]``, rows that have emitted a stop token (now or before).
        state: recurrent state after everything before these tokens; to go on later, pass it together with the tokens
            as the prompt.
    """

    tokens: Tensor
    finished: Tensor
    state: tuple[Any, ...]


class Generation(NamedTuple):
    """What :func:`generate` returns.

    Attributes:
        tokens: int64 ``[B, N]``, the new tokens. A row that finished early repeats its stop token.
        lengths: int64 ``[B]``, number of new tokens of each row, its stop token included.
        state: recurrent state after everything but the last column; to go on, pass it with the prompt
            ``tokens[:, -1:]`` (meaningful for rows that have not finished).
    """

    tokens: Tensor
    lengths: Tensor
    state: tuple[Any, ...]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of ``logits``: ``[B, V]`` -> int64 ``[B]``.

    The logits are divided by ``temperature``; then only the ``top_k`` largest stay, and of these the fewest whose
    probabilities add up to at least ``top_p`` (nucleus sampling, arXiv 1904.09751). Temperature 0 takes the largest.

    Raises:
        ValueError: ``logits`` have another shape, or an option is out of its range (see :func:`generate`).
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits: expected floats of shape [B, V], got {got}")
    _check_sampling(temperature, top_k, top_p)
    return _sample(logits, temperature, top_k, top_p, generator)


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # From the largest down, and by no less than fp32 can divide by: a quotient of infinities would be no probability.
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
    elif top_p is not None:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    probabilities = values.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p
        keep[..., 0] = True  # rounding must not leave a row without a candidate
        probabilities = probabilities.where(keep, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, choice).squeeze(-1)


def stream(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
    state: tuple[Any, ...] | None = None,
    cuda_graph: bool = False,
) -> Iterator[GenerationStep]:
    """Generate token by token; see :func:`generate` for the arguments. Ends when every row has finished.

    >>> for step in stream(model, prompt, max_new_tokens=100, stop=[0]):
    ...     print(step.tokens.tolist())
    """
    step, drawn = _begin(model, prompt, max_new_tokens, temperature, top_k, top_p, stop, generator, state, cuda_graph)
    return (GenerationStep(tokens, finished, step.state()) for tokens, finished in drawn)


def generate(
    model: Decoder,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
    state: tuple[Any, ...] | None = None,
    cuda_graph: bool = False,
) -> Generation:
    """Continue prompts by sampling, in inference mode.

    Args:
        model: the decoder.
        prompt: int64 ``[B, T]`` (or ``[T]`` for one row), or a list of B token sequences of any lengths >= 1, which
            are packed without padding.
        max_new_tokens: most tokens to add to a row, >= 1.
        temperature: divides the logits; 0 always takes the most probable token.
        top_k: sample among the k most probable tokens only.
        top_p: sample among the fewest tokens whose probabilities add up to ``top_p`` in (0, 1] only.
        stop: token ids that finish a row; each row finishes on its own.
        generator: source of randomness on the model's device; the same seed gives the same tokens.
        state: recurrent state to continue from, one row a prompt.
        cuda_graph: on an NVIDIA or AMD GPU, capture the step of one token and replay it: a step then costs what the
            device needs, not the launching of a few hundred kernels. The tokens are the same. A warning says why, and
            steps run one by one, where it is not possible: on a CPU, or while the state grows (an attention cache
            without a window). Capturing takes some memory, and the time of a few steps.

    Raises:
        ValueError: an argument is out of range, a prompt is empty, or ``state`` has another number of rows.
    """
    step, drawn = _begin(model, prompt, max_new_tokens, temperature, top_k, top_p, stop, generator, state, cuda_graph)
    columns: list[Tensor] = []
    running: list[Tensor] = []
    for tokens, finished in drawn:
        columns.append(tokens)
        running.append(~finished)
    count = len(columns)
    lengths = (torch.stack(running, 1).sum(1) + 1).clamp(max=count)
    return Generation(torch.stack(columns, 1), lengths, step.state())


def _begin(
    model: Decoder,
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Sequence[int],
    generator: torch.Generator | None,
    state: tuple[Any, ...] | None,
    cuda_graph: bool,
) -> tuple[DecodingStep, Iterator[tuple[Tensor, Tensor]]]:
    """Check the arguments and read the prompt: the model's step, and what draws from it."""
    _check_options(model, max_new_tokens, temperature, top_k, top_p, stop, generator)
    tokens, segments = _pack(prompt, model.embed_tokens.weight.device)
    rows = tokens.shape[0] if segments is None else len(segments)
    if state is not None and any(x.shape[0] != rows for x in state_tensors(state)):
        found = sorted({x.shape[0] for x in state_tensors(state)})
        raise ValueError(f"state: expected {rows} rows like the prompt, got {', '.join(map(str, found))}")

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    step = DecodingStep(model, cuda_graph)
    step(tokens, state, segments)
    return step, _draw(step, max_new_tokens, stop, options)


@torch.inference_mode()
def _draw(
    step: DecodingStep, max_new_tokens: int, stop: Sequence[int], options: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and which rows have finished, while ``step`` holds the state before these tokens."""
    stops = torch.tensor(list(stop), dtype=torch.int64, device=step.logits.device)
    tokens: Tensor | None = None
    finished = torch.zeros(step.logits.shape[0], dtype=torch.bool, device=step.logits.device)
    for count in range(1, max_new_tokens + 1):
        drawn = _sample(step.logits[:, -1], **options)
        tokens = drawn if tokens is None else torch.where(finished, tokens, drawn)
        finished = finished | torch.isin(tokens, stops)
        yield tokens, finished
        if count == max_new_tokens or (stops.numel() and bool(finished.all())):
            return
        step.advance(tokens.unsqueeze(1))


class DecodingStep:
    """A decoder that reads one token a row at a time: for loops that draw or check tokens their own way.

    >>> step = DecodingStep(model, cuda_graph=True)
    >>> step(prompt)
    >>> for _ in range(100):
    ...     step.advance(step.logits[:, -1].argmax(-1, keepdim=True))

    Args:
        model: the decoder.
        cuda_graph: replay a captured step once the state keeps its shapes; see :func:`generate`.

    Attributes:
        logits: of the last position of each row, ``[B, 1, V]``; valid until the next call.
    """

    logits: Tensor

    def __init__(self, model: Decoder, cuda_graph: bool = False):
        self.model = model
        self._state: tuple[Any, ...] = ()
        self._tokens: Tensor | None = None  # what a captured step reads; its state is then overwritten in place
        self._replay: Callable[[], Tensor] | None = None
        device = model.embed_tokens.weight.device
        self._graph = cuda_graph and device.type == "cuda"
        if cuda_graph and not self._graph:
            _one_by_one(f"the model is on {device}")

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, state: tuple[Any, ...] | None = None, segments: Segments | None = None) -> None:
        """Read ``tokens`` from ``state``, as the decoder's forward does; the state before is forgotten."""
        out = self.model(tokens, state, segments, last_only=True)
        self.logits, self._state, self._replay = out.logits, out.state, None

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> None:
        """Read one more token a row, ``[B, 1]``."""
        if self._replay is not None and self._tokens is not None:
            self._tokens.copy_(tokens)
            self.logits = self._replay()
            return
        before = self._state
        self(tokens, before)
        if not self._graph:
            return
        grown = [i for i, old in enumerate(before) if _layout(old) != _layout(self._state[i])]
        if not grown:
            self._record(tokens)
        elif all(getattr(self.model.layers[i].mixer, "window", None) is None for i in grown):
            self._graph = False  # a window fills up, and then the step can be captured
            _one_by_one(f"the state of layer {grown[0]} grows with every token")

    @torch.inference_mode()
    def state(self) -> tuple[Any, ...]:
        """The state, to be held by others: later steps leave it alone."""
        return self._state if self._replay is None else map_state(torch.clone, self._state)

    def _record(self, tokens: Tensor) -> None:
        inputs = tokens.clone()
        held = self._state = map_state(torch.clone, self._state)

        def forward() -> DecoderOutput:
            return self.model(inputs, held, last_only=True)

        def step() -> Tensor:
            with overwriting_states():
                out = forward()
            for old, new in zip(state_tensors(held), state_tensors(out.state), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)
            return out.logits

        try:
            self._replay = _capture(forward, step)
        except RuntimeError as error:  # what an op does that a graph cannot hold, such as waiting for the device
            self._graph = False
            _one_by_one(f"the step cannot be captured: {str(error).splitlines()[0]}")
        else:
            self._tokens = inputs


def _capture(warm: Callable[[], object], step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A callable that runs the kernels of ``step`` and returns its result, in the memory it had at capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries set up on first use must not end up in the graph
        for _ in range(2):
            warm()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _layout(state: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in state_tensors(state)]


def _one_by_one(why: str) -> None:
    warnings.warn(f"cuda_graph: {why}; steps run one by one", stacklevel=5)


def _check_options(
    model: Decoder,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Sequence[int],
    generator: torch.Generator | None,
) -> None:
    if not isinstance(max_new_tokens, Integral) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    _check_sampling(temperature, top_k, top_p)
    vocab = model.config.vocab_size
    listed = isinstance(stop, Collection) and not isinstance(stop, str)
    if not listed or not all(isinstance(t, Integral) and 0 <= t < vocab for t in stop):
        raise ValueError(f"stop: expected a list of token ids from 0 to {vocab - 1}, got {stop!r}")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not isinstance(temperature, Real) or not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a number >= 0 (0 is greedy), got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k: expected an integer >= 1 or None, got {top_k!r}")
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1] or None, got {top_p!r}")


def _pack(prompt: Prompt, device: torch.device) -> tuple[Tensor, Segments | None]:
    """The prompt as ``[B, T]``, or as one packed row with its segments when the lengths differ."""
    if isinstance(prompt, Tensor):
        rows = prompt.to(device)
        rows = rows.unsqueeze(0) if rows.dim() == 1 else rows
    else:
        try:
            # NumPy makes one dtype of ids of several, such as a tokenizer's beside plain numbers; torch refuses to.
            plain = (part if isinstance(part, Tensor) else np.asarray(part) for part in prompt)
            parts = [torch.as_tensor(part, device=device) for part in plain]
        except (TypeError, ValueError) as error:  # of text, for one
            raise ValueError(f"prompt: expected sequences of token ids, got {_short(prompt)}") from error
        if not parts or any(part.dim() != 1 or part.numel() == 0 for part in parts):
            raise ValueError(
                "prompt: expected at least one sequence, each a non-empty list or 1-D tensor of token ids, got shapes "
                f"{[list(part.shape) for part in parts[:8]]}"
            )
        parts = [_ids(part) for part in parts]
        lengths = [part.numel() for part in parts]
        if len(set(lengths)) > 1:
            return torch.cat(parts).unsqueeze(0), Segments.from_lengths(lengths, device)
        rows = torch.stack(parts)
    if rows.dim() != 2 or rows.numel() == 0:
        raise ValueError(f"prompt: expected shape [B, T] or [T], not empty, got {list(rows.shape)}")
    return _ids(rows), None


def _short(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _ids(tokens: Tensor) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"prompt: expected integer token ids, got {tokens.dtype}")
    return tokens.long()
