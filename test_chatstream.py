"""Tests of chatstream: real sockets on loopback, both transports, no mocking of HTTP.

The server's side of a test is a script of bytes and pauses. Only sleep and random are
ever replaced, and no test depends on how fast the machine is.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import dataclasses
import email.utils
import gc
import gzip
import http.client
import importlib.util
import io
import json
import logging
import os
import pathlib
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import types
import typing
import warnings
import zlib

import pytest

import chatstream as cs
from chatstream import (
    Chunk,
    Completed,
    Message,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

try:
    import urllib3
except ImportError:
    urllib3 = None

needs_urllib3 = pytest.mark.skipif(urllib3 is None, reason="urllib3 is not installed")

HERE = pathlib.Path(__file__).parent
KEY = "sk-secret-0123456789"
PATIENCE = 30  # seconds: no wait in here is longer, and none is meant to be

# --------------------------------------------------------------------------------------
# A server whose script is bytes and pauses
# --------------------------------------------------------------------------------------

CLOSE, RESET, HOLD, DEAF = "close", "reset", "hold", "deaf"


class Server:
    """Answers request n with script n (the last one again and again).

    A script is a list of steps: bytes are sent; a number is a pause in seconds; CLOSE
    ends the connection, RESET breaks it, HOLD waits until the client leaves; a callable
    is called. A script that begins with DEAF runs before the request's body is read.
    """

    def __init__(self, *scripts, tls=None, family=socket.AF_INET):
        host = "[::1]" if family == socket.AF_INET6 else "127.0.0.1"
        self.scripts = scripts or ([reply(sse(C("hi"), DONE))],)
        self.requests = []
        self.begun = 0  # requests whose headers have come
        self.connections = 0
        self.left = 0  # connections that the client has ended
        self.stopping = threading.Event()
        self.tls = tls
        self.listener = socket.create_server((host.strip("[]"), 0), family=family)
        self.port = self.listener.getsockname()[1]
        self.origin = f"http{'s' if tls else ''}://{host}:{self.port}"
        self.url = self.origin + "/v1"
        self.lock = threading.Lock()
        self.sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stopping.set()
        self.listener.close()
        for sock in self.sockets:
            sock.close()

    def _accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with self.lock:
                self.connections += 1
                self.sockets.append(sock)
            threading.Thread(
                target=self._serve, args=(sock, self.connections), daemon=True
            ).start()

    def _serve(self, sock, number):
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
                self.sockets.append(sock)
            with sock, sock.makefile("rb") as file:
                while self._answer(sock, file, number):
                    pass
        except (OSError, ValueError):
            pass
        finally:
            with self.lock:
                self.left += 1

    def _answer(self, sock, file, number):
        line = file.readline()
        if not line:
            return False
        method, target, _ = line.decode().split(" ", 2)
        headers = []
        while line := file.readline().strip():
            name, _, value = line.decode("latin-1").partition(": ")
            headers.append((name, value))
        request = Request(method, target, headers, b"", number)
        with self.lock:
            script = list(self.scripts[min(self.begun, len(self.scripts) - 1)])
            self.begun += 1
        if script[:1] == [DEAF]:
            script.pop(0)
        else:
            request.body = file.read(int(request.header("Content-Length") or 0))
        with self.lock:
            self.requests.append(request)
        for step in script:
            if isinstance(step, bytes):
                sock.sendall(step)
            elif isinstance(step, (int, float)):
                if self.stopping.wait(step):
                    return False
            elif step == CLOSE:
                return False
            elif step == RESET:
                linger = struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.close()
                return False
            elif step == HOLD:
                file.read(1)
                return False
            else:
                step(sock, file)
        return True

    def wait_for_leaving(self, count=1):
        deadline = time.monotonic() + PATIENCE
        while self.left < count:
            assert time.monotonic() < deadline, "the connection was not closed"
            self.stopping.wait(0.01)


@dataclasses.dataclass
class Request:
    method: str
    target: str
    headers: list
    body: bytes
    connection: int

    def header(self, name):
        return {n.lower(): v for n, v in self.headers}.get(name.lower())

    @property
    def json(self):
        return json.loads(self.body)


def C(content=None, finish=None, index=0, delta=None, **top):
    """A chunk with one choice."""
    if delta is None:
        delta = {} if content is None else {"content": content}
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "model": "m1", "choices": [choice], **top}


DONE = "[DONE]"
STOP = C(finish="stop")


def sse(*chunks, end="\n\n", start="data: "):
    texts = (c if isinstance(c, str) else json.dumps(c) for c in chunks)
    return "".join(f"{start}{text}{end}" for text in texts).encode()


def head(status="200 OK", *headers, type="text/event-stream"):
    lines = [f"HTTP/1.1 {status}", *headers]
    if type:
        lines.append(f"Content-Type: {type}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def chunked(*pieces):
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces)


def reply(body=b"", status="200 OK", *headers, type="text/event-stream"):
    """A whole reply, chunked."""
    start = head(status, "Transfer-Encoding: chunked", *headers, type=type)
    return start + (chunked(body) if body else b"") + b"0\r\n\r\n"


def error(status, body, *headers, type="application/json"):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(status, f"Content-Length: {len(text)}", *headers, type=type) + text


CHUNKED = head("200 OK", "Transfer-Encoding: chunked")
SPOKEN = TextDelta("hi")

# --------------------------------------------------------------------------------------
# Fixtures
# --------------------------------------------------------------------------------------

TRANSPORTS = ["urllib3", "http.client"] if urllib3 else ["http.client"]


@pytest.fixture(params=TRANSPORTS)
def transport(request, monkeypatch):
    if request.param == "http.client":
        monkeypatch.setitem(sys.modules, "urllib3", None)
    return request.param


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, request):
    names = [*os.environ]
    for name in names:
        if name.lower().endswith("_proxy") or name.startswith(("OPENAI_", "SSL_CERT")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CHATSTREAM_MODEL", raising=False)
    yield
    cs._shared_pool.cache_clear()
    old = sys.version_info < (3, 10) or urllib3 and urllib3.__version__ < "2"
    if old and re.search("tls|proxy", request.node.name):
        with warnings.catch_warnings():  # they leave sockets of failed connects open
            warnings.simplefilter("ignore")
            gc.collect()


@pytest.fixture
def sleeps(monkeypatch):
    """The waits between tries, which take no time here; random is 1."""
    waits = []
    monkeypatch.setattr(cs, "_sleep", lambda seconds, woken: waits.append(seconds))
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    return waits


def ask(server, messages="hello", **options):
    options.setdefault("idle_timeout", PATIENCE)
    options.setdefault("max_retries", 0)
    url = server if isinstance(server, str) else server.url
    return cs.stream(messages, model="m", **{"base_url": url, **options})


def collect(events):
    """-> the events, and the ChatStreamError that ended them or None."""
    got = []
    try:
        for event in events:
            got.append(event)
    except cs.ChatStreamError as failure:
        return got, failure
    return got, None


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# --------------------------------------------------------------------------------------
# The reference, row by row (codex-rs core/src/chat_completions.rs, 2025-05)
# --------------------------------------------------------------------------------------


def test_ref_instructions_become_a_leading_system_message(transport):
    with Server() as server:
        list(ask(server, instructions="be brief"))
    assert server.requests[0].json["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]


def test_ref_a_message_goes_out_as_one_string(transport):
    history = [{"role": "user", "content": "a"}, Message(content="b", reasoning="r")]
    with Server() as server:
        list(ask(server, history))
    sent = server.requests[0].json["messages"]
    assert sent == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_ref_payload_url_and_headers_are_exactly_these(transport):
    with Server() as server:
        list(ask(server, api_key=KEY, base_url=server.url + "//", temperature=0.5))
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.json == {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "temperature": 0.5,
    }
    assert sorted((n.lower(), v) for n, v in request.headers) == [
        ("accept", "text/event-stream"),
        ("accept-encoding", "identity"),
        ("authorization", f"Bearer {KEY}"),
        ("content-length", str(len(request.body))),
        ("content-type", "application/json"),
        ("host", f"127.0.0.1:{server.port}"),
        ("user-agent", f"chatstream/{cs.__version__}"),
    ]


def test_ref_bearer_key_only_if_there_is_one(transport, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as server:
        list(ask(server))
        list(ask(server, provider="openai"))
    assert server.requests[0].header("Authorization") is None
    assert server.requests[1].header("Authorization") == f"Bearer {KEY}"


def test_ref_missing_key_is_an_error_with_instructions(monkeypatch):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with pytest.raises(
        cs.MissingAPIKeyError, match=r"GROQ_API_KEY.*console\.groq"
    ) as e:
        cs.stream("x", model="m", provider="groq")
    assert e.value.env_key == "GROQ_API_KEY"
    assert "https://console.groq.com/keys" in e.value.instructions


@pytest.mark.parametrize("status", [300, 400, 401, 403, 404, 409, 422, 600, 999])
def test_ref_other_statuses_are_raised_at_once(transport, status):
    with Server([error(f"{status} No", {"error": {"message": "bad", "code": 7}})]) as s:
        got, failure = collect(ask(s, max_retries=3))
    assert (got, len(s.requests), type(failure)) == ([], 1, cs.StatusError)
    assert (failure.status, failure.message, failure.code) == (status, "bad", 7)
    assert json.loads(failure.body) == {"error": {"message": "bad", "code": 7}}
    assert str(status) in str(failure)
    assert "bad" in str(failure)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_ref_429_and_5xx_are_retried(transport, sleeps, status, caplog):
    with Server(
        [error(f"{status} ", {"error": "busy"})], [reply(sse(C("hi"), STOP, DONE))]
    ) as s:
        assert list(ask(s, max_retries=1))[0] == SPOKEN
    assert (len(s.requests), sleeps) == (2, [0.2])
    (line,) = warnings_in(caplog)
    assert str(status) in line
    assert "0.20 s" in line


def test_ref_backoff_doubles(transport, sleeps):
    scripts = [error("429 Slow", {})], [error("503 Busy", {})], [reply(sse(STOP, DONE))]
    with Server(*scripts) as server:
        list(ask(server, max_retries=4))
    assert sleeps == [0.2, 0.4]


def test_ref_backoff_has_jitter_and_a_ceiling(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    delays = cs._backoff()
    first = [next(delays) for _ in range(12)]
    assert first[:3] == pytest.approx([0.22, 0.44, 0.88])
    assert first[-1] == 30.0


def test_ref_more_than_max_retries_is_retry_limit(transport, sleeps):
    with Server([error("500 Oops", {"error": {"message": "the GPU burns"}})]) as server:
        got, failure = collect(ask(server, max_retries=2))
    assert (got, len(server.requests)) == ([], 3)
    assert type(failure) is cs.RetryLimitError
    assert (failure.status, failure.attempts) == (500, 3)
    assert failure.message == "the GPU burns"


def test_ref_retry_after_in_whole_seconds(transport, sleeps):
    with Server(
        [error("429 Slow", {}, "Retry-After: 1")], [reply(sse(STOP))]
    ) as server:
        list(ask(server, max_retries=1))
    assert sleeps == [1.0]


@pytest.mark.parametrize("breakage", [[RESET], [CLOSE], [b"HTTP/1.1 2", CLOSE]])
def test_ref_transport_errors_are_retried(transport, sleeps, breakage):
    with Server(breakage, breakage, [reply(sse(C("hi"), DONE))]) as server:
        assert list(ask(server, max_retries=2))[0] == SPOKEN
    assert (len(server.requests), sleeps) == (3, [0.2, 0.4])


def test_ref_the_last_transport_error_is_raised(transport, sleeps):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    got, failure = collect(ask(f"http://127.0.0.1:{port}/v1", max_retries=2))
    assert (got, type(failure)) == ([], cs.TransportError)
    assert failure.attempts == 3
    assert isinstance(failure.__cause__, ConnectionRefusedError)
    assert "refused" in str(failure)
    assert f"127.0.0.1:{port}" in str(failure)


@pytest.mark.parametrize(
    "script", [[HOLD], [CHUNKED, HOLD], [CHUNKED + chunked(sse(C("hi"))), HOLD]]
)
def test_ref_idle_timeout(transport, script):
    with Server(script) as server:
        started = time.monotonic()
        got, failure = collect(ask(server, idle_timeout=0.2, max_retries=4))
        assert time.monotonic() - started >= 0.2
    assert type(failure) is cs.IdleTimeoutError
    assert isinstance(failure, TimeoutError)
    assert failure.seconds == 0.2
    assert "idle timeout waiting for SSE" in str(failure)
    assert len(server.requests) == 1
    assert got == ([SPOKEN] if len(script[0]) > len(CHUNKED) else [])


def test_ref_done_is_trimmed_and_stops(transport):
    body = sse(C("hi"), "[DONE]  ", C("never"))
    with Server([reply(body)]) as server:
        assert list(ask(server)) == [SPOKEN, Completed("c1", "m1")]


def test_ref_clean_end_of_an_empty_body_is_completed_and_flagged(transport, caplog):
    with Server([reply()]) as server:
        assert list(ask(server)) == [Completed()]
    (line,) = warnings_in(caplog)
    assert "ended without a finish_reason" in line


def test_ref_a_chunk_that_is_not_json_is_skipped(transport, caplog):
    with Server([reply(sse(C("a"), "{oops", C("b"), STOP, DONE))]) as server:
        got = list(ask(server))
    assert got == [TextDelta("a"), TextDelta("b"), completed(skipped=1)]
    assert len(warnings_in(caplog)) == 1
    assert "{oops" in warnings_in(caplog)[0]


def test_ref_content_is_one_event_each(transport):
    with Server([reply(sse(C("a"), C("b"), STOP, DONE))]) as server:
        got = list(ask(server))
    assert got == [TextDelta("a"), TextDelta("b"), completed()]


def test_ref_aggregate_suppresses_deltas(transport):
    with Server([reply(sse(C("a"), C("b"), STOP, DONE))]) as server:
        got = list(cs.aggregate(ask(server)))
    assert got == [Message(content="ab", finish_reason="stop"), completed()]


def test_ref_aggregate_with_nothing_to_aggregate(transport):
    with Server([reply(sse(STOP, DONE))]) as server:
        assert list(cs.aggregate(ask(server))) == [completed()]


def test_ref_aggregate_passes_an_error_on_with_partial(transport):
    with Server([CHUNKED + chunked(sse(C("so far"))), CLOSE]) as server:
        got, failure = collect(cs.aggregate(ask(server)))
    assert (got, type(failure)) == ([], cs.TruncatedStreamError)
    assert failure.partial == (Message(content="so far"),)


def test_ref_a_slow_reader_slows_the_sender(transport):
    sent = []

    def pour(sock, file):
        piece = chunked(sse(C("x" * 60_000)))
        sock.settimeout(0.2)
        try:
            for _ in range(1000):
                sock.sendall(piece)
                sent.append(len(piece))
        except socket.timeout:
            pass

    with Server([CHUNKED, pour, CLOSE]) as server:
        events = ask(server)
        next(events)
        deadline = time.monotonic() + PATIENCE
        while server.left == 0 and time.monotonic() < deadline:
            server.stopping.wait(0.05)
        assert 0 < len(sent) < 1000
        events.close()


def test_a_large_request_is_logged_in_part(transport, caplog):
    caplog.set_level(logging.DEBUG, "chatstream")
    with Server() as server:
        list(ask(server, "é" * 100_000))
    assert all(len(r.getMessage()) < 3000 for r in caplog.records)


def test_ref_debug_logs_url_and_payload_but_no_key(transport, caplog):
    caplog.set_level(logging.DEBUG, "chatstream")
    with Server() as server:
        url = server.url + "?api-version=very-secret-version"
        list(
            ask(server, api_key=KEY, base_url=url, headers={"x-api-key": "another-key"})
        )
    own = [r.getMessage() for r in caplog.records if r.name == "chatstream"]
    text = "\n".join(own)
    assert f"{server.url}/chat/completions" in text
    assert '"content":"hello"' in text
    assert KEY not in text
    assert "secret" not in text
    assert "another-key" not in text
    assert server.requests[0].target.endswith("?api-version=very-secret-version")


def completed(reason="stop", **fields):
    reasons = {0: reason} if reason else {}
    return Completed("c1", "m1", reason, reasons, **fields)


# --------------------------------------------------------------------------------------
# What servers send: tables of (row, body, events)
# --------------------------------------------------------------------------------------


def tool(index=None, id=None, name=None, arguments=None, **extra):
    """A chunk with one tool-call delta; None leaves a member out."""
    function = {"name": name, "arguments": arguments}
    function = {k: v for k, v in function.items() if v is not None}
    call = {"index": index, "id": id, "function": function, **extra}
    return C(delta={"tool_calls": [{k: v for k, v in call.items() if v is not None}]})


def calls(*triples):
    """What aggregate() makes of tool-call chunks: (id, name, arguments) each."""
    return [tuple(t) for t in triples]


def R(text, **extra):
    return ReasoningDelta(text, 0, extra or {"reasoning_content": text})


LONG = "x" * 300
A, B, END = TextDelta("a"), TextDelta("b"), completed()
PLAIN = sse(C("a"), C("b"), STOP, DONE)
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
USED = Usage(1, 2, 3)
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def whole(message, finish="stop", **top):
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "c1", "model": "m1", "choices": [choice], **top}


#: (row of the wire format, body, events)
ROWS = [
    ("A1 LF", PLAIN, [A, B, END]),
    ("A1 CRLF", PLAIN.replace(b"\n", b"\r\n"), [A, B, END]),
    ("A1 CR", PLAIN.replace(b"\n", b"\r"), [A, B, END]),
    ("A1 CRLF inside an event", b'data: {"id":"c1","model":"m1","choices":[{"delta":\r\ndata: {"content":"a"}}]}\r\n\r\n' + sse(C("b"), STOP, DONE), [A, B, END]),
    ("E3 other lines before data", b"hello\n\n" + sse(C("a"), STOP), [A, END]),
    ("E3 other lines before data:", b"hello\n\ndata:" + sse(C("a"), STOP)[6:].replace(b"data: ", b"data:"), [A, END]),
    ("A1 mixed", sse(C("a")) + sse(C("b"), end="\r\n\n") + sse(STOP, end="\r\r"), [A, B, END]),
    (
        "A1 other separators are text",
        'data: {"choices":[{"delta":{"content":"\u2028\u2029\u0085"}}]}\n\n'.encode(),
        [TextDelta("\u2028\u2029\u0085"), Completed()],
    ),
    ("A2 UTF-8 over reads", sse('{"choices":[{"delta":{"content":"é😀漢"}}]}', DONE),
     [TextDelta("é😀漢"), Completed()]),
    (
        "A2 not UTF-8",
        b'data: {"choices":[{"delta":{"content":"a\xff\xc3"}}]}\n\ndata: [DONE]\n\n',
        [TextDelta("a\ufffd\ufffd"), Completed()],
    ),
    ("A1 VT and FF are text", b'data: {"choices":[{"delta":{"content":"\x0b\x0c"}}]}\n\n',
     [TextDelta("\x0b\x0c"), Completed()]),
    ("A3 BOM", b"\xef\xbb\xbf" + PLAIN, [A, B, END]),
    ("A3 blank lines first", b"\n\r\n\n" + PLAIN, [A, B, END]),
    ("A4 no space", sse(C("a"), C("b"), STOP, DONE, start="data:"), [A, B, END]),
    ("A4 blanks around DONE", sse(C("a"), C("b"), STOP, "  [DONE] \t"), [A, B, END]),
    ("A4 more blanks before JSON", sse(C("a"), C("b"), STOP, start="data:   "), [A, B, END]),
    (
        "A5 comments and other fields",
        b": hi\n\n:\n\nid: 1\n: x\n\ndata:\n\ndata\n\nevent: ping\n\nretry: 3\n\nodd: 1\n\n"
        + PLAIN,
        [A, B, END],
    ),
    ("A5 event: ping with JSON", b'event: ping\ndata: {"type":"ping"}\n\n' + PLAIN, [A, B, END]),
    (
        "A6 one object on several data lines",
        b'data: {"choices":\ndata: [{"delta":\ndata: {"content":"a"}}]}\n\ndata: [DONE]\n\n',
        [A, Completed()],
    ),
    (
        "A6 each line alone",
        sse(C("a"), end="\n") + b"data: junk\n" + sse(C("b"), STOP, end="\n") + b"\n",
        [A, B, completed(skipped=1)],
    ),
    ("A6 no blank lines at all", sse(C("a"), C("b"), STOP, DONE, end="\n"), [A, B, END]),
    ("A7 no blank line at the end", PLAIN[: -len("\n\ndata: [DONE]\n\n") + 1], [A, B, END]),
    ("A7 no newline at the end", sse(C("a"), C("b"), STOP)[:-2], [A, B, END]),
    ("A8 no DONE", sse(C("a"), C("b"), STOP), [A, B, END]),
    ("A9 text after DONE", PLAIN + b"garbage\ndata: {]\n\n" + sse(C("z")), [A, B, END]),
    ("A9 a chunk like those before DONE", sse(C("a"), C("b")) + b"event: end\n" + sse(DONE, C("z")), [A, B, Completed("c1", "m1")]),
    ("B1 choices empty", sse({"choices": [], "id": "", "model": ""}, C("a"), DONE),
     [A, Completed("c1", "m1")]),
    ("B1 choices null or missing", sse({"choices": None}, {"id": "i"}, {"model": "o"}, C("a"), DONE),
     [A, Completed("i", "o")]),
    ("B1 usage on its own", sse(C("a"), STOP, {"choices": [], "usage": USAGE}, DONE),
     [A, completed(usage=USED)]),
    ("B2 no delta", sse({"choices": [{"index": 0}]}, {"choices": [{"delta": None}]}, C("a"), DONE),
     [A, Completed("c1", "m1")]),
    ("B3 no index", sse({"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}, DONE),
     [A, TextDelta("b", 1), Completed()]),
    ("B4 empty content", sse(C(""), C(delta={"content": None}), C(delta={}), C(" "), DONE),
     [TextDelta(" "), Completed("c1", "m1")]),
    (
        "B5 content parts",
        sse(
            C([{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}]),
            C([{"type": "thinking", "thinking": "u"}, {"type": "text", "text": "a"}]),
            C([{"type": "reference", "reference_ids": [1]}, "b"]),
            C("c"),
            DONE,
        ),
        [ReasoningDelta("t"), ReasoningDelta("u"), A, B, TextDelta("c"), Completed("c1", "m1")],
    ),
    ("B6 reasoning_content", sse(C(delta={"reasoning_content": "r"}), DONE),
     [R("r"), Completed("c1", "m1")]),
    ("B6 reasoning", sse(C(delta={"reasoning": "r"}), C(delta={"reasoning": {"text": "s"}}),
                         C(delta={"reasoning": {"content": "t"}}), DONE),
     [R("r", reasoning="r"), R("s", reasoning={"text": "s"}), R("t", reasoning={"content": "t"}),
      Completed("c1", "m1")]),
    ("B6 reasoning_details alone", sse(C(delta={"reasoning_details": [{"text": "r"}, {"text": "s"}]}), DONE),
     [R("rs", reasoning_details=[{"text": "r"}, {"text": "s"}]), Completed("c1", "m1")]),
    ("B6 never added up",
     sse(C(delta={"reasoning": "r", "reasoning_content": "r", "reasoning_details": [{"text": "r"}]}), DONE),
     [R("r", reasoning="r", reasoning_content="r", reasoning_details=[{"text": "r"}]),
      Completed("c1", "m1")]),
    ("B7 reasoning first, and again later",
     sse(C(delta={"content": "a", "reasoning_content": "r"}), C(delta={"reasoning_content": "s"}), DONE),
     [R("r"), A, R("s"), Completed("c1", "m1")]),
    ("B8 refusal", sse(C(delta={"refusal": "no"}), STOP, DONE), [RefusalDelta("no"), END]),
    ("B9 empty finish_reason", sse(C("a", finish=""), C("b"), STOP, DONE), [A, B, END]),
    ("B10 stop, more, another reason", sse(C("a"), STOP, C("b", finish="length"), DONE), [A, B, completed("length")]),
    ("B10 stop, another reason, nothing between", sse(C("a"), STOP, C(finish="length"), DONE), [A, END]),
    ("B11 other reasons", sse(C("a", finish="eos"), DONE), [A, completed("eos")]),
    ("B11 error alone is no ServerError", sse(C("a", finish="error"), DONE), [A, completed("error")]),
    ("B12 choices interleaved",
     sse(C("a"), C("b", index=1), C("c"), C(finish="length", index=1), STOP, DONE),
     [A, TextDelta("b", 1), TextDelta("c"), Completed("c1", "m1", "stop", {0: "stop", 1: "length"})]),
    ("B13 usage in every chunk", sse(C("a", usage={"prompt_tokens": 9}), C("b", finish="stop", usage=USAGE), DONE),
     [A, B, completed(usage=USED)]),
    ("B13 zeros and null do not replace",
     sse(C("a", usage=USAGE), C("b", usage=ZEROS), C(finish="stop", usage=None), DONE),
     [A, B, completed(usage=USED)]),
    ("B13 only zeros", sse(C("a", usage=ZEROS), STOP, DONE), [A, completed(usage=Usage())]),
    ("B13 members null", sse(C("a", finish="stop", usage={**USAGE, "total_tokens": None}), DONE),
     [A, completed(usage=Usage(1, 2, 0))]),
    ("B13 choices[0].usage", sse({"choices": [{"delta": {"content": "a"}, "usage": USAGE}]}, DONE),
     [A, Completed(usage=USED)]),
    ("B13 x_groq.usage", sse(C("a", finish="stop", x_groq={"usage": USAGE}), DONE),
     [A, completed(usage=USED)]),
    ("B14 details",
     sse(C("a", finish="stop", usage={**USAGE, "completion_tokens_details": {"reasoning_tokens": 4},
                                      "prompt_tokens_details": {"cached_tokens": 5}}), DONE),
     [A, completed(usage=Usage(1, 2, 3, 5, 4))]),
    ("B14 DeepSeek", sse(C("a", finish="stop", usage={**USAGE, "prompt_cache_hit_tokens": 6}), DONE),
     [A, completed(usage=Usage(1, 2, 3, 6))]),
    ("B15 id and model change", sse(C("a", id="", model=""), C("b"), C(id="c2", model="m2", finish="stop"), DONE),
     [A, B, END]),
    ("B16 message beside delta",
     sse({"choices": [{"delta": {"content": "a"}, "message": {"content": "za"}}]}, DONE), [A, Completed()]),
    ("B17 message without delta", sse(whole({"content": "a"}), DONE), [A, END]),
    ("B17 last summary", sse(C("a"), C("b"), whole({"content": "ab"}), DONE), [A, B, END]),
    ("B17 empty delta", sse({"choices": [{"delta": {}, "message": {"content": "a"}}]}, DONE), [A, Completed()]),
    ("B17 messages of the text so far", sse(*[whole({"content": t}, None) for t in ("a", "a", "ab")], STOP, DONE), [A, B, END]),
    ("B17 of the text so far, beside empty deltas", sse(*[{"choices": [{"delta": {"content": ""}, "message": {"content": t}}]} for t in ("a", "ab")], STOP, DONE), [A, B, END]),
    ("B17 of the text so far, at last beside the same delta", sse(whole({"content": "a"}, None), whole({"content": "ab"}, None), {"choices": [
        {"delta": {"content": "ab"}, "message": {"content": "ab"}}]}, STOP, DONE), [A, B, END]),
    ("B17 of the text so far, a delta beside it, three alike but for that", sse(whole({"content": "a"}, None), *[{"choices": [
        {"delta": {"content": t}, "message": {"content": "ab"}}]} for t in ("b", "x", "y")], whole({"content": "abxyz"}), DONE), [A, B, TextDelta("x"), TextDelta("y"), END]),
    ("B17 of the reasoning so far", sse(*[whole({"reasoning_content": t}, None) for t in ("a", "ab")], STOP, DONE), [R("a"), R("b"), END]),
    ("B17 of the text so far, then none", sse(whole({"content": "No"}, None), *[whole({"content": t}, None) for t in (None, ["None"], 1)], whole({}), DONE), [TextDelta("No"), END]),
    ("B17 of the text so far, its reasoning in two members", sse(*[whole({"reasoning": "r", "reasoning_details": [{"text": "r"}], "content": t}, None) for t in ("a", "ab")], STOP, DONE),
     [R("r", reasoning="r", reasoning_details=[{"text": "r"}]), A, B, END]),
    ("B17 of the text so far, one kind in deltas", sse(whole({"reasoning": "r"}, None), {"choices": [{"delta": {"content": "a"}, "message": {"reasoning": "rs"}}]}, whole({"reasoning": "rst", "content": "a"}), DONE),
     [R("r", reasoning="r"), A, R("s", reasoning="s"), R("t", reasoning="t"), END]),
    ("B17 of the text so far, cut in a character", sse(*[whole({"content": t}, None) for t in ("a\ufffd", "ab", "abc")], STOP, DONE), [TextDelta("a\ufffd"), B, TextDelta("c"), END]),
    ("B17 of the text so far, cut in a pair", sse(*[whole({"content": t}, None) for t in ("a\ud83d", "a\ud83d\ude00", "a\ud83d\ude00b")], STOP, DONE), [A, TextDelta("😀"), B, END]),
    ("B17 messages that repeat their deltas", sse(C(delta={"role": "assistant"}), *[{"choices": [{"delta": {"content": t}, "message": {"content": t}}]} for t in "ab"], STOP, DONE), [A, B, END]),
    ("B17 deltas and messages alike, the first only in a message", sse(whole({"content": "a"}, None), {"choices": [{"delta": {"content": "b"}, "message": {"content": "b"}}]}, STOP, DONE), [A, B, END]),
    ("B17 of the text so far, of two choices", sse(*[{"choices": [{"index": i, "message": {"content": t + u}} for i, t in ((0, "x"), (1, "y"))]} for u in ("", "z")], STOP, DONE),
     [TextDelta("x"), TextDelta("y", 1), TextDelta("z"), TextDelta("z", 1), END]),
    ("B17 another text is no text so far", sse(whole({"content": "ab"}, None), whole({"content": "b"}), DONE), [TextDelta("ab"), END]),
    ("B17 a delta between", sse(whole({"content": "a"}, None), C("b"), whole({"content": "ab"}), DONE), [A, B, END]),
    ("B18 roles", sse(C(delta={"role": "assistant", "content": "a"}), C(delta={"role": None, "content": "b"}),
                      C(delta={"role": ""}, finish="stop"), DONE), [A, B, END]),
    ("B19 glued", sse(C("a"), json.dumps(C("b")) + "data: " + json.dumps(STOP) + "data: [DONE]"), [A, B, END]),
    ("B19 glued behind a cut one", sse(C("a"), '{"choices":[{"del' + "data: " + json.dumps(C("b")), STOP, DONE),
     [A, B, completed(skipped=1)]),
    ("B19 glued, cut, glued", sse('{"chdata:' + json.dumps(C("a")) + 'data: {"chodata: ' + json.dumps(C("b")), STOP),
     [A, B, completed(skipped=2)]),
    ("B19 cut in a text that speaks of data:", sse(C("a"), '{"text":"data: {\\"a\\"', C("b"), STOP), [A, B, completed(skipped=1)]),
    ("B19 JSON that speaks of data:, before a bad line", b"data: " + json.dumps(C("say data: [1] data: {}")).encode() + b"\ndata: oops\n\n" + sse(STOP), [TextDelta("say data: [1] data: {}"), completed(skipped=1)]),
    ("B19 prose that speaks of data:", sse(C("a"), "got data: {} and data: [1]", C("b"), STOP), [A, B, completed(skipped=1)]),
    ("A6 no blank lines, one cut", sse('{"choices":[{"del', C("a"), C("b"), STOP, end="\n"), [A, B, completed(skipped=1)]),
    ("A6 several lines of JSON once, then an event of several", sse(C("a"), C("b"), end="\n") + b"\nevent: ping\ndata: x\ndata: {}\ndata: y\n\n" + sse(STOP), [A, B, END]),
    ("B19 prose that speaks of [DONE]", sse(C("a"), "waiting for data: [DONE]", C("b"), STOP), [A, B, completed(skipped=1)]),
    ("B19 prose in a named event", sse(C("a")) + b"event: log\ndata: got data: {}\n\n" + sse(C("b"), STOP), [A, B, END]),
    ("B19 glued [DONE], and more", sse(C("a"), json.dumps(STOP) + "data: [DONE]", C("b")), [A, END]),
    ("B19 pretty-printed", b'data: {\n  "choices": []\n}\n\n' + PLAIN, [A, B, completed(skipped=1)]),
    ("B19 truncated at the end", sse(C("a"), C("b"), STOP) + b'data: {"choices":[{"del',
     [A, B, completed(skipped=1)]),
    ("B20 unknown members", sse(C("a", obfuscation="q7", service_tier="x", citations=[1], logprobs=1.5),
                                C("b", obfuscation="w"), STOP, DONE), [A, B, END]),
    ("B4 numbers are text", sse(*map(C, [1, 0, 0.5, True, False, "a"]), STOP, DONE),
     [TextDelta("1"), TextDelta("0"), TextDelta("0.5"), TextDelta("true"), TextDelta("false"), A, END]),
    ("B4 so they are in reasoning, but no flags", sse(C(delta={"reasoning_content": 0, "reasoning_tokens": 7, "reasoning": True}), STOP, DONE),
     [R("0", reasoning_content="0"), END]),
    ("B5 a part without a type", sse(C([{"type": None, "text": "a"}]), DONE), [A, Completed("c1", "m1")]),
    ("B21 halves beside other text", sse(*[C(delta={"reasoning": "a", "content": "\ud83d"})] * 3, DONE),
     [R("a", reasoning="a"), R("a", reasoning="a"), TextDelta("\ufffd"), R("a", reasoning="a"), TextDelta("\ufffd"), TextDelta("\ufffd"), Completed("c1", "m1")]),
    ("B21 a half after the reason", sse(C("a", "stop"), C("\ud83d")), [A, TextDelta("\ufffd"), END]),
    ("B16 message beside delta, in turn", sse(*[{"choices": [{"message": {"content": m}, "delta": {"content": "probe"}}]} for m in ("probe", "probeprobe")], DONE),
     [TextDelta("probe"), TextDelta("probe"), Completed()]),
    ("B17 a kind that came is not read again, in parts", sse(C(delta={"reasoning_content": "r"}), C("a"), whole({"content": [
        {"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]}), DONE), [R("r"), A, END]),
    ("B17 a kind that came is not read again, from parts", sse(C(delta={"reasoning_content": "r"}), whole({"content": [
        {"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]}), DONE), [R("r"), A, END]),
    ("B17 a kind that did not come is read from parts", sse(C("a"), whole({"content": [
        {"type": "thinking", "thinking": "r"}, {"type": "text", "text": "a"}]}), DONE), [A, ReasoningDelta("r"), END]),
    ("B21 surrogates", sse(C("x\ud83d"), C("\udc69y"), STOP, DONE), [TextDelta("x"), TextDelta("👩y"), END]),
    ("B21 lone surrogates in names", sse(C("a", id="c\ud83d"), tool(0, "i\ud83d", "f\ud83d", "{}"), DONE),
     [A, ToolCallDelta(0, "i\ufffd", "f\ufffd", "{}"), Completed("c\ufffd", "m1")]),
    ("B21 lone surrogates", sse(C("\ud83d"), C("z"), C("\udc69"), C("q\ud83d"), STOP, DONE),
     [TextDelta("\ufffdz"), TextDelta("\ufffd"), TextDelta("q"), TextDelta("\ufffd"), END]),
    ("B21 by kind and choice",
     sse(C("\ud83d"), C(delta={"reasoning_content": "\ud83d"}), C("\udc69"), C("b", index=1),
         C(delta={"reasoning_content": "\udc69"}), DONE),
     [R("", reasoning_content="\ud83d"), TextDelta("👩"), TextDelta("b", 1),
      R("👩", reasoning_content="\udc69"), Completed("c1", "m1")]),
    ("B22 opaque members", sse(C(delta={"reasoning_details": [{"signature": "s"}], "reasoning_opaque": "o"}), DONE),
     [R("", reasoning_details=[{"signature": "s"}], reasoning_opaque="o"), Completed("c1", "m1")]),
    ("C1", sse(tool(0, "i", "f", ""), tool(0, None, None, "{"), tool(0, None, None, "}"), DONE),
     [ToolCallDelta(0, "i", "f"), ToolCallDelta(0, "i", "f", "{"), ToolCallDelta(0, "i", "f", "}"),
      Completed("c1", "m1")]),
    ("C10 arguments an object", sse(tool(0, "i", "f", {"a": [1]}), tool(0, None, None, {"b": 2}), DONE),
     [ToolCallDelta(0, "i", "f", '{"a": [1]}'), Completed("c1", "m1")]),
    ("C10 an empty object", sse(tool(0, "i", "f", {}), DONE),
     [ToolCallDelta(0, "i", "f", "{}"), Completed("c1", "m1")]),
    ("C14 function_call", sse(C(delta={"function_call": {"name": "f", "arguments": "{"}}),
                              C(delta={"function_call": {"arguments": "}"}}), DONE),
     [ToolCallDelta(0, "", "f", "{"), ToolCallDelta(0, "", "f", "}"), Completed("c1", "m1")]),
    ("C14 beside tool_calls",
     sse(C(delta={"function_call": {"name": "f", "arguments": "{}"},
                  "tool_calls": [{"index": 0, "id": "i", "function": {"name": "f", "arguments": "{}"}}]}), DONE),
     [ToolCallDelta(0, "i", "f", "{}"), Completed("c1", "m1")]),
    ("C surrogates in arguments", sse(tool(0, "i", "f", '"\ud83d'), tool(0, None, None, '\udc69"'), DONE),
     [ToolCallDelta(0, "i", "f", '"'), ToolCallDelta(0, "i", "f", '👩"'), Completed("c1", "m1")]),
    ("D9 an object that says nothing", sse(C("a", error={"message": "", "type": "", "code": None}), STOP), [A, END]),
    ("D11 a status that is none", sse({"status": "processing", "message": "x"}, {"status": 200, "message": "x"}, C("a"), {"status": "500"}, STOP), [A, END]),
    ("D9 no error", sse(C("a", error=None), C("b", error={}), C(error="", finish="stop"), {"error": []}, DONE),
     [A, B, END]),
    ("E1 completion", json.dumps(whole({"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [
        {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, usage=USAGE)).encode(),
     [R("r"), A, ToolCallDelta(0, "i", "f", "{}"), completed(usage=USED)]),
    ("E1 pretty-printed", json.dumps(whole({"content": "a"}), indent=2).encode() + b"\n", [A, END]),
    ("E1 after comments", b": wait\n\n" + json.dumps(whole({"content": "a"})).encode(), [A, END]),
    ("A6 no blank lines, then one object on several data lines", sse(C("a"), C("b"), end="\n") + b'data: {"choices":\ndata: [{"delta": {"content":\ndata: "c"}}]}\n\n' + sse(STOP),
     [A, B, TextDelta("c"), END]),
    ("A6 a line that is none, among lines that are", sse("{oops", C("a"), end="\n") + b"\n" + sse(STOP),
     [A, completed(skipped=1)]),
    ("A13 padding", sse(": OPENROUTER PROCESSING", C("a"), "null", STOP, ":", DONE), [A, END]),
    ("A13 a named event with text", b"event: ping\ndata: still here\n\n" + sse(C("a"), STOP), [A, END]),
    ("A13 named, JSON that is no chunk", sse(C("a")) + b'event: tool.progress\ndata: {"id":"t"}\n\n' + sse(STOP), [A, END]),
    ("A14 data: data:", sse(C("a"), C("b"), STOP, DONE, start="data: data: "), [A, B, END]),
    ("A14 data:data:data:", sse(C("a"), STOP, DONE, start="data:data:data:"), [A, END]),
    ("A14 DONE without brackets", sse(C("a"), STOP, "DONE", C("z")), [A, END]),
    ("A15 glued", b"data: " + json.dumps(C("a")).encode() + json.dumps(C("b")).encode() + b"\n\n" + sse(STOP),
     [A, B, END]),
    ("A15 glued with blanks", b"data: " + json.dumps(C("a")).encode() + b" \t" + json.dumps(STOP).encode() + b"\n\n",
     [A, END]),
    ("A15 a list", sse(json.dumps([C("a"), None, C("b")]), STOP), [A, B, END]),
    ("JSON lines", sse(C("a"), C("b"), STOP, start="", end="\n"), [A, B, END]),
    ("JSON lines with blanks before", sse(C("a"), STOP, start="  ", end="\r\n"), [A, END]),
    ("JSON lines, one broken", sse(C("a"), start="", end="\n") + b'{"x\n' + sse(C("b"), STOP, start="", end="\n"),
     [A, B, completed(skipped=1)]),
    ("JSON glued as the whole body", b"".join(sse(c, start="", end="") for c in (C("a"), C("b"), STOP)), [A, B, END]),
    ("a list as the whole body", json.dumps([C("a"), C("b"), STOP]).encode(), [A, B, END]),
    ("a list as the whole body, indented", json.dumps([C("a"), STOP], indent=1).encode() + b"\n", [A, END]),
    ("JSON lines and [DONE] alone", sse(C("a"), STOP, DONE, C("z"), start="", end="\n"), [A, END]),
    ("JSON among SSE", sse(C("a")) + sse(C("b"), start="", end="\n") + sse(STOP), [A, B, END]),
    ("indented JSON among SSE", sse(C("a")) + json.dumps(C("b"), indent=2).encode() + b"\n" + sse(STOP), [A, B, END]),
    ("a log line among SSE", sse(C("a")) + b"[INFO] busy\nat {x}\n" + sse(STOP), [A, END]),
    ("NaN and control characters", b'data: {"choices":[{"delta":{"content":"a\tb"},"logprobs":NaN}],"x":-Infinity}\n\n',
     [TextDelta("a\tb"), Completed()]),
    ("B6 reasoning_text", sse(C(delta={"reasoning_text": "r"}), C(delta={"reasoning_opaque": "o"}), DONE),
     [R("r", reasoning_text="r"), R("", reasoning_opaque="o"), Completed("c1", "m1")]),
    ("B6 a list of blocks", sse(C(delta={"reasoning": [{"text": "r"}, {"content": "s"}]}), DONE),
     [R("rs", reasoning=[{"text": "r"}, {"content": "s"}]), Completed("c1", "m1")]),
    ("B6 details with a summary", sse(C(delta={"reasoning_details": [{"summary": "r"}, {"summary": [{"text": "s"}]}]}), DONE),
     [R("rs", reasoning_details=[{"summary": "r"}, {"summary": [{"text": "s"}]}]), Completed("c1", "m1")]),
    ("B6 Databricks", sse(C([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]}]),
                          C([{"type": "text", "text": "a"}]), STOP), [ReasoningDelta("r"), A, END]),
    ("B9 the words null and None", sse(C("a", finish="null"), C("b", finish="None"), STOP), [A, B, END]),
    ("B10 stop in every chunk", sse(C("a", finish="stop"), C("b", finish="stop"), C(finish="length")),
     [A, B, completed("length")]),
    ("B10 another reason, then stop", sse(C("a", finish="tool_calls"), C("b"), STOP), [A, B, completed("tool_calls")]),
    ("B14 input_tokens, and what else", sse(C("a", finish="stop", usage={"input_tokens": 1, "output_tokens": 2,
        "total_tokens": 3, "cost": 0.25, "odd": None})), [A, completed(usage=Usage(1, 2, 3, extra={"cost": 0.25}))]),
    ("B17 reasoning and calls never streamed", sse(C("a"), whole({"content": "a", "reasoning_content": "r", "tool_calls": [
        {"id": "i", "function": {"name": "f", "arguments": "{}"}}]}), DONE),
     [A, R("r"), ToolCallDelta(0, "i", "f", "{}"), END]),
    ("C14 an empty stub", sse(C("a"), C(delta={"function_call": {"name": "", "arguments": ""}}, finish="stop")), [A, END]),
    ("C14 after tool_calls", sse(tool(0, "i", "f", "{}"), C(delta={"function_call": {"name": "f", "arguments": "{}"}}), DONE),
     [ToolCallDelta(0, "i", "f", "{}"), Completed("c1", "m1")]),
    ("C18 custom", sse(C(delta={"tool_calls": [{"index": 0, "id": "i", "type": "custom", "custom": {"name": "f", "input": "a"}}]}),
                       C(delta={"tool_calls": [{"index": 0, "custom": {"input": "b"}}]}), STOP),
     [ToolCallDelta(0, "i", "f", "a", type="custom"), ToolCallDelta(0, "i", "f", "b", type="custom"), END]),
    ("C19 an object", sse(C(delta={"tool_calls": {"index": 0, "id": "i", "function": {"name": "f", "arguments": "{}"}}}), DONE),
     [ToolCallDelta(0, "i", "f", "{}"), Completed("c1", "m1")]),
    ("C the words null and None", sse(tool(0, "i", "f", "{"), tool(0, "null", "None", "}"), DONE),
     [ToolCallDelta(0, "i", "f", "{"), ToolCallDelta(0, "i", "f", "}"), Completed("c1", "m1")]),
    ("C empty members are no extra", sse(tool(0, "i", "f", "{}", a="", b=[], c={}, d=0), DONE),
     [ToolCallDelta(0, "i", "f", "{}", {"d": 0}), Completed("c1", "m1")]),
    ("D9 a field error that says nothing", sse(C("a")) + b'error: null\nerror:\nerror: {}\n\n' + sse(STOP), [A, END]),
    ("D7 a good code", sse(C("a"), {"choices": [], "base_resp": {"status_code": "0"}}, {"base_resp": {"status_code": 0}}, STOP), [A, END]),
    ("D7, D11 progress in named events", sse(C("a")) + b'event: tool\ndata: {"detail":"x"}\n\n'
     b'event: status\ndata: {"message":"x","code":"search"}\n\n' + sse(STOP), [A, END]),
    ("D11 odd codes", sse({"code": 200.0, "message": "x"}, {"code": {}, "message": "x"}, C("a"), STOP), [A, END]),
    ("text where completions have it", sse({"choices": [{"text": "a"}]}, {"choices": [{"text": "", "finish_reason": "stop"}]}), [A, Completed("", "", "stop", {0: "stop"})]),
    ("a delta that is a str", sse({"choices": [{"delta": "a"}]}, STOP), [A, END]),
    ("choices that are an object", sse({"choices": {"delta": {"content": "a"}}}, STOP), [A, END]),
    ("B14 input_tokens and their details", sse(C("a", "stop"), {"choices": [], "usage": {"input_tokens": 4, "input_tokens_details": {"cached_tokens": 3},
        "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 1}}}),
     [A, completed(usage=Usage(4, 2, 0, 3, 1, {"input_tokens_details": {"cached_tokens": 3}, "output_tokens_details": {"reasoning_tokens": 1}}))]),
    ("D11 good codes are no error", sse({"code": 0, "message": "Success"}, C("a"), {"code": "OK", "msg": "x"}, STOP), [A, END]),
    ("E1 and [DONE]", json.dumps(whole({"content": "a"})).encode() + b"\n\ndata: [DONE]\n\n", [A, END]),
    ("E1 two choices", json.dumps({"id": "c1", "model": "m1", "choices": [
        {"index": i, "message": {"content": t}, "finish_reason": "stop"} for i, t in enumerate("ab")]}).encode(),
     [A, TextDelta("b", 1), Completed("c1", "m1", "stop", {0: "stop", 1: "stop"})]),
    ("E4 empty", b"", [Completed()]),
    ("E4 comments only", b": a\n\n: b\n\n", [Completed()]),
    ("huge numbers", sse(C("a", finish="stop", usage={"prompt_tokens": 10**309, "total_tokens": 1e400}), DONE),
     [A, completed(usage=Usage(10**309))]),
    ("wrong types of a function", sse(tool(0, "i", "f", "x"), *[C(delta={"tool_calls": [
        {"index": 0, "id": "i", "function": odd}]}) for odd in (None, False, [], "x", 5)], DONE),
     [ToolCallDelta(0, "i", "f", "x"), Completed("c1", "m1")]),
    ("wrong types", sse(
        {"choices": "x"}, {"choices": [None, 1, "x", []]}, {"choices": [{"index": "x", "delta": 5}]},
        C(5), C({"a": 1}), C([None, 5, {"type": 5}, {"text": 5}]), C(delta={"tool_calls": "x"}),
        C(delta={"tool_calls": [None, 5, {"function": 5}, {"index": "x", "id": 5, "function": {"name": 5}}]}),
        C(delta={"refusal": 5, "reasoning": 5, "reasoning_details": "", "function_call": "x"}),
        {"id": 5, "model": {}, "usage": "x"}, C(usage=[1], finish=5), {"usage": {"prompt_tokens": "x"}},
        C(x_groq=5), {"choices": [{"index": True, "delta": {"content": "a"}}]}, DONE),
     [TextDelta("5"), TextDelta("5"), TextDelta("5"), A, Completed("c1", "m1", usage=Usage())]),
    ("B21 a half in another choice", sse(C("\ud83d", index=1), DONE), [TextDelta("\ufffd", 1), Completed("c1", "m1")]),
    ("C a half at the end", sse(tool(0, "i", "f", "\ud83d"), DONE), [ToolCallDelta(0, "i", "f"), ToolCallDelta(0, "i", "f", "\ufffd"), Completed("c1", "m1")]),
    ("B17 a summary of all kinds", sse(C(delta={"reasoning_content": "r", "refusal": "n", "content": "a"}), tool(0, "i", "f", "{}"), whole({"content": "a", "reasoning_content": "r", "refusal": "n", "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": "{}"}}]}), DONE), [R("r"), A, RefusalDelta("n"), ToolCallDelta(0, "i", "f", "{}"), END]),
    ("B17 a half, and its summary", sse(C("\ud83d"), whole({"content": "\ud83d"})), [TextDelta("\ufffd"), END]),
    ("B17 a message that refuses twice", sse(whole({"content": [{"type": "refusal", "refusal": "n"}], "refusal": "m"})), [RefusalDelta("n"), RefusalDelta("m"), END]),
    ("B5 parts of other types", sse(C([{"text": "a"}, {"type": "output_text", "text": "b"}, {"type": "refusal"}, {"type": "text", "text": "c", "refusal": "x"}]), STOP), [A, B, TextDelta("c"), END]),
    ("B17 empty parts first", sse(C([{"type": "text", "text": ""}]), C([{"type": "reference"}]), whole({"content": "a", "reasoning_content": "r"})), [R("r"), A, END]),
    ("B5 a part with two names", sse(C([{"type": "thinking", "text": "", "thinking": "t"}]), STOP), [ReasoningDelta("t"), END]),
    ("B6 other names of it", sse(*[C(delta={n: "r"}) for n in ("reasoning_summary", "thinking", "thinking_content")], STOP),
     [R("r", reasoning_summary="r"), R("r", thinking="r"), R("r", thinking_content="r"), END]),
    ("B22 LiteLLM's signed blocks", sse(C(delta={"reasoning_content": "r", "thinking_blocks": [{"thinking": "r"}]}), C(delta={"thinking_blocks": [{"signature": "s"}]}),
                                        C(delta={"content": "a", "thinking_signature": "t"}), STOP),
     [R("r", reasoning_content="r", thinking_blocks=[{"thinking": "r"}]), R("", thinking_blocks=[{"signature": "s"}]), R("", thinking_signature="t"), A, END]),
    ("B6 reasoning inside reasoning", sse(C(delta={"reasoning": {"reasoning": "r"}}), STOP), [R("r", reasoning={"reasoning": "r"}), END]),
    ("B6 reasoning_content is believed first", sse(C(delta={"reasoning": "s", "reasoning_content": "r"}), STOP), [R("r", reasoning="s", reasoning_content="r"), END]),
    ("B5 lists without end", sse(C([[[[[[[[[["deep"]]]]]]]]]]), STOP), [END]),
    ("B5 objects without end", sse(C({"text": {"text": {"text": {"text": {"text": {"text": {"text": {"text": {"text": "deep"}}}}}}}}}), STOP), [END]),
    ("C8 the id, then the name", sse(tool(0, "i"), tool(0, None, "f"), DONE), [ToolCallDelta(0, "i"), ToolCallDelta(0, "i", "f"), Completed("c1", "m1")]),
    ("C18 custom, more without its kind", sse(C(delta={"tool_calls": [{"index": 0, "id": "i", "custom": {"name": "f", "input": "a"}}]}), C(delta={"tool_calls": [{"index": 0, "signature": "s"}]}), DONE), [ToolCallDelta(0, "i", "f", "a", type="custom"), ToolCallDelta(0, "i", "f", "", {"signature": "s"}, type="custom"), Completed("c1", "m1")]),
    ("C10 arguments a list", sse(tool(0, "i", "f", [1]), DONE), [ToolCallDelta(0, "i", "f", "[1]"), Completed("c1", "m1")]),
    ("C18 custom an empty object", sse(C(delta={"tool_calls": [{"index": 0, "id": "i", "custom": {}}]}), tool(0, None, "f", "{}"), DONE), [ToolCallDelta(0, "i"), ToolCallDelta(0, "i", "f", "{}"), Completed("c1", "m1")]),
    ("C18 custom beside function, custom no object", sse(C(delta={"tool_calls": [{"index": 0, "id": "i", "function": {"name": "f", "arguments": "{}"}, "custom": {"name": "g"}}]}), C(delta={"tool_calls": [{"index": 1, "id": "j", "custom": "x"}]}), DONE), [ToolCallDelta(0, "i", "f", "{}", {"custom": {"name": "g"}}), ToolCallDelta(1, "j", "", "", {"custom": "x"}), Completed("c1", "m1")]),
    ("tool_calls a number", sse(C(delta={"tool_calls": 5}), DONE), [Completed("c1", "m1")]),
    ("C14 beside an empty tool_calls", sse(C(delta={"tool_calls": [], "function_call": {"name": "f", "arguments": "{}"}}), DONE), [ToolCallDelta(0, "", "f", "{}"), Completed("c1", "m1")]),
    ("C14 an empty stub, then a call", sse(C(delta={"function_call": {"name": "", "arguments": ""}}), tool(1, "i", "f", "{}"), DONE), [ToolCallDelta(0, "i", "f", "{}"), Completed("c1", "m1")]),
    ("C14 the name each time", sse(C(delta={"function_call": {"name": "f", "arguments": "{"}}), C(delta={"function_call": {"name": "f", "arguments": "}"}}), DONE), [ToolCallDelta(0, "", "f", "{"), ToolCallDelta(0, "", "f", "}"), Completed("c1", "m1")]),
    ("JSON behind a broken line, then chunks like those before", sse(C("a"), C("b")) + b'{"x\n' + sse(C("q"), start="", end="\n") + sse(C("c"), STOP), [A, B, TextDelta("q"), TextDelta("c"), END]),
    ("bare, then not", sse(C("a"), start="", end="\n") + sse(C("b")) + b"{x\n\n" + sse(STOP), [A, B, END]),
    ("A13 named, JSON that is no chunk, first", b'event: x\ndata: {"id":"t","model":"t"}\n\n' + PLAIN, [A, B, END]),
    ("A5 named chunks", sse(C("a"), STOP, start="event: c\ndata: "), [A, END]),
    ("B13 usage an empty object", sse(C("a", finish="stop", usage={})), [A, END]),
    ("B13 zeros with more do not replace", sse(C("a", usage=USAGE), C(finish="stop", usage={**ZEROS, "cost": 0.5})), [A, completed(usage=USED)]),
    ("B14 floats, and a bool", sse(C("a", finish="stop", usage={"prompt_tokens": 2.0, "total_tokens": True})), [A, completed(usage=Usage(2))]),
    ("A5 event: error alone", b"event: error\n\n" + PLAIN, [A, B, END]),
    ("A6 a data line without colon inside a string", b'data: {"choices":[{"delta":{"content":"a\ndata\ndata: b"}}]}\n\n', [TextDelta("a\n\nb"), Completed()]),
    ("JSON lines, broken before [DONE]", b'{"x\n' + sse(C("a"), DONE, start="", end="\n"), [A, Completed("c1", "m1")]),
    ("A13 text in an event without a name of its own", sse(C("a")) + b"event: message\ndata: x\n\nevent:\ndata: y\n\n" + sse(STOP), [A, completed(skipped=2)]),
    ("A1 LF, then CRLF, in one block", b"event: x\ndata: y\n\ndata: z\r\n\r\n" + sse(C("a"), STOP), [A, completed(skipped=1)]),
    ("the shortcut: two events of one chunk", sse(*[C(delta={"content": "a", "refusal": "n"})] * 3, STOP), [A, RefusalDelta("n"), A, RefusalDelta("n"), A, RefusalDelta("n"), END]),
    ("the shortcut: more behind the padding", sse(C("a", obfuscation="q"), C("b", obfuscation="q"), C("a", obfuscation="q", usage=USAGE, z="w"), C("b", finish="stop", obfuscation="q")), [A, B, A, B, completed(usage=USED)]),
    ("D11 not beside choices", sse(C("a", type="error"), STOP), [A, END]),
    ("D11 errors, base_resp and flat of wrong types", sse({"errors": "x"}, {"base_resp": "x"}, {"code": "x", "error_msg": 5}, {"code": "x"}, {"code": True, "msg": "x"}, {"code": 200, "msg": "x"}, C("a"), STOP), [A, END]),
    ("shortcut: extra in a call", sse(tool(0, "i", "f", ""), *[tool(0, None, None, "a", x=1)] * 3, DONE), [ToolCallDelta(0, "i", "f"), *[ToolCallDelta(0, "i", "f", "a", {"x": 1})] * 3, Completed("c1", "m1")]),
    ("the shortcut: a member twice, alike at first", b"".join(b'data: {"choices":[{"delta":{"content":"%b","content":"a"}}]}\n\n' % c for c in (b"a", b"b")), [A, A, Completed()]),
    ("B21 the first and the last pair", sse(C("\ud800"), C("\udc00"), C("\udbff"), C("\udfff"), STOP), [TextDelta("\U00010000"), TextDelta("\U0010ffff"), END]),
]  # fmt: skip

#: (row, body, events before the error, code, type, message)
ERROR = {"message": "boom", "type": "t", "code": 500}
ERROR_ROWS = [
    ("D1", sse(C("a"), {"error": ERROR}), [A], 500, "t", "boom"),
    ("D2", sse(C("a"), {"error": "boom"}), [A], None, None, "boom"),
    ("D3 object", sse({"object": "error", "message": "boom", "code": 400}), [], 400, None, "boom"),
    ("D3 type", sse({"type": "error", "error": {"message": "boom"}}), [], None, "error", "boom"),
    ("D4", sse(C("a", finish="error", usage=USAGE, error=ERROR), DONE), [A], 500, "t", "boom"),
    ("D5", sse(C("a")) + b'error: {"code":500,"message":"boom"}\n\n', [A], 500, None, "boom"),
    ("D5 text", b"error: boom\n\n", [], None, None, "boom"),
    ("D5 without blank line before", sse(C("a"), end="\n") + b"error: boom\n", [A], None, None, "boom"),
    ("D6", sse(C("a")) + b'event: error\ndata: {"error":{"message":"boom"}}\n\n', [A], None, None, "boom"),
    ("D6 text", b"event: error\ndata: boom\n\n", [], None, None, "boom"),
    ("D6 data first", b"data: boom\nevent: error\n\n", [], None, None, "boom"),
    ("D6 without data:", sse(C("a")) + b'event: error\n{"message":"boom"}\n\n' + sse(DONE), [A], None, None, "boom"),
    ("D1 a code of many lines", sse({"error": {"message": "boom", "code": "A\n\x1b[2J"}}), [], "A\n\x1b[2J", None, "boom"),
    ("D7 detail", sse({"detail": [{"loc": ["x"], "msg": "boom"}]}), [], None, None, "boom"),
    ("D7 base_resp", sse({"base_resp": {"status_code": 1004, "status_msg": "boom"}}), [], 1004, None, "boom"),
    ("D8 code null", sse({"error": {"message": ["boom"], "code": None}}), [], None, None, "boom"),
    ("D8 code str", sse({"error": {"message": {"detail": "boom"}, "code": "x9"}}), [], "x9", None, "boom"),
    ("D9 a list that is one", sse({"error": [{"message": "boom"}]}), [], None, None, "boom"),
    ("D1 TGI", sse({"error": "boom", "error_type": "t"}), [], None, "t", "boom"),
    ("D2 true", sse({"error": True, "message": "boom"}), [], None, None, "boom"),
    ("D5 any case", sse(C("a")) + b"ERROR: boom\n", [A], None, None, "boom"),
    ("D10 in a choice", sse(C("a"), {"choices": [{"delta": {}, "finish_reason": "error", "error": ERROR}]}, DONE),
     [A], 500, "t", "boom"),
    ("D10 x_groq", sse(C("a", x_groq={"error": "boom"}), DONE), [A], None, None, "boom"),
    ("D11 errors", sse({"success": False, "errors": [{"code": 7, "message": "boom"}]}), [], 7, None, "boom"),
    ("D7 base_resp, a str", sse({"base_resp": {"status_code": "1004", "status_msg": "boom"}}), [], "1004", None, "boom"),
    ("D1 in a named event", b"event: x\n" + sse({"error": "boom"}), [], None, None, "boom"),
    ("D11 flat", sse({"code": "Bad", "message": "boom", "request_id": "q"}), [], "Bad", None, "boom"),
    ("D11 flat, a status", sse(C("a"), {"status": "449", "msg": "boom", "body": None}), [A], "449", None, "boom"),
    ("D11 flat, other names", sse({"error_code": 17, "error_msg": "boom"}), [], 17, None, "boom"),
    ("D12 a line", sse(C("a")) + json.dumps({"error": ERROR}).encode() + b"\n", [A], 500, "t", "boom"),
    ("D12 indented", sse(C("a")) + json.dumps({"error": ERROR}, indent=2).encode(), [A], 500, "t", "boom"),
    ("D12 before [DONE]", json.dumps({"error": ERROR}).encode() + b"\n\ndata: [DONE]\n\n", [], 500, "t", "boom"),
    ("D12 a list in a data line", sse(C("a"), json.dumps([{"error": ERROR}])), [A], 500, "t", "boom"),
    ("D12 behind a cut event", sse(C("a")) + b'data: {"choices":[{"de\n' + sse({"type": "error", "error": ERROR}),
     [A], 500, "t", "boom"),
    ("D13", sse(C("a"), "error: boom"), [A], None, None, "boom"),
    ("D13 JSON behind it", sse(C("a"), 'Error: {"message": "boom", "code": 5}'), [A], 5, None, "boom"),
    ("E2", json.dumps({"error": ERROR}).encode(), [], 500, "t", "boom"),
    ("E2 list", json.dumps([{"error": ERROR}]).encode(), [], 500, "t", "boom"),
    ("B21 a half before an error", sse(C("\ud83d"), {"error": "boom"}), [TextDelta("\ufffd")], None, None, "boom"),
    ("D6 a chunk like those before", sse(C("a"), C("b")) + b"event: error\n" + sse(C("c")), [A, B, TextDelta("c")], None, None, json.dumps(C("c"))),
    ("D13 a chunk like those before behind it", sse(C("a"), C("b")) + b"data: error: boom\n" + sse(C("c")), [A, B], None, None, "boom"),
    ("B21 a half before an error's text", sse(C("\ud83d")) + b"event: error\ndata: boom\n\n", [TextDelta("\ufffd")], None, None, "boom"),
    ("D6 error: inside", b"event: error\ndata: error: boom\n\n", [], None, None, "boom"),
    ("D6 any case", b"event: ERROR\ndata: boom\n\n", [], None, None, "boom"),
    ("D6 no sentence", b'event: error\ndata: {"x":1}\n\n', [], None, None, '{"x":1}'),
    ("D2 JSON in a string, no sentence", sse({"error": '{"a":1}'}), [], None, None, '{"a":1}'),
    ("D1 an empty type", sse({"error": {"type": "", "message": "boom"}}), [], None, "", "boom"),
    ("a blank sentence", sse({"error": {"message": " ", "detail": "boom"}}), [], None, None, "boom"),
]  # fmt: skip

#: (row, chunks, [(id, name, arguments)] of the one message; id None: any unique one)
CALL_ROWS = [
    ("C1", [tool(0, "i", "f", ""), tool(0, None, None, "{"), tool(0, None, None, "}"),
            tool(1, "j", "g", "[]")], [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C2 no index", [tool(None, "i", "f", "{}"), tool(None, "j", "g", "[]")],
     [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C2 no index, fragments", [tool(None, "i", "f", "{"), tool(None, None, None, "}"),
                                tool(None, None, "g", "["), tool(None, "", "", "]")],
     [("i", "f", "{}"), (None, "g", "[]")]),
    ("C2 no index, by id", [tool(None, "i", "f", "{"), tool(None, "j", "g", "["),
                            tool(None, "i", None, "}"), tool(None, "j", "g", "]")],
     [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C3 all index 0", [tool(0, "i", "f", "{}"), tool(0, "j", "g", "[]"), tool(0, "k", "f", "{}")],
     [("i", "f", "{}"), ("j", "g", "[]"), ("k", "f", "{}")]),
    ("C4 first index 1 or -1", [tool(1, "i", "f", "{"), tool(1, None, None, "}"), tool(-1, "j", "g", "[]")],
     [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C5 empty id and name later", [tool(0, "i", "f", "{", type="function"), tool(0, "", "", "}", type="")],
     [("i", "f", "{}")]),
    ("C6 id and name repeated", [tool(0, "i", "f", "{"), tool(0, "i", "f", "}")], [("i", "f", "{}")]),
    ("C7 a new id on every fragment", [tool(0, "i", "f", "{"), tool(0, "j", "", "}")], [("i", "f", "{}")]),
    ("C8 name later", [tool(0, "i", "", ""), tool(0, "i2", "f", "{}")], [("i", "f", "{}")]),
    ("C9 several in one delta", [C(delta={"tool_calls": [
        {"id": "i", "function": {"name": "f", "arguments": "{}"}},
        {"id": "j", "function": {"name": "g", "arguments": "[]"}}]})],
     [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C10 arguments null, absent, object", [tool(0, "i", "f"), C(delta={"tool_calls": [
        {"index": 0, "function": {"arguments": None}}]}), tool(1, "j", "g", {"a": 1})],
     [("i", "f", ""), ("j", "g", '{"a": 1}')]),
    ("C11 no id", [tool(0, None, "f", "{}"), tool(1, None, "g", "[]")], [(None, "f", "{}"), (None, "g", "[]")]),
    ("C11 one id for two", [tool(0, "i", "f", "{}"), tool(1, "i", "g", "[]")], [("i", "f", "{}"), (None, "g", "[]")]),
    ("C12 interleaved", [tool(0, "i", "f", "{"), tool(1, "j", "g", "["), tool(0, None, None, "}"),
                         tool(1, None, None, "]")], [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C13 whatever the reason", [tool(0, "i", "f", "{}"), STOP], [("i", "f", "{}")]),
    ("C3 all index 0, no id, another name", [tool(0, None, "f", "{}"), tool(0, None, "g", "[]")],
     [(None, "f", "{}"), (None, "g", "[]")]),
    ("C8 the name in pieces is the first piece", [tool(0, "i", "f"), tool(0, None, "g", "{}")], [("i", "f", "{}")]),
    ("C16 the last fragment under the next index", [tool(0, "i", "f", ""), tool(0, None, None, "{"), tool(1, None, None, "}")],
     [("i", "f", "{}")]),
    ("C16 each fragment under an index of its own", [tool(n, *("i", "f")[: 2 * (n == 0)] or (None, None), c)
                                                     for n, c in enumerate('{"a":1}')], [("i", "f", '{"a":1}')]),
    ("C16 head as 0, tail as 1", [tool(0, "i", "f", "{}"), tool(0, "j", "g", "["), tool(1, None, None, "]")],
     [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C2 two of one name, no index, no id", [tool(None, None, "f", "{}"), tool(None, None, "f", "{}")],
     [(None, "f", "{}"), (None, "f", "{}")]),
    ("C3 two of one name, index 0, no id", [tool(0, None, "f", '{"a":"}"}'), tool(0, None, "f", '{"a":2}')],
     [(None, "f", '{"a":"}"}'), (None, "f", '{"a":2}')]),
    ("C6 the name on each fragment, no id", [tool(0, None, "f", '{"a'), tool(0, None, "f", '\\"}'), tool(0, None, "f", '":1}')],
     [(None, "f", '{"a\\"}":1}')]),
    ("an index that is no int", [C(delta={"tool_calls": [{"index": odd, "id": i, "function": {"name": "f", "arguments": "{}"}}]})
                                 for odd, i in (([], "i"), ("0", "j"), (0.0, "k"), (True, "l"))],
     [(i, "f", "{}") for i in "ijkl"]),
    ("C17 {} first", [tool(0, "i", "f", "{}"), tool(0, None, "", '{"a"'), tool(0, None, "", ":1}")], [("i", "f", '{"a":1}')]),
    ("C17 {} alone", [tool(0, "i", "f", "{}")], [("i", "f", "{}")]),
    ("C17 cumulative", [tool(0, "i", "f", c) for c in ("", '{"a"', '{"a":', '{"a":1}')], [("i", "f", '{"a":1}')]),
    ("C17 once more as a whole", [tool(0, "i", "f", c) for c in ('{"a"', ":1}", '{"a":1}')], [("i", "f", '{"a":1}')]),
    ("C17 first as a whole", [tool(0, "i", "f", c) for c in ('{"a":1}', '{"a"', ":1}")], [("i", "f", '{"a":1}')]),
    ("C10 numbers are text", [tool(0, "i", "f", '{"a":'), tool(0, None, None, 1), tool(0, None, None, 0), tool(0, None, None, "}")], [("i", "f", '{"a":10}')]),
    ("C17 {} first, as objects", [tool(0, "i", "f", a) for a in ({}, {"a": 1}, {"a": 2})], [("i", "f", '{"a": 1}')]),
    ("C17 again as JSON in a string", [tool(0, "i", "f", a) for a in ('{"a"', ":1}", '"{\\"a\\":1}"')], [("i", "f", '{"a":1}')]),
    ("C17 blanks alone", [tool(0, "i", "f", a) for a in ("\n", " ")], [("i", "f", "\n ")]),
    ("C17 {} twice", [tool(0, "i", "f", a) for a in ("{}", "{}")], [("i", "f", "{}")]),
    ("C17 {} as an object three times", [tool(0, "i", "f", {})] * 3, [("i", "f", "{}")]),
    ("C17 objects alike inside each other, cut", [tool(0, "i", "f", a) for a in ('{"', "a", '":', '{"', "a", '":', "1", "}")], [("i", "f", '{"a":{"a":1}')]),
    ("C17 objects alike in a list, cut", [tool(0, "i", "f", a) for a in ('{"a":[', '{"a":1}', ",", '{"a":1}')], [("i", "f", '{"a":[{"a":1},{"a":1}')]),
    ("C17 1 is not true", [tool(0, "i", "f", a) for a in ('{"a":1}', '{"a":true}')], [("i", "f", '{"a":1}{"a":true}')]),
    ("C17 a string behind an object", [tool(0, "i", "f", a) for a in ('{"a":1}', '"x"')], [("i", "f", '{"a":1}"x"')]),
    ("C without function around it", [C(delta={"tool_calls": [{"index": 0, "id": "i", **more}]}) for more in ({"name": "f"}, {"arguments": '{"a"'}, {"arguments": ":1}"})],
     [("i", "f", '{"a":1}')]),
    ("C17 again with other blanks", [tool(0, "i", "f", c) for c in ('{"a":', "1}", '{"a": 1}')], [("i", "f", '{"a": 1}')]),
    ("C17 again with other escapes", [tool(0, "i", "f", c) for c in ('{"a":"\\u00fc', '"}', '{"a":"ü"}')], [("i", "f", '{"a":"ü"}')]),
    ("C17 again in another order", [tool(0, "i", "f", c) for c in ('{"a":1,', '"b":2}', '{"b":2,"a":1}')], [("i", "f", '{"b":2,"a":1}')]),
    ("C17 three times", [tool(0, "i", "f", c) for c in ('{"a"', ":1}", '{"a":1}', '{"a":1} ')], [("i", "f", '{"a":1}')]),
    ("C17 {}, then twice", [tool(0, "i", "f", c) for c in ("{}", '{"a":1}', '{"a":1}')], [("i", "f", '{"a":1}')]),
    ("C17 again, the first not closed", [tool(0, "i", "f", c) for c in ('{"a":1', ',"b":2', '{"a": 1, "b": 2}')], [("i", "f", '{"a": 1, "b": 2}')]),
    ("C17 again, and on from there", [tool(0, "i", "f", c) for c in ('{"a":1}', '{"a":1', ',"b":2', "}")], [("i", "f", '{"a":1,"b":2}')]),
    ("C17 an object inside, cut", [tool(0, "i", "f", c) for c in ('{"a":', '{"b":1}')], [("i", "f", '{"a":{"b":1}')]),
    ("C17 another object behind a cut one", [tool(0, "i", "f", c) for c in ('{"a":1', '{"b":2}')], [("i", "f", '{"a":1{"b":2}')]),
    ("C11 one id, another name, no index", [tool(None, "i", "f", '{"a":1}'), tool(None, "i", "g", '{"a"'), tool(None, "i", "g", ":1"), tool(None, "i", None, "}")], [("i", "f", '{"a":1}'), (None, "g", '{"a":1}')]),
    ("C10 a number first is none", [tool(0, "i", "f", a) for a in (0, False, '{"a":1}')], [("i", "f", '{"a":1}')]),
    ("C without function around it, with input", [C(delta={"tool_calls": [{"index": 0, "id": "i", "name": "f", "input": {"a": 1}}]})], [("i", "f", '{"a": 1}')]),
    ("C11 one id, another name", [tool(0, "i", "f", '{"a":1}'), tool(0, "i", "g", '{"a":1}')], [("i", "f", '{"a":1}'), (None, "g", '{"a":1}')]),
    ("C6 one id, another name before the end", [tool(0, "i", "f", '{"a"'), tool(0, "i", "g", ":1}")], [("i", "f", '{"a":1}')]),
    ("C17 cut arguments stay", [tool(0, "i", "f", c) for c in ('{"a"', ":[")], [("i", "f", '{"a":[')]),
    ("C17 two objects stay", [tool(0, "i", "f", c) for c in ('{"a":1}', '{"b":2}')], [("i", "f", '{"a":1}{"b":2}')]),
    ("rule 4: the same call under another index", [tool(0, "i", "f", "{}"), tool(1, "i", "f", "{}"), tool(2, "j", "f", "{}")],
     [("i", "f", "{}"), ("j", "f", "{}")]),
    ("C18 free text is no JSON to be put right", [C(delta={"tool_calls": [
        {"index": 0, "id": "i", "custom": {"name": "f", "input": "{}"}}]}), C(delta={"tool_calls": [
        {"index": 0, "custom": {"input": "[]"}}]})], [("i", "f", "{}[]")]),
    ("C10 objects at one index, no id", [tool(0, None, "f", {}), tool(0, None, "f", {})], [(None, "f", "{}")] * 2),
    ("rule 4: neither name nor arguments", [tool(0, "i"), tool(1, "j", "g", "[]")], [("j", "g", "[]")]),
    ("an index that is False", [tool(0, "i", "f", "{}"), tool(1, "j", "g", "["), C(delta={"tool_calls": [{"index": False, "function": {"arguments": "]"}}]})], [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C2 no id, then no index: the last", [tool(0, None, "f", "{}"), tool(1, None, "g", "["), tool(None, None, None, "]")], [(None, "f", "{}"), (None, "g", "[]")]),
    ("C11 one id for two, then by id: the first", [tool(0, "i", "f", "{"), tool(1, "i", "g", "[]"), tool(None, "i", None, "}")], [("i", "f", "{}"), (None, "g", "[]")]),
    ("C8 the id later, no index", [tool(None, None, "f", "{"), tool(None, "i", None, "}")], [("i", "f", "{}")]),
    ("C8 a second call's id before its name", [tool(0, "i", "f", "{}"), tool(1, "j"), tool(1, None, "g", "[]")], [("i", "f", "{}"), ("j", "g", "[]")]),
    ("C8 the id later, with the name again", [tool(0, None, "f", "{"), tool(0, "i", "f", "}")], [("i", "f", "{}")]),
    ("C3 no id, another name without arguments", [tool(0, None, "f", "{}"), tool(0, None, "g", ""), tool(0, None, None, "[]")], [(None, "f", "{}"), (None, "g", "[]")]),
    ("C6 the name once more behind a whole call", [tool(0, None, "f", "{}"), tool(0, None, "f", "")], [(None, "f", "{}")]),
    ("C6 a piece that ends in a backslash", [tool(0, None, "f", c) for c in ('{"a\\', '"}', '":1}')], [(None, "f", '{"a\\"}":1}')]),
    ("C6 blanks first", [tool(0, None, "f", c) for c in (" ", "{}")], [(None, "f", " {}")]),
    ("C3 one bracket too many", [tool(0, None, "f", c) for c in ('{"a":1}}', '{"a":2}')], [(None, "f", '{"a":1}}'), (None, "f", '{"a":2}')]),
    ("C3 after fragments with the name, no id", [tool(0, None, "f", c) for c in ('{"a', "b", '":1}', "{}")], [(None, "f", '{"ab":1}'), (None, "f", "{}")]),
    ("C3 a long call, then one of its name, no id", [tool(0, None, "f", '{"a":"'), *[tool(0, None, None, "x")] * 300, tool(0, None, None, '"}'), tool(0, None, "f", "{}")], [(None, "f", '{"a":"' + "x" * 300 + '"}'), (None, "f", "{}")]),
    ("arguments alone are a call", [tool(0, None, None, "{}")], [(None, "", "{}")]),
    ("rule 4: other arguments", [tool(0, "i", "f", "{}"), tool(1, "i", "f", "[]")], [("i", "f", "{}"), (None, "f", "[]")]),
    ("C17 whole in two pieces that look alike", [tool(0, "i", "f", c) for c in ("1", "12")], [("i", "f", "112")]),
    ("C17 {} with blanks first", [tool(0, "i", "f", c) for c in ("{} ", '{"a":1}')], [("i", "f", '{"a":1}')]),
]  # fmt: skip


def decode(blocks, strict=False, raw=False):
    """-> the events, and the ChatStreamError that ended them or None."""
    return collect(cs.decode(blocks, strict=strict, raw=raw))


def cuts(body):
    """The body in other pieces: whole, byte by byte, and at every cut (or many)."""
    yield [body]
    yield [body[i : i + 1] for i in range(len(body))]
    places = range(1, len(body))
    if len(body) > 600:
        places = random.Random(7).sample(places, 200)
    for place in places:
        yield [body[:place], body[place:]]


def ids(rows):
    return [row[0] for row in rows]


@pytest.mark.parametrize("row, body, events", ROWS, ids=ids(ROWS))
def test_row_cut_anywhere(row, body, events):
    for blocks in cuts(body):
        assert decode(blocks) == (events, None), blocks


@pytest.mark.parametrize(
    "lines, counts",
    [
        (["a", "b", "c", "d"], [0, 2, 3, 4]),
        (["a", "b", "null", "c", "", ": wait", "d"], [0, 2, 2, 3, 3, 3, 4]),
        (["", "null", "a", "b", "c"], [0, 0, 1, 2, 3]),
    ],
)
def test_events_without_blank_lines_come_with_their_lines(lines, counts):
    """GLM, Kimi and AgentRouter leave them out; only the first event waits for a second."""
    got, counted = [], []

    def blocks():
        for line in lines:
            yield sse(C(line) if line.isalpha() and line != "null" else line, end="\n")
            counted.append(len(got))

    for event in cs.decode(blocks()):
        got.append(event)
    assert counted == counts
    assert got[-1].skipped == 0


@pytest.mark.parametrize(
    "data, message",
    [
        (b'data:\ndata: {"message":"boom"}', "boom"),
        (b"data: out of\ndata: memory", "out of memory"),
        (b'data: "x"\ndata: {"message":"boom"}', "boom"),
    ],
)
def test_an_error_of_several_lines_behind_events_without_blank_lines(data, message):
    body = sse(C("a"), C("b"), end="\n") + b"\nevent: error\n" + data + b"\n\n"
    for blocks in cuts(body):
        got, failure = decode(blocks)
        assert (got, type(failure)) == ([A, B], cs.ServerError)
        assert failure.message == message


def test_without_blank_lines_a_name_is_that_of_one_event():
    body = sse(C("a"), C("b"), end="\n") + b"event: ping\ndata: {}\n"
    error = body + sse({"code": 500, "message": "boom"}, end="\n")
    got, failure = decode([error])
    assert (got, type(failure)) == ([A, B], cs.ServerError)
    assert decode([body + sse("oops", STOP, end="\n")])[0][-1].skipped == 1


#: What the transports have to carry: all else about bytes goes through decode().
OVER_SOCKETS = {
    "plain": [C("a"), C("b"), STOP],
    "tools": [tool(0, "i", "f", '{"a":'), tool(0, None, None, "1}"), C(finish="tool_calls")],
    "an error inside": [C("a"), {"error": {"message": "boom"}}],
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_SOCKETS)
def test_over_a_socket_as_through_decode(transport, name):
    body = sse(*OVER_SOCKETS[name], DONE)
    wanted, wrong = decode([body])
    with Server([reply(body)]) as server:
        got, failure = collect(ask(server))
    assert (got, str(failure)) == (wanted, str(wrong))


@pytest.mark.parametrize("row", ERROR_ROWS, ids=ids(ERROR_ROWS))
def test_error_row_cut_anywhere(row):
    _, body, events, code, kind, message = row
    for blocks in cuts(body):
        got, failure = decode(blocks)
        assert got == events, blocks
        assert type(failure) is cs.ServerError
        assert (failure.code, failure.type, failure.message) == (code, kind, message)


@pytest.mark.parametrize("row", ERROR_ROWS, ids=ids(ERROR_ROWS))
def test_error_row_as_a_whole(row):
    _, body, events, code, kind, message = row
    got, failure = collect(cs.aggregate(cs.decode([body])))
    assert got == []
    assert "".join(m.content for m in failure.partial) == "".join(
        e.text for e in events
    )
    assert (failure.code, failure.type, failure.message) == (code, kind, message)
    assert message in str(failure)
    assert failure.raw
    assert isinstance(failure.raw, (dict, list)) or failure.raw == "boom"


def test_an_error_inside_an_answer_has_its_request_id(transport):
    body = sse(C("a"), {"error": "boom"})
    with Server([reply(body, "200 OK", "X-Request-Id: r1")]) as server:
        _, failure = collect(ask(server, max_retries=2))
    assert (type(failure), failure.request_id) == (cs.ServerError, "r1")
    assert len(server.requests) == 1


def check_calls(message, expected):
    got = [(c.id, c.name, c.arguments) for c in message.tool_calls]
    assert [g[1:] for g in got] == [e[1:] for e in expected]
    assert all(e[0] in (None, g[0]) for g, e in zip(got, expected))
    assert len({g[0] for g in got} - {""}) == len(got)


@pytest.mark.parametrize("row, chunks, expected", CALL_ROWS, ids=ids(CALL_ROWS))
def test_call_row_cut_anywhere(row, chunks, expected):
    for blocks in cuts(sse(*chunks, DONE)):
        events, failure = decode(blocks)
        assert failure is None
        message, _ = cs.aggregate(events)
        check_calls(message, expected)


def test_a10_socket_left_open_after_done(transport):
    with Server([CHUNKED + chunked(PLAIN), HOLD]) as server:
        assert list(ask(server)) == [A, B, END]
        server.wait_for_leaving()


@pytest.mark.parametrize("type", [None, "text/plain", "application/json", "text/html"])
def test_a11_judged_by_the_body(transport, type):
    with Server([reply(PLAIN, type=type)]) as server:
        assert list(ask(server)) == [A, B, END]


def packed(encoding, data):
    if encoding == "deflate, bare":
        packer = zlib.compressobj(wbits=-15)
    else:
        packer = zlib.compressobj(wbits=31 if encoding.endswith("gzip") else 15)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH), packer.flush()


@pytest.mark.parametrize(
    "encoding", ["gzip", "x-gzip", "GZIP", "deflate", "deflate, bare"]
)
def test_a12_compressed_each_event_when_it_arrives(transport, encoding):
    event, rest = packed(encoding.lower(), PLAIN)
    header = "Content-Encoding: " + encoding.partition(",")[0]
    go_on = threading.Event()
    start = head("200 OK", "Transfer-Encoding: chunked", header)
    pieces = chunked(event[:1], event[1:2], event[2:])
    script = [
        start + pieces,
        lambda *_: go_on.wait(PATIENCE),
        chunked(rest) + b"0\r\n\r\n",
    ]
    with Server(script) as server:
        events = ask(server)
        assert [next(events), next(events)] == [A, B]
        go_on.set()
        assert list(events) == [END]


def test_a12_gzip_members_and_large_text(transport):
    big = C("x" * 300_000)
    body = gzip.compress(sse(big)) + gzip.compress(sse(C("b"), STOP))
    with Server([reply(body, "200 OK", "Content-Encoding: gzip")]) as server:
        assert list(ask(server)) == [TextDelta("x" * 300_000), B, END]


@pytest.mark.parametrize(
    "header, body, text",
    [
        ("br", b"x", "'br'"),
        ("gzip", b"\x1f\x8bxxxxxxxx", "compression"),
    ],
)
def test_a12_other_encodings(transport, header, body, text):
    with Server([reply(body, "200 OK", "Content-Encoding: " + header)]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([], cs.StreamError)
    assert text in str(failure)


def test_a12_gzip_of_one_byte_is_a_cut(transport):
    with Server([reply(b"\x1f", "200 OK", "Content-Encoding: gzip")]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([], cs.TransportError)


def test_a12_truncated_gzip_is_a_cut(transport):
    body = gzip.compress(sse(C("a"), *[C(str(i)) for i in range(500)]))[:-20]
    with Server([reply(body, "200 OK", "Content-Encoding: gzip")]) as server:
        got, failure = collect(ask(server))
    assert got[0] == A
    assert type(failure) is cs.TruncatedStreamError


def test_b20_raw_loses_nothing(transport):
    chunks = [C("a", odd=[1]), {"type": "ping"}, STOP, {"error": "boom"}]
    with Server([reply(b": x\n\n" + sse(*chunks))]) as server:
        got, failure = collect(ask(server, raw=True))
    assert [e.data for e in got if isinstance(e, Chunk)] == chunks
    assert got[:2] == [Chunk(chunks[0]), A]
    assert failure.message == "boom"


def test_c15_unknown_members_come_back(transport):
    extra = {"extra_content": {"google": {"thought_signature": "s1"}}}
    first = tool(
        0, "i", "f", "{}", extra_content={"google": {"thought_signature": "s0"}}
    )
    chunks = [first, tool(0, None, None, "", **extra), STOP]
    with Server([reply(sse(*chunks))]) as server:
        first, second, message, _ = cs.aggregate(ask(server), deltas=True)
    assert first.extra == {"extra_content": {"google": {"thought_signature": "s0"}}}
    assert second.extra == extra
    assert message.tool_calls == (ToolCall("i", "f", "{}", extra),)
    assert message.to_dict()["tool_calls"] == [
        {
            "id": "i",
            "type": "function",
            "function": {"name": "f", "arguments": "{}"},
            **extra,
        }
    ]


@pytest.mark.parametrize(
    "body", [b"<html>busy</html>", b"upstream said no", b'"text"', b"[1]"]
)
def test_e3_not_an_event_stream(transport, body):
    long = body + b" " + b"x" * 1000
    with Server([reply(long, type="text/html")]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([], cs.StreamError)
    assert "text/html" in str(failure)
    assert body.decode() in str(failure)
    assert len(str(failure)) < 400


@pytest.mark.parametrize(
    "body, type, message",
    [
        ({"error": {"message": "no such model"}}, "application/json", "no such model"),
        ([{"error": {"message": "no such model"}}], "application/json", "no such model"),
        ({"message": {"detail": [{"msg": "no such model"}]}}, "x/y", "no such model"),
        ({"detail": "no such model"}, "application/json", "no such model"),
        ({"error": {"message": '{"error":{"message":"no such model"}}'}}, "x/y", "no such model"),
        (b"no such\n model", "text/plain", "no such model"),
        (b'\xef\xbb\xbf{"error":{"message":"no such model"}}', "x/y", "no such model"),
        (b"\xef\xbb\xbf<html><title>502</title>1.2.3.4</html>", "text/html", "502"),
        (b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"X","message":"no such model"}\n\n', "x/y", "no such model"),
        (b'{"x":1}\n{"message":"no such model"}', "x/y", "no such model"),
        ({"Message": "no such model"}, "x/y", "no such model"),
        ({"title": "no such model", "status": 404}, "x/y", "no such model"),
        ({"error": "invalid", "error_description": "no such model"}, "x/y", "no such model"),
        ({"errors": {"model": ["no such model"]}}, "x/y", "no such model"),
        (b"<html><title>502 &amp; out</title>1.2.3.4</html>", "text/html", "502 & out"),
        (b"<html>1.2.3.4</html>", "text/html", ""),
        (b"<?xml version='1.0'?><Error><Code>A</Code><Message>no such model</Message></Error>", "x/y", "no such model"),
        ({"error": {"message": "<!DOCTYPE html><title>no such model</title>1.2.3.4"}}, "x/y", "no such model"),
        ({"errors": [{"detail": "Error - <HTML>\n<body>1.2.3.4<title>no such model</title>"}]}, "x/y", "Error - no such model"),
        ({"error": "<|end|> is no such model"}, "x/y", "<|end|> is no such model"),
        ({"error": "an <html> is no such model"}, "x/y", "an <html> is no such model"),
        ({"error": "<body>1.2.3.4"}, "x/y", ""),
        ({"error": {"code": 1, "metadata": {"raw": "<head><title>no such model</title></head>1.2.3.4"}}}, "x/y", "no such model"),
        ({"error": {"message": "no such model", "metadata": {"raw": '{"code":1}'}}}, "x/y", "no such model"),
        ({"error": "Bad Request", "message": ["no such model"]}, "x/y", "Bad Request: no such model"),
        ({"error": "not_found", "detail": "no such model"}, "x/y", "not_found: no such model"),
        ({"error": '{"message":"no such model"}', "detail": "x"}, "x/y", "no such model"),
        ({"error": "gone", "message": '{"detail":"no such model"}'}, "x/y", "gone: no such model"),
        ({"error": "gone", "message": "gone", "detail": {"msg": "no such model"}}, "x/y", "gone: no such model"),
        ({"error": "Not Found", "message": "Not Found"}, "x/y", "Not Found"),
        ({"message": "no such model", "Message": None}, "x/y", "no such model"),
        (b'{"message":"no such\\user","detail":"no such model",', "x/y", "no such model"),
        (b'{"message":" ","detail":"no such model",', "x/y", "no such model"),
        (b'{"message":5,', "x/y", '{"message":5,'),
        ({"error": "not_found"}, "x/y", "not_found"),
        ({"title": "Errors occurred.", "errors": {"model": ["no such model"]}}, "x/y", "no such model"),
        ({"Error": {"Message": "no such model"}}, "x/y", "no such model"),
        ({"error": {"message": "Error", "metadata": {"raw": '{"error":"no such model"}'}}}, "x/y", "Error: no such model"),
        ({"error": {"message": "no such model", "metadata": {"raw": "no such model"}}}, "x/y", "no such model"),
        ({"detail": [{"msg": "no such \"model\"", "input": "x" * 100_000}]}, "x/y", 'no such "model"'),
        (b"no such model " * 100, "text/plain", ("no such model " * 100).strip()),
        (b"", None, ""),
        ([], "application/json", ""),
    ],
)  # fmt: skip
def test_f_error_replies_have_one_readable_sentence(transport, body, type, message):
    with Server([error("404 Not Found", body, type=type)]) as server:
        _, failure = collect(ask(server))
    assert failure.message == message
    assert "1.2.3.4" not in str(failure)
    assert (message or "Not Found") in str(failure)


@pytest.mark.parametrize(
    "status, text",
    [("503 ", "503 from {}: Service Unavailable"), ("599 ", "599 from {}")],
)
def test_a_status_alone_is_said_in_words(transport, status, text):
    with Server([error(status, b"")]) as server:
        failure = collect(ask(server))[1]
        assert str(failure).endswith(text.format(server.url + "/chat/completions"))


@pytest.mark.parametrize("position", range(len(cs._REQUEST_ID_HEADERS)))
def test_f_request_ids_in_order(transport, position):
    headers = [f"{n}: id-{n}" for n in cs._REQUEST_ID_HEADERS[position:]]
    want = "id-" + cs._REQUEST_ID_HEADERS[position]
    with Server(
        [error("400 Bad", {}, *headers)], [reply(PLAIN, "200 OK", *headers)]
    ) as server:
        assert collect(ask(server))[1].request_id == want
        assert list(ask(server))[-1].request_id == want


# --------------------------------------------------------------------------------------
# Strict, the end of an answer, cuts
# --------------------------------------------------------------------------------------


def test_strict_malformed_chunk(transport):
    with Server([reply(sse(C("a"), "{oops", C("b"), DONE))]) as server:
        got, failure = collect(ask(server, strict=True))
    assert (got, type(failure), failure.data) == ([A], cs.MalformedChunkError, "{oops")


@pytest.mark.parametrize(
    "body", [b"", sse(C("a")), b": comment\n\n", sse(C("a"), DONE)]
)
def test_strict_end_without_an_end(transport, body, caplog):
    with Server([reply(body)]) as server:
        got, failure = collect(ask(server, strict=True, max_retries=3))
        assert type(failure) is cs.TruncatedStreamError
        assert collect(ask(server)) == (
            got + [Completed(*["c1", "m1"] * bool(got))],
            None,
        )
    assert len(server.requests) == 2
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize(
    "body", [sse(C("a"), STOP, C("b"), DONE), sse(C("a"), STOP), PLAIN]
)
def test_strict_accepts_a_proper_end(transport, body, caplog):
    with Server([reply(body)]) as server:
        assert collect(ask(server, strict=True))[1] is None
    assert warnings_in(caplog) == []


FINISHED = CHUNKED + chunked(sse(C("a"), STOP))
UNFINISHED = CHUNKED + chunked(sse(C("a")))


@pytest.mark.parametrize("end", [CLOSE, RESET, HOLD])
def test_a_finished_answer_survives_what_comes_then(transport, end, caplog):
    with Server([FINISHED, 0.1, end]) as server:
        assert list(ask(server, idle_timeout=0.35)) == [A, END]
        assert len(warnings_in(caplog)) == 1
        got, failure = collect(ask(server, idle_timeout=0.35, strict=True))
    assert got == [A]
    wanted = cs.IdleTimeoutError if end == HOLD else cs.TruncatedStreamError
    assert type(failure) is wanted


def test_silence_while_one_choice_is_unfinished(transport):
    body = sse(C("a"), C("b", index=1), STOP)
    with Server([CHUNKED + chunked(body), HOLD]) as server:
        got, failure = collect(ask(server, idle_timeout=0.2, n=2))
    assert (got, type(failure)) == ([A, TextDelta("b", 1)], cs.IdleTimeoutError)


EVENT = sse(C("a"))
CUTS = {
    "no terminator": CHUNKED + chunked(EVENT),
    "inside a chunk": CHUNKED + b"fff\r\n" + EVENT + b"data: {",
    "after a chunk": CHUNKED + chunked(EVENT)[:-2],
    "half a size": CHUNKED + chunked(EVENT) + b"0",
    "size without blank line": CHUNKED + chunked(EVENT) + b"0\r\n",
    "inside a trailer": CHUNKED + chunked(EVENT) + b"0\r\nX: y",
    "garbage size": CHUNKED + chunked(EVENT) + b"zz\r\nxx\r\n",
    "negative size": CHUNKED
    + chunked(EVENT)
    + b"-5\r\n"
    + sse(C("forged"))
    + b"\r\n0\r\n\r\n",
    "huge size": CHUNKED + chunked(EVENT) + b"f" * 30 + b"\r\nxx",
    "endless size": CHUNKED + chunked(EVENT) + b"1" * 70_000,
    "short length": head("200 OK", "Content-Length: 999") + EVENT,
    "gzip": head("200 OK", "Content-Encoding: gzip", "Content-Length: 999")
    + packed("gzip", EVENT)[0],
}


@pytest.mark.parametrize("how", CUTS)
def test_a_cut_is_never_a_success(transport, how, sleeps):
    with Server([CUTS[how], CLOSE]) as server:
        got, failure = collect(ask(server, max_retries=3))
    assert (got, type(failure)) == ([A], cs.TruncatedStreamError)
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", CUTS)
def test_a_cut_before_the_first_event_is_retried(transport, how, sleeps):
    script = [CUTS[how].replace(b'"content"', b'"kontent"'), CLOSE]
    if how == "gzip":
        script[0] = head("200 OK", "Content-Length: 9")
    with Server(script, script, [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=2)) == [A, B, END]
        assert len(server.requests) == 3
    with Server(script) as server:
        got, failure = collect(ask(server, max_retries=1))
    assert (got, type(failure), failure.attempts) == ([], cs.TransportError, 2)


@pytest.mark.parametrize(
    "start",
    [
        "H",
        "HTTP/1.1 200",
        "HTTP/1.1 200 OK\r\n",
        "HTTP/1.1 200 OK\r\nServer: a\r\nContent-Ty",
        "HTTP/1.1 200 OK\r\nServer: a\r\nContent-Type: tex",
        "HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTransfer-",
        "HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nTransfer-Encoding: chu",
        "HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length:",
    ],
)
def test_a_cut_inside_the_headers_is_retried(transport, start, sleeps):
    with Server([start.encode(), CLOSE], [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1)) == [A, B, END]
    with Server([start.encode(), CLOSE]) as server:
        got, failure = collect(ask(server, max_retries=0))
    assert (got, type(failure)) == ([], cs.TransportError)


@pytest.mark.parametrize(
    "whole",
    [
        head("200 OK"),
        head("200 OK", "Connection: close", type=None),
        head("200 OK", "Content-Length: 0", type=None),
        b"HTTP/1.0 200 OK\r\n\r\n",
        reply(type=None),
    ],
)
def test_an_empty_answer_is_none_that_was_cut(transport, whole):
    with Server([whole, CLOSE]) as server:
        assert list(ask(server)) == [Completed()]


@pytest.mark.parametrize("body", [sse(C("a"))[:-1], sse(C("a"))[:-2]])
def test_what_arrived_whole_before_a_cut_is_yielded(transport, body):
    with Server([CHUNKED + chunked(body), RESET]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([A], cs.TruncatedStreamError)


@pytest.mark.parametrize(
    "start, piece",
    [
        (CHUNKED, lambda e: chunked(e)),
        (CHUNKED + b"ffff\r\n", lambda e: e),  # inside a chunk that stays incomplete
        (head("200 OK", "Content-Length: 99999"), lambda e: e),
        (head("200 OK", "Connection: close"), lambda e: e),
    ],
)
def test_each_event_is_handed_over_when_it_arrives(transport, start, piece):
    gate = threading.Semaphore(0)

    def wait(*_):
        assert gate.acquire(timeout=PATIENCE)

    words = [str(i) for i in range(5)]
    script = [start]
    for word in words:
        script += [piece(sse(C(word))), wait]
    with Server([*script, CLOSE]) as server:
        events = ask(server)
        for word in words:
            assert next(events) == TextDelta(word)
            gate.release()
        events.close()


# --------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("drip", [b": wait\n\n", b":", b'data: {"x'])
def test_event_timeout_ends_a_drip(transport, drip):
    def pour(sock, file):
        while True:
            sock.sendall(chunked(drip))
            if server.stopping.wait(0.05):
                return

    with Server([CHUNKED + chunked(sse(C("a"))), pour]) as server:
        got, failure = collect(ask(server, event_timeout=0.3, idle_timeout=20))
    assert (got, type(failure)) == ([A], cs.IdleTimeoutError)
    assert failure.seconds == 0.3
    assert "event_timeout" in str(failure)


def test_comments_keep_a_slow_answer_alive(transport):
    comments = [chunked(b": wait\n\n"), 0.15] * 3
    with Server([CHUNKED, *comments, chunked(PLAIN) + b"0\r\n\r\n"]) as server:
        assert list(ask(server, idle_timeout=0.4, event_timeout=None)) == [A, B, END]


def test_chunks_restart_the_event_clock(transport):
    script = [CHUNKED]
    for _ in range(4):
        script += [chunked(b": wait\n\n"), 0.1, chunked(sse(C())), 0.1]
    with Server([*script, chunked(PLAIN) + b"0\r\n\r\n"]) as server:
        assert list(ask(server, event_timeout=0.5)) == [A, B, END]


def test_the_callers_own_time_does_not_count(transport):
    script = [CHUNKED + chunked(sse(C("a"))), 0.1, chunked(b": x\n\n"), 0.1]
    with Server([*script, chunked(sse(C("b"), STOP, DONE)) + b"0\r\n\r\n"]) as server:
        events = ask(server, event_timeout=0.5, idle_timeout=0.6)
        assert next(events) == A
        threading.Event().wait(0.7)
        assert list(events) == [B, END]


def test_no_timeouts_at_all(transport):
    options = dict.fromkeys(("connect_timeout", "idle_timeout", "event_timeout"))
    with Server([reply(PLAIN)]) as server:
        assert list(ask(server, **options)) == [A, B, END]


@contextlib.contextmanager
def mute_address():
    """-> an address that takes no connection and refuses none."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        fillers = []
        for _ in range(8):  # until the kernel takes no more
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        yield listener.getsockname()
        for filler in fillers:
            filler.close()


def test_connect_timeout_is_a_transport_error(transport, sleeps):
    with mute_address() as (host, port):
        url = f"http://{host}:{port}/v1"
        got, failure = collect(ask(url, connect_timeout=0.15, max_retries=1))
    assert (got, type(failure), failure.attempts) == ([], cs.TransportError, 2)


@pytest.fixture
def named(monkeypatch):
    """-> what gives a name these addresses, each a pair of family and address."""

    def give(*found):
        answer = [(family, socket.SOCK_STREAM, 6, "", where) for family, where in found]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)

    return give


def test_each_address_of_a_name_is_tried(transport, named):
    with Server([reply(PLAIN)]) as server, mute_address() as mute:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            refuses = closed.getsockname()
        right = ("127.0.0.1", server.port)
        v4 = socket.AF_INET
        named((-1, refuses), (v4, refuses), (v4, mute), (v4, right), (v4, mute))
        url = f"http://many.test:{server.port}/v1"
        assert list(ask(url, connect_timeout=0.2, max_retries=0)) == [A, B, END]
    assert server.requests[0].header("Host") == f"many.test:{server.port}"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_an_address_is_not_looked_up(transport, family, named):
    try:
        server = Server([reply(PLAIN)], family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    named()
    with server:
        assert list(ask(server)) == [A, B, END]


def test_deadline_counts_for_all_addresses_together(transport, named):
    with mute_address() as mute:
        named(*[(socket.AF_INET, mute)] * 100)
        started = time.monotonic()
        _, failure = collect(ask("http://many.test/v1", deadline=0.3))
    assert type(failure) is cs.DeadlineError
    assert time.monotonic() - started < 10


@needs_urllib3
def test_urllib3_says_which_addresses_are_wanted(monkeypatch):
    """Who sets this wants IPv4 alone, say."""
    asked = []

    def look_up(host, port, family, *_):
        asked.append((host, family))
        raise socket.gaierror("no")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for family in (socket.AF_INET, socket.AF_INET6):
        monkeypatch.setattr(
            urllib3.util.connection, "allowed_gai_family", lambda family=family: family
        )
        collect(ask("http://some.test/v1", max_retries=0))
    assert asked == [("some.test", socket.AF_INET), ("some.test", socket.AF_INET6)]


def test_a_name_without_addresses(transport, named):
    named()
    got, failure = collect(ask("http://none.test/v1", max_retries=0))
    assert (got, type(failure)) == ([], cs.TransportError)
    assert "none.test has no address" in str(failure)


def test_a_nested_call_leaves_the_clock_of_the_outer(transport):
    """As a signal handler's does that comes while a connection is made."""
    with Server([reply(PLAIN)], [reply(PLAIN)]) as server:
        clocks, connect = [], cs._WatchedConnection.connect

        def connect_later(self):
            clock = cs._clock_of_call.get()
            clocks.append(clock)
            if len(clocks) == 1:
                assert list(ask(server)) == [A, B, END]
            assert cs._clock_of_call.get() is clock
            connect(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cs._WatchedConnection, "connect", connect_later)
            assert list(ask(server)) == [A, B, END]
    assert len(set(clocks)) == 2
    assert cs._clock_of_call.get(None) is None


def test_a_large_upload_outlasts_connect_timeout(transport):
    def read_slowly(sock, file):
        left = int(server.requests[0].header("Content-Length"))
        while left:
            left -= len(file.read(min(left, 1 << 20)))
            server.stopping.wait(0.04)

    with Server([DEAF, read_slowly, reply(PLAIN)]) as server:
        prompt = "x" * (20 << 20)
        assert list(ask(server, prompt, connect_timeout=0.4)) == [A, B, END]


def test_a_stalled_upload_is_a_transport_error(transport, sleeps):
    with Server([DEAF, lambda *_: server.stopping.wait(PATIENCE)]) as server:
        prompt = "x" * (64 << 20)
        got, failure = collect(
            ask(server, prompt, connect_timeout=0.2, idle_timeout=0.2)
        )
    assert (got, type(failure)) == ([], cs.TransportError)
    assert "while sending" in str(failure)
    assert len(server.requests) == 1


def test_an_upload_is_sent_only_when_more_is_asked_for():
    """All of it may have been read while its last block is still being sent."""
    clock = cs._Clock("", idle_timeout=None, event_timeout=None, deadline=None)
    body = cs._Upload(b"x" * 10, clock)
    assert (body.read(6), body.sent) == (b"x" * 6, False)
    assert (body.read(6), body.sent) == (b"x" * 4, False)
    assert (body.read(6), body.sent) == (b"", True)


def test_an_early_413_to_a_large_request(transport):
    with Server(
        [DEAF, error("413 Too Large", {"error": "too large"}), CLOSE]
    ) as server:
        _, failure = collect(ask(server, "x" * (16 << 20)))
    assert isinstance(failure, (cs.StatusError, cs.TransportError))


# --------------------------------------------------------------------------------------
# Retries
# --------------------------------------------------------------------------------------


def http_date(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    "headers, wait",
    [
        (["Retry-After: 0.4"], 0.4),
        (["Retry-After: 0"], 0.2),
        (["Retry-After: 1", "Retry-After-Ms: 700"], 0.7),
        (["Retry-After: 1", "retry-after-ms: soon"], 1.0),
        (["Retry-After: soon"], 0.2),
        (["Retry-After: -1"], 0.2),
        (["Retry-After: nan"], 0.2),
        (["Retry-After: inf"], 0.2),
        (["Retry-After: " + http_date(-100)], 0.2),
        (["Retry-After: Mon, 99 Foo 2026"], 0.2),
        (["Retry-After: 120"], 120.0),
        (["Retry-After: 120 "], 120.0),
        (["Retry-After: 5 ", "Retry-After: 6"], 5.0),
        (["Retry-After: 5."], 5.0),
        (["Retry-After: .5"], 0.5),
        (["Retry-After: " + "0" * 60_000 + "x"], 0.2),
        (["Retry-After: 1_0"], 0.2),
        (["Retry-After: 5s"], 0.2),
    ],
)
def test_retry_after(transport, sleeps, headers, wait):
    with Server([error("429 Slow", {}, *headers)], [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1)) == [A, B, END]
    assert sleeps == [pytest.approx(wait)]


def test_retry_after_as_a_date(transport, sleeps):
    header = "Retry-After: " + http_date(100)
    with Server([error("503 Busy", {}, header)], [reply(PLAIN)]) as server:
        list(ask(server, max_retries=1))
    assert 60 < sleeps[0] <= 101


def test_too_long_a_wait_gives_up_at_once(transport, sleeps):
    with Server([error("429 Slow", {"error": "later"}, "Retry-After: 9999")]) as server:
        _, failure = collect(ask(server, max_retries=4))
    assert type(failure) is cs.RetryLimitError
    assert (failure.retry_after, failure.attempts, sleeps) == (9999.0, 1, [])


def test_x_should_retry(transport, sleeps):
    with Server([error("500 Oops", {}, "x-should-retry: false")]) as server:
        _, failure = collect(ask(server, max_retries=4))
    assert (type(failure), len(server.requests)) == (cs.StatusError, 1)
    with Server([error("400 Bad", {}, "X-Should-Retry: true \t")]) as server:
        _, failure = collect(ask(server, max_retries=1))
    assert (type(failure), failure.attempts) == (cs.RetryLimitError, 2)


SPENT = {"error": {"message": "pay", "code": "insufficient_quota"}}


@pytest.mark.parametrize(
    "body",
    [
        SPENT,
        {"error": {"message": "pay", "type": "insufficient_quota"}},
        {"detail": SPENT},
        {"error": json.dumps(SPENT)},
        {"error": {"message": json.dumps(SPENT), "code": 429}},
        {"errors": [SPENT["error"]]},
        {"message": SPENT},
    ],
)
def test_insufficient_quota_is_not_retried(transport, sleeps, body):
    with Server([error("429 Slow", body, "x-should-retry: true")]) as server:
        _, failure = collect(ask(server, max_retries=4))
    assert (type(failure), len(server.requests)) == (cs.StatusError, 1)
    assert failure.message == "pay"


def test_a_text_like_insufficient_quota_is_retried(transport, sleeps):
    body = {"error": {"message": "insufficient_quota", "code": "rate_limit"}}
    with Server([error("429 Slow", body)]) as server:
        collect(ask(server, max_retries=1))
    assert len(server.requests) == 2


def test_each_wait_is_logged_once(transport, sleeps, caplog):
    with Server(
        [RESET], [error("503 Busy", {"error": "busy"})], [reply(PLAIN)]
    ) as server:
        list(ask(server, max_retries=2))
    lines = warnings_in(caplog)
    assert len(lines) == 2
    assert "0.20 s" in lines[0]
    assert "503" in lines[1]
    assert "0.40 s" in lines[1]


def test_a_call_that_goes_well_logs_nothing_above_debug(transport, caplog):
    caplog.set_level(logging.DEBUG)
    with Server([reply(PLAIN)]) as server:
        list(ask(server))
    own = [r for r in caplog.records if r.name == "chatstream"]
    assert len(own) == 2
    assert {r.levelno for r in caplog.records} == {logging.DEBUG}


# --------------------------------------------------------------------------------------
# Connections
# --------------------------------------------------------------------------------------


@needs_urllib3
def test_calls_in_a_row_use_one_connection():
    with Server([reply(PLAIN)]) as server:
        for _ in range(20):
            assert list(ask(server)) == [A, B, END]
        assert server.connections == 1


@needs_urllib3
def test_also_when_the_caller_leaves_at_the_message():
    with Server([reply(PLAIN)]) as server:
        for _ in range(20):
            assert next(cs.aggregate(ask(server))).content == "ab"
        assert server.connections == 1


@needs_urllib3
@pytest.mark.parametrize("length", [True, False])
def test_also_when_the_end_comes_a_moment_after_done(length):
    if length:
        start = head("200 OK", f"Content-Length: {len(PLAIN)}") + PLAIN
        script = [start]
    else:
        script = [CHUNKED + chunked(PLAIN), 0.005, b"0\r\n\r\n"]
    with Server(script) as server:
        for _ in range(20):
            assert list(ask(server)) == [A, B, END]
        assert server.connections <= 10


def test_data_after_done_does_not_hold_the_call(transport):
    def pour(sock, file):
        while not server.stopping.wait(0.005):
            sock.sendall(chunked(b": more\n\n"))

    with Server([CHUNKED + chunked(PLAIN), pour]) as server:
        assert list(ask(server)) == [A, B, END]
        server.wait_for_leaving()


def test_endless_trailers_after_done_do_not_hold_the_call(transport):
    def pour(sock, file):
        while not server.stopping.wait(0.005):
            sock.sendall(b"x: y\r\n")

    with Server([CHUNKED + chunked(PLAIN) + b"0\r\n", pour]) as server:
        assert list(ask(server)) == [A, B, END]
        server.wait_for_leaving()


@needs_urllib3
def test_a_dead_pooled_connection_costs_nothing():
    with Server([reply(PLAIN), CLOSE]) as server:
        for number in range(3):
            assert list(ask(server, max_retries=0)) == [A, B, END]
            server.wait_for_leaving(number + 1)


@pytest.mark.parametrize(
    "bad", [[UNFINISHED, CLOSE], [error("500 Oops", {})], [RESET], [UNFINISHED, HOLD]]
)
def test_after_an_error_the_next_call_works(transport, bad):
    with Server(bad, [reply(PLAIN)]) as server:
        assert collect(ask(server, idle_timeout=0.2))[1] is not None
        assert list(ask(server)) == [A, B, END]


@pytest.mark.parametrize("way", ["close", "drop", "break", "interrupt"])
@pytest.mark.parametrize("aggregated", [False, True])
def test_leaving_closes_the_socket(transport, way, aggregated):
    with Server([UNFINISHED, HOLD]) as server:
        events = ask(server)
        if aggregated:
            events = cs.aggregate(events, deltas=True)
        if way == "break":
            for _ in events:
                break
        else:
            assert next(events) == A
        if way == "close":
            events.close()
        elif way == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt)
        del events
        gc.collect()
        server.wait_for_leaving()


def test_ctrl_c_in_a_read_closes_the_socket(transport):
    with Server([UNFINISHED, HOLD]) as server:
        events = ask(server)
        next(events)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                next(events)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        server.wait_for_leaving()


def test_many_threads_at_once(transport, caplog):
    results = []
    with Server([reply(PLAIN)]) as server:
        threads = [
            threading.Thread(
                target=lambda: results.append(list(ask(server, max_retries=2)))
            )
            for _ in range(120)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert results == [[A, B, END]] * 120
    assert [r.name for r in caplog.records if r.levelno >= logging.WARNING] == []


@needs_urllib3
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connection():
    with Server([reply(PLAIN)]) as server:
        list(ask(server))
        child = os.fork()
        if not child:
            ok = list(ask(server)) == [A, B, END]
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        list(ask(server))
    assert [r.connection for r in server.requests] == [1, 2, 1]


@needs_urllib3
def test_pool_of_the_callers():
    with Server([reply(PLAIN)]) as server:
        with urllib3.PoolManager(headers={"X-Mine": "1", "user-agent": "p"}) as pool:
            assert list(ask(server, pool=pool)) == [A, B, END]
            assert pool.headers == {"X-Mine": "1", "user-agent": "p"}
    assert server.requests[0].header("X-Mine") == "1"
    assert server.requests[0].header("User-Agent") == f"chatstream/{cs.__version__}"


@needs_urllib3
def test_a_blocking_pool_gets_its_slots_back():
    with Server([UNFINISHED, CLOSE], [error("400 Bad", {})], [reply(PLAIN)]) as server:
        with urllib3.PoolManager(maxsize=1, block=True) as pool:
            results = [collect(ask(server, pool=pool))[1] for _ in range(4)]
    assert [type(r).__name__ for r in results[:2]] == [
        "TruncatedStreamError",
        "StatusError",
    ]
    assert results[2:] == [None, None]


@needs_urllib3
def test_the_headers_through_an_http_proxy_are_sent_once(monkeypatch):
    with Server([reply(PLAIN)]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        list(ask("http://upstream.test/v1", headers={"accept": "x/y", "HOST": "zz"}))
    names = [name.lower() for name, _ in proxy.requests[0].headers]
    assert len(names) == len(set(names))
    assert proxy.requests[0].header("Accept") == "x/y"
    assert proxy.requests[0].header("Host") == "zz"


if urllib3 and hasattr(urllib3.response.HTTPResponse, "read1"):  # 1.26 has none

    def test_without_the_private_name_the_public_read1_serves(monkeypatch):
        real = urllib3.HTTPConnectionPool.urlopen

        def urlopen(*args, **kwargs):
            response = real(*args, **kwargs)
            response._original_response = None
            return response

        monkeypatch.setattr(urllib3.HTTPConnectionPool, "urlopen", urlopen)
        scripts = (
            [reply(PLAIN)],
            [UNFINISHED, CLOSE],
            [UNFINISHED, HOLD],
            [error("400 No", {})],
        )
        with Server(*scripts) as server:
            assert list(ask(server)) == [A, B, END]
            got, failure = collect(ask(server))
            assert (got, type(failure)) == ([A], cs.TruncatedStreamError)
            got, failure = collect(ask(server, idle_timeout=0.2))
            assert (got, type(failure)) == ([A], cs.IdleTimeoutError)
            assert type(collect(ask(server))[1]) is cs.StatusError


# --------------------------------------------------------------------------------------
# Bounds
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endless", [b"x" * 65536, b"data: " + b"x" * 65536, b"data: xxx\n" * 6000,
                b"xxx\n" * 16000, b"data:\n" * 10000],
    ids=["text", "line", "data lines", "text lines", "empty data lines"],
)  # fmt: skip
def test_endless_events_end_in_an_error(transport, endless, monkeypatch):
    monkeypatch.setattr(cs, "_MAX_EVENT", 1 << 17)

    def pour(sock, file):
        while True:
            sock.sendall(chunked(endless))

    with Server([CHUNKED, pour]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([], cs.StreamError)
    assert str(1 << 17) in str(failure)


@pytest.mark.parametrize("first", [b"data: {", b"data:{", b"data: x"])
def test_the_lines_of_an_event_are_counted_together(first, monkeypatch):
    monkeypatch.setattr(cs, "_MAX_EVENT", 100)
    line = first + b"y" * 60 + b"\n"
    assert decode([sse({"choices": []}), line + b"\n" + line + b"\n"])[1] is None
    for second in (b"data: {", b"data: y"):
        _, failure = decode([line + second + b"y" * 60 + b"\n\n"])
        assert type(failure) is cs.StreamError
        assert "at most 100 bytes" in str(failure)


def test_one_large_event_in_small_reads(transport):
    text = "x" * (8 << 20)
    body = sse(C(text), STOP, DONE)
    pieces = [body[i : i + 1024] for i in range(0, len(body), 1024)]
    with Server([CHUNKED + chunked(*pieces) + b"0\r\n\r\n"]) as server:
        got = list(ask(server))
    assert got == [TextDelta(text), END]


def test_a_line_in_many_pieces_is_put_together():
    data = b"data: " + b"x" * 100_000
    lines = cs._Lines()
    for start in range(0, len(data), 10):
        assert lines.feed(data[start : start + 10]) == []
    assert lines.end() == [data]


@pytest.mark.parametrize("status", ["400 Bad"])
@pytest.mark.parametrize(
    "script",
    [
        [lambda s, f: [s.sendall(chunked(b"x" * 4096)) for _ in range(10**6)]],
        [chunked(b"so far"), HOLD],
        [chunked(b"so far"), b"5\r\nab", HOLD],
        [b"zz\r\n", CLOSE],
        [HOLD],
    ],
    ids=["endless", "stalled", "inside a chunk", "garbage", "nothing"],
)
@pytest.mark.parametrize("closing", [(), ("Connection: close",)])
def test_an_error_body_never_hides_the_status(
    transport, status, script, closing, monkeypatch
):
    monkeypatch.setattr(cs, "_ERROR_BODY_SECONDS", 0.1)
    start = head(status, "Transfer-Encoding: chunked", *closing, type="text/plain")
    with Server([start, *script]) as server:
        _, failure = collect(ask(server))
    assert isinstance(failure, cs.StatusError)
    assert failure.status == int(status[:3])
    assert len(failure.body) <= 64 * 1024
    if script[0] == chunked(b"so far"):
        assert failure.body.startswith("so far")


def test_a_compressed_error_body(transport):
    body = gzip.compress(json.dumps({"error": "too long"}).encode())
    with Server([error("400 Bad", body, "Content-Encoding: gzip")]) as server:
        assert collect(ask(server))[1].message == "too long"
    with Server([error("400 Bad", b"x", "Content-Encoding: br")]) as server:
        assert collect(ask(server))[1].status == 400


# --------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------

URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"model": ""}, ValueError, "model"),
        ({"model": " "}, ValueError, "model"),
        ({"model": None}, TypeError, "model"),
        ({"messages": []}, ValueError, "messages"),
        ({"messages": ""}, ValueError, "messages"),
        ({"messages": ["x"]}, TypeError, r"messages\[0\]"),
        ({"messages": [{}, None]}, TypeError, r"messages\[1\]"),
        ({"messages": {"role": "user"}}, TypeError, "messages"),
        ({"messages": Message()}, TypeError, "messages"),
        ({"messages": b"x"}, TypeError, "messages"),
        ({"messages": 5}, TypeError, "messages"),
        ({"instructions": 5}, TypeError, "instructions"),
        ({"base_url": "127.0.0.1/v1"}, ValueError, "base_url"),
        ({"base_url": "ftp://x/v1"}, ValueError, "base_url"),
        ({"base_url": "", "provider": "ollama"}, ValueError, "base_url"),
        ({"base_url": "http://"}, ValueError, "base_url"),
        ({"base_url": "http://x:99999/"}, ValueError, "base_url"),
        ({"base_url": "http://x:0/"}, ValueError, "base_url"),
        ({"base_url": "http://[::1/v1"}, ValueError, "base_url"),
        ({"base_url": "http://a b/v1"}, ValueError, "base_url"),
        ({"base_url": "http://x/v1#f"}, ValueError, "base_url"),
        ({"base_url": f"http://user:{KEY}@x/v1"}, ValueError, "user:password@"),
        ({"base_url": 5}, TypeError, "base_url"),
        ({"connect_timeout": 0}, ValueError, "connect_timeout"),
        ({"connect_timeout": "5"}, TypeError, "connect_timeout"),
        ({"idle_timeout": -1}, ValueError, "idle_timeout"),
        ({"idle_timeout": float("nan")}, ValueError, "idle_timeout"),
        ({"idle_timeout": True}, TypeError, "idle_timeout"),
        ({"event_timeout": float("inf")}, ValueError, "event_timeout"),
        ({"event_timeout": 10**400}, ValueError, "event_timeout"),
        ({"max_retries": -1}, ValueError, "max_retries"),
        ({"max_retries": 1.5}, TypeError, "max_retries"),
        ({"max_retries": True}, TypeError, "max_retries"),
        ({"provider": "opanai"}, ValueError, "opanai.*openrouter|openrouter.*opanai"),
        ({"provider": 5}, TypeError, "provider"),
        ({"api_key": 5}, TypeError, "api_key"),
        ({"api_key": KEY + "\n"}, ValueError, "api_key"),
        ({"api_key": KEY + "\u201d"}, ValueError, "api_key"),
        ({"headers": {"X-Key": KEY + "\r\nX: y"}}, ValueError, "X-Key"),
        ({"headers": {f"X\n{KEY}": "v"}}, ValueError, "headers"),
        ({"headers": {"X": 5}}, TypeError, "headers"),
        ({"headers": {"Content-Length": "5"}}, ValueError, "Content-Length"),
        ({"headers": [("a", "b")]}, TypeError, "headers"),
        ({"extra_body": [1]}, TypeError, "extra_body"),
        ({"pool": object()}, TypeError, "pool"),
        ({"pool": urllib3 or 5}, TypeError, "pool"),
        ({"pool": getattr(urllib3, "PoolManager", int)}, TypeError, "pool"),
        ({"headers": {f"Authorization: {KEY}": None}}, ValueError, "headers"),
        ({"base_url": f"user:{KEY}@x/v1"}, ValueError, "base_url"),
        ({"base_url": f"http:/user:{KEY}@x"}, ValueError, "base_url"),
        ({"base_url": f"http:///user:{KEY}@x/"}, ValueError, "base_url"),
        ({"base_url": f"http://user:{KEY}#x@x"}, ValueError, "base_url"),
        ({"base_url": f"http://x/v1#{KEY}"}, ValueError, "base_url"),
        ({"stream": False}, TypeError, "aggregate"),
        ({"extra_body": {"stream": False}}, TypeError, "aggregate"),
        ({"timeout": 5}, TypeError, "idle_timeout"),
        ({"temperature": float("nan")}, ValueError, "temperature.*JSON"),
        ({"tools": {1, 2}}, TypeError, "tools.*JSON.*set"),
        ({"messages": [{"content": b"x"}]}, TypeError, "messages.*JSON.*bytes"),
        ({"api_key": "  "}, ValueError, "api_key.*blanks"),
        ({"base_url": "http://x/\ud800"}, ValueError, "base_url.*Unicode"),
        ({"provider": cs.Provider("x", URL, 5)}, TypeError, "env_key"),
        ({"strict": "no"}, TypeError, "strict.*'no'"),
        ({"raw": None}, TypeError, "raw"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(options, kind, text):
    options = {"messages": "x", "model": "m", "base_url": URL, **options}
    with pytest.raises(kind, match=text) as caught:
        cs.stream(options.pop("messages"), **options)
    assert KEY not in str(caught.value)
    assert not isinstance(caught.value, cs.ChatStreamError)


def test_a_body_nested_too_deeply():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested"):
        cs.stream("x", model="m", base_url=URL, tools=deep)


def test_stream_is_a_generator_that_waits(transport):
    with Server() as server:
        events = ask(server)
        assert type(events).__name__ == "generator"
        assert server.connections == 0
        events.close()


def test_nothing_of_the_callers_is_changed(transport):
    history = [{"role": "user", "content": "a"}, Message(content="b")]
    headers, extra = {"accept": "x/y"}, {"provider": {"order": ["a"]}, "timeout": 5}
    before = copy.deepcopy((history, headers, extra))
    with Server() as server:
        list(ask(server, history, headers=headers, extra_body=extra, instructions="i"))
    assert (history, headers, extra) == before
    body = server.requests[0].json
    assert (body["provider"], body["timeout"]) == ({"order": ["a"]}, 5)
    assert server.requests[0].header("Accept") == "x/y"


def test_headers_replace_whatever_the_case(transport):
    provider = cs.Provider("p", "http://x", headers={"X-A": "1", "X-B": "1"})
    mine = {"x-b": "2", "AUTHORIZATION": "other", "api-key": "k", "user-agent": "me"}
    with Server() as server:
        list(ask(server, provider=provider, headers=mine, api_key=KEY))
    sent = [(n.lower(), v) for n, v in server.requests[0].headers]
    expected = {
        ("x-a", "1"),
        ("x-b", "2"),
        ("authorization", "other"),
        ("api-key", "k"),
    }
    assert expected <= set(sent)
    assert ("user-agent", "me") in sent
    assert len({n for n, _ in sent}) == len(sent)


@pytest.mark.parametrize(
    "base, target",
    [
        ("", "/chat/completions"),
        ("/", "/chat/completions"),
        ("/a/b//", "/a/b/chat/completions"),
        ("/d/x/?api-version=2024-10-21&q=a b".replace(" ", "%20"),
         "/d/x/chat/completions?api-version=2024-10-21&q=a%20b"),
        ("/é", "/%C3%A9/chat/completions"),
    ],
)  # fmt: skip
def test_where_it_goes(transport, base, target):
    with Server() as server:
        list(ask(server, base_url=server.origin + base))
    assert server.requests[0].target == target


def test_openai_base_url(transport, monkeypatch):
    with Server() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        list(cs.stream("x", model="m"))
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        list(cs.stream("x", model="m"))
    assert server.requests[0].header("Authorization") is None
    assert server.requests[1].header("Authorization") == f"Bearer {KEY}"
    with pytest.raises(ValueError, match="base_url"):
        monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
        cs.stream("x", model="m")


def test_the_key_of_one_provider_goes_nowhere_else(transport, monkeypatch):
    for name in ("OPENAI_API_KEY", "GROQ_API_KEY"):
        monkeypatch.setenv(name, KEY + name)
    with Server() as server:
        list(ask(server))
        list(ask(server, provider="ollama"))
        list(ask(server, provider="groq"))
    sent = [r.header("Authorization") for r in server.requests]
    assert sent == [None, None, f"Bearer {KEY}GROQ_API_KEY"]


def test_a_provider_of_ones_own(transport, monkeypatch):
    with Server() as server:
        mine = cs.Provider("mine", server.url, "MY_KEY", "Ask Bob.", {"X-Team": "red"})
        with pytest.raises(cs.MissingAPIKeyError, match=r"MY_KEY.*Ask Bob\."):
            cs.stream("x", model="m", provider=mine)
        monkeypatch.setenv("MY_KEY", KEY)
        list(cs.stream("x", model="m", provider=mine))
    assert server.requests[0].header("X-Team") == "red"
    assert "red" not in repr(mine)


# --------------------------------------------------------------------------------------
# Secrets
# --------------------------------------------------------------------------------------


def everything_about(failure):
    shown = [repr(failure), str(failure), repr(vars(failure)), repr(failure.args)]
    while failure := failure.__cause__ or failure.__context__:
        shown += [repr(failure), str(failure), repr(vars(failure))]
    return "\n".join(shown)


@pytest.mark.parametrize(
    "script",
    [
        [error("401 No", {"error": {"message": f"bad key {KEY}", "raw": [KEY]}})],
        [error("500 No", f"your key {KEY} and token-in-url".encode())],
        [error("302 Moved", {}, f"Location: http://u:{KEY}@x/y?key={KEY}")],
        [reply(sse({"error": {"message": KEY, KEY: KEY}}))],
        [reply(sse(f"{{bad {KEY}"))],
        [reply(f"<html>{KEY}".encode())],
        [RESET],
        [UNFINISHED, CLOSE],
        [f"Bearer {KEY}\r\n\r\n".encode(), CLOSE],
        [UNFINISHED + f"{KEY}\r\n".encode(), CLOSE],
        [error("302 Moved", {}, f"Location: http://x/y#{KEY}")],
        [error("302 Moved", {}, f"Location: http://us/er:{KEY}@x/y")],
        [
            error(
                "400 No",
                {"error": {"message": "m", "code": json.loads("[" * 600 + "]" * 600)}},
            )
        ],
    ],
)
def test_no_secret_in_any_error_or_log(transport, script, caplog, sleeps):
    caplog.set_level(logging.DEBUG)
    with Server(script) as server:
        url = server.url + "?key=token-in-url"
        options = {"api_key": KEY, "strict": True, "base_url": url, "max_retries": 1}
        _, failure = collect(cs.aggregate(ask(server, **options)))
    shown = everything_about(failure)
    own = "\n".join(r.getMessage() for r in caplog.records if r.name == "chatstream")
    assert "\n" not in str(failure)
    for secret in (KEY, "token-in-url"):
        assert secret not in shown
        assert secret not in own


@pytest.mark.parametrize("status", ["200 OK", "400 Bad"])
def test_an_error_can_be_printed_whatever_the_server_says(transport, status):
    body = {"error": {"message": "half \ud83d", "code": "\udc69"}}
    with Server([error(status, body)]) as server:
        _, failure = collect(ask(server))
    assert failure.message == "half \ufffd"
    everything_about(failure).encode()
    str(failure).encode()


def test_redirects_are_not_followed(transport):
    with Server(
        [error("307 Moved", {}, "Location: http://other/v2?key=abc")]
    ) as server:
        _, failure = collect(ask(server, api_key=KEY, max_retries=3))
    assert len(server.requests) == 1
    assert "http://other/v2" in str(failure)
    assert "abc" not in str(failure)


def test_304_has_no_body(transport):
    assert cs._choose_framing(304, {}).ended
    with Server([head("304 Not Modified"), CLOSE]) as server:
        _, failure = collect(ask(server))
    assert (type(failure), failure.status) == (cs.StatusError, 304)
    assert "Location" not in str(failure)


# --------------------------------------------------------------------------------------
# Proxies and TLS
# --------------------------------------------------------------------------------------


def test_http_proxy_gets_an_absolute_request(transport, monkeypatch):
    with Server([reply(PLAIN)]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://bob:p%40ss@127.0.0.1:{proxy.port}")
        assert list(ask("http://upstream.test/v1")) == [A, B, END]
    (request,) = proxy.requests
    assert request.target in (
        "http://upstream.test/v1/chat/completions",
        "http://upstream.test:80/v1/chat/completions",
    )
    assert request.header("Host") == "upstream.test"
    assert request.header("Proxy-Authorization") == "Basic Ym9iOnBAc3M="


def test_all_proxy_without_a_scheme(transport, monkeypatch):
    with Server([reply(PLAIN)]) as proxy:
        monkeypatch.setenv("all_proxy", f"127.0.0.1:{proxy.port}")
        assert list(ask("http://upstream.test/v1")) == [A, B, END]


def test_no_proxy(transport, monkeypatch):
    with Server([reply(PLAIN)]) as server:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
        assert list(ask(server)) == [A, B, END]


@pytest.mark.parametrize(
    "url", ["socks5://127.0.0.1:9", "socks5h://u:hidden@127.0.0.1:9"]
)
def test_a_proxy_scheme_that_is_not_spoken(transport, monkeypatch, url):
    monkeypatch.setenv("ALL_PROXY", url)
    _, failure = collect(ask("http://upstream.test/v1", max_retries=3))
    assert type(failure) is cs.TransportError
    assert "socks5" in str(failure)
    assert "hidden" not in str(failure)
    assert failure.attempts == 1


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A private CA and two certificates: for 127.0.0.1, and for another host."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "rsa:2048", "-nodes"]
    (folder / "ca.cnf").write_text(
        "[req]\ndistinguished_name=d\n[d]\n[ca]\nbasicConstraints=critical,CA:TRUE\n"
        "keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n"
    )
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2",
            "-subj", "/CN=Test CA", "-config", "ca.cnf", "-extensions", "ca")  # fmt: skip
    for name, alternative in [
        ("good", "IP:127.0.0.1,DNS:upstream.test"),
        ("wrong", "DNS:other.test"),
    ]:
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr",
                "-subj", f"/CN={name}", "-config", "ca.cnf")  # fmt: skip
        (folder / "ext").write_text(
            f"subjectAltName={alternative}\nauthorityKeyIdentifier=keyid\n"
        )
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", f"{name}.pem")  # fmt: skip

    def context(name):
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        return made

    return folder, context


def test_tls_with_a_private_authority(transport, certificates, monkeypatch, sleeps):
    folder, context = certificates
    with Server([reply(PLAIN)], tls=context("good")) as server:
        _, failure = collect(ask(server, max_retries=3))
        assert type(failure) is cs.TransportError
        assert "certificate" in str(failure)
        assert "SSL_CERT_FILE" in str(failure)
        assert (failure.attempts, sleeps) == (1, [])
        monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
        assert list(ask(server)) == [A, B, END]
        assert list(ask(server)) == [A, B, END]


def test_tls_with_a_wrong_host_name(transport, certificates, monkeypatch, sleeps):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with Server([reply(PLAIN)], tls=context("wrong")) as server:
        _, failure = collect(ask(server, max_retries=3))
    assert type(failure) is cs.TransportError
    assert failure.attempts == 1
    assert server.requests == []


def test_tls_to_a_server_that_speaks_none(transport, sleeps):
    with Server([reply(PLAIN)]) as server:
        url = server.url.replace("http:", "https:")
        _, failure = collect(ask(url, max_retries=1, connect_timeout=1))
    assert type(failure) is cs.TransportError
    assert failure.attempts == 2


def test_tls_handshake_that_stalls_is_a_connect_timeout(transport, sleeps):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        _, failure = collect(ask(url, connect_timeout=0.2, max_retries=1))
    assert type(failure) is cs.TransportError
    assert failure.attempts == 2


def test_tls_idle_timeout_and_cut(transport, certificates, monkeypatch):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with Server([UNFINISHED, HOLD], [UNFINISHED, CLOSE], tls=context("good")) as server:
        got, failure = collect(ask(server, idle_timeout=0.5))
        assert (got, type(failure)) == ([A], cs.IdleTimeoutError)
        got, failure = collect(ask(server))
        assert (got, type(failure)) == ([A], cs.TruncatedStreamError)


def relay(upstream_port, pause=0):
    """The part of a proxy after CONNECT; it pauses before and after its own reply."""

    def run(sock, file):
        with socket.create_connection(("127.0.0.1", upstream_port)) as upstream:
            time.sleep(pause)
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n")
            time.sleep(pause / 9)
            sock.sendall(b"\r\n")
            time.sleep(pause)

            def back():
                try:
                    while data := upstream.recv(65536):
                        sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass

            thread = threading.Thread(target=back, daemon=True)
            thread.start()
            try:
                while data := file.read1(65536):
                    upstream.sendall(data)
            except OSError:
                pass

    return [run, CLOSE]


def test_https_proxy_tunnels(transport, certificates, monkeypatch):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with Server([reply(PLAIN)], tls=context("good")) as server:
        with Server(relay(server.port)) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://bob:pass@127.0.0.1:{proxy.port}")
            url = f"https://upstream.test:{server.port}/v1"
            assert list(ask(url, api_key=KEY)) == [A, B, END]
    (connect,) = proxy.requests
    assert (connect.method, connect.target) == (
        "CONNECT",
        f"upstream.test:{server.port}",
    )
    assert connect.header("Proxy-Authorization") == "Basic Ym9iOnBhc3M="
    assert connect.header("Authorization") is None
    assert server.requests[0].header("Authorization") == f"Bearer {KEY}"
    assert server.requests[0].header("Proxy-Authorization") is None


@pytest.mark.parametrize("bound", ["connect_timeout", "deadline", "cancel"])
def test_a_proxy_that_never_ends_its_reply_to_connect(transport, monkeypatch, bound):
    def drip(sock, file):
        while not proxy.stopping.wait(0.01):
            sock.sendall(b"x")

    with Server([b"HTTP/1.1 200 OK\r\nX: ", drip]) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.origin)
        options = {"connect_timeout": None, "max_retries": 0}
        if bound != "cancel":
            options[bound] = 0.3
        events = ask("https://upstream.test/v1", **options)
        timer = threading.Timer(0.3, cs.cancel, [events])
        if bound == "cancel":
            timer.start()
        got, failure = collect(events)
    kinds = {"deadline": cs.DeadlineError, "cancel": cs.CancelledError}
    assert (got, type(failure)) == ([], kinds.get(bound, cs.TransportError))
    assert bound != "connect_timeout" or "timed out" in str(failure)


def test_nothing_is_read_after_the_moment_before_which_it_is_to_be():
    clock = cs._Clock("", idle_timeout=None, event_timeout=None, deadline=None)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"xy")
        later = time.monotonic() + PATIENCE
        assert clock.read_before(later, ours, ours.recv, 1) == b"x"
        with pytest.raises(socket.timeout):
            clock.read_before(time.monotonic(), ours, ours.recv, 1)


def test_a_slow_proxy_leaves_tls_its_own_time(transport, certificates, monkeypatch):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with Server([reply(PLAIN)], tls=context("good")) as server:
        with Server(relay(server.port, pause=0.9)) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.origin)
            url = f"https://upstream.test:{server.port}/v1"
            assert list(ask(url, connect_timeout=1.5, max_retries=0)) == [A, B, END]


def test_a_proxy_with_a_bad_port(transport, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://u:hid#den@127.0.0.1:1")
    _, failure = collect(ask("http://upstream.test/v1", max_retries=3))
    assert (type(failure), failure.attempts) == (cs.TransportError, 1)
    assert "hid" not in everything_about(failure)


def test_what_a_proxy_says_back_is_hidden(transport, monkeypatch):
    with Server([error("407 No", b"Basic Ym9iOnBAc3M=")]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://bob:p%40ss@127.0.0.1:{proxy.port}")
        _, failure = collect(ask("http://upstream.test/v1"))
    assert failure.status == 407
    assert "Ym9iOnBAc3M=" not in everything_about(failure)


def test_a_short_proxy_password_garbles_no_text(transport, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://u:e@127.0.0.1:1")
    _, failure = collect(ask("http://upstream.test/v1", max_retries=0))
    assert "http://upstream.test/v1/chat/completions" in str(failure)


def test_a_proxy_that_refuses(transport, monkeypatch, sleeps):
    refusal = head("407 Proxy Authentication Required", "Content-Length: 0")
    with Server([refusal, CLOSE]) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://bob:hidden@127.0.0.1:{proxy.port}")
        _, failure = collect(ask("https://upstream.test/v1"))
    assert type(failure) is cs.TransportError
    assert "407" in str(failure)
    assert "hidden" not in everything_about(failure)


def test_an_https_proxy_for_http(transport, certificates, monkeypatch):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    with Server([reply(PLAIN)], tls=context("good")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"https://127.0.0.1:{proxy.port}")
        assert list(ask("http://upstream.test/v1")) == [A, B, END]
    assert proxy.requests[0].target.startswith("http://upstream.test")


def test_tls_through_a_tls_proxy_without_urllib3(monkeypatch):
    monkeypatch.setitem(sys.modules, "urllib3", None)
    monkeypatch.setenv("HTTPS_PROXY", "https://127.0.0.1:9")
    _, failure = collect(ask("https://upstream.test/v1", max_retries=2))
    assert type(failure) is cs.TransportError
    assert "urllib3" in str(failure)


# --------------------------------------------------------------------------------------
# Messages
# --------------------------------------------------------------------------------------

DELTAS = [
    TextDelta("a"),
    ReasoningDelta("r", 0, {"reasoning_content": "r", "reasoning_details": [{"n": 1}]}),
    TextDelta("z", 1),
    RefusalDelta("no", 1),
    ToolCallDelta(1, "j", "g", "[]"),
    ToolCallDelta(0, "i", "f", "{"),
    ReasoningDelta("s", 0, {"reasoning_content": "s", "reasoning_details": [{"n": 2}]}),
    ReasoningDelta("", 0, {"reasoning": {"text": "t"}}),
    Chunk({"x": 1}),
    ToolCallDelta(0, "i", "f", "}", {"e": 1}),
    TextDelta("b"),
    Completed("id", "m", "stop", {0: "stop", 1: "length"}),
]
MESSAGES = [
    Message(
        content="ab",
        reasoning="rs",
        tool_calls=(ToolCall("i", "f", "{}", {"e": 1}), ToolCall("j", "g", "[]")),
        finish_reason="stop",
        extra={
            "reasoning_content": "rs",
            "reasoning_details": [{"n": 1}, {"n": 2}],
            "reasoning": {"text": "t"},
        },
    ),
    Message(content="z", refusal="no", finish_reason="length", choice=1),
]


def test_aggregate_gathers_by_choice():
    before = copy.deepcopy(DELTAS)
    got = list(cs.aggregate(DELTAS))
    assert got == [*MESSAGES, DELTAS[-1]]
    assert got[-1] is DELTAS[-1]
    assert before == DELTAS


def test_aggregate_deltas_passes_everything_on():
    got = list(cs.aggregate(iter(DELTAS), deltas=True))
    assert got == [*DELTAS[:-1], *MESSAGES, DELTAS[-1]]


def test_aggregate_starts_afresh():
    end = Completed()
    got = list(cs.aggregate([A, end, B, end, *MESSAGES, end]))
    assert got == [Message(content="a"), end, Message(content="b"), end, *MESSAGES, end]


def test_aggregate_without_completed():
    assert list(cs.aggregate([A, B])) == [Message(content="ab")]


def test_aggregate_makes_nothing_of_opaque_members_alone():
    delta = ReasoningDelta("", 0, {"reasoning_details": [{"signature": "s"}]})
    assert list(cs.aggregate([delta, END])) == [END]


def test_aggregate_closes_what_it_reads():
    closed = []

    def events():
        try:
            yield A
            yield B
        finally:
            closed.append(True)

    messages = cs.aggregate(events(), deltas=True)
    next(messages)
    messages.close()
    assert closed == [True]


def test_aggregate_joins_halves_in_extra():
    halves = [R("", reasoning_content="a\ud83d"), R("a👩", reasoning_content="\udc69")]
    (message,) = cs.aggregate(halves)
    assert message.extra == {"reasoning_content": "a👩"}


def test_aggregate_wants_an_iterable():
    with pytest.raises(TypeError):
        cs.aggregate(5)


def test_to_dict():
    first, second = MESSAGES
    assert second.to_dict() == {"role": "assistant", "content": "z", "refusal": "no"}
    assert Message().to_dict() == {"role": "assistant", "content": ""}
    assert Message(tool_calls=(ToolCall("i", "f", "{}"),)).to_dict()["content"] is None
    sent = first.to_dict(reasoning=True)
    assert {k: sent.pop(k) for k in first.extra} == first.extra
    assert sent == first.to_dict()
    assert "reasoning" not in "".join(first.to_dict())


def test_a_whole_tool_loop(transport):
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    first = sse(
        C(delta={"reasoning": "hm", "reasoning_details": details}),
        tool(
            0, "i", "add", '{"a":', extra_content={"google": {"thought_signature": "s"}}
        ),
        tool(0, None, None, "1}"),
        C(finish="tool_calls"),
        DONE,
    )
    with Server([reply(first)], [reply(PLAIN)]) as server:
        history = [{"role": "user", "content": "1+1?"}]
        message, end = cs.aggregate(ask(server, history, tools=[{"type": "function"}]))
        assert end.finish_reason == message.finish_reason == "tool_calls"
        (call,) = message.tool_calls
        assert json.loads(call.arguments) == {"a": 1}
        history.append(message.to_dict(reasoning=True))
        history.append({"role": "tool", "tool_call_id": call.id, "content": "2"})
        answer, _ = cs.aggregate(ask(server, history))
        history.append(answer)
        list(ask(server, history))
    assert server.requests[1].json["messages"] == [
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "i",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a":1}'},
                    "extra_content": {"google": {"thought_signature": "s"}},
                }
            ],
            "reasoning": "hm",
            "reasoning_details": details,
        },
        {"role": "tool", "tool_call_id": "i", "content": "2"},
    ]
    assert server.requests[2].json["messages"][-1] == {
        "role": "assistant",
        "content": "ab",
    }


# --------------------------------------------------------------------------------------
# Pickle, names, types
# --------------------------------------------------------------------------------------

ERRORS = [
    cs.ChatStreamError("t", partial=(MESSAGES[0],), request_id="r"),
    cs.MissingAPIKeyError("t", env_key="K", instructions="i"),
    cs.StatusError("t", status=400, body="b", message="m", code=1, retry_after=2.0),
    cs.RetryLimitError("t", status=500, attempts=3, partial=(MESSAGES[1],)),
    cs.TransportError("t", attempts=2),
    cs.StreamError("t", request_id="r"),
    cs.IdleTimeoutError("t", seconds=1.5, partial=(MESSAGES[1],)),
    cs.TruncatedStreamError("t"),
    cs.MalformedChunkError("t", data="d"),
    cs.ServerError("t", code="c", type="y", message="m", raw={"a": [1]}),
]


@pytest.mark.parametrize("value", [*DELTAS, *MESSAGES, USED, *cs.PROVIDERS.values()])
def test_events_survive_pickle_and_copy(value):
    for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert twin == value
        assert twin is not value


@pytest.mark.parametrize("failure", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_survive_pickle_and_copy(failure):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(failure, protocol))
        assert (type(twin), twin.args, vars(twin)) == (
            type(failure),
            failure.args,
            vars(failure),
        )
    assert vars(copy.deepcopy(failure)) == vars(failure)


def test_a_real_error_survives_pickle(transport):
    with Server([UNFINISHED, CLOSE]) as server:
        _, failure = collect(cs.aggregate(ask(server)))
    twin = pickle.loads(pickle.dumps(failure))
    assert (str(twin), vars(twin)) == (str(failure), vars(failure))
    assert twin.partial == (Message(content="a"),)


def test_every_public_name_is_listed_and_documented():
    tree = ast.parse(pathlib.Path(cs.__file__).read_text(encoding="utf-8"))
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name[0] != "_"
    }
    assert defined == set(cs.__all__) - {"PROVIDERS", "Event", "__version__"}
    for name in defined:
        assert getattr(cs, name).__doc__, name
    assert set(cs.Event.__args__) == {type(e) for e in DELTAS} | {Message}


def test_defaults_are_the_contract():
    assert Message() == Message("assistant", "", "", "", (), None, 0, {})
    assert Completed() == Completed("", "", None, {}, None, 0, "")
    assert Usage() == Usage(0, 0, 0, 0, 0)
    assert ToolCallDelta(1) == ToolCallDelta(1, "", "", "", None, 0)
    assert cs.Provider("n", "u") == cs.Provider("n", "u", None, None, {})
    assert issubclass(cs.IdleTimeoutError, TimeoutError)
    assert issubclass(cs.RetryLimitError, cs.StatusError)


def test_urllib3_is_imported_on_first_use_only():
    code = "import sys, chatstream; sys.exit('urllib3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


# --------------------------------------------------------------------------------------
# The shortcut for chunks that differ in one string
# --------------------------------------------------------------------------------------

TEXTS = ["a", " b", "é", "\n", '"', "\\", "\u2028", "\x7f", "\t", "😀", "\ud83d", "\udc69", "",
         '"},"finish_reason":null}],"obfuscation":"', "null", "\\u0041", "]}", "\u00a0"]  # fmt: skip


def random_stream(rng):
    """Chunks of one server, mostly alike, now and then anything."""
    shape = rng.randrange(7)
    ascii_only, spaced = rng.random() < 0.5, rng.random() < 0.3
    separators = (", ", ": ") if spaced else (",", ":")
    lines = []
    for number in range(rng.randrange(2, 25)):
        text = rng.choice(TEXTS) * rng.randrange(1, 3)
        if shape == 0:
            chunk = C(text)
        elif shape == 1:
            chunk = C(text, obfuscation=rng.choice(["q", "Zx-_9", "", '"'] * 3 + ["é"]))
        elif shape == 2:
            chunk = tool(rng.choice([0, 0, 0, 1, None]), rng.choice([None, None, "i", "j"]),
                         rng.choice([None, None, "f"]), text)  # fmt: skip
        elif shape == 3:
            chunk = C(delta={rng.choice(["reasoning", "reasoning_content"]): text})
        elif shape == 4:
            chunk = C(
                text,
                index=rng.choice([0, 0, 1]),
                usage=rng.choice([None, USAGE, ZEROS]),
            )
        elif shape == 5:
            delta = {"content": text, "extra": {"content": text}, "tool_calls": None}
            chunk = C(delta=delta, p="ab" * rng.randrange(3))
        else:
            chunk = C(text, id=f"c{number if rng.random() < 0.2 else 0}")
        if rng.random() < 0.08:
            chunk = rng.choice(
                [STOP, {"choices": []}, whole({"content": "w"}), tool(0, "n", "g", "{")]
            )
        line = json.dumps(chunk, ensure_ascii=ascii_only, separators=separators)
        if rng.random() < 0.05:
            place = rng.randrange(len(line))
            line = (
                line[:place]
                + rng.choice(['"', "\\", "}", "x", "\x01", ""])
                + line[place + 1 :]
            )
        if rng.random() < 0.05:  # the member twice: the last one counts
            line = line.replace('"content"', '"content":"no","content"', 1)
        lines.append(line)
    return b"".join(
        b"data: %b\n\n" % line.encode("utf-8", "surrogatepass") for line in lines
    )


def test_the_shortcut_gives_the_same_events():
    hits = 0
    for seed in range(900):
        body = random_stream(random.Random(seed))
        fast, failure = decode([body])
        plain, _ = decode([body], raw=True)
        assert failure is None
        assert fast == [e for e in plain if not isinstance(e, Chunk)], (seed, body)
        hits += len(fast)
    assert hits > 4_000


@pytest.mark.parametrize(
    "chunk",
    [
        lambda text: C(text),
        lambda text: C(text, obfuscation="x" + text),
        lambda text: C(delta={"reasoning_content": text}),
        lambda text: tool(0, None, None, text),
    ],
)
def test_the_shortcut_is_taken(chunk, monkeypatch):
    parsed = []
    real = cs._parse_values
    monkeypatch.setattr(cs, "_parse_values", lambda t: parsed.append(t) or real(t))
    start = sse(tool(0, "i", "f", ""))
    got, _ = decode([start + sse(*[chunk(f"w{i}") for i in range(50)])])
    assert len(got) == 52
    assert len(parsed) < 8


def test_the_shortcut_gives_up_where_it_does_not_help(monkeypatch):
    parsed = []
    real = cs._parse_values
    monkeypatch.setattr(cs, "_parse_values", lambda t: parsed.append(t) or real(t))
    got, _ = decode([sse(*[C("w", id=f"c{i}") for i in range(1000)])])
    assert len(got) == 1001
    assert len(parsed) < 1020


# --------------------------------------------------------------------------------------
# Fuzz: seeded, bounded
# --------------------------------------------------------------------------------------


def pieces_of(body, rng):
    at = 0
    while at < len(body):
        step = rng.choice([1, 2, 7, 60, 700])
        yield body[at : at + step]
        at += step


def all_rows():
    return [r[1] for r in ROWS + ERROR_ROWS] + [sse(*r[1], DONE) for r in CALL_ROWS]


def summary(result):
    events, failure = result
    return events, type(failure), str(failure)


def test_fuzz_streams_cut_at_random():
    rng = random.Random(1)
    rows = all_rows()
    for _ in range(500):
        body = b"".join(rng.sample(rows, 3))
        assert summary(decode(pieces_of(body, rng))) == summary(decode([body])), body


def test_fuzz_flipped_bytes_and_noise():
    rng = random.Random(2)
    rows = all_rows()
    for number in range(1000):
        body = bytearray(b"".join(rng.sample(rows, 2)))
        if number % 5 == 0:
            body = bytearray(rng.randbytes(200) if hasattr(rng, "randbytes") else b"x")
        for _ in range(rng.randrange(1, 6)):
            if body:
                body[rng.randrange(len(body))] = rng.choice(
                    b'\n\r:{}[]",\\0e-\x00\xff d'
                )
        for strict in (False, True):
            got, failure = decode(pieces_of(bytes(body), rng), strict)
            assert failure is None or isinstance(failure, cs.StreamError)
            for event in got:
                json.dumps(dataclasses.asdict(event))
                getattr(event, "text", "").encode()


def test_fuzz_over_sockets(transport):
    rng = random.Random(3)
    rows = all_rows()
    for _ in range(60):
        body = bytearray(
            CHUNKED + chunked(*pieces_of(b"".join(rng.sample(rows, 2)), rng))
        )
        body += b"0\r\n\r\n"
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(CHUNKED), len(body))] = rng.randrange(256)
        with Server([bytes(body), CLOSE]) as server:
            got, failure = collect(ask(server, idle_timeout=5))
        assert failure is not None or isinstance(got[-1], Completed)


# --------------------------------------------------------------------------------------
# Framing and compression, without sockets
# --------------------------------------------------------------------------------------

WHOLE, OPEN = "whole", "open"  # else: words of the fault

#: (name, framing, bytes, data, WHOLE | OPEN | words of the fault, what is left behind)
FRAMES = [
    ("one chunk", "chunked", b"3\r\nabc\r\n0\r\n\r\n", b"abc", WHOLE, b""),
    ("chunks", "chunked", b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n", b"abc", WHOLE, b""),
    ("no chunk", "chunked", b"0\r\n\r\n", b"", WHOLE, b""),
    ("zeros and capitals", "chunked", b"00A\r\n0123456789\r\n000\r\n\r\n", b"0123456789", WHOLE, b""),
    ("blanks and extensions", "chunked", b" 3 ;x=y;z\r\nabc\r\n0;q\r\n\r\n", b"abc", WHOLE, b""),
    ("size lines in LF", "chunked", b"3\nabc\r\n0\n\n", b"abc", WHOLE, b""),
    ("trailers", "chunked", b"3\r\nabc\r\n0\r\nX: y\r\nZ: w\r\n\r\n", b"abc", WHOLE, b""),
    ("CRLF inside a chunk", "chunked", b"6\r\na\r\n0\r\n\r\n0\r\n\r\n", b"a\r\n0\r\n", WHOLE, b""),
    ("more behind", "chunked", b"1\r\na\r\n0\r\n\r\nHTTP/1.1", b"a", WHOLE, b"HTTP/1.1"),
    ("no terminator", "chunked", b"3\r\nabc\r\n", b"abc", OPEN, b""),
    ("inside a chunk", "chunked", b"9\r\nabc", b"abc", OPEN, b""),
    ("between CR and LF", "chunked", b"3\r\nabc\r", b"abc", OPEN, b""),
    ("inside a size", "chunked", b"3\r\nabc\r\n1", b"abc", OPEN, b""),
    ("inside a trailer", "chunked", b"1\r\na\r\n0\r\nX:", b"a", OPEN, b""),
    ("chunk too long", "chunked", b"3\r\nabcd\r\n0\r\n\r\n", b"abc", "longer than its size", b""),
    ("LF alone behind a chunk", "chunked", b"3\r\nabc\n0\r\n\r\n", b"abc", "longer than its size", b""),
    ("negative", "chunked", b"1\r\na\r\n-5\r\nabc", b"a", "'-5", b""),
    ("0x", "chunked", b"1\r\na\r\n0x1\r\na\r\n", b"a", "'0x1", b""),
    ("underscore", "chunked", b"1_0\r\n", b"", "'1_0", b""),
    ("words", "chunked", b"zz\r\nabc", b"", "'zz", b""),
    ("no size", "chunked", b"1\r\na\r\n\r\n", b"a", "chunk size", b""),
    ("17 digits", "chunked", b"00000000000000001\r\na", b"", "chunk size", b""),
    ("length", 3, b"abc", b"abc", WHOLE, b""),
    ("length, more behind", 3, b"abcde", b"abc", WHOLE, b"de"),
    ("length, short", 9, b"abc", b"abc", OPEN, b""),
    ("to the end", None, b"abc", b"abc", OPEN, b""),
]  # fmt: skip


@pytest.mark.parametrize("row", FRAMES, ids=[row[0] for row in FRAMES])
def test_framing_at_every_cut(row):
    _, how, raw, data, end, rest = row
    for blocks in cuts(raw):
        framing = cs._Framing(
            chunked=how == "chunked", length=how if type(how) is int else None
        )
        got, left = b"", b""
        for block in blocks:
            if framing.ended:
                left += block
            elif not framing.fault:
                got += framing.feed(block)
        assert got == data, blocks
        assert framing.ended is (end == WHOLE), blocks
        assert framing.rest + left == rest, blocks
        if end not in (WHOLE, OPEN):
            assert end in framing.fault
        elif end == OPEN:
            assert framing.fault == ""
            assert framing.end() == b""
            assert framing.ended is (how is None)
            assert bool(framing.fault) is (how is not None)


@pytest.mark.parametrize(
    "endless", [b"1;" + b"x" * 20_000, b"0\r\n" + b"a: b\r\n" * 5000]
)
def test_framing_lines_have_an_end(endless):
    framing = cs._Framing(chunked=True)
    for start in range(0, len(endless), 100):
        framing.feed(endless[start : start + 100])
        if framing.fault:
            break
    assert str(cs._MAX_FRAMING) in framing.fault


@pytest.mark.parametrize(
    "headers, chunked",
    [
        ({"transfer-encoding": "chunked"}, True),
        ({"transfer-encoding": " Chunked\t"}, True),
        ({"transfer-encoding": "identity, CHUNKED"}, True),
        ({"transfer-encoding": "chunked, chunked", "content-length": "1"}, True),
        ({"transfer-encoding": "identity"}, False),
        ({}, False),
    ],
)
def test_a17_the_last_coding_decides(headers, chunked):
    framing = cs._choose_framing(200, headers)
    assert framing.feed(b"1\r\na\r\n") == (b"a" if chunked else b"1\r\na\r\n")


def test_a17_the_error_has_its_request_id(transport):
    start = head("200 OK", "Transfer-Encoding: gzip, chunked", "X-Request-Id: r1")
    with Server([start, CLOSE]) as server:
        _, failure = collect(ask(server))
    assert (type(failure), failure.request_id) == (cs.StreamError, "r1")


@pytest.mark.parametrize("coding", ["gzip, chunked", "chunked, br", "gzip"])
def test_a17_other_codings_are_named(transport, coding):
    with Server(
        [head("200 OK", "Transfer-Encoding: " + coding) + b"x", CLOSE]
    ) as server:
        got, failure = collect(ask(server, max_retries=2))
    assert (got, type(failure), len(server.requests)) == ([], cs.StreamError, 1)
    assert "gzip" in str(failure) or "br" in str(failure)


@pytest.mark.parametrize(
    "te", ["Transfer-Encoding: CHUNKED \t", "Transfer-Encoding: identity, chunked",
           "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
           "Content-Length: 7\r\nTransfer-Encoding: chunked"],
)  # fmt: skip
def test_a17_over_a_socket(transport, te):
    body = (
        head("200 OK", te)
        + chunked(sse(C("a"), C("b")))
        + chunked(sse(STOP))
        + b"0\r\n\r\n"
    )
    with Server([body, CLOSE]) as server:
        assert list(ask(server)) == [A, B, END]


@pytest.mark.parametrize(
    "fault", ["Bad header", "Bad : 1", "Content-Length: 5\r\nContent-Length: 6",
              "Content-Length: -1", "Content-Length: 1x", " folded: first"],
)  # fmt: skip
def test_a18_broken_headers(transport, fault, sleeps):
    start = f"HTTP/1.1 200 OK\r\n{fault}\r\nServer: x\r\n\r\n".encode()
    with Server([start + PLAIN, CLOSE]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([], cs.TransportError)
    with Server([start.replace(b"200 OK", b"404 No"), CLOSE]) as server:
        assert collect(ask(server))[1] is not None


def test_equal_lengths_are_one(transport):
    length = f"Content-Length: {len(PLAIN)}"
    with Server([head("200 OK", length, length) + PLAIN]) as server:
        assert list(ask(server)) == [A, B, END]


@pytest.mark.parametrize("line", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/2 200\r\n\r\n"])
def test_a_reply_that_is_no_http_is_quoted(transport, line):
    with Server([line, CLOSE]) as server:
        _, failure = collect(ask(server))
    assert type(failure) is cs.TransportError
    assert "SSH-2.0" in str(failure) or "HTTP/2" in str(failure)


def unpack(encoding, blocks):
    """-> the bytes, and whether compressed data has no end; or the StreamError."""
    unpacking = cs._Unpacking(encoding)
    got = []
    try:
        for block in blocks:
            got += unpacking.feed(block)
        got += unpacking.end()
    except cs.TruncatedStreamError:
        return b"".join(got), True
    except cs.StreamError as failure:
        return b"".join(got), failure
    return b"".join(got), False


GZIP = gzip.compress(PLAIN)


@pytest.mark.parametrize(
    "name, encoding, raw, data, unfinished",
    [
        ("gzip", "gzip", GZIP, PLAIN, False),
        ("without the header", "", GZIP, PLAIN, False),
        ("with a wrong one", "br", GZIP, PLAIN, False),
        ("cut", "gzip", GZIP[:-9], PLAIN, True),
        ("one byte", "gzip", b"\x1f", b"", True),
        ("two members", "gzip", gzip.compress(b"data: a") + gzip.compress(b"b"), b"data: ab", False),
        ("padding behind", "gzip", GZIP + b"\0" * 99, PLAIN, False),
        ("padding between", "gzip", GZIP + b"\0\0" + gzip.compress(b"b"), PLAIN + b"b", False),
        ("junk behind", "gzip", GZIP + b"junk" + GZIP, PLAIN, False),
        ("a byte behind", "gzip", GZIP + b"\x1f", PLAIN, False),
        ("zlib", "deflate", zlib.compress(PLAIN), PLAIN, False),
        ("bare deflate", "deflate", zlib.compress(PLAIN)[2:-4], PLAIN, False),
        ("zlib behind identity", "identity, deflate", zlib.compress(PLAIN), PLAIN, False),
        ("zlib, gzip said", "gzip", zlib.compress(PLAIN), PLAIN, False),
        ("plain, gzip said", "gzip", PLAIN, PLAIN, False),
        ("plain text, gzip said", "gzip", b"Service overloaded", b"Service overloaded", False),
        ("plain, br said", "br", b"\r\n" + PLAIN, b"\r\n" + PLAIN, False),
        ("plain, a comment, br said", "br", b": x", b": x", False),
        ("plain, JSON, zstd said", "zstd", b"{}", b"{}", False),
        ("plain, HTML behind a BOM, br said", "br", b"\xef\xbb\xbf<a>", b"\xef\xbb\xbf<a>", False),
        ("none", "none", b"xyz", b"xyz", False),
        ("utf-8", "UTF-8", PLAIN, PLAIN, False),
        ("nothing", "gzip", b"", b"", False),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_a12_judged_by_the_body(name, encoding, raw, data, unfinished):
    for blocks in cuts(raw):
        assert unpack(encoding, blocks) == (data, unfinished), blocks


@pytest.mark.parametrize("fault", ["checksum", "inside"])
def test_a12_what_came_before_a_fault_is_kept(fault):
    raw = bytearray(gzip.compress(PLAIN * 50))
    raw[-8 if fault == "checksum" else len(raw) // 2] ^= 0xFF
    for blocks in ([bytes(raw)], [bytes([b]) for b in raw]):
        got, failure = unpack("gzip", blocks)
        assert isinstance(failure, cs.StreamError)
        assert got.startswith(PLAIN[:100])
    assert fault == "inside" or got == PLAIN * 50


@pytest.mark.parametrize("encoding, raw", [("br", b"x"), ("zstd", b"\x28\xb5\x2f\xfd")])
def test_a12_others_are_named(encoding, raw):
    for blocks in cuts(raw):
        assert encoding in str(unpack(encoding, blocks)[1])


def test_a12_padding_without_end_costs_nothing():
    unpacking = cs._Unpacking("gzip")
    list(unpacking.feed(GZIP))
    for _ in range(2000):  # 128 MB, which zlib would all keep
        assert list(unpacking.feed(b"\0" * 65536)) == []
    assert list(unpacking.end()) == []


def test_a12_a_wrong_checksum_behind_a_finished_answer(transport):
    raw = gzip.compress(sse(C("a"), STOP))[:-8] + b"\0" * 8
    with Server([reply(raw, "200 OK", "Content-Encoding: gzip")]) as server:
        assert list(ask(server)) == [A, END]
        got, failure = collect(ask(server, strict=True))
    assert (got, type(failure)) == ([A], cs.StreamError)


# --------------------------------------------------------------------------------------
# decode(), the end of an answer, one choice
# --------------------------------------------------------------------------------------


def test_brackets_inside_a_text_are_no_objects():
    text = "[" * (cs._MAX_OBJECTS + 1)
    assert decode([sse(C(text, "stop"))]) == ([TextDelta(text), END], None)


def test_a14_many_prefixes_cost_linear_time():
    assert decode([b"data:" * 2_000_000 + sse(C("a"), STOP)]) == ([A, END], None)


def test_decode_takes_any_iterable_of_bytes(tmp_path):
    (tmp_path / "body").write_bytes(PLAIN)
    with open(tmp_path / "body", "rb") as file:
        assert list(cs.decode(file)) == [A, B, END]
    assert list(cs.decode(iter([bytearray(PLAIN), memoryview(b"")]))) == [A, B, END]
    assert list(cs.decode([gzip.compress(PLAIN)])) == [A, B, END]


@pytest.mark.parametrize("wrong", [PLAIN, "text", 5, None])
def test_decode_wants_an_iterable_of_bytes(wrong):
    with pytest.raises(TypeError, match="blocks: expected an iterable of bytes"):
        cs.decode(wrong)
    with pytest.raises(TypeError, match="events: expected an iterable of events"):
        cs.aggregate(len)
    with pytest.raises(TypeError, match="str"):
        list(cs.decode(["text"]))


def test_decode_raises_what_its_source_raises():
    def blocks():
        yield sse(C("a"))
        raise OSError("disk")

    events = cs.decode(blocks())
    assert next(events) == A
    with pytest.raises(OSError, match="disk"):
        next(events)


@pytest.mark.parametrize("error", [cs.ServerError("x"), cs.TruncatedStreamError("x")])
def test_decode_raises_what_its_source_raises_whatever_it_is(error):
    def blocks():
        yield sse(C("a"), STOP)
        raise error

    got, failure = collect(cs.decode(blocks()))
    assert (got, failure) == ([A], error)


def test_decode_stops_at_done():
    def blocks():
        yield PLAIN
        raise AssertionError("read on")

    assert list(cs.decode(blocks())) == [A, B, END]


def test_decode_of_a_cut_gzip():
    got, failure = decode([gzip.compress(sse(*[C(str(n)) for n in range(99)]))[:-9]])
    assert (len(got), type(failure)) == (99, cs.TruncatedStreamError)


@pytest.mark.parametrize(
    "body, quoted",
    [
        (sse("Too many requests, slow down", DONE), "slow down"),
        (
            b"<!doctype html>\n<style>\n:root {\n --a: 1px;\n}\n</style>Log in",
            "doctype",
        ),
        (b"plain words", "plain words"),
        (b'event: message_start\ndata: {"type":"message_start"}\n\n', "message_start"),
        (
            sse(
                {"type": "message_start"},
                {"type": "message_delta", "usage": {"output_tokens": 5}},
            ),
            "message_delta",
        ),
        (sse("1", "true", '"x"'), "1 true"),
        (b"[]", "[]"),
        (PLAIN.replace(b"\n", b"\\n"), "choices"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_nothing_understood_is_said(body, quoted, strict):
    for blocks in cuts(body):
        got, failure = decode(blocks, strict)
        assert got == []
        assert type(failure) in (cs.StreamError, cs.MalformedChunkError)
        assert strict or quoted in str(failure)
        assert len(str(failure)) < 500


def test_only_padding_is_an_unfinished_answer(caplog):
    assert list(cs.decode([sse("null", ": x") + b"event: ping\ndata: x\n\n"])) == [
        Completed()
    ]
    assert len(warnings_in(caplog)) == 1


def test_skipped_text_is_quoted_once(caplog):
    bad = "{oops " + "x" * 5000
    got = list(cs.decode([sse(C("a"), bad, bad, STOP)]))
    assert got == [A, completed(skipped=2)]
    (line,) = warnings_in(caplog)
    assert "{oops" in line
    assert "2 time" in line
    assert len(line) < 400


@pytest.mark.parametrize(
    "body, finished",
    [
        (sse(C("a"), STOP), True),
        (sse(C("a"), STOP, C("b")), False),  # more after the reason
        (sse(C("a"), STOP, C("b"), DONE), True),  # then [DONE] makes a reason enough
        (sse(C("a"), STOP, C("b", finish="stop")), True),
        (sse(C("a"), DONE), False),  # and alone it proves nothing
        (sse(C("a"), STOP, C("b", index=1)), False),
        (sse({"choices": []}), False),
    ],
)
def test_when_an_answer_is_finished(body, finished, caplog):
    got, failure = decode([body])
    assert (type(got[-1]), failure) == (Completed, None)
    assert len(warnings_in(caplog)) == (not finished)
    got, failure = decode([body], strict=True)
    assert (failure is None) is finished
    assert finished or type(failure) is cs.TruncatedStreamError


def test_more_after_a_reason_and_a_cut(transport):
    with Server([CHUNKED + chunked(sse(C("a"), STOP, C("b"))), CLOSE]) as server:
        got, failure = collect(ask(server))
    assert (got, type(failure)) == ([A, B], cs.TruncatedStreamError)


@pytest.mark.parametrize("n", [{}, {"n": 1}, {"n": None}, {"extra_body": {"n": 1}}])
def test_b12_one_choice_unless_asked(transport, n):
    body = sse(C("a"), C("b", index=1), C(finish="stop", index=2), DONE)
    with Server([reply(body)]) as server:
        assert list(ask(server, **n)) == [A, B, END]


@pytest.mark.parametrize("n", [{"n": 2}, {"extra_body": {"n": 3}}])
def test_b12_several_choices_when_asked(transport, n):
    body = sse(C("a"), C("b", index=1), STOP, C(finish="stop", index=1), DONE)
    with Server([reply(body)]) as server:
        got = list(ask(server, **n))
    assert got[:2] == [A, TextDelta("b", 1)]
    assert got[2].finish_reasons == {0: "stop", 1: "stop"}


def test_b12_a_message_over_two_choices(transport):
    chunk = {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "tool_calls"},
                         {"index": 1, "message": {"tool_calls": [{"id": "i", "function": {"name": "f"}}]},
                          "finish_reason": "tool_calls"}]}  # fmt: skip
    with Server([reply(json.dumps(chunk).encode())]) as server:
        message, _ = cs.aggregate(ask(server))
    assert (message.content, message.tool_calls[0].name) == ("a", "f")


def test_what_the_caller_does_to_an_event_changes_nothing_later():
    details = [{"text": "r"}]
    chunks = [
        C("a"),
        C("b"),
        C("c"),
        C(delta={"reasoning_details": details}),
        tool(0, "i", "f", "1"),
        STOP,
    ]
    body = sse(*chunks, DONE)
    wanted = [
        [copy.deepcopy(e) for e in cs.decode([body], raw=raw)] for raw in (False, True)
    ]
    for raw in (False, True):
        got = []
        for event in cs.decode([body], raw=raw):
            got.append(copy.deepcopy(event))
            if isinstance(event, Chunk):
                for choice in event.data["choices"]:
                    choice["delta"].get("reasoning_details", []).clear()
                event.data.clear()
            else:
                event.choice, event.extra, event.text = 7, {"x": 1}, "changed"
        assert got == wanted[raw]


def test_what_the_caller_does_to_an_event_changes_no_message():
    def events():
        yield R("r", reasoning_details=[{"text": "r"}], reasoning={"text": "s"})
        yield ToolCallDelta(0, "i", "f", "{}", {"e": {"s": 1}})
        yield END

    for event in cs.aggregate(events(), deltas=True):
        if isinstance(event, ReasoningDelta):
            event.extra["reasoning_details"][0]["text"] = "changed"
            event.extra["reasoning"].clear()
        elif isinstance(event, ToolCallDelta):
            event.extra["e"].clear()
        elif isinstance(event, Message):
            assert event.extra == {
                "reasoning_details": [{"text": "r"}],
                "reasoning": {"text": "s"},
            }
            assert event.tool_calls[0].extra == {"e": {"s": 1}}


def test_a_custom_tool_in_two_turns(transport):
    first = sse(C(delta={"tool_calls": [{"index": 0, "id": "i", "type": "custom", "custom": {"name": "sh", "input": "l"}}]}),
                C(delta={"tool_calls": [{"index": 0, "custom": {"input": "s"}}]}), C(finish="tool_calls"), DONE)  # fmt: skip
    with Server([reply(first)], [reply(PLAIN)]) as server:
        history = [{"role": "user", "content": "list"}]
        message = cs.complete(history, model="m", base_url=server.url)
        assert message.tool_calls == (ToolCall("i", "sh", "ls", type="custom"),)
        history += [message, {"role": "tool", "tool_call_id": "i", "content": "x"}]
        cs.complete(history, model="m", base_url=server.url)
    assert server.requests[1].json["messages"][1]["tool_calls"] == [
        {"id": "i", "type": "custom", "custom": {"name": "sh", "input": "ls"}}
    ]


def test_fuzz_framings_of_the_same_chunks():
    """However chunks are framed, the same events come out."""
    rng = random.Random(5)
    for number in range(400):
        chunks = [json.loads(line[6:], strict=False) for line in random_stream(rng).split(b"\n\n")[:-1]
                  if cs._is_json(line[6:].decode("utf-8", "replace"))]  # fmt: skip
        texts = [json.dumps(c, ensure_ascii=number % 2 == 0) for c in chunks]
        plain = b"".join(
            b"data: %b\n\n" % t.encode("utf-8", "surrogatepass") for t in texts
        )
        wanted = decode([plain])
        framed, place = b"", 0
        while place < len(texts):
            some = texts[place : place + rng.randrange(1, 4)]
            place += len(some)
            end = rng.choice(["\n\n", "\r\n\r\n", "\r\r"])
            way = rng.randrange(6)
            if way == 0:
                text = "".join(f"data: {t}{end}" for t in some)
            elif way == 1:
                text = "".join(f"{t}{end[: len(end) // 2]}" for t in some) + end
            elif way == 2:
                text = "data:" + rng.choice(["", " "]).join(some) + end
            elif way == 3:
                text = f"data: data: [{','.join(some)}]{end}"
            elif way == 4:
                text = f"[{','.join(some)}]{end}"
            else:
                text = "".join(f"data:{t}\n" for t in some) + end + ": comment" + end
            framed += text.encode("utf-8", "surrogatepass")
        got = decode(pieces_of(framed, rng))
        assert summary(got) == summary(wanted), framed


# --------------------------------------------------------------------------------------
# Whose connection, whose exception, whose time
# --------------------------------------------------------------------------------------


def test_headers_without_end(transport, monkeypatch):
    """http.client reads past any number of 100 Continue, on 3.14 past a hundred."""
    monkeypatch.setattr(cs, "_MAX_HEAD", 100_000)

    def pour(sock, file):
        while not server.stopping.is_set():
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    with Server([pour]) as server:
        got, failure = collect(ask(server, max_retries=0))
    assert (got, type(failure)) == ([], cs.TransportError)
    assert re.search("more than (100000 bytes of headers|100 interim)", str(failure))


def test_the_bound_of_the_headers_is_none_of_the_body(transport, monkeypatch):
    monkeypatch.setattr(cs, "_MAX_HEAD", 200_000)  # and a buffer of 128 KiB on 3.14
    with Server([reply(sse(*[C("a" * 1000)] * 500, STOP, DONE))]) as server:
        assert len(list(ask(server))) == 501


@pytest.mark.parametrize(
    "interim", ["102 Processing", "103 Early Hints", "100 Continue"]
)
def test_a16_interim_replies_are_read_past(transport, interim):
    early = head(interim, "Link: </x>", type=None) * 2
    with Server(
        [early + reply(sse(C("a"), STOP, DONE))], [reply(sse(C("b"), STOP, DONE))]
    ) as server:
        assert list(ask(server)) == [A, END]
        assert list(ask(server)) == [B, END]


def test_a16_but_not_for_ever(transport):
    early = head("103 Early Hints", type=None) * 100
    with Server([early + reply(PLAIN)]) as server:
        _, failure = collect(ask(server))
    assert type(failure) is cs.TransportError


def test_a16_101_is_an_error(transport):
    with Server([head("101 Switching Protocols", type=None)]) as server:
        _, failure = collect(ask(server))
    assert (type(failure), failure.status) == (cs.StatusError, 101)


@pytest.mark.parametrize(
    "script",
    [
        [reply(sse(C("a"), STOP, DONE)) * 2],
        [head("200 OK", f"Content-Length: {len(sse(STOP))}") + sse(STOP) * 2],
        [CHUNKED + chunked(sse(C("a"), STOP, DONE)) + b"0\r\n\r\n" + b"junk"],
    ],
)
def test_what_is_left_behind_an_answer_is_not_the_next_one(transport, script):
    with Server(script, [reply(sse(C("b"), STOP, DONE))]) as server:
        list(ask(server))
        assert list(ask(server)) == [B, END]
        assert server.connections == 2


def test_tls_holds_no_answer_back_for_the_next_call(
    transport, certificates, monkeypatch
):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    size = 16384 - len(reply(sse(C("", pad=""), STOP, DONE)))
    first = reply(sse(C("", pad="x" * (size // 2)), STOP, DONE))
    answers = [first + reply(sse(C("a"), STOP, DONE))], [reply(sse(C("b"), STOP, DONE))]
    with Server(*answers, tls=context("good")) as server:
        list(ask(server))
        assert list(ask(server)) == [B, END]


@needs_urllib3
@pytest.mark.parametrize("end", [CLOSE, RESET])
@pytest.mark.parametrize("own", [False, True])
def test_a_kept_connection_that_dies_costs_nothing(end, own, caplog):
    """The server closes when the next request comes, as uvicorn does after a 500."""
    pool = urllib3.PoolManager() if own else None
    with Server(*[[reply(PLAIN)], [end]] * 3, [reply(PLAIN)]) as server:
        for _ in range(3):
            assert list(ask(server, max_retries=0, pool=pool)) == [A, B, END]
    assert warnings_in(caplog) == []
    if pool:
        pool.clear()


@needs_urllib3
def test_a_new_connection_that_dies_is_a_try():
    with Server([RESET]) as server:
        _, failure = collect(ask(server))
    assert (type(failure), failure.attempts, len(server.requests)) == (
        cs.TransportError,
        1,
        1,
    )


@needs_urllib3
@pytest.mark.parametrize(
    "first", [reply(PLAIN, "200 OK", "Connection: close"), reply(PLAIN)]
)
def test_a_connection_opened_anew_is_no_kept_one(first):
    with Server([first, CLOSE], [CLOSE]) as server:
        list(ask(server))
        time.sleep(0.1)  # until the end of the kept connection has come
        _, failure = collect(ask(server))
    assert (type(failure), failure.attempts) == (cs.TransportError, 1)
    assert len(server.requests) == 2


@needs_urllib3
def test_a_kept_connection_that_dies_in_the_reply_is_a_try():
    with Server([reply(PLAIN)], [b"HTTP/1.1 2", CLOSE]) as server:
        list(ask(server))
        _, failure = collect(ask(server))
    assert (type(failure), len(server.requests)) == (cs.TransportError, 2)


def test_sockets_have_keepalive(transport):
    seen = []

    def look(sock, file):
        seen.append(events.gi_frame is not None)

    with Server([CHUNKED + chunked(sse(C("a"))), look, HOLD]) as server:
        events = ask(server)
        next(events)
        sock = cs._clocks[events]._sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        events.close()


class Alarm(Exception):
    pass


@contextlib.contextmanager
def alarm(error, seconds=0.1):
    """A signal whose handler raises, while the block runs."""

    def handler(number, frame):
        raise error

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


PHASES = {
    "headers": ([HOLD], []),
    "body": ([UNFINISHED, HOLD], [A]),
    "inside a chunk": ([CHUNKED + b"fff\r\n" + sse(C("a")), HOLD], [A]),
    "error body": ([head("400 No", "Content-Length: 9"), HOLD], []),
    "retry": ([error("503 Busy", {}, "Retry-After: 60")], []),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "error", [TimeoutError("mine"), OSError("mine"), ConnectionResetError("mine"), ValueError("mine"), Alarm("mine")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_a_signal_handlers_exception_is_the_callers(transport, phase, error):
    script, events = PHASES[phase]
    with Server(script) as server:
        got = []
        with pytest.raises(type(error), match=r"^mine$") as caught, alarm(error):
            for event in ask(server, max_retries=3):
                got.append(event)
    assert caught.value is error
    assert got == events
    assert len(server.requests) == 1


@pytest.mark.parametrize("error", [TimeoutError("mine"), ValueError("mine")])
def test_a_signal_handlers_exception_while_connecting(transport, error):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(type(error), match=r"^mine$"), alarm(error):
            list(ask(url, max_retries=3))


def test_a_signal_handlers_exception_is_no_reason_for_another_address(transport, named):
    with Server([reply(PLAIN)]) as server, mute_address() as mute:
        named((socket.AF_INET, mute), (socket.AF_INET, ("127.0.0.1", server.port)))
        with pytest.raises(OSError, match=r"^mine$"), alarm(OSError("mine")):
            list(ask(f"http://many.test:{server.port}/v1"))
    assert not server.requests


@pytest.mark.parametrize(
    "error", [TimeoutError("mine"), OSError("mine"), ValueError("mine")]
)
def test_a_signal_handler_that_keeps_no_frame(transport, error):
    def handler(number, frame):
        del frame
        try:
            raise KeyError("inner")
        except KeyError:
            raise error  # noqa: B904

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with Server([HOLD]) as server, pytest.raises(type(error), match=r"^mine$"):
            list(ask(server, max_retries=2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("phase", PHASES)
def test_deadline(transport, phase):
    script, events = PHASES[phase]
    with Server(script) as server:
        started = time.monotonic()
        got, failure = collect(ask(server, deadline=0.3, max_retries=3))
        assert time.monotonic() - started < 10
    assert got == events
    assert len(server.requests) == 1
    if phase == "retry":  # a wait that would outlast it is not begun
        assert type(failure) is cs.RetryLimitError
    elif phase == "error body":
        assert (type(failure), failure.status) == (cs.StatusError, 400)
    else:
        assert (type(failure), failure.seconds) == (cs.DeadlineError, 0.3)
        assert isinstance(failure, TimeoutError)
        assert server.url in str(failure)


@pytest.mark.parametrize("piece", [b": x\n\n", b"x"])
def test_deadline_while_bytes_come(transport, piece):
    def pour(sock, file):
        while True:
            sock.sendall(piece if piece == b"x" else chunked(piece))
            server.stopping.wait(0.01)

    start = b"HTTP/1.1 200 OK\r\nX: " if piece == b"x" else CHUNKED
    with Server([start, pour]) as server:
        _, failure = collect(ask(server, deadline=0.4))
    assert type(failure) is cs.DeadlineError


def test_deadline_while_sending(transport):
    with Server([DEAF, lambda *_: server.stopping.wait(PATIENCE)]) as server:
        _, failure = collect(ask(server, "x" * (32 << 20), deadline=0.4))
    assert type(failure) is cs.DeadlineError


def test_deadline_while_connecting(transport):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        _, failure = collect(ask(url, deadline=0.3, connect_timeout=None))
    assert type(failure) is cs.DeadlineError


def test_deadline_counts_the_callers_own_time(transport):
    with Server([UNFINISHED, 0.6, chunked(sse(STOP)), HOLD]) as server:
        events = ask(server, deadline=0.4)
        assert next(events) == A
        threading.Event().wait(0.5)
        with pytest.raises(cs.DeadlineError):
            list(events)


def test_deadline_after_a_finished_answer(transport, caplog):
    with Server([FINISHED, HOLD]) as server:
        assert list(ask(server, deadline=0.3)) == [A, END]
        got, failure = collect(ask(server, deadline=0.3, strict=True))
    assert (got, type(failure)) == ([A], cs.DeadlineError)


def test_deadline_is_far_away(transport):
    with Server([reply(PLAIN)]) as server:
        assert list(ask(server, deadline=PATIENCE)) == [A, B, END]


@pytest.mark.parametrize(
    "drip", [b"1", b"0;x", b"0\r\nX: y\r\n", b"5\r\n: x\n\n\r\n", b""],
    ids=["size", "extension", "trailer", "comments", "gzip"],
)  # fmt: skip
def test_event_timeout_is_wall_time(transport, drip):
    """Also where bytes come as fast as we read."""

    def pour(sock, file):
        if not drip:
            packer = zlib.compressobj(wbits=31)
            comments = packer.compress(b": x\n\n" * 40_000_000) + packer.flush()
            sock.sendall(chunked(comments))
        for _ in range(3_000):
            sock.sendall(
                (drip or chunked(b": x\n\n"))[: 1 if drip in (b"1", b"0;x") else None]
            )
            if server.stopping.wait(0.001 if drip[:1] in b"01" else 0):
                return

    with Server([UNFINISHED, pour, HOLD]) as server:
        got, failure = collect(ask(server, event_timeout=0.3, idle_timeout=PATIENCE))
    assert got == [A]
    assert type(failure) in (cs.IdleTimeoutError, cs.TruncatedStreamError)
    assert drip in (b"1", b"0\r\nX: y\r\n") or type(failure) is cs.IdleTimeoutError


@pytest.mark.parametrize("keepalive", [{"choices": []}, {"type": "ping"}, {"id": "c1"}])
@pytest.mark.parametrize("raw", [False, True])
def test_b23_keepalive_chunks_restart_no_clock(transport, keepalive, raw):
    def pour(sock, file):
        while not server.stopping.wait(0.05):
            sock.sendall(chunked(sse(keepalive)))

    with Server([CHUNKED, pour]) as server:
        got, failure = collect(ask(server, event_timeout=0.4, raw=raw))
    assert type(failure) is cs.IdleTimeoutError
    assert {type(e) for e in got} <= {Chunk}


def test_the_texts_of_timeouts(transport):
    with Server([HOLD], [UNFINISHED, HOLD]) as server:
        _, before = collect(ask(server, idle_timeout=0.25))
        _, after = collect(ask(server, idle_timeout=0.25))
    assert "the server sent nothing for 0.25 s before the headers" in str(before)
    assert "the server sent nothing for 0.25 s (idle_timeout)" in str(after)
    assert server.url in str(before)
    assert server.url in str(after)


# --------------------------------------------------------------------------------------
# cancel()
# --------------------------------------------------------------------------------------


def cancel_soon(events):
    timer = threading.Timer(0.1, cs.cancel, [events])
    timer.start()
    return timer


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("aggregated", [False, True])
def test_cancel_in_each_phase(transport, phase, aggregated):
    script, events = PHASES[phase]
    with Server(script) as server:
        call = ask(server, max_retries=3)
        timer = cancel_soon(call)
        started = time.monotonic()
        got, failure = collect(cs.aggregate(call) if aggregated else call)
        assert time.monotonic() - started < 10
        timer.join()
    assert type(failure) is cs.CancelledError
    assert got == ([] if aggregated else events)
    assert failure.partial == ((Message(content="a"),) if aggregated and events else ())


@pytest.mark.skipif(sys.platform != "linux", reason="where shutdown() ends a connect()")
def test_cancel_while_connecting(transport):
    with mute_address() as (host, port):
        call = ask(f"http://{host}:{port}/v1", connect_timeout=PATIENCE)
        timer = cancel_soon(call)
        started = time.monotonic()
        _, failure = collect(call)
        assert time.monotonic() - started < PATIENCE / 2
        timer.join()
    assert type(failure) is cs.CancelledError


def test_cancel_while_the_request_is_sent(transport):
    with Server([DEAF, lambda *_: server.stopping.wait(PATIENCE)]) as server:
        call = ask(server, "x" * 20_000_000, connect_timeout=PATIENCE)
        timer = cancel_soon(call)
        started = time.monotonic()
        _, failure = collect(call)
        assert time.monotonic() - started < PATIENCE / 2
        timer.join()
    assert type(failure) is cs.CancelledError


@pytest.mark.parametrize("phase", ["headers", "body"])
def test_tls_cancel(transport, certificates, monkeypatch, phase):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    script, events = PHASES[phase]
    with Server(script, tls=context("good")) as server:
        call = ask(server)
        timer = cancel_soon(call)
        got, failure = collect(call)
        timer.join()
    assert (got, type(failure)) == (events, cs.CancelledError)


def test_cancel_before_the_first_event(transport):
    with Server() as server:
        call = ask(server)
        cs.cancel(call)
        with pytest.raises(cs.CancelledError):
            next(call)
        assert server.connections == 0


def test_cancel_between_two_events(transport):
    with Server([reply(PLAIN)]) as server:
        call = ask(server)
        assert next(call) == A
        cs.cancel(call)
        with pytest.raises(cs.CancelledError):
            next(call)
        server.wait_for_leaving()


@pytest.mark.parametrize(
    "body",
    [sse(C("a")) + sse(C("b", "stop"))[:-2], json.dumps(whole({"content": "a", "refusal": "r"})).encode()],
    ids=["SSE without its last line end", "JSON"],
)  # fmt: skip
def test_cancel_between_two_events_of_the_end(transport, body):
    with Server([reply(body)]) as server:
        call = ask(server)
        assert next(call) == A
        cs.cancel(call)
        assert type(collect(call)[1]) is cs.CancelledError


if urllib3:

    def test_cancel_with_a_pool_waits_for_the_headers():
        come = threading.Event()
        script = [lambda *_: come.wait(PATIENCE), UNFINISHED, HOLD]
        with urllib3.PoolManager() as pool, Server(script) as server:
            call = ask(server, pool=pool)
            timers = [cancel_soon(call), threading.Timer(0.3, come.set)]
            timers[1].start()
            got, failure = collect(call)
            assert come.is_set()
            for timer in timers:
                timer.join()
        assert (got, type(failure)) == ([], cs.CancelledError)

    def test_cancel_with_a_pool_ends_a_wait_in_the_body():
        with urllib3.PoolManager() as pool, Server([UNFINISHED, HOLD]) as server:
            call = ask(server, pool=pool)
            timer = cancel_soon(call)
            started = time.monotonic()
            got, failure = collect(call)
            assert time.monotonic() - started < PATIENCE / 2
            timer.join()
        assert (got, type(failure)) == ([A], cs.CancelledError)


def test_cancel_at_completed_does_nothing(transport):
    with Server([reply(PLAIN)]) as server:
        got = []
        call = ask(server)
        for event in call:
            got.append(event)
            if event == END:
                cs.cancel(call)
    assert got == [A, B, END]


def test_cancel_in_a_signal_handler_that_interrupts_another():
    """The lock is held already, by the same thread."""

    def interrupted():
        with cs._clocks[call]._lock:
            cs.cancel(call)

    with Server([UNFINISHED, HOLD]) as server:
        call = ask(server)
        assert next(call) == A
        thread = threading.Thread(target=interrupted, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert type(collect(call)[1]) is cs.CancelledError


def test_cancel_after_the_end_does_nothing(transport):
    with Server([reply(PLAIN)]) as server:
        call = ask(server)
        assert list(call) == [A, B, END]
        cs.cancel(call)
        assert list(call) == []
        assert list(ask(server)) == [A, B, END]


@pytest.mark.parametrize(
    "wrong", [None, 5, [A], iter([A]), cs.aggregate([A]), cs.decode([b""])]
)
def test_cancel_wants_what_stream_returned(wrong):
    with pytest.raises(TypeError, match=r"stream\(\)"):
        cs.cancel(wrong)


def test_a_cancelled_call_harms_no_other(transport):
    """Its connection may be another call's by now."""
    with Server(
        [reply(PLAIN)],
        [UNFINISHED, 0.3, chunked(sse(C("b"), STOP, DONE)) + b"0\r\n\r\n"],
    ) as server:
        first = ask(server)
        assert list(first) == [A, B, END]
        second = ask(server)
        assert next(second) == A
        cs.cancel(first)
        assert list(second) == [B, END]


# --------------------------------------------------------------------------------------
# Input that means harm
# --------------------------------------------------------------------------------------


def test_choices_and_calls_have_a_limit():
    many = {"choices": [{"index": n} for n in range(cs._MAX_CHOICES + 1)]}
    assert str(cs._MAX_CHOICES) in str(decode([sse(many)])[1])
    calls = [tool(None, f"i{n}", "f", "{}") for n in range(cs._MAX_CALLS + 1)]
    got, failure = decode([sse(*calls)])
    assert (len(got), type(failure)) == (cs._MAX_CALLS, cs.StreamError)


def test_empty_objects_cost_no_memory(monkeypatch):
    monkeypatch.setattr(cs, "_MAX_OBJECTS", 1000)
    body = b'data: {"choices":[' + b"{}," * 2000 + b"{}]}\n\n"
    _, failure = decode([body])
    assert "1000 JSON objects" in str(failure)


def test_indexes_without_end_are_forgotten():
    answer = [tool(0, "i", "f", "")] + [
        tool(n, None, None, "x") for n in range(1, 5000)
    ]
    (message, _) = cs.aggregate(decode([sse(*answer, DONE)])[0])
    assert message.tool_calls[0].arguments == "x" * 4999


def test_a_long_reason_is_cut():
    got, _ = decode([sse(C("a", finish="x" * 100_000))])
    assert len(got[-1].finish_reason) == cs._MAX_REASON


@pytest.mark.parametrize("status", ["200 OK", "400 Bad"])
def test_texts_of_errors_are_bounded_and_plain(transport, status):
    body = {"error": {"message": "\x1b[31mred\x9b1m " + "x" * 60_000}}
    with Server([error(status, body, f"Location: {'/' * 60_000}")]) as server:
        _, failure = collect(ask(server))
    assert len(failure.message) <= 2000
    assert len(str(failure)) <= 4200
    assert failure.message.startswith("[31mred")
    assert str(failure).isprintable()


def test_a_location_of_slashes(transport):
    with Server([error("302 Moved", {}, f"Location: {'/' * 60_000}")]) as server:
        _, failure = collect(ask(server))
    assert len(str(failure)) <= 4200


def test_deep_json_is_text_that_nobody_can_read():
    for deep in ("[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000):
        got, failure = decode([sse(C("a"), deep, STOP)])
        assert failure is None
        assert got[-1].skipped == 1


def test_numbers_without_end():
    got, failure = decode(
        [b'data: {"choices":[],"x":' + b"9" * 100_000 + b"}\n\n" + PLAIN]
    )
    assert failure is None
    assert got[:2] == [A, B]


# --------------------------------------------------------------------------------------
# What people ask for first
# --------------------------------------------------------------------------------------


def test_complete(transport):
    with Server([reply(PLAIN)]) as server:
        options = {"model": "m", "base_url": server.url, "temperature": 0.5}
        assert cs.complete("hello", **options) == Message(
            content="ab", finish_reason="stop"
        )
    assert server.requests[0].json["temperature"] == 0.5
    assert server.connections == 1


def test_complete_of_an_answer_that_says_nothing(transport):
    with Server([reply(sse(STOP, DONE))]) as server:
        got = cs.complete("hello", model="m", base_url=server.url)
    assert got == Message(finish_reason="stop")


def test_complete_raises_with_what_had_arrived(transport):
    with Server([UNFINISHED, CLOSE]) as server:
        with pytest.raises(cs.TruncatedStreamError) as caught:
            cs.complete("hello", model="m", base_url=server.url)
    assert caught.value.partial == (Message(content="a"),)


def test_reply_headers(transport):
    headers = ["X-RateLimit-Remaining: 7", "Set-Cookie: a=b", "Via: one", "Via: two"]
    with Server(
        [reply(PLAIN, "200 OK", *headers)], [error("429 Slow", {}, *headers)]
    ) as server:
        for found in (list(ask(server))[-1], collect(ask(server))[1]):
            assert found.headers["x-ratelimit-remaining"] == "7"
            assert found.headers["via"] == "one, two"
            assert "set-cookie" not in found.headers
            assert "x-ratelimit" not in repr(found)


@pytest.mark.parametrize("name", cs._OTHER_NAMES)
def test_names_of_other_clients_are_refused(name):
    with pytest.raises(TypeError, match=f"^{name}: ") as caught:
        cs.stream("x", model="m", base_url=URL, **{name: KEY})
    assert cs._OTHER_NAMES[name] in str(caught.value)
    assert KEY not in str(caught.value)
    cs.stream("x", model="m", base_url=URL, extra_body={name: 1}).close()


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1\\.trusted.example/v1", "http://a..b/v1", "http://-/v1\\x", "http://x y/", "http://%41/v1",
     "http://x/v1/chat/completions", "http://x/chat/completions/", "http://" + "a" * 70 + ".b/v1"],
)  # fmt: skip
def test_base_urls_that_are_refused(url):
    with pytest.raises(ValueError, match="base_url"):
        cs.stream("x", model="m", base_url=url)


@pytest.mark.parametrize("url", ["http://my_box:8080/v1", "http://[::1]:8/v1", "http://[fe80::1%25eth0]/v1",
                                 "http://a.b.", "https://xn--bcher-kva.example/v1", "http://bücher.example"])  # fmt: skip
def test_base_urls_that_are_taken(url):
    cs.stream("x", model="m", base_url=url).close()


def test_a_key_from_the_environment_is_stripped(transport, monkeypatch):
    monkeypatch.setenv("GROQ_API_KEY", f" {KEY}\r\n")
    with Server() as server:
        list(ask(server, provider="groq"))
    assert server.requests[0].header("Authorization") == f"Bearer {KEY}"


def test_a_401_without_a_key_says_so(transport):
    with Server([error("401 No", {"error": "who are you"})]) as server:
        assert "no key was sent" in str(collect(ask(server))[1])
        assert "no key was sent" not in str(collect(ask(server, api_key=KEY))[1])
        assert "no key was sent" not in str(
            collect(ask(server, headers={"api-key": KEY}))[1]
        )


def test_a_404_without_a_path_asks_for_v1(transport):
    with Server([error("404 No", {})]) as server:
        assert "/v1?" in str(collect(ask(server, base_url=server.origin))[1])
        assert "/v1?" not in str(collect(ask(server))[1])


def test_empty_messages_are_called_empty():
    with pytest.raises(ValueError, match=r"^messages: empty"):
        cs.stream([], model="m", base_url=URL)


@pytest.mark.parametrize(
    "code, kind, times",
    [(429, None, 2), ("503", None, 2), (None, "server_error", 2), ("overloaded_error", None, 2),
     (400, None, 1), ("x", "y", 1), (429, "insufficient_quota", 1), (200, None, 1)],
)  # fmt: skip
def test_an_error_as_first_word_is_like_a_status(transport, sleeps, code, kind, times):
    bad = [reply(sse({"error": {"message": "boom", "code": code, "type": kind}}))]
    with Server(bad) as server:
        got, failure = collect(ask(server, max_retries=1))
    assert (got, type(failure), failure.message) == ([], cs.ServerError, "boom")
    assert len(server.requests) == times
    with Server(bad, [reply(PLAIN)]) as server:
        assert (collect(ask(server, max_retries=1))[0] == [A, B, END]) is (times == 2)


def test_an_error_as_second_word_is_not(transport, sleeps):
    with Server([reply(sse(C("a"), {"error": {"code": 429}}))]) as server:
        got, failure = collect(ask(server, max_retries=2))
    assert (got, type(failure), len(server.requests)) == ([A], cs.ServerError, 1)


@pytest.mark.parametrize("wrong", ["hi", [1], [None], [{"text": "a"}]])
def test_aggregate_names_what_is_no_event(wrong):
    with pytest.raises(TypeError, match=r"str|int|NoneType|dict"):
        list(cs.aggregate(wrong))


def test_aggregate_names_an_event_of_a_second_copy():
    spec = importlib.util.spec_from_file_location("second_copy", cs.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["second_copy"] = module
    spec.loader.exec_module(module)
    del sys.modules["second_copy"]
    with pytest.raises(TypeError, match=r"second_copy\.TextDelta"):
        list(cs.aggregate([module.TextDelta("a")]))


def test_errors_keep_their_fields_on_the_instance():
    """Ray's wrappers are subclasses that look fields up in the original."""
    for failure in ERRORS:
        for name in vars(failure):
            assert not hasattr(type(failure), name), name

        class Wrapped(type(failure)):
            def __init__(self, cause):
                self.cause = cause
                self.args = (cause,)

            def __getattr__(self, name):
                return getattr(self.cause, name)

        wrapped = Wrapped(failure)
        for name, value in vars(failure).items():
            assert getattr(wrapped, name) == value
        assert set(vars(type(failure)())) == set(vars(failure))


def test_type_hints_can_be_looked_up():
    for name in ("stream", "complete", "aggregate", "decode", "cancel"):
        assert typing.get_type_hints(getattr(cs, name))


def test_a_pool_that_is_not_http_clients():
    class Pool:
        pool_classes_by_scheme = {"http": type("P", (), {"ConnectionCls": object})}
        connection_from_url = urlopen = None

    with pytest.raises(TypeError, match="urllib3 itself"):
        cs.stream("x", model="m", base_url=URL, pool=Pool())


def test_something_else_under_the_name_of_urllib3(monkeypatch):
    fake = types.ModuleType("urllib3")
    fake.connection = types.SimpleNamespace(HTTPConnection=object)
    monkeypatch.setitem(sys.modules, "urllib3", fake)
    with Server([reply(PLAIN)]) as server:
        assert list(ask(server)) == [A, B, END]
        assert server.requests[0].header("Connection") is None


class Recorded:
    """What a tool such as vcrpy puts in the place of a response: no file, no framing."""

    def __init__(self, status, body):
        self.status, self.reason, self._body = status, "", io.BytesIO(body)
        self.headers = {"Transfer-Encoding": "chunked", "X-Request-Id": "r"}

    def read1(self, size):
        return self._body.read1(size)

    def close(self):
        pass


def test_a_response_without_a_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "urllib3", None)
    recorded = [Recorded(200, PLAIN), Recorded(404, b'{"error":"gone"}')]

    class Connection(http.client.HTTPConnection):
        def connect(self):
            self.sock = socket.socket()

        def request(self, *args, **options):
            pass

        def getresponse(self, *args):
            return recorded.pop(0)

    monkeypatch.setattr(http.client, "HTTPConnection", Connection)
    assert list(ask(URL)) == [A, B, completed(request_id="r")]
    _, failure = collect(ask(URL))
    assert (failure.status, failure.message) == (404, "gone")


# --------------------------------------------------------------------------------------
# Secrets, proxies, certificates once more
# --------------------------------------------------------------------------------------


def test_a_key_with_a_slash_that_comes_back_escaped(transport):
    key = "sk/abc/defghij+klm"
    body = (
        json.dumps({"error": {"message": f"bad key {key}"}})
        .replace("/", "\\/")
        .encode()
    )
    with Server([error("401 No", body)]) as server:
        _, failure = collect(ask(server, api_key=key))
    assert "defghij" not in everything_about(failure)
    assert "***" in failure.body


def test_a_secret_that_begins_another(transport):
    body = {"error": {"message": f"{KEY}-and-more and {KEY}"}}
    with Server([error("401 No", body)]) as server:
        _, failure = collect(
            ask(server, api_key=KEY, headers={"x-key": KEY + "-and-more"})
        )
    assert failure.message == "*** and ***"


@pytest.mark.parametrize("size", [*range(15, 45), *range(1960, 2005, 3)])
def test_no_text_is_cut_inside_a_word(size):
    text = "x " * (size // 2) + KEY + " y" * 3000
    for most in (40, 200, 2000):
        shown = cs._one_line(text, most)
        assert len(shown) <= most
        assert KEY in shown or KEY[:6] not in shown


def test_a_quotation_cuts_no_secret_in_half(transport, caplog):
    text = "x" * 190 + KEY + "y" * 100
    with Server([reply(sse(C("a"), text, STOP))], [reply(text.encode())]) as server:
        list(ask(server, api_key=KEY))
        _, failure = collect(ask(server, api_key=KEY))
    for shown in (str(failure), *warnings_in(caplog)):
        assert KEY[:6] not in shown


def test_a_body_that_ends_in_half_a_secret(transport):
    body = b"x" * (cs._MAX_ERROR_BODY - 6) + KEY.encode() * 2
    with Server([error("401 No", body)]) as server:
        _, failure = collect(ask(server, api_key=KEY))
    assert failure.body.endswith("x***")
    assert KEY[:6] not in everything_about(failure)


def test_the_logged_body_hides_half_a_secret(transport, caplog):
    caplog.set_level(logging.DEBUG, "chatstream")
    with Server() as server:
        for size in range(1900, 2000, 5):
            list(ask(server, api_key=KEY, extra_body={"x": "y" * size, "key": KEY}))
    assert KEY[:6] not in "".join(r.getMessage() for r in caplog.records)


def test_the_logged_body_hides_secrets(transport, caplog):
    caplog.set_level(logging.DEBUG, "chatstream")
    with Server() as server:
        list(ask(server, api_key=KEY, extra_body={"api_key": KEY}))
    assert KEY not in "".join(r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    "url",
    [
        "http://bob:hid\uff1aden@127.0.0.1:1",
        "http://hid:12#34@127.0.0.1:1",
        "http://hid:12/34@127.0.0.1:1",
        "http://hid:12?34@127.0.0.1:1",
        '"http://hidden:1"',
    ],
)
def test_a_proxy_url_that_cannot_be_parsed(transport, monkeypatch, caplog, url):
    monkeypatch.setenv("HTTP_PROXY", url)
    _, failure = collect(ask("http://upstream.test/v1", max_retries=2))
    assert (type(failure), failure.attempts) == (cs.TransportError, 1)
    assert "HTTP_PROXY or ALL_PROXY is not valid" in str(failure)
    assert "hid" not in everything_about(failure)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "LOCALHOST."])
def test_loopback_goes_through_no_proxy(transport, monkeypatch, host):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Server([reply(PLAIN)]) as server:
        got, failure = collect(ask(server.url.replace("127.0.0.1", host)))
    assert "proxy" not in str(failure)
    assert got == [A, B, END] or host not in ("localhost", "127.0.0.1")


@pytest.mark.parametrize(
    "host, no_proxy, direct",
    [
        ("api.x.test", "x.test", True),
        ("api.x.test", ".x.test", True),
        ("api.x.test", "*.x.test", True),
        ("apix.test", "x.test", False),
        ("x.test", "a.test, b.test\n\tX.TEST", True),
        ("x.test", "a.test b.test", False),
        ("x.test", "x.test:80", True),
        ("x.test", "x.test:81", False),
        ("x.test", "*", True),
        ("x.test", "", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "1.2.3", False),
        ("11.1.2.3", "10.0.0.0/8,nonsense/99", False),
        ("fd00::5", "fd00::/8", True),
        ("fd00::5", "[fd00::5]", True),
        ("fd00::5", "[fd00::5]:80", True),
        ("fd00::5", "[fd00::5]:81", False),
    ],
)
def test_no_proxy_entries(monkeypatch, host, no_proxy, direct):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    found = cs._find_proxy(cs._URL("http", host, 80, "/"))
    assert (found is None) is direct


def test_a_proxy_is_named_in_errors(transport, monkeypatch):
    with Server([error("502 Bad", {"error": "upstream"})], [CLOSE]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://bob:hidden@127.0.0.1:{proxy.port}")
        failures = [collect(ask("http://upstream.test/v1"))[1] for _ in range(2)]
    for failure in failures:
        assert f"through the proxy http://127.0.0.1:{proxy.port}" in str(failure)
        assert "hidden" not in everything_about(failure)


@needs_urllib3
def test_a_proxy_of_the_callers_is_named(transport):
    with Server([error("502 Bad", {"error": "upstream"})]) as proxy:
        with urllib3.ProxyManager(f"http://bob:hidden@127.0.0.1:{proxy.port}") as pool:
            if transport == "http.client":
                return
            _, failure = collect(ask("http://upstream.test/v1", pool=pool))
    assert f"through the proxy http://127.0.0.1:{proxy.port}" in str(failure)
    assert "hidden" not in everything_about(failure)


@pytest.mark.parametrize(
    "status, times", [("407 No", 1), ("403 No", 1), ("502 Bad", 3)]
)
def test_a_proxy_whose_connect_is_refused(
    transport, monkeypatch, sleeps, status, times
):
    with Server([head(status, "Content-Length: 0"), CLOSE]) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://bob:hidden@127.0.0.1:{proxy.port}")
        _, failure = collect(ask("https://upstream.test/v1", max_retries=2))
    assert (type(failure), len(proxy.requests)) == (cs.TransportError, times)
    assert status[:3] in str(failure)


def test_tls_wrong_version_asks_for_http(transport, sleeps):
    def speak(sock, file):
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock:
                        sock.recv(9999)
                        speak(sock, None)

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        _, failure = collect(ask(url, max_retries=3))
    assert (type(failure), failure.attempts) == (cs.TransportError, 1)
    assert "is it http://?" in str(failure)


def test_tls_alerts_are_final(transport, certificates, monkeypatch, sleeps):
    folder, context = certificates
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
    old = context("good")
    old.verify_mode = ssl.CERT_REQUIRED  # asks for a certificate that we do not have
    old.load_verify_locations(folder / "ca.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with Server([reply(PLAIN)], tls=old) as server:
        _, failure = collect(ask(server, max_retries=3))
    assert (type(failure), failure.attempts) == (cs.TransportError, 1)


def test_tls_certificate_file_that_cannot_be_read(
    transport, monkeypatch, tmp_path, sleeps
):
    for content in (None, "no certificate"):
        file = tmp_path / "ca.pem"
        if content:
            file.write_text(content)
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        _, failure = collect(ask("https://127.0.0.1:9/v1", max_retries=3))
        assert (type(failure), failure.attempts) == (cs.TransportError, 1)
        assert str(file) in str(failure)


@pytest.mark.parametrize("has_certifi", [True, False])
def test_tls_without_authorities(
    transport, certificates, monkeypatch, tmp_path, has_certifi
):
    """As in python.org's builds for macOS, and in bare containers."""
    folder, context = certificates
    monkeypatch.setattr(cs, "_has_authorities", lambda context: False)
    fake = types.ModuleType("certifi")
    fake.where = lambda: str(folder / "ca.pem")
    monkeypatch.setitem(sys.modules, "certifi", fake if has_certifi else None)
    cs._tls_context.cache_clear()
    with Server([reply(PLAIN)], tls=context("good")) as server:
        got, failure = collect(ask(server, max_retries=2))
    cs._tls_context.cache_clear()
    if has_certifi:
        assert got == [A, B, END]
    else:
        assert type(failure) is cs.TransportError
        assert "install certifi" in str(failure)


def test_tls_an_empty_store_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    assert not cs._has_authorities(ssl.create_default_context())
    (tmp_path / "12345678.0").write_text("")
    assert cs._has_authorities(ssl.create_default_context())


def test_tls_a_python_without_ssl(transport, monkeypatch):
    monkeypatch.setitem(sys.modules, "ssl", None)
    _, failure = collect(ask("https://127.0.0.1:9/v1", max_retries=2))
    assert (type(failure), failure.attempts) == (cs.TransportError, 1)
    assert "no ssl module" in str(failure)


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------


def command(*args, env=None, input=None, **options):
    full = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    full.update(env or {})
    return subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "chatstream.py"), *args],
        env=full, input=input, capture_output=True, timeout=PATIENCE * 2, **options,
    )  # fmt: skip


def test_cli_demo_on_a_bare_interpreter(tmp_path):
    shutil.copy(cs.__file__, tmp_path)
    run = subprocess.run(
        [sys.executable, "-I", "-S", "chatstream.py", "--demo", "hello", "there"],
        cwd=tmp_path, capture_output=True, timeout=PATIENCE * 2, env={"HTTP_PROXY": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, b"")
    assert b"hello there" in run.stdout


def test_cli_streams_through_a_pipe():
    gate = threading.Event()
    script = [CHUNKED + chunked(sse(C("first"))), lambda *_: gate.wait(PATIENCE)]
    with Server(
        [*script, chunked(sse(C(" second"), STOP, DONE)) + b"0\r\n\r\n"]
    ) as server:
        child = subprocess.Popen(
            [sys.executable, "chatstream.py", "-m", "m", "-u", server.url, "x"],
            cwd=HERE, stdout=subprocess.PIPE,
        )  # fmt: skip
        with child:
            assert child.stdout.read(5) == b"first"
            gate.set()
            assert child.stdout.read() == b" second\n"
        assert child.returncode == 0


def test_cli_json_lines():
    body = sse(C(delta={"reasoning_content": "r"}), C("é"), STOP, DONE)
    with Server([reply(body)]) as server:
        run = command("-m", "m", "-u", server.url, "--json", "x")
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line.pop("event") for line in lines] == [
        "ReasoningDelta",
        "TextDelta",
        "Completed",
    ]
    assert lines[1] == {"text": "é", "choice": 0}
    assert lines[2]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "script, code",
    [
        ([reply(PLAIN)], 0),
        ([error("400 Bad", {"error": "wrong"})], 1),
        ([reply(sse(C("a"), DONE))], 3),
        ([reply(sse(C("a", finish="length"), DONE))], 3),
        ([reply(sse(C("a", finish="content_filter"), DONE))], 3),
        ([reply(sse(tool(0, "i", "f", "{}"), C(finish="tool_calls"), DONE))], 0),
    ],
)
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_cli_exit_codes(script, code, option, capsys):
    with Server(script) as server:
        assert cs._main(["-m", "m", "-u", server.url, *option, "x"]) == code
    out, err = capsys.readouterr()
    assert bool(err) == (code != 0 or "f({})" in err)
    if code == 1:
        assert "wrong" in err
        assert len(err.splitlines()) == 1
        if option:
            shown = json.loads(out)
            assert (shown["event"], shown["type"]) == ("error", "StatusError")
            assert "wrong" in shown["message"]


def test_cli_everything_but_text_goes_to_stderr(capsys):
    body = sse(C(delta={"reasoning_content": "hm", "content": "a"}), C(delta={"refusal": "no"}),
               tool(0, "i", "f", "{}"), STOP, DONE)  # fmt: skip
    with Server([reply(body)]) as server:
        assert cs._main(["-m", "m", "-u", server.url, "x"]) == 0
    out, err = capsys.readouterr()
    assert out == "a\n"
    assert "hm" in err
    assert "no" in err
    assert "f({})" in err
    assert "\x1b" not in err


def test_cli_options_reach_the_request(monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("CHATSTREAM_MODEL", "from-env")
    with Server([reply(PLAIN)]) as server:
        cs._main(
            [
                "-u",
                server.url,
                "--key-env",
                "MY_KEY",
                "-i",
                "brief",
                "-p",
                "ollama",
                "a",
                "b",
            ]
        )
    (request,) = server.requests
    assert request.header("Authorization") == f"Bearer {KEY}"
    assert request.json["model"] == "from-env"
    assert [m["content"] for m in request.json["messages"]] == ["brief", "a b"]


@pytest.mark.parametrize("prompt", [[], ["-"]])
def test_cli_standard_input(prompt):
    with Server([reply(PLAIN)]) as server:
        run = command(
            "-m", "m", "-u", server.url, *prompt, input="from stdin é".encode()
        )
    assert run.returncode == 0
    assert server.requests[0].json["messages"][0]["content"] == "from stdin é"


@pytest.mark.parametrize(
    "args, text",
    [
        (["x"], "CHATSTREAM_MODEL"),
        (["-m", "m", "--key-env", "NOT_SET_ANYWHERE", "x"], "NOT_SET_ANYWHERE"),
        (["-m", "m", "-p", "nobody", "x"], "nobody"),
        (["-m", "m", "-u", "nonsense", "x"], "base_url"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_cli_wrong_arguments(args, text):
    run = command(*args)
    assert run.returncode == 2
    assert text in run.stderr.decode()
    assert b"Traceback" not in run.stderr


def test_cli_missing_key_says_what_to_do(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cs._main(["-m", "m", "x"]) == 1
    err = capsys.readouterr().err
    assert "OPENAI_API_KEY" in err
    assert "https://platform.openai.com/api-keys" in err


def test_cli_closed_pipe_is_quiet():
    body = sse(*[C("word\n" * 2000) for _ in range(200)], STOP, DONE)
    with Server([reply(body)]) as server:
        child = subprocess.Popen(
            [sys.executable, "chatstream.py", "-m", "m", "-u", server.url, "x"],
            cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        child.stderr.close()
        child.wait(PATIENCE)


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_cli_closed_pipe_and_an_error(option):
    with Server([error("400 No", {})]) as server:
        args = ["-m", "m", "-u", server.url, *option, "x"]
        script = shlex.join([sys.executable, "chatstream.py", *args]) + " | true"
        run = subprocess.run(script, shell=True, cwd=HERE, capture_output=True)
    assert b"Traceback" not in run.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_cli_a_full_disk(option):
    with Server([reply(PLAIN)]) as server, open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "chatstream.py", "-m", "m", "-u", server.url, *option, "x"],
            cwd=HERE, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert run.returncode == 1
    assert re.fullmatch("chatstream: cannot write the answer: .*\n", run.stderr)


def test_cli_without_standard_streams():
    def run(arguments):
        command = f"{shlex.quote(sys.executable)} chatstream.py -m m -u {server.url}"
        done = subprocess.run(
            f"{command} {arguments}", shell=True, cwd=HERE, capture_output=True
        )
        assert b"Traceback" not in done.stderr
        return done.returncode, done.stdout

    with Server([reply(PLAIN)], [error("400 No", {})]) as server:
        assert run("<&-") == (2, b"")
        assert run("x 2>&-") == (0, b"ab\n")
        assert run("x 2>&-") == (1, b"")


def test_cli_closed_pipe_in_process(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with Server([reply(PLAIN)]) as server, open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert cs._main(["-m", "m", "-u", server.url, "x"]) == 0


def test_cli_ascii_terminal():
    with Server([reply(sse(C("é😀"), STOP, DONE))]) as server:
        run = command(
            "-m", "m", "-u", server.url, "x", env={"PYTHONIOENCODING": "ascii"}
        )
    assert (run.returncode, run.stdout) == (0, b"??\n")


def test_cli_interrupt():
    # A shell that started us in the background has SIGINT ignored, which is inherited.
    code = (
        "import signal, sys, chatstream;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sys.exit(chatstream._main())"
    )
    with Server([UNFINISHED, HOLD]) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", code, "-m", "m", "-u", server.url, "x"],
            cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with child:
            child.stdout.read(1)
            child.send_signal(signal.SIGINT)
            assert child.wait(PATIENCE) == 130
            assert b"Traceback" not in child.stderr.read()


def test_cli_interrupt_in_process(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cs, "stream", interrupt)
    assert cs._main(["-m", "m", "x"]) == 130


def test_cli_demo_in_process(capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert cs._main(["--demo", "hello"]) == 0
    assert "hello" in capsys.readouterr().out


def test_cli_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit) as caught:
        cs._main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert "--demo" in text


@pytest.mark.parametrize(
    "words, piped, prompt",
    [
        (["Sum", "up:"], b"text \xc3\xa9\n", "text é\n\nSum up:"),
        (["Sum", "up:"], b"", "Sum up:"),
        (["Sum", "-", "up"], b"text\n", "Sum text up"),
        (["-"], b"text\n\n", "text"),
        ([], b"text", "text"),
    ],
)
def test_cli_words_and_a_pipe(words, piped, prompt):
    with Server([reply(PLAIN)]) as server:
        run = command("-m", "m", "-u", server.url, *words, input=piped)
    assert (run.returncode, run.stdout) == (0, b"ab\n")
    assert server.requests[0].json["messages"][0]["content"] == prompt


def test_cli_a_file_on_standard_input(tmp_path):
    (tmp_path / "file").write_text("text")
    with Server([reply(PLAIN)]) as server, open(tmp_path / "file") as file:
        run = command("-m", "m", "-u", server.url, "words", stdin=file)
    assert run.returncode == 0
    assert server.requests[0].json["messages"][0]["content"] == "text\n\nwords"


def test_cli_who_waits_for_input_is_told_so():
    with Server([reply(PLAIN)]) as server:
        child = subprocess.Popen(
            [sys.executable, "chatstream.py", "-m", "m", "-u", server.url],
            cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        with child:
            assert b"waiting for the prompt" in child.stderr.readline()
            child.stdin.write(b"x")
            child.stdin.close()
            assert child.stdout.read() == b"ab\n"


@pytest.mark.parametrize("args", [["--demo"], ["--demo", "x"]])
def test_cli_demo_reads_no_standard_input(args):
    child = subprocess.Popen(
        [sys.executable, "chatstream.py", *args],
        cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with child:
        assert b"You said" in child.stdout.read()


def test_cli_options_of_the_body(capsys):
    options = ["temperature=0.5", "stop=[1]", "user=bob", "a=b=c", "timeout=3"]
    with Server([reply(sse(C("a", usage=USAGE), STOP, DONE))]) as server:
        args = [word for option in options for word in ("-o", option)]
        assert (
            cs._main(
                ["-m", "m", "-u", server.url, "--usage", "-s", "brief", *args, "x"]
            )
            == 0
        )
    body = server.requests[0].json
    assert (body["temperature"], body["stop"], body["user"]) == (0.5, [1], "bob")
    assert (body["a"], body["timeout"]) == ("b=c", 3)
    assert body["stream_options"] == {"include_usage": True}
    assert body["messages"][0] == {"role": "system", "content": "brief"}
    out, err = capsys.readouterr()
    assert out == "a\n"
    assert "1 prompt + 2 completion = 3 tokens" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "args, text",
    [
        (["-o", "nonsense"], "-o: expected NAME=VALUE"),
        (["-u", URL, "-o", "stream=false", "x"], "-o: stream"),
        (["-u", "nonsense", "x"], "-u: base_url"),
        (["-p", "nobody", "x"], "-p: provider"),
        (["-u", URL, ""], "PROMPT: empty"),
        (["-u", "http://127.0.0.1:9/v1/chat/completions", "x"], "-u: base_url"),
    ],
)
def test_cli_names_the_option(args, text):
    run = command("-m", "m", *args, stdin=subprocess.DEVNULL)
    assert run.returncode == 2
    assert text in run.stderr.decode()


def test_cli_a_missing_key_names_the_option(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert cs._main(["-m", "m", "x"]) == 1
    assert "--key-env NAME" in capsys.readouterr().err


def test_cli_errors_stand_on_a_line_of_their_own():
    with Server([UNFINISHED, CLOSE], [reply(sse(C("a"), DONE))]) as server:
        for code in (1, 3):
            run = subprocess.run(
                [sys.executable, "chatstream.py", "-m", "m", "-u", server.url, "x"],
                cwd=HERE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert run.returncode == code
            lines = run.stdout.decode().splitlines()
            assert lines[0] == "a"
            assert all(line.startswith("chatstream: ") for line in lines[1:] if line)


def test_cli_reasoning_and_text_stand_on_lines_of_their_own(capsys):
    chunks = (
        C(delta={"reasoning_content": "hm"}),
        C("a"),
        C(delta={"reasoning_content": "ok"}),
        C("b"),
        STOP,
    )
    with Server([reply(sse(*chunks, DONE))]) as server:
        assert cs._main(["-m", "m", "-u", server.url, "x"]) == 0
    assert capsys.readouterr() == ("ab\n", "hm\n\nok\n")


def test_cli_several_choices_one_below_the_other(capsys):
    chunks = (
        C("a"),
        C("x", index=1),
        C("b"),
        C("y", index=1),
        STOP,
        C(finish="stop", index=1),
    )
    with Server([reply(sse(*chunks, DONE))]) as server:
        assert cs._main(["-m", "m", "-u", server.url, "-o", "n=2", "x"]) == 0
    assert capsys.readouterr().out == "ab\n\nxy\n"


def test_cli_json_errors_have_all_their_fields(capsys):
    body = {"error": {"message": "slow", "code": "c"}}
    with Server(
        [error("429 Slow", body, "Retry-After: 999", "X-Request-Id: r")]
    ) as server:
        assert cs._main(["-m", "m", "-u", server.url, "--json", "x"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert list(shown)[:3] == ["event", "type", "message"]
    assert (shown["event"], shown["type"]) == ("error", "RetryLimitError")
    assert (shown["status"], shown["code"], shown["attempts"]) == (429, "c", 1)
    assert (shown["retry_after"], shown["request_id"]) == (999.0, "r")
    assert "slow" in shown["message"]


def test_cli_interrupt_leaves_the_prompt_on_a_line_of_its_own(monkeypatch, capsys):
    def interrupt(*args, **options):
        yield A
        raise KeyboardInterrupt

    monkeypatch.setattr(cs, "stream", interrupt)
    assert cs._main(["-m", "m", "x"]) == 130
    assert capsys.readouterr().out == "a\n"


# --------------------------------------------------------------------------------------
# The README
# --------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def readme_answer(request):
    """What a model might say to the README's questions."""
    last = request["messages"][-1]
    if "tools" in request and last["role"] == "user":
        call = tool(0, "call_1", "add", '{"a": 17, "b": 25}')
        return [call, C(finish="tool_calls"), DONE]
    if last["role"] == "tool":
        return [C(last["content"]), STOP, DONE]
    if "response_format" in request:
        return [C('{"city": "Paris", "country": "France"}'), STOP, DONE]
    words = re.findall(r"\s*\S+", "Because air scatters blue light more than red.\n")
    thought = (
        C(delta={"reasoning_content": "hm"}) if "deepseek" in request["model"] else C()
    )
    return [thought, *[C(word) for word in words], {**STOP, "usage": USAGE}, DONE]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_examples_run(number, monkeypatch, capsys, tmp_path):
    code = EXAMPLES[number]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    if "urllib3" in code and not urllib3:
        pytest.skip("urllib3 is not installed")
    for provider in cs.PROVIDERS.values():
        monkeypatch.setenv(provider.env_key or "NOT_NEEDED", KEY)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_KEY", KEY)

    def answer(sock, file):
        sock.sendall(reply(sse(*readme_answer(server.requests[-1].json))))

    with Server([answer]) as server:
        for name, provider in list(cs.PROVIDERS.items()):
            local = dataclasses.replace(provider, base_url=server.url)
            monkeypatch.setitem(cs.PROVIDERS, name, local)
        code = re.sub(
            r"https?://[\w.]+\.(com|test)|http://localhost:\d+", server.origin, code
        )
        exec(compile(code, f"README.md, example {number}", "exec"), {})
        assert server.requests
        if "answers.json" in code:  # the second time there is nothing left to ask
            asked = len(server.requests)
            exec(compile(code, f"README.md, example {number}", "exec"), {})
            assert len(server.requests) == asked
    if number == 0:
        shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
        assert capsys.readouterr().out.strip() == shown.strip()


def test_readme_names_everything():
    for name in set(cs.__all__) - {"__version__", "stream", "aggregate"}:
        assert f"`{name}" in README, name
    options = cs.stream.__code__.co_varnames[: cs.stream.__code__.co_argcount + 16]
    for name in [*options[:16], "**params"]:
        assert f"| `{name}` |" in README, name
    for name, default in cs.stream.__kwdefaults__.items():
        shown = f"{default:g}" if isinstance(default, float) else default
        assert f"| `{name}` | {shown} |" in README, name
    for value in [*DELTAS, MESSAGES[0], USED]:
        for member in dataclasses.fields(value):
            assert f"`{member.name}`" in README, member.name
    for failure in ERRORS:
        for member in type(failure).__annotations__:
            assert f"`.{member}`" in README, member


def test_readme_lists_the_providers():
    for provider in cs.PROVIDERS.values():
        key = f"`{provider.env_key}` " if provider.env_key else ""
        assert f"| `{provider.name}` | `{provider.base_url}` | {key}|" in README
    rows = re.findall(r"^\| `\w+` \| `https?://", README, re.MULTILINE)
    assert len(rows) == len(cs.PROVIDERS)


def test_readme_changelog_names_this_version():
    assert f"- **{cs.__version__}**" in README
    header = pathlib.Path(cs.__file__).read_text(encoding="utf-8").splitlines()[0]
    assert cs.__version__ in header


def test_the_licence_is_in_the_file():
    def words(text):
        return re.sub(r"^#", "", text, flags=re.MULTILINE).split()

    licence = words((HERE / "LICENSE").read_text(encoding="utf-8"))
    module = words(pathlib.Path(cs.__file__).read_text(encoding="utf-8"))
    assert module[-len(licence) :] == licence


# --------------------------------------------------------------------------------------
# Rules at their edges
# --------------------------------------------------------------------------------------


def test_a_wait_may_be_longer_than_the_bound_of_an_error_body(transport, monkeypatch):
    monkeypatch.setattr(cs, "_ERROR_BODY_SECONDS", 0.1)
    busy = error("429 Slow", {}, "Retry-After-Ms: 300")
    with Server([busy], [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1)) == [A, B, END]


def test_a_wait_may_be_longer_than_event_timeout(transport):
    busy = error("503 Busy", {}, "Retry-After-Ms: 500")
    with Server([busy], [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1, event_timeout=0.3)) == [A, B, END]


def test_the_bound_of_an_error_body_ends_with_its_try(sleeps, monkeypatch):
    monkeypatch.setattr(cs, "_ERROR_BODY_SECONDS", 0.2)
    with Server([error("503 Busy", {})], [0.5, reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1)) == [A, B, END]


def test_silence_before_the_headers_of_a_second_try(sleeps):
    with Server([error("503 Busy", {})], [HOLD]) as server:
        _, failure = collect(ask(server, max_retries=1, idle_timeout=0.2))
    assert "before the headers" in str(failure)


def test_a_first_word_obeys_the_headers_too(transport, sleeps):
    body = sse({"error": {"message": "m", "code": 429}})
    scripts = (
        [reply(body, "200 OK", "Retry-After: 7")],
        [reply(body, "200 OK", "X-Should-Retry: false")],
        [reply(PLAIN)],
    )
    with Server(*scripts) as server:
        _, failure = collect(ask(server, max_retries=3))
    assert (sleeps, len(server.requests)) == ([7.0], 2)
    assert type(failure) is cs.ServerError


@pytest.mark.parametrize(
    "fields, passing",
    [
        ({"code": "server_error"}, True),
        ({"type": "overloaded_error"}, True),
        ({"code": 408}, True),
        ({"code": 503.0}, True),
        ({"code": 5}, False),
        ({"code": "50"}, False),
        ({"code": "insufficient_quota", "type": "server_error"}, False),
    ],
)
def test_which_first_words_may_pass(fields, passing):
    assert cs._is_passing(cs.ServerError("x", **fields)) is passing


def test_half_a_bom_is_an_answer_nobody_can_read():
    _, failure = decode([b"\xef\xbb"])
    assert type(failure) is cs.StreamError
    assert "\ufffd" in str(failure)


def test_strict_an_error_line_behind_json_lines():
    body = sse(C("a"), start="", end="\n") + b"error: boom\n"
    assert type(decode([body], strict=True)[1]) is cs.ServerError


@pytest.mark.parametrize(
    "start, skipped", [(sse(C("a"), STOP), 0), (b"data: {x\n" + sse(C("a"), STOP, end="\n"), 1)]
)  # fmt: skip
def test_half_a_line_at_a_cut_is_not_skipped_data(transport, start, skipped):
    body = CHUNKED + chunked(start + b'data: {"cho')
    with Server([body, CLOSE]) as server:
        assert list(ask(server)) == [A, completed(skipped=skipped)]


@pytest.mark.parametrize("half", [b"1", b'{"cho'])
def test_strict_half_a_line_at_a_cut_is_the_cut(transport, half):
    with Server([CHUNKED + chunked(sse(C("a")) + b"data: " + half), CLOSE]) as server:
        got, failure = collect(ask(server, strict=True))
    assert (got, type(failure)) == ([A], cs.TruncatedStreamError)


def test_what_says_something_is_counted_also_by_the_shortcut():
    answer = cs._Answer(strict=False, raw=False, one_choice=True)
    for body, said in [
        (sse(C("a"), C("b"), C("c")), 3),
        (sse(C("d"), STOP), 5),
        (sse({"choices": [], "usage": USAGE}), 6),
        (sse({"choices": []}), 6),
    ]:
        list(answer.feed(body))
        assert answer.said == said


def test_the_shortcut_goes_on_as_long_as_it_helps(monkeypatch):
    parsed, real = [], cs._parse_values
    monkeypatch.setattr(cs, "_parse_values", lambda t: parsed.append(t) or real(t))
    decode([sse(*[c for _ in range(20) for c in [{"choices": []}, *[C("w")] * 50]])])
    assert len(parsed) < 20 * 5


def test_raw_gives_chunks_that_are_alike_each():
    got, _ = decode([sse(C("a"), C("b"), C("a"), STOP)], raw=True)
    assert sum(isinstance(event, Chunk) for event in got) == 4


def test_a_broken_json_line_holds_nothing_back():
    answer = cs._Answer(strict=False, raw=False, one_choice=True)
    list(answer.feed(b"{x\n" + sse(C("a"))))
    assert list(answer.feed(sse(C("b"), start="", end="\n"))) == [B]


def test_the_order_behind_a_broken_json_line():
    broken = b'{"x\n' + sse(C("q"), start="", end="\n")
    got, _ = decode([sse(C("a"), C("b")), broken, sse(C("c"), STOP)])
    assert got == [A, B, TextDelta("q"), TextDelta("c"), END]


def test_lines_are_counted_one_by_one(monkeypatch):
    monkeypatch.setattr(cs, "_MAX_EVENT", 1000)
    body = sse(*[C("a")] * 50, STOP)
    _, failure = decode([body[i : i + 7] for i in range(0, len(body), 7)])
    assert failure is None


def test_d1_a_code_of_0_is_shown():
    _, failure = decode([sse({"error": "b", "code": 0})])
    assert failure.code == 0
    assert "(code 0)" in str(failure)


def test_a_sentence_is_looked_for_only_so_deep():
    deep = {"message": "boom"}
    for _ in range(12):
        deep = {"error": deep}
    _, failure = decode([sse(deep)])
    assert failure.message.startswith("{")


def test_a_location_shows_no_password(transport):
    location = "Location: http://bob:hidden@x.test/a"
    with Server([reply(b"", "302 Found", location)]) as server:
        _, failure = collect(ask(server))
    assert "hidden" not in str(failure)
    assert "x.test/a" in str(failure)


def test_300_is_a_redirect(transport):
    with Server([reply(b"", "300 Many", "Location: /x")]) as server:
        assert "Location" in str(collect(ask(server))[1])


def test_retry_after_ms_is_no_date():
    assert cs._retry_after({"retry-after-ms": http_date(30)}) is None


def failing(error):
    def read(_):
        raise error

    return read


def test_a_timeout_before_its_time_is_the_systems():
    sock = types.SimpleNamespace(gettimeout=lambda: 5.0, settimeout=lambda _: None)
    clock = cs._Clock("u", idle_timeout=5.0, event_timeout=None, deadline=None)
    with pytest.raises(TimeoutError, match="ETIMEDOUT"):
        clock.read(sock, failing(TimeoutError("ETIMEDOUT")), None)
    clock.cancel()
    with pytest.raises(cs.CancelledError):
        clock.read(sock, failing(ConnectionResetError("x")), None)


def flood(data):
    """A step of a script: sends until the client leaves, but not for ever."""

    def send(sock, file):
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                sock.sendall(data)

    return send


def test_the_deadline_holds_under_a_flood(transport):
    with Server([head("200 OK"), flood(b": x\n" * 20000)]) as server:
        started = time.monotonic()
        _, failure = collect(ask(server, deadline=0.5))
        assert time.monotonic() - started < PATIENCE / 2
    assert type(failure) is cs.DeadlineError


def test_the_deadline_counts_the_callers_time_between_events_of_one_read(transport):
    with Server([reply(PLAIN)]) as server:
        call = ask(server, deadline=0.5)
        assert next(call) == A
        time.sleep(0.6)
        _, failure = collect(call)
    assert (type(failure), failure.seconds) == (cs.DeadlineError, 0.5)


def test_of_an_endless_error_body_the_beginning_is_enough(transport):
    with Server([head("400 Bad"), flood(b"x" * 65536)]) as server:
        _, failure = collect(ask(server))
    assert (failure.status, len(failure.body)) == (400, cs._MAX_ERROR_BODY)


def test_all_forms_of_a_secret_are_hidden():
    secrets = cs._Secrets('quote"d-/secret', "12345678")
    secrets.add_headers({"Authorization": "Bearer very-secret-value"})
    secrets.add_query("key=query%2Fsecret")
    assert secrets.hide("12345678 very-secret-value") == "*** ***"
    assert secrets.hide("query%2Fsecret query/secret") == "*** ***"
    assert secrets.hide(json.dumps('quote"d-/secret')) == '"***"'
    assert secrets.hide('quote"d-/secret') == "***"
    secrets.add("another-secret")
    assert secrets.hide("another-secret") == "***"


def test_causes_of_causes_are_cleaned():
    inner = ValueError(KEY)
    try:
        try:
            raise inner
        except ValueError:
            raise KeyError("x")  # noqa: B904
    except KeyError as error:
        failure = cs.TransportError("t")
        failure.__cause__ = error
    cs._Secrets(KEY).clean(failure)
    assert KEY not in str(inner)


def test_a_proxys_password_is_a_secret(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://bob:hidden-password@proxy.test:1")
    found = cs._find_proxy(cs._URL("http", "x.test", 80, "/"))
    assert "hidden-password" in found.secrets


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"X": "a\x7f"}},
        {"headers": {"": "x"}},
        {"base_url": "http://-x.test/v1"},
        {"base_url": "http://" + "a." * 127 + "test/v1"},
    ],
)
def test_headers_and_hosts_that_are_none(options):
    with pytest.raises(ValueError, match=r"expected|control"):
        ask(URL, **options)


def test_a_tab_may_stand_in_a_header():
    ask(URL, headers={"X": "a\tb"})


def test_no_proxy_with_a_dot_or_a_port():
    assert cs._goes_direct("x.test", 80, "x.test.")
    assert cs._goes_direct("api.x.test", 80, "x.test:80")


def test_a_reply_that_is_tls_asks_for_https(transport):
    with Server([b"\x15\x03\x03\x00\x02\x02\x16", CLOSE]) as server:
        text = str(collect(ask(server))[1])
    assert "got '\\x15\\x03\\x03" in text
    assert text.endswith("is it https://?")


@pytest.mark.parametrize("key", [KEY, "id:abcd!efgh!ijkl!mnop!qrst"])
def test_of_an_odd_reply_no_half_secret_is_quoted(transport, key):
    odd = [b"y" * 180 + b" " + key.encode() + b"\r\n\r\n", CLOSE]
    error = {"error": {"message": "m", "code": "x" * 25 + " " + key}}
    with Server(odd, [reply(sse(error))]) as server:
        for text in ("yyy", "(code xxx"):
            shown = str(collect(ask(server, api_key=key))[1])
            assert text in shown
            assert key[:6] not in shown


def test_a_proxys_user_in_another_encoding(transport, monkeypatch):
    user = os.fsdecode(b"us\xe9r")
    with Server([reply(PLAIN)]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://{user}:hidden@127.0.0.1:{proxy.port}")
        list(ask("http://upstream.test/v1"))
    given = proxy.requests[0].header("Proxy-Authorization").partition(" ")[2]
    assert base64.b64decode(given) == b"us\xe9r:hidden"


def test_errors_inside_errors_cost_no_more_than_their_size():
    value = ["a"] * 1000
    for _ in range(8):
        value = {"errors": value}
    parts = list(cs._error_parts({"error": value}))
    assert len(parts) < 2000


def test_a_status_of_another_type_is_none():
    deep = "[" * 900 + "]" * 900
    got, failure = decode([sse(C("a"), f'{{"message": "x", "status": {deep}}}', STOP)])
    assert (got, failure) == ([A, END], None)


def test_a_closed_connection_is_no_odd_reply(transport):
    with Server([CLOSE]) as server:
        assert "expected a reply" not in str(collect(ask(server))[1])


@pytest.mark.parametrize(
    "error, heals",
    [(FileNotFoundError("x"), False), (UnicodeError("x"), False), (OSError("x"), True)],
)
def test_what_another_try_heals(error, heals):
    assert cs._describe_failure(error, cs._Upload(b"", None))[1] is heals


def test_a17_codings_and_lengths():
    assert cs._choose_framing(204, {}).ended
    assert cs._choose_framing(101, {}).ended
    framing = cs._choose_framing(200, {"transfer-encoding": ", chunked"})
    assert framing.feed(b"1\r\na\r\n") == b"a"
    for length in ("3, 4", "1" * 19):
        with pytest.raises(cs.StreamError, match="one Content-Length"):
            cs._choose_framing(200, {"content-length": length})


def test_a12_members_and_junk_in_odd_blocks():
    assert unpack("gzip", [GZIP + b"xx", GZIP]) == (PLAIN, False)
    assert unpack("gzip", [bytes([c]) for c in GZIP * 3]) == (PLAIN * 3, False)


def test_a12_a_fault_behind_more_than_a_block():
    data = bytes(range(256)) * 1000
    raw = bytearray(gzip.compress(data))
    raw[-6] ^= 1
    got, failure = unpack("gzip", [bytes(raw)])
    assert (got, type(failure)) == (data, cs.StreamError)


def test_the_deadline_holds_while_much_unpacks_from_little(transport):
    body = gzip.compress(b": x\n" * 16_000_000)
    with Server([reply(body, "200 OK", "Content-Encoding: gzip")]) as server:
        _, failure = collect(ask(server, deadline=0.3))
    assert type(failure) is cs.DeadlineError


@pytest.mark.parametrize("most", [1024, 1025])
def test_c16_the_oldest_index_is_forgotten(most):
    chunks = [tool(0, "i", "f", "{"), tool(1, "j", "g", "[")]
    chunks += [tool(n, None, None, " ") for n in range(2, most)]
    chunks += [tool(0, None, None, "}")]
    message = next(cs.aggregate(cs.decode([sse(*chunks)])))
    is_known = most == 1024
    assert message.tool_calls[0].arguments == ("{}" if is_known else "{")
    assert message.tool_calls[1].arguments.endswith(" " if is_known else "}")


def test_aggregate_extras_that_change_their_type():
    events = [R("r", x=["p"]), R("r", x="s"), R("r", y=["p"]), R("r", y={"q": 1}), END]
    assert next(cs.aggregate(events)).extra == {"x": "s", "y": {"q": 1}}


def test_aggregate_extras_are_copies():
    def events():
        for text in "ab":
            yield R("r", x=[{"text": text}])
        yield END

    for event in cs.aggregate(events(), deltas=True):
        if isinstance(event, ReasoningDelta):
            event.extra["x"][0]["text"] = "changed"
        elif isinstance(event, Message):
            assert event.extra == {"x": [{"text": "a"}, {"text": "b"}]}


def test_aggregate_gathers_what_a_call_has():
    first = ToolCallDelta(0, "i", "f", "{}", {"a": 1})
    message = next(cs.aggregate([first, ToolCallDelta(0, extra={"b": 2}), END]))
    (call,) = message.tool_calls
    assert (call.id, call.name, call.extra) == ("i", "f", {"a": 1, "b": 2})


def test_aggregate_gives_choices_in_ascending_order():
    got = list(cs.aggregate([TextDelta("b", 1), A, END]))
    assert [message.choice for message in got[:2]] == [0, 1]


def test_aggregate_keeps_what_an_error_has_already():
    def events():
        yield END
        raise cs.StreamError("x", partial=(Message(content="p"),))

    _, failure = collect(cs.aggregate(events()))
    assert [message.content for message in failure.partial] == ["p"]


def test_a_stalled_upload_on_a_kept_connection_is_no_dead_one(transport):
    stall = [DEAF, lambda *_: server.stopping.wait(PATIENCE)]
    options = {"connect_timeout": 0.2, "idle_timeout": 0.2}
    with Server([reply(PLAIN)], stall) as server:
        list(ask(server))
        _, failure = collect(ask(server, "x" * (64 << 20), **options))
    assert type(failure) is cs.TransportError
    assert server.begun == 2
