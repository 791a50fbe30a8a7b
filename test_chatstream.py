"""Tests of chatstream, in the order of subjects: see the banners.

The server's side of a test is a script of bytes and pauses on a real loopback socket; HTTP
is not mocked. Only where a test is about the exact blocks that one read gives does a class
stand in for http.client.HTTPConnection. Random numbers and the waits between tries are
replaced, and some limits by smaller ones. No test depends on how fast the machine is: it
waits for events, or for a short timeout with which nothing races.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import dataclasses
import email.utils
import errno
import gc
import gzip
import http.client
import http.server
import importlib.util
import inspect
import io
import itertools
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
import traceback
import types
import typing
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

# fmt: off
# Not formatted from here on: the tables need 100 columns, and so the rest may have them.

try:
    import urllib3
except ImportError:
    urllib3 = None

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

HERE = pathlib.Path(__file__).parent
SOURCE = pathlib.Path(cs.__file__).read_text(encoding="utf-8")
KEY = "sk-secret-0123456789"
URL = "http://127.0.0.1:9/v1"  # nobody listens there

PATIENCE = 30  # seconds: the bound of each wait that is not meant to last
SOON = 0.2  # seconds: a timeout that is meant to strike, and nothing comes before it
LATER = 1.5  # seconds: the same, where something has to come before it

# ---- A server whose script is bytes and pauses; builders of what it sends ------------

CLOSE, RESET, HOLD, DEAF = "close", "reset", "hold", "deaf"

class Server:
    """Answers request n with script n (the last one again and again).

    A script is a list of steps: bytes are sent; CLOSE ends the connection, RESET breaks
    it, HOLD waits until the client leaves; a callable is called with the socket and its
    file. A script that begins with DEAF runs before the request's body is read.
    """

    def __init__(self, *scripts, tls=None, host="127.0.0.1"):
        self.scripts = scripts or ([reply(sse(C("hi"), DONE))],)
        self.requests = []
        self.begun = 0  # requests whose headers have come
        self.connections = 0
        self.left = 0  # connections that the client has ended
        self.stopping = threading.Event()
        self.tls = tls
        family = socket.AF_INET6 if "[" in host else socket.AF_INET
        self.listener = socket.create_server((host.strip("[]"), 0), family=family)
        self.port = self.listener.getsockname()[1]
        self.origin = f"http{'s' if tls else ''}://{host}:{self.port}"
        self.url = self.origin + "/v1"
        self.changed = threading.Condition()
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
            with self.changed:
                self.connections += 1
                self.sockets.append(sock)
                number = self.connections
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

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
            with self.changed:
                self.left += 1
                self.changed.notify_all()

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
        with self.changed:
            script = list(self.scripts[min(self.begun, len(self.scripts) - 1)])
            self.begun += 1
        if script[:1] == [DEAF]:
            script.pop(0)
        else:
            request.body = file.read(int(request.header("Content-Length") or 0))
        with self.changed:
            self.requests.append(request)
            self.changed.notify_all()
        for step in script:
            if isinstance(step, bytes):
                sock.sendall(step)
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

    def wait_until(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)

    def wait_for_leaving(self, count=1):
        self.wait_until(lambda: self.left >= count)

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

def pour(piece, pause=0.0):
    """A step of a script: sends the piece until the client leaves."""

    def step(sock, file):
        with contextlib.suppress(OSError):
            for _ in range(int(PATIENCE / max(pause, 0.0001))):
                sock.sendall(piece)
                time.sleep(pause)

    return step

def raiser(fault):
    """-> what stands in for a function and raises this."""

    def run(*args, **options):
        raise fault

    return run

def gate():
    """-> a step that waits for the event, and the event."""
    event = threading.Event()
    return (lambda *_: event.wait(PATIENCE)), event

def C(content=None, finish=None, index=0, delta=None, **top):
    """A chunk with one choice."""
    if delta is None:
        delta = {} if content is None else {"content": content}
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "model": "m1", "choices": [choice], **top}

def D(**delta):
    """A chunk with this delta."""
    return C(delta=delta)

def tool(index=None, id=None, name=None, arguments=None, **extra):
    """A chunk with one tool-call delta; None leaves a member out."""
    function = {"name": name, "arguments": arguments}
    function = {k: v for k, v in function.items() if v is not None}
    call = {"index": index, "id": id, "function": function, **extra}
    return D(tool_calls=[{k: v for k, v in call.items() if v is not None}])

def arg(text, index=0):
    """A chunk with one tool-call delta that has arguments alone."""
    return tool(index, None, None, text)

def fragments(*pieces):
    """Deltas of one call: its head in the first one, then pieces of its arguments."""
    return [tool(0, "i", "f", pieces[0]), *map(arg, pieces[1:])]

def whole(message, finish="stop", **top):
    """A chunk whose choice has a message and no delta."""
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "c1", "model": "m1", "choices": [choice], **top}

DONE = "[DONE]"
STOP = C(finish="stop")
CA, CB = C("a"), C("b")
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
ZEROS = dict.fromkeys(USAGE, 0)

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

def sized(body, status="200 OK", *headers, type="text/event-stream"):
    """A whole reply with a Content-Length."""
    return head(status, f"Content-Length: {len(body)}", *headers, type=type) + body

def error(status, body, *headers, type="application/json"):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return sized(text, status, *headers, type=type)

def completed(reason="stop", **fields):
    reasons = {0: reason} if reason else {}
    return Completed("c1", "m1", reason, reasons, **fields)

def R(text, **extra):
    return ReasoningDelta(text, 0, extra or {"reasoning_content": text})

A, B, END = AB = [TextDelta("a"), TextDelta("b"), completed()]
OPEN = completed(None)  # an end without a finish_reason
PLAIN = sse(C("a"), C("b"), STOP, DONE)
USED = Usage(1, 2, 3)

CHUNKED = head("200 OK", "Transfer-Encoding: chunked")
FINISHED = CHUNKED + chunked(sse(C("a"), STOP))
UNFINISHED = CHUNKED + chunked(sse(C("a")))

@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name.startswith(("OPENAI_", "SSL_CERT")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CHATSTREAM_MODEL", raising=False)
    yield
    cs._close_idle()

@pytest.fixture
def sleeps(monkeypatch):
    """The waits between tries, which take no time here, and nothing is random."""
    waits = []
    monkeypatch.setattr(cs._Clock, "sleep", lambda self, seconds: waits.append(seconds))
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0 if low == 0.9 else low)
    return waits

def ask(server, messages="hello", **options):
    options.setdefault("idle_timeout", PATIENCE)
    options.setdefault("max_retries", 0)
    url = server if isinstance(server, str) else server.url
    return cs.stream(messages, model="m", **{"base_url": url, **options})

def request_of(messages="hello", path="/v1", **options):
    """-> the one request of a call."""
    with Server() as server:
        list(ask(server.origin + path, messages, **options))
    (request,) = server.requests
    return request

def complete(server, **options):
    return cs.complete("hello", model="m", **{"base_url": server.url, **options})

def collect(events):
    """-> the events, and the ChatStreamError that ended them or None."""
    got = []
    try:
        for event in events:
            got.append(event)
    except cs.ChatStreamError as failure:
        return got, failure
    return got, None

def outcome(events):
    """-> the events, and the class of the error that ended them or None."""
    got, failure = collect(events)
    return got, type(failure) if failure else None

def answers(*scripts, **options):
    """-> the events and the error of one call to a server with these scripts."""
    with Server(*scripts) as server:
        return collect(ask(server, **options))

def decode(blocks, strict=False, raw=False):
    return collect(cs.decode(blocks, strict=strict, raw=raw))

def fails(call, kind, *words, got=(), **fields):
    """-> the error of this class, with these words and fields, that ends a call.
    call: its events, or what answers() or decode() have found. got: the events before."""
    events, failure = call if isinstance(call, tuple) else collect(call)
    assert (events, type(failure)) == ([*got], kind)
    for word in words:
        assert word in str(failure)
    assert {name: getattr(failure, name) for name in fields} == fields
    return failure

def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

def warned(caplog, *words):
    """-> the one warning, which has these words."""
    (line,) = warnings_in(caplog)
    for word in words:
        assert word in line
    return line

def logged(caplog):
    """Everything that chatstream has logged, as one text."""
    own = (r.getMessage() for r in caplog.records if r.name == "chatstream")
    return "\n".join(own)

def everything_about(failure):
    """Whatever of an error (or None), its causes and contexts anybody might show or log."""
    shown = []
    while failure:
        shown += [repr(failure), str(failure), repr(vars(failure)), repr(failure.args)]
        failure = failure.__cause__ or failure.__context__
    return "\n".join(shown)

@pytest.fixture
def blocks(monkeypatch):
    """-> a function: status, headers and blocks -> what stands in for a connection, and
    whose response reads exactly these blocks. Its `closed` counts its close()s."""

    def give(pieces, *headers, status=200, pending=0):
        lines = "".join(f"{line}\r\n" for line in headers).encode() + b"\r\n"
        pieces = iter(pieces)
        response = types.SimpleNamespace(status=status, reason="", will_close=False,
            headers=http.client.parse_headers(io.BytesIO(lines)), close=lambda: None,
            fp=types.SimpleNamespace(read1=lambda size: next(pieces, b"")))

        class Connection:
            closed = 0
            sock = types.SimpleNamespace(gettimeout=lambda: None, pending=lambda: pending,
                settimeout=lambda seconds: None)

            def __init__(self, *args, **options):
                pass

            request = __init__  # takes all and does nothing

            def getresponse(self):
                return response

            def close(self):
                Connection.closed += 1

        monkeypatch.setattr(http.client, "HTTPConnection", Connection)
        return Connection

    return give

# ---- The reference, row by row (codex-rs core/src/chat_completions.rs, 2025-05) ------

def test_ref_instructions_become_a_leading_system_message():
    assert request_of("hello", instructions="be brief").json["messages"] == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]

def test_ref_a_message_goes_out_as_one_string():
    history = [{"role": "user", "content": "a"}, Message(content="b", reasoning="r")]
    assert request_of(history).json["messages"] == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

def test_ref_payload_url_and_headers_are_exactly_these():
    with Server() as server:
        list(ask(server, api_key=KEY, base_url=server.url + "//", temperature=0.5))
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.json == {"model": "m", "messages": [{"role": "user", "content": "hello"}],
        "stream": True, "temperature": 0.5}
    assert sorted((n.lower(), v) for n, v in request.headers) == [
        ("accept", "text/event-stream"), ("accept-encoding", "identity"),
        ("authorization", f"Bearer {KEY}"), ("content-length", str(len(request.body))),
        ("content-type", "application/json"), ("host", f"127.0.0.1:{server.port}"),
        ("user-agent", f"chatstream/{cs.__version__}")]

def test_ref_bearer_key_only_if_there_is_one(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert request_of().header("Authorization") is None
    assert request_of(provider="openai").header("Authorization") == f"Bearer {KEY}"

def test_ref_missing_key_is_an_error_with_instructions(monkeypatch):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with pytest.raises(cs.MissingAPIKeyError, match=r"GROQ_API_KEY.*console\.groq") as caught:
        cs.stream("x", model="m", provider="groq")
    assert caught.value.env_key == "GROQ_API_KEY"
    assert "https://console.groq.com/keys" in caught.value.instructions

@pytest.mark.parametrize("status", [300, 400, 401, 403, 404, 409, 422, 600, 999])
def test_ref_other_statuses_are_raised_at_once(status):
    body = {"error": {"message": "bad", "code": 7}}
    with Server([error(f"{status} No", body)]) as server:
        failure = fails(ask(server, max_retries=3), cs.StatusError, str(status), "bad",
                        status=status, message="bad", code=7)
    assert len(server.requests) == 1
    assert json.loads(failure.body) == body

@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_ref_429_and_5xx_are_retried(sleeps, status, caplog):
    busy = [error(f"{status} ", {"error": "busy"})]
    with Server(busy, [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1)) == [A, B, END]
    assert (len(server.requests), sleeps) == (2, [0.2])
    warned(caplog, str(status), "0.20 s")

def test_ref_backoff_doubles(sleeps):
    scripts = [RESET], [error("429 Slow", {})], [error("503 Busy", {})], [reply(PLAIN)]
    answers(*scripts, max_retries=4)
    assert sleeps == [0.2, 0.4, 0.8]

def test_ref_backoff_has_jitter_and_a_ceiling(sleeps, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    answers([error("503 Busy", {})], max_retries=12)
    assert sleeps[:3] == pytest.approx([0.22, 0.44, 0.88])
    assert (len(sleeps), sleeps[-1]) == (12, 30.0)

def test_ref_more_than_max_retries_is_retry_limit(sleeps):
    with Server([error("500 Oops", {"error": {"message": "the GPU burns"}})]) as server:
        fails(ask(server, max_retries=2), cs.RetryLimitError, status=500, attempts=3,
              message="the GPU burns")
    assert len(server.requests) == 3

def test_ref_retry_after_in_whole_seconds(sleeps):
    answers([error("429 Slow", {}, "Retry-After: 1")], [reply(PLAIN)], max_retries=1)
    assert sleeps == [1.0]

@pytest.mark.parametrize("breakage", [[RESET], [CLOSE], [b"HTTP/1.1 2", CLOSE]])
def test_ref_transport_errors_are_retried(sleeps, breakage):
    with Server(breakage, breakage, [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=2)) == [A, B, END]
    assert (len(server.requests), sleeps) == (3, [0.2, 0.4])

def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]

def test_ref_the_last_transport_error_is_raised(sleeps):
    port = closed_port()
    failure = fails(ask(f"http://127.0.0.1:{port}/v1", max_retries=2), cs.TransportError,
                    "refused", f"127.0.0.1:{port}", attempts=3)
    assert isinstance(failure.__cause__, ConnectionRefusedError)

@pytest.mark.parametrize("script, got", [
    ([HOLD], []),
    ([CHUNKED, HOLD], []),
    ([UNFINISHED, HOLD], [A]),
])
def test_ref_idle_timeout(script, got):
    with Server(script) as server:
        failure = fails(ask(server, idle_timeout=LATER, max_retries=4), cs.IdleTimeoutError,
                        "idle timeout waiting for SSE", got=got, seconds=LATER)
    assert isinstance(failure, TimeoutError)
    assert len(server.requests) == 1

#: (rule, body, events, words of the one warning)
REFERENCE = [
    ("content is one event each", PLAIN, AB, None),
    ("[DONE] is trimmed and stops", sse(CA, "[DONE]  ", C("never")), [A, OPEN], "finish_reason"),
    ("a clean end of an empty body is completed and flagged", b"", [Completed()],
     "ended without a finish_reason"),
    ("a chunk that is not JSON is skipped", sse(CA, "{oops", CB, STOP, DONE),
     [A, B, completed(skipped=1)], "{oops"),
    ("without aggregate() the events are unmodified",
     sse(CA, D(reasoning_content="r"), tool(0, "i", "f", "{"), STOP, DONE),
     [A, R("r"), ToolCallDelta(0, "i", "f", "{"), END], None),
]

@pytest.mark.parametrize("row, body, events, warning", REFERENCE, ids=[row[0] for row in REFERENCE])
def test_ref_events(row, body, events, warning, caplog):
    assert answers([reply(body)]) == (events, None)
    assert not warning or warned(caplog, warning)

def test_ref_aggregate_suppresses_deltas():
    with Server([reply(PLAIN)]) as server:
        got = list(cs.aggregate(ask(server)))
    assert got == [Message(content="ab", finish_reason="stop"), END]

def test_ref_aggregate_with_nothing_to_aggregate():
    with Server([reply(sse(STOP, DONE))]) as server:
        assert list(cs.aggregate(ask(server))) == [END]

def test_ref_aggregate_passes_an_error_on_with_partial():
    with Server([UNFINISHED, CLOSE]) as server:
        fails(cs.aggregate(ask(server)), cs.TruncatedStreamError, partial=(Message(content="a"),))

def test_ref_a_slow_reader_slows_the_sender():
    sent = []

    def send(sock, file):
        piece = chunked(sse(C("x" * 60_000)))
        sock.settimeout(SOON)
        with contextlib.suppress(socket.timeout):
            for _ in range(1000):
                sock.sendall(piece)
                sent.append(len(piece))

    with Server([CHUNKED, send, CLOSE]) as server:
        events = ask(server)
        next(events)
        server.wait_for_leaving()
        assert 0 < len(sent) < 1000
        events.close()

def test_ref_debug_logs_url_and_payload_but_no_key(caplog):
    caplog.set_level(logging.DEBUG, "chatstream")
    with Server([reply(PLAIN, "200 OK", "X-Request-Id: r1")]) as server:
        url = server.url + "?api-version=very-secret-version"
        list(ask(url, api_key=KEY, headers={"x-api-key": "another-key"}))
    text = logged(caplog)
    assert f"{server.url}/chat/completions" in text
    assert re.search('"content": ?"hello"', text)
    assert not re.search(f"{KEY}|secret|another-key", text)
    assert server.requests[0].target.endswith("?api-version=very-secret-version")
    # The reply's status, the seconds to its headers and its name; and the end.
    assert re.search(r"^200 in \d+\.\d+ s, request id 'r1'$", text, re.MULTILINE)
    assert re.search(r"^done in \d+\.\d+ s$", text, re.MULTILINE)

# ---- What servers send, by rule: rows of (product or rule, body, events) -------------

# A body is bytes, or a list of chunks that go out as SSE. Each row is read as a whole, byte
# by byte, and at cuts. Where no product is named the row is an edge of the rule.

J_A, J_B, J_STOP = (json.dumps(chunk) for chunk in (CA, CB, STOP))
FUNCTION = {"name": "f", "arguments": "{}"}
SUMMARY_CALLS = {"tool_calls": [{"id": "i", "function": FUNCTION}]}
SUMMARY = {"content": "a", "reasoning_content": "r", "refusal": "n", **SUMMARY_CALLS}
T, SKIP = TextDelta, completed(skipped=1)

def call(arguments="", extra=None, **more):
    return ToolCallDelta(0, "i", "f", arguments, extra, **more)

CALL, TOOL, NEXT = call("{}"), tool(0, "i", "f", "{}"), tool(1, "j", "g", "[]")
USED_END, LENGTH_END = completed(usage=USED), completed("length")

FRAMING = [
    ("LF", PLAIN, AB),
    ("CRLF (Perplexity, AI21, sse-starlette)", PLAIN.replace(b"\n", b"\r\n"), AB),
    ("CR", PLAIN.replace(b"\n", b"\r"), AB),
    ("CRLF inside an event",
     b'data: {"choices":[{"delta":\r\ndata: {"content":"a"}}]}\r\n\r\n' + sse(CB, STOP), AB),
    ("other separators are text",
     'data: {"choices":[{"delta":{"content":"\u2028\u2029\u0085\x0b\x0c"}}]}\n\n'.encode(),
     [T("\u2028\u2029\u0085\x0b\x0c"), Completed()]),
    ("UTF-8 over reads", ['{"choices":[{"delta":{"content":"é😀漢"}}]}', DONE],
     [T("é😀漢"), Completed()]),
    ("not UTF-8", b'data: {"choices":[{"delta":{"content":"a\xff\xc3"}}]}\n\ndata: [DONE]\n\n',
     [T("a\ufffd\ufffd"), Completed()]),
    ("a byte order mark (doubleword)", b"\xef\xbb\xbf" + PLAIN, AB),
    ("no blank behind data: (TGI, LongCat, iFlow)", sse(CA, CB, STOP, DONE, start="data:"), AB),
    ("blanks around [DONE]", [CA, CB, STOP, "  [DONE] \t"], AB),
    ("comments and other fields (OpenRouter, DeepSeek, llama.cpp)",
     b": hi\n\n:\n\nid: 1\n: x\n\ndata:\n\ndata\n\nevent: ping\n\nretry: 3\n\nodd: 1\n\n" + PLAIN, AB),
    ("one object on several data lines",
     b'data: {"choices":\ndata: [{"delta":\ndata: {"content":"a"}}]}\n\ndata: [DONE]\n\n', [A, Completed()]),
    ("several data lines, each alone",
     sse(CA, end="\n") + b"data: junk\n" + sse(CB, STOP, end="\n") + b"\n", [A, B, SKIP]),
    ("no blank lines at all (GLM, Kimi behind gateways)", sse(CA, CB, STOP, DONE, end="\n"), AB),
    ("no blank lines, one cut", sse('{"choices":[{"del', CA, CB, STOP, end="\n"), [A, B, SKIP]),
    ("a line that is none, among lines that are", sse("{oops", CA, end="\n") + b"\n" + sse(STOP), [A, SKIP]),
    ("no blank line at the end (llama.cpp, xAI)", sse(CA, CB, STOP)[:-1], AB),
    ("no line end at the end (Groq)", sse(CA, CB, STOP)[:-2], AB),
    ("no [DONE] (Perplexity, Cerebras, MiniMax)", [CA, CB, STOP], AB),
    ("text after [DONE]", PLAIN + b"garbage\ndata: {]\n\n" + sse(C("z")), AB),
    ("padding: comments in data: (OpenRouter behind gateways), null",
     [": OPENROUTER PROCESSING", CA, "null", STOP, ":", DONE], [A, END]),
    ("padding: text in a named event", b"event: ping\ndata: still here\n\n" + sse(CA, STOP), [A, END]),
    ("padding: JSON that is no chunk in a named event",
     b'event: x\ndata: {"id":"t","model":"t"}\n\n' + sse(CA) +
     b'event: tool.progress\ndata: {"id":"t"}\n\n' + sse(STOP), [A, END]),
    ("no padding: an event that has no name of its own",
     sse(CA) + b"event: message\ndata: x\n\nevent:\ndata: y\n\n" + sse(STOP),
     [A, completed(skipped=2)]),
    ("nothing at all", b"", [Completed()]), ("half a name", sse(CA) + b"dat", [A, completed(None)]),
    ("comments only (llama-cpp-python)", b": a\n\n: b\n\n", [Completed()]),
    ("only padding", sse("null", ": x") + b"event: ping\ndata: x\n\n", [Completed()]),
]

READING = [
    ("data: twice (java-genai)", sse(CA, CB, STOP, DONE, start="data: data: "), AB),
    ("DONE without brackets (codex's stubs)", [CA, STOP, "DONE", C("z")], [A, END]),
    ("glued (Azure)", [J_A + J_B, STOP], AB),
    ("a list (Vertex)", [json.dumps([CA, None, CB]), STOP], AB),
    ("glued with data: between (Z.ai's GLM)", [CA, f"{J_B}data: {J_STOP}data: [DONE]"], AB),
    ("glued behind a cut one (GLM)", [CA, '{"choices":[{"deldata: ' + J_B, STOP, DONE], [A, B, SKIP]),
    ("glued [DONE], and more", [CA, J_STOP + "data: [DONE]", CB], [A, END]),
    ("prose that speaks of data:", [CA, "got data: {} and data: [1]", CB, STOP], [A, B, SKIP]),
    ("prose that speaks of [DONE]", [CA, "waiting for data: [DONE]", CB, STOP], [A, B, SKIP]),
    ("indented over lines", b'data: {\n  "choices": []\n}\n\n' + PLAIN, AB),
    ("cut at the end, which is proper", sse(CA, CB, STOP) + b'data: {"choices":[{"del', [A, B, SKIP]),
    ("JSON lines", sse(CA, CB, STOP, start="", end="\n"), AB),
    ("JSON lines, one broken", b'{"x\n' + sse(CA, CB, STOP, start="", end="\n"), [A, B, SKIP]),
    ("JSON lines and [DONE] alone", sse(CA, STOP, DONE, C("z"), start="", end="\n"), [A, END]),
    ("JSON glued as the whole body", (J_A + J_B + J_STOP).encode(), AB),
    ("a list as the whole body", json.dumps([CA, CB, STOP]).encode(), AB),
    ("JSON among SSE", sse(CA) + sse(CB, start="", end="\n") + sse(STOP), AB),
    ("indented JSON among SSE", sse(CA) + json.dumps(CB, indent=2).encode() + b"\n" + sse(STOP), AB),
    ("SSE, then JSON behind a broken line, then SSE",
     sse(CA) + b'{"x\n' + sse(CB, start="", end="\n") + sse(CA, STOP), [A, B, A, SKIP]),
    ("a log line among SSE", sse(CA) + b"[INFO] busy\nat {x}\n" + sse(STOP), [A, END]),
    ("NaN (Python's servers), control characters (GenieX, pi)",
     b'data: {"choices":[{"delta":{"content":"a\tb"},"logprobs":NaN}],"x":-Infinity}\n\n',
     [T("a\tb"), Completed()]),
    ("a completion (servers that ignore stream)", json.dumps(whole(SUMMARY, usage=USAGE)).encode(),
     [R("r"), A, RefusalDelta("n"), CALL, completed(usage=USED)]),
    ("a completion, indented", json.dumps(whole({"content": "a"}), indent=2).encode() + b"\n", [A, END]),
    ("a completion and [DONE]", sse(whole({"content": "a"}), start="") + sse(DONE), [A, END]),
    ("a completion of two choices", json.dumps({"choices": [{"index": i, "finish_reason": "stop",
     "message": {"content": t}} for i, t in enumerate("ab")]}).encode(),
     [A, T("b", 1), Completed("", "", "stop", {0: "stop", 1: "stop"})]),
]

CHUNKS = [
    ("choices empty (Azure, Copilot)", [{"choices": [], "id": "", "model": ""}, CA, DONE], [A, OPEN]),
    ("choices null or missing", [{"choices": None}, {"id": "i"}, {"model": "o"}, CA, DONE],
     [A, Completed("i", "o")]),
    ("no delta (Azure's async filter, MiniMax)",
     [{"choices": [{"index": 0}]}, {"choices": [{"delta": None}]}, CA, DONE], [A, OPEN]),
    ("no index (Cloudflare): its position",
     [{"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}, DONE],
     [A, T("b", 1), Completed()]),
    ("content empty, null or absent", [C(""), D(content=None), D(), C(" "), DONE], [T(" "), OPEN]),
    ("numbers are text (Cloudflare)", [*map(C, [1, 0, 0.5, True, False, "a"]), STOP],
     [*map(T, ["1", "0", "0.5", "true", "false", "a"]), END]),
    ("parts: text, thinking in a list or a str (Mistral)",
     [C([{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}]),
      C([{"type": "thinking", "thinking": "u"}, {"type": "text", "text": "a"}]),
      C([{"type": "reference", "reference_ids": [1]}, "b"]), C("c"), DONE],
     [ReasoningDelta("t"), ReasoningDelta("u"), A, B, T("c"), OPEN]),
    ("parts: reasoning with a summary (Databricks)",
     [C([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]}]),
      C([{"type": "text", "text": "a"}]), STOP], [ReasoningDelta("r"), A, END]),
    ("parts without a type, of type output_text",
     [C([{"type": None, "text": "a"}]), C([{"type": "output_text", "text": "b"}]), STOP], AB),
    ("parts inside parts without end", [C([[[[[[[[[["deep"]]]]]]]]]]), STOP], [END]),
    ("refusal", [D(refusal="no"), STOP, DONE], [RefusalDelta("no"), END]),
    ("id and model change (Perplexity, Avian)",
     [C("a", id="", model=""), CB, C(id="c2", model="m2", finish="stop"), DONE], AB),
    ("unknown members", [C("a", obfuscation="q7", service_tier="x", citations=[1], logprobs=1.5),
     C("b", obfuscation="w"), STOP, DONE], AB),
    ("choices interleaved",
     [CA, C("b", index=1), C("c"), C(finish="length", index=1), STOP, DONE],
     [A, T("b", 1), T("c"), Completed("c1", "m1", "stop", {0: "stop", 1: "length"})]),
    ("no reason: empty (Ollama), the words null and None (KoboldCpp, DashScope)",
     [C("a", ""), C("b", "null"), C("a", "None"), STOP], [A, B, A, END]),
    ("the first reason stands", [C("a", "length"), C(finish="eos"), DONE], [A, LENGTH_END]),
    ("stop gives way, after more", [CA, STOP, C("b", "length"), DONE], [A, B, LENGTH_END]),
    ("stop gives way, at once", [CA, STOP, C(finish="length"), DONE], [A, LENGTH_END]),
    ("stop in every chunk (gcli2api, Open WebUI)",
     [C("a", "stop"), C("b", "stop"), C(finish="length")], [A, B, LENGTH_END]),
    ("stop behind another reason (OpenRouter)", [C("a", "tool_calls"), CB, STOP],
     [A, B, completed("tool_calls")]),
    ("other reasons (OpenRouter, Together)", [C("a", "eos"), DONE], [A, completed("eos")]),
    ("error as a reason is no ServerError (OpenRouter)", [C("a", "error"), DONE],
     [A, completed("error")]),
    ("wrong types", [{"choices": "x"}, {"choices": [None, 1, "x", []]},
     {"choices": [{"index": "x", "delta": 5}]}, C(5), C({"a": 1}),
     C([None, 5, {"type": 5}, {"text": 5}]), D(tool_calls="x"), D(tool_calls=5),
     D(tool_calls=[None, 5, {"function": 5}, {"index": "x", "id": 5, "function": {"name": 5}}]),
     D(refusal=5, reasoning=5, reasoning_details="", function_call="x"),
     {"id": 5, "model": {}, "usage": "x"}, C(usage=[1], finish=5),
     {"usage": {"prompt_tokens": "x"}}, C(x_groq=5),
     {"choices": [{"index": True, "delta": {"content": "a"}}]}, DONE],
     [*map(T, "555a"), completed(None, usage=Usage())]),
]

REASONING = [  # each ends in STOP and [DONE], and in END
    ("reasoning_content (DeepSeek, zAI, xAI, Kimi)", [D(reasoning_content="r")], [R("r")]),
    ("reasoning (OpenRouter, Groq, vLLM): a str, text or content",
     [D(reasoning="r"), D(reasoning={"text": "s"}), D(reasoning={"content": "t"})],
     [R("r", reasoning="r"), R("s", reasoning={"text": "s"}), R("t", reasoning={"content": "t"})]),
    ("reasoning, a list of blocks (Snowflake)", [D(reasoning=[{"text": "r"}, {"content": "s"}])],
     [R("rs", reasoning=[{"text": "r"}, {"content": "s"}])]),
    ("reasoning_text (Copilot)", [D(reasoning_text="r"), D(reasoning_opaque="o")],
     [R("r", reasoning_text="r"), R("", reasoning_opaque="o")]),
    ("reasoning_details alone (MiniMax)", [D(reasoning_details=[{"text": "r"}, {"text": "s"}])],
     [R("rs", reasoning_details=[{"text": "r"}, {"text": "s"}])]),
    ("reasoning_details with a summary (OpenRouter)",
     [D(reasoning_details=[{"summary": "r"}, {"summary": [{"text": "s"}]}])],
     [R("rs", reasoning_details=[{"summary": "r"}, {"summary": [{"text": "s"}]}])]),
    ("several are never added up",
     [D(reasoning="s", reasoning_content="r", reasoning_details=[{"text": "r"}])],
     [R("r", reasoning="s", reasoning_content="r", reasoning_details=[{"text": "r"}])]),
    ("before the content of one delta (MiniMax), and again later (zAI)",
     [D(content="a", reasoning_content="r"), D(reasoning_content="s")], [R("r"), A, R("s")]),
    ("opaque members", [D(reasoning_details=[{"signature": "s"}], reasoning_opaque="o")],
     [R("", reasoning_details=[{"signature": "s"}], reasoning_opaque="o")]),
    ("signed blocks (LiteLLM)",
     [D(reasoning_content="r", thinking_blocks=[{"thinking": "r"}]),
      D(thinking_blocks=[{"signature": "s"}]), D(content="a", thinking_signature="t")],
     [R("r", reasoning_content="r", thinking_blocks=[{"thinking": "r"}]),
      R("", thinking_blocks=[{"signature": "s"}]), R("", thinking_signature="t"), A]),
    ("numbers and flags are none", [D(reasoning_content=0, reasoning_tokens=7, reasoning=True)], []),
]

MESSAGES_IN_CHUNKS = [
    ("a message with the text so far beside a delta (Perplexity)",
     [{"choices": [{"delta": {"content": t}, "message": {"content": m}}]}
      for t, m in (("a", "za"), ("b", "ab"))], [A, B, Completed()]),
    ("a message and no delta (servers that ignore stream)", [whole({"content": "a"}), DONE], [A, END]),
    ("a last summary (MiniMax)", [CA, CB, whole({"content": "ab"}), DONE], AB),
    ("a last summary of all kinds",
     [D(reasoning_content="r", refusal="n", content="a"), TOOL, whole(SUMMARY), DONE],
     [R("r"), A, RefusalDelta("n"), CALL, END]),
    ("what was never streamed: reasoning, refusal, calls", [CA, whole(SUMMARY), DONE],
     [A, R("r"), RefusalDelta("n"), CALL, END]),
    ("only messages: the text so far (gateways)",
     [*[whole({"content": t}, None) for t in ("a", "a", "ab")], STOP, DONE], AB),
    ("only messages: the text so far, then none",
     [*[whole({"content": t}, None) for t in ("a", None)], whole({})], [A, END]),
    ("only messages: a half of a pair as the next piece",
     [*[whole({"content": t}, None) for t in ("ab", "\ud800")], STOP], [T("ab"), T("\ufffd"), END]),
    ("only messages: the text so far, of two choices", [*[{"choices": [
     {"index": i, "message": {"content": t + u}} for i, t in enumerate("xy")]}
     for u in ("", "z")], STOP], [T("x"), T("y", 1), T("z"), T("z", 1), END]),
    ("only messages: pieces (NVIDIA NeMo Agent Toolkit)", [*[{"choices": [
     {"message": {"content": t}, "delta": None}]} for t in ("ab", "b", "", "ca")], STOP],
     [T("ab"), B, T("ca"), END]),
    ("only messages: pieces alike",
     [*[whole({"content": t}, None) for t in ("ab", "a", "a")], STOP], [T("ab"), A, A, END]),
    ("messages, and a delta between", [whole({"content": "a"}, None), CB, whole({"content": "ab"})], AB),
    ("messages, and another kind in deltas", [whole({"refusal": "r"}, None),
     {"choices": [{"delta": {"content": "a"}, "message": {"refusal": "rs"}}]},
     whole({"refusal": "rst", "content": "a"})],
     [RefusalDelta("r"), A, RefusalDelta("s"), RefusalDelta("t"), END]),
]

USAGES = [
    ("on its own, last (OpenAI)", [CA, STOP, {"choices": [], "usage": USAGE}, DONE], [A, USED_END]),
    ("in every chunk, the last stands",
     [C("a", usage={"prompt_tokens": 9}), C("b", "stop", usage=USAGE)], [A, B, USED_END]),
    ("zeros and null do not replace it",
     [C("a", usage=USAGE), C("b", usage=ZEROS), C(finish="stop", usage=None)], [A, B, USED_END]),
    ("only zeros", [C("a", usage=ZEROS), STOP, DONE], [A, completed(usage=Usage())]),
    ("members null", [C("a", "stop", usage={**USAGE, "total_tokens": None})],
     [A, completed(usage=Usage(1, 2, 0))]),
    ("in the choice (Moonshot)", [{"choices": [{"delta": {"content": "a"}, "usage": USAGE}]}],
     [A, Completed(usage=USED)]),
    ("in x_groq (Groq)", [C("a", "stop", x_groq={"usage": USAGE})], [A, USED_END]),
    ("details (OpenAI)",
     [C("a", "stop", usage={**USAGE, "completion_tokens_details": {"reasoning_tokens": 4},
        "prompt_tokens_details": {"cached_tokens": 5}})],
     [A, completed(usage=Usage(1, 2, 3, 5, 4))]),
    ("prompt_cache_hit_tokens (DeepSeek)",
     [C("a", "stop", usage={**USAGE, "prompt_cache_hit_tokens": 6})],
     [A, completed(usage=Usage(1, 2, 3, 6))]),
    ("input_tokens (mlx-vlm), and what else (OpenRouter's cost)",
     [C("a", "stop", usage={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "cost": 0.25,
        "odd": None, "input_tokens_details": {"cached_tokens": 3}})],
     [A, completed(usage=Usage(1, 2, 3,
        extra={"cost": 0.25, "input_tokens_details": {"cached_tokens": 3}}))]),
]

HALVES = [
    ("a pair over two deltas (aimock, JavaScript)", [C("x\ud83d"), C("\udc69y"), STOP],
     [T("x"), T("👩y"), END]),
    ("lone halves", [C("\ud83d"), C("z"), C("\udc69"), C("q\ud83d"), STOP],
     [T("\ufffdz"), T("\ufffd"), T("q"), T("\ufffd"), END]),
    ("by kind and choice",
     [C("\ud83d"), D(reasoning_content="\ud83d"), C("\udc69"), C("b", index=1),
      D(reasoning_content="\udc69"), DONE], [R("", reasoning_content="\ud83d"), T("👩"), T("b", 1),
      R("👩", reasoning_content="\udc69"), OPEN]),
    ("in names", [C("a", id="c\ud83d"), tool(0, "i\ud83d", "f\ud83d", "{}"), DONE],
     [A, ToolCallDelta(0, "i\ufffd", "f\ufffd", "{}"), Completed("c\ufffd", "m1")]),
    ("in arguments", [*fragments('"\ud83d', '\udc69"'), DONE], [call('"'), call('👩"'), OPEN]),
]

CALL_DELTAS = [  # each ends in OPEN
    ("in fragments (OpenAI)", fragments("", "{", "}"), [call(), call("{"), call("}")]),
    ("arguments an object (Writer, llama.cpp), and once more",
     [tool(0, "i", "f", {"a": [1]}), arg({"b": 2})], [call('{"a": [1]}')]),
    ("arguments an empty object", [tool(0, "i", "f", {})], [CALL]),
    ("the id, then the name (Command-A on vLLM)", [tool(0, "i"), tool(0, None, "f")],
     [ToolCallDelta(0, "i"), call()]),
    ("the words null and None (LiteLLM, Mistral)",
     [tool(0, "i", "f", "{"), tool(0, "null", "None", "}")], [call("{"), call("}")]),
    ("unknown members; empty ones are none", [tool(0, "i", "f", "{}", a="", b=[], c={}, d=0)],
     [call("{}", {"d": 0})]),
    ("function_call (functionary, llama-cpp-python)",
     [D(function_call={"name": "f", "arguments": c}) for c in "{}"],
     [ToolCallDelta(0, "", "f", c) for c in "{}"]),
    ("function_call beside tool_calls", [D(**SUMMARY_CALLS, content=None, refusal=None,
     reasoning_content=None, function_call=FUNCTION)], [CALL]),
    ("function_call after tool_calls", [TOOL, D(function_call=FUNCTION)], [CALL]),
    ("function_call beside an empty tool_calls", [D(tool_calls=[], function_call=FUNCTION)],
     [ToolCallDelta(0, "", "f", "{}")]),
    ("custom (OpenAI, GPT-5)",
     [D(tool_calls=[{"index": 0, "id": "i", "type": "custom",
        "custom": {"name": "f", "input": "a"}}]),
      D(tool_calls=[{"index": 0, "custom": {"input": "b"}}]),
      D(tool_calls=[{"index": 0, "signature": "s"}])],
     [call(*given, type="custom") for given in (("a",), ("b",), ("", {"signature": "s"}))]),
    ("custom beside function", [tool(0, "i", "f", "{}", custom={"name": "g"})], [CALL]),
    ("tool_calls an object (TGI)", [D(tool_calls=SUMMARY_CALLS["tool_calls"][0])], [CALL]),
    ("wrong types of a function", [tool(0, "i", "f", "x"), *[D(tool_calls=[
     {"index": 0, "id": "i", "function": odd}]) for odd in (None, False, [], "x", 5)]], [call("x")]),
]

NO_ERRORS = [
    ("error null, empty",
     [C("a", error=None), C("b", error={}), C(error="", finish="stop"), {"error": []}], AB),
    ("error, an object that says nothing (Go)",
     [C("a", error={"message": "", "type": "", "code": None}), STOP], [A, END]),
    ("a field error that says nothing", sse(CA) + b"error: null\nerror:\nerror: {}\n\n" + sse(STOP), [A, END]),
    ("a good code (MiniMax)", [CA, {"choices": [], "base_resp": {"status_code": "0"}},
     {"base_resp": {"status_code": 0}}, STOP], [A, END]),
    ("good codes (DashScope)", [{"code": 0, "message": "Success"}, CA,
     {"code": "OK", "msg": "x"}, {"code": 200, "msg": "x"}, STOP], [A, END]),
    ("a status is no code", [{"status": "processing", "message": "x"}, CA,
     {"status": 500, "message": "x"}, STOP], [A, END]),
    ("detail beside other members: progress", [{"type": "progress", "detail": "Loading model 40%"},
     CA, {"type": "x", "detail": "y", "code": 0}, STOP], [A, END]),
    ("progress in named events", sse(CA) + b'event: tool\ndata: {"detail":"x"}\n\n'
     b'event: status\ndata: {"message":"x","code":"search"}\n\n' + sse(STOP), [A, END]),
    ("odd codes, and wrong types", [{"code": 200.0, "message": "x"}, {"code": {}, "message": "x"},
     {"errors": "x"}, {"base_resp": "x"}, {"code": "x", "error_msg": 5}, {"code": "x"},
     {"code": True, "msg": "x"}, CA, STOP], [A, END]),
]

TABLES = {
    "framing": FRAMING, "reading": READING, "chunks": CHUNKS,
    "reasoning": [(rule, [*body, STOP, DONE], [*events, END]) for rule, body, events in REASONING],
    "messages": MESSAGES_IN_CHUNKS, "usage": USAGES, "halves": HALVES,
    "calls": [(rule, body, [*events, OPEN]) for rule, body, events in CALL_DELTAS],
    "no error": NO_ERRORS,
}
ROWS = [(f"{table}: {row[0]}", *row[1:]) for table in TABLES for row in TABLES[table]]

def bytes_of(body):
    return body if isinstance(body, bytes) else sse(*body)

def cuts(body):
    """The body in other pieces: whole, byte by byte, and at every cut (or many)."""
    yield [body]
    yield [body[i : i + 1] for i in range(len(body))]
    places = range(1, len(body))
    if len(body) > 200:
        places = random.Random(7).sample(places, 50)
    for place in places:
        yield [body[:place], body[place:]]

def ids(rows):
    return [row[0] for row in rows]

@pytest.mark.parametrize("row, body, events", ROWS, ids=ids(ROWS))
def test_rows_cut_anywhere(row, body, events, caplog):
    for blocks in cuts(bytes_of(body)):
        assert decode(blocks) == (events, None), blocks
    caplog.clear()
    decode([bytes_of(body)])
    if not warnings_in(caplog):  # and then there is nothing to be strict about
        assert decode([bytes_of(body)], strict=True) == (events, None)

@pytest.mark.parametrize("lines, counts", [
    (["a", "b", "c"], [1, 2, 3]),
    (["a", "null", "b", "", ": wait", "c"], [1, 1, 2, 2, 2, 3]),
    (['{"x', "a", "b"], [0, 1, 2]),
])
@pytest.mark.parametrize("start", ["data: ", ""])
def test_each_line_of_json_is_read_when_it_comes(lines, counts, start):
    """GLM, Kimi and AgentRouter leave the blank lines out."""
    got, counted = [], []

    def blocks():
        for line in lines:
            yield sse(C(line) if line in "abc" else line, start=start, end="\n")
            counted.append(len(got))

    for event in cs.decode(blocks()):
        got.append(event)
    assert counted == counts

ERROR = {"message": "boom", "type": "t", "code": 500}
BOOM, ALL = (None, None, "boom"), (500, "t", "boom")
CUDA = '{"error": "CUDA error: boom\nCompile with `X`.\n"}'
#: (rule, body, events before the error, code, type, message)
ERROR_ROWS = [
    ("an object (OpenAI, vLLM)", [CA, {"error": ERROR}], [A], *ALL),
    ("a text (Ollama, transformers)", [CA, {"error": "boom"}], [A], *BOOM),
    ("with error_type (TGI)", [{"error": "boom", "error_type": "t"}], [], None, "t", "boom"),
    ("a list", [{"error": [{"message": "boom"}]}], [], *BOOM),
    ("object error (vLLM, Mistral)", [{"object": "error", "message": "boom", "code": 400}],
     [], 400, None, "boom"),
    ("type error", [{"type": "error", "error": {"message": "boom"}}], [], None, "error", "boom"),
    ("in a chunk (OpenRouter): what it has counts",
     [C("a", "error", usage=USAGE, error=ERROR), DONE], [A], *ALL),
    ("in a choice", [CA, {"choices": [{"delta": {}, "error": ERROR}]}], [A], *ALL),
    ("in x_groq (Groq)", [C("a", x_groq={"error": "boom"})], [A], *BOOM),
    ("a code that is null, a message that is a list",
     [{"error": {"message": ["boom"], "code": None}}], [], *BOOM),
    ("a code that is a str, a message that is an object (Mistral)",
     [{"error": {"message": {"detail": "boom"}, "code": "x9"}}], [], "x9", None, "boom"),
    ("a code of 0", [{"error": "boom", "code": 0}], [], 0, None, "boom"),
    ("error: (llama.cpp)", sse(CA) + b'error: {"code":500,"message":"boom"}\n\n', [A], 500, None, "boom"),
    ("error: no end", sse(CA, CA) + b"error: x\n" + sse(CA), [A, A], None, None, f"x {J_A}"),
    ("a field error, in any case, without a blank line before",
     sse(CA, end="\n") + b"ERROR: boom\n", [A], *BOOM),
    ("a field error, over lines", b'error: {"code":500,\n"message":"boom"}\n\n', [], 500, None, "boom"),
    ("event: error (Groq)", sse(CA) + b'event: error\ndata: {"error":{"message":"boom"}}\n\n', [A], *BOOM),
    ("event: error in any case, with text", b"event: x\nevent: error\nevent: ERROR\ndata: boom\n\n", [], *BOOM),
    ("event: error, text over lines", b"event: error\ndata: bo om\ndata: x\n\n", [], None, None, "bo om x"),
    ("event: error without data:", sse(CA) + b'event: error\n{"message":"boom"}\n\n' + sse(DONE), [A], *BOOM),
    ("event: error with a chunk like those before", sse(CA) + b"event: error\n" + sse(CB),
     [A, B], None, None, J_B),
    ("event: error in a comment (NVIDIA Dynamo)", sse(CA) + b"event: error\n: boom\n\n", [A], *BOOM),
    ("event: error, no blank line", b"event: error\ndata: boom\nevent: ping\n\n", [], *BOOM),
    ("event: error, a comment without a blank", b"event: error\n:boom\n\n", [], *BOOM),
    ("event: error with nothing", sse(CA) + b"event: error\n\n" + sse(DONE), [A], None, None, "error"),
    ("data: error: text (Crane)", [CA, "error: boom"], [A], *BOOM),
    ("data: error: JSON", [CA, 'Error: {"message": "boom", "code": 5}'], [A], 5, None, "boom"),
    ("detail beside others", [{"detail": "boom", "status": 1, "code": 5, "error_code": 5, "status_code": 5}],
     [], 5, None, "boom"),
    ("detail (FastAPI)", [{"detail": [{"loc": ["x"], "msg": "boom"}]}], [], *BOOM),
    ("detail with a status or code", [CA, {"detail": "boom", "status": 500, "code": 7}],
     [A], 7, None, "boom"),
    ("base_resp (MiniMax)", [{"base_resp": {"status_code": 1004, "status_msg": "boom"}}],
     [], 1004, None, "boom"),
    ("errors (Cloudflare)", [{"success": False, "errors": [{"code": 7, "message": "boom"}]}],
     [], 7, None, "boom"),
    ("flat (DashScope)", [{"code": "Bad", "message": "boom", "request_id": "q"}], [], "Bad", None, "boom"),
    ("flat, other names (Baidu)", [{"error_code": 17, "error_msg": "boom"}], [], 17, None, "boom"),
    ("a line of JSON (Gemini behind bifrost)",
     sse(CA) + sse({"error": ERROR}, start="", end="\n"), [A], *ALL),
    ("indented JSON", sse(CA) + json.dumps({"error": ERROR}, indent=2).encode(), [A], *ALL),
    ("a list in a data line (Gemini)", [CA, json.dumps([{"error": ERROR}])], [A], *ALL),
    ("JSON and no stream", json.dumps({"error": ERROR}).encode(), [], *ALL),
    ("a code that is no word and no number", [{"error": {**ERROR, "code": [1], "type": {}}}],
     [], None, None, "boom"),
    ("behind a cut event", sse(CA) + b'data: {"choices":[{"de\n' + sse({"error": ERROR}), [A], *ALL),
    ("line ends unescaped (transformers serve)", sse(CA, CUDA),
     [A], None, None, "CUDA error: boom Compile with `X`."),
    ("quotes unescaped", [CA, '{"error": "no "x" here"}', DONE],
     [A], None, None, '{"error": "no "x" here"}'),
    ("cut in its text (LocalAI)", sse(CA) + b'data: {"error": {boom', [A], None, None, '{"error": {boom'),
    ("a half before an error", [C("\ud83d"), {"error": "boom"}], [T("\ufffd")], *BOOM),
    ("last words (llama.cpp)", sse(CA) + b"proxy error: boom", [A], None, None, "proxy error: boom"),
    ("last words that are in a field's name", sse(CA) + b"at", [A], None, None, "at"),
    ("the last words in data:, before [DONE]", [CA, "boom", DONE], [A], *BOOM),
]

@pytest.mark.parametrize("row, body, events, code, type, message", ERROR_ROWS, ids=ids(ERROR_ROWS))
def test_error_rows_cut_anywhere(row, body, events, code, type, message):
    for blocks in cuts(bytes_of(body)):
        failure = fails(decode(blocks), cs.ServerError, message, got=events, code=code, type=type,
                        message=message)
        assert isinstance(failure.raw, (dict, list, str))
    partial = collect(cs.aggregate(cs.decode([bytes_of(body)])))[1].partial
    assert [m.content for m in partial] == ["".join(e.text for e in events)] * bool(events)

def test_an_errors_raw_is_its_json_or_its_text():
    assert decode([sse({"error": ERROR})])[1].raw == {"error": ERROR}
    assert decode([b"error: [1]\n\n"])[1].raw == 1
    assert decode([b"event: error\ndata: boom\n\n"])[1].raw == "boom"
    assert "(code 0)" in str(decode([sse({"error": "b", "code": 0})])[1])

# Tool calls of the whole message: (rule, deltas, [(id, name, arguments)]); None: any id.

I_F, J_G, F, G = ("i", "f", "{}"), ("j", "g", "[]"), (None, "f", "{}"), (None, "g", "[]")
I_A = ("i", "f", '{"a":1}')
CALL_ROWS = [
    ("in fragments (OpenAI)", [*fragments("", "{", "}"), NEXT], [I_F, J_G]),
    ("no index (Mistral, Gemini, Ollama)", [tool(None, *I_F), tool(None, *J_G)], [I_F, J_G]),
    ("no index, fragments", [tool(None, "i", "f", "{"), arg("}", None), tool(None, None, "g", "["),
     tool(None, "", "", "]")], [I_F, G]),
    ("no index, by id", [tool(None, "i", "f", "{"), tool(None, "j", "g", "["),
     tool(None, "i", None, "}"), tool(None, "j", "g", "]")], [I_F, J_G]),
    ("no index, two of one name, no id", [tool(None, *F)] * 2, [F, F]),
    ("no index, the id later", [tool(None, None, "f", "{"), tool(None, "i", None, "}")], [I_F]),
    ("all index 0, whole (Ollama, Cerebras)", [TOOL, tool(0, *J_G), tool(0, "k", "f", "{}")],
     [I_F, J_G, ("k", "f", "{}")]),
    ("all index 0, no id, another name", [tool(0, *F), tool(0, *G)], [F, G]),
    ("all index 0, no id, another name without arguments",
     [tool(0, *F), tool(0, None, "g", ""), arg("[]")], [F, G]),
    ("all index 0, no id, one name", [tool(0, None, "f", a) for a in ('{"a":"}"}', '{"a":2}')],
     [(None, "f", '{"a":"}"}'), (None, "f", '{"a":2}')]),
    ("first index 1 or -1 (Claude behind gateways, zAI)",
     [tool(1, "i", "f", "{"), arg("}", 1), tool(-1, *J_G)], [I_F, J_G]),
    ("an index that is no int",
     [tool(odd, i, "f", "{}") for odd, i in (([], "i"), ("0", "j"), (0.0, "k"), (True, "l"))],
     [(i, "f", "{}") for i in "ijkl"]),
    ("empty id and name later (DashScope, GLM)",
     [tool(0, "i", "f", "{", type="function"), tool(0, "", "", "}", type="")], [I_F]),
    ("id and name repeated (Kimi, llama-cpp-python)", [tool(0, "i", "f", c) for c in "{}"], [I_F]),
    ("the name repeated, no id", [tool(0, None, "f", c) for c in ('{"a', '\\"}', '":1}')],
     [(None, "f", '{"a\\"}":1}')]),
    ("a new id on every fragment (OCI via LiteLLM)",
     [tool(0, "i", "f", "{"), tool(0, "j", "", "}")], [I_F]),
    ("the name later, with another id (Command-A)",
     [tool(0, "i", "", ""), tool(0, "i2", "f", "{}")], [I_F]),
    ("a second call's id before its name", [TOOL, tool(1, "j"), tool(1, *G)], [I_F, J_G]),
    ("several in one delta (Mistral)", [D(tool_calls=[
     {"id": i, "function": {"name": n, "arguments": a}} for i, n, a in (I_F, J_G)])], [I_F, J_G]),
    ("arguments null, absent, an object (Writer)",
     [tool(0, "i", "f"), D(tool_calls=[{"index": 0, "function": {"arguments": None}}]),
      tool(1, "j", "g", {"a": 1})], [("i", "f", ""), ("j", "g", '{"a": 1}')]),
    ("objects again count no more",
     [tool(0, "i", "f", a) for a in ({}, {"a": 1}, {"a": 2})], [I_F]),
    ("no id (NIM, StepFun)", [tool(0, *F), tool(1, *G)], [F, G]),
    ("one id for two (DeepSeek, Zhipu)", [TOOL, tool(1, "i", "g", "[]")], [I_F, G]),
    ("one id for two, in fragments", [tool(None, "i", "f", "{}"), tool(None, "i", "g", "["),
     tool(None, "i", None, "]")], [I_F, G]),
    ("interleaved",
     [tool(0, "i", "f", "{"), tool(1, "j", "g", "["), arg("}"), arg("]", 1)], [I_F, J_G]),
    ("whatever the reason (Gemini, Ollama)", [TOOL, STOP], [I_F]),
    ("the last fragment under the next index (Nebius)", [*fragments("", "{"), arg("}", 1)], [I_F]),
    ("each fragment under an index of its own (ollama.com)",
     [tool(0, "i", "f", "{"), *[arg(c, n) for n, c in enumerate('"a":1}', 1)]], [I_A]),
    ("an index that moved, then its own again",
     [TOOL, tool(0, "j", "g", "["), arg("]", 1)], [I_F, J_G]),
    ("an unknown index with a known id",
     [tool(0, "i", "f", "{"), NEXT, tool(2, "i", None, "}")], [I_F, J_G]),
    ("an unknown index with a new id", [TOOL, tool(1, "j", None, "[]")], [I_F, ("j", "", "[]")]),
    ("{} first (Claude on Bedrock behind gateways)", fragments("{}", '{"a"', ":1}"), [I_A]),
    ("{} twice", fragments("{}", "{}"), [I_F]),
    ("cumulative (DeepSeek on Qianfan)", fragments("", '{"a"', '{"a":', '{"a":1}'), [I_A]),
    ("once more as a whole (vLLM's xlam)", fragments('{"a"', ":1}", '{"a":1}'), [I_A]),
    ("first as a whole", fragments('{"a":1}', '{"a"', ":1}"), [I_A]),
    ("again with other blanks (Gemini)", fragments('{"a":', "1}", '{"a": 1}'), [("i", "f", '{"a": 1}')]),
    ("again with other escapes", fragments('{"a":"\\u00fc', '"}', '{"a":"ü"}'), [("i", "f", '{"a":"ü"}')]),
    ("again in another order (Cerebras)", fragments('{"a":1,', '"b":2}', '{"b":2,"a":1}'),
     [("i", "f", '{"b":2,"a":1}')]),
    ("again, the first not closed", fragments('{"a":1', ',"b":2', '{"a": 1, "b": 2}'),
     [("i", "f", '{"a": 1, "b": 2}')]),
    ("stays: cut", fragments('{"a"', ":["), [("i", "f", '{"a":[')]),
    ("stays: two objects", fragments('{"a":1}', '{"b":2}'), [("i", "f", '{"a":1}{"b":2}')]),
    ("stays: 1 is not true", fragments('{"a":1}', '{"a":true}'), [("i", "f", '{"a":1}{"a":true}')]),
    ("stays: objects alike inside each other, cut",
     fragments('{"', "a", '":', '{"', "a", '":', "1", "}"), [("i", "f", '{"a":{"a":1}')]),
    ("stays: free text of a custom tool", [D(tool_calls=[{"index": 0, "id": "i",
     "custom": {"name": "f", "input": t}}]) for t in ("{}", "[]")], [("i", "f", "{}[]")]),
    ("without function around it", [D(tool_calls=[{"index": 0, "id": "i", **more}])
     for more in ({"name": "f"}, {"arguments": '{"a"'}, {"arguments": ":1}"})], [I_A]),
    ("sent again under another index (new-api, LocalAI)",
     [TOOL, tool(1, *I_F), tool(2, "j", "f", "{}")], [I_F, ("j", "f", "{}")]),
    ("not sent again: other arguments", [TOOL, tool(1, "i", "f", "[]")], [I_F, (None, "f", "[]")]),
    ("neither name nor arguments", [tool(0, "i"), NEXT], [J_G]),
    ("arguments alone", [arg("{}")], [(None, "", "{}")]),
]

@pytest.mark.parametrize("row, chunks, expected", CALL_ROWS, ids=ids(CALL_ROWS))
def test_call_rows_cut_anywhere(row, chunks, expected):
    for blocks in cuts(sse(*chunks, DONE)):
        events, failure = decode(blocks)
        assert failure is None
        message, _ = cs.aggregate(events)
        got = [(c.id, c.name, c.arguments) for c in message.tool_calls]
        assert [g[1:] for g in got] == [e[1:] for e in expected]
        assert all(e[0] in (None, g[0]) for g, e in zip(got, expected))
        assert len({g[0] for g in got} - {""}) == len(got)

def test_raw_loses_nothing():
    chunks = [C("a", odd=[1]), {"type": "ping"}, CA, CA, STOP, {"error": "boom"}]
    got, failure = answers([reply(b": x\n\n" + sse(*chunks))], raw=True)
    assert [e.data for e in got if isinstance(e, Chunk)] == chunks
    assert (got[:2], failure.message) == ([Chunk(chunks[0]), A], "boom")

# An answer that is no stream; errors in JSON that nobody can read

@pytest.mark.parametrize("body, quoted", [
    (sse("Too many requests, slow down", DONE), "slow down"),
    (b"<!doctype html>\n<style>\n:root {\n --a: 1px;\n}\n</style>Log in", "doctype"),
    (b": hello\n\n<html>busy</html>", "<html>busy"),
    (b"plain words", "plain words"),
    (b'event: message_start\ndata: {"type":"message_start"}\n\n', "message_start"),
    (sse({"type": "message_start"}, {"type": "x", "usage": {"output_tokens": 5}}), "output_tokens"),
    (sse("1", "true", '"x"'), "1 true"),
    (b"[]", "[]"),
    (b"[1]", "1"),
    (PLAIN.replace(b"\n", b"\\n"), "choices"),
    (b"\xef\xbb", "\ufffd"),
])
@pytest.mark.parametrize("strict", [False, True])
def test_nothing_understood_is_said(body, quoted, strict):
    for blocks in cuts(body):
        got, failure = decode(blocks, strict)
        assert got == []
        assert type(failure) in (cs.StreamError, cs.MalformedChunkError)
        assert strict or quoted in str(failure)
        assert len(str(failure)) < 500

def test_nothing_understood_quotes_the_content_type():
    text = b"<html>busy</html> " + b"x" * 1000
    call = answers([reply(text, "200 OK", "Content-Encoding: br", type="a/b")])
    assert len(str(fails(call, cs.StreamError, "<html>busy</html>", "(a/b, br)"))) < 400

def test_skipped_text_is_quoted_once(caplog):
    bad = "{oops " + "x" * 5000
    assert decode([sse(CA, bad, bad, STOP)])[0] == [A, completed(skipped=2)]
    assert len(warned(caplog, "{oops", "2 time")) < 400

@pytest.mark.parametrize("bad", ["{oops", "words", "5"])
def test_strict_makes_skipped_text_an_error(bad):
    call = answers([reply(sse(CA, bad, CB, DONE))], strict=True)
    fails(call, cs.MalformedChunkError, got=[A], data=bad)

# Replies that are not 2xx

NO = "no such model"
#: (body, content type, the sentence in it)
REPLIES = [
    ({"error": {"message": NO}}, "application/json", NO),
    ([{"error": {"message": NO}}], "application/json", NO),
    ({"detail": NO}, "application/json", NO),
    (b"no such\n model", "text/plain", NO),
    *((body, "x/y", NO) for body in (
        {"message": {"detail": [{"msg": NO}]}},
        {"error": {"message": json.dumps({"error": {"message": NO}})}},
        {"error": {"message": NO, "metadata": {"raw": '{"code":1}'}}},
        {"error": {"message": "Provider error", "metadata": {"raw": json.dumps({"error": NO})}}},
        {"error": "invalid", "error_description": NO},
        {"errors": {"model": [NO]}, "message": NO},
        {"errors": [{"message": NO}]},
        {"Message": NO},
        {"Error": {"Message": NO}},
        {"title": NO, "status": 404},
        {"error": "not_found", "detail": NO},
        b"\xef\xbb\xbf" + json.dumps({"error": NO}).encode(),
        b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"X","message":"no such model"}\n\n',
        b'{"x":1}\n{"message":"no such model"}',
        {"error": {"message": "<!DOCTYPE html><title>no such model</title>1.2.3.4"}})),
    ({"detail": [{"msg": 'no "x"', "input": "x" * 1000}]}, "x/y", 'no "x"'),
    ({"error": "not_found"}, "x/y", "not_found"),
    ({"error": "<|end|> is " + NO}, "x/y", "<|end|> is " + NO),
    ({"error": "an <html> is " + NO}, "x/y", "an <html> is " + NO),
    ({"error": "<body>1.2.3.4"}, "x/y", ""),
    (b"<html><title>502 &amp; out</title>1.2.3.4</html>", "text/html", "502 & out"),
    (b"\xef\xbb\xbf<html><title>502</title>1.2.3.4</html>", "text/html", "502"),
    (b"<html>1.2.3.4</html>", "text/html", ""),
    (b"no such model " * 100, "text/plain", (b"no such model " * 100).decode().strip()),
    (b"", None, ""),
    ([], "application/json", ""),
]

@pytest.mark.parametrize("body, type, message", REPLIES)
def test_error_replies_have_one_readable_sentence(body, type, message):
    _, failure = answers([error("404 Not Found", body, type=type)])
    assert failure.message == message
    assert "1.2.3.4" not in str(failure)
    assert (message or "Not Found") in str(failure)

def test_an_error_reply_of_several_lines_below_a_url_without_a_path():
    body = json.dumps({"error": {"message": NO, "code": 5}}, indent=1).encode()
    for path, has_hint in (("/v1", False), ("", True)):
        with Server([error("404 Not Found", body)]) as server:
            _, failure = collect(ask(server.origin + path))
        assert (failure.message, failure.code) == (NO, 5)
        assert ("does it lack /v1?" in str(failure)) is has_hint

REQUEST_IDS = ["x-request-id", "apim-request-id", "x-ms-request-id", "x-generation-id",
               "x-litellm-call-id", "cf-ray"]

@pytest.mark.parametrize("position", range(len(REQUEST_IDS)))
def test_request_ids_in_order(position):
    headers = [f"{name}: id-{name}" for name in REQUEST_IDS[position:]]
    want = "id-" + REQUEST_IDS[position]
    scripts = [error("400 Bad", {}, *headers)], [reply(PLAIN, "200 OK", *headers)]
    with Server(*scripts) as server:
        assert collect(ask(server))[1].request_id == want
        assert list(ask(server))[-1].request_id == want

def test_reply_headers():
    headers = ["X-RateLimit-Remaining: 7", "Set-Cookie: a=b", "Via: one", "Via: two"]
    scripts = [reply(PLAIN, "200 OK", *headers)], [error("429 Slow", {}, *headers)]
    with Server(*scripts) as server:
        for found in (list(ask(server))[-1], collect(ask(server))[1]):
            assert found.headers["x-ratelimit-remaining"] == "7"
            assert found.headers["via"] == "one, two"
            assert "set-cookie" not in found.headers
            assert "x-ratelimit" not in repr(found)

@pytest.mark.parametrize("status", ["200 OK", "400 Bad"])
def test_an_error_can_be_printed_whatever_the_server_says(status):
    """Halves of characters go, and texts are bounded and plain."""
    _, failure = answers([error(status, {"error": {"message": "half \ud83d", "code": "\udc69"}})])
    assert failure.message == "half \ufffd"
    everything_about(failure).encode()
    body = {"error": {"message": "\x1b[31mred\x9b1m " + "x" * 60_000}}
    _, failure = answers([error(status, body, f"Location: {'/' * 60_000}")])
    assert len(failure.message) <= 2000
    assert len(str(failure)) <= 4200
    assert failure.message.startswith("[31mred")
    assert str(failure).isprintable()

@pytest.mark.parametrize("closing", [(), ("Connection: close",)])
@pytest.mark.parametrize("script, body", [
    ([pour(chunked(b"x" * 4096))], "x" * 64 * 1024),
    ([chunked(b"so far"), HOLD], "so far"),
    ([chunked(b"so far"), b"5\r\nab", HOLD], "so farab"),
    ([b"zz\r\n", CLOSE], ""),
    ([chunked(b"so far"), CLOSE], "so far"),
    ([HOLD], ""),
], ids=["endless", "stalled", "inside a chunk", "garbage", "cut", "nothing"])
def test_an_error_body_never_hides_the_status(script, body, closing, monkeypatch):
    monkeypatch.setattr(cs, "_ERROR_BODY_SECONDS", SOON if HOLD in script else PATIENCE)
    start = head("400 Bad", "Transfer-Encoding: chunked", *closing, type="text/plain")
    call = answers([start + b"".join(script[:-1]), script[-1]])
    fails(call, cs.StatusError, status=400, body=body)

# Bounds, and input that means harm

ENDLESS = {
    "text": b"x" * 65536, "line": b"data: " + b"x" * 65536, "data lines": b"data: xxx\n" * 6000,
    "text lines": b"xxx\n" * 16000, "empty data lines": b"data:\n" * 10000,
    "comments": b": x\n" * 10000, "no choice": b'data: {"choices": []}\n\n' * 3000,
    "no chunk": b'data: {"x": 1}\n\n' * 3000,
}

@pytest.mark.parametrize("what", ENDLESS)
def test_endless_events_end_in_an_error(what, monkeypatch):
    """And no long answer before them does."""
    monkeypatch.setattr(cs, "_MAX_EVENT", 1 << 17)
    script = [CHUNKED + chunked(sse(CA)) * 3000, pour(chunked(ENDLESS[what]))]
    fails(answers(script), cs.StreamError, str(1 << 17), got=[A] * 3000)

def test_one_large_event_in_small_reads():
    text = "x" * (8 << 20)
    body = sse(C(text), STOP, DONE)
    pieces = [body[i : i + 1024] for i in range(0, len(body), 1024)]
    assert decode(pieces) == ([TextDelta(text), END], None)
    assert answers([CHUNKED + chunked(*pieces) + b"0\r\n\r\n"])[0] == [TextDelta(text), END]

def test_many_prefixes_cost_linear_time():
    assert decode([b"data:" * 2_000_000 + sse(CA, STOP)]) == ([A, END], None)

def test_choices_and_calls_have_a_limit(monkeypatch):
    """Indexes without end cost no memory."""
    for name in ("_MAX_CHOICES", "_MAX_CALLS"):
        assert getattr(cs, name) == 1024
        monkeypatch.setattr(cs, name, 10)
    chunk = {"choices": [{"index": n} for n in range(11)]}
    assert "at most 10 choices" in str(decode([sse(chunk)])[1])
    calls = [ToolCallDelta(n, f"i{n}", "f", "{}") for n in range(10)]
    fails(decode([sse(*[tool(None, f"i{n}", "f", "{}") for n in range(11)])]), cs.StreamError,
          "at most 10 tool calls", got=calls)
    deltas = [tool(0, "i", "f", ""), *[arg("x", n) for n in range(1, 500)]]
    (message, _) = cs.aggregate(decode([sse(*deltas, DONE)])[0])
    assert message.tool_calls[0].arguments == "x" * 499

@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000])
def test_deep_json_is_text_that_nobody_can_read(deep):
    got, failure = decode([sse(CA, deep, STOP)])
    assert (failure, got[-1].skipped) == (None, 1)

# decode()

def test_decode_takes_any_iterable_of_bytes(tmp_path):
    (tmp_path / "body").write_bytes(PLAIN)
    with open(tmp_path / "body", "rb") as file:
        assert list(cs.decode(file)) == AB
    assert list(cs.decode(iter([bytearray(PLAIN), memoryview(b"")]))) == AB
    assert list(cs.decode([gzip.compress(PLAIN)])) == AB

@pytest.mark.parametrize("wrong", [PLAIN, bytearray(PLAIN), "text", 5, None])
def test_decode_wants_an_iterable_of_bytes(wrong):
    with pytest.raises(TypeError, match=r"blocks: |not iterable"):
        cs.decode(wrong)
    with pytest.raises(TypeError, match=r"blocks: .*str"):
        list(cs.decode(["text"]))

@pytest.mark.parametrize("fault", [
    kind("x") for kind in (OSError, ValueError, cs.ServerError, cs.TruncatedStreamError, TimeoutError)
])
def test_decode_raises_what_its_source_raises(fault):
    def source():
        yield sse(CA, STOP)
        raise fault

    events = cs.decode(source())
    assert next(events) == A
    with pytest.raises(type(fault)) as caught:
        next(events)
    assert caught.value is fault

def test_decode_stops_at_done():
    def source():
        yield PLAIN
        raise AssertionError("read on")

    assert list(cs.decode(source())) == AB

def test_reads_without_any_text_between_cr_and_lf():
    body = b'event: error\r\ndata: {"message":"CUDA oom"}\r\n\r\n'
    for packed in (gzip.compress(body), gzip.compress(body, 0)):
        call = decode([packed[at : at + 1] for at in range(len(packed))])
        fails(call, cs.ServerError, message="CUDA oom")

def test_a_line_that_is_data_without_a_colon_is_padding():
    assert decode([sse(CA, STOP) + b"data\n\n"]) == ([A, END], None)
    fails(decode([sse(CA) + b"data\n\n"], strict=True), cs.TruncatedStreamError,
          "without a finish_reason", got=[A])

def test_what_the_caller_does_to_an_event_changes_nothing_later():
    details = [{"text": "r"}]
    chunks = [CA, CB, D(reasoning_details=details), tool(0, "i", "f", "1"), STOP]
    for raw in (False, True):
        wanted = copy.deepcopy(decode([sse(*chunks)], raw=raw)[0])
        got = []
        for event in cs.decode([sse(*chunks)], raw=raw):
            got.append(copy.deepcopy(event))
            if isinstance(event, Chunk):
                for choice in event.data["choices"]:
                    choice["delta"].get("reasoning_details", []).clear()
                event.data.clear()
            else:
                event.choice, event.extra, event.text = 7, {"x": 1}, "changed"
        assert got == wanted

# ---- The end of an answer: what finishes it, cuts ------------------------------------

#: (chunks, whether a proper end is one without a warning, and whether a cut is no error)
FINISHES = [
    ([CA, STOP], True, True),
    ([C("a", finish="stop")], True, True),
    ([CA, STOP, {"choices": [], "usage": USAGE}], True, True),
    ([CA, STOP, CB], False, False),  # more after the reason
    ([CA, STOP, CB, DONE], True, True),  # then [DONE] makes a reason enough
    ([CA, STOP, CB, STOP], True, False),  # but once more has followed a reason,
    ([C("a", "stop"), C("b", "stop")], True, False),  # none proves anything at a cut
    ([C("a", "stop"), C("b", "stop"), C("", "stop")], True, False),
    ([C("a", "length"), C("", "length")], True, True),  # nothing came after it
    ([CA, DONE], False, None),  # alone it proves nothing
    ([CA, STOP, C("b", index=1)], False, False),
    ([CA, STOP, C("b", "stop", index=1)], True, True),
    ([{"choices": []}], False, None),
    ([], False, None),
    *[([CA, C(finish=reason)], False, False) for reason in (
        "abort", "timeout", "error", "overloaded_error", "CANCELLED", "failed")],
    ([CA, C(finish="abort"), DONE], False, None),
    ([CA, C(finish="eos")], True, True),
]

@pytest.mark.parametrize("chunks, proper, survives", FINISHES)
def test_what_finishes_an_answer(chunks, proper, survives, caplog):
    got, failure = decode([sse(*chunks)])
    assert (type(got[-1]), failure) == (Completed, None)
    assert len(warnings_in(caplog)) == (not proper)
    got, failure = decode([sse(*chunks)], strict=True)
    assert type(failure) is (type(None) if proper else cs.TruncatedStreamError)

@pytest.mark.parametrize("chunks, survives", [row[::2] for row in FINISHES if row[2] is not None])
@pytest.mark.parametrize("end", [CLOSE, RESET])
def test_what_a_cut_does_to_it(chunks, survives, end, caplog):
    events = decode([sse(*chunks)])[0]
    n = 1 + any("'index': 1" in str(chunk) for chunk in chunks)
    with Server([CHUNKED + chunked(sse(*chunks)), end]) as server:
        got, failure = collect(ask(server, n=n))
    assert got == (events if survives else events[:-1])
    assert type(failure) is (type(None) if survives else cs.TruncatedStreamError)

@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_reason_of_failure_is_named(reason, caplog):
    body = sse(CA, C(finish=reason), DONE)
    assert decode([body])[0] == [A, completed(reason)]
    line = warned(caplog, "may be cut")
    assert re.search(f"finish_reason.*{reason}|{reason}.*finish_reason", line)
    assert reason in str(decode([body], strict=True)[1])

@pytest.mark.parametrize("chunks, warns", [
    ([STOP, DONE], True),
    ([C(finish="length"), {"choices": [], "usage": USAGE}], True),
    *(([chunk, STOP], False) for chunk in (
        D(reasoning_content="r"), D(reasoning_opaque="o"), D(refusal="no"), tool(0, "i", "f"), CA)),
])
def test_a_finished_answer_with_nothing_in_it_is_a_warning(chunks, warns, caplog):
    """LM Studio's prompt beyond the context, pictures: no error, but nothing to read."""
    assert decode([sse(*chunks)], strict=True)[1] is None
    lines = warnings_in(caplog)
    assert len(lines) == warns
    if warns:
        assert "empty" in lines[0]
        assert re.search("stop|length", lines[0])

@pytest.mark.parametrize("text", ['{"choices": [{"del', "[1, 2"])
def test_a_cut_chunk_at_the_end_is_quoted(text, caplog):
    assert decode([sse(CA) + f"data: {text}".encode()])[0] == [A, completed(None, skipped=1)]
    assert any("behind" in line and text in line for line in warnings_in(caplog))
    assert text in str(decode([sse(CA) + text.encode()], strict=True)[1])

@pytest.mark.parametrize("more", [b"words", sse("words", DONE), b"data: words\n"])
def test_the_last_words_are_the_servers(more):
    fails(decode([sse(CA) + more]), cs.ServerError, got=[A], message="words", raw="words")

EVENT = sse(CA)
PACKER = zlib.compressobj(wbits=31)
FLUSHED = PACKER.compress(EVENT) + PACKER.flush(zlib.Z_SYNC_FLUSH)
CUTS = {
    "no terminator": CHUNKED + chunked(EVENT),
    "inside a chunk": CHUNKED + b"fff\r\n" + EVENT + b"data: {",
    "after a chunk": CHUNKED + chunked(EVENT)[:-2],
    "half a size": CHUNKED + chunked(EVENT) + b"0",
    "size without blank line": CHUNKED + chunked(EVENT) + b"0\r\n",
    "inside a trailer": CHUNKED + chunked(EVENT) + b"0\r\nX: y",
    "garbage size": CHUNKED + chunked(EVENT) + b"zz\r\nxx\r\n",
    "negative size": CHUNKED + chunked(EVENT) + b"-5\r\n" + sse(C("z")) + b"\r\n0\r\n\r\n",
    "huge size": CHUNKED + chunked(EVENT) + b"f" * 30 + b"\r\nxx",
    "endless size": CHUNKED + chunked(EVENT) + b"1" * 70_000,
    "short length": head("200 OK", "Content-Length: 999") + EVENT,
    "gzip": head("200 OK", "Content-Encoding: gzip", "Content-Length: 999") + FLUSHED,
    "gzip to the end": head("200 OK") + FLUSHED,
    "half an event": CHUNKED + chunked(EVENT + b"data: {"),
    "no blank line": CHUNKED + chunked(EVENT[:-1]),
    "no line end": CHUNKED + chunked(EVENT[:-2]),
}

@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("end", [CLOSE, RESET])
def test_a_cut_is_never_a_success(how, end, sleeps):
    end = CLOSE if how == "gzip to the end" else end
    with Server([CUTS[how], end]) as server:
        assert outcome(ask(server, max_retries=3)) == ([A], cs.TruncatedStreamError)
    assert len(server.requests) == 1

@pytest.mark.parametrize("how", [how for how in CUTS if "gzip" not in how])
def test_a_cut_before_the_first_event_is_retried(how, sleeps):
    script = [CUTS[how].replace(b'"content"', b'"kontent"'), CLOSE]
    with Server(script, script, [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=2)) == AB
        assert len(server.requests) == 3
    fails(answers(script, max_retries=1), cs.TransportError, attempts=2)

@pytest.mark.parametrize("start", [
    b"H", b"HTTP/1.1 200",
    *(b"HTTP/1.1 200 OK\r\n" + more for more in (
        b"",
        b"Server: a\r\nContent-Ty", b"Server: a\r\nContent-Type: tex",
        b"Content-Type: a/b\r\n",
        b"Content-Type: a/b\r\nTransfer-",
        b"Content-Type: a/b\r\nContent-Length:",
        b"Content-Type: a/b\r\n\r\n")),
    b"HTTP/1.0 200 OK\r\n\r\n",
])
def test_a_cut_inside_the_headers_is_retried(start, sleeps):
    """Inside a line; or at its end, where no length is named and no byte of a body comes."""
    with Server([start, CLOSE], [reply(PLAIN)]) as server:
        assert list(ask(server, max_retries=1)) == AB
    fails(answers([start, CLOSE]), cs.TransportError)

@pytest.mark.parametrize("start, piece", [
    (CHUNKED, chunked),
    (CHUNKED + b"ffff\r\n", bytes),  # inside a chunk that stays incomplete
    (head("200 OK", "Content-Length: 99999"), bytes),
    (head("200 OK", "Connection: close"), bytes),
])
def test_each_event_is_handed_over_when_it_arrives(start, piece):
    turn = threading.Semaphore(0)
    script = [start]
    for word in "abcde":
        script += [piece(sse(C(word))), lambda *_: turn.acquire(timeout=PATIENCE)]
    with Server([*script, CLOSE]) as server:
        events = ask(server)
        for word in "abcde":
            assert next(events) == TextDelta(word)
            turn.release()
        events.close()

@pytest.mark.parametrize("more", [
    HOLD, pour(chunked(b": more\n\n"), pause=0.005), pour(b"0\r\nx: y\r\n", pause=0.005),
], ids=["nothing", "comments", "trailers"])
def test_what_comes_after_done_does_not_hold_the_call(more):
    unended = sse(CA, CB, STOP, '{"cut', DONE, end="\n")  # behind a cut chunk, no blank line
    for body, skipped in ((PLAIN, 0), (unended, 1)):
        with Server([CHUNKED + chunked(body), more]) as server:
            assert list(ask(server)) == [A, B, completed(skipped=skipped)]
            server.wait_for_leaving()

# ---- Time: the bounds in each phase of a call, cancel(), signals ---------------------

#: In each the call waits: (script, the events before).
PHASES = {
    "headers": ([HOLD], []),
    "body": ([UNFINISHED, HOLD], [A]),
    "inside a chunk": ([CHUNKED + b"fff\r\n" + sse(CA), HOLD], [A]),
    "inside a size": ([UNFINISHED + b"1", HOLD], [A]),
    "error body": ([head("400 No", "Content-Length: 9"), HOLD], []),
    "retry": ([error("503 Busy", {}, "Retry-After: 60")], []),
}

@contextlib.contextmanager
def alarm(action, server):
    """A signal soon after the server has the request. action: an exception, or a function."""

    def handler(number, frame):
        if isinstance(action, Exception):
            raise action
        action()

    def send():
        server.wait_until(lambda: server.requests)
        time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    previous = signal.signal(signal.SIGALRM, handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, previous)

def cancel_soon(events, server=None):
    """Cancels in another thread: when the server has the request, and a little later,
    so that the call mostly waits by then; it must end in the same way if it does not."""

    def run():
        if server is not None:
            server.wait_until(lambda: server.requests)
        time.sleep(0.05)
        cs.cancel(events)

    thread = threading.Thread(target=run)
    thread.start()
    return thread

def cancelled(call, server=None):
    """-> the error of the call, which waits, is cancelled in another thread, and ends so."""
    thread = cancel_soon(call, server)
    failure = fails(call, cs.CancelledError)
    thread.join()
    return failure

WAYS = [
    "deadline", "cancel", "cancel an aggregate", "cancel in a handler", "a chain of aggregates",
    *(kind("mine") for kind in (TimeoutError, ValueError, Exception, OSError)), KeyboardInterrupt(),
]

@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way if isinstance(way, str) else repr(way))
def test_what_ends_a_wait_in_each_phase(phase, way):
    """A handler's exception passes as it is, also the TimeoutError of a common recipe; but
    an OSError looks like the socket's. A cancel() there waits for no lock it interrupts."""
    script, events = PHASES[phase]
    with Server(script) as server:
        call = ask(server, max_retries=3 * (type(way) is not OSError),
                   deadline=LATER if way == "deadline" else None)
        for _ in range({"cancel an aggregate": 1, "a chain of aggregates": 2}.get(way, 0)):
            call = cs.aggregate(call, deltas=True)
        assert [next(call) for _ in events] == events
        if way == "deadline":
            failure = collect(call)[1]
        elif way == "cancel in a handler":
            with alarm(lambda: cs.cancel(call), server):
                failure = collect(call)[1]
        elif isinstance(way, str):
            failure = cancelled(call, server)
        else:
            action = way
            if type(way) is KeyboardInterrupt:
                action = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
            with pytest.raises((type(way), cs.ChatStreamError)) as caught:
                with alarm(action, server):
                    list(call)
            failure = caught.value
        if phase != "retry":
            server.wait_for_leaving()
    assert len(server.requests) == 1
    if way == "deadline" and phase == "retry":  # a wait that would outlast it is not begun
        assert type(failure) is cs.RetryLimitError
    elif way == "deadline" and phase == "error body":
        assert (type(failure), failure.status) == (cs.StatusError, 400)
    elif way == "deadline":
        assert (type(failure), failure.seconds) == (cs.DeadlineError, LATER)
        assert server.url in str(failure)
    elif isinstance(way, str):
        assert type(failure) is cs.CancelledError
        assert failure.partial == ((Message(content="a"),) if "aggregate" in way and events else ())
    elif type(way) is OSError and phase not in ("retry", "error body", "headers"):
        assert (type(failure), failure.__cause__) == (cs.TruncatedStreamError, way)
    elif type(way) is not OSError:
        assert failure is way or type(failure) is KeyboardInterrupt is type(way)

@pytest.mark.parametrize("wrong", [None, 5, [A], iter([A])])
def test_cancel_wants_a_generator_and_spares_those_of_others(wrong):
    with pytest.raises(TypeError, match=r"^events: "):
        cs.cancel(wrong)
    for other in (cs.aggregate([A]), cs.decode([PLAIN]), (e for e in [A])):
        cs.cancel(other)
        assert len(list(other)) in (1, 3)

@pytest.mark.parametrize("aggregated", [False, True])
def test_cancel_before_the_first_event_and_after_the_last(aggregated):
    with Server([reply(PLAIN)]) as server:
        call = cs.aggregate(ask(server)) if aggregated else ask(server)
        cs.cancel(call)
        assert outcome(call) == ([], cs.CancelledError)
        assert server.connections == 0
        call, got = ask(server), []
        for event in call:
            got.append(event)
            if event == END:
                cs.cancel(call)
        assert got == AB
        cs.cancel(call)
        assert list(ask(server)) == AB

def test_cancel_on_a_kept_connection():
    with Server([reply(PLAIN)], [HOLD]) as server:
        list(ask(server))
        cancelled(ask(server))

@pytest.mark.parametrize("options, kind, attempts", [
    ({"deadline": SOON, "connect_timeout": None}, cs.DeadlineError, None),
    ({"connect_timeout": SOON, "max_retries": 1}, cs.TransportError, 2),
])
def test_a_tls_handshake_that_stalls(options, kind, attempts, sleeps):
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it never speaks TLS
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        failure = fails(ask(url, **options), kind)
    assert getattr(failure, "attempts", None) == attempts

@pytest.mark.parametrize("script", [[UNFINISHED, HOLD], [reply(PLAIN)]])
def test_deadline_counts_the_callers_own_time(script):
    """Between two events of one read, too."""
    with Server(script) as server:
        events = ask(server, deadline=LATER)
        assert next(events) == A
        time.sleep(LATER)
        fails(events, cs.DeadlineError, seconds=LATER)

def test_bounds_that_are_far_away():
    names = ("connect_timeout", "idle_timeout", "event_timeout", "deadline")
    with Server([reply(PLAIN)]) as server:
        for value in (None, PATIENCE, 2_147_483):
            assert list(ask(server, **dict.fromkeys(names, value))) == AB

@pytest.mark.parametrize("drip", [
    b": wait\n\n", b":", b'data: {"x', sse({"choices": []}), sse({"type": "ping"}), sse({"id": "c1"}),
], ids=["comments", "a comment", "half an event", "no choice", "a ping", "an id"])
def test_event_timeout_ends_a_drip(drip):
    """As OpenRouter's and iFlytek's keep-alives; the timeout begins with the headers."""
    with Server([CHUNKED, pour(chunked(drip), pause=0.02)]) as server:
        got, failure = collect(ask(server, event_timeout=0.3, raw=b"choices" in drip))
    fails(([], failure), cs.IdleTimeoutError, "event_timeout", seconds=0.3)
    assert {type(e) for e in got} <= {Chunk}

def test_event_timeout_is_restarted_by_each_chunk_that_says_something():
    step, go_on = gate()
    more = [chunked(sse(CB)), step, chunked(sse(STOP, DONE)) + b"0\r\n\r\n"]
    with Server([UNFINISHED, step, *more]) as server:
        got = []
        for event in ask(server, event_timeout=LATER):
            got.append(event)
            time.sleep(LATER)  # the caller's own time does not count
            go_on.set()
    assert got == AB

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

def test_connect_timeout_is_a_transport_error(sleeps):
    with mute_address() as (host, port):
        call = ask(f"http://{host}:{port}/v1", connect_timeout=SOON, max_retries=1)
        fails(call, cs.TransportError, f"{SOON} s (connect_timeout)",
              "a proxy is taken from the environment alone", attempts=2)

def test_each_address_of_a_name_is_tried(monkeypatch):
    with Server([reply(PLAIN)]) as server, mute_address() as mute:
        places = [("127.0.0.1", closed_port()), mute, ("127.0.0.1", server.port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert list(ask(f"http://many.test:{server.port}/v1", connect_timeout=LATER)) == AB
    assert server.requests[0].header("Host") == f"many.test:{server.port}"

def test_a_large_upload_outlasts_connect_timeout():
    def read_slowly(sock, file):
        left = int(server.requests[0].header("Content-Length"))
        while left:
            left -= len(file.read(min(left, 1 << 20)))
            time.sleep(LATER / 10)

    with Server([DEAF, read_slowly, reply(PLAIN)]) as server:
        assert list(ask(server, "x" * (20 << 20), connect_timeout=LATER)) == AB

@pytest.mark.parametrize("kept", [False, True])
def test_a_stalled_upload_is_not_tried_again(kept, sleeps):
    stall = [DEAF, lambda *_: server.stopping.wait(PATIENCE)]
    with Server(*[[reply(PLAIN)]] * kept, stall) as server:
        if kept:
            list(ask(server))
        call = ask(server, "x" * (64 << 20), connect_timeout=SOON, max_retries=3)
        fails(call, cs.TransportError, "while sending")
    assert server.begun == 1 + kept

def test_deadline_while_the_request_is_sent():
    with Server([DEAF, lambda *_: server.stopping.wait(PATIENCE)]) as server:
        fails(ask(server, "x" * (32 << 20), deadline=LATER), cs.DeadlineError)

def test_an_early_413_to_a_large_request():
    with Server([DEAF, error("413 Too Large", {"error": "too large"}), CLOSE]) as server:
        _, failure = collect(ask(server, "x" * (16 << 20)))
    assert isinstance(failure, (cs.StatusError, cs.TransportError))  # a reset may take it away

def test_an_address_of_ipv6():
    try:
        server = Server([reply(PLAIN)], host="[::1]")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        assert list(ask(server)) == AB
    assert server.requests[0].header("Host") == f"[::1]:{server.port}"

def test_cancel_while_connecting():
    """When that wait ends: each at its connect_timeout at the latest."""
    with mute_address() as (host, port):
        cancelled(ask(f"http://{host}:{port}/v1", connect_timeout=LATER, max_retries=9))

def test_cancel_while_the_request_is_sent():
    with Server([DEAF, lambda *_: server.stopping.wait(PATIENCE)]) as server:
        cancelled(ask(server, "x" * 20_000_000, connect_timeout=PATIENCE), server)

@pytest.mark.parametrize("body", [
    PLAIN,
    sse(CA) + sse(C("b", "stop"))[:-2],
    json.dumps(whole({"content": "a", "refusal": "r"})).encode(),
], ids=["of one read", "of the last line", "of one chunk"])
def test_cancel_between_two_events(body):
    with Server([reply(body)]) as server:
        call = ask(server)
        assert next(call) == A
        cs.cancel(call)
        assert outcome(call) == ([], cs.CancelledError)
        server.wait_for_leaving()

def test_a_cancelled_call_harms_no_other():
    """Its connection may be another call's by now."""
    step, go_on = gate()
    rest = chunked(sse(CB, STOP, DONE)) + b"0\r\n\r\n"
    with Server([reply(PLAIN)], [UNFINISHED, step, rest]) as server:
        first = ask(server)
        assert list(first) == AB
        second = ask(server)
        assert next(second) == A
        cs.cancel(first)
        go_on.set()
        assert list(second) == [B, END]
        assert server.connections == 1

def test_the_kernels_etimedout_is_a_failed_connection(blocks, sleeps):
    """As after a dropped VPN: no timeout of ours has struck."""

    class Broken(list):
        def __iter__(self):
            return self

        def __next__(self):
            if self:
                return self.pop(0)
            raise OSError(errno.ETIMEDOUT, "Connection timed out")

    blocks(Broken([chunked(sse(CA))]), "Transfer-Encoding: chunked")
    assert outcome(ask(URL)) == ([A], cs.TruncatedStreamError)
    blocks(Broken(), "Transfer-Encoding: chunked")
    fails(ask(URL, max_retries=1), cs.TransportError, "timed out")
    assert len(sleeps) == 1

# ---- Arguments -----------------------------------------------------------------------

WRONG_TYPES = {
    "model": [None, 5],
    "messages": [{"role": "user"}, Message(), b"x", 5, None],
    "instructions": [5], "base_url": [5], "provider": [5], "api_key": [5], "extra_body": [[1]],
    "headers": [{"X": 5}, {5: "x"}, [("a", "b")]],
    "connect_timeout": ["5"], "idle_timeout": [True], "deadline": [[]],
    "max_retries": [1.5, True],
    "pool": [object(), urllib3 or 5, getattr(urllib3, "PoolManager", int)],
}
WRONG_VALUES = {
    "model": ["", " "],
    "messages": [[], ""],
    "connect_timeout": [0], "deadline": [2_147_484], "max_retries": [-1], "provider": ["opanai"],
    "idle_timeout": [-1, float("nan")],
    "event_timeout": [float("inf"), 10**400],
    "api_key": [KEY + "\n", KEY + "\u201d", "  ", f'"{KEY}"', f"'{KEY}'"],
    "headers": [{"X-Key": KEY + "\r\nX: y"}, {f"X\n{KEY}": "v"}, {f"Authorization: {KEY}": "x"},
                {"X": "a\x7f"}, {"": "x"}, {"Content-Length": "5"}, {"transfer-encoding": "x"}],
    "base_url": [
        "", "127.0.0.1/v1", "ftp://x/v1", "http://", "http://x:99999/", "http://x:0/",
        "http://[::1/v1", "http://a b/v1", "http://x/v1#f", "http://x/\ud800", f"user:{KEY}@x/v1",
        f"http:/user:{KEY}@x", f"http://user:{KEY}@x/v1", f"http:///user:{KEY}@x/",
        f"http://user:{KEY}#x@x", f"http://x/v1#{KEY}", "http://127.0.0.1\\.trusted.example/v1",
        "http://a..b/v1", "http://-/v1\\x", "http://" + "a" * 70 + ".b/v1",
        "http://x/v1/chat/completions", "http://x/chat/completions/"],
}
WRONG_ELSEWHERE = [
    ({"messages": ["x"]}, TypeError, r"messages\[0\]"),
    ({"messages": [{}, None]}, TypeError, r"messages\[1\]"),
    ({"messages": []}, ValueError, r"^messages: empty"),
    ({"messages": [{"content": b"x"}]}, TypeError, "bytes.*JSON"),
    ({"base_url": "http://x/v1/chat/completions"}, ValueError,
     "only what is before /chat/completions"),
    ({"base_url": f"http://user:{KEY}@x/v1"}, ValueError, "user:password@"),
    ({"base_url": "http://bücher.example"}, ValueError, "xn--"),
    ({"provider": "opanai"}, ValueError, "openai, openrouter.*got 'opanai'"),
    ({"provider": {"order": ["a"]}}, TypeError, "extra_body="),
    ({"provider": cs.Provider("p", URL, headers={"X": 5})}, TypeError, "Provider.headers"),
    ({"stream": False}, TypeError, "aggregate"),
    ({"extra_body": {"stream": False}}, TypeError, "aggregate"),
    ({"temperature": float("nan")}, ValueError, "JSON"),
    ({"tools": {1, 2}}, TypeError, "set.*JSON"),
]

WRONG = [({name: value}, kind, f"^{name}")
         for table, kind in ((WRONG_TYPES, TypeError), (WRONG_VALUES, ValueError))
         for name, values in table.items() for value in values]

@pytest.mark.parametrize("options, kind, text", [*WRONG, *WRONG_ELSEWHERE])
def test_wrong_arguments_are_refused_at_the_call(options, kind, text):
    for function in (cs.stream, cs.complete):
        given = {"messages": "x", "model": "m", "base_url": URL, **options}
        with pytest.raises(kind, match=text) as caught:
            function(given.pop("messages"), **given)
        assert KEY not in str(caught.value)
        assert not isinstance(caught.value, cs.ChatStreamError)

@pytest.mark.parametrize("name, ours", [
    ("system", "instructions="), ("prompt", "messages"), ("apikey", "api_key="),
    ("api_base", "base_url="), ("extra_headers", "headers="), ("organization", "headers="),
    ("extra_query", "base_url="), ("http_client", "pool="), ("verify", "pool="),
    ("num_retries", "max_retries="), ("timeout", "idle_timeout="),
])
def test_names_of_other_clients_are_refused(name, ours):
    with pytest.raises(TypeError, match=f"^{name}: .*{ours}") as caught:
        cs.stream("x", model="m", base_url=URL, **{name: KEY})
    assert KEY not in str(caught.value)
    cs.stream("x", model="m", base_url=URL, extra_body={name: 1}).close()

def test_a_body_nested_too_deeply():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="JSON"):
        cs.stream("x", model="m", base_url=URL, tools=deep)

@pytest.mark.parametrize("options", [
    *({"base_url": url} for url in (
        "http://my_box:8080/v1", "http://[::1]:8/v1", "http://[fe80::1%25eth0]/v1", "http://a.b.",
        "https://xn--bcher-kva.example/v1", " http://x.test/v1\n")),
    {"headers": {"X": "a\tb"}},
    {"messages": [types.MappingProxyType({"role": "user", "content": "x"})]},
])
def test_arguments_that_are_taken(options):
    given = {"messages": [{"role": "user", "content": "x"}], "base_url": URL, **options}
    cs.stream(model="m", **given).close()

def test_what_is_sent_and_nothing_of_the_callers_is_changed():
    history = [types.MappingProxyType({"role": "user", "content": "a"}), Message(content="b")]
    headers, extra = {"accept": "x/y"}, {"provider": {"order": ["a"]}, "timeout": 5, "seed": None}
    before = copy.deepcopy((history[1], headers, extra))
    request = request_of(history, headers=headers, extra_body=extra, instructions="i",
                         temperature=None, top_p=0.5, tools=[])
    assert (history[1], headers, extra) == before
    body = request.json
    messages = [(m["role"], m["content"]) for m in body.pop("messages")]
    assert messages == [("system", "i"), ("user", "a"), ("assistant", "b")]
    # A parameter that is None is left out.
    assert body == {"model": "m", "stream": True, "top_p": 0.5, "tools": [], **extra}
    assert request.header("Accept") == "x/y"

def test_half_a_surrogate_pair_goes_out_as_ufffd():
    messages = [{"role": "user", "content": "a\ud83d"}, {"role": "tool", "content": "\ud83d\ude00"}]
    request = request_of(messages, instructions="\udc69", stop="b\ud83d")
    assert [m["content"] for m in request.json["messages"]] == ["\ufffd", "a\ufffd", "😀"]
    assert request.json["stop"] == "b\ufffd"
    assert "😀".encode() in request.body

def test_headers_replace_whatever_the_case():
    provider = cs.Provider("p", "http://x", headers={"X-A": "1", "X-B": "1"})
    mine = {"x-b": "2", "AUTHORIZATION": "other", "api-key": "k", "user-agent": "me"}
    request = request_of(provider=provider, headers=mine, api_key=KEY)
    sent = [(n.lower(), v) for n, v in request.headers]
    assert {("x-a", "1"), *((n.lower(), v) for n, v in mine.items())} <= set(sent)
    assert len({n for n, _ in sent}) == len(sent)

@pytest.mark.parametrize("path, target", [
    ("", "/chat/completions"),
    ("/a/b//", "/a/b/chat/completions"),
    ("/d/?api-version=2024&q=a%20b", "/d/chat/completions?api-version=2024&q=a%20b"),
    ("/é", "/%C3%A9/chat/completions"),
])
def test_where_it_goes(path, target):
    assert request_of(path=path).target == target

def test_openai_base_url(monkeypatch):
    with Server() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for provider in (None, "openai"):
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
            list(cs.stream("x", model="m", provider=provider))
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
            list(cs.stream("x", model="m", provider=provider))
    sent = [request.header("Authorization") for request in server.requests]
    assert sent == [None, f"Bearer {KEY}"] * 2
    monkeypatch.setenv("OPENAI_BASE_URL", "nonsense")
    with pytest.raises(ValueError, match=r"^OPENAI_BASE_URL: "):
        cs.stream("x", model="m")
    cs.stream("x", model="m", provider="ollama").close()

@pytest.mark.parametrize("given", [f'"{KEY}"', f"{KEY}\u201d", f"'{KEY}'"])
def test_a_bad_key_is_refused_by_the_name_of_its_source(given, monkeypatch):
    monkeypatch.setenv("GROQ_API_KEY", given)
    with pytest.raises(ValueError, match=r"^GROQ_API_KEY: ") as caught:
        cs.stream("x", model="m", provider="groq")
    assert KEY not in str(caught.value)

def test_the_key_of_one_provider_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("GROQ_API_KEY", f" {KEY}groq\r\n")  # blanks around it are none of it
    names = (None, "", "ollama", "groq")
    sent = [request_of(provider=name).header("Authorization") for name in names]
    assert sent == [None, None, None, f"Bearer {KEY}groq"]

def test_a_provider_of_ones_own(monkeypatch):
    with Server() as server:
        mine = cs.Provider("mine", server.url, "MY_KEY", "Ask Bob.", {"X-Team": "red"})
        with pytest.raises(cs.MissingAPIKeyError, match=r"MY_KEY.*Ask Bob\."):
            cs.stream("x", model="m", provider=mine)
        monkeypatch.setenv("MY_KEY", KEY)
        list(cs.stream("x", model="m", provider=mine))
    assert server.requests[0].header("X-Team") == "red"
    assert "red" not in repr(mine)
    with pytest.raises(TypeError, match=r"^base_url: expected str"):
        cs.stream("x", model="m", provider=cs.Provider("no URL", None))

# ---- Tries and waits -----------------------------------------------------------------

def http_date(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)

def gemini(delay):
    return [{"error": {"details": [{"x": 1}, {"@type": "RetryInfo", "retryDelay": delay}]}}]

@pytest.mark.parametrize("headers, body, wait", [
    (["Retry-After: 0.4"], {}, 0.4),
    (["Retry-After: 1", "Retry-After-Ms: 700"], {}, 0.7),
    (["Retry-After: 1", "retry-after-ms: soon"], {}, 1.0),
    *(([f"Retry-After: {odd}"], {}, 0.2) for odd in (
        "0", "soon", "-1", "nan", "inf", http_date(-100), "Mon, 99 Foo 2026", "5s", "0" * 60_000 + "x")),
    (["Retry-After: 120 "], {}, 120.0),
    (["Retry-After: 5 ", "Retry-After: 6"], {}, 5.0),
    (["Retry-After: 5."], {}, 5.0),
    (["Retry-After: .5"], {}, 0.5),
    ([], gemini("12.5s"), 12.5),
    ([], {"error": json.dumps(gemini("7s"))}, 7.0),
    (["Retry-After: 3"], gemini("7s"), 3.0),
    ([], gemini("soon"), 0.2),
    ([], gemini("0s"), 0.2),
])
def test_what_a_server_asks_to_wait(sleeps, headers, body, wait):
    busy = error("429 Slow", body, *headers)
    assert answers([busy], [reply(PLAIN)], max_retries=1)[0] == AB
    assert sleeps == [pytest.approx(wait)]
    _, failure = answers([busy])
    assert failure.retry_after == (None if wait == 0.2 else pytest.approx(wait))

def test_a_wait_until_a_date(sleeps):
    busy = error("503 Busy", {}, "Retry-After: " + http_date(100))
    answers([busy], [reply(PLAIN)], max_retries=1)
    assert 60 < sleeps[0] <= 101

def test_a_servers_wait_is_a_least_one(sleeps, monkeypatch):
    """Up to a tenth more, at most 1 s, so that not all come back in one moment."""
    bounds = []
    monkeypatch.setattr(random, "uniform", lambda *given: bounds.append(given) or given[1])
    busy = [[error("429 Slow", {}, f"Retry-After: {seconds}")] for seconds in (5, 100)]
    answers(*busy, [reply(PLAIN)], max_retries=2)
    assert bounds == [(0, 0.5), (0, 1.0)]
    assert sleeps == [5.5, 101.0]

def test_a_wait_is_bounded_by_nothing_but_the_deadline(monkeypatch):
    """Neither by event_timeout nor by the bound of the error's body before it."""
    monkeypatch.setattr(cs, "_ERROR_BODY_SECONDS", LATER)
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    busy = error("503 Busy", {}, f"Retry-After-Ms: {LATER * 1000 + 200}")
    got, _ = answers([busy], [reply(PLAIN)], max_retries=1, event_timeout=LATER)
    assert got == AB

def test_each_wait_is_logged_once(sleeps, caplog):
    answers([RESET], [error("503 Busy", {"error": "busy"})], [reply(PLAIN)], max_retries=2)
    first, second = warnings_in(caplog)
    assert "try 2 of 3 in 0.20 s" in first
    assert re.search("503.*busy.*try 3 of 3 in 0.40 s", second)

def test_a_first_word_may_say_how_long_to_wait(sleeps):
    body = sse({"error": {"message": "m", "code": 429}})
    with Server([reply(body, "200 OK", "Retry-After: 7")],
                [reply(sse({"error": {"code": 429, "details": gemini("8s")}}))],
                [reply(body, "200 OK", "X-Should-Retry: false")]) as server:
        assert outcome(ask(server, max_retries=3)) == ([], cs.ServerError)
    assert (sleeps, len(server.requests)) == ([7.0, 8.0], 3)

def test_complete_asks_again_for_an_answer_that_was_cut(sleeps):
    """Nobody has seen any of it: every third answer is cut, and 200 of 200 come."""
    count = itertools.count(1)

    def answer(sock, file):
        if next(count) % 3:
            sock.sendall(reply(PLAIN))
        else:
            sock.sendall(UNFINISHED)
            raise ConnectionAbortedError

    with Server([answer]) as server:
        assert all(complete(server).content == "ab" for _ in range(200))
    assert len(server.requests) == len(sleeps) + 200 == 299
    with Server([UNFINISHED, CLOSE]) as server:
        with pytest.raises(cs.TruncatedStreamError, match="2 attempts") as caught:
            complete(server, max_retries=1)
    assert caught.value.partial == (Message(content="a"),)

# ---- Connections ---------------------------------------------------------------------

@pytest.mark.parametrize("whole_reply", [
    reply(PLAIN), sized(PLAIN), reply(PLAIN, "400 No"), reply(sse(CA, STOP)),
], ids=["chunked", "length", "an error", "no [DONE]"])
@pytest.mark.parametrize("first", [False, True])
def test_calls_in_a_row_use_one_connection(whole_reply, first):
    """Also if the caller leaves at the message."""
    with Server([whole_reply]) as server:
        for _ in range(5):
            events = cs.aggregate(ask(server))
            collect(itertools.islice(events, 1) if first else events)
        assert server.connections == 1

CLOSED = "Connection: close"

@pytest.mark.parametrize("script, options", [
    ([reply(PLAIN, "200 OK", CLOSED)], {}),
    ([reply(PLAIN)], {"headers": {"connection": "Close"}}),  # RFC 9112, 9.6: also ours counts
    ([head("200 OK", CLOSED) + PLAIN, CLOSE], {}),
    ([b"HTTP/1.0 200 OK\r\n\r\n" + PLAIN, CLOSE], {}),
    ([CHUNKED + chunked(PLAIN)], {}),
    ([UNFINISHED, CLOSE], {}),
    ([reply(sse(CA, {"error": "x"}, CB))], {}),
    ([reply(PLAIN) * 2], {}),
    ([sized(PLAIN) + b"x"], {}),
    ([reply(PLAIN) + b"junk"], {}),
])
def test_a_connection_that_is_not_used_again(script, options):
    """Where something is left behind an answer, the next call would read that."""
    with Server(script, [reply(sse(C("z"), STOP, DONE))]) as server:
        collect(ask(server, **options))
        assert list(ask(server)) == [TextDelta("z"), END]
        assert server.connections == 2

@pytest.mark.parametrize("left", [b"HTTP/1.1 408 Timeout\r\n\r\n", b""])
def test_a_kept_connection_on_which_something_has_come(left):
    """A stray reply, or the end: neither is read as the next answer."""
    step, go_on = gate()
    with Server([reply(PLAIN), step, left, CLOSE], [reply(sse(C("z"), STOP))]) as server:
        list(ask(server))
        go_on.set()
        server.wait_for_leaving()
        assert list(ask(server)) == [TextDelta("z"), END]
        assert len(server.requests) == 2

@pytest.mark.parametrize("end", [CLOSE, RESET])
def test_a_kept_connection_that_dies_costs_nothing(end, caplog):
    """The server closes when the next request comes, as uvicorn does after a 500."""
    with Server(*[[reply(PLAIN)], [end]] * 3, [reply(PLAIN)]) as server:
        for _ in range(3):
            assert list(ask(server, max_retries=0)) == AB
    assert warnings_in(caplog) == []

@pytest.mark.parametrize("way", ["close", "drop", "break", "interrupt"])
@pytest.mark.parametrize("aggregated", [False, True])
def test_leaving_closes_the_socket(way, aggregated):
    with Server([UNFINISHED, HOLD]) as server:
        events = cs.aggregate(ask(server), deltas=True) if aggregated else ask(server)
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

def test_many_threads_at_once(caplog):
    results = []
    with Server([reply(PLAIN)]) as server:
        run = lambda: results.append(list(ask(server, max_retries=2)))  # noqa: E731
        for _ in range(2):  # the second time over kept connections
            threads = [threading.Thread(target=run) for _ in range(60)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
    assert results == [AB] * 120
    assert warnings_in(caplog) == []

@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connection():
    with Server([reply(PLAIN)]) as server:
        list(ask(server))
        child = os.fork()
        if not child:
            os._exit(list(ask(server)) != AB)
        assert os.waitpid(child, 0)[1] == 0
        list(ask(server))
    assert [r.connection for r in server.requests] == [1, 2, 1]

@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_that_closes_a_call_leaves_its_parents_alone():
    step, go_on = gate()
    with Server([UNFINISHED, step, chunked(sse(STOP)) + LAST]) as server:
        events = ask(server)
        assert next(events) == A
        child = os.fork()
        if not child:
            events.close()
            os._exit(0)
        os.waitpid(child, 0)
        go_on.set()
        assert list(events) == [END]

@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("start", [UNFINISHED, head("200 OK", "Connection: close") + sse(CA)])
def test_a_child_that_holds_the_descriptor_keeps_no_connection_open(start):
    """What is not kept is shut down before it is closed."""
    reader, writer = os.pipe()
    with Server([start, HOLD]) as server:
        events = ask(server)
        next(events)
        child = os.fork()
        if not child:
            os.read(reader, 1)
            os._exit(0)
        events.close()
        server.wait_for_leaving()
        os.write(writer, b"x")
        os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)

@needs_fork
def test_no_connection_is_open_at_exit():
    code = "import sys, chatstream as c; x = [c.stream('x', model='m', base_url=sys.argv[1])"
    code += " for _ in 'ab']; list(x[0]); next(x[1]); x.append(x)"  # outlives the modules
    with Server([reply(PLAIN)] * 2) as server:
        run = [sys.executable, "-W", "error", "-c", code, server.url]
        done = subprocess.run(run, cwd=HERE, capture_output=True, timeout=PATIENCE * 2)
        assert (done.returncode, done.stderr) == (0, b"")
        server.wait_for_leaving()

def test_sockets_have_keepalive(monkeypatch):
    seen = []
    real = http.client.HTTPConnection.getresponse

    def look(self):
        seen.append(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        if hasattr(socket, "TCP_KEEPIDLE"):
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                seen.append(self.sock.getsockopt(socket.IPPROTO_TCP, option))
        return real(self)

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", look)
    answers([reply(PLAIN)])
    assert seen[0]
    assert seen[1:] in ([], [30, 30])

def test_the_usual_ports(monkeypatch):
    made = []

    def make(host, port, **options):
        made.append((host, port))
        raise OSError("no")

    for name in ("HTTPConnection", "HTTPSConnection"):
        monkeypatch.setattr(http.client, name, make)
    for origin in ("http://h", "https://h", "https://h:444"):
        fails(ask(origin + "/v1"), cs.TransportError, f"{origin}/v1/chat")
    assert made == [("h", 80), ("h", 443), ("h", 444)]

class Recorded:
    """What a tool such as vcrpy puts in the place of a response: no file, no framing."""

    def __init__(self, status, body, way):
        self.status, self.reason, self.close = status, "", lambda: None
        self.headers = {"Transfer-Encoding": "chunked", "X-Request-Id": "r"}
        setattr(self, way, lambda size, file=io.BytesIO(body): file.read(size))

@pytest.mark.parametrize("way", ["read1", "read"])
def test_a_response_without_a_file(way, blocks, monkeypatch):
    recorded = [Recorded(200, PLAIN, way), Recorded(404, b'{"error":"gone"}', way)]
    stand_in = blocks([])
    monkeypatch.setattr(stand_in, "getresponse", lambda self: recorded.pop(0))
    assert list(ask(URL)) == [A, B, completed(request_id="r")]
    fails(ask(URL), cs.StatusError, status=404, message="gone")

# HTTP: framing, headers, compression

ONE = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'  # 0x2f bytes
LENGTH = f"Content-Length: {len(ONE)}"
TE = "Transfer-Encoding: chunked"
LAST = b"0\r\n\r\n"
KEPT, UNKEPT = "kept", "not kept"

#: (rule, header, bytes, whether the connection is kept, or words of the fault)
FRAMES = [
    ("one chunk", TE, chunked(ONE) + LAST, KEPT),
    ("chunks", TE, chunked(ONE[:9], ONE[9:10], ONE[10:]) + LAST, KEPT),
    ("zeros and capitals", TE, b"0002F\r\n" + ONE + b"\r\n000\r\n\r\n", KEPT),
    ("blanks and extensions", TE, b" 2f ;x=y;z\r\n" + ONE + b"\r\n0;q\r\n\r\n", KEPT),
    ("size lines in LF", TE, b"2f\n" + ONE + b"\r\n0\n\n", KEPT),
    ("all lines in LF", TE, b"2f\n" + ONE + b"\n0\n\n", KEPT),
    ("a size behind", TE, chunked(ONE) + LAST + b"7\r\n", UNKEPT),
    ("CR | LF", TE, chunked(*ONE.replace(b"[", b"[\r\ndata:").partition(b"\r")) + LAST, KEPT),
    ("trailers", TE, chunked(ONE) + b"0\r\nX: y\r\nZ: w\r\n\r\n", KEPT),
    ("sizes inside a chunk", TE, chunked(b"0\r\n\r\n" + ONE) + LAST, KEPT),
    ("a second reply behind", TE, chunked(ONE) + LAST + b"HTTP/1.1", UNKEPT),
    ("no terminator", TE, chunked(ONE), "without its last chunk"),
    ("inside a chunk", TE, b"99\r\n" + ONE, "inside a chunk"),
    ("between CR and LF", TE, chunked(ONE)[:-1], "without its last chunk"),
    ("inside a size", TE, chunked(ONE) + b"1", "without its last chunk"),
    ("inside a trailer", TE, chunked(ONE) + b"0\r\nX:", "without its last chunk"),
    ("a chunk too long", TE, b"2f\r\n" + ONE + b"x\r\n0\r\n\r\n", "longer than its size"),
    ("negative", TE, chunked(ONE) + b"-5\r\nabc", "'-5"),
    ("0x", TE, chunked(ONE) + b"0x1\r\na\r\n", "'0x1"),
    ("underscore", TE, chunked(ONE) + b"1_0\r\n", "'1_0"),
    ("words", TE, chunked(ONE) + b"zz\r\nabc", "'zz"),
    ("no size", TE, chunked(ONE) + b"\r\n", "chunk size"),
    ("17 digits", TE, chunked(ONE) + b"0" * 17 + b"\r\na", "chunk size"),
    ("length", LENGTH, ONE, KEPT),
    ("length, more behind", LENGTH, ONE + b"de", UNKEPT),
    ("length, short", "Content-Length: 99", ONE, "short of its Content-Length"),
    ("to the end", "X: y", ONE, UNKEPT),
    ("capitals and blanks", "Transfer-Encoding: CHUNKED \t", chunked(ONE) + LAST, KEPT),
    ("behind identity", "Transfer-Encoding: identity, chunked", chunked(ONE) + LAST, KEPT),
    ("behind nothing", "Transfer-Encoding: , chunked", chunked(ONE) + LAST, KEPT),
    ("twice", f"{TE}\r\n{TE}", chunked(ONE) + LAST, KEPT),
    ("beside a length", f"{TE}\r\nContent-Length: 7", chunked(ONE) + LAST, KEPT),
    ("identity alone", f"Transfer-Encoding: identity\r\n{LENGTH}", ONE, KEPT),
    ("one length twice", f"{LENGTH}\r\n{LENGTH}", ONE, KEPT),
]

@pytest.mark.parametrize("row, header, raw, end", FRAMES, ids=ids(FRAMES))
def test_framing_at_every_cut(row, header, raw, end, blocks):
    """What is behind the end in one block is seen; so all cuts are before it."""
    for pieces in cuts(raw):
        if end == UNKEPT and header != "X: y":
            pieces = [raw]
        connection = blocks([piece for piece in pieces if piece], header)
        got, failure = collect(ask(URL))
        assert got[:1] == [A], pieces
        if end in (KEPT, UNKEPT):
            assert failure is None
            assert (connection.closed == 0) is (end == KEPT), pieces
        else:
            fails((got, failure), cs.TruncatedStreamError, end, got=[A])
            assert connection.closed == 1

def test_a_connection_is_not_kept_while_tls_holds_more(blocks):
    for pending, closed in ((0, 0), (5, 1)):
        connection = blocks([chunked(ONE) + LAST], TE, pending=pending)
        assert list(ask(URL))[0] == A
        assert connection.closed == closed

def test_a_line_of_the_framing_has_an_end(blocks):
    for endless in (b"1;" + b"x" * 17_000, b"0\r\n" + b"a" * 17_000):
        blocks([bytes([byte]) for byte in endless], TE)
        assert "more than 16384 bytes" in str(collect(ask(URL))[1])

GZIP = gzip.compress(PLAIN)

#: (rule, bytes, events, class of the error)
PACKED = [
    ("gzip", GZIP, AB, None),
    ("zlib", zlib.compress(PLAIN), AB, None),
    ("plain, which begins like zlib", b"x" + b"\n" + PLAIN, AB, None),
    ("padding behind", GZIP + b"\0" * 99, AB, None),
    ("junk behind", GZIP + b"junk" + GZIP, AB, None),
    ("a byte behind", GZIP + b"\x1f", AB, None),
    ("cut", gzip.compress(sse(CA))[:-9], [A], cs.TruncatedStreamError),
    ("cut behind the finish", gzip.compress(sse(CA, STOP))[:-9], [A, END], None),
    ("one byte", b"\x1f", [], cs.TruncatedStreamError),
    ("a wrong checksum", gzip.compress(sse(CA))[:-8] + b"\0" * 8, [A], cs.StreamError),
    ("a wrong checksum behind the finish", gzip.compress(sse(CA, STOP))[:-8] + b"\0" * 8, [A, END],
     None),
    ("nonsense", b"\x1f\x8bxxxxxxxx", [], cs.StreamError),
    ("plain text behind (HAProxy 2.6, when its server cuts)", FLUSHED + sse(CB, CB), [A],
     cs.StreamError),
]

@pytest.mark.parametrize("row, raw, events, kind", PACKED, ids=ids(PACKED))
def test_compression_at_every_cut(row, raw, events, kind):
    """The body is believed, not the header, which proxies leave there."""
    for pieces in cuts(raw):
        assert outcome(cs.decode(pieces)) == (events, kind), pieces

@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "none", "utf-8"])
@pytest.mark.parametrize("wbits", [31, 15, 0])
def test_each_event_comes_out_of_compression_when_it_arrives(encoding, wbits):
    start, rest = PLAIN, b""
    if wbits:
        packer = zlib.compressobj(wbits=wbits)
        start = packer.compress(PLAIN) + packer.flush(zlib.Z_SYNC_FLUSH)
        rest = chunked(packer.flush())
    step, go_on = gate()
    first = head("200 OK", TE, f"Content-Encoding: {encoding}")
    with Server([first + chunked(start[:1], start[1:2], start[2:]), step, rest + LAST]) as server:
        events = ask(server)
        assert [next(events), next(events)] == [A, B]
        go_on.set()
        assert list(events) == [END]

# ---- What a call ends in -------------------------------------------------------------

STRICT, N2, AGAIN = {"strict": True}, {"n": 2}, {"max_retries": 1}
IDLE, UNTIL = {"idle_timeout": LATER}, {"deadline": LATER}
CUT, BROKEN, ONLY_A = cs.TruncatedStreamError, cs.TransportError, sse(CA)
STATUS, LIMIT, LATE = cs.StatusError, cs.RetryLimitError, cs.DeadlineError
TWO = sse(CA, C("b", index=1), STOP, C(finish="stop", index=1), DONE)
BOTH = Completed("c1", "m1", "stop", {0: "stop", 1: "stop"})
SPENT = {"error": {"message": "pay", "code": "insufficient_quota"}}
LIMITED = {"error": {"message": "m", "code": 429}}
NO_REQUEST = "X-Should-Retry: false"

def first_word(code, kind=None):
    return [reply(sse({"error": {"message": "boom", "code": code, "type": kind}}))]

#: (script of all requests, options, events, class of the error, words in it, requests)
CALLS = [
    ([reply(PLAIN, type=None)], {}, AB, None, "", 1),
    ([reply(PLAIN, type="text/html")], {}, AB, None, "", 1),
    ([head("103 Early Hints", "Link: </x>", type=None) * 3 + reply(PLAIN)], {}, AB, None, "", 1),
    ([head("102 Processing", type=None) + reply(PLAIN)], {}, AB, None, "", 1),
    ([head("100 Continue", type=None) + sized(PLAIN)], {}, AB, None, "", 1),
    ([sized(b"", type=None)], {}, [Completed()], None, "", 1),
    ([reply(type=None)], {}, [Completed()], None, "", 1),
    ([head("200 OK") + b": x\n\n", CLOSE], {}, [Completed()], None, "", 1),
    ([head("204 No Content", type=None)], {}, [Completed()], None, "", 1),
    # The end of an answer
    ([reply(b"")], STRICT, [], CUT, "without a finish_reason", 1),
    ([reply(ONLY_A)], {**STRICT, **AGAIN}, [A], CUT, "without a finish_reason", 1),
    ([reply(ONLY_A + sse(DONE))], STRICT, [A], CUT, "without a finish_reason", 1),
    ([FINISHED, CLOSE], {}, [A, END], None, "", 1),
    ([FINISHED, RESET], {}, [A, END], None, "", 1),
    ([FINISHED, CLOSE], STRICT, [A], CUT, "cut", 1),
    ([FINISHED, RESET], STRICT, [A], CUT, "cut", 1),
    ([FINISHED, HOLD], IDLE, [A, END], None, "", 1),
    ([FINISHED, HOLD], {**IDLE, **STRICT}, [A], cs.IdleTimeoutError, "idle_timeout", 1),
    ([FINISHED, HOLD], UNTIL, [A, END], None, "", 1),
    ([FINISHED, HOLD], {**UNTIL, **STRICT}, [A], LATE, "deadline", 1),
    ([FINISHED, CLOSE], N2, [A], CUT, "cut", 1),  # the second choice never began
    ([reply(sse(CA, STOP))], N2, [A, END], None, "", 1),  # a proper end is no cut
    ([CHUNKED + chunked(TWO[:-40]), HOLD], {**IDLE, **N2}, [A, TextDelta("b", 1)],
     cs.IdleTimeoutError, "", 1),
    ([reply(TWO)], N2, [A, TextDelta("b", 1), BOTH], None, "", 1),
    ([reply(TWO)], {"extra_body": N2}, [A, TextDelta("b", 1), BOTH], None, "", 1),
    # Foundry Local and old TGI count tokens in the index: one choice unless asked.
    *(([reply(TWO)], n, AB, None, "", 1) for n in ({}, {"n": 1}, {"n": None})),
    # One answer in two choices (Copilot: the text in one, the calls in the other)
    ([reply(sse({"choices": [{"index": 0, "delta": {"content": "a"}},
     {"index": 1, "delta": {"refusal": "n"}}]}))], {}, [A, RefusalDelta("n"), Completed()], None, "", 1),
    # Half a line at a cut is no skipped data, and no last word
    ([CHUNKED + chunked(sse(CA, STOP) + b'data: {"cho'), CLOSE], {}, [A, END], None, "", 1),
    *(([CHUNKED + chunked(ONLY_A + b"data: " + half), CLOSE], options, [A], CUT, "cut", 1)
      for half in (b"1", b'{"cho', b"words", b'{"error": "x') for options in ({}, STRICT)),
    # Compression
    ([reply(gzip.compress(sse(CA, STOP))[:-8] + b"\0" * 8)], STRICT, [A], cs.StreamError,
     "compression is broken", 1),
    ([reply(b"x" * 2000, "200 OK", "Content-Encoding: br")], {}, [], cs.StreamError, "br", 1),
    ([error("400 Bad", gzip.compress(b'{"error": "too long"}'))], {}, [], STATUS, "too long", 1),
    # Headers and first lines
    *(([head("200 OK", f"Transfer-Encoding: {te}") + b"x", CLOSE], AGAIN, [], cs.StreamError,
       "gzip|br", 1) for te in ("gzip, chunked", "chunked, br", "gzip")),
    *(([f"HTTP/1.1 200 OK\r\n{fault}\r\nX: y\r\n\r\n".encode() + PLAIN, CLOSE], {}, [], BROKEN, "", 1)
      for fault in ("Bad header", "Bad : 1", "Content-Length: 5\r\nContent-Length: 6",
       " folded: first", "Content-Length: -1", "Content-Length: 1x", "Content-Length: " + "1" * 19)),
    ([b"SSH-2.0-OpenSSH\r\n", CLOSE], {}, [], BROKEN, "reply in HTTP/1.1, got 'SSH-2.0", 1),
    ([b"HTTP/2 200\r\n\r\n", CLOSE], {}, [], BROKEN, "reply in HTTP/1.1, got .*HTTP/2", 1),
    ([b"\x15\x03\x03\x00\x02\x02\x16", CLOSE], {}, [], BROKEN, r"got '\\x15\\x03\\x03", 1),
    ([CLOSE], {}, [], BROKEN, "^((?!reply in HTTP).)*$", 1),
    # Statuses
    ([head("304 No", type=None)], {}, [], STATUS, "304((?!Location).)*$", 1),
    ([head("101 No", type=None), CLOSE], {}, [], STATUS, "101", 1),
    ([error("503 ", b"")], {}, [], LIMIT, "503 from .*/v1/chat/completions: Service Unavailable$",
     1),
    ([error("599 ", b"")], {}, [], LIMIT, "599 from .*/v1/chat/completions$", 1),
    ([error("401 No", {"error": "who"})], {}, [], STATUS, "who .no key was sent", 1),
    ([error("401 No", {"error": "who"})], {"api_key": KEY}, [], STATUS, "who$", 1),
    ([error("401 No", {"error": "who"})], {"headers": {"api-key": KEY}}, [], STATUS, "who$", 1),
    ([error("401 No", {"error": "ollama"})], {"api_key": "ollama"}, [], STATUS, "ollama$", 1),
    ([error("404 No", {})], {}, [], STATUS, "No$", 1),
    ([error("307 No", {}, "Location: http://x/v2?k=abc")], AGAIN, [], STATUS,
     "Location: http://x/v2.$", 1),
    ([reply(b"", "302 No", "Location: http://bob:hidden@x/a")], {}, [], STATUS,
     "Location: http://x/a", 1),
    ([reply(b"", "300 No", "Location: /x")], {}, [], STATUS, "Location: /x", 1),
    # Tries
    ([error("500 No", {}, NO_REQUEST)], AGAIN, [], STATUS, "500", 1),
    ([error("400 No", {}, "X-Should-Retry: true \t")], AGAIN, [], LIMIT, "400.*2 attempts", 2),
    ([error("429 No", {}, "Retry-After: 9999")], AGAIN, [], LIMIT, "429", 1),
    ([error("429 No", gemini("9999s"))], AGAIN, [], LIMIT, "429", 1),
    *(([error("429 No", body, "x-should-retry: true")], AGAIN, [], STATUS, "pay", 1)
      for body in (SPENT, {"error": {"message": "pay", "type": "insufficient_quota"}},
       {"detail": SPENT}, {"error": json.dumps(SPENT)}, {"errors": [SPENT["error"]]})),
    *((first_word(*word), AGAIN, [], cs.ServerError, "boom", 2)
      for word in ((429,), ("503",), (408,), ("server_error",), (None, "server_error"),
       ("overloaded_error",), (None, "rate_limit_error"), ("rate_limit_exceeded",))),
    *((first_word(*word), AGAIN, [], cs.ServerError, "boom", 1)
      for word in ((400,), ("x", "y"), (5,), (200,), (429, "insufficient_quota"))),
    ([reply(sse(LIMITED), "200 OK", NO_REQUEST)], AGAIN, [], cs.ServerError, "m .code 429", 1),
    ([reply(sse(CA, LIMITED))], AGAIN, [A], cs.ServerError, "m", 1),
    ([RESET], {}, [], BROKEN, "", 1),
    ([HOLD], {**IDLE, **AGAIN}, [], cs.IdleTimeoutError, "before the headers", 1),
    # The deadline holds while bytes come
    ([CHUNKED, pour(chunked(b": x\n\n"), 0.01)], UNTIL, [], LATE, "deadline", 1),
    ([head("200 OK"), pour(b": x\n" * 20_000)], UNTIL, [], LATE, "deadline", 1),
    ([CHUNKED, pour(chunked(gzip.compress(b": x\n" * 9_000_000)))], UNTIL, [], LATE, "deadline", 1),
]

@pytest.mark.parametrize("script, options, events, kind, words, requests", CALLS)
def test_what_a_call_ends_in(script, options, events, kind, words, requests, sleeps, caplog):
    caplog.set_level(logging.DEBUG)
    with Server(script) as server:
        failure = fails(ask(server, **options), kind or type(None), got=events)
    assert re.search(words, str(failure))
    assert len(server.requests) == requests
    assert not re.search("hidden|abc", str(failure))
    if getattr(failure, "attempts", requests) != requests:
        assert failure.attempts == requests
    if script[0] == reply(PLAIN, type=None):  # a call that goes well is quiet
        assert {r.levelno for r in caplog.records} == {logging.DEBUG}

# ---- pool=: a urllib3 manager of the caller's ----------------------------------------

@pytest.fixture
def pool():
    if urllib3 is None:
        pytest.skip("urllib3 is not installed")
    with urllib3.PoolManager(maxsize=1, block=True, headers={"X-Mine": "1"}) as manager:
        yield manager

@pytest.mark.parametrize("script, options, events, kind", [
    ([reply(PLAIN)], {}, AB, None),
    ([reply(GZIP, "200 OK", "Content-Encoding: gzip")], {}, AB, None),
    ([head("103 Early", type=None) * 2 + sized(PLAIN)], {}, AB, None),
    ([error("400 Bad", {"error": "no"})], {}, [], STATUS),
    ([UNFINISHED, CLOSE], {}, [A], CUT),
    ([UNFINISHED, RESET], {}, [A], CUT),
    ([CHUNKED + b"zz\r\n", CLOSE], {}, [], BROKEN),
    ([b"HTTP/1.1 200 OK\r\n\r\n", CLOSE], {}, [], BROKEN),
    ([b"HTTP/1.1 200 OK\r\nBad header\r\n\r\n", CLOSE], {}, [], BROKEN),
    ([RESET], {}, [], BROKEN),
    ([HOLD], IDLE, [], cs.IdleTimeoutError),
    ([UNFINISHED, HOLD], IDLE, [A], cs.IdleTimeoutError),
    ([HOLD], UNTIL, [], LATE),
    ([UNFINISHED, HOLD], UNTIL, [A], LATE),
])
def test_pool_does_what_our_own_connections_do(pool, script, options, events, kind):
    with Server(script) as server:
        for _ in range(2):  # a blocking pool of one: each call gives its place back
            assert outcome(ask(server, pool=pool, **options)) == (events, kind)
        assert server.connections == (1 if kind in (None, STATUS) else 2)

def test_pool_without_the_private_name_the_public_read1_serves(pool, monkeypatch):
    if not hasattr(urllib3.response.HTTPResponse, "read1"):  # 1.26 has none
        pytest.skip("this urllib3 has no read1()")
    real = urllib3.HTTPConnectionPool.urlopen

    def urlopen(*args, **kwargs):
        response = real(*args, **kwargs)
        response._original_response = None
        return response

    monkeypatch.setattr(urllib3.HTTPConnectionPool, "urlopen", urlopen)
    with Server([reply(PLAIN)], [UNFINISHED, CLOSE], [error("400 No", {})]) as server:
        assert list(ask(server, pool=pool)) == AB
        assert outcome(ask(server, pool=pool)) == ([A], cs.TruncatedStreamError)
        assert outcome(ask(server, pool=pool)) == ([], cs.StatusError)

def test_pool_keeps_its_headers_and_ours_come_on_top(pool):
    pool.headers["user-agent"] = "p"
    with Server([reply(PLAIN)]) as server:
        list(ask(server, pool=pool))
    assert pool.headers == {"X-Mine": "1", "user-agent": "p"}
    assert server.requests[0].header("X-Mine") == "1"
    assert server.requests[0].header("User-Agent") == f"chatstream/{cs.__version__}"

@pytest.mark.parametrize("bad", [[RESET], [error("503 Busy", {}, "Retry-After: 7")]])
def test_pool_tries_again(pool, bad, sleeps):
    with Server(bad, [reply(PLAIN)]) as server:
        assert list(ask(server, pool=pool, max_retries=1)) == AB
    assert sleeps == [0.2 if bad == [RESET] else 7.0]

def test_pool_that_is_in_use_is_waited_for_no_longer_than_connect_timeout(pool):
    with Server([UNFINISHED, HOLD]) as server:
        first = ask(server, pool=pool)
        next(first)
        fails(ask(server, pool=pool, connect_timeout=SOON), cs.TransportError)
        first.close()

def test_pool_and_cancel(pool):
    """It waits for the headers, and ends a wait in the body."""
    step, go_on = gate()
    with Server([step, UNFINISHED, HOLD], [UNFINISHED, HOLD]) as server:
        call = ask(server, pool=pool)
        thread = cancel_soon(call, server)
        opener = threading.Thread(target=lambda: (thread.join(), go_on.set()))
        opener.start()
        assert outcome(call) == ([], cs.CancelledError)
        opener.join()
        call = ask(server, pool=pool)
        assert next(call) == A
        cancelled(call)

@pytest.mark.skipif(urllib3 is None, reason="urllib3 is not installed")
def test_pool_that_is_a_proxy_is_named():
    secret = {"Proxy-Authorization": f"Basic {KEY}"}
    with Server([error("502 Bad", {"error": f"upstream {KEY}"})]) as proxy:
        url = f"http://bob:hidden@127.0.0.1:{proxy.port}"
        with urllib3.ProxyManager(url, proxy_headers=secret) as manager:
            call = ask("http://upstream.test/v1", pool=manager)
            failure = fails(call, LIMIT, f"through the proxy http://127.0.0.1:{proxy.port}",
                            message="upstream ***")
    assert not re.search(f"hidden|{KEY}", everything_about(failure))

# ---- Proxies -------------------------------------------------------------------------

UPSTREAM = "http://upstream.test/v1"

@pytest.mark.parametrize("name, value", [
    ("HTTP_PROXY", "http://127.0.0.1:{}"), ("http_proxy", "http://127.0.0.1:{}"),
    ("all_proxy", "127.0.0.1:{}"), ("HTTP_PROXY", "http://bob:p%40ss@127.0.0.1:{}"),
    ("HTTP_PROXY", f"http://{os.fsdecode(bytes([0xE9]))}:hidden@127.0.0.1:{{}}"),
])
def test_an_http_proxy_gets_an_absolute_request(name, value, monkeypatch):
    with Server([reply(PLAIN)]) as proxy:
        monkeypatch.setenv(name, value.format(proxy.port))
        assert list(ask(UPSTREAM, headers={"accept": "x/y"})) == AB
    (request,) = proxy.requests
    assert request.target == "http://upstream.test/v1/chat/completions"
    sent = {name.lower(): value for name, value in request.headers}
    assert len(sent) == len(request.headers)
    assert (sent["host"], sent["accept"]) == ("upstream.test", "x/y")
    user = {"bob": b"bob:p@ss", "hidden": b"\xe9:hidden"}
    given = next((user[word] for word in user if word in value), b"")
    assert base64.b64decode(sent.get("proxy-authorization", "").partition(" ")[2]) == given

@pytest.mark.parametrize("host, no_proxy, direct", [
    *(("api.x.test", names, True) for names in ("x.test", ".x.test", "*.x.test")),
    ("apix.test", "x.test", False),
    *(("x.test", names, True) for names in ("a.test, X.TEST", "x.test:80", "*")),
    *(("x.test", names, False) for names in ("x.test:81", "")),
    *(("10.1.2.3", names, True) for names in (
        "10.0.0.0/8", "10.1.2.3", " * ", "10.1.2.3:9, 10.1.2.3:80")),
    *(("10.1.2.3", names, False) for names in ("1.2.3", "10.1.2.3:9")),
    ("11.1.2.3", "10.0.0.0/8,nonsense/99", False),
    ("[fd00::5]", "fd00::/8", True), ("[fe80::5]", "fd00::/8", False),
    *((host, "", True) for host in (
        "localhost", "127.0.0.1", "127.8.9.1", "[::1]", "0.0.0.0", "[::]")),
    ("127.0.0.1.test", "", False),
])
def test_who_goes_past_the_proxy(host, no_proxy, direct, monkeypatch):
    """Loopback does, and what servers print as their address, `0.0.0.0` and `[::]`."""
    made = []

    class Connection(http.client.HTTPConnection):
        def __init__(self, host, *args, **options):
            made.append(host)
            raise ConnectionRefusedError("here")

    monkeypatch.setattr(http.client, "HTTPConnection", Connection)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    _, failure = collect(ask(f"http://{host}/v1"))
    assert made == [host.strip("[]") if direct else "proxy.test"]
    assert ("through the proxy http://proxy.test:3128" in str(failure)) is not direct

@pytest.mark.parametrize("variable, url, target, words", [
    ("ALL_PROXY", "socks5h://u:hidden@127.0.0.1:9", UPSTREAM, "socks5h.*pool=.*SOCKSProxyManager"),
    ("HTTPS_PROXY", "https://u:hidden@127.0.0.1:9", "https://u.test",
     "https://.*pool=.*ProxyManager"),
    *(("HTTP_PROXY", url, UPSTREAM, "HTTP_PROXY or ALL_PROXY is not valid") for url in (
        "http://u:hid#den@127.0.0.1:1", "http://bob:hid\uff1aden@127.0.0.1:1", '"http://hidden:1"',
        "http://hid:12/34@127.0.0.1:1", "http://hid:12?34@127.0.0.1:1")),
])
def test_a_proxy_that_cannot_be_used(variable, url, target, words, monkeypatch):
    monkeypatch.setenv(variable, url)
    failure = fails(ask(target, max_retries=3), cs.TransportError, attempts=1)
    assert re.search(words, str(failure))
    assert "hid" not in everything_about(failure)

def test_a_proxy_is_named_in_errors_and_its_secrets_are_hidden(monkeypatch):
    said = {"error": "Basic Ym9iOmhpZGRlbi1wYXNzd29yZA== is hidden-password"}
    scripts = [error("502 Bad", said)], [CLOSE], [reply(sse("x"))], [error("407 No", said)]
    with Server(*scripts) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://bob:hidden-password@127.0.0.1:{proxy.port}")
        for _ in scripts:
            failure = collect(ask(UPSTREAM))[1]
            assert not re.search("hidden|Ym9i", everything_about(failure))
            if type(failure) is not cs.StreamError:
                assert f"through the proxy http://127.0.0.1:{proxy.port}" in str(failure)

@pytest.mark.parametrize("status, times", [("407 No", 1), ("403 No", 1), ("502 Bad", 3)])
def test_a_proxy_whose_connect_is_refused(status, times, monkeypatch, sleeps):
    """And no socket stays open (before CPython 3.11.4 http.client leaves one)."""
    with Server([head(status, "Content-Length: 0"), HOLD]) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://bob:hidden@127.0.0.1:{proxy.port}")
        failure = fails(ask("https://upstream.test/v1", max_retries=2), BROKEN, status[:3])
        proxy.wait_for_leaving(times)
    gc.collect()
    assert proxy.connections == times
    assert "hidden" not in everything_about(failure)

# ---- TLS -----------------------------------------------------------------------------

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
            "-subj", "/CN=Test CA", "-config", "ca.cnf", "-extensions", "ca")
    for name, place in ("good", "IP:127.0.0.1,DNS:upstream.test"), ("wrong", "DNS:other.test"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr",
                "-subj", f"/CN={name}", "-config", "ca.cnf")
        (folder / "ext").write_text(f"subjectAltName={place}\nauthorityKeyIdentifier=keyid\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", f"{name}.pem")

    def context(name):
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
        return made

    return folder, context

@pytest.fixture
def tls(certificates, monkeypatch):
    """-> the context of a server that we trust."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0] / "ca.pem"))
    return certificates[1]("good")

@pytest.fixture
def fresh_context():
    """Contexts are cached by the files; here each is made anew."""
    cs._tls_context.cache_clear()
    yield
    cs._tls_context.cache_clear()

@pytest.mark.parametrize("name, words", [("good", "SSL_CERT_FILE"), ("wrong", "certificate")])
def test_tls_with_a_certificate_that_is_not_trusted(name, words, certificates, monkeypatch, sleeps):
    if name == "wrong":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0] / "ca.pem"))
    with Server([reply(PLAIN)], tls=certificates[1](name)) as server:
        fails(ask(server, max_retries=3), cs.TransportError, words, attempts=1)
    assert sleeps == server.requests == []

def test_tls_to_a_server_that_speaks_none_asks_for_http(sleeps):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            sock, _ = listener.accept()
            with sock:
                sock.recv(9999)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        fails(ask(url, max_retries=3), cs.TransportError, "is it http://?", attempts=1)

def test_tls_alerts_are_final(tls, certificates, sleeps):
    tls.verify_mode = ssl.CERT_REQUIRED  # asks for a certificate that we do not have
    tls.load_verify_locations(certificates[0] / "ca.pem")
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    with Server([reply(PLAIN)], tls=tls) as server:
        fails(ask(server, max_retries=3), cs.TransportError, attempts=1)

@pytest.mark.parametrize("phase", ["headers", "body"])
def test_tls_idle_timeout_cut_and_cancel(phase, tls):
    script, events = PHASES[phase]
    with Server(script, script, [UNFINISHED, CLOSE], tls=tls) as server:
        assert outcome(ask(server, idle_timeout=LATER)) == (events, cs.IdleTimeoutError)
        call = ask(server)
        assert [next(call) for _ in events] == events
        cancelled(call, server)
        assert outcome(ask(server)) == ([A], cs.TruncatedStreamError)

def relay(upstream_port):
    """What a proxy does after CONNECT."""

    def run(sock, file):
        with socket.create_connection(("127.0.0.1", upstream_port)) as upstream:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")

            def back():
                with contextlib.suppress(OSError):
                    while data := upstream.recv(65536):
                        sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)

            threading.Thread(target=back, daemon=True).start()
            with contextlib.suppress(OSError):
                while data := file.read1(65536):
                    upstream.sendall(data)

    return [run, CLOSE]

def test_tls_to_a_proxy_for_http(tls, monkeypatch):
    with Server([reply(PLAIN)], tls=tls) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"https://127.0.0.1:{proxy.port}")
        assert list(ask(UPSTREAM)) == AB
    assert proxy.requests[0].target == f"{UPSTREAM}/chat/completions"

def test_tls_through_a_proxys_tunnel(tls, monkeypatch):
    with Server([reply(PLAIN)], tls=tls) as server:
        with Server(relay(server.port)) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://bob:pass@127.0.0.1:{proxy.port}")
            url = f"https://upstream.test:{server.port}/v1"
            assert [list(ask(url, api_key=KEY)) for _ in range(2)] == [AB, AB]
            cs._close_idle()
    (connect,) = proxy.requests
    assert (connect.method, connect.target) == ("CONNECT", f"upstream.test:{server.port}")
    assert connect.header("Proxy-Authorization") == "Basic Ym9iOnBhc3M="
    assert connect.header("Authorization") is None
    assert server.requests[0].header("Authorization") == f"Bearer {KEY}"
    assert server.requests[0].header("Proxy-Authorization") is None

@pytest.mark.parametrize("content", [None, "no certificate"])
def test_tls_certificate_file_that_cannot_be_read(content, monkeypatch, tmp_path, sleeps):
    file = tmp_path / "ca.pem"
    if content:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    fails(ask("https://127.0.0.1:9/v1", max_retries=3), cs.TransportError, str(file), attempts=1)

class BareContext(ssl.SSLContext):
    """What create_default_context() gives where there is no store of authorities."""

    counted = {"x509_ca": 0}

    def load_default_certs(self, *args):
        pass

    def cert_store_stats(self):
        if self.counted is None:  # truststore asks the system
            raise NotImplementedError
        return self.counted

@pytest.mark.parametrize("way", ["certifi", "truststore", "none"])
def test_tls_without_authorities(way, certificates, monkeypatch, tmp_path, fresh_context):
    """As in python.org's builds for macOS, and in bare containers. truststore's context,
    which many companies inject, cannot count them and is asked."""
    file, context = certificates[0] / "ca.pem", BareContext(ssl.PROTOCOL_TLS_CLIENT)
    if way == "truststore":
        monkeypatch.setattr(BareContext, "counted", None)
        context.load_verify_locations(file)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setattr(ssl, "create_default_context", lambda: context)
    fake = types.SimpleNamespace(where=lambda: str(file)) if way == "certifi" else None
    monkeypatch.setitem(sys.modules, "certifi", fake)
    with Server([reply(PLAIN)], tls=certificates[1]("good")) as server:
        call = ask(server, max_retries=2)
        if way == "none":
            fails(call, cs.TransportError, "install certifi", attempts=1)
        else:
            assert list(call) == AB

@pytest.mark.parametrize("fault", [ssl.SSLError("nested asn1 error"), PermissionError("keylog")])
def test_tls_default_context_that_raises(fault, tls, monkeypatch, caplog, fresh_context):
    """A bad certificate in Windows' store; SSLKEYLOGFILE that cannot be written."""
    monkeypatch.setattr(ssl, "create_default_context", raiser(fault))
    with Server([reply(PLAIN)], tls=tls) as server:
        assert [list(ask(server, max_retries=2)) for _ in range(2)] == [AB, AB]
    warned(caplog, str(fault))

def test_tls_strict_checks_get_a_hint(monkeypatch):
    """Python 3.13 checks strictly, and many companies' authorities fail that."""
    fault = ssl.SSLCertVerificationError(1, "Missing Authority Key Identifier")
    monkeypatch.setattr(http.client.HTTPSConnection, "connect", raiser(fault))
    failure = fails(ask("https://127.0.0.1:9/v1", max_retries=2), cs.TransportError, attempts=1)
    assert re.search("pool=.*VERIFY_X509_STRICT", str(failure))

# ---- Secrets, and tracebacks ---------------------------------------------------------

@pytest.mark.parametrize("script", [
    [error("401 No", {"error": {"message": f"bad key {KEY}", "raw": [KEY]}}, f"X-Echo: {KEY}")],
    [error("500 No", f"your key {KEY} and token-in-url".encode())],
    [error("302 Moved", {}, f"Location: http://u:{KEY}@x/y?key={KEY}")],
    [error("302 Moved", {}, f"Location: http://us/er:{KEY}@x/y#{KEY}")],
    [reply(sse({"error": {"message": KEY, KEY: KEY, "code": KEY, "type": KEY}}))],
    [reply(sse(f"{{bad {KEY}"))], [reply(f"<html>{KEY}".encode())], [reply(sse(CA) + KEY.encode())],
    [reply(sse(CA, C(finish=KEY + "error\x1b[31m")))],
    [reply(sse(C(finish=KEY)), "200 OK", f"X-Request-Id: {KEY}")],
    [RESET], [UNFINISHED, CLOSE],
    [f"Bearer {KEY}\r\n\r\n".encode(), CLOSE],
    [UNFINISHED + f"{KEY}\r\n".encode(), CLOSE],
    [head("200 OK", f"Transfer-Encoding: {KEY}"), CLOSE],
])
@pytest.mark.parametrize("strict", [True, False])
def test_no_secret_in_any_error_or_log(script, strict, caplog, sleeps):
    caplog.set_level(logging.DEBUG)
    with Server(script) as server:
        call = ask(server.url + "?key=token-in-url", api_key=KEY, strict=strict, max_retries=1,
                   extra_body={"key": KEY})
        _, failure = collect(cs.aggregate(call))
    assert "\n" not in str(failure)
    for text in (everything_about(failure), logged(caplog)):
        assert not re.search(f"{KEY}|token-in-url|\x1b", text)

@pytest.mark.parametrize("options, said, shown", [
    ({"api_key": "sk/abc/defghij"}, '"sk\\/abc\\/defghij"', "***"),
    ({"api_key": 'quote"d-secret'}, json.dumps('quote"d-secret'), "***"),
    ({"api_key": "12345678"}, '"12345678"', "***"),
    ({"api_key": "1234567"}, '"1234567"', "1234567"),  # a dummy, as "ollama" is
    ({"headers": {"X-Token": "Bearer very-secret"}}, '"very-secret"', "***"),
    ({"headers": {"X-Other": "no-secret-at-all"}}, '"no-secret-at-all"', "no-secret-at-all"),
    ({"api_key": KEY, "headers": {"x-key": KEY + "-x"}}, f'"{KEY}-x and {KEY}"', "*** and ***"),
    ({"base_url": "?q=query%2Fsecret"}, '"query%2Fsecret query/secret"', "*** ***"),
])
def test_all_forms_of_a_secret_are_hidden(options, said, shown):
    body = f'{{"error":{{"message":{said}}}}}'.encode()
    with Server([error("401 No", body)], [reply(b"data: " + body + b"\n\n")]) as server:
        options = {**options, "base_url": server.url + options.get("base_url", "")}
        for _ in range(2):
            assert collect(ask(server, **options))[1].message == shown

def test_a_secret_is_hidden_as_php_writes_it():
    body = b'{"error": "bad key sk-se\\/cret-0123456789"}'
    _, failure = answers([error("400 Bad", body)], api_key="sk-se/cret-0123456789")
    assert "cret-0123" not in everything_about(failure)

@pytest.mark.parametrize("wrap", [
    {"error": {"message": "m", "code": 20241021}}, {"error": {"message": "m", "at": [20241021]}},
])
def test_a_secret_that_is_a_number_breaks_nothing(wrap):
    """Azure's dated versions stand in the query, whose values are secrets."""
    with Server([reply(sse(wrap))], [error("400 No", wrap)]) as server:
        for kind in (cs.ServerError, cs.StatusError):
            fails(ask(server.url + "?v=20241021"), kind, message="m")

def test_no_half_of_a_secret_stands_at_a_cut(caplog):
    """Texts are hidden first, and cut later."""
    caplog.set_level(logging.DEBUG)
    for size in (150, 190, 1990, 3990):
        text = "x " * (size // 2) + KEY + "y" * 5000
        scripts = [reply(sse(CA, text, STOP))], [reply(text.encode())], [text.encode(), CLOSE]
        more = [reply(sse({"error": text}))], [error("400 No", text.encode())]
        with Server(*scripts, *more) as server:
            for _ in (*scripts, *more):
                _, failure = collect(ask(server, text, api_key=KEY))
                assert KEY[:6] not in everything_about(failure) + logged(caplog)

def frames_of(error):
    """The frames of an error, its causes and contexts, as tools show them."""
    pending, seen = [error], []
    while pending:
        item = pending.pop()
        if item is None or item in seen:
            continue
        seen.append(item)
        pending += [item.__cause__, item.__context__]
        for frame, _ in traceback.walk_tb(item.__traceback__):
            if frame.f_code.co_filename == cs.__file__:
                yield frame
    assert KEY not in "".join(traceback.format_exception(type(error), error, error.__traceback__))

def check_frames(frames):
    for frame in frames:
        shown = {name: repr(value) for name, value in frame.f_locals.items()}
        assert KEY not in str(shown), (frame.f_code.co_name, shown)
        for value in frame.f_locals.values():
            if isinstance(value, dict):
                assert KEY not in str([*value.values()])

@pytest.mark.parametrize("function", [cs.stream, cs.complete])
@pytest.mark.parametrize("script, changed", [
    ([CLOSE], {"base_url": URL}),
    ([CLOSE], {"max_retries": -1}),
    ([CLOSE], {"top_p": {1}}),
    ([CLOSE], {"provider": "groq", "api_key": ""}),
    ([error("401 No", {})], {}),
    ([UNFINISHED, RESET], {}),
], ids=["refused", "wrong argument", "late wrong argument", "no key", "401", "reset"])
def test_a_traceback_shows_no_key_and_is_short(function, script, changed, monkeypatch):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with Server(script) as server:
        options = {"model": "m", "api_key": KEY, "headers": {"X-Api-Key": KEY}, "max_retries": 0}
        with pytest.raises((cs.ChatStreamError, ValueError, TypeError)) as caught:
            answer = function("x", **{**options, "base_url": server.url, **changed})
            for _ in answer if function is cs.stream else ():
                pass
    frames = list(frames_of(caught.value))
    assert 0 < len(frames) <= 12
    check_frames(frames)

def test_an_interrupt_while_the_request_is_sent_shows_no_key(monkeypatch):
    monkeypatch.setattr(http.client.HTTPConnection, "request", raiser(KeyboardInterrupt))
    monkeypatch.setenv("HTTP_PROXY", "http://user:hidden@127.0.0.1:9")
    with pytest.raises(KeyboardInterrupt) as caught:
        list(cs.stream("x", model="m", base_url=UPSTREAM, api_key=KEY))
    frames = list(frames_of(caught.value))
    assert "Basic " not in str([frame.f_locals for frame in frames])
    assert "start" in [frame.f_code.co_name for frame in frames]
    check_frames(frames)

def test_a_cause_keeps_its_type_and_text_and_loses_its_frames():
    failure = fails(ask(URL, api_key=KEY), cs.TransportError)
    cause = failure.__cause__
    assert isinstance(cause, ConnectionRefusedError)
    assert "refused" in str(cause)
    lines = traceback.format_exception(type(failure), failure, failure.__traceback__)
    assert len("".join(lines).splitlines()) <= 40
    while cause:
        assert cause.__traceback__ is None
        cause = cause.__cause__ or cause.__context__

# ---- Messages: aggregate(), complete(), to_dict(); pickle, names, types --------------

DELTAS = [
    A,
    R("r", reasoning_content="r", reasoning_details=[{"n": 1}]),
    TextDelta("z", 1), RefusalDelta("no", 1),
    ToolCallDelta(1, "j", "g", "[]"), ToolCallDelta(0, "i", "f", "{"),
    R("s", reasoning_content="s", reasoning_details=[{"n": 2}]),
    R("", reasoning={"text": "t"}),
    Chunk({"x": 1}),
    ToolCallDelta(0, "i", "f", "}", {"e": 1}), ToolCallDelta(0, extra={"g": 2}),
    B,
    Completed("id", "m", "stop", {0: "stop", 1: "length"}),
]
MESSAGES = [
    Message(
        content="ab", reasoning="rs", finish_reason="stop",
        tool_calls=(ToolCall("i", "f", "{}", {"e": 1, "g": 2}), ToolCall("j", "g", "[]")),
        extra={"reasoning_content": "rs", "reasoning_details": [{"n": 1}, {"n": 2}],
               "reasoning": {"text": "t"}}),
    Message(content="z", refusal="no", finish_reason="length", choice=1),
]

def test_aggregate_gathers_by_choice():
    before = copy.deepcopy(DELTAS)
    got = list(cs.aggregate(DELTAS))
    assert got == [*MESSAGES, DELTAS[-1]]
    assert got[-1] is DELTAS[-1]
    assert before == DELTAS
    assert [m.choice for m in cs.aggregate([TextDelta("b", 1), A])] == [0, 1]

def test_aggregate_deltas_passes_everything_on():
    got = list(cs.aggregate(iter(DELTAS), deltas=True))
    assert got == [*DELTAS[:-1], *MESSAGES, DELTAS[-1]]

def test_aggregate_closes_what_it_reads():
    events = (event for event in AB)
    messages = cs.aggregate(events, deltas=True)
    next(messages)
    messages.close()
    assert inspect.getgeneratorstate(events) == inspect.GEN_CLOSED

@pytest.mark.parametrize("pieces, extra", [
    ([("", {"x": "a\ud83d"}), ("a👩", {"x": "\udc69"})], {"x": "a👩"}),
    ([("r", {"x": ["p"]}), ("r", {"x": "s"})], {"x": "s"}),
    ([("r", {"x": ["p"]}), ("r", {"x": {"q": 1}})], {"x": {"q": 1}}),
    ([("r", {"x": [{"n": 1}]}), ("r", {"x": [{"n": 2}]})], {"x": [{"n": 1}, {"n": 2}]}),
])
def test_aggregate_joins_the_reasoning_members(pieces, extra):
    (message,) = cs.aggregate([ReasoningDelta(text, 0, more) for text, more in pieces])
    assert message.extra == extra

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
            details = [{"text": "r"}]
            assert event.extra == {"reasoning_details": details, "reasoning": {"text": "s"}}
            assert event.tool_calls[0].extra == {"e": {"s": 1}}

@pytest.mark.parametrize("wrong, name", [
    ("hi", "str"), ([1], "int"), ([None], "NoneType"), ([{"text": "a"}], "dict"), (5, "int"),
    (len, "events|iter"),
])
def test_aggregate_names_what_is_no_event(wrong, name):
    with pytest.raises(TypeError, match=name):
        list(cs.aggregate(wrong))

def second_copy():
    """-> the module, imported once more under this name."""
    spec = importlib.util.spec_from_file_location("second_copy", cs.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "second_copy", module)
        spec.loader.exec_module(module)
    return module

def test_aggregate_names_an_event_of_a_second_copy():
    with pytest.raises(TypeError, match=r"second_copy\.TextDelta"):
        list(cs.aggregate([second_copy().TextDelta("a")]))

def test_complete():
    with Server([reply(PLAIN, "200 OK", "X-Request-Id: r")]) as server:
        message = complete(server, temperature=0.5)
    assert message == Message(content="ab", finish_reason="stop")
    assert "completed" not in repr(message)
    assert message.completed == completed(request_id="r")
    assert message.completed.headers["x-request-id"] == "r"
    assert server.requests[0].json["temperature"] == 0.5

@pytest.mark.parametrize("n", [{"n": 2}, {"extra_body": {"n": 2}}])
def test_complete_wants_one_choice(n):
    with pytest.raises(TypeError, match=r"^n: "):
        cs.complete("x", model="m", base_url=URL, **n)

def test_to_dict():
    first, second = MESSAGES
    assert second.to_dict() == {"role": "assistant", "content": "z", "refusal": "no"}
    assert list(second.to_dict())[0] == "role"
    assert Message().to_dict() == {"role": "assistant", "content": ""}
    assert Message(tool_calls=(ToolCall("i", "f", "{}"),)).to_dict()["content"] is None
    sent = first.to_dict(reasoning=True)
    assert {k: sent.pop(k) for k in first.extra} == first.extra
    assert sent == first.to_dict()
    assert "reasoning" not in "".join(first.to_dict())

def test_a_whole_tool_loop():
    extra = {"extra_content": {"google": {"thought_signature": "s"}}}
    details = [{"type": "reasoning.encrypted", "data": "x"}]
    chunks = D(reasoning="hm", reasoning_details=details), tool(0, "i", "add", '{"a":', **extra)
    first = sse(*chunks, tool(0, None, None, "1}"), C(finish="tool_calls"), DONE)
    with Server([reply(first)], [reply(PLAIN)]) as server:
        history = [{"role": "user", "content": "1+1?"}]
        message, end = cs.aggregate(ask(server, history, tools=[{"type": "function"}]))
        assert end.finish_reason == message.finish_reason == "tool_calls"
        (call,) = message.tool_calls
        history.append(message.to_dict(reasoning=True))
        history.append({"role": "tool", "tool_call_id": call.id, "content": "2"})
        history.append(next(cs.aggregate(ask(server, history))))
        list(ask(server, history))
    function = {"name": "add", "arguments": '{"a":1}'}
    sent = {"id": "i", "type": "function", "function": function, **extra}
    assert server.requests[1].json["messages"] == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [sent], "reasoning": "hm",
         "reasoning_details": details},
        {"role": "tool", "tool_call_id": "i", "content": "2"}]
    assert server.requests[2].json["messages"][-1] == {"role": "assistant", "content": "ab"}

ERRORS = [
    cs.ChatStreamError("t", partial=(MESSAGES[0],), request_id="r"),
    cs.MissingAPIKeyError("t", env_key="K", instructions="i"),
    cs.StatusError("t", status=400, body="b", message="m", code=1, retry_after=2.0, headers={"a": "b"}),
    cs.RetryLimitError("t", status=500, attempts=3, partial=(MESSAGES[1],)),
    cs.TransportError("t", attempts=2),
    cs.DeadlineError("t", seconds=2.5),
    cs.CancelledError("t"),
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
    twins = [pickle.loads(pickle.dumps(failure, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in (*twins, copy.deepcopy(failure), copy.copy(failure)):
        assert (type(twin), twin.args) == (type(failure), failure.args)
        assert vars(twin) == vars(failure)

def test_a_real_error_survives_pickle():
    with Server([UNFINISHED, CLOSE]) as server:
        failure = fails(cs.aggregate(ask(server)), cs.TruncatedStreamError)
    twin = pickle.loads(pickle.dumps(failure))
    assert (str(twin), vars(twin)) == (str(failure), vars(failure))

@pytest.mark.parametrize("failure", ERRORS, ids=lambda e: type(e).__name__)
def test_errors_keep_their_fields_on_the_instance(failure):
    """Ray's wrappers are subclasses that look fields up in the original."""

    class Wrapped(type(failure)):
        def __init__(self, cause):
            self.cause = cause
            self.args = (cause,)

        def __getattr__(self, name):
            return getattr(self.cause, name)

    wrapped = Wrapped(failure)
    for name, value in vars(failure).items():
        assert not hasattr(type(failure), name)
        assert getattr(wrapped, name) == value
    assert set(vars(type(failure)())) == set(vars(failure))
    with pytest.raises(TypeError, match="nonsense"):
        type(failure)("t", nonsense=1)

def test_a_class_of_the_callers_own_may_inherit_from_an_error():
    class Mine(cs.StatusError):
        team: str = "red"

        def twice(self):
            return 2 * self.team

    assert (Mine("t", status=500).twice(), Mine(team="a").twice()) == ("redred", "aa")
    assert vars(Mine("t", status=500)).items() >= {"status": 500, "headers": {}}.items()

def test_every_public_name_is_listed_and_documented():
    kinds = (ast.ClassDef, ast.FunctionDef)
    body = ast.parse(SOURCE).body
    defined = {n.name for n in body if isinstance(n, kinds) and n.name[0] != "_"}
    assert defined == set(cs.__all__) - {"PROVIDERS", "Event", "__version__"}
    for name in defined:
        assert getattr(cs, name).__doc__, name
    assert set(cs.Event.__args__) == {type(e) for e in DELTAS} | {Message}

def test_defaults_are_the_contract():
    assert Message() == Message("assistant", "", "", "", (), None, 0, {}, None)
    assert Completed() == Completed("", "", None, {}, None, 0, "", {})
    assert Usage() == Usage(0, 0, 0, 0, 0, {})
    assert ToolCallDelta(1) == ToolCallDelta(1, "", "", "", None, 0, "function")
    assert ToolCall("i", "n", "a") == ToolCall("i", "n", "a", {}, "function")
    assert cs.Provider("n", "u") == cs.Provider("n", "u", None, None, {})
    assert issubclass(cs.IdleTimeoutError, TimeoutError)
    assert issubclass(cs.DeadlineError, TimeoutError)
    assert issubclass(cs.RetryLimitError, cs.StatusError)

def test_stream_and_complete_have_the_same_typed_options():
    options = {
        "instructions": None, "provider": None, "base_url": None, "api_key": None, "headers": None,
        "extra_body": None, "connect_timeout": 10.0, "idle_timeout": 300.0, "event_timeout": 900.0,
        "deadline": None, "max_retries": 4, "strict": False, "raw": False, "pool": None,
    }
    for function in (cs.stream, cs.complete):
        signature = inspect.signature(function).parameters
        assert list(signature) == ["messages", "model", *options, "params"]
        assert {name: signature[name].default for name in options} == options
        assert all(p.annotation is not p.empty for p in signature.values())
        assert signature["model"].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.signature(cs.complete).return_annotation == "Message"

def test_what_is_imported_on_first_use_only():
    code = "import sys, chatstream; sys.exit(bool({'logging', 'socket', 'ssl', 'urllib3', 'http.client'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0

def test_type_hints_can_be_looked_up():
    for name in ("stream", "complete", "aggregate", "decode", "cancel"):
        assert typing.get_type_hints(getattr(cs, name))

# ---- The shortcut for chunks that differ in one string: raw=True reads without it ----

TEXTS = ["a", " b", "é", "\n", '"', "\\", "\u2028", "\x7f", "\t", "😀", "\ud83d", "\udc69", "",
         '"},"finish_reason":null}],"obfuscation":"', "null", "\\u0041", "]}", "\u00a0"]

def random_stream(rng):
    """Lines of one server, mostly alike, now and then anything."""
    shape = rng.randrange(7)
    ascii_only, spaced = rng.random() < 0.5, rng.random() < 0.3
    separators = (", ", ": ") if spaced else (",", ":")
    lines = []
    for _ in range(rng.randrange(2, 25)):
        text = rng.choice(TEXTS) * rng.randrange(1, 3)
        chunk = [
            C,
            lambda t: C(t, obfuscation=rng.choice(["q", "Zx-_9", "", '"'] * 3 + ["é"])),
            lambda t: tool(rng.choice([0, 0, 0, 1, None]), rng.choice([None, None, "i", "j"]),
                           rng.choice([None, None, "f"]), t),
            lambda t: D(**{rng.choice(["reasoning", "reasoning_content"]): t}),
            lambda t: C(t, index=rng.choice([0, 0, 1]), usage=rng.choice([None, USAGE, ZEROS])),
            lambda t: {**D(content=t, extra={"content": t}, tool_calls=None), "p": "ab" * rng.randrange(3)},
            lambda t: C(t, id=f"c{rng.randrange(9) if rng.random() < 0.2 else 0}"),
        ][shape](text)
        if rng.random() < 0.08:
            odd = [STOP, {"choices": []}, whole({"content": "w"}), tool(0, "n", "g", "{")]
            chunk = rng.choice(odd)
        line = json.dumps(chunk, ensure_ascii=ascii_only, separators=separators)
        if rng.random() < 0.05:
            place = rng.randrange(len(line))
            odd = rng.choice(['"', "\\", "}", "x", "\x01", ""])
            line = line[:place] + odd + line[place + 1 :]
        if rng.random() < 0.05:  # the member twice: the last one counts
            line = line.replace('"content"', '"content":"no","content"', 1)
        lines.append(line.encode("utf-8", "surrogatepass"))
    return lines

def test_the_shortcut_gives_the_same_events():
    events = 0
    for seed in range(900):
        lines = random_stream(random.Random(seed))
        body = b"".join(b"data: %b\n\n" % line for line in lines)
        fast = decode([body])
        plain, failure = decode([body], raw=True)
        plain = [e for e in plain if not isinstance(e, Chunk)]
        assert (fast[0], str(fast[1])) == (plain, str(failure)), (seed, body)
        events += len(plain)
    assert events > 4_000

SHORTCUTS = [
    ("two events of one chunk", [D(content="a", refusal="n")] * 3 + [STOP],
     [A, RefusalDelta("n")] * 3 + [END]),
    ("more behind the padding", [C("a", obfuscation="q"), C("b", obfuscation="q"),
     C("a", obfuscation="q", usage=USAGE, z="w"), C("b", "stop", obfuscation="q")],
     [A, B, A, B, USED_END]),
    ("extra in a call", [tool(0, "i", "f", ""), *[tool(0, None, None, "a", x=1)] * 3],
     [call(), *[call("a", {"x": 1})] * 3, OPEN]),
    ("a member twice, alike at first",
     [f'{{"choices":[{{"delta":{{"content":"{c}","content":"a"}}}}]}}' for c in "ab"],
     [A, A, Completed()]),
    ("a reason in it", [CA, CA, C("b", "length"), C("b", "length")], [A, A, B, B, LENGTH_END]),
    ("another name", [D(reasoning="a"), D(reasoning="b"), D(reasoning_content="b"), STOP],
     [R("a", reasoning="a"), R("b", reasoning="b"), R("b"), END]),
    ("a half that waits", [CA, CA, C("\ud83d"), CA, CA, STOP], [A, A, T("\ufffda"), A, END]),
    ("empty ones", [CA, C(""), CA, C(""), STOP], [A, A, END]),
    ("after [DONE] in between", [CA, CB, DONE, CA], [A, B, OPEN]),
    ("two chunks in a line (GLM)", [J_A + J_A, J_B + J_A, STOP], [A, A, B, A, END]),
    ("a chunk glued behind (GLM)", [f"{J_A}data: {J_A}", f"{J_B}data: {J_A}", STOP],
     [A, A, B, A, END]),
]

@pytest.mark.parametrize("row, chunks, events", SHORTCUTS, ids=ids(SHORTCUTS))
def test_the_shortcut_at_its_edges(row, chunks, events):
    for blocks in cuts(sse(*chunks)):
        assert decode(blocks) == (events, None)

def parses(body, monkeypatch):
    """-> how often the JSON of a body is parsed."""
    parsed = []
    real = json.JSONDecoder.raw_decode
    with monkeypatch.context() as patch:
        count = lambda *given, **more: parsed.append(1) or real(*given, **more)  # noqa: E731
        patch.setattr(json.JSONDecoder, "raw_decode", count)
        events = sum(1 for _ in second_copy().decode([body]))
    return events, len(parsed)

@pytest.mark.parametrize("chunk", [
    C,
    lambda text: C(text, obfuscation="x" + text),
    lambda text: D(reasoning_content=text),
    arg,
    lambda text: C(text, index=0, usage=None),
])
def test_the_shortcut_is_taken(chunk, monkeypatch):
    body = sse(tool(0, "i", "f", "{"), *[chunk(f"w{i}") for i in range(50)])
    events, parsed = parses(body, monkeypatch)
    assert events == 52
    assert parsed < 10

def test_the_shortcut_is_taken_as_long_as_it_helps(monkeypatch):
    helps = [c for _ in range(20) for c in [{"choices": []}, *[C("w")] * 50]]
    assert parses(sse(*helps), monkeypatch)[1] < 20 * 6
    never = [C("w", id=f"c{i}") for i in range(500)]
    assert parses(sse(*never), monkeypatch)[1] < 540

@pytest.mark.parametrize("size, taken", [(16_384, True), (16_385, False)])
def test_the_shortcut_learns_from_lines_of_at_most_16_kib(size, taken, monkeypatch):
    """Of long ones a gzip bomb could make much memory of little."""
    pad = "x" * (size + 2 - len(sse(C("w", pad=""))))  # makes a line of so many bytes
    assert (parses(sse(*[C("w", pad=pad)] * 50), monkeypatch)[1] < 10) is taken

# ---- The command line ----------------------------------------------------------------

def command(*args, **options):
    """-> the finished process of the command, with bytes in and out."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options,
               "env": {**env, **options.get("env", {})}, "timeout": PATIENCE * 2}
    file = str(HERE / "chatstream.py")
    return subprocess.run([sys.executable, "-W", "error", file, *args], **options)

def main(server, *args):
    """-> the exit status of the command in this process, with a prompt of one word."""
    return cs._main(["-m", "m", "-u", server.url, *args, "x"])

@pytest.fixture(autouse=True)
def no_standard_input(monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield

def test_cli_demo_on_a_bare_interpreter(tmp_path):
    shutil.copy(cs.__file__, tmp_path)
    args = [sys.executable, "-I", "-S", "chatstream.py", "--demo", "hello", "there"]
    run = subprocess.run(args, cwd=tmp_path, capture_output=True, timeout=PATIENCE * 2,
                         env={"HTTP_PROXY": "http://127.0.0.1:9"})
    assert (run.returncode, run.stderr) == (0, b"")
    assert b"hello there" in run.stdout

@pytest.mark.parametrize("args", [["--demo"], ["--demo", "x"]])
def test_cli_demo_reads_no_standard_input(args):
    reader, writer = os.pipe()
    assert b"You said" in command(*args, stdin=reader).stdout
    os.close(reader)
    os.close(writer)

def test_cli_streams_through_a_pipe():
    step, go_on = gate()
    first, second = chunked(sse(C("first"))), chunked(sse(C(" second"), STOP, DONE))
    with Server([CHUNKED + first, step, second + b"0\r\n\r\n"]) as server:
        run = [sys.executable, "chatstream.py", "-m", "m", "-u", server.url, "x"]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        with subprocess.Popen(run, cwd=HERE, **pipes) as child:
            assert child.stdout.read(5) == b"first"
            go_on.set()
            assert child.stdout.read() == b" second\n"
    assert child.returncode == 0

@pytest.mark.parametrize("script, code", [
    ([reply(PLAIN)], 0),
    ([error("400 Bad", {"error": "wrong"})], 1),
    *(([reply(sse(C("a", finish=reason), DONE))], 3) for reason in (None, "length",
     "content_filter", "abort", "error", "timeout")),
    ([reply(sse(C("a", finish="eos"), DONE))], 0),
    ([reply(sse(tool(0, "i", "f", "{}"), C(finish="tool_calls"), DONE))], 0),
])
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_cli_exit_codes(script, code, option, capsys):
    with Server(script) as server:
        assert main(server, *option) == code
    out, err = capsys.readouterr()
    assert bool(err) == (code != 0 or "f({})" in err)
    if code == 1:
        assert re.fullmatch("chatstream: .*wrong\n", err)
        assert not option or json.loads(out)["type"] == "StatusError"

@pytest.mark.parametrize("chunks, options, out, err", [
    ([D(reasoning_content="hm"), CA, D(reasoning_content="ok"), CB, D(refusal="no"), TOOL, STOP], [],
     "ab\n", "hm\n\nok\n\nno\ntool call: f({})\n"),
    ([CA, C("x", index=1), CB, C("y", index=1), STOP, C(finish="stop", index=1)], ["-o", "n=2"],
     "ab\n\nxy\n", ""),
], ids=["kinds", "several choices one below the other"])
def test_cli_what_goes_where(chunks, options, out, err, capsys):
    with Server([reply(sse(*chunks))]) as server:
        assert main(server, *options) == 0
    assert capsys.readouterr() == (out, err)

def test_cli_json_lines(capsys):
    slow = error("429 Slow", {"error": {"message": "slow", "code": "c"}}, "Retry-After: 999",
                 "X-Request-Id: r")
    body = sse(D(reasoning_content="r"), C("é"), STOP, DONE)
    with Server([reply(body)], [slow]) as server:
        assert [main(server, "--json") for _ in range(2)] == [0, 1]
    *lines, shown = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line.pop("event") for line in lines] == ["ReasoningDelta", "TextDelta", "Completed"]
    assert lines[1] == {"text": "é", "choice": 0}
    assert lines[2]["finish_reason"] == "stop"
    assert list(shown)[:3] == ["event", "type", "message"]
    assert "slow" in shown["message"]
    assert {"event": "error", "type": "RetryLimitError", "status": 429, "code": "c", "attempts": 1,
            "retry_after": 999.0, "request_id": "r"}.items() <= shown.items()

def test_cli_says_which_key_is_missing(monkeypatch, capsys):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    assert cs._main(["-m", "m", "-p", "groq", "x"]) == 1
    assert "set the variable GROQ_API_KEY" in capsys.readouterr().err

def test_cli_options_reach_the_request(monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("CHATSTREAM_MODEL", "from-env")
    options = ["temperature=0.5", "stop=[1]", "user=bob", "a=b=c", "timeout=3"]
    with Server([reply(sse(C("a", usage=USAGE), STOP, DONE))]) as server:
        args = [word for option in options for word in ("-o", option)]
        args += ["-u", server.url, "--key-env", "MY_KEY", "-p", "ollama", "--usage"]
        for option in ("-i", "-s", "--instructions"):
            assert cs._main([*args, option, "brief", "a", "b"]) == 0
    for request in server.requests:
        assert request.header("Authorization") == f"Bearer {KEY}"
        body = request.json
        assert [m["content"] for m in body.pop("messages")] == ["brief", "a b"]
        assert body == {
            "model": "from-env", "stream": True, "stream_options": {"include_usage": True},
            "temperature": 0.5, "stop": [1], "user": "bob", "a": "b=c", "timeout": 3,
        }
    out, err = capsys.readouterr()
    assert out == "a\n" * 3
    last = err.splitlines()[-1]
    assert all(f"{name} {count}" in last for name, count in USAGE.items())

@pytest.mark.parametrize("words, piped, prompt", [
    (["Sum", "up:"], b"text \xc3\xa9\n", "text é\n\nSum up:"),
    (["Sum", "up:"], b"", "Sum up:"),
    (["Sum", "-", "up"], b"text\n", "Sum text up"),
    (["-"], b"text\n\n", "text"),
    ([], b"\xef\xbb\xbftext", "text"),
    ([], "té".encode("utf-16"), "té"),
])
def test_cli_words_and_standard_input(words, piped, prompt, tmp_path):
    (tmp_path / "file").write_bytes(piped)
    with Server([reply(PLAIN)]) as server, open(tmp_path / "file") as file:
        for given in ({"input": piped}, {"stdin": file}):
            run = command("-m", "m", "-u", server.url, *words, **given)
            assert (run.returncode, run.stdout) == (0, b"ab\n")
    assert [r.json["messages"][0]["content"] for r in server.requests] == [prompt] * 2

@pytest.mark.parametrize("args, text", [
    (["x"], "CHATSTREAM_MODEL"),
    (["-m", "m", "--key-env", "NOT_SET_ANYWHERE", "x"], "NOT_SET_ANYWHERE"),
    (["-m", "m", "-p", "nobody", "x"], "nobody"),
    (["-m", "m", "-u", "nonsense", "x"], "base_url"),
    (["-m", "m", "-u", URL, ""], "messages: empty"),
    (["-m", "m", "-u", URL, "-o", "nonsense"], "-o: expected NAME=VALUE"),
    (["-m", "m", "-u", URL, "-o", "stream=false", "x"], "stream"),
    (["--nonsense"], "--nonsense"),
])
def test_cli_wrong_arguments(args, text, capsys):
    with contextlib.suppress(SystemExit):  # argparse's own has the code 2, too
        assert cs._main(args) == 2
    assert text in capsys.readouterr().err

@pytest.mark.parametrize("env", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"},
])
def test_cli_output_into_a_pipe_is_utf_8(env):
    with Server([reply(sse(C("é你好😀"), STOP, DONE))]) as server:
        run = command("-m", "m", "-u", server.url, "x", env=env, stdin=subprocess.DEVNULL)
    assert (run.returncode, run.stdout.decode()) == (0, "é你好😀\n")

DISK_FULL = rb"chatstream: cannot write the answer: .*\n"

@pytest.mark.parametrize("end, code, said", [
    ("x | head -1", 0, b""),
    ("x | true", 0, b""),
    ("x 2>&1 | true", 0, b""),
    ("x > /dev/full", 1, DISK_FULL),
    ("x --json > /dev/full", 1, DISK_FULL),
    ("<&-", 2, rb"chatstream: .*input.*\n"),
])
def test_cli_ends_of_the_shell(end, code, said):
    """A closed pipe is quiet; a full disk and a closed standard input are said."""
    if "/dev/full" in end and not os.path.exists("/dev/full"):
        pytest.skip("no such device")
    body = sse(*[C("word\n" * 2000) for _ in range(200)], STOP, DONE)
    with Server([reply(body)]) as server:
        args = [sys.executable, "chatstream.py", "-m", "m", "-u", server.url]
        run = subprocess.run(f"{shlex.join(args)} {end}", shell=True, cwd=HERE,
                             capture_output=True, timeout=PATIENCE * 2)
    assert run.returncode == code
    assert re.fullmatch(said, run.stderr)

@pytest.mark.parametrize("script, code", [([UNFINISHED, CLOSE], 1), ([reply(sse(CA, DONE))], 3)])
def test_cli_errors_stand_on_a_line_of_their_own(script, code):
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with Server(script) as server:
        run = command("-m", "m", "-u", server.url, "x", **pipes)
    assert run.returncode == code
    first, *lines = run.stdout.decode().splitlines()
    assert first == "a"
    assert all(line.startswith("chatstream: ") for line in lines if line)

#: A shell that started us in the background has SIGINT ignored, which is inherited.
INTERRUPTIBLE = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"

def test_cli_interrupt():
    code = INTERRUPTIBLE + "import sys, chatstream\nsys.exit(chatstream._main())"
    with Server([UNFINISHED, HOLD]) as server:
        run = [sys.executable, "-c", code, "-m", "m", "-u", server.url, "x"]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(run, cwd=HERE, stdin=subprocess.DEVNULL, **pipes) as child:
            assert child.stdout.read(1) == b"a"
            child.send_signal(signal.SIGINT)
            assert child.wait(PATIENCE) == 130
            assert child.stdout.read() == b"\n"
            assert child.stderr.read() == b""

# ---- The README ----------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

def example(word):
    """The README's first example that has this in it."""
    return next(code for code in EXAMPLES if word in code)

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
    return [*map(C, words), {**STOP, "usage": USAGE}, DONE]

@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_examples_run(number, monkeypatch, capsys, tmp_path):
    code = EXAMPLES[number]
    if re.search("import (distributed|FastAPI)", code):
        pytest.skip("the check with other people's tools runs it")
    if "import urllib3" in code:
        pytest.importorskip("urllib3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"jpeg")
    (tmp_path / "body.bin").write_bytes(sse(C("recorded"), STOP, DONE))
    (tmp_path / "company-ca.pem").write_text("")  # no https is asked for here

    def answer(sock, file):
        sock.sendall(reply(sse(*readme_answer(server.requests[-1].json))))

    with Server([answer]) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code = re.sub(r"http://127\.0\.0\.1:\d+", server.origin, code)
        names = {}
        exec(compile(code, f"README.md, example {number}", "exec"), names)
        if "test_shout" in names:
            names["test_shout"](monkeypatch)
        assert server.requests or "decode(" in code
    out = capsys.readouterr().out
    if number == 0:
        shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
        assert out.strip() == shown.strip()
    expected = {
        "history.append(ev)\n    print()": "Because air scatters blue light",
        "message.completed": "Because air scatters",
        "ToolCall": '"b": 25})\n42',
        "dataclass": "Place(city='Paris', country='France')",
        "body.bin": "TextDelta(text='recorded', choice=0)",
        "answers.jsonl": "40 answers; failed: {}",
    }
    for word, text in expected.items():
        assert word not in code or text in out

def test_readme_many_prompts_lose_nothing(tmp_path):
    """One slow prompt, a Ctrl-C: the other 39 answers stay; another run asks for one."""
    slow, asked, left = "What is 0 squared?", [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(json.loads(body)["messages"][0]["content"])
            if asked[-1] == slow and len(asked) <= 40:
                self.rfile.read(1)  # until the client leaves
                left.set()
            else:
                self.wfile.write(head("200 OK", "Connection: close") + sse(C("yes"), STOP, DONE))

        def log_message(self, *args):
            pass

    def saved():
        path = tmp_path / "answers.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return sorted(json.loads(line)["prompt"] for line in lines)

    def start():
        path = tmp_path / "batch.py"
        path.write_text(INTERRUPTIBLE + example("answers.jsonl"))
        env = {**os.environ, "OPENAI_BASE_URL": url, "PYTHONPATH": str(HERE)}
        options = {"cwd": tmp_path, "env": env, "stdout": subprocess.PIPE}
        return subprocess.Popen([sys.executable, path], stderr=subprocess.PIPE, **options)

    class Listener(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 64

    prompts = sorted(f"What is {n} squared?" for n in range(40))
    with Listener(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with start() as child:
            deadline = time.monotonic() + PATIENCE
            while len(saved()) < 39:
                assert child.poll() is None, child.stderr.read()
                assert time.monotonic() < deadline, len(saved())
                time.sleep(0.02)
            assert not left.is_set()
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=PATIENCE)
        assert err.decode().rstrip().endswith("KeyboardInterrupt")
        assert left.wait(PATIENCE)  # the call in flight has ended, too
        assert (saved(), len(asked)) == ([p for p in prompts if p != slow], 40)
        with start() as child:
            out, err = child.communicate(timeout=PATIENCE)
        server.shutdown()
    assert out.decode() == "40 answers; failed: {}\n", err
    assert (saved(), asked[40:]) == (prompts, [slow])

def test_readme_another_server_when_the_first_is_down(capsys, sleeps):
    code = example("yield from events").replace("127.0.0.1:8080", f"127.0.0.1:{closed_port()}")
    with Server([reply(sse(C("second"), STOP, DONE))]) as server:
        exec(code.replace("http://127.0.0.1:8000", server.origin), {})
    assert len(server.requests) == 1
    assert "text='second'" in capsys.readouterr().out

def test_readme_a_line_of_json_has_this_shape(capsys):
    shown = re.search(r'`(\{"event": "TextDelta".*?\})`', README)[1]
    with Server([reply(sse(C("Because"), STOP, DONE))]) as server:
        assert main(server, "--json") == 0
    assert capsys.readouterr().out.splitlines()[0] == shown

def test_readme_has_at_most_1700_words():
    assert len(re.sub(r"```python\n.*?```", "", README, flags=re.DOTALL).split()) <= 1700

def test_readme_names_everything():
    for name in set(cs.__all__) - {"__version__", "stream"}:
        assert re.search(rf"`{name}\b", README), name
    for option in inspect.signature(cs.stream).parameters.values():
        default = {inspect.Parameter.empty: ""}.get(option.default, option.default)
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"| `{str(option).split(':')[0]}` | {shown} |".replace("  ", " ") in README
    for value in [*DELTAS, MESSAGES[0], USED, Completed()]:
        for member in dataclasses.fields(value):
            assert f"`{member.name}`" in README, member.name
    for failure in ERRORS:
        for member in type(failure).__annotations__:
            assert member.startswith("_") or f"`.{member}`" in README, member

def test_readme_lists_the_providers():
    for provider in cs.PROVIDERS.values():
        key = f"`{provider.env_key}` " if provider.env_key else ""
        assert f"| `{provider.name}` | `{provider.base_url}` | {key}|" in README
    rows = re.findall(r"^\| `\w+` \| `https?://", README, re.MULTILINE)
    assert len(rows) == len(cs.PROVIDERS)

def test_readme_links_to_headings_that_exist():
    lines = re.findall(r"^## (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}
    assert set(re.findall(r"\(#([\w-]+)\)", README)) <= anchors

def test_readme_changelog_names_this_version():
    assert f"- **{cs.__version__}**" in README
    assert cs.__version__ in SOURCE.splitlines()[0]

def test_the_licence_is_in_the_file():
    module, licence = (re.sub(r"^#", "", text, flags=re.MULTILINE).split() for text in (
        SOURCE, (HERE / "LICENSE").read_text(encoding="utf-8")))
    assert module[-len(licence) :] == licence

# ---- Fuzz: seeded, bounded -----------------------------------------------------------

def pieces_of(body, rng):
    at = 0
    while at < len(body):
        step = rng.choice([1, 2, 7, 60, 700])
        yield body[at : at + step]
        at += step

ALL_BODIES = [bytes_of(row[1]) for row in (*ROWS, *ERROR_ROWS, *CALL_ROWS)]

def summary(result):
    """But for the ids that are made up."""
    events, failure = result
    return events, type(failure), str(failure)

def test_fuzz_streams_cut_at_random():
    rng = random.Random(1)
    for _ in range(500):
        body = b"".join(rng.sample(ALL_BODIES, 3))
        assert summary(decode(pieces_of(body, rng))) == summary(decode([body])), body

def test_fuzz_flipped_bytes_and_noise():
    rng = random.Random(2)
    for number in range(1000):
        body = bytearray(b"".join(rng.sample(ALL_BODIES, 2)))
        if number % 5 == 0:
            body = bytearray(rng.randrange(256) for _ in range(200))
        for _ in range(rng.randrange(1, 6)):
            body[rng.randrange(len(body))] = rng.choice(b'\n\r:{}[]",\\0e-\x00\xff d')
        for strict in (False, True):
            got, failure = decode(pieces_of(bytes(body), rng), strict)
            assert failure is None or isinstance(failure, cs.StreamError)
            for event in got:
                json.dumps(dataclasses.asdict(event))
                getattr(event, "text", "").encode()

def test_fuzz_framings_of_the_same_chunks():
    """However chunks are framed, the same events come out."""
    rng = random.Random(5)
    for number in range(300):
        chunks = []
        for line in random_stream(rng):
            with contextlib.suppress(ValueError):
                chunks.append(json.loads(line.decode("utf-8", "replace"), strict=False))
        texts = [json.dumps(c, ensure_ascii=number % 2 == 0) for c in chunks]
        wanted = decode([sse(*texts) if number % 2 == 0 else "".join(
            f"data: {t}\n\n" for t in texts).encode("utf-8", "surrogatepass")])
        framed, place = "", 0
        while place < len(texts):
            some = texts[place : place + rng.randrange(1, 4)]
            place += len(some)
            end = rng.choice(["\n\n", "\r\n\r\n", "\r\r"])
            framed += rng.choice([
                "".join(f"data: {t}{end}" for t in some),
                "".join(f"{t}{end[: len(end) // 2]}" for t in some) + end,
                "data:" + rng.choice(["", " "]).join(some) + end,
                f"data: data: [{','.join(some)}]{end}", f"[{','.join(some)}]{end}",
                "".join(f"data:{t}\n" for t in some) + end + ": comment" + end])
        got = decode(pieces_of(framed.encode("utf-8", "surrogatepass"), rng))
        assert summary(got) == summary(wanted), framed
