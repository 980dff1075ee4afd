"""The endpoint on loopback: the same text as offline, for many clients at once, and what bad ones do to others."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from typer.testing import CliRunner

from linnet.cli import app
from linnet.models import Decoder, DecoderConfig, atomic_folder, generate
from linnet.models.io import write_checkpoint
from linnet.tasks import ByteTokenizer, TextStream

openai = pytest.importorskip("openai", reason="needs the openai client")
uvicorn = pytest.importorskip("uvicorn", reason="needs linnet[serve]")
pytest.importorskip("starlette", reason="needs linnet[serve]")
pytestmark = pytest.mark.filterwarnings("default")  # libraries that are not ours warn about themselves

END = ByteTokenizer.end
MIXERS = [
    "gla(num_heads=2)",
    "attention(num_heads=2)",
    "gated_deltanet(num_heads=2, head_dim=8)",
    "attention(window=5)",
]


def decoder(mixers=MIXERS):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=257, d_model=16, num_layers=len(mixers), mixers=mixers, mlp_hidden=16, init_std=0.5
    )
    return Decoder(config).double().eval()  # in which two tokens are never so close that rounding decides


def offline(model, prompt, max_tokens, *, stop=(), temperature=0.0, top_p=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [END, *prompt.encode()]
    out = generate(
        model, [ids], max_new_tokens=max_tokens, stop=[END], temperature=temperature, top_p=top_p, generator=generator
    )
    text, whole = TextStream(ByteTokenizer(), stop), ""
    for token in out.tokens[0, : int(out.lengths[0])].tolist():
        whole += text(token)
        if text.stopped:
            return whole
    return whole + text(None)


class Served:
    """A server in a thread."""

    def __init__(self, model, **limits):
        from linnet.interop.serving.app import make_app
        from linnet.interop.serving.batching import Engine, Limits
        from linnet.interop.serving.connections import timely_connections

        self.engine = Engine(model, ByteTokenizer(), Limits(**limits))
        http = timely_connections(self.engine.limits.body_seconds)
        config = uvicorn.Config(make_app(self.engine, "tiny", 5), http=http, port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="-", max_retries=0)

    def complete(self, prompt, **options):
        return self.client.completions.create(model="tiny", prompt=prompt, **options)

    def post(self, body, path="/v1/completions"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def idle(self):
        """Wait until no request is held."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            gauges = self.engine.gauges()
            if gauges["requests_running"] == gauges["requests_waiting"] == gauges["state_bytes"] == 0:
                return True
            time.sleep(0.01)
        return False

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def served(one_thread):
    server = Served(decoder(), slots=8, waiting=60, prompt_tokens=300, new_tokens=200, turn_tokens=32, body_seconds=2)
    yield server
    server.stop()


def test_answers_are_those_of_offline_generation(served, monkeypatch):
    model = served.engine.model
    assert [m.id for m in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    out = served.complete("hello", max_tokens=20, temperature=0)
    expected = offline(model, "hello", 20)
    assert out.choices[0].text == expected
    assert out.usage.prompt_tokens == 6 and out.usage.completion_tokens <= 20
    pieces = list(
        served.complete("hello", max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == expected
    assert pieces[-1].usage.completion_tokens == out.usage.completion_tokens
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] in ("length", "stop")
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
    varied = offline(model, "hello", 40, temperature=1.0, seed=3)
    stop = next(c for c in varied[3:] if c.isascii() and c not in varied[:3])
    cut = served.complete("hello", stop=stop, **options)
    assert cut.choices[0].text == varied[: varied.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    whole = served.complete("hello", **options)
    monkeypatch.setattr(served.engine.tokenizer, "ends", (END, ord(stop)))
    ended = served.complete("hello", **options)
    assert (ended.choices[0].text, ended.choices[0].finish_reason) == (cut.choices[0].text, "stop")
    assert ended.usage.completion_tokens == cut.usage.completion_tokens <= whole.usage.completion_tokens
    monkeypatch.undo()
    sampled = served.complete("x", max_tokens=15, temperature=0.8, top_p=0.9, seed=5, n=2)
    for i, choice in enumerate(sampled.choices):
        assert choice.text == offline(model, "x", 15, temperature=0.8, top_p=0.9, seed=5 + i)
    assert sampled.usage.prompt_tokens == 2  # read twice, asked once
    several = served.complete(["a", "bc"], max_tokens=5, temperature=0)
    assert [c.text for c in several.choices] == [offline(model, p, 5) for p in ("a", "bc")]
    ids = served.complete([END, *b"hello"], max_tokens=20, temperature=0)
    assert ids.choices[0].text == expected


def test_many_clients_of_all_kinds_at_once(served):
    """More clients than slots, prompts longer than a turn, and some that hang up."""
    model = served.engine.model

    def client(i):
        prompt = f"{i} " * (1 + 30 * (i % 5 == 0))
        options = {"max_tokens": 5 + 7 * i % 30, "temperature": 0.7 * (i % 2), "seed": i}
        if i % 6 == 5:
            with served.complete(prompt, stream=True, **(options | {"max_tokens": 200})) as stream:
                next(iter(stream), None)
            return True
        if i % 2:
            text = "".join(p.choices[0].text for p in served.complete(prompt, stream=True, **options))
        else:
            text = served.complete(prompt, **options).choices[0].text
        return text == offline(
            model, prompt, options["max_tokens"], temperature=options["temperature"], seed=options["seed"]
        )

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(client, range(48)))
    assert served.idle()


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{not json", 400, "not JSON"),
        (b"[" * 100000, 400, "not JSON"),
        ([], 400, "JSON object"),
        ({"prompt": "x"}, 404, "there is only 'tiny'"),
        ({"model": "tiny", "prompt": 5}, 400, "prompt: expected a text"),
        ({"model": "tiny", "prompt": [1, 257]}, 400, "from 0 to 256"),
        ({"model": "tiny", "prompt": []}, 400, "prompt: expected"),
        ({"model": "tiny", "prompt": "x" * 400}, 400, "at most 300 tokens, got 401"),
        ({"model": "tiny", "prompt": "\ud800"}, 400, "prompt: not a text"),
        ({"model": "tiny", "max_tokens": 0}, 400, "max_tokens: expected a whole number from 1 to 200, got 0"),
        ({"model": "tiny", "max_tokens": True}, 400, "max_tokens"),
        ({"model": "tiny", "temperature": -1}, 400, "temperature"),
        ({"model": "tiny", "top_p": "all"}, 400, "top_p"),
        ({"model": "tiny", "n": 9}, 400, "at most 8 choices"),
        ({"model": "tiny", "stop": [""]}, 400, "stop"),
        ({"model": "tiny", "seed": 1.5}, 400, "seed"),
        ({"model": "tiny", "stream": "yes"}, 400, "stream: expected bool"),
        ({"model": "tiny", "logprobs": 3}, 400, "logprobs: not supported"),
        ({"model": "tiny", "\ud800": 0}, 400, "\\ud800: unknown"),
        ({"model": "tiny", "user": "me", "temperatur": 0}, 400, "temperatur: unknown; takes max_tokens, model, n"),
        (b" " * 2_000_000, 413, "larger than 1048576 bytes"),
    ],
)
def test_bad_requests_get_a_reason(served, body, status, reason):
    got, answer = served.post(body)
    assert (got, reason in answer["error"]["message"]) == (status, True), answer


def test_other_paths_slow_requests_and_metrics(served):
    status, answer = served.post({"model": "tiny", "messages": []}, "/v1/chat/completions")
    assert (status, answer["error"]["code"]) == (400, "unsupported")
    assert served.post({}, "/v1/nothing")[0] == 404
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    for before in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as slow:
            slow.sendall(before)
            if before.startswith(b"GET"):
                answer = b""
                while b"ok" not in answer:
                    answer += slow.recv(1000)
                slow.sendall(b"GET /hea")
            start = time.monotonic()
            for more in (b"l", b"e", b"t") if before else (b"G", b"E", b"T"):  # what drips in gains no time
                time.sleep(0.3)
                slow.sendall(more)
            assert slow.recv(100) == b"" and time.monotonic() - start < 5
    with pytest.raises(openai.NotFoundError, match="there is only 'tiny'"):
        served.client.completions.create(model="huge", prompt="x")
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:
        text = answer.read().decode()
    figures = dict(re.findall(r"^(linnet_\S+) (\S+)$", text, re.MULTILINE))
    assert float(figures["linnet_generated_tokens_total"]) > 100
    assert float(figures["linnet_requests_running"]) == 0
    assert float(figures['linnet_responses_total{status="408"}']) >= 1


def test_a_full_queue_a_time_limit_and_a_failing_turn():
    model = decoder(["gla(num_heads=2)"])
    with torch.no_grad():
        model.lm_head.weight[END] = 0  # never the end of a document: of 256 others one is always above zero
    server = Served(model, slots=1, waiting=0, seconds=100, new_tokens=10**6)
    patient = server.engine.limits
    try:
        with server.complete("x", max_tokens=10**6, temperature=0, stream=True) as endless:
            first = iter(endless)
            next(first)
            with pytest.raises(openai.RateLimitError, match="too many requests"):
                server.complete("y")
            server.engine.limits = dataclasses.replace(patient, seconds=1e-3)
            reasons = [p.choices[0].finish_reason for p in first]
        assert reasons[-1] == "timeout"
        assert server.idle()
        server.engine.limits = patient
        forward, model.forward = model.forward, None
        with pytest.raises(openai.InternalServerError, match="server's log"):
            server.complete("y")
        model.forward = lambda *given, **options: forward(*given, **options)._replace(logits=None)  # in drawing
        with pytest.raises(openai.InternalServerError, match="server's log"):
            server.complete("y")
        model.forward = forward
        assert server.complete("y", max_tokens=3, temperature=0).choices[0].text == offline(model, "y", 3)
    finally:
        server.stop()
    from linnet.interop.serving.batching import Job, Stopped

    with pytest.raises(Stopped):
        server.engine.submit(Job([1], print))


def test_a_request_without_probabilities_fails_alone(served, monkeypatch):
    model = served.engine.model
    expected, forward = offline(model, "hello", 150), model.forward

    def poisoned(tokens, state, segments=None, **options):
        out = forward(tokens, state, segments, **options)
        last = tokens[:, -1] if segments is None else tokens[0, segments.cu_seqlens[1:] - 1]
        return out._replace(logits=out.logits.masked_fill((last == 200)[:, None, None], torch.nan))

    monkeypatch.setattr(model, "forward", poisoned)
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(served.complete, "hello", max_tokens=150, temperature=0)
        with pytest.raises(openai.InternalServerError, match="server's log"):
            served.complete([END, 200], max_tokens=5)
        assert good.result().choices[0].text == expected
    assert served.idle()


@pytest.mark.slow
def test_the_command_stops_when_its_requests_have_ended(tmp_path):
    model = decoder(["gla(num_heads=2)"])
    with atomic_folder(tmp_path / "tiny") as partial:
        write_checkpoint(partial, model.config.to_dict(), model.state_dict())
        ByteTokenizer().save(partial)
    command = [sys.executable, "-m", "linnet.cli", "serve", str(tmp_path / "tiny"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        said = re.fullmatch(r"serving tiny on (http://127.0.0.1:(\d+)/v1) .*\n", server.stdout.readline())
        taken = CliRunner().invoke(app, ["serve", str(tmp_path / "tiny"), "--port", said[2]])
        assert f"host, port: cannot listen on 127.0.0.1:{said[2]} (Address already in use" in str(taken.exception)
        client = openai.OpenAI(base_url=said[1], api_key="-", max_retries=20)
        stream = iter(client.completions.create(model="tiny", prompt="x", max_tokens=100, temperature=0, stream=True))
        text = next(stream).choices[0].text
        server.send_signal(signal.SIGTERM)
        text += "".join(p.choices[0].text for p in stream)
        assert text == offline(model, "x", 100)
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.stdout.close()
