"""The endpoint: OpenAI's completions over an :class:`~.batching.Engine`, on Starlette.

``GET /v1/models``, ``POST /v1/completions`` (whole or as server-sent events), ``GET /health``, ``GET /metrics`` (for
Prometheus). Chat completions are refused: what a chat looks like is a template that some converted models come
with and no other decoder has.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from linnet.ops.core import hint

from .batching import Busy, Engine, Event, Job, Stopped

__all__ = ["make_app"]

# What a request may hold beside what is read: accepted only where it changes nothing.
_NEUTRAL = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
# What is read, and the label of a user, which changes nothing whatever it is.
_READ = (
    "max_tokens",
    "model",
    "n",
    "prompt",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
    "user",
)
_MOST_CHOICES = 16


class Refused(Exception):
    """A request that gets an error of this status, with a reason."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        message, param = (  # halves of surrogate pairs, which no answer can hold, escaped
            None if text is None else text.encode(errors="backslashreplace").decode()
            for text in (str(self), self.param)
        )
        error = {"message": message, "type": kind, "param": param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse({"error": error}, self.status, headers)


def make_app(engine: Engine, name: str, drain_seconds: float = 30.0) -> Starlette:
    """The ASGI application.

    Args:
        engine: started; it is stopped when the application shuts down.
        name: of the model, in requests and answers.
        drain_seconds: time that running requests get then.
    """
    endpoint = _Endpoint(engine, name)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop, drain_seconds)

    routes = [
        Route("/health", endpoint.health),
        Route("/metrics", endpoint.metrics),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{model:path}", endpoint.model),
        Route("/v1/completions", endpoint.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={Refused: _refused, 404: _missing, 405: _missing}
    )
    return app


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.response()


def _missing(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return Refused(status, f"{request.method} {request.url.path}: no such thing here").response()


class _Endpoint:
    def __init__(self, engine: Engine, name: str):
        self.engine, self.name, self.started = engine, name, int(time.time())
        self.responses: dict[int, int] = {}

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        lines = []
        for kind, values in (("counter", self.engine.counters), ("gauge", self.engine.gauges())):
            for key, value in values.items():
                full = f"linnet_{key}_total" if kind == "counter" else f"linnet_{key}"
                lines += [f"# TYPE {full} {kind}", f"{full} {value:.10g}"]
        lines.append("# TYPE linnet_responses_total counter")
        lines += [f'linnet_responses_total{{status="{s}"}} {n}' for s, n in sorted(self.responses.items())]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "linnet"}

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._known(request.path_params["model"])
        return JSONResponse(self._card())

    def _known(self, model: Any) -> None:
        if model != self.name:
            raise Refused(404, f"model: there is only {self.name!r}, got {model!r}", "model", "model_not_found")

    async def chat(self, request: Request) -> Response:
        await self._body(request)
        message = "chats are not supported; write them out as the model expects them and use /v1/completions"
        raise Refused(400, message, code="unsupported")

    async def completions(self, request: Request) -> Response:
        try:
            response = await self._completions(request)
        except Refused as error:
            self.responses[error.status] = self.responses.get(error.status, 0) + 1
            raise
        self.responses[response.status_code] = self.responses.get(response.status_code, 0) + 1
        return response

    async def _completions(self, request: Request) -> Response:
        body = await self._body(request)
        self._known(body.get("model"))
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        jobs = self._jobs(body, events)
        stream = _typed(body, "stream", bool, False)
        options = _typed(body, "stream_options", dict, {})
        try:
            self.engine.submit(*jobs)
        except Busy:
            raise Refused(429, "too many requests are waiting; try again later", code="busy") from None
        except Stopped:
            raise Refused(503, "the server is shutting down", code="stopping") from None
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = self.name
        if stream:
            chunks = self._stream(head, jobs, events, bool(options.get("include_usage")))
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        texts, reasons = await self._whole(request, jobs, events)
        if "error" in reasons:
            raise Refused(500, "the request failed; the reason is in the server's log", code="failed")
        choices = [_choice(i, text, reason) for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))]
        return JSONResponse(head | {"choices": choices, "usage": _usage(jobs)})

    async def _whole(
        self, request: Request, jobs: list[Job], events: asyncio.Queue[tuple[int, Event]]
    ) -> tuple[list[str], list[str]]:
        """Texts and reasons of all jobs; given up when the client goes away."""
        texts, reasons = [""] * len(jobs), [""] * len(jobs)

        async def collect() -> None:
            while not all(reasons):
                i, event = await events.get()
                texts[i] += event.text
                reasons[i] = event.reason or ""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(gone())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                raise Refused(499, "the client closed the connection")
        finally:
            for task in tasks:
                task.cancel()
            for job in jobs:
                job.cancelled = True  # nothing to those that have ended
        return texts, reasons

    async def _stream(
        self, head: dict[str, Any], jobs: list[Job], events: asyncio.Queue[tuple[int, Event]], usage: bool
    ) -> AsyncIterator[str]:
        running = len(jobs)
        extra = {"usage": None} if usage else {}
        try:
            while running:
                i, event = await events.get()
                running -= event.reason is not None
                if event.reason == "error":
                    error = {"message": "the request failed; the reason is in the server's log", "type": "server_error"}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                elif event.text or event.reason:
                    yield f"data: {json.dumps(head | {'choices': [_choice(i, event.text, event.reason)]} | extra)}\n\n"
            if usage:
                yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(jobs)})}\n\n"
            yield "data: [DONE]\n\n"
        finally:  # also when the client has gone
            for job in jobs:
                job.cancelled = True

    async def _body(self, request: Request) -> dict[str, Any]:
        limits = self.engine.limits
        data = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limits.body_bytes:
                        raise Refused(413, f"the request is larger than {limits.body_bytes} bytes", code="too_large")
        except TimeoutError:
            raise Refused(408, f"the request took more than {limits.body_seconds:g} seconds to arrive") from None
        except ClientDisconnect:
            raise Refused(499, "the client closed the connection") from None
        try:
            body = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the request is not JSON ({type(error).__name__}: {error})") from None
        if not isinstance(body, dict):
            raise Refused(400, f"the request: expected a JSON object, got {type(body).__name__}")
        return body

    def _jobs(self, body: dict[str, Any], events: asyncio.Queue[tuple[int, Event]]) -> list[Job]:
        for key, value in body.items():
            if key in _NEUTRAL and value not in _NEUTRAL[key]:
                raise Refused(400, f"{key}: not supported, got {value!r}", key, "unsupported")
            if key not in _NEUTRAL and key not in _READ:
                raise Refused(400, f"{key}: unknown; takes {', '.join(_READ)}{hint(key, _READ)}", key, "unsupported")
        limits = self.engine.limits
        prompts = self._prompts(body.get("prompt"))
        n = _number(body, "n", 1, 1, _MOST_CHOICES, whole=True)
        if n * len(prompts) > limits.slots:
            raise Refused(400, f"prompt, n: expected at most {limits.slots} choices, got {n * len(prompts)}", "n")
        stop = body.get("stop")
        stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
        if not (isinstance(stop, list) and len(stop) <= 16 and all(isinstance(s, str) and s for s in stop)):
            raise Refused(400, "stop: expected a text or up to 16 of them, none empty", "stop")
        seed = body.get("seed")
        if seed is None:
            seed = random.getrandbits(62)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise Refused(400, f"seed: expected a whole number from 0 below 2^63, got {seed!r}", "seed")
        top_k = body.get("top_k")
        options = {
            "max_tokens": _number(body, "max_tokens", 16, 1, limits.new_tokens, whole=True),
            "temperature": float(_number(body, "temperature", 1.0, 0, 100)),
            "top_k": None if top_k in (None, 0, -1) else _number(body, "top_k", None, 1, 2**31, whole=True),
            "top_p": float(_number(body, "top_p", 1.0, 1e-6, 1)),
            "stop": stop,
        }
        options["top_p"] = None if options["top_p"] == 1 else options["top_p"]
        loop = asyncio.get_running_loop()
        jobs = []
        for i, ids in enumerate(ids for ids in prompts for _ in range(n)):

            def emit(event: Event, i: int = i) -> None:
                loop.call_soon_threadsafe(events.put_nowait, (i, event))

            jobs.append(Job(ids, emit, seed=seed + i % n, **options))
        return jobs

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """Token ids of each prompt. A text begins a document; token ids are taken as they are."""
        if prompt is None:
            prompt = ""
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
        found = [self._ids(one) for one in (prompt if several else [prompt])]
        longest = max(len(ids) for ids in found)
        if longest > self.engine.limits.prompt_tokens:
            message = f"prompt: expected at most {self.engine.limits.prompt_tokens} tokens, got {longest}"
            raise Refused(400, message, "prompt", "context_length_exceeded")
        return found

    def _ids(self, prompt: Any) -> list[int]:
        tokenizer, vocab = self.engine.tokenizer, self.engine.model.config.vocab_size
        if isinstance(prompt, str):
            try:
                return [tokenizer.begin, *(int(i) for i in tokenizer.encode(prompt.encode()))]
            except ValueError as error:  # half of a surrogate pair
                raise Refused(400, f"prompt: not a text ({error})", "prompt") from None
        whole = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
        if not whole or not prompt or not 0 <= min(prompt) <= max(prompt) < vocab:
            raise Refused(
                400, f"prompt: expected a text, or token ids from 0 to {vocab - 1}, or a list of either", "prompt"
            )
        return prompt


def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}


def _usage(jobs: list[Job]) -> dict[str, int]:
    prompts = {id(job.ids): len(job.ids) for job in jobs}  # one for all `n` choices
    prompt, drawn = sum(prompts.values()), sum(job.drawn for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise Refused(400, f"{name}: expected {kind.__name__}, got {type(value).__name__}", name)
    return default if value is None else value


def _number(body: dict[str, Any], name: str, default: Any, low: float, high: float, *, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return default
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise Refused(400, f"{name}: expected {kind} from {low:g} to {high:g}, got {value!r}", name)
    return value
