"""Continuous batching: requests join and leave a running batch between two tokens.

A request holds a row of the state, of constant size for recurrent layers. One thread owns the model. In every turn it
takes one step with all rows that are past their prompt, and reads a bounded number of prompt tokens of those who have
just come, packed without padding; so a long prompt delays nobody by more than its share of a turn. What a request gets
does not depend on the others: it is what :func:`linnet.generate` gives for the same prompt, options and seed, up to
rounding.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linnet.models import Decoder, sample
from linnet.ops import AttentionState, Segments
from linnet.ops.core import join_rows, select_rows, state_bytes
from linnet.tasks import TextStream, Tokenizer

__all__ = ["Busy", "Engine", "Event", "Job", "Limits", "Stopped"]


class Busy(Exception):
    """There are as many requests waiting as may."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Limits:
    """What one server gives.

    Attributes:
        slots: rows of the batch: requests that are worked on at the same time.
        waiting: further requests that may wait for a slot.
        prompt_tokens: longest prompt.
        new_tokens: most tokens a request may ask for.
        turn_tokens: prompt tokens read in one turn.
        seconds: longest time from a request's arrival to its last token.
        body_bytes: largest request.
        body_seconds: longest time until the head of a request has arrived, and then until its body has.
    """

    slots: int = 64
    waiting: int = 256
    prompt_tokens: int = 32768
    new_tokens: int = 4096
    turn_tokens: int = 2048
    seconds: float = 300.0
    body_bytes: int = 1 << 20
    body_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= (0 if name == "waiting" else 1e-9):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")


class Event(NamedTuple):
    """What a request hears.

    Attributes:
        text: what has become certain, possibly nothing.
        tokens: number of tokens drawn for it so far.
        reason: why it ended: "stop", "length", "timeout" or "error"; None when it goes on.
    """

    text: str
    tokens: int
    reason: str | None


@dataclass(eq=False)
class Job:
    """A request.

    Attributes:
        ids: prompt.
        emit: called from the engine's thread with every :class:`Event`.
        max_tokens: most tokens to draw.
        temperature, top_k, top_p: as in :func:`linnet.generate`.
        seed: of this request's random numbers; a new one when None.
        stop: texts to stop at.
        cancelled: set it to give up; nothing is emitted any more.
    """

    ids: Sequence[int]
    emit: Callable[[Event], None]
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    cancelled: bool = False
    born: float = field(default_factory=time.monotonic)
    read: int = 0  # prompt tokens
    drawn: int = 0
    token: int = 0  # the last one
    state: Any = None  # while the prompt is being read
    text: TextStream | None = None
    generator: torch.Generator | None = None


class Engine:
    """A thread that decodes for many requests.

    Args:
        model: the decoder, in evaluation mode.
        tokenizer: its tokenizer; any of its ``ends`` ends a request.
        limits: what is given.

    Attributes:
        counters: totals since the start, for metrics: ``requests_<reason>``, ``requests_cancelled``, ``prompt_tokens``,
            ``generated_tokens``, ``turns``, ``busy_seconds``, ``errors``.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, limits: Limits = Limits()):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.device = model.embed_tokens.weight.device
        names = [f"requests_{reason}" for reason in ("stop", "length", "timeout", "error", "cancelled")]
        self.counters: dict[str, float] = dict.fromkeys(
            [*names, "prompt_tokens", "generated_tokens", "turns", "busy_seconds", "errors"], 0
        )
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._rows: list[Job] = []  # one for each row of the state
        self._state: Any = None
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="linnet-engine", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue requests, all of them or none.

        Raises:
            Busy: there is no room for them in the queue.
            Stopped: :meth:`stop` was called.
        """
        with self._wake:
            if not self._open:
                raise Stopped
            free = self.limits.slots - len(self._rows) - len(self._reading)
            if len(self._waiting) + len(jobs) > self.limits.waiting + max(free, 0):
                raise Busy
            self._waiting.extend(jobs)
            self._wake.notify()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more requests; finish those there are, for so long, and give up the rest."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join(seconds)
        for job in [*self._waiting, *self._reading, *self._rows]:
            job.cancelled = True
        self._thread.join()

    def gauges(self) -> dict[str, float]:
        """Figures of this moment: requests ``waiting`` and ``running``, and ``state_bytes``."""
        return {
            "requests_waiting": len(self._waiting),
            "requests_running": len(self._rows) + len(self._reading),
            "state_bytes": state_bytes(self._state) + sum(state_bytes(job.state) for job in self._reading),
        }

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._open and not (self._waiting or self._reading or self._rows):
                    self._wake.wait()
                if not (self._waiting or self._reading or self._rows):
                    return
            start = time.perf_counter()
            try:
                with torch.inference_mode():
                    self._turn()
            except Exception:  # out of memory, say: these requests fail, the next ones find an empty batch
                logging.getLogger("linnet.serving").exception("a turn failed")
                self.counters["errors"] += 1
                failed, self._reading, self._rows, self._state = [*self._reading, *self._rows], [], [], None
                for job in failed:
                    self._end(job, "", "error")
            self.counters["turns"] += 1
            self.counters["busy_seconds"] += time.perf_counter() - start

    def _turn(self) -> None:
        self._drop()
        with self._wake:
            while self._waiting and len(self._rows) + len(self._reading) < self.limits.slots:
                self._reading.append(self._waiting.popleft())
                self._start(self._reading[-1])
        if self._rows:
            self._decode()
        if self._reading:
            self._prefill()

    def _start(self, job: Job) -> None:
        job.text = TextStream(self.tokenizer, job.stop)
        job.generator = torch.Generator(self.device)
        job.generator.seed() if job.seed is None else job.generator.manual_seed(job.seed)

    def _drop(self) -> None:
        """Let go of requests that were cancelled or have had their time."""
        now = time.monotonic()

        def over(job: Job) -> bool:
            if not job.cancelled and now - job.born > self.limits.seconds:
                self._end(job, "" if job.text is None else job.text(None), "timeout")
                return True
            self.counters["requests_cancelled"] += job.cancelled
            return job.cancelled

        with self._wake:
            self._waiting = deque(job for job in self._waiting if not over(job))
        self._reading = [job for job in self._reading if not over(job)]
        self._keep([i for i, job in enumerate(self._rows) if not over(job)])

    def _keep(self, kept: list[int]) -> None:
        """Only these rows of the batch."""
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        self._state = _trimmed(select_rows(self._state, torch.tensor(kept, device=self.device))) if kept else None

    def _prefill(self) -> None:
        budget = self.limits.turn_tokens
        batch: list[tuple[Job, int]] = []
        for job in self._reading:
            if budget <= 0:
                break
            batch.append((job, min(len(job.ids) - job.read, budget)))
            budget -= batch[-1][1]
        tokens = [job.ids[job.read + i] for job, count in batch for i in range(count)]
        segments = None
        if len(batch) > 1:
            segments = Segments.from_lengths([count for _, count in batch], self.device)
        state = None
        if any(job.state is not None for job, _ in batch):
            state = join_rows([self.model.init_state(1) if job.state is None else job.state for job, _ in batch])
        out = self.model(torch.tensor([tokens], device=self.device), state, segments, last_only=True)
        ready = []
        for i, (job, count) in enumerate(batch):
            job.read += count
            self.counters["prompt_tokens"] += count
            if job.read == len(job.ids):
                ready.append(i)
                job.state = None
            elif len(batch) == 1:
                job.state = out.state
            else:
                job.state = _trimmed(select_rows(out.state, torch.tensor([i], device=self.device)))
        if not ready:
            return
        jobs = [batch[i][0] for i in ready]
        chosen = torch.tensor(ready, device=self.device)
        stays = self._draw(jobs, out.logits[:, -1].index_select(0, chosen))
        self._reading = [job for job in self._reading if job not in jobs]  # until here they fail with a failing turn
        if stays:
            fresh = select_rows(out.state, chosen[torch.tensor(stays, device=self.device)])
            self._state = fresh if self._state is None else join_rows([self._state, fresh])
            self._rows += [jobs[i] for i in stays]

    def _decode(self) -> None:
        tokens = torch.tensor([[job.token] for job in self._rows], device=self.device)
        out = self.model(tokens, self._state, last_only=True)
        self._state = out.state
        self._keep(self._draw(self._rows, out.logits[:, -1]))

    def _draw(self, jobs: list[Job], logits: Tensor) -> list[int]:
        """A token for every job; the places of those that go on."""
        broken = ~logits.amax(-1).isfinite()  # no probabilities: this row's request fails, and no other
        logits = logits.masked_fill(broken[:, None], 0)
        drawn = [
            sample(row, temperature=job.temperature, top_k=job.top_k, top_p=job.top_p, generator=job.generator)
            for job, row in zip(jobs, logits.split(1), strict=True)
        ]
        tokens, goes_on = torch.cat(drawn).where(~broken, -1).tolist(), []  # the device is waited for once
        for i, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            assert job.text is not None
            if token < 0:
                logging.getLogger("linnet.serving").error("logits of a request are not finite")
                self.counters["errors"] += 1
                self._end(job, job.text(None), "error")
                continue
            job.token, job.drawn = token, job.drawn + 1
            self.counters["generated_tokens"] += 1
            if token in self.tokenizer.ends:
                self._end(job, job.text(None), "stop")
                continue
            piece = job.text(token)
            if job.text.stopped:
                self._end(job, piece, "stop")
            elif job.drawn >= job.max_tokens:
                self._end(job, piece + job.text(None), "length")
            else:
                goes_on.append(i)
                self._tell(job, Event(piece, job.drawn, None))
        return goes_on

    def _end(self, job: Job, text: str, reason: str) -> None:
        self.counters[f"requests_{reason}"] += 1
        self._tell(job, Event(text, job.drawn, reason))

    def _tell(self, job: Job, event: Event) -> None:
        if not job.cancelled:
            try:
                job.emit(event)
            except RuntimeError:  # the event loop it lived in has gone
                job.cancelled = True


def _trimmed(state: Any) -> Any:
    """Without the slots of a cache that are padding in every row, which the longest sequence may leave behind."""
    if isinstance(state, AttentionState):
        slots = min(state.k.shape[1], int(state.length.max()))
        start = state.k.shape[1] - slots
        return state if start == 0 else AttentionState(state.k[:, start:], state.v[:, start:], state.length)
    if isinstance(state, tuple):
        parts = [_trimmed(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
