# chatstream 1.2.0: stream a chat completion from a Python script. One file, MIT.
# Copy this file beside your code; its distribution is chatstream-py.
# SPDX-License-Identifier: MIT
# pyright: standard
"""Stream a chat completion from any OpenAI-compatible server.

    import chatstream

    for ev in chatstream.stream("Why is the sky blue?", model="gpt-4o-mini"):
        if isinstance(ev, chatstream.TextDelta):
            print(ev.text, end="", flush=True)

help(chatstream.stream) explains every option. The functions are

    stream()     ask, and yield the events of the answer as they arrive
    complete()   ask, and return the whole answer as one Message
    aggregate()  events -> whole messages
    decode()     the bytes of an answer, from anywhere -> events
    cancel()     stop a stream() from another thread

On the command line: `python chatstream.py -m gpt-4o-mini "Why is the sky blue?"`.
`--help` lists its options, `--demo` needs no key and no network.

Events, in the order of an answer:

    Chunk            with raw=True: the JSON as sent
    ReasoningDelta, TextDelta, RefusalDelta, ToolCallDelta: pieces of these
    Message          from aggregate(): a whole message
    Completed        last, once: finish reasons, usage, id and model

Errors:

    ChatStreamError           any of them; .partial, .request_id
      MissingAPIKeyError      no key in the environment
      StatusError             a reply that is not 2xx
        RetryLimitError       the same, of a kind that is tried again
      TransportError          no connection, or cut before the first event
      DeadlineError           too long (also a TimeoutError)
      CancelledError          cancel() was called
      StreamError             an answer went wrong
        IdleTimeoutError      silence (also a TimeoutError)
        TruncatedStreamError  cut in the middle
        MalformedChunkError   strict=True: no JSON object
        ServerError           reported by the server, inside its answer

A wrong argument is a ValueError or TypeError from the call itself, before any network
use. The standard library carries everything; with `pool=` a urllib3 manager of the
caller's does. Logger: "chatstream".
"""

from __future__ import annotations

import atexit
import collections
import copy
import io
import itertools
import json
import math
import os
import re
import sys
import time
import types
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Optional, Union

# http.client, logging, ssl and others are imported where they are needed: that is most
# of the start-up time.

__version__ = "1.2.0"

# fmt: off
__all__ = [
    "stream", "complete", "aggregate", "decode", "cancel",
    "Provider", "PROVIDERS",
    "Event", "TextDelta", "ReasoningDelta", "RefusalDelta", "ToolCallDelta",
    "Chunk", "Message", "Completed", "ToolCall", "Usage",
    "ChatStreamError", "MissingAPIKeyError", "StatusError", "RetryLimitError",
    "TransportError", "DeadlineError", "CancelledError", "StreamError",
    "IdleTimeoutError", "TruncatedStreamError", "MalformedChunkError", "ServerError",
    "__version__",
]
# fmt: on

# ---
# How it works
# ---

# messages, options -> _Request -> _run: tries, waits -> _attempt: one request
#     http.client over a kept or a new connection, or the caller's pool
#         -> _Reply: status, headers, bytes
#         -> _unframe: chunked | length | to the end -> _unpack: gzip, zlib
#         -> _read_answer: the loop over the bytes, and the clock
#     feed(bytes), end(cut)
#         -> _Answer: lines -> JSON -> chunks -> choices, tool calls (no I/O, no time)
#     events
#         -> stream(), decode() -> aggregate() -> complete()
#
# 1. Each fact has one owner, which alone changes it. Time and cancelling are the
#    _Clock's; where a body ends, _unframe() knows; what was said, the _Answer.
# 2. There is one rule of reading: JSON counts, however it is framed; what nobody can
#    read is said, never dropped. A quirk of a server is covered by a rule, or not.
# 3. A cut is never a success: an answer that breaks off ends in an error.
# 4. _run() is the only loop that sleeps, the _Clock the only one that waits. Below
#    feed() nobody knows of sockets or time, so decode() runs all of it on a file.
#
# Refused: connecting by ourselves (so a cancel() while connecting ends when that wait
# does), compression beyond gzip and zlib, a repair for each way in which servers garble
# arguments, sentences out of broken error pages, a second way to do anything.


# ---
# Errors
# ---


class ChatStreamError(Exception):
    """Base of all errors that a call can end in.

    partial: tuple of Message, what had arrived of each choice, from aggregate().
    request_id: str, the server's, to quote to its support; "" if it gave none."""

    partial: tuple[Message, ...]
    request_id: str
    _fields: dict[str, Any] = {"partial": (), "request_id": ""}

    # A class below writes its fields with their defaults. They become attributes of
    # each instance, which pickle, copy, Dask and Ray carry over.
    def __init_subclass__(cls) -> None:
        own = {n: vars(cls)[n] for n in cls.__annotations__ if n in vars(cls)}
        for name in own:
            delattr(cls, name)
        cls._fields = {**cls._fields, **own}

    def __init__(self, text: str = "", **fields: Any) -> None:
        super().__init__(text)
        for name, default in self._fields.items():
            setattr(self, name, fields.pop(name, copy.copy(default)))
        if fields:
            raise TypeError(f"{type(self).__name__} has no field {min(fields)!r}")


class MissingAPIKeyError(ChatStreamError):
    """The provider wants a key and there is none. Raised by stream() itself.

    env_key: str, the environment variable that was looked at.
    instructions: str, where to get a key; "" if the provider has none."""

    env_key: str = ""
    instructions: str = ""


class StatusError(ChatStreamError):
    """A reply that is not 2xx, and no other try would help (else RetryLimitError).

    status: int, the HTTP status.
    body: str, the first 64 KiB of the reply's body; "" if it could not be read.
    message: str, the sentence in it that is meant for people, at most 2,000 characters;
        "" if there is none.
    code: the error code as the server sent it (str, int, None ...); never converted.
    retry_after: float, the seconds that the server asked to wait; None if it did not.
    headers: dict, the reply's headers, names in lower case, without set-cookie."""

    status: int = 0
    body: str = ""
    message: str = ""
    code: Any = None
    retry_after: Optional[float] = None
    headers: dict[str, str] = {}


class RetryLimitError(StatusError):
    """A retryable status, and the retries are spent or too long a wait was asked for.

    attempts: int, the requests made."""

    attempts: int = 0


class TransportError(ChatStreamError):
    """No answer began: no connection, TLS failure, reset, or cut before any event.

    The cause is chained (`__cause__`), with its type and text and without its frames.

    attempts: int, the requests made."""

    attempts: int = 0


class DeadlineError(ChatStreamError, TimeoutError):
    """The call as a whole took longer than `deadline`. Never retried.

    seconds: float, the deadline."""

    seconds: float = 0.0


class CancelledError(ChatStreamError):
    """cancel() was called."""


class StreamError(ChatStreamError):
    """An answer went wrong: no chat completion, or too large, or one of these."""


class IdleTimeoutError(StreamError, TimeoutError):
    """Silence for `idle_timeout`, or no chunk for `event_timeout`. Never retried.

    seconds: float, the bound that struck; the text says which one."""

    seconds: float = 0.0


class TruncatedStreamError(StreamError):
    """Cut after something was yielded; with strict=True: no finish_reason came."""


class MalformedChunkError(StreamError):
    """With strict=True: data that is not a JSON object.

    data: str, the text of it."""

    data: str = ""


class ServerError(StreamError):
    """The server reported an error inside its 200 answer.

    code, type: as the server sent them; None if it did not.
    message: str, the sentence that is meant for people, at most 2,000 characters.
    raw: the error's parsed JSON, or its text where it is not JSON."""

    code: Any = None
    type: Any = None
    message: str = ""
    raw: Any = None


# ---
# Events, values, providers
# ---


@dataclass
class TextDelta:
    """A piece of the answer.

    text: str, never empty, always valid Unicode.
    choice: int, the choice it belongs to; 0 unless several were asked for (`n=`)."""

    text: str
    choice: int = 0


@dataclass
class ReasoningDelta:
    """A piece of the model's reasoning.

    text: str; "" when the server sent only opaque members, such as signatures.
    choice: int.
    extra: dict, the delta's reasoning members as the server named and sent them
        (`reasoning_content`, `reasoning_details` ...); None if it has none."""

    text: str
    choice: int = 0
    extra: Optional[dict[str, Any]] = None


@dataclass
class RefusalDelta:
    """A piece of a refusal.

    text: str, never empty.
    choice: int."""

    text: str
    choice: int = 0


@dataclass
class ToolCallDelta:
    """A piece of a tool call.

    index: int, the call's position in its message, counted from 0 by first appearance,
        whatever index the server sent.
    id, name: str, as known so far; "" while unknown.
    arguments: str, this delta's fragment of the JSON text; may be "".
    extra: dict, members of the call that are not OpenAI's; None if there are none.
    choice: int.
    type: str, "function"; "custom": OpenAI's custom tools, `arguments` are free text.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    extra: Optional[dict[str, Any]] = None
    choice: int = 0
    type: str = "function"


@dataclass
class Chunk:
    """With raw=True: one JSON object as sent, before the events made from it.

    data: dict, the parsed JSON."""

    data: dict[str, Any]


@dataclass
class ToolCall:
    """A whole tool call, in Message.tool_calls.

    id: str, unique in its message, made up where the server sent none.
    name: str, the function or custom tool.
    arguments: str, the JSON text as the model wrote it: it may be invalid, or "". What
        the server sent more than once stands here once. Of a custom tool: free text.
    extra: dict, members that are not OpenAI's; they go back with to_dict(), because
        Gemini refuses the next turn without its thought signature.
    type: str, "function" or "custom"."""

    id: str
    name: str
    arguments: str
    extra: dict[str, Any] = field(default_factory=dict)
    type: str = "function"

    def to_dict(self) -> dict[str, Any]:
        """The call as it stands in a request's `tool_calls`."""
        given = "input" if self.type == "custom" else "arguments"
        inner = {"name": self.name, given: self.arguments}
        return {**self.extra, "id": self.id, "type": self.type, self.type: inner}


@dataclass
class Message:
    """A whole message, from aggregate() or complete(), to be appended to the history.

    role: str.
    content, reasoning, refusal: str; "" if there was none.
    tool_calls: tuple of ToolCall.
    finish_reason: str, as sent; None if the answer ended without one.
    choice: int.
    extra: dict, the reasoning members under the server's own names, texts and lists
        joined.
    completed: Completed, the end of the answer with its usage and headers, on what
        complete() returns; None on every other. Not in the repr, and not compared."""

    role: str = "assistant"
    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: Optional[str] = None
    choice: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    completed: Optional[Completed] = field(default=None, repr=False, compare=False)

    def to_dict(self, *, reasoning: bool = False) -> dict[str, Any]:
        """The message as it stands in a request's `messages`; also what to save.

        reasoning: bool, default False because some servers refuse it. True adds
            `extra`, which OpenRouter, DeepSeek and Kimi want back inside a tool loop.
        """
        message: dict[str, Any] = {"role": self.role}
        message["content"] = self.content or (None if self.tool_calls else "")
        if self.refusal:
            message["refusal"] = self.refusal
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return {**message, **self.extra, **message} if reasoning else message


@dataclass
class Usage:
    """Tokens of a request, as the server counted them; 0 where it said nothing.

    Mostly cached_tokens are part of prompt_tokens, and reasoning_tokens of
    completion_tokens; xAI counts reasoning, and some gateways cached tokens, beside.

    extra: dict, what else the server said, under its own names (OpenRouter's `cost`).
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Completed:
    """The end of the answer: last, and once.

    response_id, model: str, the first non-empty that was sent; "" if none was.
    finish_reason: str, choice 0's, as sent ("stop", "length", "tool_calls" ...); None
        means that the answer ended without one and may be cut.
    finish_reasons: dict, choice index to reason.
    usage: Usage; None if the server sent none (OpenAI sends it when asked with
        stream_options={"include_usage": True}).
    skipped: int, pieces of data that were not JSON objects.
    request_id: str, from the reply's headers; "" if none.
    headers: dict, the reply's headers, names in lower case, without set-cookie (such as
        `x-ratelimit-remaining-requests`); empty from decode(). Not in the repr, and not
        compared: two answers that say the same are equal."""

    response_id: str = ""
    model: str = ""
    finish_reason: Optional[str] = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: Optional[Usage] = None
    skipped: int = 0
    request_id: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


_DELTAS = (TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta)
_Delta = Union[TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta]

#: What stream() and aggregate() yield.
Event = Union[_Delta, Chunk, Message, Completed]
_Events = Generator[Event, None, None]


@dataclass
class Provider:
    """A server, and where its key comes from.

    name: str.
    base_url: str, what comes before `/chat/completions`.
    env_key: str, the environment variable with the key; None: no key is needed.
    env_key_instructions: str, where to get one, for MissingAPIKeyError; None: nothing.
    headers: dict, headers for every request to it. Not in the repr: they may be secret.
    """

    name: str
    base_url: str
    env_key: Optional[str] = None
    env_key_instructions: Optional[str] = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)


# fmt: off
#: The built-in providers by name, checked against their documentation in 2026-11.
PROVIDERS: dict[str, Provider] = {
    name: Provider(name, base_url, env_key, keys and f"Get a key at https://{keys}")
    for name, base_url, env_key, keys in [
        ("openai", "https://api.openai.com/v1", "OPENAI_API_KEY", "platform.openai.com/api-keys"),
        ("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "openrouter.ai/settings/keys"),
        ("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", "console.groq.com/keys"),
        ("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", "console.mistral.ai/api-keys"),
        ("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", "platform.deepseek.com/api_keys"),
        ("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY", "aistudio.google.com/apikey"),
        # 127.0.0.1, because Windows takes two seconds for `localhost`
        ("ollama", "http://127.0.0.1:11434/v1", None, None),
        ("lmstudio", "http://127.0.0.1:1234/v1", None, None),
        ("llamacpp", "http://127.0.0.1:8080/v1", None, None),
        ("vllm", "http://127.0.0.1:8000/v1", None, None),
    ]
}
# fmt: on


# ---
# Public functions
# ---


#: The clocks of the calls whose generators somebody still holds, for cancel().
_clocks: weakref.WeakKeyDictionary[_Events, _Clock] = weakref.WeakKeyDictionary()


def stream(
    messages: Union[str, Iterable[Union[Mapping[str, Any], Message]]],
    *,
    model: str,
    instructions: Optional[str] = None,
    provider: Union[str, Provider, None] = None,
    base_url: Optional[str] = None,
    api_key: Optional[str] = None,
    headers: Optional[Mapping[str, str]] = None,
    extra_body: Optional[Mapping[str, Any]] = None,
    connect_timeout: Optional[float] = 10.0,
    idle_timeout: Optional[float] = 300.0,
    event_timeout: Optional[float] = 900.0,
    deadline: Optional[float] = None,
    max_retries: int = 4,
    strict: bool = False,
    raw: bool = False,
    pool: Any = None,
    **params: Any,
) -> Generator[Event, None, None]:
    """Ask for a chat completion and yield its events as they arrive.

    The arguments are checked now; the request is sent at the first next(). Closing the
    generator, or leaving the loop and dropping it, closes the connection.

    messages: str (one user message), or a sequence of mappings (sent untouched) and of
        Message (its to_dict() is sent).
    model: str.
    instructions: str, sent as a leading system message; None: none.
    provider: a name in PROVIDERS, or a Provider. None: openai, whose URL the variable
        OPENAI_BASE_URL replaces, where it is set, and makes the key optional.
    base_url: str, another URL for `provider`; alone: some server that needs no key. All
        that comes before `/chat/completions`, usually ending in `/v1`, and perhaps a
        query string (Azure's `?api-version=`). None: the provider's.
    api_key: str, sent as a bearer token. None or "": the provider's variable.
    headers: mapping of str to str, on top of ours and of the provider's; replaces a
        header of the same name, whatever the case. None: none.
    extra_body: mapping, members of the request's body whose names stream() itself uses.
        None: none.
    connect_timeout: float, seconds for each of TCP (each address of a name), TLS and
        proxy, and for each block of the request to be taken; None: no bound.
    idle_timeout: float, seconds of silence on the socket, before the headers and
        between any two reads; None: no bound. Then IdleTimeoutError.
    event_timeout: float, seconds since the headers or the last chunk with a choice or
        usage in it, in which other bytes may come (keep-alive comments), without the
        caller's own time between two next(); None: no bound. Then IdleTimeoutError.
    deadline: float, seconds for the whole call from the first next(): all tries, waits
        and the caller's own time; None: no bound. Then DeadlineError, or the error of a
        try after which no time for another is left. DNS is outside Python's reach.
    max_retries: int, tries after the first: on a connection failure (but not on a bad
        certificate or such, which another cannot heal), on 408, 429 and 5xx, when the
        connection breaks before anything was yielded, and when the answer's first word
        is such an error. `x-should-retry` true or false overrides the status;
        insufficient_quota is never retried. The wait is what `retry-after-ms`,
        `Retry-After` (RFC 9110, 10.2.3) or Gemini's `retryDelay` says and up to a tenth
        more (over 120 s: no more tries), else 0.2 s x 2^n x (0.9 to 1.1), at most 30 s.
    strict: bool, True makes an error of what is otherwise a warning: data that is no
        JSON object, an end without finish_reason, a cut or silence behind the end.
    raw: bool, True also yields each parsed JSON object, as Chunk.
    pool: a urllib3 PoolManager (or ProxyManager, or SOCKS manager) of the caller's, for
        private CAs, client certificates and proxies; our headers come on top of its.
        None: connections of our own, and the proxy variables of the environment (never
        for loopback) and SSL_CERT_FILE are honoured.
    params: the other members of the request's body, sent as they are (`temperature=`,
        `tools=` ...), but for those that are None. Unless `n` is among them and asks
        for several choices, all that comes belongs to choice 0.

    Raises ValueError, TypeError and MissingAPIKeyError at the call, and the other
    ChatStreamErrors out of the loop."""
    arguments = dict(locals())
    del api_key, headers  # _start() empties the rest: no key in a traceback's locals
    return _start(arguments, whole=False)


def complete(
    messages: Union[str, Iterable[Union[Mapping[str, Any], Message]]],
    *,
    model: str,
    instructions: Optional[str] = None,
    provider: Union[str, Provider, None] = None,
    base_url: Optional[str] = None,
    api_key: Optional[str] = None,
    headers: Optional[Mapping[str, str]] = None,
    extra_body: Optional[Mapping[str, Any]] = None,
    connect_timeout: Optional[float] = 10.0,
    idle_timeout: Optional[float] = 300.0,
    event_timeout: Optional[float] = 900.0,
    deadline: Optional[float] = None,
    max_retries: int = 4,
    strict: bool = False,
    raw: bool = False,
    pool: Any = None,
    **params: Any,
) -> Message:
    """Ask for a chat completion and return the whole answer, as one Message.

    All options are those of stream(), but that an answer that is cut is asked for
    again, within max_retries, because nobody has seen any of it.

    Returns the Message of choice 0, an empty one if it said nothing; its `completed` is
    the Completed. Raises what stream() raises, with what had arrived as .partial, and
    TypeError for `n` over 1."""
    arguments = dict(locals())
    del api_key, headers
    events: list[Any] = [*_start(arguments, whole=True)]
    message: Message = [Message(), *events][-2]
    done = events[-1]
    return replace(message, finish_reason=done.finish_reason, completed=done)


def aggregate(
    events: Iterable[Event], *, deltas: bool = False
) -> Generator[Event, None, None]:
    """Turn events into whole messages.

    Silent while deltas arrive; at each Completed one Message per choice that has text,
    reasoning, refusal or tool calls, in ascending order of choice, then the Completed
    itself; then it starts afresh. Without a Completed the messages come at the end.

    events: any iterable of events; closed when this generator is closed in the middle.
    deltas: bool, True also passes on all other events as they come.

    Raises TypeError, out of the loop, for what is no event of ours, and what `events`
    raises; a ChatStreamError gets the messages so far as .partial."""
    messages = _aggregate(iter(events), deltas)
    if isinstance(events, types.GeneratorType) and events in _clocks:
        _clocks[messages] = _clocks[events]
    return messages


def decode(
    blocks: Iterable[bytes], *, strict: bool = False, raw: bool = False
) -> Generator[Event, None, None]:
    """Read the body of a 2xx answer that came from anywhere: bytes -> events.

    blocks: any iterable of bytes, cut anywhere: a list, a file opened "rb", the
        iter_content() of requests. Its end is a clean end of the answer.
    strict, raw: bool, as in stream().

    Yields what stream() would; the choices keep the server's indexes, because nobody
    knows what was asked for. Raises TypeError for what is no iterable of bytes, the
    StreamErrors of stream(), and what `blocks` raises, as it is."""
    if isinstance(blocks, (str, bytes, bytearray)):
        raise TypeError("blocks: expected an iterable of bytes, got one alone")
    clock = _Clock()
    body = _unpack(_check_blocks(iter(blocks)), clock)
    return _read_answer(_Answer(strict, raw, Completed()), body, clock)


def cancel(events: Generator[Event, None, None]) -> None:
    """Stop, from any thread or signal handler, a call: its loop raises CancelledError.

    events: the generator that stream() returned, or what aggregate() made of it.

    Works before the first next(), between two events, in the wait before another try,
    and while another thread waits in next(). Only a connection that is being made, and
    with `pool=` all up to the headers, goes on until that wait ends. On a call that has
    ended, and on any other generator, it does nothing. Raises TypeError for what is no
    generator."""
    clock = _clocks.get(_expect("events", events, types.GeneratorType))
    if clock is not None:
        clock.cancel()


# ---
# Arguments -> request
# ---


class _Request(types.SimpleNamespace):
    """The arguments by name, and what _prepare() makes of them."""

    __repr__ = object.__repr__  # another one would show the key


def _start(arguments: dict[str, Any], *, whole: bool) -> _Events:
    """stream(), complete(). Empties `arguments`, which may hold a key."""
    try:
        request = _prepare(_Request(**arguments, whole=whole))
    except Exception as error:
        raise error.with_traceback(None) from None
    finally:
        arguments.clear()
    clock = _Clock(request)
    events = _run(request, clock)
    _clocks[events] = clock
    return events


def _prepare(given: _Request) -> _Request:
    provider, source = _choose_provider(given.provider, given.base_url)
    url = _parse_url(source, _expect(source, provider.base_url, str))
    key = _choose_key(provider, given.api_key, source == "OPENAI_BASE_URL")
    ours = {
        "Accept": "text/event-stream",
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": f"chatstream/{__version__}",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }
    _check_headers("Provider.headers", provider.headers)
    _check_headers("headers", given.headers)
    headers = _merge_headers(ours, provider.headers, given.headers or {})
    pool = given.pool
    if isinstance(pool, type) or not (pool is None or hasattr(pool, "urlopen")):
        raise TypeError(f"pool: expected a urllib3 PoolManager, got {pool!r:.100}")
    if _expect("max_retries", given.max_retries, int) < 0:
        raise ValueError(f"max_retries: expected 0 or more, got {given.max_retries}")
    for name in ("connect_timeout", "idle_timeout", "event_timeout", "deadline"):
        value = _expect(name, getattr(given, name), int, float, None)
        most = 2_147_483  # what socket.settimeout() takes: milliseconds in a C int
        if value is not None and not 0 < value <= most:
            wanted = f"more than 0, at most {most} seconds, or None"
            raise ValueError(f"{name}: expected {wanted}; got {value!r:.99}")
    body = _build_body(given)
    choices = body["n"] if type(body.get("n")) is int else 1
    if given.whole and choices > 1:
        raise TypeError("n: complete() gives one; use aggregate(stream(...))")
    secrets = _Secrets(key, url.target, headers, pool)
    vars(given).update(url=url, headers=headers, secrets=secrets, content=_encode(body))
    vars(given).update(choices=max(choices, 1), env_key=provider.env_key)
    return given


def _expect(name: str, value: Any, *kinds: Any) -> Any:
    """-> the value, if it is of one of the kinds (None stands for itself)."""
    known = tuple(type(None) if kind is None else kind for kind in kinds)
    if isinstance(value, known) and type(value) is not bool:
        return value
    wanted = " or ".join(getattr(kind, "__name__", "None") for kind in kinds)
    got = "None" if value is None else type(value).__name__  # the value may be a key
    raise TypeError(f"{name}: expected {wanted}, got {got}")


def _choose_provider(given: Any, base_url: Any) -> tuple[Provider, str]:
    """-> the provider with its URL, and the URL's source."""
    hint = " (extra_body= takes OpenRouter's)" if isinstance(given, Mapping) else ""
    given = _expect(f"provider{hint}", given, str, Provider, None)
    if not given and base_url is not None:  # some server: no key of ours goes there
        return Provider("base_url", base_url), "base_url"
    found = given if isinstance(given, Provider) else PROVIDERS.get(given or "openai")
    if found is None:
        known = ", ".join(PROVIDERS)
        raise ValueError(f"provider: expected one of {known}; got {given!r}")
    if base_url is not None:
        return replace(found, base_url=base_url), "base_url"
    elsewhere = os.environ.get("OPENAI_BASE_URL", "").strip()
    if elsewhere and found is PROVIDERS.get("openai"):
        return replace(found, base_url=elsewhere), "OPENAI_BASE_URL"
    return found, "base_url"


def _choose_key(provider: Provider, api_key: Any, is_optional: bool) -> str:
    source, key = "api_key", _expect("api_key", api_key, str, None) or ""
    if not key and provider.env_key:
        source, key = provider.env_key, os.environ.get(provider.env_key, "").strip()
        if not (key or is_optional):
            how = provider.env_key_instructions or ""
            text = f"no API key: set the variable {source} or pass api_key=. {how}"
            raise MissingAPIKeyError(text.rstrip(), env_key=source, instructions=how)
    if key[:1] in ("'", '"') or key.isspace():  # docker's --env-file keeps quotes
        raise ValueError(f"{source}: expected a key, got blanks or quotation marks")
    _check_value(source, key)
    return key


def _check_headers(what: str, headers: Any) -> None:
    """RFC 9110, 5.1, 5.5 and 5.6.2. No value is shown: it may be a key."""
    for name, value in (_expect(what, headers, Mapping, None) or {}).items():
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", _expect(what, name, str), re.A):
            raise ValueError(f"{what}: expected names of headers, got another")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"{what}: {name} follows from the body")
        _check_value(f"{what}[{name!r}]", value)


def _check_value(what: str, value: Any) -> None:
    if re.search(r"[^\t -~\x80-\xff]", _expect(what, value, str)):
        raise ValueError(f"{what}: expected printable Latin-1, got a line break or so")


def _merge_headers(*layers: Mapping[str, str]) -> dict[str, str]:
    """Later ones replace earlier ones, whatever the case (RFC 9110, 5.1)."""
    items = [item for layer in layers for item in layer.items()]
    return dict({name.lower(): (name, value) for name, value in items}.values())


_PORTS = {"http": 80, "https": 443}


class _URL:
    """Where a request goes, or a proxy, with headers for it alone.

    shown: without the query, which may be secret."""

    def __init__(self, scheme: str, host: str, port: Any, target: str = "") -> None:
        self.scheme, self.host, self.target = scheme, host, target
        self.port: int = port or _PORTS[scheme]
        self.headers: dict[str, str] = {}
        host = f"[{host}]" if ":" in host else host
        is_usual = self.port == _PORTS[scheme]
        self.origin = f"{scheme}://{host}" + ("" if is_usual else f":{port}")
        self.shown = self.origin + target.partition("?")[0]


@lru_cache(maxsize=16)
def _parse_url(source: str, base_url: str) -> _URL:
    """Check a base URL, and add the path of the endpoint. source: its name."""
    from urllib.parse import quote, urlsplit

    base_url = base_url.strip()
    try:
        url = urlsplit(base_url)
        host, port = url.hostname or "", url.port
        host.encode("idna")  # labels of 1 to 63
    except ValueError:
        url, host, port = urlsplit(""), "", None
    path = url.path.rstrip("/")
    for is_wrong, wanted in (
        ("@" in base_url.partition("?")[0], "no user:password@ (use api_key=)"),
        # IDNA 2003, which Python knows, sends some names to another domain.
        (not host.isascii(), "the host in its xn-- form"),
        (url.scheme not in _PORTS or not host or port == 0, "in this form"),
        # Some clients take a backslash for a slash.
        (re.search("[\0- \\\\\x7f#\ud800-\udfff]", base_url), "no blank, no \\, no #"),
        (path.endswith("/chat/completions"), "only what is before /chat/completions"),
    ):
        if is_wrong:
            form = f"expected http(s)://host[:port][/path][?query], {wanted}"
            got = "" if "@" in base_url else re.split("[?#]", base_url)[0]
            raise ValueError(f"{source}: {form}; got {got!r:.200}")
    safe = "/%:@!$&'()*+,;=-._~"
    target = quote(path, safe=safe) + "/chat/completions"
    if url.query:
        target += "?" + quote(url.query, safe=safe + "?")
    return _URL(url.scheme, host, port, target)


#: Names of other clients -> what they are here.
_THEIR_NAMES = {
    "system system_prompt": "instructions=",
    "prompt": "messages",
    "key apikey": "api_key=",
    "url api_base": "base_url=",
    "extra_headers default_headers organization project": "headers=",
    "extra_query default_query api_version": "the query of base_url=",
    "proxy proxies verify cert http_client session ssl_context": "pool=",
    "retries num_retries": "max_retries=",
    "timeout request_timeout total_timeout": "connect_timeout=, idle_timeout=, deadline=",
}


def _build_body(given: _Request) -> dict[str, Any]:
    if not _expect("model", given.model, str).strip():
        raise ValueError(f"model: expected a model's name, got {given.model!r}")
    _expect("instructions", given.instructions, str, None)
    extra_body = _expect("extra_body", given.extra_body, Mapping, None) or {}
    if "stream" in {*given.params, *extra_body}:
        raise TypeError("stream: it is always true; for messages there is aggregate()")
    for theirs, ours in _THEIR_NAMES.items():
        for name in given.params.keys() & set(theirs.split()):
            raise TypeError(f"{name}: expected {ours}, or extra_body= for the member")
    messages = _expect("messages", given.messages, str, Iterable)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}] if messages else []
    history: list[Any] = []
    for item in messages:
        _expect(f"messages[{len(history)}]", item, Mapping, Message)
        history.append(item.to_dict() if isinstance(item, Message) else dict(item))
    if not history:
        raise ValueError("messages: empty; expected at least one")
    if given.instructions:
        history.insert(0, {"role": "system", "content": given.instructions})
    params = {name: value for name, value in given.params.items() if value is not None}
    start = {"model": given.model, "messages": history, "stream": True}
    return {**start, **params, **extra_body}


def _encode(body: dict[str, Any]) -> bytes:
    """Strict servers refuse half a surrogate pair: it goes out as U+FFFD."""
    options: Any = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    try:
        return _valid_unicode(json.dumps(body, **options)).encode()
    except RecursionError:
        raise ValueError("the body: expected JSON that is less deep") from None


# ---
# Secrets, and texts that are shown
# ---

#: In the names of headers whose values are secret.
_SECRET = re.compile("auth|key|token|secret|cookie|pass", re.IGNORECASE)


class _Secrets:
    """What is seen in no error and no log line, even if the server sends it back. Texts
    are hidden first and cut later: no half of a secret stands at a cut."""

    def __init__(self, key: str, target: str, headers: Any, pool: Any) -> None:
        more = [getattr(pool, name, None) for name in ("headers", "proxy_headers")]
        items = [item for layer in (headers, *more) for item in (layer or {}).items()]
        found = [value for name, value in items if _SECRET.search(name)]
        self.are_sent = bool(found)
        self._values = {key, *found, *(value.rpartition(" ")[2] for value in found)}
        self.add(*re.findall("=([^&]*)", target.partition("?")[2]))

    def add(self, *values: str) -> None:
        self._values.update(values)

    def hide(self, text: Any) -> Any:
        from urllib.parse import unquote

        if not isinstance(text, str):
            return text
        forms = {*self._values, *map(unquote, self._values)}
        forms |= {json.dumps(form)[1:-1] for form in forms}
        forms |= {form.replace("/", "\\/") for form in forms}
        # The longest first, since one may begin another; short ones are dummies.
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***") if len(form) >= 8 else text
        return text

    def clean(self, error: ChatStreamError) -> None:
        """No secret in an error and its causes, one line of text, no frames."""
        for item in _chain(error):
            item.args = tuple(map(self.hide, item.args))
            vars(item).update({n: self.hide(v) for n, v in vars(item).items()})
            item.__traceback__ = None  # the functions it came through hold the key
        error.args = (_one_line(str(error), _MAX_TEXT),)


def _chain(error: Optional[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


#: Characters of a sentence, a quotation, an error's text.
_MAX_SENTENCE, _MAX_QUOTE, _MAX_TEXT = 2000, 200, 4000

#: What a terminal would obey.
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")


def _one_line(text: str, most: int) -> str:
    line = " ".join(_valid_unicode(text[: 4 * most]).translate(_CONTROLS).split())
    is_whole = len(line) <= most and len(text) <= 4 * most
    return line if is_whole else line[: most - 3] + "..."


def _valid_unicode(text: str) -> str:
    """Surrogate pairs are joined, and a lone half becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _dump(value: Any, **options: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, **options)
    except RecursionError:
        return '"..."'


# ---
# The clock, and cancelling
# ---


def _is_timeout(error: BaseException) -> bool:
    """Not ETIMEDOUT, which has an errno: that is a failed connection."""
    import socket

    return isinstance(error, (socket.timeout, TimeoutError)) and error.errno is None


def _shut_down(sock: Any) -> None:
    """SSLSocket's own would take the TLS object away under a reader."""
    with suppress(ImportError, OSError, TypeError):  # the first while Python ends
        import socket

        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _Clock:
    """How long a call may wait. The owner of time and of cancelling, which comes from
    other threads and signal handlers. is_pressing: check() may raise."""

    def __init__(self, request: Optional[_Request] = None) -> None:
        import threading

        self.idle_timeout = getattr(request, "idle_timeout", None)
        self.event_timeout = getattr(request, "event_timeout", None)
        self._deadline: Any = getattr(request, "deadline", None)
        self._url = request.url.shown if request else ""
        self._call_ends = self._ends = math.inf  # _ends: of the call, or of the event
        self._phase = ""
        self._waits_since = 0.0
        self._lock = threading.RLock()  # a signal handler may cancel() at any moment
        self._sleeping = threading.Lock()
        self._sleeping.acquire()
        self._sock: Any = None
        self._cancelled = False
        self.is_pressing = self._deadline is not None

    def start_try(self) -> None:
        if self._deadline is not None and self._call_ends == math.inf:
            self._call_ends = time.monotonic() + self._deadline
        self._ends = self._call_ends
        self._phase = " before the headers"
        self.check()

    def start_event(self, seconds: Optional[float] = None) -> None:
        """The next chunk that says something may take event_timeout, or so long."""
        self._phase = ""
        bound = self.event_timeout if seconds is None else seconds
        ends = math.inf if bound is None else time.monotonic() + bound
        self._ends = ends if ends < self._call_ends else self._call_ends

    def check_cancel(self) -> None:
        if self._cancelled:
            raise CancelledError(f"{self._url}: cancel() was called")

    def check(self) -> None:
        """Raise CancelledError or DeadlineError if it is time."""
        self.check_cancel()
        if time.monotonic() >= self._call_ends:
            text = f"{self._url}: not done within {self._deadline:g} s (deadline)"
            raise DeadlineError(text, seconds=float(self._deadline))

    def check_event(self) -> None:
        """The same, and IdleTimeoutError for the event's bound."""
        self.check()
        if time.monotonic() >= self._ends:
            raise self.silence("event_timeout", "no chunk with anything in it")

    def silence(self, bound: str = "idle_timeout", what: str = "nothing") -> Exception:
        seconds = float(getattr(self, bound) or 0)
        text = f"idle timeout waiting for SSE: {self._url}: the server sent {what}"
        text += f" for {seconds:g} s{self._phase} ({bound})"
        return IdleTimeoutError(text, seconds=seconds)

    def bound(self, seconds: Optional[float]) -> Optional[float]:
        """-> the least of a wait's seconds, the event's and the call's; None: none."""
        self._waits_since = time.monotonic()
        left = self._ends - self._waits_since
        if left <= 0 or self._cancelled:
            self.check_event()
        if seconds is not None and seconds < left:
            return seconds
        return None if left == math.inf else max(left, 0.001)

    def wait(self, sock: Any, seconds: Any, late: Any, call: Any, *args: Any) -> Any:
        """`call(*args)`, which waits on the socket. Raises late() after so many
        seconds, or another bound's error. An earlier timeout is a signal handler's."""
        bound = self.bound(seconds)
        if sock is not None and sock.gettimeout() != bound:
            sock.settimeout(bound)
        try:
            result = call(*args)
        except OSError as error:
            self.check_cancel()
            took = time.monotonic() - self._waits_since
            if bound is not None and took >= bound - 0.01 and _is_timeout(error):
                self.check_event()
                raise late() from None
            raise
        self.check_cancel()
        return result

    def has_time_for(self, seconds: float) -> bool:
        return time.monotonic() + seconds < self._call_ends

    def sleep(self, seconds: float) -> None:
        """On a plain lock: an Event's is not re-entrant for a signal handler."""
        self._sleeping.acquire(timeout=seconds)

    def watch(self, sock: Any) -> None:
        with self._lock:
            self._sock = sock

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = self.is_pressing = True
            with suppress(RuntimeError):
                self._sleeping.release()
            _shut_down(self._sock)


# ---
# Tries and waits
# ---

#: Seconds: the first and the longest wait between two tries; what a server may ask for.
_FIRST_BACKOFF, _LONGEST_BACKOFF, _LONGEST_RETRY_AFTER = 0.2, 30.0, 120.0


class _Retryable(ChatStreamError):
    """A try ended in `error`; another may help, after `wait` seconds or the backoff."""

    error: Any = None
    wait: Optional[float] = None


def _logger() -> Any:
    import logging

    return logging.getLogger("chatstream")


def _run(request: _Request, clock: _Clock) -> _Events:
    import random

    backoff = _FIRST_BACKOFF
    for attempt in itertools.count(1):
        events = _attempt(request, clock)
        try:
            yield from _aggregate(events, False) if request.whole else events
            return
        except _Retryable as failed:
            error, wait = failed.error, failed.wait
            error.partial = failed.partial
        except TransportError as failure:
            failure.attempts = attempt
            raise
        if hasattr(error, "attempts"):
            error.attempts = attempt
        # Random, so that not all come at once; never sooner than a server asked.
        if wait is None:
            delay = min(backoff * random.uniform(0.9, 1.1), _LONGEST_BACKOFF)
            backoff *= 2
        else:
            delay = wait + random.uniform(0, min(wait / 10, 1.0))
        is_last = attempt > request.max_retries or (wait or 0) > _LONGEST_RETRY_AFTER
        if is_last or not clock.has_time_for(delay):
            if attempt > 1:
                error.args = (f"{error} ({attempt} attempts)",)
            raise error
        tries = f"try {attempt + 1} of {request.max_retries + 1}"
        _logger().warning("%s; %s in %.2f s", error, tries, delay)
        clock.sleep(delay)


_REQUEST_IDS = ["x-request-id", "apim-request-id", "x-ms-request-id"]
_REQUEST_IDS += ["x-generation-id", "x-litellm-call-id", "cf-ray"]


def _attempt(request: _Request, clock: _Clock) -> _Events:
    clock.start_try()
    hide, log = request.secrets.hide, _logger()
    if log.isEnabledFor(10):  # DEBUG
        shown = hide(request.content.decode())[:2000]
        log.debug("POST %s %s", request.url.shown, shown)
    started = time.monotonic()
    request_id, reply = "", None
    try:
        reply = (_open if request.pool is None else _open_in_pool)(request, clock)
        clock.start_event()
        request_id = next(filter(None, map(reply.headers.get, _REQUEST_IDS)), "")
        facts = (reply.status, time.monotonic() - started, hide(request_id))
        log.debug("%d in %.3f s, request id %r", *facts)
        if not 200 <= reply.status < 300:
            raise _status_failure(request, reply, clock)
        yield from _read_reply(request, reply, clock, request_id)
        log.debug("done in %.3f s", time.monotonic() - started)
    except ChatStreamError as failure:
        error = failure.error if isinstance(failure, _Retryable) else failure
        error.request_id = error.request_id or request_id
        error.__cause__ = error.__cause__ or failure.__cause__
        request.secrets.clean(error)
        raise failure.with_traceback(None) from failure.__cause__
    finally:
        clock.watch(None)
        if reply is not None:
            reply.close()


#: Time for the body to end after [DONE], so that its connection can be reused.
_GRACE_SECONDS = 0.05

#: The statuses and words of errors that another try may heal.
_PASSING = {*map(str, (408, 429, *range(500, 600))), "server_error", "overloaded_error"}
_PASSING |= {"rate_limit_error", "rate_limit_exceeded"}

#: What none heals, anywhere in an error.
_SPENT = "insufficient_quota"


def _read_reply(request: _Request, reply: _Reply, clock: _Clock, name: str) -> _Events:
    known = Completed(request_id=name, headers=dict(reply.headers))
    hide, asked = request.secrets.hide, request.choices
    answer = _Answer(request.strict, request.raw, known, asked, hide)
    body = _unpack(_receive(reply), clock)
    try:
        yield from _read_answer(answer, body, clock)
    except TruncatedStreamError as fault:
        if fault is not answer.cut or (answer.started and not request.whole):
            raise
        outer = fault if answer.started else TransportError(f"{reply.where}: {fault}")
        raise _Retryable(error=outer) from fault.__cause__
    except ServerError as fault:
        text, words = _dump(fault.raw), {str(fault.code), str(fault.type)}
        may_heal = not words.isdisjoint(_PASSING) and _SPENT not in text
        if answer.started or not _may_retry(reply.headers, may_heal):
            raise
        wait = _retry_after(reply.headers, text)
        raise _Retryable(error=fault, wait=wait) from None
    finally:  # also where the caller leaves at Completed
        if answer.done:
            clock.start_event(_GRACE_SECONDS)
            with suppress(ChatStreamError, _Cut):
                for _ in body:
                    pass


def _may_retry(headers: Mapping[str, str], may_heal: bool) -> bool:
    asked = headers.get("x-should-retry", "").lower()
    return {"true": True, "false": False}.get(asked, may_heal)


def _retry_after(headers: Mapping[str, str], text: str) -> Optional[float]:
    """-> the seconds that a server asks to wait: in its headers, as a number or as an
    HTTP-date (RFC 9110, 5.6.7), or as Gemini's retryDelay anywhere in its error."""
    import calendar
    from email.utils import parsedate

    found = re.search(r'"retryDelay\\*"\s*:\s*\\*"([0-9.]+)s\\*"', text)
    delay = found[1] if found else ""
    milliseconds, seconds = [headers.get(f"retry-after{n}", "") for n in ("-ms", "")]
    for value, unit in ((milliseconds, 0.001), (seconds, 1), (delay, 1)):
        # parsedate()'s of nonsense, the last on 3.9
        with suppress(TypeError, ValueError, OverflowError, IndexError):
            if value[:1].isalpha():
                wait = calendar.timegm(parsedate(value) or ()) - time.time()
            else:
                wait = float(value.split(",")[0]) * unit
            if 0 < wait < math.inf:
                return wait
    return None


# ---
# The body: framing, compression, and the loop over it
# ---

# http.client would undo the framing, too. But it takes a body shorter than its
# Content-Length for a clean end, and hands over one chunk a call: to join all that one
# recv() brings halves the cost of an event.

#: Bytes of a read; at least its file's buffer, so that none stay in there.
_BLOCK_SIZE = max(65536, io.DEFAULT_BUFFER_SIZE)


class _Cut(Exception):
    """No more bytes come. Its argument is the error that says why."""


def _cut(how: str) -> TruncatedStreamError:
    return TruncatedStreamError(f"the answer was cut: {how}")


def _read_answer(answer: _Answer, body: Iterable[bytes], clock: _Clock) -> _Events:
    cut: Optional[ChatStreamError] = None
    try:
        for block in body:
            for event in answer.feed(block):
                if clock.is_pressing:
                    clock.check()
                yield event
            if answer.done:
                break
            if answer.has_said:
                clock.start_event()
    except _Cut as reason:
        cut = reason.args[0]
    for event in answer.end(cut):
        clock.check_cancel()
        yield event


def _receive(reply: _Reply) -> Iterator[bytes]:
    """The body without its framing. Raises _Cut unless it ends properly."""
    try:
        yield from _unframe(reply)
    except (StreamError, DeadlineError) as error:
        raise _Cut(error) from None


def _unframe(reply: _Reply) -> Iterator[bytes]:
    """RFC 9112, 6.3."""
    blocks, headers = reply.read(), reply.headers
    is_empty = reply.status in (204, 304) or reply.status < 200
    codings = re.findall(r"[^\s,]+", headers.get("transfer-encoding", "").lower())
    length = "0" if is_empty else headers.get("content-length")
    if not reply.has_file:
        yield from blocks
    elif not {"chunked", "identity"}.issuperset(codings):
        raise StreamError(f"expected Transfer-Encoding chunked, got {codings}")
    elif codings[-1:] == ["chunked"] and not is_empty:
        reply.end_body((yield from _dechunk(blocks)))
    elif length is None:
        yield (first := next(blocks, b""))
        if not first:
            raise _cut("before its first byte")
        yield from blocks
    elif not re.fullmatch(r"([0-9]{1,18})(, *\1)*", length):
        raise _cut(f"expected one Content-Length, got {length!r}")
    else:
        left = int(length.partition(",")[0])
        while left > 0:
            block = next(blocks, b"")
            if not block:
                raise _cut(f"{left} bytes short of its Content-Length")
            yield block[:left]
            left -= len(block)
        reply.end_body(left < 0)


#: Bytes of a chunk-size line or a trailer.
_MAX_FRAMING = 16 * 1024


def _dechunk(blocks: Iterable[bytes]) -> Generator[bytes, None, bool]:
    """RFC 9112, 7.1. Returns whether more is behind it all. A line here is the end of a
    chunk and the size of the next, or a trailer."""
    left = 0  # bytes of the chunk that are to come
    unread = b"\r\n"  # a line that is not whole, here as if behind a chunk
    width = 0  # of the last line: the next is mostly as long
    is_last = False
    fault = ""
    for block in blocks:
        block = unread + block
        pieces = [block[:left]]
        at = len(pieces[0])
        left -= at
        while not (left or fault):
            line = block[at : at + width]
            size = _parse_size(line)
            if size < 0 or is_last:
                end = block.find(b"\n", at if is_last else at + 2) + 1
                if not end:
                    break
                line = block[at:end]
                size, width = _parse_size(line), len(line)
            at += len(line)
            if is_last:
                if not line.strip():
                    yield b"".join(pieces)
                    return at < len(block)
            elif size >= 0:
                is_last = size == 0
                pieces.append(block[at : at + size])
                at += size
                if at > len(block):
                    left, at = at - len(block), len(block)
            elif line[:1] in b"\r\n":
                fault = f"expected a chunk size, got {line.strip()!r}"
            else:
                fault = "a chunk is longer than its size"
        unread = block[at:]
        if len(unread) > _MAX_FRAMING and not fault:
            fault = f"a line of its framing has more than {_MAX_FRAMING} bytes"
        yield b"".join(pieces)
        if fault:
            raise _cut(fault)
    raise _cut("inside a chunk" if left else "without its last chunk")


@lru_cache(maxsize=512)  # an answer has few: the sizes of its events
def _parse_size(line: bytes) -> int:
    """Of the next chunk; blanks and extensions may follow it. -1: none is there."""
    found = re.fullmatch(rb"\r?\n[ \t]*([0-9A-Fa-f]{1,16})[ \t\r]*(?:;[^\n]*)?\n", line)
    return int(found[1], 16) if found else -1


def _unpack(blocks: Iterable[bytes], clock: _Clock) -> Iterator[bytes]:
    """Undo gzip and zlib, which nginx uses unasked. The body tells, not the header:
    proxies leave that there when they unpack."""
    blocks, start = iter(blocks), b""
    for block in blocks:  # until two bytes tell
        start += block
        if start not in (b"", b"\x1f", b"\x78"):
            break
    if not re.match(rb"\x1f(\x8b|\Z)|\x78[\x01\x5e\x9c\xda]", start):  # RFC 1952, 1950
        yield start
        yield from blocks
        return
    import zlib

    inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)
    for block in itertools.chain([start], blocks):
        for at in range(0, len(block), 1024):  # of which come at most some MiB
            plain, fault = [], ""
            try:  # bytewise: what is broken spoils all that is read with it
                for byte in block[at : at + 1024]:
                    if not inflater.eof:  # what is behind it is ignored
                        plain.append(inflater.decompress(bytes([byte])))
            except zlib.error as error:
                fault = f"the compression is broken: {error}"
            clock.check_event()
            yield b"".join(plain)
            if fault:
                raise _Cut(StreamError(fault))
    if not inflater.eof:
        raise _Cut(_cut("its compressed data is incomplete"))


# ---
# Transport: request -> reply
# ---


class _Reply:
    """A reply whose headers are there, and its connection.

    response: http.client's, or a mock's, whose read() gives the body unframed if it has
        no file. release: takes whether to keep it."""

    def __init__(
        self, response: Any, sock: Any, clock: _Clock, release: Any, where: str
    ):
        file = getattr(response, "fp", None)
        self.has_file = hasattr(file, "read1")
        self.response = response
        self.where = where
        self._release = release
        self._is_reusable = False
        self._sock = sock if self.has_file else None
        source = file if self.has_file else response
        self._read1 = getattr(source, "read1", None) or response.read
        # What came with the headers is in the file; the rest costs less here.
        self._recv = getattr(self._sock, "recv", self._read1)
        self._wait = partial(clock.wait, self._sock, clock.idle_timeout, clock.silence)
        try:
            self._wait(_read_head, response)
        except BaseException:
            release(False)
            raise
        self.status: int = response.status
        self.headers = _take_headers(response.headers)

    def read(self) -> Iterator[bytes]:
        try:
            read = self._read1
            while block := self._wait(read, _BLOCK_SIZE):
                yield block
                read = self._recv
        except Exception as error:
            _pass_on(error)
            raise _cut(str(error) or type(error).__name__) from error

    def end_body(self, has_more: bool) -> None:
        """The end that the framing names has come, perhaps with more behind it."""
        pending = getattr(self._sock, "pending", int)()  # TLS has decrypted it already
        is_last = self.status < 200 or self.response.will_close
        self._is_reusable = not (has_more or is_last or pending)

    def close(self) -> None:
        if not self._is_reusable:
            self._release(False)
        self.response.close()
        if self._is_reusable:
            self._release(True)


def _pass_on(error: BaseException) -> None:
    """Raise it, unless the network broke; a timeout is the clock's."""
    import http.client

    kinds = (OSError, http.client.HTTPException)
    is_network = isinstance(error, kinds) or "urllib3." in type(error).__module__
    if isinstance(error, ChatStreamError) or _is_timeout(error) or not is_network:
        raise error


def _open(request: _Request, clock: _Clock) -> _Reply:
    import http.client

    url, proxy = request.url, _find_proxy(request.url, request.secrets)
    peer = proxy or url
    # Looked up now: vcrpy and others put their own there.
    make: Any = http.client.HTTPConnection
    options: dict[str, Any] = {"timeout": clock.bound(request.connect_timeout)}
    tunnel = url.origin if proxy and url.scheme == "https" else ""
    try:
        if "https" in (url.scheme, peer.scheme):
            import ssl

            make = http.client.HTTPSConnection
            cert_file = os.environ.get("SSL_CERT_FILE")
            options["context"] = _tls_context(ssl.SSLContext, cert_file)
        key = (make, peer.origin, tunnel, options.get("context"))
        connection = _take_idle(key)
        if connection is not None:
            # A dead one costs no try: servers close after a while.
            try:
                return _exchange(connection, key, request, proxy, clock)
            except OSError as error:
                _pass_on(error)
        connection = make(peer.host, peer.port, **options)
        if tunnel:
            connection.set_tunnel(url.host, url.port, peer.headers)
        return _exchange(connection, key, request, proxy, clock)
    except Exception as error:
        _pass_on(error)
        raise _transport_failure(error, _where(url, proxy)) from error


def _exchange(
    connection: Any, key: Any, request: _Request, proxy: Any, clock: _Clock
) -> _Reply:
    url, body, owner = request.url, request.content, os.getpid()
    is_absolute = proxy is not None and url.scheme == "http"  # RFC 9112, 3.2.2
    target = url.origin + url.target if is_absolute else url.target
    closes = "close" in _take_headers(request.headers).get("connection", "").lower()
    where, bound = _where(url, proxy), request.connect_timeout
    text = f"{where}: no connection within {bound} s (connect_timeout)"
    text += "" if proxy else "; a proxy is taken from the environment alone"
    late = partial(_Retryable, error=TransportError(text))

    def start() -> None:
        length = {"Content-Length": str(len(body))}
        peer: Any = proxy if is_absolute else url
        block = body[:_BLOCK_SIZE]
        # The headers hold keys: no frame of ours has a name for them.
        connection.request(
            "POST", target, block, _merge_headers(peer.headers, request.headers, length)
        )

    def release(is_reusable: bool) -> None:
        if is_reusable and not closes and len(_idle.get(key, ())) < 256:
            _idle.setdefault(key, []).append(connection)
        else:  # a forked child's connection is still its parent's
            _close(connection, sock if os.getpid() == owner else None)

    sock = connection.sock
    try:
        clock.watch(sock)
        clock.wait(sock, bound, late, start)
        sock = connection.sock  # http.client lets go of it where this reply is the last
        clock.watch(sock)
        _keep_alive(sock)
        send = partial(clock.wait, sock, bound, partial(_stalled, where))
        # A server may refuse a large request before its end.
        with suppress(BrokenPipeError, ConnectionResetError):
            for at in range(_BLOCK_SIZE, len(body), _BLOCK_SIZE):
                send(connection.send, body[at : at + _BLOCK_SIZE])
        read = partial(clock.wait, sock, clock.idle_timeout, clock.silence)
        response = read(connection.getresponse)
    except BaseException:
        release(False)
        raise
    return _Reply(response, sock, clock, release, where)


def _stalled(where: str) -> TransportError:
    return TransportError(f"{where}: timed out while sending the request")


#: Kept connections by class, peer, tunnel and TLS context.
_idle: dict[Any, list[Any]] = {}


def _take_idle(key: Any) -> Any:
    """Not one on which something came: an end or a stray 408 would be the reply."""
    import socket

    with suppress(LookupError):
        while True:
            connection = _idle[key].pop()
            try:
                connection.sock.settimeout(0)
                socket.socket.recv(connection.sock, 1, socket.MSG_PEEK)
            except BlockingIOError:
                return connection
            except (OSError, TypeError):
                pass
            _close(connection, connection.sock)
    return None


def _close(connection: Any, sock: Any) -> None:
    """Shut down first: a forked child may hold the descriptor, too."""
    _shut_down(sock)
    connection.close()


@atexit.register
def _close_idle(is_forked: bool = False) -> None:
    while _idle:
        for connection in _idle.popitem()[1]:
            _close(connection, None if is_forked else connection.sock)


if hasattr(os, "register_at_fork"):  # a forked child must not write to our connections
    os.register_at_fork(after_in_child=partial(_close_idle, True))


def _keep_alive(sock: Any) -> None:
    """So that no NAT or firewall forgets a connection on which a model thinks."""
    import socket

    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), 30)


def _read_head(response: Any) -> None:
    """Read past 1xx (RFC 9110, 15.2; http.client does past 100 alone)."""
    while getattr(response, "fp", None) is not None and 101 < response.status < 200:
        response.headers = response.msg = None
        response.begin()
    for defect in getattr(response.headers, "defects", ()):
        if type(defect).__name__.startswith(("MissingHeaderBody", "FirstHeaderLine")):
            raise ConnectionError(f"a header cannot be read: {defect!r}")


def _take_headers(headers: Any) -> dict[str, str]:
    """Lower case; several of one name are joined (RFC 9110, 5.3)."""
    taken: dict[str, str] = {}
    for name, value in headers.items():
        name, value = name.lower(), str(value).strip()
        if name != "set-cookie":
            taken[name] = f"{taken[name]}, {value}" if name in taken else value
    return taken


def _transport_failure(cause: BaseException, where: str) -> ChatStreamError:
    kind = type(cause).__name__
    text = str(cause) or kind
    if kind in ("BadStatusLine", "UnknownProtocol"):
        text = f"expected a reply in HTTP/1.1, got {text!a}"
    final = "SSLCertVerificationError SSLError FileNotFoundError PermissionError"
    is_final = kind in final.split() or "Tunnel connection failed: 4" in text
    if re.search("Key Identifier|not marked critical", text):
        text += "; does a pool= whose ssl_context has no VERIFY_X509_STRICT work?"
    elif kind == "SSLCertVerificationError":
        text += "; SSL_CERT_FILE=ca.pem makes a private authority trusted"
    elif re.search("WRONG_VERSION_NUMBER|HTTP_REQUEST|RECORD_LAYER", text):
        text += "; the server does not speak TLS here: is it http://?"
    error = TransportError(f"{where}: {text}")
    return error if is_final else _Retryable(error=error)


def _open_in_pool(request: _Request, clock: _Clock) -> _Reply:
    import http.client

    import urllib3

    pool = request.pool
    where = _where(request.url, getattr(pool, "proxy", None))
    upload = io.BytesIO(request.content)  # sent in blocks with a timeout each
    length = {"Content-Length": str(len(request.content))}
    connect = clock.bound(request.connect_timeout)
    read = clock.bound(clock.idle_timeout)
    sockets = (OSError, http.client.HTTPException)

    def release(is_reusable: bool) -> None:
        if not is_reusable:
            wrapper.close()
        wrapper.release_conn()

    try:
        wrapper = pool.urlopen(
            "POST",
            request.url.origin + request.url.target,
            body=upload,
            headers=_merge_headers(pool.headers or {}, request.headers, length),
            timeout=urllib3.Timeout(connect=connect, read=read),
            pool_timeout=connect,
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        # urllib3's own read1() costs thrice as much, and 1.26 has none.
        response = getattr(wrapper, "_original_response", None) or wrapper
        raw = getattr(getattr(response, "fp", None), "raw", None)
        sock = getattr(raw, "_sock", None)
        clock.watch(sock)
        _keep_alive(sock)
        return _Reply(response, sock, clock, release, where)
    except (*sockets, urllib3.exceptions.HTTPError) as error:
        if isinstance(error, ChatStreamError):
            raise
        clock.check()
        # The socket's error is inside those of urllib3.
        inside = [item for outer in _chain(error) for item in (outer, *outer.args)]
        cause = next((e for e in inside if isinstance(e, sockets)), error)
        if not (_is_timeout(cause) and upload.tell()):
            raise _transport_failure(cause, where) from cause
        is_sent = upload.tell() == len(request.content)
        raise (clock.silence() if is_sent else _stalled(where)) from cause


# ---
# Proxies and certificates
# ---


def _where(url: _URL, proxy: Any) -> str:
    shown = proxy and f"{proxy.scheme}://{proxy.host}:{proxy.port}"
    return url.shown + (f" (through the proxy {shown})" if proxy else "")


def _find_proxy(url: _URL, secrets: _Secrets) -> Optional[_URL]:
    names = (f"{url.scheme}_proxy", "all_proxy")
    if not any(os.environ.get(n) or os.environ.get(n.upper()) for n in names):
        return None  # spares the import
    import urllib.request
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes, urlsplit

    settings = urllib.request.getproxies_environment()
    value = (settings.get(url.scheme) or settings.get("all") or "").strip()
    if not value or _goes_direct(url, settings.get("no", "")):
        return None
    try:
        parts = urlsplit(value if "://" in value else "http://" + value)
        host, port = parts.hostname, parts.port
    except ValueError:  # raising here would chain it: it may quote the password
        parts, host, port = urlsplit("http:"), None, None
    if not host or "@" in parts.path + parts.query + parts.fragment:
        name = f"{url.scheme.upper()}_PROXY or ALL_PROXY"
        raise TransportError(f"{name} is not valid: expected http://host:port")
    if parts.scheme not in _PORTS or parts.scheme == url.scheme == "https":
        text = "urllib3.ProxyManager(...) or contrib.socks.SOCKSProxyManager(...)"
        raise TransportError(f"a {parts.scheme}:// proxy needs pool={text}")
    proxy = _URL(parts.scheme, host, port)
    if parts.username is not None:
        password = parts.password or ""
        pair = unquote_to_bytes(os.fsencode(f"{parts.username}:{password}"))
        token = b64encode(pair).decode()
        secrets.add(token, password)
        proxy.headers["Proxy-Authorization"] = f"Basic {token}"
    return proxy


def _goes_direct(url: _URL, no_proxy: str) -> bool:
    """NO_PROXY names it, or it is this machine (0.0.0.0 and :: in servers' logs)."""
    import ipaddress
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

    peer, entries = f"{url.host}:{url.port}", [e.strip() for e in no_proxy.split(",")]
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        names = {"no": f"localhost,{no_proxy.replace('*.', '.')}"}
        return entries == ["*"] or bool(proxy_bypass_environment(peer, names))
    for entry in entries:
        with suppress(ValueError):  # a name; urllib.request finds 1.2.3 in 10.1.2.3
            if address in ipaddress.ip_network(entry, strict=False):
                return True
    is_here = address.is_loopback or address.is_unspecified
    return is_here or not {"*", peer}.isdisjoint(entries)


@lru_cache(maxsize=16)
def _tls_context(kind: Any, cert_file: Optional[str]) -> Any:
    """Cached by class, because truststore swaps it, and by SSL_CERT_FILE."""
    import ssl

    try:
        context = ssl.create_default_context()
    except (OSError, ValueError) as error:
        # Windows' store has a bad certificate; SSLKEYLOGFILE cannot be written.
        _logger().warning("ssl.create_default_context() failed: %s", error)
        context = kind(ssl.PROTOCOL_TLS_CLIENT)
        context.set_default_verify_paths()
    context.set_alpn_protocols(["http/1.1"])
    try:
        can_trust = bool(context.cert_store_stats()["x509_ca"])
    except NotImplementedError:  # truststore asks the system
        can_trust = True
    folder = ssl.get_default_verify_paths().capath
    if not (cert_file or can_trust or (folder and os.listdir(folder))):
        try:
            import certifi  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            text = "no certificate authorities: install certifi or set SSL_CERT_FILE"
            raise TransportError(text) from None
        cert_file = certifi.where()
    try:
        if cert_file:
            context.load_verify_locations(cafile=cert_file)
    except OSError as error:
        text = f"SSL_CERT_FILE={cert_file} cannot be read: {error}"
        raise TransportError(text) from error
    return context


# ---
# Replies that are not 2xx, and what an error says
# ---

#: Bytes and seconds for the body of an error: the status is known and worth more.
_MAX_ERROR_BODY, _ERROR_BODY_SECONDS = 64 * 1024, 5.0


def _status_failure(request: _Request, reply: _Reply, clock: _Clock) -> ChatStreamError:
    import http.client

    status, hide = reply.status, request.secrets.hide
    headers = {name: hide(value) for name, value in reply.headers.items()}
    data = b""
    clock.start_event(_ERROR_BODY_SECONDS)
    with suppress(_Cut, StreamError, DeadlineError):  # nothing may hide the status
        for piece in _unpack(_receive(reply), clock):
            data += piece
            if len(data) >= _MAX_ERROR_BODY:
                break
    body = data[:_MAX_ERROR_BODY].decode("utf-8-sig", "replace")
    values = _parse_run(body)
    if values is None:  # behind `data:` and other fields (DashScope), or no JSON
        values = [v for line in body.splitlines() for v in _parse_run(line) or ()]
    facts = _error_facts(values or body, hide)
    del facts["type"]
    reason = getattr(reply.response, "reason", "")
    said = facts["message"] or reason or http.client.responses.get(status, "")
    text = f"HTTP {status} from {reply.where}" + (f": {said}" if said else "")
    location = re.split("[?#]", headers.get("location", ""))[0]
    if 300 <= status < 400 and location:
        location = re.sub("//.*@", "//", _one_line(location, _MAX_SENTENCE))
        text += f" (redirects are not followed; Location: {location})"
    elif status == 401 and not request.secrets.are_sent:
        source = f" or set {request.env_key}" if request.env_key else ""
        text += f" (no key was sent: pass api_key={source})"
    elif status == 404 and request.url.target.startswith("/chat/completions"):
        text += " (the base URL has no path: does it lack /v1?)"
    wait = _retry_after(headers, body)
    again = _may_retry(headers, str(status) in _PASSING) and _SPENT not in body
    facts.update(status=status, body=body, retry_after=wait, headers=headers)
    error = (RetryLimitError if again else StatusError)(text, **facts)
    return _Retryable(error=error, wait=wait) if again else error


#: Where the sentence is, the most believed first, in lower case without _;
#: OpenRouter's is metadata.raw.
_SENTENCES = "metadata raw errordescription error message detail details errors msg"
_SENTENCES += " errormsg errormessage baseresp statusmsg text title description reason"

_CODES, _KINDS = ("code", "error_code", "status_code"), ("type", "error_type")


def _error_facts(value: Any, hide: Any) -> dict[str, Any]:
    body = _first_dict(value)
    parts = (_first_dict(body.get(name)) for name in ("error", "base_resp", "errors"))
    known = {**body, **next(filter(None, parts), {})}

    def first(*names: str) -> Any:
        found = map(known.get, names)
        return next((v for v in found if isinstance(v, (str, int, float))), None)

    found = [text for text in map(str.strip, _find_sentences(value)) if text]
    said = next((text for text in found if " " in text), found[0] if found else "")
    message = _one_line(hide(said), _MAX_SENTENCE)
    return {"message": message, "code": first(*_CODES), "type": first(*_KINDS)}


def _dicts(value: Any) -> list[dict[str, Any]]:
    """An object alone, or those in a list."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]


def _first_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, dict) or not value:
        return value or {}
    return next(iter(_dicts(value)), {})


def _find_sentences(value: Any, depth: int = 0) -> Iterator[str]:
    """The most believed first, also of JSON inside a string. Of a web page it is the
    title: the rest may hold the caller's address."""
    if isinstance(value, str):
        values = _parse_run(value) if value.lstrip()[:1] in ("{", "[") else None
        if values and depth < 8:
            yield from _find_sentences(values, depth + 1)
        elif re.match(r"\s*<(!doctype|html|head|body|\?xml)\b", value, re.IGNORECASE):
            import html

            title = re.search(r"<title[^>]{0,200}>([^<]*)", value, re.IGNORECASE)
            yield html.unescape(title[1]) if title else ""
        else:
            yield value
    elif isinstance(value, list) and depth < 8:
        for item in value:
            yield from _find_sentences(item, depth + 1)
    elif isinstance(value, dict) and depth < 8:
        members = {name.lower().replace("_", ""): item for name, item in value.items()}
        for name in _SENTENCES.split():
            yield from _find_sentences(members.get(name), depth + 1)


def _find_error(chunk: dict[str, Any], is_named: bool) -> Optional[dict[str, Any]]:
    """-> the object in a chunk that reports one. is_named: its event may say anything."""
    choices = _dicts(chunk.get("choices"))
    for part in (chunk, _first_dict(chunk.get("x_groq")), *choices):
        error = part.get("error")
        # A Go server's empty object has empty members.
        if any(error.values()) if isinstance(error, dict) else error:
            return part
    is_error = "error" in (chunk.get("object"), chunk.get("type"))  # vLLM, Mistral
    if choices or (is_named and not is_error):
        return None
    names = ("message", "msg", "text", "error_msg", "error_message", "errorMessage")
    errors, detail = chunk.get("errors"), chunk.get("detail")
    if (
        is_error
        or (detail and chunk.keys() <= {"detail", "status", *_CODES})  # FastAPI
        or (errors and isinstance(errors, list))  # Cloudflare
        or _has_bad_code(chunk.get("base_resp"))  # MiniMax
        or (_has_bad_code(chunk) and any(type(chunk.get(n)) is str for n in names))
    ):
        return chunk
    return None


def _has_bad_code(value: Any) -> bool:
    codes = map(_first_dict(value).get, _CODES)
    said = {str(code).lower() for code in codes if type(code) in (int, str)}
    return not said <= {"", "0", "200", "ok", "success"}


# ---
# The answer: lines -> JSON -> chunks
# ---

_DONE = "[DONE]"

#: What may stand around JSON: frameworks add a `data:`, GLM omits line ends.
_match_seam: Any = re.compile(r"(?:[ \t\r\n]+|data:|\[?DONE\]?)*").match

#: How JSON begins in a line without `data:`, unlike a line of a log ("[INFO]").
_match_bare = re.compile(r'\s*(?:[{\[]\s*(?:["{}\[\]]|\Z)|\[DONE\])').match

#: An error that is no JSON: transformers escapes no quotes in it.
_match_error = re.compile(r'\s*\{\s*"error"\s*:').match

#: Control characters may stand in a string as they are.
_parse_json_at = json.JSONDecoder(strict=False).raw_decode


def _parse_run(text: str) -> Optional[list[Any]]:
    """-> the JSON values in a text, and _DONE; None if there is anything else in it.
    Lists are opened (Azure, Vertex); null is padding."""
    values: list[Any] = []
    at = 0
    try:
        while True:
            end = _match_seam(text, at).end()
            if text.find("DONE", at, end) >= 0:
                values.append(_DONE)
            if end == len(text):
                return [value for value in values if value is not None]
            value, at = _parse_json_at(text, end)
            values += value if isinstance(value, list) and value else [value]
    except (ValueError, RecursionError):
        return None


def _has_chunk(values: Optional[list[Any]]) -> bool:
    return any("choices" in chunk or "error" in chunk for chunk in _dicts(values))


def _word(value: Any) -> str:
    """A string, or ""; "null" is none (KoboldCpp, LiteLLM)."""
    is_word = isinstance(value, str) and value not in ("null", "None")
    return _valid_unicode(value) if is_word else ""


#: Bytes without a chunk that says something: a server gone wrong.
_MAX_EVENT = 64 * 1024 * 1024

_MAX_CHOICES = _MAX_CALLS = 1024

#: After so many shortcuts that were never taken no more are made.
_PATIENCE = 8


class _Answer:
    """feed() it bytes, then end() it.

    asked: how many choices were asked for; 0: nobody knows. done: [DONE] has come.
    started: it has given an event. has_said: a chunk of the last block had a choice or
    usage. cut: why its bytes ended too early."""

    def __init__(
        self, strict: bool, raw: bool, known: Completed, asked: int = 0, hide: Any = str
    ) -> None:
        self.done = self.started = self.has_said = False
        self.cut: Optional[ChatStreamError] = None
        self._strict = strict
        self._raw = raw
        self._asked = asked
        self._hide = hide
        self._completed = known
        self._choices: dict[int, _Choice] = {}
        self._has_chunks = False

        self._after_cr = False  # an LF belongs to the line end before it
        self._tail: list[bytes] = []  # pieces of the line that has not ended
        self._size = 0  # of all since a chunk said something
        self._name = ""  # of the event
        self._pending: list[str] = []  # lines that are no JSON alone, or of an error

        self._unread = ""  # the start of what nobody could read since the last chunk
        self._skipped = ""  # the first text that was skipped
        self._match: Any = _match_nothing  # the shortcut: a line -> its event, or None
        self._wasted = 0  # matchers in a row, never used

    # Bytes -> lines

    def feed(self, block: bytes) -> _Events:
        match = self._match
        for line in self._split(block):
            if line:
                event = match(line)
                if event is not None:
                    self.has_said, self._wasted = True, 0
                    yield event
                    continue
                events = self._read_line(line)
            elif self._name or self._pending:
                events = self._end_event()
            else:
                continue
            for event in events:
                self.started = True
                yield event
            if self.done:
                return
            match = self._match

    def _split(self, block: bytes) -> list[bytes]:
        """At LF, CR or CRLF (WHATWG SSE, 9.2.5); a large line costs linear time."""
        self._size = len(block) + (0 if self.has_said else self._size)
        self.has_said = False
        if not block:  # a read of framing: an LF may still belong to a CR
            return []
        if self._size > _MAX_EVENT:
            raise StreamError(f"expected an event of at most {_MAX_EVENT} bytes")
        if self._after_cr or 13 in block:  # CR; ints are found faster
            if self._after_cr and block.startswith(b"\n"):
                block = block[1:]
            self._after_cr = block.endswith(b"\r")
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._tail.append(block)
        if 10 not in block:  # LF
            return []
        lines = b"".join(self._tail).split(b"\n")
        self._tail = [lines.pop()]
        return lines

    # Lines -> JSON

    def _read_line(self, line: bytes) -> _Events:
        """A line of an event (WHATWG SSE, 9.2.6), or JSON alone."""
        line, at = line.removeprefix(b"\xef\xbb\xbf"), 0  # a BOM
        while line.startswith(b"data:", at):
            at += 6 if line.startswith(b" ", at + 5) else 5
        text = line[at:].decode("utf-8", "replace")
        name, _, value = text.partition(":")
        is_error = self._name == "error"
        if not at and name in ("", "id", "retry", "data"):  # the last without a colon
            if is_error and not name:
                self._pending.append(text)
        elif not at and name == "event":
            if self._pending:
                yield from self._end_event()
            self._name = value.strip().lower()
            self._name = "" if self._name == "message" else self._name
            self._match = _match_nothing
        elif name.strip().lower() == "error":  # a field of llama.cpp's and gpustack's
            yield from self._read_pending()
            if value.strip() not in ("", "null", '""', "{}", "[]"):
                self._name = "error"
                self._pending.append(value)
                self._match = _match_nothing
        elif at or self._pending or is_error or _match_bare(text):
            yield from self._read_data(text, line)
        else:
            self._note(text)

    def _read_data(self, text: str, line: bytes) -> _Events:
        """JSON is read at once: GLM and Kimi leave blank lines out. What is not whole
        is joined with what follows, up to a blank line, a field, a chunk or [DONE]."""
        self._match = _match_nothing
        values = _parse_run(text)
        is_cut = values is None and text.lstrip()[:1] in ("{", "[")
        if _DONE in (values or ()):
            yield from self._end_event()
        elif self._name == "error":
            is_cut = True
        elif self._pending:
            is_cut = not (re.match(r"\s*{", self._pending[0]) and _has_chunk(values))
            if not is_cut:
                yield from self._read_pending()
        if is_cut:
            self._pending.append(text)
        else:
            yield from self._read_text(text, values, line)

    def _end_event(self) -> _Events:
        if self._name == "error":
            # NVIDIA Dynamo tells what is wrong in a comment, or not at all.
            data = [text for text in self._pending if text[:1] != ":"]
            text = "\n".join(data or [text[1:] for text in self._pending]).strip()
            values = _parse_run(text) or []
            for value in _dicts(values):
                yield from self._read_chunk(value, is_error=True)
            yield from self._fail(text or "error", values[-1] if values else None)
        yield from self._read_pending()
        self._name = ""

    def _read_pending(self) -> _Events:
        text = "\n".join(self._pending)
        self._pending = []
        values = _parse_run(text)
        if values is None and _match_error(text) and self.cut is None:
            yield from self._fail(text)
        yield from self._read_text(text, values)

    def _read_text(
        self, text: str, values: Optional[list[Any]], line: bytes = b""
    ) -> _Events:
        """values: the JSON in a text; None: it is in its lines, or behind a `data:`
        inside one (GLM). line: of which the shortcut may learn."""
        if values is None:
            parts = text.split("\n")
            if len(parts) == 1:
                parts = re.split(r"data:(?=\s*[{\[])", text)
            if "\n" in text or any(_has_chunk(_parse_run(part)) for part in parts):
                for part in parts:
                    if not self.done:
                        yield from self._read_text(part, _parse_run(part))
            else:
                self._skip(text)
        for value in values or ():
            if value == _DONE:
                self.done = True
                return
            if not isinstance(value, dict):
                self._skip(_dump(value))
                continue
            error = _find_error(value, bool(self._name))
            events = self._read_chunk(value, error is not None)
            is_one = line and len(events) == 1 and not (self._raw or self._name)
            if is_one and self._wasted < _PATIENCE:
                choice = self._choices[events[0].choice]
                self._match = _make_matcher(line, value, events[0], choice)
                self._wasted += 1
            if self._raw:
                yield Chunk(_copied(value))
            yield from events
            if error is not None:
                yield from self._fail(text, value, error)

    def _skip(self, text: str) -> None:
        text = text.strip()
        # Named events hold anything; gateways wrap comments again; a cut leaves a rest.
        if not text or self._name or text.startswith(":") or self.cut is not None:
            return
        self._note(text)
        self._completed.skipped += 1
        shown = _one_line(self._hide(text), _MAX_QUOTE)
        self._skipped = self._skipped or shown
        if self._strict:
            raise MalformedChunkError(f"no JSON object: {shown!r}", data=text)

    def _note(self, text: str) -> None:
        """It may be the whole answer, or a server's last words."""
        self._match = _match_nothing
        if len(self._unread) < _MAX_QUOTE:
            self._unread = f"{self._unread} {self._hide(text)}"[: 4 * _MAX_QUOTE]

    # Chunks -> events

    def _read_chunk(self, chunk: dict[str, Any], is_error: bool) -> list[_Delta]:
        if "choices" in chunk or is_error:
            self._has_chunks = True
            self._unread = ""
        elif not self._has_chunks:  # Anthropic's streams have usage, too
            self._note(_dump(chunk))
        done = self._completed
        if chunk.keys() & {"choices", "usage"} or not self._name:
            done.response_id = done.response_id or _word(chunk.get("id"))
            done.model = done.model or _word(chunk.get("model"))
        events: list[_Delta] = []
        choices = _dicts(chunk.get("choices"))
        for position, data in enumerate(choices):
            # Cloudflare sends no index; Foundry Local counts tokens; Copilot uses two.
            index = data["index"] if type(data.get("index")) is int else position
            index = 0 if self._asked == 1 else index
            events += self._choices.setdefault(index, _Choice(index)).read(data)
            if len(self._choices) > _MAX_CHOICES:
                raise StreamError(f"expected at most {_MAX_CHOICES} choices, got more")
        holders = [*choices, _first_dict(chunk.get("x_groq")), chunk]  # Moonshot, Groq
        usages = _dicts([data["usage"] for data in holders if data.get("usage")])
        for usage in map(_make_usage, usages):
            # The last stands; many send zeros or null before or after.
            if done.usage is None or replace(usage, extra={}) != Usage():
                done.usage = usage
        self.has_said = self.has_said or bool(choices or usages)
        return events

    def _fail(self, text: str, raw: Any = None, part: Any = None) -> _Events:
        """text: as sent; raw: its JSON; part: what of it is the error."""
        yield from self._halves()
        facts = _error_facts(part or raw or text, self._hide)
        said = facts["message"] or _one_line(self._hide(text), _MAX_SENTENCE)
        shown = self._hide(text if raw is None else _dump(raw))
        with suppress(ValueError):  # a secret may be a number, and *** is none
            shown = shown if raw is None else json.loads(shown)
        facts.update(message=said, raw=shown)
        if facts["code"] is not None:
            said += f" (code {_one_line(self._hide(str(facts['code'])), 40)})"
        what = "the server reported an error inside its answer"
        raise ServerError(f"{what}: {said}", **facts)

    def _halves(self) -> list[_Delta]:
        return [e for choice in self._choices.values() for e in choice.take_halves()]

    def end(self, cut: Optional[ChatStreamError]) -> _Events:
        self.cut = cut
        if not self.done:
            yield from self.feed(b"\n\n")  # which ends a line, and an event
        for event in self._halves():
            self.started = True
            yield event
        done = self._completed
        if self._skipped:
            text = "skipped data that is no JSON object, %d time(s), first: %s"
            _logger().warning(text, done.skipped, self._skipped)
        reasons = {c.index: c.reason for c in self._choices.values() if c.reason}
        yield from self._check_end(reasons)
        done.finish_reason, done.finish_reasons = reasons.get(0), reasons
        yield done

    def _check_end(self, reasons: dict[int, str]) -> _Events:
        choices, cut = self._choices.values(), self.cut
        text = _one_line(self._unread, _MAX_QUOTE)
        if cut is None and not self._has_chunks and text:
            names = ("content-type", "content-encoding")
            kinds = filter(None, map(self._completed.headers.get, names))
            shown = ", ".join(kinds) or "no content type"
            what = "the answer is no chat completion: expected chunks with choices"
            raise StreamError(f"{what}, got {text!r} ({shown})")
        finished = [c.is_finished(self.done, cut is not None) for c in choices]
        least = (cut and self._asked) or 1  # one that was asked for may not have begun
        is_finished = all(finished) and len(finished) >= least
        if cut is None and is_finished:
            if all(choice.is_empty for choice in choices):
                shown = self._hide(str(reasons))
                _logger().warning("the answer is empty (finish_reasons %s)", shown)
            return
        is_rest = text[:1] in "{[" or f" {text}" in " data event id retry"
        if cut is None and not is_rest:
            yield from self._fail(text)  # a server's last words
        failure = next(filter(_is_failure, reasons.values()), "")
        why = f"with finish_reason {failure}" if failure else "without a finish_reason"
        why += ": the answer may be cut" + (f", behind {text!r}" if text else "")
        fault = cut or TruncatedStreamError(f"the stream ended {why}")
        if self._strict or (cut is not None and not is_finished):
            raise fault
        _logger().warning("%s", _one_line(self._hide(str(fault)), _MAX_TEXT))


#: Counts of other names (mlx-vlm, DeepSeek), and where OpenAI has the last two of ours.
_COUNTS = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}
_COUNTS["prompt_cache_hit_tokens"] = "cached_tokens"
_DETAILS = ("prompt_tokens_details", "completion_tokens_details")


def _make_usage(data: dict[str, Any]) -> Usage:
    usage = Usage()
    for place in (data, *map(_first_dict, map(data.get, _DETAILS))):
        for name, value in place.items():
            ours = _COUNTS.get(name, name)
            if ours in vars(usage) and ours != "extra":
                count = value if type(value) is int else 0
                setattr(usage, ours, getattr(usage, ours) or count)
            elif place is data and name not in _DETAILS and value is not None:
                usage.extra[name] = value
    return usage


# ---
# The answer: choices, their texts, their tool calls
# ---

#: The first with text is the reasoning; others repeat it.
_REASONING = ("reasoning_content", "reasoning", "reasoning_text", "reasoning_details")


def _is_failure(reason: str) -> bool:
    """abort (vLLM, SGLang), timeout (TensorRT-LLM), overloaded_error (Portkey) ..."""
    return bool(re.search("error|abort|cancel|timeout|fail", reason, re.IGNORECASE))


def _read_texts(source: dict[str, Any]) -> Iterator[tuple[Any, str, Any]]:
    """-> class of the event, text, members that are reasoning."""
    names = [name for name in source if name.startswith(("reasoning", "thinking"))]
    members = {name: source[name] for name in names if source[name]}
    members = {n: v for n, v in members.items() if isinstance(v, (str, list, dict))}
    if members:
        texts = (_find_text(members.get(name)) for name in _REASONING)
        yield ReasoningDelta, next(filter(None, texts), ""), members
    content = source.get("content")
    for part in content if isinstance(content, list) else (content,):
        # Of parts, text is text and all else is reasoning (Mistral, Databricks).
        kind = part.get("type") if isinstance(part, dict) else None
        is_text = kind in (None, "text", "output_text")
        yield (TextDelta if is_text else ReasoningDelta), _find_text(part), None
    refusal = source.get("refusal")
    yield RefusalDelta, refusal if isinstance(refusal, str) else "", None


def _find_text(value: Any, depth: int = 0) -> str:
    """Of a str, a part, or a list; Cloudflare turns tokens into numbers."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return json.dumps(value)
    if isinstance(value, list) and depth < 8:
        return "".join(_find_text(item, depth + 1) for item in value)
    if isinstance(value, dict) and depth < 8:
        names = ("text", "content", "thinking", "reasoning", "summary")
        name = next((name for name in names if value.get(name)), "")
        return _find_text(value.get(name, ""), depth + 1)
    return ""


class _Choice:
    """reason: the finish_reason, or "". is_empty: nothing of it has come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.reason = ""
        self.is_empty = True
        self._has_more = False  # something came after the last reason
        self._went_on = False  # something has ever come after a reason
        self._streamed: set[Any] = set()  # classes of the events that deltas gave
        self._told: dict[Any, io.StringIO] = {}  # what messages said instead, by class
        # By class of event, or by call: the first halves of surrogate pairs.
        self._halves: dict[Any, str] = {}
        self.calls: list[_Call] = []
        self._known: dict[Any, _Call] = {}  # by the server's index, and by id
        self._has_tools = False

    def is_finished(self, done: bool, is_cut: bool) -> bool:
        """After [DONE] a reason is enough. At a cut none is, if more was seen to follow
        one: some servers write `stop` into every chunk."""
        is_said = self.reason and not _is_failure(self.reason)
        is_last = (done or not self._has_more) and not (is_cut and self._went_on)
        return bool(is_said and is_last)

    def read(self, data: dict[str, Any]) -> list[_Delta]:
        delta, message = [_first_dict(data.get(n)) for n in ("delta", "message")]
        texts = list(_read_texts(delta))
        self._streamed |= {kind for kind, text, members in texts if text or members}
        events: list[_Delta] = []
        rest = self._take_rest(message) if message else ()
        for kind, piece, members in itertools.chain(texts, rest):
            text = self._join(kind, piece)
            if members:
                events.append(ReasoningDelta(text, self.index, members))
            elif text:
                events.append(kind(text, self.index))
        calls = self._read_calls(delta)
        self._streamed.update(map(type, calls))
        if message and ToolCallDelta not in self._streamed:
            calls += self._read_calls(message)
        events += calls
        if events or self._halves:
            self.is_empty = False
            self._has_more = True
            self._went_on = self._went_on or bool(self.reason)
        reason = _word(data.get("finish_reason"))
        if reason:  # the first one stands, but `stop` gives way to any other
            self.reason = reason if self.reason in ("", "stop") else self.reason
            self._has_more = False
        return events

    def _take_rest(self, message: dict[str, Any]) -> Iterator[tuple[Any, str, Any]]:
        """What a message says that no delta has: a last summary, the text so far, or,
        if it does not begin with that, the next piece (NVIDIA NeMo Agent Toolkit)."""
        whole: dict[Any, str] = {}
        members: dict[str, Any] = {}
        for kind, text, more in _read_texts(message):
            whole[kind] = whole.get(kind, "") + text
            members.update(more or {})
        for kind in [kind for kind in whole if kind not in self._streamed]:
            text, told = whole[kind], self._told.setdefault(kind, io.StringIO())
            size = told.tell()
            # Compared only with what is as long: so pieces cost linear time.
            goes_on = len(text) >= size and text.startswith(told.getvalue())
            rest = text[size:] if goes_on else text
            told.write(rest)
            is_told = kind is not ReasoningDelta or (size and not rest)
            renamed = {n: rest if v == text else v for n, v in members.items()}
            yield kind, rest, None if is_told else renamed

    def _join(self, key: Any, text: str) -> str:
        """Valid Unicode: JavaScript servers cut inside a surrogate pair."""
        if text.isascii() and not self._halves:
            return text
        text = self._halves.pop(key, "") + text
        if "\ud800" <= text[-1:] <= "\udbff":
            self._halves[key] = text[-1]
            text = text[:-1]
        return _valid_unicode(text)

    def take_halves(self) -> list[_Delta]:
        keys, self._halves = list(self._halves), {}
        return [
            key.make("\ufffd") if isinstance(key, _Call) else key("\ufffd", self.index)
            for key in keys
        ]

    def _read_calls(self, source: dict[str, Any]) -> list[_Delta]:
        calls = _dicts(source.get("tool_calls"))  # an object alone: TGI
        legacy = _first_dict(source.get("function_call"))
        self._has_tools = self._has_tools or bool(calls)
        if any(legacy.values()) and not self._has_tools:
            # OpenAI's before tools: the one call (functionary, llama-cpp-python)
            calls = [{"index": 0, "function": legacy}]
        events: list[_Delta] = []
        for part in map(_Part, calls):
            call = self._find_call(part)
            is_news = call.name_it(part)
            if call.id:
                self._known.setdefault(call.id, call)
            is_again = part.is_object and call.has_arguments
            text = "" if is_again else self._join(call, part.arguments)
            if is_news or text or part.extra:
                events.append(call.make(text, part.extra or None))
        return events

    def _find_call(self, part: _Part) -> _Call:
        """A delta's call; is_followed_by() may make it a new one.

        index     id        name    belongs to
        known     any       any     the call of the index
        unknown   any       given   a new call
        unknown   known     none    the call of the id
        unknown   unknown   none    a new call
        unknown   none      none    the last call
        none      known     any     the call of the id
        none      else      given   a new call
        none      else      none    the last call

        OpenAI numbers calls. Others send no index, or all whole ones with index 0
        (Ollama, Cerebras, Gemini), or each fragment with one of its own (ollama.com).
        """
        has_index = part.index is not None
        call = self._known.get(part.index if has_index else part.id)
        if call is None and self.calls and not part.name:
            call = self._known.get(part.id)
            if call is None and not (has_index and part.id):
                call = self.calls[-1]
        if call is None or call.is_followed_by(part):
            if len(self.calls) >= _MAX_CALLS:
                raise StreamError(f"expected at most {_MAX_CALLS} tool calls, got more")
            call = _Call(len(self.calls), self.index)
            self.calls.append(call)
            if part.id:
                self._known[part.id] = call
        if has_index and len(self._known) < 2 * _MAX_CALLS:
            self._known[part.index] = call
        return call


class _Part:
    def __init__(self, data: dict[str, Any]) -> None:
        function, custom = data.get("function"), data.get("custom")
        self.is_custom = isinstance(custom, dict) and bool(custom) and not function
        known = {"index", "id", "type", "function", "custom"}
        inner = custom if self.is_custom else function
        if inner is None:  # gateways leave out the object around these
            inner, known = data, {*known, "name", "arguments", "input"}
        inner = _first_dict(inner)
        arguments = inner.get("arguments", inner.get("input"))
        self.index = data["index"] if type(data.get("index")) is int else None
        self.id, self.name = _word(data.get("id")), _word(inner.get("name"))
        self.is_object = isinstance(arguments, (dict, list))  # Writer, early llama.cpp
        text = _dump(arguments) if self.is_object else arguments
        self.arguments: str = text if isinstance(text, str) else ""
        more = {name: value for name, value in data.items() if name not in known}
        self.extra = {n: v for n, v in more.items() if v not in (None, "", [], {})}


class _Call:
    def __init__(self, position: int, choice: int) -> None:
        self.id = self.name = ""
        self.has_arguments = False
        self._only_piece = ""  # of the arguments
        self._position = position
        self._choice = choice
        self._type = "function"

    def is_followed_by(self, part: _Part) -> bool:
        """Whether a delta that points here begins another call."""
        if not (self.name and part.name):
            return False
        if part.id and self.id and part.id != self.id:
            return True
        if part.name != self.name:
            return self.has_arguments
        is_whole = self._only_piece[:1] == "{" and _is_json(self._only_piece)
        return is_whole and bool(part.arguments and not part.id)

    def name_it(self, part: _Part) -> bool:
        """-> whether that is news. The first that is not empty stands."""
        is_news = bool(part.id and not self.id or part.name and not self.name)
        self.id = self.id or part.id
        self.name = self.name or part.name
        self._type = "custom" if part.is_custom else self._type
        return is_news

    def make(self, arguments: str, extra: Optional[dict[str, Any]] = None) -> _Delta:
        if arguments:
            self._only_piece = "" if self.has_arguments else arguments
            self.has_arguments = True
        known = (self._position, self.id, self.name)
        return ToolCallDelta(*known, arguments, extra, self._choice, self._type)


# ---
# The shortcut: chunks that differ in one string from the chunk before
# ---

# Most chunks do. Once it is proven for a line, those that follow need no parser: the
# same bytes around a string literal are the same JSON but for that string. Data that is
# read in full ends the use of a matcher. Without all this the answer is the same, and
# an event costs five times more.

#: Bytes of a line of which one is made: of long ones a gzip bomb would make memory.
_MAX_LEARNED = 16 * 1024

#: OpenAI and others fill it with random letters, against eavesdroppers.
_find_padding = re.compile(rb'"(obfuscation|p)": ?"(\w+)"').search


def _match_nothing(line: bytes) -> Optional[Event]:
    return None


def _make_matcher(
    line: bytes, chunk: dict[str, Any], event: _Delta, choice: _Choice
) -> Any:
    """-> a function: a line like this one -> its event, or None. The proof: the line
    with the text twice in its place is the same JSON with the text twice."""
    try:
        holder, name, make = _find_hole(event, chunk, choice)
        text, said = holder[name], vars(event).get("text", vars(event).get("arguments"))
        # Half of a surrogate pair may wait for the other one.
        if text != said or len(line) > _MAX_LEARNED or b"\\ud" in line.lower():
            return _match_nothing
        literal = json.dumps(text, ensure_ascii=False)[1:-1].encode()
        pattern = b'"%b": ?"(%b)"' % (name.encode(), re.escape(literal))
        place: Any = re.search(pattern, line)
        head, middle, tail = line[: place.start(1)], b"", line[place.end(1) :]
        padding, key, letters = _find_padding(tail), "", ""
        if padding:
            key, letters = padding[1].decode(), padding[2].decode()
            middle, tail = tail[: padding.start(2)], tail[padding.end(2) :]
        twice = head + 2 * literal + middle + 2 * letters.encode() + tail
        (twin,) = _parse_run(twice.decode("utf-8", "replace")) or []
        holder, _, _ = _find_hole(event, twin, choice)
        is_proven = holder[name] == 2 * text and twin.get(key, "") == 2 * letters
        holder[name] = text
        twin.update({key: letters} if key else {})
        if not is_proven or twin != chunk:
            return _match_nothing
    except (LookupError, TypeError, ValueError, AttributeError):
        return _match_nothing
    fixed = len(head) + len(tail)

    def match(line: bytes) -> Optional[Event]:
        inner = line.removeprefix(head).removesuffix(tail)
        if len(line) - len(inner) != fixed:
            return None
        if middle:
            inner, _, noise = inner.partition(middle)
            if not noise.replace(b"_", b"").isalnum():
                return None
        try:
            text = inner.decode()
            if '"' in text or "\\" in text:
                literal = f'"{text}"'
                text, end = _parse_json_at(literal)
                if end < len(literal) or text != _valid_unicode(text):
                    return None
        except ValueError:
            return None
        return make(text) if text else None

    return match


def _find_hole(event: Any, chunk: Any, choice: _Choice) -> tuple[Any, str, Any]:
    """-> what holds the event's text, under which name, and what makes another event.
    Raises where another text, or the same chunk again, might give other events."""
    (data,) = chunk["choices"]
    delta, index = data["delta"], choice.index
    if _word(data.get("finish_reason")) or data.get("message"):
        raise LookupError
    if isinstance(event, ToolCallDelta):
        (call,) = delta["tool_calls"]
        is_more = call["function"].get("name") or event.extra
        if is_more or type(call["index"]) is not int:
            raise LookupError
        return call["function"], "arguments", choice.calls[event.index].make
    if delta.get("tool_calls") or delta.get("function_call"):
        raise LookupError
    if isinstance(event, TextDelta):
        make: Any = partial(TextDelta, choice=index) if index else TextDelta
        return delta, "content", make
    (name,) = event.extra or [""]
    return delta, name, lambda text: ReasoningDelta(text, index, {name: text})


# ---
# Blocks of decode(); events -> messages
# ---


def _check_blocks(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """In pieces: a block may hold more than the bound of one event."""
    for block in blocks:
        if not isinstance(block, (bytes, bytearray, memoryview)):
            kind = type(block).__name__
            raise TypeError(f"blocks: expected an iterable of bytes, got a {kind}")
        for start in range(0, len(block), _BLOCK_SIZE):
            yield bytes(block[start : start + _BLOCK_SIZE])


class _Assembly:
    """A message being put together, in linear time and no more memory than its text."""

    def __init__(self, choice: int) -> None:
        self._choice = choice
        # By class of event, and by name of a member that is text.
        self._texts: dict[Any, io.StringIO] = collections.defaultdict(io.StringIO)
        self._write = self._texts[TextDelta].write
        self._extra: dict[str, Any] = {}
        self._calls: dict[int, ToolCall] = {}
        self._arguments: dict[int, list[str]] = collections.defaultdict(list)

    def add(self, event: Any) -> None:
        if isinstance(event, TextDelta):
            self._write(event.text)
            return
        if isinstance(event, ToolCallDelta):
            call = self._calls.setdefault(event.index, ToolCall("", "", ""))
            call.id = event.id or call.id
            call.name = event.name or call.name
            call.type = event.type
            call.extra.update(_copied(event.extra or {}))
            self._arguments[event.index].append(event.arguments)
            return
        self._texts[type(event)].write(event.text)
        for name, value in (getattr(event, "extra", None) or {}).items():
            known = self._extra.get(name)
            if isinstance(value, str):
                self._texts[name].write(value)
                self._extra[name] = ""
            elif isinstance(value, list) and isinstance(known, list):
                known += _copied(value)
            else:  # a member that changes its type: the last one stands
                self._extra[name] = _copied(value)

    def finish(self, finish_reason: Optional[str]) -> Message:
        texts = [self._texts[kind].getvalue() for kind in _DELTAS[:3]]
        calls = tuple(self._finish_calls())
        for name in [name for name, value in self._extra.items() if value == ""]:
            self._extra[name] = _valid_unicode(self._texts[name].getvalue())
        fields: Any = (*texts, calls, finish_reason, self._choice, self._extra)
        return Message("assistant", *fields)

    def _finish_calls(self) -> Iterator[ToolCall]:
        ids, seen = {""}, set()
        for index, call in sorted(self._calls.items()):
            pieces = [piece for piece in self._arguments[index] if piece]
            is_text = call.type == "custom"  # and then it is no JSON to be put right
            text = "".join(pieces) if is_text else _join_arguments(pieces)
            same, name = (call.id, call.name, text), call.id
            if not (call.name or text) or (name and same in seen):
                continue  # nothing, or sent again (new-api, LocalAI)
            seen.add(same)
            while name in ids:  # none sent (NIM), or another call's (DeepSeek)
                name = f"call_{os.urandom(12).hex()}"
            ids.add(name)
            yield replace(call, id=name, arguments=text)


def _copied(value: Any) -> Any:
    """What the caller does to an event changes nothing later."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return value


def _join_arguments(pieces: list[str]) -> str:
    """A tool call's arguments; once, where the server sent them more than once.

    Only what is no JSON as it came is put right. A piece with a brace in front may
    begin them anew; the last whole ones stand if all before say the same, in whatever
    spelling, or a beginning of it ({} by Claude behind gateways, the text so far by
    DeepSeek on Qianfan), but not inside an object that was cut."""
    whole = "".join(pieces)
    if _is_json(whole):
        return whole
    starts = [i for i, piece in enumerate(pieces) if piece.lstrip()[:1] == "{" or not i]
    parts = [pieces[i:end] for i, end in zip(starts, [*starts[1:], None])]
    texts = ["".join(part) for part in parts]
    last = next(filter(_is_json, reversed(texts)), whole)
    flat, same = "".join(last.split()), _canonical(last)
    for part, text in zip(parts, texts):
        start = "".join(text.split())
        is_inside = len(part) > 1 and start.endswith((":", ",", "["))
        is_start = flat.startswith(start.rstrip("}")) and not is_inside
        if not (is_start or _canonical(text) == same):
            return whole
    return last


def _is_json(text: str) -> bool:
    values = _parse_run(text) or []
    return len(values) == 1 and values != [_DONE]


def _canonical(text: str) -> str:
    return _dump(_parse_run(text), sort_keys=True)


def _aggregate(events: Any, deltas: bool) -> _Events:
    messages: dict[int, _Assembly] = {}

    def finish(reasons: Mapping[int, str]) -> list[Message]:
        made = [messages[c].finish(reasons.get(c)) for c in sorted(messages)]
        messages.clear()
        return [
            m for m in made if m.content or m.reasoning or m.refusal or m.tool_calls
        ]

    try:
        for event in events:
            if isinstance(event, _DELTAS):
                if event.choice not in messages:
                    messages[event.choice] = _Assembly(event.choice)
                messages[event.choice].add(event)
                if not deltas:
                    continue
            elif isinstance(event, Completed):
                yield from finish(event.finish_reasons)
            elif not isinstance(event, (Chunk, Message)):
                kind = f"{type(event).__module__}.{type(event).__qualname__}"
                raise TypeError(f"events: expected those of {__name__}, got a {kind}")
            if deltas or not isinstance(event, Chunk):
                yield event
        yield from finish({})
    except ChatStreamError as error:
        error.partial = tuple(finish({})) or error.partial
        raise
    finally:
        if hasattr(events, "close"):
            events.close()


# ---
# Command line, demo
# ---


def _parse_args(argv: Optional[list[str]]) -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="chatstream",
        description="Stream a chat completion: its text to stdout, all else to stderr.",
        epilog="Exit status: 0 done; 1 an error; 2 a wrong argument; 3 the answer is not "
        "whole; 130 interrupted. -o sets a member of the request's body, as JSON or text.",
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="PROMPT", help="its words; -: standard input")
    add("-m", "--model", help="default: the variable CHATSTREAM_MODEL")
    add("-p", "--provider", help=f"one of {', '.join(PROVIDERS)}")
    add("-u", "--base-url", help="another server, such as http://127.0.0.1:8080/v1")
    add("--key-env", metavar="NAME", help="the variable that holds the API key")
    add("-i", "-s", "--instructions", help="a leading system message")
    add("-o", "--option", metavar="NAME=VALUE", action="append", default=[])
    add("--usage", action="store_true", help="print the tokens used, on stderr")
    add("--json", action="store_true", help="one JSON object per event and line")
    add("--demo", action="store_true", help="answer from a server in this process")
    args = parser.parse_args(argv)
    args.model = args.model or os.environ.get("CHATSTREAM_MODEL")
    if not args.model and not args.demo:
        parser.error("no model: give -m MODEL or set CHATSTREAM_MODEL")
    args.key = os.environ.get(args.key_env or "", "").strip()
    if args.key_env and not args.key:
        parser.error(f"--key-env: the environment variable {args.key_env} is not set")
    if args.demo:
        args.model, args.provider, args.base_url = "demo", None, _serve_demo()
    args.body = {"stream_options": {"include_usage": True}} if args.usage else {}
    for name, equals, value in (option.partition("=") for option in args.option):
        if not name or not equals:
            parser.error(f"-o: expected NAME=VALUE, got {name + equals!r}")
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
        args.body[name] = value
    return args


class _Screen:
    """Text goes to stdout, all else and warnings to stderr. Both may be one terminal, so
    a line of one is ended before the other writes, on stderr."""

    def __init__(self) -> None:
        self._is_open = False  # stdout's line
        self._has_note = False  # stderr's line is open

    def write(self, text: str, is_note: bool = False) -> None:
        if (self._is_open and not self._has_note) if is_note else self._has_note:
            print(file=sys.stderr, flush=True)
        self._has_note = is_note and not text.endswith("\n")
        self._is_open = self._is_open if is_note else not text.endswith("\n")
        print(text, end="", file=sys.stderr if is_note else sys.stdout, flush=True)

    def line(self, text: str, start: str = "chatstream: ") -> None:
        self.write("\n" * self._has_note + f"{start}{text}\n", is_note=True)

    def filter(self, record: Any) -> bool:
        """Called by the logger, whose records then go nowhere else."""
        self.line(record.getMessage())
        return False

    def end(self) -> None:
        if self._is_open or self._has_note:
            self.write("\n", is_note=not self._is_open)


def _main(argv: Optional[list[str]] = None) -> int:
    """-> the exit status."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # into a file or a pipe always UTF-8
            encoding = output.encoding if output.isatty() else "utf-8"
            output.reconfigure(encoding=encoding, errors="replace")
    screen = _Screen()
    _logger().addFilter(screen)
    try:
        return _answer_prompt(_parse_args(argv), screen)
    except KeyboardInterrupt:
        with suppress(OSError):
            screen.end()
        return 130
    except OSError as error:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `| head`
            return 0
        screen.line(f"cannot write the answer: {error}")
        return 1
    finally:
        _logger().removeFilter(screen)


def _answer_prompt(args: Any, screen: _Screen) -> int:
    try:
        events = stream(
            " ".join(args.words or ["hi"]) if args.demo else _read_prompt(args.words),
            model=args.model,
            instructions=args.instructions,
            provider=args.provider,
            base_url=args.base_url,
            api_key=args.key,
            extra_body=args.body,
        )
        done = _show(events, screen, args.json)
    except ChatStreamError as error:
        screen.end()
        if args.json:
            kind = type(error).__name__
            first = {"event": "error", "type": kind, "message": str(error)}
            print(json.dumps({**first, **vars(error), **first}), flush=True)
        screen.line(str(error))
        return 1
    except (ValueError, TypeError) as error:
        screen.line(str(error))
        return 2
    screen.end()
    if args.usage:
        counts = vars(done.usage) if done.usage else {"usage": "none was sent"}
        screen.line(", ".join(f"{name} {n}" for name, n in counts.items() if n))
    reason = done.finish_reason or "no finish_reason"
    short = ("no finish_reason", "length", "content_filter")
    if reason in short or _is_failure(reason):
        screen.line(f"the answer is not whole ({reason})")
        return 3
    return 0


def _read_prompt(words: list[str]) -> str:
    """The words; standard input for a word -, before them, or without them: UTF-8, or
    UTF-16 where a byte order mark says so."""
    import stat

    is_asked, data = "-" in words or not words, b""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if is_asked or stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
            data = sys.stdin.buffer.read()
    except (OSError, AttributeError) as error:
        if is_asked:
            raise ValueError(f"standard input cannot be read: {error}") from None
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig", "replace").rstrip("\r\n")
    if "-" in words:
        return " ".join(text if word == "-" else word for word in words)
    return "\n\n".join(filter(None, (text, " ".join(words))))


def _show(events: Iterable[Event], screen: _Screen, as_json: bool) -> Completed:
    done = Completed()
    for event in events if as_json else aggregate(events, deltas=True):
        if as_json:
            shown = json.dumps({"event": type(event).__name__, **asdict(event)})
            print(shown, flush=True)
        elif isinstance(event, TextDelta) and event.choice == 0:
            screen.write(event.text)
        elif isinstance(event, (ReasoningDelta, RefusalDelta)) and event.text:
            screen.write(event.text, is_note=True)
        elif isinstance(event, Message):
            if event.choice and event.content:  # after -o n=2
                screen.end()
                screen.write(f"\n{event.content}")
            for call in event.tool_calls:
                screen.line(f"{call.name}({call.arguments})", start="tool call: ")
        done = event if isinstance(event, Completed) else done
    return done


def _serve_demo() -> str:
    """A chat-completions server on loopback. -> its base URL."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            prompt = json.loads(self.rfile.read(length))["messages"][-1]["content"]
            text = f"You said: {prompt}\nEach word came as an event of its own."
            words = re.findall(r"\s*\S+", text)
            choices: list[Any] = [{"delta": {"content": word}} for word in words]
            usage = {"completion_tokens": len(words)}
            self.send_response(200)
            self.end_headers()
            for choice in [*choices, {"finish_reason": "stop"}]:
                chunk = json.dumps({"choices": [choice], "usage": usage})
                self.wfile.write(f"data: {chunk}\n\n".encode())
                time.sleep(0.05)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


if __name__ == "__main__":
    sys.exit(_main())

# The MIT License
#
# Copyright (c) 2026 the chatstream authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following
# conditions:
#
# The above copyright notice and this permission notice shall be included in all copies
# or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
# PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
# HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
# OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
