# chatstream 1.1.0: stream a chat completion from a Python script. One file, MIT.
# The Python distribution chatstream-py: copy this file beside your code, or install a
# checkout. It is its own documentation; the README of the distribution has recipes.
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the chatstream authors; the licence is at the end of this file.
# pyright: standard
"""Stream a chat completion from any OpenAI-compatible server.

    import chatstream

    for ev in chatstream.stream("Why is the sky blue?", model="gpt-4o-mini"):
        if isinstance(ev, chatstream.TextDelta):
            print(ev.text, end="", flush=True)

Start with help(chatstream.stream): it explains every option. The functions are

    stream()     ask, and yield the events of the answer as they arrive
    complete()   ask, and return the whole answer as one Message
    aggregate()  events -> whole messages
    decode()     the bytes of an answer, from anywhere -> events
    cancel()     stop a stream() from another thread

and on the command line `python chatstream.py -m gpt-4o-mini "Why is the sky blue?"`
does the same (`--help` lists its options, `--demo` needs no key and no network).

Events, in the order of an answer:

    Chunk           the JSON as sent; only with raw=True, before what is made of it
    ReasoningDelta  a piece of the model's reasoning
    TextDelta       a piece of the answer
    RefusalDelta    a piece of a refusal
    ToolCallDelta   a piece of a tool call
    Message         a whole message; only from aggregate()
    Completed       last, once: finish reasons, usage, id and model

Errors:

    ChatStreamError           any of them; .partial, .request_id
      MissingAPIKeyError      no key in the environment
      StatusError             a reply that is not 2xx
        RetryLimitError       the same, after the retries
      TransportError          no connection, or it broke before the first event
      DeadlineError           `deadline` has passed (also a TimeoutError)
      CancelledError          cancel() was called
      StreamError             a 2xx answer went wrong
        IdleTimeoutError      silence (also a TimeoutError)
        TruncatedStreamError  cut in the middle
        MalformedChunkError   strict=True: data that is not a JSON object
        ServerError           the server reported an error inside the answer

A wrong argument is a ValueError or TypeError from the call itself, before any network
use. urllib3 carries the requests where it is installed (pooled connections); without it
http.client does, one connection a call. Logger: "chatstream".
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import math
import os
import re
import socket
import string
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

# http.client, signal, ssl, urllib and urllib3 are imported where they are first needed:
# together they would be most of the time that `import chatstream` takes.
if TYPE_CHECKING:
    from http.client import HTTPConnection as _ConnectionBase
else:
    _ConnectionBase = object

__version__ = "1.1.0"

__all__ = [
    "stream",
    "complete",
    "aggregate",
    "decode",
    "cancel",
    "Provider",
    "PROVIDERS",
    "Event",
    "TextDelta",
    "ReasoningDelta",
    "RefusalDelta",
    "ToolCallDelta",
    "Chunk",
    "Message",
    "Completed",
    "ToolCall",
    "Usage",
    "ChatStreamError",
    "MissingAPIKeyError",
    "StatusError",
    "RetryLimitError",
    "TransportError",
    "DeadlineError",
    "CancelledError",
    "StreamError",
    "IdleTimeoutError",
    "TruncatedStreamError",
    "MalformedChunkError",
    "ServerError",
    "__version__",
]

_log = logging.getLogger("chatstream")

#: The most bytes that are asked of the connection at once. What has arrived is handed
#: over however little it is.
_BLOCK_SIZE = 65536

#: Bytes that one event (or line, or answer that is not SSE) may have. No model writes so
#: much in one piece; a server gone wrong might, until memory is full.
_MAX_EVENT = 64 * 1024 * 1024

#: Objects and lists that one event may have: each takes some 60 bytes of memory, and as
#: little as 3 bytes of the event. The longest answer with logprobs has a tenth of this.
_MAX_OBJECTS = 1_000_000

#: Choices of an answer, and tool calls of a choice. No model makes as many.
_MAX_CHOICES = _MAX_CALLS = 1024

#: Bytes of a chunk-size line with its extensions, and of all trailers together.
_MAX_FRAMING = 16 * 1024

#: 1xx replies that are read past before the real one.
_MAX_INTERIM = 32

#: Bytes of a reply up to the end of its headers. http.client reads at most 100 lines of
#: 64 KiB, but before 3.14 past any number of `100 Continue`.
_MAX_HEAD = 8 * 1024 * 1024

#: Bytes that are read of a reply that is not 2xx: enough for any error message.
_MAX_ERROR_BODY = 64 * 1024

#: Seconds for reading that, however it drips: the status is known and worth more.
_ERROR_BODY_SECONDS = 5.0

#: Seconds after `[DONE]` in which the body may still end, so that its connection can
#: be used again. The caller has its Completed before that.
_GRACE_SECONDS = 0.05

#: Characters of a sentence for people, of a quotation of what the server sent, and of an
#: error's whole text: a server may send megabytes.
_MAX_SENTENCE, _MAX_QUOTE, _MAX_TEXT = 2000, 200, 4000

#: Characters that are kept of a finish_reason, which is one word.
_MAX_REASON = 1000

#: Bytes that are logged of a request's body, at DEBUG: not the whole of an image.
_MAX_LOGGED = 2000

#: First and longest wait between two tries, in seconds; each is twice the one before.
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 30.0

#: A server that asks for a longer wait than this (seconds) is not waited for.
_LONGEST_RETRY_AFTER = 120.0

#: Connections kept for reuse, per host. Above it urllib3 would drop one and warn.
_POOL_SIZE = 256

#: Seconds of silence after which TCP asks whether the other side is still there, so that
#: no NAT or firewall forgets a connection on which a model thinks.
_KEEPALIVE_SECONDS = 30

#: socket.settimeout() takes no more: milliseconds in a C int.
_LONGEST_TIMEOUT = 2_147_483


# --------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------


class ChatStreamError(Exception):
    """Base of all errors that a call can end in.

    partial: tuple of Message, what had arrived of each choice; filled in by aggregate().
    request_id: str, the server's name for the request, to quote to its support; "" if
        it gave none or was not reached.
    """

    partial: tuple[Message, ...]
    request_id: str

    # The fields of an error are attributes of the instance, none of its class: pickle
    # and copy carry them over, and Ray's wrappers of an error find those of the original.
    def __init__(
        self,
        text: str = "",
        *,
        partial: tuple[Message, ...] = (),
        request_id: str = "",
    ) -> None:
        super().__init__(text)
        self.partial = partial
        self.request_id = request_id


class MissingAPIKeyError(ChatStreamError):
    """The provider wants a key and there is none. Raised by stream() itself.

    env_key: str, the environment variable that was looked at.
    instructions: str, where to get a key; "" if the provider has none.
    """

    env_key: str
    instructions: str

    def __init__(
        self, text: str = "", *, env_key: str = "", instructions: str = "", **base: Any
    ) -> None:
        super().__init__(text, **base)
        self.env_key = env_key
        self.instructions = instructions


class StatusError(ChatStreamError):
    """A reply that is not 2xx, and no other try would help (else RetryLimitError).

    status: int, the HTTP status.
    body: str, the first 64 KiB of the reply's body; "" if it could not be read.
    message: str, the sentence in it that is meant for people, at most 2,000 characters;
        "" if there is none.
    code: the error code as the server sent it (str, int, None ...); never converted.
    retry_after: float, the seconds that the server asked to wait; None if it did not.
    headers: dict, the reply's headers, names in lower case, without set-cookie.
    """

    status: int
    body: str
    message: str
    code: Any
    retry_after: Optional[float]
    headers: dict[str, str]

    def __init__(
        self,
        text: str = "",
        *,
        status: int = 0,
        body: str = "",
        message: str = "",
        code: Any = None,
        retry_after: Optional[float] = None,
        headers: Optional[dict[str, str]] = None,
        **base: Any,
    ) -> None:
        super().__init__(text, **base)
        self.status = status
        self.body = body
        self.message = message
        self.code = code
        self.retry_after = retry_after
        self.headers = headers or {}


class RetryLimitError(StatusError):
    """A retryable status, and the retries are spent or too long a wait was asked for.

    attempts: int, the requests made.
    """

    attempts: int

    def __init__(self, text: str = "", *, attempts: int = 0, **base: Any) -> None:
        super().__init__(text, **base)
        self.attempts = attempts


class TransportError(ChatStreamError):
    """No answer began: no connection, TLS failure, reset, or cut before the first event.

    The cause is chained (`__cause__`).

    attempts: int, the requests made.
    """

    attempts: int

    def __init__(self, text: str = "", *, attempts: int = 0, **base: Any) -> None:
        super().__init__(text, **base)
        self.attempts = attempts


class DeadlineError(ChatStreamError, TimeoutError):
    """The call as a whole took longer than `deadline`. Never retried.

    seconds: float, the deadline.
    """

    seconds: float

    def __init__(self, text: str = "", *, seconds: float = 0.0, **base: Any) -> None:
        super().__init__(text, **base)
        self.seconds = seconds


class CancelledError(ChatStreamError):
    """cancel() was called."""


class StreamError(ChatStreamError):
    """A 2xx answer went wrong: it is no chat completion, or too large, or one of those
    below."""


class IdleTimeoutError(StreamError, TimeoutError):
    """Silence for `idle_timeout`, or no chunk for `event_timeout`. Never retried.

    seconds: float, the bound that struck; the text says which one.
    """

    seconds: float

    def __init__(self, text: str = "", *, seconds: float = 0.0, **base: Any) -> None:
        super().__init__(text, **base)
        self.seconds = seconds


class TruncatedStreamError(StreamError):
    """Cut after something was yielded.

    With strict=True also: ended without a finish_reason.
    """


class MalformedChunkError(StreamError):
    """With strict=True: data that is not a JSON object.

    data: str, the text of it.
    """

    data: str

    def __init__(self, text: str = "", *, data: str = "", **base: Any) -> None:
        super().__init__(text, **base)
        self.data = data


class ServerError(StreamError):
    """The server reported an error inside its 200 answer.

    code, type: as the server sent them; None if it did not.
    message: str, the sentence that is meant for people, at most 2,000 characters.
    raw: the error's parsed JSON, or its text where it is not JSON.
    """

    code: Any
    type: Any
    message: str
    raw: Any

    def __init__(
        self,
        text: str = "",
        *,
        code: Any = None,
        type: Any = None,
        message: str = "",
        raw: Any = None,
        **base: Any,
    ) -> None:
        super().__init__(text, **base)
        self.code = code
        self.type = type
        self.message = message
        self.raw = raw


# --------------------------------------------------------------------------------------
# Events and values
# --------------------------------------------------------------------------------------


@dataclass
class TextDelta:
    """A piece of the answer.

    text: str, never empty, always valid Unicode.
    choice: int, the choice it belongs to; 0 unless several were asked for (`n=`).
    """

    text: str
    choice: int = 0


@dataclass
class ReasoningDelta:
    """A piece of the model's reasoning.

    text: str; "" when the server sent only opaque members, such as signatures.
    choice: int.
    extra: dict, the delta's reasoning members as the server named and sent them
        (`reasoning_content`, `reasoning_details` ...); None if it has none.
    """

    text: str
    choice: int = 0
    extra: Optional[dict[str, Any]] = None


@dataclass
class RefusalDelta:
    """A piece of a refusal.

    text: str, never empty.
    choice: int.
    """

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
    type: str, "function"; "custom" for one of OpenAI's custom tools, whose `arguments`
        are free text.
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

    data: dict, the parsed JSON.
    """

    data: dict[str, Any]


@dataclass
class ToolCall:
    """A whole tool call, in Message.tool_calls.

    id: str, unique in its message, made up where the server sent none.
    name: str, the function or custom tool.
    arguments: str, the JSON text as the model wrote it: it may be invalid, or "". Where
        the server sent it more than once it stands here once. Of a custom tool: its free
        text.
    extra: dict, members that are not OpenAI's; they go back with to_dict(), because
        Gemini refuses the next turn without its thought signature.
    type: str, "function" or "custom".
    """

    id: str
    name: str
    arguments: str
    extra: dict[str, Any] = field(default_factory=dict)
    type: str = "function"

    def to_dict(self) -> dict[str, Any]:
        """The call as it stands in a request's `tool_calls`."""
        made: dict[str, Any] = {"id": self.id, "type": self.type}
        if self.type == "custom":
            made["custom"] = {"name": self.name, "input": self.arguments}
        else:
            made["function"] = {"name": self.name, "arguments": self.arguments}
        return {**self.extra, **made}


@dataclass
class Message:
    """A whole message, from aggregate() or complete(). Append it to the history as it is.

    role: str.
    content, reasoning, refusal: str; "" if there was none.
    tool_calls: tuple of ToolCall.
    finish_reason: str, as sent; None if the answer ended without one.
    choice: int.
    extra: dict, the reasoning members under the server's own names, text joined and
        lists concatenated.
    """

    role: str = "assistant"
    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: Optional[str] = None
    choice: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, *, reasoning: bool = False) -> dict[str, Any]:
        """The message as it stands in a request's `messages`; also what to save.

        reasoning: bool, default False because some servers refuse it. True adds `extra`,
            which OpenRouter, DeepSeek and Kimi want back inside a tool loop.
        """
        message: dict[str, Any] = {"role": self.role}
        message["content"] = self.content or (None if self.tool_calls else "")
        if self.refusal:
            message["refusal"] = self.refusal
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if reasoning:
            message = {**message, **self.extra, **message}
        return message


@dataclass
class Usage:
    """Tokens of a request, as the server counted them; 0 where it said nothing.

    Of most servers cached_tokens are part of prompt_tokens, and reasoning_tokens of
    completion_tokens. xAI counts reasoning beside completion_tokens, and some gateways
    count cached tokens beside prompt_tokens.

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
        `x-ratelimit-remaining-requests`); empty from decode(). Neither in the repr nor
        compared: two answers that say the same are equal.
    """

    response_id: str = ""
    model: str = ""
    finish_reason: Optional[str] = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: Optional[Usage] = None
    skipped: int = 0
    request_id: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


_Delta = Union[TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta]

#: What stream() and aggregate() yield.
Event = Union[_Delta, Chunk, Message, Completed]


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
    name: Provider(name, base_url, env_key, keys and f"Get a key at {keys}")
    for name, base_url, env_key, keys in [
        ("openai", "https://api.openai.com/v1", "OPENAI_API_KEY", "https://platform.openai.com/api-keys"),
        ("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "https://openrouter.ai/settings/keys"),
        ("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY", "https://console.groq.com/keys"),
        ("mistral", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", "https://console.mistral.ai/api-keys"),
        ("deepseek", "https://api.deepseek.com", "DEEPSEEK_API_KEY", "https://platform.deepseek.com/api_keys"),
        ("gemini", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY",
         "https://aistudio.google.com/apikey"),
        ("ollama", "http://localhost:11434/v1", None, None),
        ("lmstudio", "http://localhost:1234/v1", None, None),
        ("llamacpp", "http://localhost:8080/v1", None, None),
        ("vllm", "http://localhost:8000/v1", None, None),
    ]
}
# fmt: on


# --------------------------------------------------------------------------------------
# The public functions
# --------------------------------------------------------------------------------------


#: The clocks of the calls whose generators somebody still holds, for cancel().
_clocks: weakref.WeakKeyDictionary[Generator[Event, None, None], _Clock]
_clocks = weakref.WeakKeyDictionary()


def stream(
    messages: Union[str, Iterable[Union[dict[str, Any], Message]]],
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

    messages: str (one user message), or a sequence of dicts (sent untouched) and of
        Message (its to_dict() is sent).
    model: str.
    instructions: str, sent as a leading system message; None: none.
    provider: a name in PROVIDERS, or a Provider. None: openai, and then the environment
        variable OPENAI_BASE_URL replaces its URL and makes its key optional.
    base_url: str, another URL for `provider`; alone: some server that needs no key. It
        is all that comes before `/chat/completions`, usually ending in `/v1`, and may
        carry a query string (Azure's `?api-version=`). None: the provider's.
    api_key: str, sent as a bearer token. None or "": the provider's environment variable.
    headers: mapping of str to str, on top of ours and of the provider's; replaces a
        header of the same name, whatever the case. None: none.
    extra_body: mapping, members of the request's body whose names stream() itself uses.
        None: none.
    connect_timeout: float, seconds for each of TCP (each address of a name), TLS and
        proxy, and for each block of the request that the server does not take; None: no
        bound. Not for the answer.
    idle_timeout: float, seconds of silence on the socket, before the headers and between
        any two reads; None: no bound. Then IdleTimeoutError.
    event_timeout: float, seconds since the headers or the last chunk with a choice or
        usage in it, in which other bytes may come (keep-alive comments); None: no bound.
        The caller's own time between two next() does not count. Then IdleTimeoutError.
    deadline: float, seconds for the whole call from the first next(): all tries, waits and
        the caller's own time; None: no bound. Then DeadlineError. Name lookups (DNS) are
        outside Python's reach.
    max_retries: int, tries after the first one: on a connection failure (but not on a
        bad certificate or other things that another try cannot heal), on 408, 429 and
        5xx, when the connection breaks before anything was yielded, and when the first
        word of the answer is an error of such a kind. `x-should-retry` true or false
        overrides the status; the code or type insufficient_quota is never retried. The
        wait is what `retry-after-ms` or `Retry-After` says (RFC 9110, 10.2.3; over
        120 s: no more tries), else 0.2 s x 2^n x (0.9 to 1.1), at most 30 s.
    strict: bool, True makes an error of what is otherwise logged as a warning: data that
        is not a JSON object, an end without finish_reason, a cut or silence after the
        answer was finished.
    raw: bool, True also yields each parsed JSON object, as Chunk.
    pool: a urllib3 PoolManager (or ProxyManager, or SOCKS manager) of the caller's, for
        private CAs, client certificates and proxies; its own headers stay, ours come on
        top. None: a shared one, and the proxy variables of the environment (but never for
        loopback) and SSL_CERT_FILE are honoured.
    params: the other members of the request's body, sent as they are (`temperature=`,
        `tools=`, `stream_options=` ...). `n` is among them: unless it asks for several
        choices, all that comes belongs to choice 0.

    Raises ValueError, TypeError and MissingAPIKeyError at the call, and the other
    ChatStreamErrors out of the loop.
    """
    where = _choose_provider(provider, base_url)
    url = _parse_url(where.base_url if base_url is None else base_url)
    key = _choose_key(where, api_key)
    sent_headers = _merge_headers(
        {
            "Accept": "text/event-stream",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"chatstream/{__version__}",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        },
        _check_headers("Provider.headers", where.headers),
        _check_headers("headers", headers),
    )
    _check_pool(pool)
    body = _build_body(messages, model, instructions, params, extra_body)
    secrets = _Secrets(key)
    secrets.add_headers({**(getattr(pool, "headers", None) or {}), **sent_headers})
    secrets.add_query(url.query)
    request = _Request(
        url=url,
        headers=sent_headers,
        body=_encode_body(body),
        one_choice=body.get("n") in (None, 1),
        key_source=where.env_key or "",
        connect_timeout=_to_seconds("connect_timeout", connect_timeout),
        max_retries=_to_retries(max_retries),
        strict=_to_bool("strict", strict),
        raw=_to_bool("raw", raw),
        pool=pool,
        secrets=secrets,
    )
    clock = _Clock(
        url.shown,
        idle_timeout=_to_seconds("idle_timeout", idle_timeout),
        event_timeout=_to_seconds("event_timeout", event_timeout),
        deadline=_to_seconds("deadline", deadline),
    )
    events = _run(request, clock)
    _clocks[events] = clock
    return events


def complete(
    messages: Union[str, Iterable[Union[dict[str, Any], Message]]],
    *,
    model: str,
    **options: Any,
) -> Message:
    """Ask for a chat completion and return the whole answer, as one Message.

    messages, model, options: as in stream().

    Returns the Message of choice 0; an empty one, with the finish_reason, if it said
    nothing. Raises what stream() raises, out of this call, with what had arrived as
    .partial.
    """
    message = Message()
    for event in aggregate(stream(messages, model=model, **options)):
        if isinstance(event, Message) and event.choice == 0:
            message = event
        elif isinstance(event, Completed):
            message.finish_reason = event.finish_reason
    return message


def aggregate(
    events: Iterable[Event], *, deltas: bool = False
) -> Generator[Event, None, None]:
    """Turn events into whole messages.

    Silent while deltas arrive; at each Completed one Message per choice that has text,
    reasoning, refusal or tool calls, in ascending order of choice, then the Completed
    itself; then it starts afresh. Events that end without a Completed give their
    messages all the same.

    events: any iterable of events; closed when this generator is closed in the middle.
    deltas: bool, True also passes on all other events as they come; default False.

    Raises TypeError, out of the loop, for what is no event of this module, and what
    `events` raises; a ChatStreamError gets the messages so far as .partial.
    """
    if not hasattr(events, "__iter__"):
        kind = type(events).__name__
        raise TypeError(f"events: expected an iterable of events, got a {kind}")
    return _aggregate(iter(events), _to_bool("deltas", deltas))


def decode(
    blocks: Iterable[bytes], *, strict: bool = False, raw: bool = False
) -> Generator[Event, None, None]:
    """Read the body of a 2xx answer that came from anywhere: bytes -> events.

    blocks: any iterable of bytes, cut anywhere: a list, a file opened "rb", the
        iter_content() of requests, a recorded body. Its end is a clean end of the answer.
    strict, raw: bool, as in stream().

    Yields what stream() would; the choices keep the indexes that the server wrote, because
    nobody knows what was asked for. Raises TypeError for what is no iterable of bytes, the
    StreamErrors of stream(), and what `blocks` raises, as it is.
    """
    if isinstance(blocks, (str, bytes, bytearray)) or not hasattr(blocks, "__iter__"):
        kind = type(blocks).__name__
        raise TypeError(f"blocks: expected an iterable of bytes, got a {kind} alone")
    return _decode(iter(blocks), _to_bool("strict", strict), _to_bool("raw", raw))


def cancel(events: Generator[Event, None, None]) -> None:
    """Stop, from any thread, what stream() returned: its loop raises CancelledError.

    events: the generator that stream() returned; not one of aggregate().

    Works before the first next(), between two events, in the wait before another try, and
    while another thread waits in next(). Only a connection that is being made (a name
    looked up, a TLS handshake, TCP but on Linux), and with `pool=` all up to the headers,
    goes on until that wait ends by itself or at its bound. On a call that has ended it does nothing. Raises TypeError for anything else.
    """
    clock = None
    with suppress(TypeError):  # no weak reference can be made to it
        clock = _clocks.get(events)
    if clock is None:
        kind = type(events).__name__
        raise TypeError(f"events: expected what stream() returned, got another {kind}")
    clock.cancel()


# --------------------------------------------------------------------------------------
# How it works
# --------------------------------------------------------------------------------------

# messages, options -> _Request -> tries and waits -> one attempt -> transport: _Reply
#                                                        |              | bytes as they come
#                                                        |              v
#                                                        |     framing, compression
#                                                        v              |
#                                              the reading loop <-------+
#                                                        | feed(block), end(cut)
#                                                        v
#               _Answer: lines -> SSE -> JSON -> choices, calls, texts     (no I/O, no time)
#                                                        | events
#                                                        v
#                            stream(), decode()  ->  aggregate()  ->  complete()
#
# Three rules hold the house together:
#
# 1. Each fact has one owner, which alone changes it; the others ask. Time and cancelling
#    are the _Clock's, where a body ends is the _Framing's, what was said is the _Answer's.
# 2. There is one rule of reading: JSON counts, however it is framed; what nobody can read
#    is said, never dropped. A quirk of a server goes into the room of the word it is about.
# 3. One loop is over bytes (_read_body), one over tries (_run); only the clock waits.
#    Below feed() nobody knows of sockets or time, so decode() runs all of it on a file.


# --------------------------------------------------------------------------------------
# Arguments -> request
# --------------------------------------------------------------------------------------


class _URL:
    """Where a request goes.

    target: str, path and query.
    """

    def __init__(self, scheme: str, host: str, port: int, target: str) -> None:
        self.scheme = scheme
        self.host = host
        self.port = port
        self.target = target

    @property
    def origin(self) -> str:
        return _origin(self.scheme, self.host, self.port)

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def shown(self) -> str:
        """The URL for logs and messages: query values may be secret."""
        return self.origin + self.target.partition("?")[0]


class _Request(SimpleNamespace):
    """All that a try needs, but for the time."""

    url: _URL
    headers: dict[str, str]
    body: bytes
    one_choice: bool  # no more than one was asked for
    key_source: str  # the environment variable of the key, "" if none is needed
    connect_timeout: Optional[float]
    max_retries: int
    strict: bool
    raw: bool
    pool: Any
    secrets: _Secrets

    __repr__ = object.__repr__  # another one would show the key


def _choose_provider(provider: Any, base_url: Optional[str]) -> Provider:
    if isinstance(provider, Provider):
        return provider
    if isinstance(provider, str):
        if provider not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ValueError(
                f"provider: expected one of {known}, or a Provider; got {provider!r}"
            )
        return PROVIDERS[provider]
    if provider is not None:
        raise TypeError(
            f"provider: expected a name or a Provider, got a {type(provider).__name__}"
        )
    if base_url is not None:
        return Provider("base_url", base_url)  # some server: no key of ours goes there
    openai = PROVIDERS["openai"]
    elsewhere = os.environ.get("OPENAI_BASE_URL", "").strip()
    if not elsewhere:
        return openai
    key_name = openai.env_key
    if not os.environ.get(key_name or "", "").strip():
        key_name = None
    return Provider(
        openai.name, elsewhere, key_name, openai.env_key_instructions, openai.headers
    )


def _choose_key(provider: Provider, api_key: Any) -> str:
    if api_key is not None and not isinstance(api_key, str):
        raise TypeError(f"api_key: expected a str, got a {type(api_key).__name__}")
    if api_key and not api_key.strip():
        raise ValueError("api_key: expected a key, got blanks")
    source, key = "api_key", api_key or ""
    if not key and provider.env_key:
        # Stripped, because files that set variables like to end in a line break.
        source = provider.env_key
        if not isinstance(source, str):
            kind = type(source).__name__
            raise TypeError(f"Provider.env_key: expected a str or None, got a {kind}")
        key = os.environ.get(source, "").strip()
        if not key:
            instructions = provider.env_key_instructions or ""
            raise MissingAPIKeyError(
                f"no API key: set the environment variable {source} or pass api_key=. "
                f"{instructions}".rstrip(),
                env_key=source,
                instructions=instructions,
            )
    _check_header_value(source, key)
    return key


def _check_header_value(what: str, value: str) -> None:
    """RFC 9110, 5.5: no control characters. The value is not shown: it may be a key."""
    if any(ord(c) < 32 and c != "\t" or ord(c) == 127 for c in value):
        raise ValueError(f"{what}: holds a line break or another control character")
    try:
        value.encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"{what}: holds a character outside Latin-1") from None


#: RFC 9110, 5.6.2: what a header's name is made of.
_TOKEN = frozenset("!#$%&'*+-.^_`|~" + string.ascii_letters + string.digits)


def _check_headers(what: str, headers: Any) -> Mapping[str, str]:
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise TypeError(f"{what}: expected a mapping, got a {type(headers).__name__}")
    for name, value in headers.items():
        if not isinstance(name, str):
            raise TypeError(f"{what}: expected str names, got a {type(name).__name__}")
        if not name or not _TOKEN.issuperset(name):
            raise ValueError(
                f"{what}: expected header names (RFC 9110, 5.1), got another"
            )
        if not isinstance(value, str):
            raise TypeError(
                f"{what}[{name!r}]: expected a str, got a {type(value).__name__}"
            )
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"{what}: {name} follows from the body, do not set it")
        _check_header_value(f"{what}[{name!r}]", value)
    return headers


def _merge_headers(*layers: Mapping[str, str]) -> dict[str, str]:
    """Later layers replace earlier ones, whatever the case (RFC 9110, 5.1).

    The first spelling stays: urllib3's ProxyManager adds Accept and Host by theirs.
    """
    spelling = {"host": "Host"}
    merged: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.items():
            merged[spelling.setdefault(name.lower(), name)] = value
    return merged


_DEFAULT_PORTS = {"http": 80, "https": 443}

#: What the labels of a host name are made of; Docker's names have _.
_LABEL = frozenset("-_" + string.ascii_letters + string.digits)


def _is_host(host: str) -> bool:
    """A name (RFC 1123, 2.1), or an IPv6 address, perhaps with a zone."""
    if ":" in host:
        return _parse_address(host.partition("%")[0]) is not None
    labels = host.removesuffix(".").split(".")
    return len(host) < 254 and all(
        0 < len(label) < 64 and label[0] != "-" and _LABEL.issuperset(label)
        for label in labels
    )


def _parse_url(base_url: Any) -> _URL:
    if not isinstance(base_url, str):
        raise TypeError(f"base_url: expected a str, got a {type(base_url).__name__}")
    return _split_url(base_url)


@lru_cache(maxsize=16)
def _split_url(base_url: str) -> _URL:
    """Check a base URL, and add the path of the endpoint."""
    from urllib.parse import quote, urlsplit

    wanted = "base_url: expected http(s)://host[:port][/path][?query]"
    base_url = base_url.strip()
    shown = base_url.partition("?")[0].partition("#")[0][:_MAX_QUOTE]
    if "@" in shown.partition("//")[2].partition("/")[0]:
        raise ValueError(f"{wanted}, without user:password@; use headers= or api_key=")
    if "@" in base_url:  # user:pass/word@host: a password all the same
        shown = "a URL with @ in it"
    try:
        url = urlsplit(base_url)
        host, port = url.hostname or "", url.port
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError:
        raise ValueError(
            f"{wanted}, with a valid host and port; got {shown!r}"
        ) from None
    if url.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError(f"{wanted}, got {shown!r}")
    if _has_surrogate(base_url):
        raise ValueError(f"{wanted}, in valid Unicode; got {shown!r}")
    # Some clients take a backslash for a slash, others for a part of the host's name.
    if any(c <= " " or c in "\\#\x7f" for c in base_url):
        raise ValueError(
            f"{wanted}, no blanks, no backslash and no #fragment; got {shown!r}"
        )
    if not _is_host(host):
        raise ValueError(f"{wanted}, with a valid host name; got {shown!r}")
    path = url.path.rstrip("/")
    if path.endswith("/chat/completions"):
        raise ValueError(
            f"{wanted}, which is all that comes before /chat/completions; got {shown!r}"
        )
    safe = "/%:@!$&'()*+,;=-._~"
    target = quote(path, safe=safe) + "/chat/completions"
    if url.query:
        target += "?" + quote(url.query, safe=safe + "?")
    return _URL(url.scheme, host, port or _DEFAULT_PORTS[url.scheme], target)


def _origin(scheme: str, host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    shown = "" if port == _DEFAULT_PORTS[scheme] else f":{port}"
    return f"{scheme}://{host}{shown}"


def _to_seconds(name: str, value: Any) -> Optional[float]:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected seconds as a number, or None; got {value!r}")
    if not 0 < value <= _LONGEST_TIMEOUT:
        raise ValueError(
            f"{name}: expected more than 0 and at most {_LONGEST_TIMEOUT} seconds, "
            f"or None for no bound; got {value!r}"
        )
    return float(value)


def _to_bool(name: str, value: Any) -> bool:
    if value not in (True, False):
        raise TypeError(f"{name}: expected True or False, got {value!r:.100}")
    return bool(value)


def _to_retries(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"max_retries: expected an int, got {value!r}")
    if value < 0:
        raise ValueError(f"max_retries: expected 0 or more, got {value!r}")
    return value


def _check_pool(pool: Any) -> None:
    """By what it can do: urllib3 is not imported here."""
    if pool is None:
        return
    able = hasattr(pool, "connection_from_url") and hasattr(pool, "urlopen")
    kind = f"{type(pool).__module__}.{type(pool).__name__}"
    if isinstance(pool, type) or not able:
        raise TypeError(f"pool: expected a urllib3 PoolManager, got a {kind}")
    classes = getattr(pool, "pool_classes_by_scheme", {}).values()
    if not all(_is_http_client(getattr(c, "ConnectionCls", None)) for c in classes):
        raise TypeError(
            f"pool: expected a PoolManager of urllib3 itself, got a {kind} whose "
            "connections are not http.client's (urllib3-future puts itself in its place)"
        )


def _is_http_client(connection: Any) -> bool:
    """Whether a connection class is one of http.client's, by name, because vcrpy puts
    others in its place."""
    bases = getattr(connection, "__mro__", ())
    return any(
        base.__module__ == "http.client" and base.__name__ == "HTTPConnection"
        for base in bases
    )


#: What other clients call it -> what it is called here. No server knows these members.
_OTHER_NAMES = {
    **dict.fromkeys(("system", "system_prompt"), "instructions="),
    "prompt": "messages",
    **dict.fromkeys(("key", "apikey"), "api_key="),
    **dict.fromkeys(("url", "api_base"), "base_url="),
    **dict.fromkeys(
        ("extra_headers", "default_headers", "organization", "project"), "headers="
    ),
    **dict.fromkeys(
        ("extra_query", "default_query", "api_version"), "the query of base_url="
    ),
    **dict.fromkeys(
        (
            *("proxy", "proxies", "verify", "cert"),
            *("http_client", "session", "ssl_context"),
        ),
        "pool=",
    ),
    **dict.fromkeys(("retries", "num_retries"), "max_retries="),
    **dict.fromkeys(
        ("timeout", "request_timeout", "total_timeout"),
        "connect_timeout=, idle_timeout=, event_timeout= and deadline=",
    ),
}


def _build_body(
    messages: Any, model: Any, instructions: Any, params: Any, extra_body: Any
) -> dict[str, Any]:
    if not isinstance(model, str):
        raise TypeError(f"model: expected a str, got {model!r}")
    if not model.strip():
        raise ValueError(f"model: expected a model's name, got {model!r}")
    if instructions is not None and not isinstance(instructions, str):
        raise TypeError(
            f"instructions: expected a str or None, got a {type(instructions).__name__}"
        )
    if extra_body is not None and not isinstance(extra_body, Mapping):
        raise TypeError(
            f"extra_body: expected a mapping, got a {type(extra_body).__name__}"
        )
    extra_body = extra_body or {}
    if "stream" in params or "stream" in extra_body:
        raise TypeError(
            "stream: it is always true; use complete() or aggregate() for whole messages"
        )
    for name in params:
        if name in _OTHER_NAMES:
            raise TypeError(
                f"{name}: expected {_OTHER_NAMES[name]} for this; a member of the "
                "request's body that has this name goes into extra_body="
            )
    history = [{"role": "system", "content": instructions}] if instructions else []
    history += _list_messages(messages)
    return {
        "model": model,
        "messages": history,
        "stream": True,
        **params,
        **extra_body,
    }


_write_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _encode_body(body: dict[str, Any]) -> bytes:
    try:
        return _write_json(body).encode()
    except (TypeError, ValueError, RecursionError):
        pass  # which member is it?
    for name, value in body.items():
        try:
            _write_json({name: value})
        except RecursionError:
            raise ValueError(f"{name}: nested too deeply for JSON") from None
        except (TypeError, ValueError) as error:
            text = f"{name!s:.100}: expected what JSON can hold: {error}"
            raise type(error)(text) from None
    raise ValueError("the request's body cannot be written as JSON")


def _list_messages(messages: Any) -> list[dict[str, Any]]:
    wanted = "a str, or a sequence of dicts and Messages"
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}] if messages else []
    elif isinstance(messages, (bytes, Mapping, Message)):
        kind = type(messages).__name__
        raise TypeError(f"messages: expected {wanted}, got a {kind}")
    try:
        messages = list(messages)
    except TypeError:
        kind = type(messages).__name__
        raise TypeError(f"messages: expected {wanted}, got a {kind}") from None
    if not messages:
        raise ValueError(f"messages: empty; expected {wanted}")
    for position, message in enumerate(messages):
        if not isinstance(message, (dict, Message)):
            kind = type(message).__name__
            raise TypeError(
                f"messages[{position}]: expected a dict or Message, got {kind}"
            )
    return [m.to_dict() if isinstance(m, Message) else m for m in messages]


# --------------------------------------------------------------------------------------
# Secrets, and texts that are shown
# --------------------------------------------------------------------------------------


#: A header whose name holds one of these has a secret value.
_SECRET_NAMES = ("auth", "key", "token", "secret", "cookie")

#: A shorter value is a dummy ("ollama"), and would be found everywhere.
_SHORTEST_SECRET = 8


class _Secrets:
    """What must be seen in no error and no log line, even if the server sends it back."""

    def __init__(self, *values: str) -> None:
        self._values = set(values)
        self._forms: list[str] = []  # as they may be written; [] until they are needed

    def add(self, *values: str) -> None:
        self._values.update(values)
        self._forms = []

    def add_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            if any(word in name.lower() for word in _SECRET_NAMES):
                self.add(value, value.rpartition(" ")[2])

    def add_query(self, query: str) -> None:
        from urllib.parse import unquote

        for pair in query.split("&"):
            value = pair.partition("=")[2]
            self.add(value, unquote(value))

    def hide(self, text: str) -> str:
        self._forms = self._forms or self._list_forms()
        for form in self._forms:
            text = text.replace(form, "***")
        return text

    def hide_in_start(self, text: str) -> str:
        """The same of the start of a text, which may end in half a secret."""
        text = self.hide(text)
        for form in self._forms:
            for size in range(len(form) - 1, 3, -1):
                if text.endswith(form[:size]):
                    return text[:-size] + "***"
        return text

    def _list_forms(self) -> list[str]:
        forms = set()
        for value in self._values:
            if len(value) >= _SHORTEST_SECRET:
                escaped = json.dumps(value)[1:-1]
                forms |= {value, escaped, escaped.replace("/", "\\/")}
        # A secret that begins another one must not be looked for before it.
        return sorted(forms, key=len, reverse=True)

    def hide_in(self, value: Any, depth: int = 0) -> Any:
        """The same value, fit to be shown: without secrets, and valid Unicode."""
        if isinstance(value, str):
            return self.hide(_replace_surrogates(value))
        if isinstance(value, (list, tuple, dict)) and depth > 50:
            return "..."
        if isinstance(value, (list, tuple)):
            return type(value)(self.hide_in(item, depth + 1) for item in value)
        if isinstance(value, dict):
            return {
                self.hide_in(key): self.hide_in(item, depth + 1)
                for key, item in value.items()
            }
        return value

    def clean(self, error: ChatStreamError) -> None:
        """Leave no secret in an error and its causes, and one line of text."""
        vars(error).update(self.hide_in(vars(error)))
        error.args = (_one_line(self.hide(str(error)), _MAX_TEXT),)
        seen: list[BaseException] = [error]
        cause = error.__cause__ or error.__context__
        while cause is not None and cause not in seen:
            seen.append(cause)
            shown = repr((cause.args, vars(cause)))
            if self.hide(shown) != shown:
                cause.args = self.hide_in(cause.args)
                vars(cause).update(self.hide_in(vars(cause)))
            cause = cause.__cause__ or cause.__context__


#: C0, DEL and C1: what a terminal would obey.
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")


#: What words are made of; keys are such words.
_WORD = string.ascii_letters + string.digits + "-_+/=.~%"


def _one_line(text: str, most: int) -> str:
    """At most `most` characters of the text, fit for one line of a terminal.

    It is never cut inside a word: half a key would stand there, and be found by nobody.
    """
    start = _replace_surrogates(text[: 4 * most])
    line = " ".join(start.translate(_CONTROLS).split())
    if len(line) <= most and len(text) <= 4 * most:
        return line
    return line[: most - 3].rstrip(_WORD) + "..."


def _replace_surrogates(text: str) -> str:
    """Make valid Unicode of it: pairs are joined, and a lone half becomes U+FFFD."""
    if text.isascii():
        return text
    return _to_utf16(text).decode("utf-16-le", "replace")


def _to_utf16(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_from_handler(error: BaseException) -> bool:
    """Whether a signal handler of the caller's raised it.

    Python calls a handler with the frame that it interrupts, so in the traceback a frame
    that holds the one before it among its arguments is a handler's. Those that do not
    keep it are known by their code, as long as they are installed.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        interrupted, inner = trace.tb_frame, trace.tb_next.tb_frame
        trace = trace.tb_next
        if inner.f_globals is vars(json.decoder):
            continue  # it says that something is no JSON, as it often does
        for value in list(inner.f_locals.values()):
            inside = value if isinstance(value, tuple) else (value,)
            if any(item is interrupted for item in inside):
                return True
        if inner.f_code in _handler_codes():
            return True
    return False


def _handler_codes() -> list[Any]:
    import signal

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return [getattr(h, "__code__", None) for h in handlers if callable(h)]


def _pass_on(error: BaseException) -> None:
    """Raise as it is what is ours or the caller's, and was caught for its class."""
    if isinstance(error, ChatStreamError) or _is_from_handler(error):
        raise error


# --------------------------------------------------------------------------------------
# Time, and cancelling
# --------------------------------------------------------------------------------------


class _Clock:
    """How long a call may still wait: the one owner of time, and of cancelling.

    Before each wait on the socket, that gets the time that is left. cancel() comes from
    other threads; all else from the one that runs the call.
    """

    def __init__(
        self,
        url: str,
        *,
        idle_timeout: Optional[float],
        event_timeout: Optional[float],
        deadline: Optional[float],
    ) -> None:
        self._url = url
        self._idle_timeout = idle_timeout
        self._event_timeout = event_timeout
        self._deadline = deadline
        self._call_ends = math.inf
        self._event_ends = math.inf  # until the headers are there
        self._phase_ends = math.inf
        self._has_headers = False
        self._lock = threading.RLock()  # a signal handler may cancel() at any moment
        self._woken = threading.Event()
        self._sock: Any = None  # the socket that a cancel() shuts down
        self._cancelled = False
        self.may_end_call = deadline is not None  # check_call() may raise

    # What the call tells it

    def start_call(self) -> None:
        self._call_ends = self.moment_after(self._deadline)

    def start_try(self) -> None:
        self._event_ends = math.inf
        self._has_headers = False
        self.check()

    def start_event(self) -> None:
        """The headers have come, or a chunk that said something."""
        self._has_headers = True
        self._event_ends = self.moment_after(self._event_timeout)

    def leave_out(self, seconds: float) -> None:
        """So long the caller had the turn, which does not count."""
        self._event_ends += seconds

    @contextmanager
    def phase(self, seconds: float) -> Iterator[None]:
        """In here, all reading together may take so long.

        What then ends it is nobody's error: both who use this suppress it.
        """
        self._phase_ends = self.moment_after(seconds)
        try:
            yield
        finally:
            self._phase_ends = math.inf

    # What others ask it

    def left_of(self, seconds: Optional[float]) -> Optional[float]:
        """-> `seconds` (None: no bound), or what is left of the deadline if that is less."""
        self.check()
        left = self._call_ends - time.monotonic()
        bound = left if seconds is None else min(seconds, left)
        return None if math.isinf(bound) else max(bound, 0.001)

    def moment_after(self, seconds: Optional[float]) -> float:
        """-> the moment so many seconds from now; None: never."""
        return math.inf if seconds is None else time.monotonic() + seconds

    def has_time_for(self, seconds: float) -> bool:
        """Whether a wait of so many seconds would end before the deadline."""
        return time.monotonic() + seconds < self._call_ends

    def check_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError(f"{self._url}: cancel() was called")

    def check_call(self) -> None:
        """Raise CancelledError or DeadlineError if it is time."""
        self.check_cancelled()
        if time.monotonic() >= self._call_ends:
            seconds = self._deadline or 0.0
            text = f"{self._url}: not done within {seconds:g} s (deadline)"
            raise DeadlineError(text, seconds=seconds)

    def check(self) -> None:
        """Raise CancelledError, DeadlineError or IdleTimeoutError if it is time."""
        self.check_call()
        now = time.monotonic()
        if now >= self._event_ends:
            what = "bytes came, but no chunk with anything in it"
            raise self._idle(what, self._event_timeout, "event_timeout")
        if now >= self._phase_ends:
            raise self._idle("the body did not end", None, "a bound of its own")

    @property
    def idle_timeout(self) -> Optional[float]:
        return self._idle_timeout

    def silence_error(self) -> IdleTimeoutError:
        """What to raise where a read has not got even one byte in time."""
        return self._idle("the server sent nothing", self._idle_timeout, "idle_timeout")

    def _idle(
        self, what: str, seconds: Optional[float], bound: str
    ) -> IdleTimeoutError:
        seconds = seconds or 0.0
        where = "" if self._has_headers else " before the headers"
        return IdleTimeoutError(
            f"idle timeout waiting for SSE: {self._url}: {what} for {seconds:g} s"
            f"{where} ({bound})",
            seconds=seconds,
        )

    # Waits

    def read(self, sock: Any, read: Callable[[Any], Any], argument: Any) -> Any:
        """`read(argument)`, which waits on `sock`, within the time that is left."""
        started = time.monotonic()
        least = min(self._call_ends, self._event_ends, self._phase_ends) - started
        if least <= 0 or self._cancelled:
            self.check()
        if self._idle_timeout is not None and self._idle_timeout < least:
            least = self._idle_timeout
        seconds = None if math.isinf(least) else max(least, 0.001)
        get = getattr(sock, "gettimeout", None)  # pyOpenSSL's has none
        if get is None or get() != seconds:  # asking is no system call
            sock.settimeout(seconds)
        try:
            data = read(argument)
        except OSError as error:
            # A timeout before its time is a signal handler's, or TCP's own ETIMEDOUT.
            is_early = time.monotonic() - started < least - 0.01
            is_timeout = isinstance(error, socket.timeout) and not is_early
            if _is_from_handler(error):
                raise
            if self._cancelled or is_timeout:
                self.check()
            if is_timeout:
                raise self.silence_error() from None
            raise
        if self._cancelled:
            self.check()
        return data

    def connect(self, seconds: Optional[float], sock: Any, address: Any) -> None:
        """`sock.connect(address)`, within so many seconds (None: no bound) and what is
        left of the deadline."""
        sock.settimeout(self.left_of(seconds))
        self.watch(sock)
        sock.connect(address)

    def read_before(
        self, end: float, sock: Any, read: Callable[[Any], Any], argument: Any
    ) -> Any:
        """The same as read() while connecting: all reads have until a moment, and no
        other bound than that and the deadline."""
        seconds = self.left_of(end - time.monotonic())
        if time.monotonic() >= end:
            raise socket.timeout("timed out")
        sock.settimeout(seconds)
        return read(argument)

    def sleep(self, seconds: float) -> None:
        """The wait before another try, or until a cancel(), which start_try() raises."""
        _sleep(seconds, self._woken)

    # Cancelling

    def watch(self, sock: Any) -> None:
        """cancel() is to shut this socket down."""
        with self._lock:
            self._sock = sock
        self.check()

    def unwatch(self) -> None:
        """Its connection goes back to the pool, or is closed."""
        with self._lock:
            self._sock = None

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = self.may_end_call = True
            self._woken.set()
            if self._sock is not None:
                # The base class's: SSLSocket's own would take the TLS object away under
                # the thread that reads from it. This one wakes it.
                inner = getattr(self._sock, "socket", self._sock)  # TLS inside TLS
                with suppress(OSError, TypeError):
                    socket.socket.shutdown(inner, socket.SHUT_RDWR)


def _sleep(seconds: float, woken: threading.Event) -> None:
    """The wait between two tries."""
    woken.wait(seconds)


# --------------------------------------------------------------------------------------
# Tries and waits
# --------------------------------------------------------------------------------------


class _Failed(Exception):
    """A try ended in `error`; whether another one may help, and after what wait.

    wait: seconds that the server asked for; None: the backoff.
    """

    def __init__(
        self,
        error: ChatStreamError,
        *,
        again: bool,
        wait: Optional[float] = None,
    ) -> None:
        super().__init__(error)
        self.error = error
        self.again = again
        self.wait = wait


def _run(request: _Request, clock: _Clock) -> Generator[Event, None, None]:
    """The retry loop around _attempt()."""
    clock.start_call()
    delays = _backoff()
    for attempt in itertools.count(1):
        try:
            yield from _attempt(request, clock)
            return
        except _Failed as failed:
            error, cause = failed.error, failed.__cause__
            again, delay = failed.again, failed.wait
        if isinstance(error, (TransportError, RetryLimitError)):
            error.attempts = attempt
        if delay is None:
            delay = next(delays)
        last = attempt > request.max_retries or delay > _LONGEST_RETRY_AFTER
        if not again or last or not clock.has_time_for(delay):
            if attempt > 1:
                error.args = (f"{error} ({attempt} attempts)",)
            raise error from cause
        _log.warning(
            "%s; try %d of %d in %.2f s",
            error,
            attempt + 1,
            request.max_retries + 1,
            delay,
        )
        clock.sleep(delay)


def _backoff() -> Iterator[float]:
    """0.2 s, doubling; times 0.9 to 1.1, so that not all clients come back together."""
    import random

    delay = _FIRST_BACKOFF
    while True:
        yield min(delay * random.uniform(0.9, 1.1), _LONGEST_BACKOFF)
        delay = min(delay * 2, _LONGEST_BACKOFF)


def _attempt(request: _Request, clock: _Clock) -> Generator[Event, None, None]:
    """One request and its answer. Raises _Failed where that may be tried again."""
    clock.start_try()
    if _log.isEnabledFor(logging.DEBUG):
        shown = request.body[:_MAX_LOGGED].decode()  # json.dumps() wrote ASCII
        shown = request.secrets.hide_in_start(shown)
        _log.debug("POST %s %s", request.url.shown, shown)
    request_id = ""
    reply = None
    try:
        reply = _open(request, clock)
        request_id = _find_request_id(reply.headers)
        clock.start_event()
        if not 200 <= reply.status < 300:
            raise _status_failure(request, reply, clock)
        yield from _read_answer(request, reply, clock, request_id)
    except (_Failed, ChatStreamError) as failure:
        error = failure.error if isinstance(failure, _Failed) else failure
        error.request_id = error.request_id or request_id
        error.__cause__ = error.__cause__ or failure.__cause__
        request.secrets.clean(error)
        raise
    finally:
        clock.unwatch()
        if reply is not None:
            reply.close()


#: The headers that name a request, the most telling first.
_REQUEST_ID_HEADERS = (
    "x-request-id",
    "apim-request-id",
    "x-ms-request-id",
    "x-generation-id",
    "x-litellm-call-id",
    "cf-ray",
)


def _find_request_id(headers: Mapping[str, str]) -> str:
    return next((headers[n] for n in _REQUEST_ID_HEADERS if headers.get(n)), "")


def _read_answer(
    request: _Request, reply: _Reply, clock: _Clock, request_id: str
) -> Generator[Event, None, None]:
    """The events of a 2xx reply, from its bytes to its Completed or its error."""
    answer = _Answer(
        strict=request.strict,
        raw=request.raw,
        one_choice=request.one_choice,
        content_type=reply.headers.get("content-type", ""),
        request_id=request_id,
        headers=reply.headers,
        hide=request.secrets.hide,
    )
    body = _read_body(reply, clock)
    cut: Union[StreamError, DeadlineError, None] = None
    try:
        while not answer.done:
            try:
                block = next(body, None)
            except (StreamError, DeadlineError) as fault:
                cut = fault
                break
            if block is None:
                break
            said, started = answer.said, time.monotonic() if request.raw else 0.0
            for event in answer.feed(block):
                if clock.may_end_call:
                    clock.check_call()
                yield event
            if answer.said != said:
                clock.start_event()
            elif request.raw:  # all else that is yielded says something
                clock.leave_out(time.monotonic() - started)
        for event in answer.end(cut):
            clock.check_cancelled()
            yield event
    except TruncatedStreamError as fault:
        if fault is not cut or answer.started:
            raise
        error = TransportError(f"{request.url.shown}{reply.via}: {fault}")
        raise _Failed(error, again=True) from fault.__cause__
    except ServerError as error:
        if answer.started or not _is_passing(error):
            raise
        again = reply.headers.get("x-should-retry", "").lower() != "false"
        raise _Failed(error, again=again, wait=_retry_after(reply.headers)) from None
    finally:  # also for a caller who leaves at Completed, as next(aggregate(...)) does
        if answer.done:
            with suppress(ChatStreamError), clock.phase(_GRACE_SECONDS):
                for _ in body:
                    pass
    _log.debug("done: %d", reply.status)


#: The statuses that another try may heal.
_PASSING_STATUSES = (408, 429, *range(500, 600))

#: As an error's code or type: the same said in words; and what no other try heals.
_PASSING_WORDS, _SPENT = ("server_error", "overloaded_error"), "insufficient_quota"


def _is_passing(error: ServerError) -> bool:
    """Whether an error that is an answer's first word is like a status to be retried."""
    said = (error.code, error.type)
    if _SPENT in said:
        return False
    if any(word in said for word in _PASSING_WORDS):
        return True
    return str(error.code).removesuffix(".0") in map(str, _PASSING_STATUSES)


# --------------------------------------------------------------------------------------
# The reading loop: a reply -> the bytes of its body
# --------------------------------------------------------------------------------------


def _read_body(reply: _Reply, clock: _Clock) -> Iterator[bytes]:
    """The body as it arrives, without framing and compression.

    Ends where the body properly does; else raises, after all that had arrived, the
    TruncatedStreamError or IdleTimeoutError or DeadlineError that says how it ended.
    """
    framing = reply.open_body()
    unpacking = _Unpacking(reply.headers.get("content-encoding", ""))
    while not framing.ended:
        block = reply.read()
        data = framing.feed(block) if block else framing.end()
        if unpacking.is_plain:
            if data:
                yield data
        else:
            for piece in unpacking.feed(data):
                yield piece
                clock.check()  # much may unpack from little
        if framing.fault:
            raise _cut(framing.fault)
    yield from unpacking.end()


def _cut(how: str) -> TruncatedStreamError:
    return TruncatedStreamError(f"the answer was cut: {how}")


# --------------------------------------------------------------------------------------
# Framing (RFC 9112, 6 and 7)
# --------------------------------------------------------------------------------------


_HEX_DIGITS = b"0123456789abcdefABCDEF"

#: Short chunk-size lines, whole, that any call has read -> the size. There are few.
_sizes: dict[bytes, int] = {}


class _Framing:
    """Where a body ends: chunked, after `length` bytes, or with the connection.

    ended: bool, the end that the framing names has come.
    fault: str, what is wrong with the framing, or how the connection ended too early.
    rest: bytes, what came behind the end: the connection is not to be used again.
    """

    def __init__(self, *, chunked: bool = False, length: Optional[int] = None) -> None:
        self.ended = length == 0
        self.fault = ""
        self.rest = b""
        self.named = chunked or length is not None
        self._chunked = chunked
        self._left = length or 0  # bytes of the body, or of the chunk, that are to come
        self._in_chunk = False
        self._in_trailers = False
        self._unread = b""  # a line, or the end of a chunk, that is not whole yet
        self._trailers = 0  # their bytes so far

    def feed(self, block: bytes) -> bytes:
        """-> the bytes of the body in a block."""
        if self._chunked:
            return self._feed_chunked(block)
        if not self.named:
            return block
        data = block[: self._left]
        self._left -= len(data)
        self._end_with(block[len(data) :])
        return data

    def end(self) -> bytes:
        """The connection has ended."""
        if not self.named:
            self.ended = True
        elif not self._chunked:
            self.fault = f"{self._left} bytes short of its Content-Length"
        elif self._in_chunk:
            self.fault = "inside a chunk"
        else:
            self.fault = "without its last chunk"
        return b""

    def _end_with(self, rest: bytes) -> None:
        if not self._left:
            self.ended = True
            self.rest = rest

    def _feed_chunked(self, block: bytes) -> bytes:
        """All the chunks in a block are joined: that is what makes it cheap."""
        if self._unread:
            block = self._unread + block
            self._unread = b""
        pieces: list[bytes] = []
        at = 0
        while not (self.ended or self.fault):
            if not (self._in_chunk or self._in_trailers):
                at = self._take_whole_chunks(block, at, pieces)
                if at == len(block):
                    break
            if self._in_chunk:
                end = at + self._left
                if block[end : end + 2] == b"\r\n":  # nearly always
                    pieces.append(block[at:end])
                    at = end + 2
                    self._in_chunk = False
                elif len(block) < end + 2 and b"\r\n".startswith(block[end:]):
                    pieces.append(block[at:end])
                    self._left = max(end - len(block), 0)
                    self._unread = block[end:]
                    break
                else:
                    pieces.append(block[at:end])
                    self.fault = "a chunk is longer than its size"
                continue
            end = block.find(b"\n", at)
            if end < 0:
                self._unread = block[at:]
                if len(self._unread) > _MAX_FRAMING:
                    self.fault = f"a chunk size of more than {_MAX_FRAMING} bytes"
                break
            line = block[at:end]
            at = end + 1
            if self._in_trailers:
                self._read_trailer(line, block[at:])
            else:
                self._read_size(line)
        return b"".join(pieces)

    def _take_whole_chunks(self, block: bytes, at: int, pieces: list[bytes]) -> int:
        """Those that lie whole in a block, and whose size lines have been read before.

        -> where the first one begins of which that is not so.
        """
        find, sizes = block.find, _sizes
        while True:
            start = find(b"\n", at) + 1
            size = sizes.get(block[at:start])
            if size is None:
                return at
            end = start + size
            if block[end : end + 2] != b"\r\n":
                return at
            pieces.append(block[start:end])
            at = end + 2

    def _read_size(self, line: bytes) -> None:
        self._left = _parse_size(line)
        if self._left < 0:
            shown = _one_line(line.decode("latin-1"), 40)
            self.fault = f"expected a chunk size, got {shown!r}"
        elif self._left > 0 and len(line) < 8 and len(_sizes) < 4096:
            _sizes[line + b"\n"] = self._left
        self._in_chunk = self._left > 0
        self._in_trailers = self._left == 0

    def _read_trailer(self, line: bytes, rest: bytes) -> None:
        """RFC 9112, 7.1.2: field lines up to an empty one, which ends the body."""
        self._trailers += len(line)
        if line in (b"", b"\r"):
            self._end_with(rest)
        elif self._trailers > _MAX_FRAMING:
            self.fault = f"trailers of more than {_MAX_FRAMING} bytes"


def _parse_size(line: bytes) -> int:
    """RFC 9112, 7.1: hexadecimal digits; blanks and extensions may follow. -1: it is not."""
    digits = line.partition(b";")[0].strip(b" \t\r\n")
    if not digits or digits.strip(_HEX_DIGITS) or len(digits) > 16:
        return -1
    return int(digits, 16)


def _choose_framing(status: int, headers: Mapping[str, str]) -> _Framing:
    """RFC 9112, 6.3. Raises StreamError for headers that say nonsense."""
    if status in (204, 304) or status < 200:
        return _Framing(length=0)
    codings = headers.get("transfer-encoding", "").lower().split(",")
    *before, last = [coding.strip() for coding in codings]
    for coding in before:
        if coding not in ("", "identity", "chunked"):
            shown = _one_line(coding, 40)
            raise StreamError(f"expected Transfer-Encoding chunked, got {shown!r} too")
    if last == "chunked":
        return _Framing(chunked=True)
    if last not in ("", "identity"):
        shown = _one_line(last, 40)
        raise StreamError(f"expected Transfer-Encoding chunked or none, got {shown!r}")
    if "content-length" not in headers:
        return _Framing()
    lengths = {length.strip() for length in headers["content-length"].split(",")}
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdigit()) or len(length) > 18:
        shown = _one_line(headers["content-length"], 40)
        raise _cut(f"expected one Content-Length, got {shown!r}")
    return _Framing(length=int(length))


# --------------------------------------------------------------------------------------
# Compression that was not asked for
# --------------------------------------------------------------------------------------


#: How SSE, JSON and HTML begin, behind a BOM or blanks. (zlib's own data begins with x.)
_PLAIN_STARTS = (b"data", b"event", b"id", b"retry", b"error", b":", b"{", b"[", b"<")

#: What stands in Content-Encoding for nothing.
_NO_ENCODINGS = ("", "identity", "none", "utf-8")

_BOM = b"\xef\xbb\xbf"

_GZIP_MAGIC = b"\x1f\x8b"

#: zlib's code for "the header tells".
_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS


class _Unpacking:
    """Undoes a Content-Encoding, of which not the header but the body is believed.

    nginx compresses unasked; proxies unpack and leave the header; servers write "none".

    is_plain: bool, it is known that nothing is to be undone.
    """

    def __init__(self, encoding: str) -> None:
        self.is_plain = False
        names = [name.strip() for name in encoding.lower().split(",")]
        # Those that are left say that something is compressed, and how.
        self._encoding = ", ".join(n for n in names if n not in _NO_ENCODINGS)
        self._start: Optional[bytes] = b""  # None as soon as it is known what it is
        self._members = 0
        self._inflater: Any = None  # of the member that has begun and not ended
        self._held = b""  # behind a member: perhaps the first byte of another
        self._is_junk = False  # what comes behind the last member

    def feed(self, block: bytes) -> Iterator[bytes]:
        """-> pieces of the body, none of which is larger than a block."""
        if self._start is not None:
            self._start += block
            if not self._needs_more(self._start):
                yield from self._decide()
        elif not self.is_plain:
            yield from self._inflate(block)
        elif block:
            yield block

    def end(self) -> Iterator[bytes]:
        """The body has ended. Raises TruncatedStreamError if compressed data has not."""
        yield from self._decide()
        if self._inflater is not None:
            raise _cut("its compressed data is incomplete")

    def _decide(self) -> Iterator[bytes]:
        """Tell what it is, and begin."""
        start = self._start or b""
        self._start = None
        if start:
            self.is_plain = not self._is_packed(start)
            yield from (start,) if self.is_plain else self._inflate(start)

    def _needs_more(self, start: bytes) -> bool:
        """Whether there is too little yet to tell what it is."""
        if len(start) < 2:
            return not start or start == _GZIP_MAGIC[:1] or bool(self._encoding)
        text = start.lstrip(_BOM + b" \t\r\n")
        may_be_plain = any(plain.startswith(text) for plain in _PLAIN_STARTS)
        return bool(self._encoding) and may_be_plain and len(start) < 64

    def _is_packed(self, start: bytes) -> bool:
        if start.startswith(_GZIP_MAGIC):
            return True
        text = start.lstrip(_BOM + b" \t\r\n")
        if not self._encoding or text.startswith(_PLAIN_STARTS):
            return False
        if self._encoding in ("gzip", "x-gzip"):  # or zlib under the wrong name
            return _is_zlib(start) or start == _GZIP_MAGIC[:1]
        if self._encoding == "deflate":
            return True
        shown = _one_line(self._encoding, 40)
        raise StreamError(
            f"expected Content-Encoding gzip, deflate or none, got {shown!r}"
        )

    def _inflate(self, block: bytes) -> Iterator[bytes]:
        while block:
            if self._inflater is None:
                block = self._begin_member(block)
                if self._inflater is None:
                    return
            spare, given = self._inflater.copy(), 0
            try:
                for plain in _decompress(self._inflater, block):
                    given += len(plain)
                    yield plain
            except zlib.error as error:
                self._inflater = None
                yield from _salvage(spare, block, given)
                shown = f"the answer's compression is broken: {error}"
                raise StreamError(shown) from error
            block = b""
            if self._inflater.eof:  # another member may follow, or padding
                block = self._inflater.unused_data
                self._inflater = None

    def _begin_member(self, block: bytes) -> bytes:
        """-> the data of the member that begins in a block."""
        if self._members:
            block = self._held + block.lstrip(b"\0")
            self._held = block[:1]
            self._is_junk = self._is_junk or not _GZIP_MAGIC.startswith(block[:2])
            if self._is_junk or len(block) < 2:
                return b""
            self._held = b""
        # RFC 1950 and 1952 begin in a known way; some servers' "deflate" is bare.
        known = _is_zlib(block) or block.startswith(_GZIP_MAGIC[:1])
        self._inflater = zlib.decompressobj(_ZLIB_OR_GZIP if known else -zlib.MAX_WBITS)
        self._members += 1
        return block


def _is_zlib(block: bytes) -> bool:
    """RFC 1950, 2.2: how zlib's own format begins."""
    head = int.from_bytes(block[:2], "big")
    return head >> 8 & 15 == 8 and head % 31 == 0


def _decompress(inflater: Any, block: bytes) -> Iterator[bytes]:
    plain = block
    while plain and not inflater.eof:  # it may still hold output back
        plain = inflater.decompress(block, _BLOCK_SIZE)
        block = inflater.unconsumed_tail
        if plain:
            yield plain


def _salvage(inflater: Any, block: bytes, given: int) -> Iterator[bytes]:
    """What a block holds before its fault, but for the bytes that were given already.

    zlib keeps that to itself, unless it is fed byte by byte.
    """
    with suppress(zlib.error):
        for place in range(len(block)):
            plain = inflater.decompress(block[place : place + 1])
            if len(plain) > given:
                yield plain[given:]
            given = max(given - len(plain), 0)


# --------------------------------------------------------------------------------------
# Transport: request -> reply
# --------------------------------------------------------------------------------------


class _Reply:
    """A reply whose headers are there, and its connection.

    response: http.client.HTTPResponse, on urllib3 the one inside its own response; or
        what some tool has put in its place.
    """

    def __init__(
        self,
        response: Any,
        clock: _Clock,
        release: Callable[[bool], None],
        *,
        errors: tuple[type[Exception], ...],
        via: str,
    ) -> None:
        self.status: int = response.status
        self.reason: str = getattr(response, "reason", None) or ""
        self.headers = _take_headers(response.headers)
        self.via = via  # the proxy, for messages
        self._errors = errors  # of the connection
        self._response = response
        self._release = release
        # The body's own bytes, from the file that http.client reads itself. What some tool
        # has put in the place of a response may have none: there its own bytes are taken,
        # and the framing is undone already.
        file = getattr(response, "fp", None)
        self._is_raw = hasattr(file, "read1")
        source = file if self._is_raw else response
        self._read1: Any = getattr(source, "read1", None) or response.read
        raw = getattr(file, "raw", None)
        self._sock = getattr(raw, "_sock", None)
        self._clock = clock
        self._is_watched = isinstance(raw, _SocketFile)  # and asks the clock itself
        self._framing = _Framing()
        self._has_read = False  # else more may stand in the file's own buffer

    def open_body(self) -> _Framing:
        """-> what tells where the body ends. Raises StreamError where nothing can."""
        if self._is_raw:
            try:
                self._framing = _choose_framing(self.status, self.headers)
            except StreamError:
                if 200 <= self.status < 300:  # else nothing hides the status
                    raise
        return self._framing

    def read(self) -> bytes:
        """What has arrived, or arrives next; b"" at the end of the connection.

        Raises TruncatedStreamError where that breaks, and what the clock raises.
        """
        self._has_read = True
        try:
            if self._is_watched or self._sock is None:
                return bytes(self._read1(_BLOCK_SIZE))
            self._clock.watch(self._sock)
            return bytes(self._clock.read(self._sock, self._read1, _BLOCK_SIZE))
        except ChatStreamError:
            raise
        except self._errors as error:
            cause = _root_cause(error)
            _pass_on(cause)
            raise _cut(str(cause) or type(cause).__name__) from cause

    def close(self) -> None:
        """Keep the connection for another call if nothing of this one is left in it."""
        reusable = (
            self.status >= 200
            and self._has_read
            and self._framing.ended
            and self._framing.named
            and not self._framing.rest
            and not getattr(self._response, "will_close", True)
            and not _has_pending(self._sock)
        )
        self._response.close()
        self._release(reusable)


def _read_head(response: Any) -> None:
    """Read past 1xx replies, and raise HTTPException where the headers are broken.

    RFC 9110, 15.2: any number of 1xx replies may come before the real one. http.client
    reads past 100 alone. 101 is an answer to what we did not ask for.
    """
    import http.client

    has_file = getattr(response, "fp", None) is not None
    for _ in range(_MAX_INTERIM):
        if not (has_file and 101 < response.status < 200):
            break
        response.headers = response.msg = None
        response.begin()
    else:
        raise http.client.HTTPException("1xx replies without end")
    raw = getattr(getattr(response, "fp", None), "raw", None)
    if isinstance(raw, _SocketFile):
        raw.in_head = False
        if raw.at_end:
            raise http.client.HTTPException("the connection ended inside the headers")
    faults = ("MissingHeaderBodySeparatorDefect", "FirstHeaderLineIsContinuationDefect")
    for defect in getattr(response.headers, "defects", ()):
        if type(defect).__name__ in faults:
            shown = _one_line(str(getattr(defect, "line", None) or ""), _MAX_QUOTE)
            raise http.client.HTTPException(f"a header cannot be read {shown}".rstrip())


def _take_headers(headers: Any) -> dict[str, str]:
    """Names in lower case; several of one name are joined (RFC 9110, 5.3). The blanks
    around a value, which do not belong to it, http.client leaves there."""
    taken: dict[str, str] = {}
    for name, value in headers.items():
        name = name.lower()
        if name != "set-cookie":
            value = str(value).strip()
            taken[name] = f"{taken[name]}, {value}" if name in taken else value
    return taken


def _has_pending(sock: Any) -> bool:
    """Whether TLS holds bytes that it has decrypted and nobody has read."""
    with suppress(OSError, AttributeError, ValueError):
        return bool(getattr(sock, "sslobj", sock).pending())  # that of TLS inside TLS
    return False


class _Upload(io.BytesIO):
    """The request's body, sent from a file so that each block has a timeout of its own.

    tell() says how far we got: 0 while connecting.

    fresh: bool, it is to go over a new connection.
    sent: bool, all of it was taken.
    """

    def __init__(self, body: bytes, clock: _Clock) -> None:
        super().__init__(body)
        self.clock = clock
        self.fresh = False
        self.sent = False

    def start_again(self) -> None:
        """Over a new connection."""
        self.seek(0)
        self.fresh = True
        self.sent = False

    def read(self, size: Optional[int] = -1) -> bytes:
        self.clock.check()
        block = super().read(size)
        self.sent = not block  # more was asked for than there is: all was sent
        return block


class _SocketFile(io.RawIOBase):
    """The file of a response's socket: each read of it waits as the clock allows.

    read: a method of the clock.
    at_end: bool, the connection has ended.
    received: int, bytes.
    in_head: bool, the headers have not been read yet.
    """

    def __init__(self, raw: Any, sock: Any, read: Callable[..., int]) -> None:
        self._raw = raw  # socket.SocketIO, which keeps the socket open
        self._sock = sock
        self._read = read
        self.at_end = False
        self.received = 0
        self.in_head = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._read(self._sock, self._sock.recv_into, buffer)
        self.at_end = not count
        self.received += count
        if self.in_head and self.received > _MAX_HEAD:
            raise OSError(f"more than {_MAX_HEAD} bytes of headers")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _DeadConnection(Exception):
    """A kept connection turned out dead before the first byte of the reply."""


#: The clock of the call that connects or waits for a reply in this thread (or greenlet):
#: urllib3 hands nothing of ours to a connection but the request's body.
_clock_of_call: ContextVar[_Clock] = ContextVar("clock_of_call")


class _WatchedConnection(_ConnectionBase):
    """Mixed into a connection class of http.client's or urllib3's: its waits, up to the
    headers of the reply, are those of the call's clock."""

    _file: Optional[_SocketFile] = None
    _was_used = False

    def connect(self) -> None:
        self._was_used = False
        # http.client gives each connection its own, which hides the class's.
        vars(self).pop("_create_connection", None)
        super().connect()

    def _new_conn(self) -> socket.socket:  # which urllib3 calls
        from urllib3.util.connection import allowed_gai_family

        host = getattr(self, "_dns_host", self.host)  # with the dot at its end, if any
        return self._connect(host, self.port, self.timeout, allowed_gai_family())

    def _create_connection(  # which http.client calls
        self, address: tuple[str, int], timeout: Optional[float], _: Any
    ) -> socket.socket:
        return self._connect(*address, timeout, socket.AF_UNSPEC)

    def _connect(
        self, host: str, port: int, timeout: Optional[float], family: int
    ) -> socket.socket:
        """Connect to the first address of the host that answers.

        timeout: seconds for each address, but not more than the clock has left.
        """
        clock = _clock_of_call.get()
        problem = OSError(f"{host} has no address")
        for kind, address in _addresses_of(host, port, family):
            sock = None
            try:
                sock = socket.socket(kind, socket.SOCK_STREAM)
                for option in getattr(self, "socket_options", None) or ():
                    with suppress(OSError):  # not every platform has each
                        sock.setsockopt(*option)
                clock.connect(timeout, sock, address)
                return sock
            except BaseException as error:
                if sock is not None:
                    sock.close()
                if not isinstance(error, OSError):
                    raise
                _pass_on(error)
                problem = error
        raise problem

    def _tunnel(self) -> None:  # which both call to pass a proxy
        clock = _clock_of_call.get()
        read = partial(clock.read_before, clock.moment_after(self.timeout))
        self.response_class: Any = partial(self._make_response, read)
        try:
            super()._tunnel()  # type: ignore[misc]
        finally:
            vars(self).pop("response_class", None)
        self.sock.settimeout(clock.left_of(self.timeout))

    def request(
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Any = None,
        **options: Any,
    ) -> None:
        self._file = None
        if self._was_used and isinstance(body, _Upload) and body.fresh:
            if self.sock is not None:
                self.sock.close()
            self.sock: Any = None  # at which http.client connects anew
        try:
            super().request(method, url, body=body, headers=headers or {}, **options)
        except OSError as error:
            self._raise_if_dead(error)
            raise

    def send(self, data: Any) -> None:
        _clock_of_call.get().watch(getattr(self, "sock", None))
        super().send(data)

    def getresponse(self, *args: Any, **options: Any) -> Any:
        clock = _clock_of_call.get()
        clock.watch(getattr(self, "sock", None))
        self.response_class = partial(self._make_response, clock.read)
        try:
            response = super().getresponse(*args, **options)
        except OSError as error:
            self._raise_if_dead(error)
            raise
        finally:
            vars(self).pop("response_class", None)
        self._was_used = True
        return response

    def _make_response(
        self, read: Callable[..., int], sock: Any, *args: Any, **options: Any
    ) -> Any:
        import http.client

        response: Any = http.client.HTTPResponse(sock, *args, **options)
        if isinstance(response.fp, io.BufferedReader):
            self._file = _SocketFile(response.fp.detach(), sock, read)
            response.fp = io.BufferedReader(self._file)
        return response

    def _raise_if_dead(self, error: OSError) -> None:
        """Raise _DeadConnection if a kept connection broke before any byte of the reply.

        uvicorn closes after a 500 without saying so; any server does after a while.
        """
        untouched = self._file is None or not self._file.received
        _pass_on(error)
        timeout = isinstance(error, socket.timeout)
        if self._was_used and untouched and not timeout:
            raise _DeadConnection from error


def _addresses_of(host: str, port: int, family: int) -> list[tuple[int, Any]]:
    """-> the addresses of a host, each with its own family."""
    for kind in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            socket.inet_pton(kind, host)
            # For what is an address already, getaddrinfo() would import the codec of
            # international names: a hundredth of what the start of a script costs.
            return [(kind, (host, port))]
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    return [(kind, address) for kind, _, _, _, address in found]


def _watched(connection: Any) -> Any:
    return type("Connection", (_WatchedConnection, connection), {})


def _find_urllib3() -> Any:
    """The module; None where it is not there, or something else has its name."""
    try:
        import urllib3
    except ImportError:
        return None
    connection = getattr(getattr(urllib3, "connection", None), "HTTPConnection", None)
    return urllib3 if _is_http_client(connection) else None


def _open(request: _Request, clock: _Clock) -> _Reply:
    """Connect, send, and wait for the headers."""
    import http.client

    urllib3 = _find_urllib3()
    errors: tuple[type[Exception], ...]
    errors = (OSError, http.client.HTTPException, ValueError)
    if urllib3:
        errors += (urllib3.exceptions.HTTPError,)
    proxy = _find_proxy(request.url) if request.pool is None else None
    via = _describe_proxy(proxy or getattr(request.pool, "proxy", None))
    if proxy is not None:
        request.secrets.add(*proxy.secrets)
    tls = _tls_settings(request.url, proxy)
    upload = _Upload(request.body, clock)
    token = _clock_of_call.set(clock)
    try:
        if urllib3:
            response, release = _open_pooled(urllib3, request, upload, proxy, tls)
        else:
            response, release = _open_plain(request, upload, proxy, tls)
    except errors as error:
        cause = _root_cause(error)
    else:
        return _Reply(response, clock, release, errors=errors, via=via)
    finally:
        _clock_of_call.reset(token)  # to the call that a signal handler interrupted
    _pass_on(cause)
    clock.check()
    if isinstance(cause, socket.timeout) and upload.sent:
        raise clock.silence_error() from cause
    problem, again = _describe_failure(cause, upload, request.secrets.hide)
    error_text = f"{request.url.shown}{via}: {problem}"
    raise _Failed(TransportError(error_text), again=again) from cause


def _root_cause(error: BaseException) -> BaseException:
    """The error of the socket inside those that urllib3 puts around it."""
    import http.client

    while not isinstance(error, (OSError, http.client.HTTPException)):
        is_wrapper = type(error).__module__.startswith("urllib3")
        if not is_wrapper and _is_from_handler(error):
            break  # what it was raised from is the caller's, too
        inner = [item for item in error.args if isinstance(item, Exception)]
        context = None if error.__suppress_context__ else error.__context__
        found = (*inner, error.__cause__, context)
        deeper = next((item for item in found if item is not None), None)
        if deeper is None:
            break
        error = deeper
    return error


def _describe_failure(
    cause: BaseException, upload: _Upload, hide: Callable[[str], str] = str
) -> tuple[str, bool]:
    """-> what went wrong before the headers were there, and whether that may heal."""
    import http.client

    text = str(cause) or type(cause).__name__
    reason = getattr(cause, "reason", None) or ""  # of an ssl.SSLError
    if isinstance(cause, socket.timeout) and upload.tell():
        return f"{text} while sending the request", False
    # By name: urllib3 1.26 has a CertificateError of its own.
    if type(cause).__name__ in ("SSLCertVerificationError", "CertificateError"):
        hint = "SSL_CERT_FILE=ca.pem makes a private certificate authority trusted"
        return f"{text}; {hint}", False
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return f"{text}; the server does not speak TLS here: is it http://?", False
    if isinstance(reason, str) and "ALERT" in reason:
        return text, False
    if re.search("Tunnel connection failed: 4[0-9][0-9]", text):
        return text, False
    if isinstance(cause, (FileNotFoundError, PermissionError, UnicodeError)):
        return text, False
    if type(cause) is http.client.BadStatusLine:
        hint = "; does it speak TLS: is it https://?" if text[0] == "\x15" else ""
        shown = _one_line(hide(text).encode("unicode_escape").decode(), _MAX_QUOTE)
        return f"expected a reply in HTTP/1.1, got '{shown}'{hint}", True
    if isinstance(cause, http.client.UnknownProtocol):
        return f"expected a reply in HTTP/1.1, got one in {str(cause)!r}", True
    return text, True


if TYPE_CHECKING:
    #: A response, and what to call with whether its connection can be used again.
    _Opened = tuple[Any, Callable[[bool], None]]


def _open_pooled(
    urllib3: Any,
    request: _Request,
    upload: _Upload,
    proxy: Optional[_Proxy],
    tls: Optional[_TLS],
) -> _Opened:
    """On urllib3: over a connection of a pool, which a dead one costs nothing."""
    pool, url = request.pool, request.url.origin + request.url.target
    if pool is None:
        # vcrpy, where it is at work, has set connection classes of its own.
        kinds = (
            urllib3.HTTPConnectionPool.ConnectionCls,
            urllib3.HTTPSConnectionPool.ConnectionCls,
        )
        route = (proxy.url, proxy.headers) if proxy else None
        pool = _shared_pool(urllib3, request.url.origin, route, tls, kinds)
        if proxy is None or request.url.scheme == "https":
            url = request.url.target
    try:
        return _send_pooled(urllib3, pool, url, request, upload)
    except _DeadConnection:
        upload.start_again()
        return _send_pooled(urllib3, pool, url, request, upload)


def _send_pooled(
    urllib3: Any, pool: Any, url: str, request: _Request, upload: _Upload
) -> _Opened:
    """Raises _DeadConnection where a kept connection has ended unseen."""
    origin = request.url.origin
    clock = upload.clock
    opened = _count_connections(request.pool, origin)
    try:
        wrapper = pool.urlopen(
            "POST",
            url,
            body=upload,
            headers=_merge_headers(
                pool.headers,
                request.headers,
                {"Content-Length": str(len(request.body))},
            ),
            timeout=urllib3.Timeout(
                connect=clock.left_of(request.connect_timeout),
                read=clock.left_of(clock.idle_timeout),
            ),
            retries=False,
            redirect=False,
            assert_same_host=False,  # else it parses the URL once more
            preload_content=False,
            decode_content=False,
        )
    except urllib3.exceptions.HTTPError as error:
        # Of a pool of the caller's we see only whether it has opened a connection.
        kept = opened is not None and opened == _count_connections(pool, origin)
        broken = isinstance(_root_cause(error), ConnectionError) and upload.sent
        if kept and broken and not upload.fresh:
            raise _DeadConnection from error
        raise

    def release(reusable: bool) -> None:
        if not reusable:
            wrapper.close()
        wrapper.release_conn()

    # Its own read1() costs three times as much (and 1.26 has none).
    response = getattr(wrapper, "_original_response", None) or wrapper
    try:
        _read_head(response)
    except BaseException:
        release(False)
        raise
    return response, release


def _count_connections(pool: Any, origin: str) -> Optional[int]:
    if pool is None:
        return None
    return getattr(pool.connection_from_url(origin), "num_connections", None)


@lru_cache(maxsize=32)
def _shared_pool(
    urllib3: Any,
    origin: str,
    route: Optional[tuple[str, tuple[tuple[str, str], ...]]],
    tls: Optional[_TLS],
    kinds: tuple[Any, Any],
) -> Any:
    """One pool for all calls to a server with the same proxy, certificates and kinds of
    connections, which are here only to tell pools apart. A PoolManager would look for the
    pool anew in each call.

    route: the URL of the proxy, and the headers for it; None goes straight there.
    """
    options: dict[str, Any] = {
        "maxsize": 1,
        "socket_options": [
            *urllib3.connection.HTTPConnection.default_socket_options,
            *_keepalive_options(),
        ],
    }
    if tls is not None:
        context, ca_file = _tls_context(tls)
        if not urllib3.__version__.startswith("1."):
            options["ssl_context"] = context
            if route is not None and route[0].startswith("https:"):
                options["proxy_ssl_context"] = context
        elif ca_file:
            # 1.26 gives a context no host name to check where that is an IP address.
            # Left without one, it makes the same checks itself.
            options["ca_certs"] = ca_file
    if route is None:
        pool = urllib3.connection_from_url(origin, **options)
    else:
        url, headers = route
        manager = urllib3.ProxyManager(url, proxy_headers=dict(headers), **options)
        pool = manager.connection_from_url(origin)
    pool.ConnectionCls = _watched(pool.ConnectionCls)
    pool.pool.maxsize = _POOL_SIZE  # asked for above, as many None would be put in it
    return pool


if hasattr(os, "register_at_fork"):  # a forked child must not write to our connections
    os.register_at_fork(after_in_child=_shared_pool.cache_clear)


def _keepalive_options() -> list[tuple[int, int, int]]:
    """Socket options, as far as the platform has them."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # macOS: the second
        option = getattr(socket, name, None)
        if option is not None:
            options.append((socket.IPPROTO_TCP, option, _KEEPALIVE_SECONDS))
    return options


def _open_plain(
    request: _Request, upload: _Upload, proxy: Optional[_Proxy], tls: Optional[_TLS]
) -> _Opened:
    """On http.client: one connection a call."""
    import http.client

    peer = proxy or request.url
    headers = {**request.headers, "Content-Length": str(len(request.body))}
    target = request.url.target
    tunnel = proxy is not None and request.url.scheme == "https"
    if proxy is not None and not tunnel:
        target = request.url.origin + target  # RFC 9112, 3.2.2: absolute-form
        headers.update(proxy.headers)
    if tunnel and peer.scheme == "https":
        text = "an https:// proxy for an https:// server needs urllib3"
        raise _Failed(TransportError(text), again=False)
    seconds = upload.clock.left_of(request.connect_timeout)
    if tls is None:
        make = _watched(http.client.HTTPConnection)
        connection = make(peer.host, peer.port, timeout=seconds)
    else:
        make = _watched(http.client.HTTPSConnection)
        context, _ = _tls_context(tls)
        connection = make(peer.host, peer.port, timeout=seconds, context=context)
    if tunnel and proxy is not None:
        host, port = request.url.host, request.url.port
        connection.set_tunnel(host, port, dict(proxy.headers))
    response = None
    try:
        connection.socket_options = _keepalive_options()
        connection.connect()
        # A server may refuse a large request before it has all of it.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", target, body=upload, headers=headers)
        response = connection.getresponse()
        _read_head(response)
    except BaseException:
        if response is not None:
            response.close()
        connection.close()
        raise
    return response, lambda reusable: connection.close()


# --------------------------------------------------------------------------------------
# Proxies and certificates
# --------------------------------------------------------------------------------------


class _Proxy:
    """A proxy from the environment.

    headers: tuple of pairs, for the proxy alone; secrets: tuple of str, to be hidden.
    """

    def __init__(
        self,
        scheme: str,
        host: str,
        port: int,
        headers: tuple[tuple[str, str], ...],
        secrets: tuple[str, ...],
    ) -> None:
        self.scheme = scheme
        self.host = host
        self.port = port
        self.headers = headers
        self.secrets = secrets

    @property
    def url(self) -> str:
        return _origin(self.scheme, self.host, self.port)


def _describe_proxy(proxy: Any) -> str:
    """For messages: without its credentials. Also of a urllib3 ProxyManager's URL."""
    if proxy is None:
        return ""
    port = f":{proxy.port}" if proxy.port else ""
    return f" (through the proxy {proxy.scheme}://{proxy.host}{port})"


def _find_proxy(url: _URL) -> Optional[_Proxy]:
    """HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, as urllib.request reads them."""
    names = (f"{url.scheme}_proxy", "all_proxy")
    if not any(os.environ.get(n) or os.environ.get(n.upper()) for n in names):
        return None  # spares the import
    if _is_loopback(url.host):
        return None
    import urllib.request
    from base64 import b64encode
    from urllib.parse import unquote, urlsplit

    settings = urllib.request.getproxies_environment()
    value = (settings.get(url.scheme) or settings.get("all") or "").strip()
    if not value or _goes_direct(url.host, url.port, settings.get("no", "")):
        return None
    try:
        parts = urlsplit(value if "://" in value else "http://" + value)
        host, port = parts.hostname, parts.port
    except ValueError:  # raising here would chain it: it may quote the password
        parts, host, port = urlsplit("http:"), None, None
    if not host or "@" in parts.path + parts.query + parts.fragment:  # of a password
        text = f"the URL in {url.scheme.upper()}_PROXY or ALL_PROXY is not valid"
        raise _Failed(TransportError(text), again=False)
    if parts.scheme not in _DEFAULT_PORTS:
        text = (
            f"the environment asks for a {parts.scheme}:// proxy; http:// and "
            "https:// are supported (for SOCKS pass "
            "pool=urllib3.contrib.socks.SOCKSProxyManager(...))"
        )
        raise _Failed(TransportError(text), again=False)
    headers: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
        pair = f"{user}:{password}".encode("utf-8", "surrogateescape")
        token = b64encode(pair).decode()
        headers = (("Proxy-Authorization", f"Basic {token}"),)
        secrets = (token, password)
    port = port or _DEFAULT_PORTS[parts.scheme]
    return _Proxy(parts.scheme, host, port, headers, secrets)


def _is_loopback(host: str) -> bool:
    """A proxy would connect to its own loopback."""
    if host.rstrip(".").lower() == "localhost":
        return True
    address = _parse_address(host)
    return address is not None and bool(address.is_loopback)


def _parse_address(host: str) -> Any:
    """-> ipaddress's address; None for a name."""
    if not host[-1:].isdigit() and ":" not in host:
        return None  # spares the import
    import ipaddress

    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _goes_direct(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names it: *, a name or the end of one, an address, a network."""
    name, address = host.rstrip(".").lower(), _parse_address(host)
    for entry in re.split(r"[,\s]+", no_proxy.lower()):
        wanted = entry.lstrip("*").lstrip(".").rstrip(".")
        if entry == "*":
            return True
        if not wanted:
            continue
        if wanted in (f"{name}:{port}", f"[{name}]:{port}", name, f"[{name}]"):
            return True
        if address is None and f".{name}".endswith(f".{wanted}"):
            return True
        if address is None and f".{name}:{port}".endswith(f".{wanted}"):
            return True
        if address is not None and _is_in_network(address, wanted):
            return True
    return False


def _is_in_network(address: Any, network: str) -> bool:
    import ipaddress

    try:
        return address in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


#: What the certificates depend on: SSL_CERT_FILE and SSL_CERT_DIR.
_TLS = tuple[str, str]


def _tls_settings(url: _URL, proxy: Optional[_Proxy]) -> Optional[_TLS]:
    """None where there is no TLS."""
    if url.scheme != "https" and (proxy is None or proxy.scheme != "https"):
        return None
    try:
        import ssl  # noqa: F401
    except ImportError:
        text = f"{url.shown}: this Python has no ssl module, which https:// needs"
        raise _Failed(TransportError(text), again=False) from None
    return os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", "")


@lru_cache(maxsize=16)
def _tls_context(settings: _TLS) -> tuple[Any, str]:
    """-> an ssl.SSLContext, the same for both transports, and the file of authorities
    that it needs beside the interpreter's own; "" for none."""
    import ssl

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    ca_file, _ = settings
    if not ca_file and not _has_authorities(context):
        try:
            import certifi  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            text = (
                "this Python has no certificates of authorities, so that it can trust "
                "no https:// server: install certifi beside it, or set SSL_CERT_FILE"
            )
            raise _Failed(TransportError(text), again=False) from None
        ca_file = certifi.where()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            text = f"SSL_CERT_FILE={ca_file} cannot be read: {error}"
            raise _Failed(TransportError(text), again=False) from error
    return context, ca_file


def _has_authorities(context: Any) -> bool:
    """Whether it can trust anybody. OpenSSL reads a folder only when it needs it, so that
    the context does not count what is in one."""
    import ssl

    if context.cert_store_stats()["x509_ca"]:
        return True
    folder = ssl.get_default_verify_paths().capath
    return bool(folder and os.listdir(folder))


# --------------------------------------------------------------------------------------
# Replies that are not 2xx
# --------------------------------------------------------------------------------------


def _status_failure(request: _Request, reply: _Reply, clock: _Clock) -> _Failed:
    """-> what a reply that is not 2xx means, with what can be had of its body."""
    import http.client

    status, headers = reply.status, reply.headers
    body = request.secrets.hide_in_start(_read_error_body(reply, clock))
    facts = _ErrorFacts(_parse_error_body(body), request.secrets.hide)
    text = f"HTTP {status} from {request.url.shown}{reply.via}"
    said = facts.message or reply.reason or http.client.responses.get(status, "")
    text += f": {said}" if said else ""
    location = _without_secrets(request.secrets.hide(headers.get("location", "")))
    if 300 <= status < 400 and location:
        text += f" (redirects are not followed; Location: {location})"
    elif status == 401 and not _sends_key(request):
        source = f" or set {request.key_source}" if request.key_source else ""
        text += f" (no key was sent: pass api_key={source})"
    elif status == 404 and request.url.target.startswith("/chat/completions"):
        text += " (the base URL has no path: does it lack /v1?)"
    wait = _retry_after(headers)
    again = status in _PASSING_STATUSES
    asked = headers.get("x-should-retry", "").lower()
    again = {"true": True, "false": False}.get(asked, again)
    again = again and _SPENT not in (facts.code, facts.type)
    error = (RetryLimitError if again else StatusError)(
        text,
        status=status,
        body=body,
        message=facts.message,
        code=facts.code,
        retry_after=wait,
        headers=headers,
    )
    return _Failed(error, again=again, wait=wait)


def _sends_key(request: _Request) -> bool:
    names = " ".join(request.headers).lower()
    return any(word in names for word in _SECRET_NAMES)


def _without_secrets(location: str) -> str:
    """A URL without query, fragment and user:password, however it is written."""
    location = re.split("[?#]", _one_line(location, _MAX_SENTENCE))[0]
    scheme, slashes, rest = location.partition("//")
    return scheme + slashes + rest.rpartition("@")[2]


def _read_error_body(reply: _Reply, clock: _Clock) -> str:
    """What can be had of it in a few seconds. Nothing here may hide the status."""
    pieces: list[bytes] = []
    left = _MAX_ERROR_BODY
    with suppress(StreamError, DeadlineError), clock.phase(_ERROR_BODY_SECONDS):
        for piece in _read_body(reply, clock):
            pieces.append(piece[:left])
            left -= len(pieces[-1])
            if not left:
                break
    return b"".join(pieces).decode("utf-8", "replace")


def _retry_after(headers: Mapping[str, str]) -> Optional[float]:
    """Seconds; None if the server does not say, or says what is no time to wait."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        first = value.partition(",")[0].strip()  # it may stand on two lines
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", first):
            seconds = float(first) * unit
        else:
            seconds = _seconds_until(value) if name == "retry-after" else -1.0
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return None


def _seconds_until(date: str) -> float:
    """An HTTP-date (RFC 9110, 5.6.7), which is always in GMT; -1.0 if it is none."""
    import calendar
    from email.utils import parsedate

    try:
        return calendar.timegm(parsedate(date) or ()) - time.time()
    except (TypeError, ValueError, OverflowError, IndexError):  # the last one on 3.9
        return -1.0


# --------------------------------------------------------------------------------------
# What an error says
# --------------------------------------------------------------------------------------


#: Where servers put the sentence, in the order in which they are believed. In lower case
#: and without _, since some write errorMessage or Message.
_SENTENCE_MEMBERS = (
    *("errordescription", "error", "message", "detail", "details", "msg", "text"),
    *("errormsg", "errormessage", "baseresp", "statusmsg", "errors"),
    *("title", "description", "reason", "fault", "faultstring", "header"),
)

#: Of a flat error: members with its sentence, and with its code.
_FLAT_SENTENCES = (
    *("message", "msg", "text"),
    *("error_msg", "error_message", "errorMessage"),
)
_CODES = ("code", "error_code", "status_code")

#: Codes, in lower case, that are none: iFlytek and others put them into every chunk.
_GOOD_CODES = ("", "0", "200", "ok", "success", "none", "false", "true")


def _find_error(chunk: dict[str, Any], *, is_named: bool) -> Optional[dict[str, Any]]:
    """-> the object in a chunk that reports an error; None if none does.

    is_named: its event has a name of its own, and may tell of anything (progress).
    """
    choices = _choices_in(chunk)
    for part in (chunk, *choices, chunk.get("x_groq")):
        if isinstance(part, dict) and _says_something(part.get("error")):
            return part
    if choices:
        return None
    is_error = "error" in (chunk.get("object"), chunk.get("type"))  # vLLM, Mistral
    if is_error or (not is_named and _is_flat_error(chunk)):
        return chunk
    return None


def _says_something(error: Any) -> bool:
    """null, {}, "" and [] are no errors, nor is an object of these (one-api, in Go)."""
    return any(error.values()) if isinstance(error, dict) else bool(error)


def _is_flat_error(chunk: dict[str, Any]) -> bool:
    """FastAPI; Cloudflare; MiniMax; DashScope, Cerebras and Baidu; iFlow."""
    errors = chunk.get("errors")
    if chunk.get("detail") or (errors and isinstance(errors, list)):
        return True
    if _is_bad_code(_first_dict(chunk.get("base_resp")).get("status_code")):
        return True
    if not any(isinstance(chunk.get(name), str) for name in _FLAT_SENTENCES):
        return False
    is_bad = any(_is_bad_code(chunk.get(name)) for name in _CODES)
    return is_bad or _is_bad_status(chunk.get("status"))


def _is_bad_code(code: Any) -> bool:
    if not isinstance(code, (str, int, float)):
        return False
    return str(code).lower().removesuffix(".0") not in _GOOD_CODES


def _is_bad_status(status: Any) -> bool:
    """As in HTTP. Words tell of progress, too."""
    if not isinstance(status, (str, int)):
        return False
    return re.fullmatch("[4-9][0-9][0-9]", str(status)) is not None


def _server_error(
    text: str, hide: Callable[[str], str], raw: Any = None, part: Any = None
) -> ServerError:
    """raw: the parsed JSON, if it is JSON; part: the object in it that is the error."""
    text = hide(text)
    if raw is None:
        raw = _parse_json(text)
    if raw is None:
        raw = text
    facts = _ErrorFacts(raw if part is None else part, hide)
    message = facts.message or _one_line(_without_page(text), _MAX_SENTENCE)
    code = _one_line(hide(str(facts.code)), 40)
    shown = f" (code {code})" if facts.code is not None else ""
    return ServerError(
        f"the server reported an error inside its answer: {message}{shown}",
        message=message,
        code=facts.code,
        type=facts.type,
        raw=raw,
    )


class _ErrorFacts:
    """What an error's parsed JSON says, of whatever shape."""

    def __init__(self, value: Any, hide: Callable[[str], str]) -> None:
        body = _first_dict(value)
        error = _first_dict(body.get("error")) or body
        parts = list(_error_parts(value))
        dicts = [error, body, *(part for part in parts if isinstance(part, dict))]
        codes = [item.get(name) for item in dicts for name in _CODES]
        codes += filter(_is_bad_status, (item.get("status") for item in dicts))
        types = [item.get(name) for item in dicts for name in ("type", "error_type")]
        self.code = next((code for code in codes if code is not None), None)
        self.type = next((kind for kind in types if kind is not None), None)
        if _SPENT in codes + types:  # also deep inside what a gateway put around it
            self.code = _SPENT
        self.message = _one_line(hide(_find_sentence(parts)), _MAX_SENTENCE)
        # OpenRouter's own sentence says only that the provider has sent an error.
        raw = _first_dict(error.get("metadata")).get("raw")
        reason = _one_line(hide(_find_sentence(_error_parts(raw))), _MAX_SENTENCE)
        if reason[:1] not in ("", "{", "[") and reason not in self.message:
            both = f"{self.message}: {reason}" if self.message else reason
            self.message = _one_line(both, _MAX_SENTENCE)


def _first_dict(value: Any) -> dict[str, Any]:
    """`value` if it is a dict; of a list (Gemini's errors) the first dict in it; else {}."""
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, dict)), None)
    return value if isinstance(value, dict) else {}


class _Label(str):
    """A word like rate_limit or a status in words, in the place of a sentence."""


def _find_sentence(parts: Iterable[Any]) -> str:
    """The first sentence of _error_parts(); "" if there is none. Beside a label, in which
    Spring and NestJS say nothing new, also the one that follows."""
    sentences = (part for part in parts if isinstance(part, str) and part.strip())
    sentence = next(sentences, "")
    if isinstance(sentence, _Label):
        more = next((text for text in sentences if text != sentence), "")
        return f"{sentence}: {more}" if more else str(sentence)
    return sentence


def _error_parts(value: Any, depth: int = 0) -> Iterator[Any]:
    """The dicts and the sentences in an error's JSON, also in JSON inside a string: each
    dict before what is in it, and what says most before the rest."""
    if isinstance(value, str):
        inner = _parse_json(value) if value.lstrip()[:1] in ("{", "[") else None
        if inner and depth <= 8:
            yield from _error_parts(inner, depth + 1)
        yield value if isinstance(value, _Label) else _without_page(value)
        return
    found: Iterable[Any] = ()
    if isinstance(value, list):
        found = value
    elif isinstance(value, dict):
        yield value
        found = _sentences_in(value)
    if depth <= 8:
        for item in found:
            yield from _error_parts(item, depth + 1)


def _sentences_in(error: dict[str, Any]) -> list[Any]:
    """The members of a dict that may hold the sentence, the most believed first."""
    members: dict[str, Any] = {}
    for name, value in error.items():
        name = name.lower().replace("_", "")
        members[name] = members.get(name) or value
    label = members.get("error")
    if isinstance(label, str) and _is_label(label):
        members["error"] = _Label(label)
    by_field = members.get("errors")  # ASP.NET's, the first to be believed
    fields = list(by_field.values()) if isinstance(by_field, dict) else []
    if fields:
        del members["errors"]
    return fields + [members[name] for name in _SENTENCE_MEMBERS if name in members]


def _is_label(text: str) -> bool:
    import http.client

    if text in http.client.responses.values():
        return True
    return re.fullmatch(r"\w+", text) is not None


def _parse_error_body(body: str) -> Any:
    """-> the JSON in it, also behind `data:` (DashScope); the sentence in JSON that is not
    whole (FastAPI sends a large request back); else its text."""
    text = body.lstrip("\ufeff")
    behind = re.findall(r"^data:(.*)", text, re.MULTILINE)
    for part in (text, *behind):
        values = _parse_values(part)
        if values:
            return values if len(values) > 1 else values[0]
    if text.lstrip()[:1] in ("{", "["):
        literal = r'"(?:message|msg|detail)"\s*:\s*("(?:[^"\\]|\\.)*")'
        sentences = (_parse_json(found[1]) for found in re.finditer(literal, text))
        return next((s for s in sentences if s and s.strip()), text)
    return _title(text) if text.lstrip()[:1] == "<" else text


#: Where a page of HTML begins in a text. An <html> in a sentence is none.
_PAGE = r"<!doctype\s+html|<html[^<>]*>\s*<|\A\s*<(?:html|head|body|\?xml)\b"


def _without_page(text: str) -> str:
    """Of a page of HTML in a text only the title."""
    page = re.search(_PAGE, text, re.IGNORECASE)
    return text[: page.start()] + _title(text[page.start() :]) if page else text


def _title(page: str) -> str:
    """Of HTML, or the sentence of XML: the body of an error page may hold the caller's
    address (Cloudflare)."""
    import html

    title = re.search(r"<(?:title|message)[^>]{0,200}>([^<]*)", page, re.IGNORECASE)
    return html.unescape(title[1]) if title else ""


# --------------------------------------------------------------------------------------
# The answer: bytes -> lines -> SSE events
# --------------------------------------------------------------------------------------


class _Lines:
    """Splits at LF, CRLF and CR (WHATWG SSE, 9.2.5), and at nothing else.

    A line is searched for its end only where it is new, and joined once: a large event in
    small reads stays linear.
    """

    def __init__(self) -> None:
        self._start: Optional[bytes] = b""  # until a BOM is told from other bytes
        self._after_cr = False
        self._unfinished: list[bytes] = []  # pieces of the last line
        self._size = 0  # of them together

    def feed(self, block: bytes) -> list[bytes]:
        """-> the lines that have ended in a block, without their ends."""
        if self._start is not None:
            block = self._start + block
            if len(block) < len(_BOM) and _BOM.startswith(block):
                self._start = block
                return []
            self._start = None
            block = block.removeprefix(_BOM)
        if self._after_cr or b"\r" in block:
            if self._after_cr and block.startswith(b"\n"):
                block = block[1:]
            self._after_cr = block.endswith(b"\r")
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = block.split(b"\n")
        last = lines.pop()
        if lines and self._unfinished:
            lines[0] = b"".join([*self._unfinished, lines[0]])
            self._unfinished = []
            self._size = 0
        if last:
            self._size += len(last)
            _check_size(self._size)
            self._unfinished.append(last)
        return lines

    def end(self) -> list[bytes]:
        """-> the last line, if it has no end."""
        last = self._start or b"".join(self._unfinished)
        return [last] if last else []


def _check_size(size: int) -> None:
    if size > _MAX_EVENT:
        raise StreamError(
            f"expected events of at most {_MAX_EVENT} bytes, got a larger one"
        )


#: What _SSE finds: the text behind `data:`; the same in an event with a name of its own;
#: text of an error; JSON without `data:`; a line that is neither; [DONE].
_DATA, _NAMED, _ERROR = "data", "named", "error"
_BARE, _ASIDE, _DONE = "bare", "aside", "done"

#: What the last event holds: as OpenAI writes it; java-genai and codex's stubs; encoded.
_DONE_TEXTS = (b"[DONE]", b"DONE", b'"[DONE]"')


class _SSE:
    """Events (WHATWG SSE, 9.2.6) and what servers write in their place -> (kind, text).

    Unlike a browser it also gives an event that the end of the body cuts short of its
    blank line (llama.cpp, xAI, Groq), and does not wait for the blank line of [DONE].
    """

    def __init__(self) -> None:
        self._kind = _DATA  # of the event that is being read
        self._data: list[bytes] = []  # its lines, without `data:`
        self._bare: list[bytes] = []  # lines of JSON that stands there without `data:`
        self._brackets = _Brackets()  # of the JSON in either
        self._looked = 0  # so many lines of data are counted in them
        self._size = 0  # of the lines in either
        self._is_dense = False  # events come without blank lines between them

    @property
    def is_idle(self) -> bool:
        """Whether the next line may begin an event, and nothing else."""
        return not self._data and not self._bare and self._kind is _DATA

    def feed(self, lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
        for line in lines:
            if not line:
                yield from self.flush()
                self._kind = _DATA
                self._is_dense = False
            elif line.startswith(b"data:"):
                yield from self._read_data(line)
            else:
                yield from self._read_other(line)

    def flush(self) -> Iterator[tuple[str, bytes]]:
        """The event, or the bare JSON, as far as it has been read."""
        if self._data:
            text = b"\n".join(self._data)
            self._data.clear()
            if self._looked:
                self._brackets, self._looked = _Brackets(), 0
            yield self._kind, text
        if self._bare:
            text = b"\n".join(self._bare)
            self._bare.clear()
            self._brackets = _Brackets()
            yield _ERROR if self._kind is _ERROR else _BARE, text

    def _add(self, lines: list[bytes], line: bytes) -> None:
        self._size = self._size + len(line) + 1 if lines else len(line)
        _check_size(self._size)
        lines.append(line)

    def _read_data(self, line: bytes) -> Iterator[tuple[str, bytes]]:
        start = 0
        while line.startswith(b"data:", start):  # frameworks add a prefix of their own
            start += 5
            if line.startswith(b" ", start):
                start += 1
        value = line[start:]
        is_done = value.strip() in _DONE_TEXTS
        is_next = self._begins_next(value)
        was_dense, self._is_dense = self._is_dense, self._is_dense or is_next
        if self._bare or is_done or is_next:
            yield from self.flush()
        if is_done:
            yield _DONE, b""
            return
        self._add(self._data, value)
        if self._is_dense and not self._is_open() and self._brackets.opened:
            yield from self.flush()
            self._kind = _DATA if was_dense else self._kind

    def _begins_next(self, value: bytes) -> bool:
        """Whether a line of data begins another event, though no blank line came.

        GLM, Kimi and AgentRouter leave those out, and all they send would be one event
        that ends with the answer. Joined or not, such lines say the same.
        """
        if not self._data or self._kind is _ERROR:
            return False
        if value.lstrip()[:1] not in (b"{", b"["):
            return False
        if self._is_open():  # unless what is open was cut, and never goes on
            return self._is_dense and value.startswith(b"{") and b'"choices"' in value
        return True

    def _is_open(self) -> bool:
        """Whether JSON that began in the lines of data is to go on."""
        for line in self._data[self._looked :]:
            self._brackets.feed(line.decode("latin-1"))
        self._looked = len(self._data)
        return self._brackets.opened > 0 and not self._brackets.are_closed

    def _read_other(self, line: bytes) -> Iterator[tuple[str, bytes]]:
        """A line that is not `data:`."""
        name, _, value = line.partition(b":")
        if not name:
            return  # a comment
        if name in (b"event", b"id", b"retry", b"data"):
            if self._bare:
                yield from self.flush()
            if name == b"event":
                self._kind = _kind_of(value.strip())
            elif name == b"data":  # without a colon: empty (WHATWG SSE, 9.2.6)
                self._add(self._data, b"")
        elif name.lower() == b"error":  # a field of llama.cpp's and gpustack's
            yield from self.flush()
            if value.strip() not in (b"", b"null", b'""', b"{}", b"[]"):
                yield _ERROR, value
        elif self._bare or line.lstrip()[:1] in (b"{", b"["):
            yield from self._read_bare(line)
        else:
            yield _ASIDE, line

    def _read_bare(self, line: bytes) -> Iterator[tuple[str, bytes]]:
        is_done = line.strip() in _DONE_TEXTS
        if self._data or is_done:
            yield from self.flush()
        if is_done:
            yield _DONE, b""
            return
        self._add(self._bare, line)
        self._brackets.feed(line.decode("latin-1"))
        if self._brackets.are_closed:
            yield from self.flush()


def _kind_of(name: bytes) -> str:
    """What an event is that has this name."""
    if name.lower() == b"error":
        return _ERROR
    return _DATA if name in (b"", b"message") else _NAMED


class _Brackets:
    """Whether JSON that comes in pieces is whole so far, by its brackets.

    Each character is looked at once, where a parser would have to begin anew.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = 0
        self._cut = ""  # a backslash whose character is still to come
        self.opened = 0  # so many, all in all

    def feed(self, text: str) -> None:
        text = re.sub(r"\\.", "", self._cut + text, flags=re.DOTALL)
        self._cut = "\\" if text.endswith("\\") else ""
        parts = text.split('"')
        outside = "".join(parts[self._in_string :: 2])
        self._in_string ^= (len(parts) - 1) & 1
        opened = outside.count("{") + outside.count("[")
        self._depth += opened - outside.count("}") - outside.count("]")
        self.opened += opened

    @property
    def are_closed(self) -> bool:
        return self.opened > 0 and self._depth <= 0 and not self._in_string


# --------------------------------------------------------------------------------------
# The answer: texts -> chunks -> our events
# --------------------------------------------------------------------------------------


#: Not strict: control characters may stand in a string as they are (GenieX, pi).
_parse_json_at = json.JSONDecoder(strict=False).raw_decode

#: -> a match of the blanks that JSON may have between two values.
_match_blanks: Any = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]


def _parse_values(text: str) -> Optional[list[Any]]:
    """-> the JSON values in a text, one behind the other; None if it is anything else."""
    if len(text) > _MAX_OBJECTS:
        brackets = _Brackets()
        brackets.feed(text)
        if brackets.opened > _MAX_OBJECTS:
            raise StreamError(f"expected events of at most {_MAX_OBJECTS} JSON objects")
    values: list[Any] = []
    place = _match_blanks(text, 0).end()
    try:
        while place < len(text):
            value, place = _parse_json_at(text, place)
            values.append(value)
            place = _match_blanks(text, place).end()
    except (ValueError, RecursionError) as error:
        _pass_on(error)
        return None
    return values


def _split_glued(line: str) -> list[str]:
    """The parts of a line in which the next events stand without a line end before them,
    often behind one that was cut (GLM). One part if the line is JSON as it is, or if no
    part of it is a chunk."""
    first, *others = re.split(r"data:(?=\s*[{\[])", line)
    is_sentence = first.lstrip()[:6].lower() == "error:"
    if not others or is_sentence or len(others) > _MAX_OBJECTS:
        return [line]
    ends = others[-1].strip().encode() in _DONE_TEXTS
    texts = others[:-1] if ends else others
    has_chunk = any(
        isinstance(value, dict) and value.keys() & {"choices", "usage", "error"}
        for text in texts or [first]
        for value in _parse_values(text) or ()
    )
    return [first, *others] if has_chunk and _parse_values(line) is None else [line]


def _parse_json(text: str) -> Any:
    """-> the JSON value; None if the text is not JSON (or is null)."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        _pass_on(error)
        return None


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "..."


def _word(value: Any) -> str:
    """A str; "" for all else, and for the words that say as much (KoboldCpp, LiteLLM)."""
    if not isinstance(value, str) or value in ("null", "None"):
        return ""
    return _replace_surrogates(value)


class _Answer:
    """All that is known of one answer: feed() it bytes, then end() it.

    done: bool, [DONE] has come, and nothing after it counts.
    started: bool, it has given an event.
    said: int, a number that grows with chunks that have a choice or usage in them.
    """

    def __init__(
        self,
        *,
        strict: bool,
        raw: bool,
        one_choice: bool,
        content_type: str = "",
        request_id: str = "",
        headers: Optional[dict[str, str]] = None,
        hide: Callable[[str], str] = str,
    ) -> None:
        self.done = False
        self.started = False
        self.said = 0
        self._strict = strict
        self._raw = raw
        self._one_choice = one_choice
        self._content_type = content_type
        self._request_id = request_id
        self._headers = headers or {}
        self._hide = hide  # for what is quoted

        self._lines = _Lines()
        self._sse = _SSE()
        self._shortcut = _Shortcut()
        self._response_id = ""
        self._model = ""
        self._usage: Optional[Usage] = None
        self._choices: dict[int, _Choice] = {}
        self._has_chunks = False
        self._is_bare = False  # its chunks came without `data:`
        self._skipped = 0
        self._skipped_text = ""  # the first one
        self._other_text = ""  # the first that is neither chunk nor padding
        self._other_size = 0

    # Bytes

    def feed(self, block: bytes) -> Iterator[Event]:
        """The events in the next bytes. Raises StreamError, after those before it."""
        lines = self._lines.feed(block)
        start = 0
        if not self._sse.is_idle:
            start = lines.index(b"") + 1 if b"" in lines else len(lines)
            yield from self._feed_lines(lines[:start])
            if self.done:
                return
        # Nearly always it goes on with events of one line each, and blank lines between.
        end = start + (len(lines) - start) // 2 * 2
        if any(lines[start + 1 : end : 2]):
            end = start
        match, hits = self._shortcut.match, 0
        for line in lines[start:end:2]:
            event = match(line)
            if event is not None:
                hits += 1
                yield event
                continue
            self._count_hits(hits)
            yield from self._feed_lines([line, b""])
            if self.done:
                return
            match, hits = self._shortcut.match, 0
        self._count_hits(hits)
        if end < len(lines):
            yield from self._feed_lines(lines[end:])

    def _feed_lines(self, lines: list[bytes]) -> Iterator[Event]:
        for kind, data in self._sse.feed(lines):
            yield from self._read(kind, data)
            if self.done:
                return

    def _count_hits(self, hits: int) -> None:
        """The shortcut has given so many events."""
        if hits:
            self.said += hits
            self._shortcut.keep_on()

    def end(self, cut: Union[StreamError, DeadlineError, None]) -> Iterator[Event]:
        """The events still held back, and Completed; or raise how it went wrong.

        cut: why no more bytes come; None: the body ended properly, or [DONE] came.
        """
        if not self.done:
            yield from self._feed_lines(self._lines.end())
        if not self.done:
            for kind, data in self._sse.flush():
                yield from self._read(kind, data, is_cut=cut is not None)
        yield from self._give(self._take_halves())
        if self._skipped:
            _log.warning(
                "skipped data that is no JSON object, %d time(s), first: %r",
                self._skipped,
                self._skipped_text,
            )
        self._check_end(cut)
        choices = self._choices.values()
        reasons = {c.index: c.finish_reason for c in choices if c.finish_reason}
        yield Completed(
            response_id=self._response_id,
            model=self._model,
            finish_reason=reasons.get(0),
            finish_reasons=reasons,
            usage=self._usage,
            skipped=self._skipped,
            request_id=self._request_id,
            headers=dict(self._headers),
        )

    def _check_end(self, cut: Union[StreamError, DeadlineError, None]) -> None:
        """Raise or log what is wrong with the way the answer ended, if anything is."""
        choices = self._choices.values()
        if cut is None and not self._has_chunks and self._other_text:
            shown = self._content_type or "no content type"
            raise StreamError(
                "the answer is no chat completion: expected chunks with choices, got "
                f"{self._other_text!r} ({shown})"
            )
        finished = bool(choices) and all(c.is_finished(self.done) for c in choices)
        if cut is None and finished:
            return
        fault = cut or TruncatedStreamError(
            "the stream ended without a finish_reason: the answer may be cut"
        )
        # Broken off after its finish reason, or ended properly without one: bad if strict.
        if self._strict or (cut is not None and not finished):
            raise fault
        _log.warning("%s", self._hide(str(fault)))

    def _give(self, events: Sequence[Event]) -> Sequence[Event]:
        self.started = self.started or bool(events)
        return events

    # Texts

    def _read(self, kind: str, data: bytes, is_cut: bool = False) -> Iterator[Event]:
        """The events of an SSE event, or of what stands in its place.

        is_cut: it is the last one of a body that was cut.
        """
        if kind is _DONE:
            self.done = True
            return
        text = data.decode("utf-8", "replace")
        if kind is _ASIDE:
            self._note(text)
            return
        values = _parse_values(text)
        self._shortcut.forget()
        if values is not None:
            is_usual = kind is _DATA and len(values) == 1 and not self._raw
            source = b"data: " + data if is_usual else b""
            yield from self._read_values(kind, text, values, is_cut, source)
        else:
            yield from self._read_lines(kind, text, is_cut)
        if kind is _ERROR:
            yield from self._give(self._take_halves())
            last = values[-1] if values else None
            raise _server_error(text.strip(), self._hide, last)

    def _read_lines(self, kind: str, text: str, is_cut: bool) -> Iterator[Event]:
        """Text that is not JSON as a whole: some of its lines may be, or parts of them."""
        lines = text.split("\n")
        if kind not in (_NAMED, _ERROR):
            lines = [part for line in lines for part in _split_glued(line)]
        for position, line in enumerate(lines, 1):
            if line.strip().encode() in _DONE_TEXTS:
                self.done = True
                return
            values = _parse_values(line)
            is_last = is_cut and position == len(lines)
            if values is not None:
                yield from self._read_values(kind, line, values, is_last)
            else:
                yield from self._read_unreadable(kind, line, is_last)

    def _read_values(
        self,
        kind: str,
        text: str,
        values: list[Any],
        is_cut: bool,
        source: bytes = b"",
    ) -> Iterator[Event]:
        """source: the line of a usual event, of which the shortcut may learn."""
        chunks = _objects_in(values)
        # For Chunk a second reading, so that nothing in it is a part of an event.
        twins = _objects_in(_parse_values(text) or []) if self._raw else chunks
        for chunk, twin in zip(chunks, twins):
            if not isinstance(chunk, dict):
                yield from self._read_unreadable(kind, _dump(chunk), is_cut)
                continue
            part = _find_error(chunk, is_named=kind is _NAMED)
            events = self._read_chunk(kind, chunk, part is not None)
            if source:
                self._shortcut.learn(source, chunk, events, self._maker_of)
            if self._raw:
                yield from self._give([Chunk(twin)])
            yield from self._give(events)
            if part is not None:
                yield from self._give(self._take_halves())
                raise _server_error(text, self._hide, chunk, part)

    def _read_unreadable(self, kind: str, text: str, is_cut: bool) -> Iterator[Event]:
        """Text that is not JSON: an error, padding, or skipped and said."""
        text = text.strip()
        if text[:6].lower() == "error:":  # Crane
            yield from self._give(self._take_halves())
            raise _server_error(text[6:].strip(), self._hide)
        if not text or is_cut or kind in (_NAMED, _ERROR) or text[0] == ":":
            return
        self._note(text)
        if kind is _DATA or self._is_bare:
            self._skipped += 1
            self._skipped_text = self._skipped_text or self._quote(text)
            if self._strict:
                shown = f"expected a JSON object after data:, got {self._quote(text)!r}"
                raise MalformedChunkError(shown, data=text)

    def _note(self, text: str) -> None:
        """What may turn out to be the whole answer."""
        if self._has_chunks:
            return
        self._other_size += len(text) + 1
        _check_size(self._other_size)
        if len(self._other_text) < _MAX_QUOTE:
            self._other_text = self._quote(f"{self._other_text} {text}")

    def _quote(self, text: str) -> str:
        return _one_line(self._hide(text), _MAX_QUOTE)

    # Chunks

    def _read_chunk(
        self, kind: str, chunk: dict[str, Any], is_error: bool
    ) -> list[_Delta]:
        """-> its events; the rest of what it says is known from now on."""
        is_chunk = "choices" in chunk or "usage" in chunk
        if "choices" in chunk or is_error:  # Anthropic's streams have usage, too
            self._has_chunks = True
            self._is_bare = kind is _BARE
        elif not self._has_chunks:
            self._note(_dump(chunk))
        if is_chunk or kind is not _NAMED:
            self._response_id = self._response_id or _word(chunk.get("id"))
            self._model = self._model or _word(chunk.get("model"))
        events: list[_Delta] = []
        for position, data in enumerate(_choices_in(chunk)):
            if isinstance(data, dict):
                self.said += 1
                events += self._choice_for(data.get("index"), position).read(data)
                self._read_usage(data.get("usage"))  # Moonshot
        self._read_usage(_first_dict(chunk.get("x_groq")).get("usage"))
        self._read_usage(chunk.get("usage"))
        return events

    def _choice_for(self, index: Any, position: int) -> _Choice:
        if type(index) is not int:  # Cloudflare sends none
            index = position
        if self._one_choice:  # Foundry Local counts tokens in it; Copilot uses two
            index = 0
        choice = self._choices.get(index)
        if choice is None:
            if len(self._choices) >= _MAX_CHOICES:
                raise StreamError(f"expected at most {_MAX_CHOICES} choices, got more")
            choice = self._choices[index] = _Choice(index)
        return choice

    def _read_usage(self, data: Any) -> None:
        """The last that counts anything stands: many send zeros or null before or after."""
        if data and isinstance(data, dict):
            self.said += 1
            usage = _make_usage(data)
            counts = {**vars(usage), "extra": None}
            if self._usage is None or any(counts.values()):
                self._usage = usage

    def _maker_of(self, event: _Delta) -> _Maker:
        return self._choices[event.choice].maker_of(event)

    def _take_halves(self) -> list[_Delta]:
        return [e for choice in self._choices.values() for e in choice.take_halves()]


def _choices_in(chunk: dict[str, Any]) -> list[Any]:
    choices = chunk.get("choices")
    if isinstance(choices, dict):
        return [choices]
    return choices if isinstance(choices, list) else []


def _objects_in(values: list[Any]) -> list[Any]:
    """The objects of a text, also those in a list (Azure, Vertex); null is padding."""
    found = []
    for value in values:
        inside = value if isinstance(value, list) and value else [value]
        found += [item for item in inside if item is not None]
    return found


#: Members of `usage` that Usage has under its own names.
_USAGE_MEMBERS = {
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("input_tokens", "output_tokens"),
    *("prompt_tokens_details", "completion_tokens_details"),
    *("prompt_cache_hit_tokens", "cached_tokens", "reasoning_tokens"),
}


def _make_usage(data: dict[str, Any]) -> Usage:
    details = [data.get(name + "_tokens_details") for name in ("prompt", "input")]
    prompt = _first_dict(details)
    details = [data.get(name + "_tokens_details") for name in ("completion", "output")]
    completion = _first_dict(details)
    return Usage(
        _count(data, "prompt_tokens") or _count(data, "input_tokens"),  # mlx-vlm
        _count(data, "completion_tokens") or _count(data, "output_tokens"),
        _count(data, "total_tokens"),
        _count(prompt, "cached_tokens")
        or _count(data, "prompt_cache_hit_tokens")  # DeepSeek
        or _count(data, "cached_tokens"),  # Moonshot
        _count(completion, "reasoning_tokens") or _count(data, "reasoning_tokens"),
        {
            name: value
            for name, value in data.items()
            if name not in _USAGE_MEMBERS and value is not None
        },
    )


def _count(data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    if isinstance(value, float) and math.isfinite(value):
        return int(value)
    return value if type(value) is int else 0


# --------------------------------------------------------------------------------------
# The answer: choices, their texts, their tool calls
# --------------------------------------------------------------------------------------


class _Text:
    """A text that comes in pieces, as valid Unicode.

    Servers in JavaScript cut between the halves of a surrogate pair, in two escapes. The
    first half waits here for the second; one without the other becomes U+FFFD.
    """

    def __init__(self) -> None:
        self._half = ""

    def join(self, piece: str) -> str:
        if self._half:
            piece, self._half = self._half + piece, ""
        if piece.isascii() or not _has_surrogate(piece):
            return piece
        if "\ud800" <= piece[-1] <= "\udbff":
            self._half, piece = piece[-1], piece[:-1]
        return _replace_surrogates(piece)

    def take_half(self) -> str:
        """-> what stands for a half whose other one never came; "" if there is none."""
        half, self._half = self._half, ""
        return "\ufffd" if half else ""


#: The kinds of things that a message may have, by the member's name.
_CONTENT, _REASONING, _REFUSAL, _CALLS = "content", "reasoning", "refusal", "tool_calls"

#: The events of those that are texts.
_TEXT_EVENTS: dict[str, Callable[[str, int], _Delta]] = {
    _CONTENT: TextDelta,
    _REASONING: ReasoningDelta,
    _REFUSAL: RefusalDelta,
}

#: And the kinds of all events.
_KIND_OF: dict[Any, str] = {
    TextDelta: _CONTENT,
    ReasoningDelta: _REASONING,
    RefusalDelta: _REFUSAL,
    ToolCallDelta: _CALLS,
}

#: Where reasoning is, in the order in which it is believed; it is never added up.
_REASONING_MEMBERS = (
    "reasoning_content",
    "reasoning",
    "reasoning_text",
    "reasoning_summary",  # ChatMock
    "thinking",  # clawrelay
    "thinking_content",
    "reasoning_details",
)


def _kind_of_member(name: str) -> str:
    """The kind of thing that a member of a message is; "" if it is none of ours."""
    if name.startswith(("reasoning", "thinking")):
        return _REASONING
    return name if name in (_CONTENT, _REFUSAL, _CALLS) else ""


class _Told:
    """What messages have said of a choice, where no delta has.

    Gateways without deltas send in each chunk a message with the text so far.
    index: the server's, of the choice that they belong to.
    """

    def __init__(self, index: Any = 0) -> None:
        self.index = index
        self._texts: dict[str, tuple[str, str]] = {}  # kind -> member, its text so far

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self._texts)

    def kinds_again(self, delta: dict[str, Any], message: Any) -> frozenset[str]:
        """The kinds of which the delta says only what the message beside it says."""
        if not self._texts or not isinstance(message, dict):
            return frozenset()
        again = set()
        for kind, (name, _) in self._texts.items():
            more = self._more_of(kind, message)
            if more or (more == "" and delta.get(name) == message[name]):
                again.add(kind)
        return frozenset(again)

    def take_rest(self, message: dict[str, Any]) -> dict[str, Any]:
        """-> the message without what is told already."""
        rest = {
            name: value
            for name, value in message.items()
            if _kind_of_member(name) not in self._texts
        }
        for kind, (name, _) in self._texts.items():
            more = self._more_of(kind, message)
            if more:
                rest[name] = more
                self._texts[kind] = name, message[name]
        return rest

    def _more_of(self, kind: str, message: dict[str, Any]) -> Optional[str]:
        """What its text goes on with; None if it does not begin with the text so far."""
        name, text = self._texts[kind]
        now = message.get(name)
        if not isinstance(now, str):
            return None
        # By halves of surrogate pairs, between which a text may have been cut; or it was
        # cut inside of UTF-8, and then a U+FFFD stands at its end.
        units, start = _to_utf16(now), _to_utf16(text)
        if not units.startswith(start):
            start = _to_utf16(text.rstrip("\ufffd"))
        if not units.startswith(start):
            return None
        return units[len(start) :].decode("utf-16-le", "surrogatepass")

    def add(self, message: dict[str, Any], known: frozenset[str]) -> None:
        """Note its texts, but for those of known kinds."""
        for name in (_CONTENT, _REFUSAL, *_REASONING_MEMBERS):
            kind, text = _kind_of_member(name), message.get(name)
            if text and isinstance(text, str) and kind not in known:
                self._texts.setdefault(kind, (name, text))

    def forget(self, kind: str) -> None:
        """A delta has said something of this kind: no message counts any more."""
        self._texts.pop(kind, None)


class _Choice:
    """One choice of an answer: reads its members in chunks, and gives events."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.finish_reason = ""
        self._grew_since_first = False  # something came after the first finish_reason
        self._grew_since_last = False  # something came after the last finish_reason
        self._streamed: set[str] = set()  # kinds of which something came
        self._told = _Told()
        self._texts: dict[str, _Text] = {}  # by kind
        self._calls = _Calls(index)

    def is_finished(self, done: bool) -> bool:
        """done: [DONE] has come, and then a reason is enough."""
        return bool(self.finish_reason) and (done or not self._grew_since_last)

    def read(self, data: dict[str, Any]) -> list[_Delta]:
        events: list[_Delta] = []
        delta, message = data.get("delta"), data.get("message")
        if delta is None and message is None:
            delta = data.get("text")  # as completions without chat have it
        if isinstance(delta, str):
            delta = {"content": delta}
        if isinstance(delta, dict):
            again = self._told.kinds_again(delta, message)
            events += self._read_members(delta, again)
            for event in events:
                self._told.forget(_KIND_OF[type(event)])
        if isinstance(message, dict):
            # The whole text once more (Perplexity, MiniMax), or what no delta has said.
            index = data.get("index") or 0
            if index != self._told.index:  # one of several choices that count as one
                self._told = _Told(index)
            known = frozenset(self._streamed - self._told.kinds)
            events += self._read_members(self._told.take_rest(message), known)
            self._told.add(message, known)
        self._read_finish_reason(_word(data.get("finish_reason")))
        return events

    def _grow(self, kind: str) -> None:
        """Something of this kind has come."""
        self._streamed.add(kind)
        self._grew_since_first = bool(self.finish_reason)
        self._grew_since_last = True

    def _read_finish_reason(self, reason: str) -> None:
        """The first one stands; but `stop`, which some servers write into every chunk,
        gives way to another one that comes with or after more."""
        if reason:
            first = self.finish_reason
            if not first or (first == "stop" and self._grew_since_first):
                self.finish_reason = reason[:_MAX_REASON]
            self._grew_since_last = False

    def maker_of(self, event: _Delta) -> _Maker:
        """-> what makes such an event of another text. Raises LookupError if none can."""
        if isinstance(event, ToolCallDelta):
            return self._calls.at(event.index).add
        index = self.index
        if isinstance(event, ReasoningDelta):
            key = next(iter(event.extra or ()))
            return lambda text: ReasoningDelta(text, index, {key: text})
        if isinstance(event, TextDelta):
            return (lambda text: TextDelta(text, index)) if index else TextDelta
        raise LookupError

    def take_halves(self) -> list[_Delta]:
        """First halves of surrogate pairs whose second never came."""
        halves = [(kind, text.take_half()) for kind, text in self._texts.items()]
        events = [_TEXT_EVENTS[kind](half, self.index) for kind, half in halves if half]
        return events + self._calls.take_halves()

    def _read_members(
        self, source: dict[str, Any], known: frozenset[str]
    ) -> Iterator[_Delta]:
        """Those of a delta or message, but for the kinds that are known already."""
        if _REASONING not in known:
            yield from self._read_reasoning(source)
        content = source.get("content")
        for part in content if isinstance(content, list) else (content,):
            kind, text = _read_part(part)
            if kind not in known:
                yield from self._read_text(kind, text)
        refusal = source.get("refusal")
        if isinstance(refusal, str) and _REFUSAL not in known:
            yield from self._read_text(_REFUSAL, refusal)
        if _CALLS not in known:
            calls = self._calls.read(source)
            if calls:
                self._grow(_CALLS)
            yield from calls

    def _read_text(self, kind: str, piece: str) -> Iterator[_Delta]:
        if piece:
            self._grow(kind)
            text = self._join(kind, piece)
            if text:
                yield _TEXT_EVENTS[kind](text, self.index)

    def _read_reasoning(self, source: dict[str, Any]) -> Iterator[_Delta]:
        """Servers name it in many ways, and some send the same text under two names."""
        extra = {
            name: value
            for name, value in source.items()
            if _kind_of_member(name) == _REASONING
            and value
            and isinstance(value, (str, list, dict))
        }
        number = source.get("reasoning_content")  # others may be a count or a flag
        if type(number) in (int, float):
            extra["reasoning_content"] = _find_texts(number)
        if extra:
            self._grow(_REASONING)
            found = (_find_texts(extra.get(name)) for name in _REASONING_MEMBERS)
            text = self._join(_REASONING, next((t for t in found if t), ""))
            yield ReasoningDelta(text, self.index, extra)

    def _join(self, kind: str, piece: str) -> str:
        if piece.isascii() and kind not in self._texts:
            return piece  # spares the object
        if kind not in self._texts:
            self._texts[kind] = _Text()
        return self._texts[kind].join(piece)


def _read_part(part: Any) -> tuple[str, str]:
    """Content, or a part of it -> its kind and text.

    Text is text, a refusal a refusal; all else is reasoning (Mistral, Databricks).
    """
    kind = "text"
    if isinstance(part, dict):
        kind = part.get("type") or "text"
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            return _REFUSAL, part["refusal"]
    is_text = kind in ("text", "output_text")
    return (_CONTENT if is_text else _REASONING), _find_texts(part)


def _find_texts(value: Any, depth: int = 0) -> str:
    """The text in a str, in a part ({"text": ...}), or in a list of them.

    Cloudflare's Workers AI makes JSON of tokens: a number, true or false is text, too.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return _dump(value)
    if isinstance(value, list) and depth < 8:
        return "".join(_find_texts(item, depth + 1) for item in value)
    if isinstance(value, dict) and depth < 8:
        for name in ("text", "content", "thinking", "reasoning", "summary"):
            if value.get(name):
                return _find_texts(value[name], depth + 1)
    return ""


class _Call:
    """A tool call being assembled: its place in the message, and what is known of it."""

    def __init__(self, position: int, choice: int) -> None:
        self.id = ""
        self.name = ""
        self.has_arguments = False
        self._is_blank = False  # they are {}, in whose place others may come
        self._position = position
        self._choice = choice
        self._type = "function"
        self._text = _Text()
        self._pieces: list[str] = []  # of the arguments, not looked at yet
        self._brackets = _Brackets()

    def read(self, part: _CallPart) -> Optional[ToolCallDelta]:
        """-> the event of a delta; None if the delta says nothing new."""
        is_named = bool(part.id and not self.id or part.name and not self.name)
        self.id = self.id or part.id
        self.name = self.name or part.name
        if part.is_custom:
            self._type = "custom"
        is_more = self._is_blank and part.arguments != "{}"
        is_again = part.is_object and self.has_arguments and not is_more
        is_nothing = part.is_number and not self.has_arguments
        no_arguments = is_again or is_nothing
        arguments = "" if no_arguments else self._text.join(part.arguments)
        if arguments:
            self._add(arguments)
        if not (is_named or arguments or part.extra):
            return None
        return self._make(arguments, part.extra or None)

    def take_half(self) -> Optional[ToolCallDelta]:
        half = self._text.take_half()
        return self._make(half) if half else None

    def add(self, arguments: str) -> ToolCallDelta:
        """The same as read() of a delta that has nothing but these arguments."""
        self._add(arguments)
        return self._make(arguments)

    def _add(self, arguments: str) -> None:
        self._is_blank = arguments == "{}" and not self.has_arguments
        self.has_arguments = True
        self._pieces.append(arguments)
        if len(self._pieces) > 256:  # flat in memory, and cheap: joined before the look
            self._look()

    def _look(self) -> None:
        self._brackets.feed("".join(self._pieces))
        self._pieces.clear()

    @property
    def is_whole(self) -> bool:
        """Its arguments are a whole JSON object already."""
        self._look()
        return self._brackets.are_closed

    def _make(
        self, arguments: str, extra: Optional[dict[str, Any]] = None
    ) -> ToolCallDelta:
        return ToolCallDelta(
            self._position,
            self.id,
            self.name,
            arguments,
            extra,
            self._choice,
            self._type,
        )


class _CallPart:
    """What a delta says of a tool call."""

    def __init__(self, data: dict[str, Any]) -> None:
        function, custom = data.get("function"), data.get("custom")
        self.is_custom = bool(custom) and isinstance(custom, dict) and not function
        is_flat = function is None and custom is None
        inner = _first_dict(custom if self.is_custom else function)
        source = data if is_flat else inner
        index = data.get("index")
        self.index: Optional[int] = index if type(index) is int else None
        self.id = _word(data.get("id"))
        self.name = _word(source.get("name"))
        has_input = self.is_custom or (is_flat and "arguments" not in data)
        arguments = source.get("input" if has_input else "arguments")
        # A token, or, before there are any arguments, nothing.
        self.is_number = isinstance(arguments, (int, float))
        self.is_object = isinstance(arguments, (dict, list))  # Writer, early llama.cpp
        self.arguments = _dump(arguments) if self.is_object else _find_texts(arguments)
        known = ["index", "id", "type", "function", "custom" if self.is_custom else ""]
        if is_flat:  # without the object around them (gateways)
            known += ["name", "arguments", "input"]
        self.extra = {
            name: value
            for name, value in data.items()
            if name not in known and value not in (None, "", [], {})
        }


class _Calls:
    """The tool calls of one choice, and which of them a delta belongs to.

    OpenAI numbers them. Others send no index, or all whole ones with index 0 (Ollama,
    Cerebras, Gemini), or each fragment under an index of its own (Nebius, ollama.com).
    """

    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}  # the server's index -> the call
        self._by_id: dict[str, _Call] = {}
        self._is_modern = False  # it has had tool_calls

    def at(self, position: int) -> _Call:
        return self._calls[position]

    def take_halves(self) -> list[_Delta]:
        return [event for event in (c.take_half() for c in self._calls) if event]

    def read(self, source: dict[str, Any]) -> list[_Delta]:
        """The events of a delta or message."""
        calls = source.get("tool_calls")
        legacy = source.get("function_call")
        if isinstance(calls, dict):  # TGI
            calls = [calls]
        if calls and isinstance(calls, list):
            self._is_modern = True
        elif isinstance(legacy, dict) and any(legacy.values()) and not self._is_modern:
            # Before tools there was one function: call 0 (functionary, llama-cpp-python).
            calls = [{"index": 0, "function": legacy}]
        else:
            return []
        events: list[_Delta] = []
        for data in calls:
            if isinstance(data, dict):
                part = _CallPart(data)
                call = self._call_for(part)
                event = call.read(part)
                if call.id:
                    self._by_id.setdefault(call.id, call)
                if event is not None:
                    events.append(event)
        return events

    def _call_for(self, part: _CallPart) -> _Call:
        """The call that a delta belongs to, or a new one."""
        call = self._look_up(part)
        if call is None or self._begins_another(call, part):
            if len(self._calls) >= _MAX_CALLS:
                raise StreamError(f"expected at most {_MAX_CALLS} tool calls, got more")
            call = _Call(len(self._calls), self._choice)
            self._calls.append(call)
            known = self._by_id.get(part.id)
            if part.id and (known is None or known.is_whole):
                self._by_id[part.id] = call  # which is the one that may go on
        if part.index is not None:
            if len(self._by_index) >= _MAX_CALLS and part.index not in self._by_index:
                del self._by_index[next(iter(self._by_index))]  # the oldest
            self._by_index[part.index] = call
        return call

    def _look_up(self, part: _CallPart) -> Optional[_Call]:
        if part.index in self._by_index:
            return self._by_index[part.index]
        if not self._calls:
            return None
        if part.index is None and part.id in self._by_id:
            return self._by_id[part.id]
        if part.name:
            return None
        if part.index is not None and part.id:
            return self._by_id.get(part.id)
        return self._calls[-1]

    def _begins_another(self, call: _Call, part: _CallPart) -> bool:
        """Whether a delta that points to a call with a name is the first of another."""
        if not (call.name and part.name):
            return False
        is_other_name = part.name != call.name
        if part.id and call.id:  # one id for two calls: a gateway of OpenRouter's
            return part.id != call.id or (is_other_name and call.is_whole)
        if not call.has_arguments:
            return False
        return is_other_name or bool(part.arguments and call.is_whole)


# --------------------------------------------------------------------------------------
# The shortcut: chunks that differ in one string from the chunk before
# --------------------------------------------------------------------------------------


# Most chunks are the chunk before with another string in them. Once that is proven for a
# chunk, those that follow need no JSON parser: data with the same bytes around a valid
# string literal is the same JSON but for that string, and so gives the same event but for
# its text. Any text that is read in full ends the use of the matcher, so that between
# learning and matching nothing has changed; and none is learned from a chunk whose second
# reading would differ from its first. Without all this the answer is the same, and costs
# four times as much.

if TYPE_CHECKING:
    #: The line of an SSE event -> our event, if it is like the one learned from; or None.
    _Matcher = Callable[[bytes], Optional[Event]]

    #: A text -> the event with this text.
    _Maker = Callable[[str], Event]

#: After so many matchers in a row that never matched, no more are learned.
_PATIENCE = 8

#: Members that OpenAI and others fill with random letters, against eavesdroppers.
_PADDING = ("obfuscation", "p")


def _match_nothing(source: bytes) -> Optional[Event]:
    return None


class _Shortcut:
    """The matcher in use, and whether it is worth while to learn another one."""

    def __init__(self) -> None:
        self.match: _Matcher = _match_nothing
        self._unused = 0  # matchers in a row that never matched

    def forget(self) -> None:
        self.match = _match_nothing

    def keep_on(self) -> None:
        """The matcher has matched."""
        self._unused = 0

    def learn(
        self,
        source: bytes,
        chunk: dict[str, Any],
        events: list[_Delta],
        maker_of: Callable[[_Delta], _Maker],
    ) -> None:
        """source: one line, `data: ` and a chunk; events: what was made of it."""
        if len(events) != 1 or self._unused >= _PATIENCE:
            return
        if b"\\ud" in source.lower():
            return  # half of a surrogate pair may wait for the other
        event = events[0]
        try:
            cut = _cut_around(event, source, chunk)
            make = maker_of(event)
        except (LookupError, TypeError, AttributeError):  # its text came from elsewhere
            return
        if cut is not None:
            self.match = _make_matcher(*cut, make)
            self._unused += 1


def _is_plain(padding: bytes) -> bool:
    """Letters, digits and _: no escape, so that it is a string literal as it is."""
    return padding.isalnum() or padding.replace(b"_", b"").isalnum()


def _make_matcher(head: bytes, middle: bytes, tail: bytes, make: _Maker) -> _Matcher:
    """Match head + string + tail, or head + string + middle + padding + tail."""
    fixed_size = len(head) + len(tail)

    def match(source: bytes) -> Optional[Event]:
        inner = source.removeprefix(head).removesuffix(tail)
        if len(source) - len(inner) != fixed_size:
            return None
        if middle:
            inner, _, padding = inner.partition(middle)
            if not _is_plain(padding):
                return None
        try:
            text = inner.decode()
        except UnicodeDecodeError:
            return None
        if '"' in text or "\\" in text:
            text = _read_literal(text)
        return make(text) if text else None

    return match


def _read_literal(inner: str) -> str:
    """-> what a JSON string says that has this between its quotes; "" if that is none, or
    something else is wrong with it."""
    literal = f'"{inner}"'
    try:
        text, end = _parse_json_at(literal)
    except ValueError as error:
        _pass_on(error)
        return ""
    return text if end == len(literal) and not _has_surrogate(text) else ""


def _cut_around(
    event: _Delta, source: bytes, chunk: dict[str, Any]
) -> Optional[tuple[bytes, bytes, bytes]]:
    """-> head, middle and tail of `source` around the string of its event, and around its
    padding; None where that cannot be proven.

    The proof: with other strings in the holes it parses to the same JSON but for those.
    Raises LookupError and the like if the event's text stands in no known place.
    """
    holder, key = _place_of(event, chunk)
    text = holder[key]
    if not text or text != _text_of(event):
        return None
    literal = json.dumps(text, ensure_ascii=False)[1:].encode()
    start = _find_literal(source, key)
    if start < 0 or not source.startswith(literal, start):
        return None
    head, tail = source[:start], source[start + len(literal) - 1 :]
    middle, padded = b"", ""
    for name in _PADDING:
        start = _find_literal(tail, name) if name in chunk else -1
        end = tail.find(b'"', start)
        if start >= 0 and _is_plain(tail[start:end]):
            middle, tail, padded = tail[:start], tail[end:], name
            break
    probe = "x" * len(source)  # which stands in neither hole: it is longer
    filled = probe.encode() + (middle + probe.encode() if padded else b"")
    twin_text = (head + filled + tail)[len(b"data:") :]
    twins = _parse_values(twin_text.decode("utf-8", "replace"))
    if not twins or not isinstance(twins[0], dict):
        return None
    twin = twins[0]
    twin_holder, _ = _place_of(event, twin)
    if twin_holder[key] != probe or (padded and twin[padded] != probe):
        return None
    twin_holder[key] = text
    if padded:
        twin[padded] = chunk[padded]
    return (head, middle, tail) if twins == [chunk] else None


def _text_of(event: _Delta) -> str:
    return event.arguments if isinstance(event, ToolCallDelta) else event.text


def _find_literal(data: bytes, key: str) -> int:
    """-> where the string of the first member `key` begins, behind its quote; or -1."""
    for form in (b'"%b":"', b'"%b": "'):
        start = data.find(form % key.encode())
        if start >= 0:
            return start + len(form) - 2 + len(key)
    return -1


def _place_of(event: _Delta, chunk: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """-> the object that holds the event's text, and the name of its member.

    Raises LookupError where a second reading of the chunk might differ from the first.
    """
    choice = chunk["choices"][0]
    delta = choice["delta"]
    if _word(choice.get("finish_reason")) or len(chunk["choices"]) > 1:
        raise LookupError  # more after a reason counts differently
    if choice.get("message"):
        raise LookupError  # the same once more says nothing new
    has_calls = bool(delta.keys() & {"tool_calls", "function_call"})
    if isinstance(event, ToolCallDelta):
        call = delta["tool_calls"][0]
        if (
            event.extra
            or type(call["index"]) is not int
            or call["function"].get("name")
        ):
            raise LookupError  # read twice, it may begin a second call
        return call["function"], "arguments"
    if isinstance(event, TextDelta) and not has_calls:
        return delta, "content"
    if (
        isinstance(event, ReasoningDelta)
        and not has_calls
        and len(event.extra or ()) == 1
    ):
        return delta, next(iter(event.extra or ()))
    raise LookupError


# --------------------------------------------------------------------------------------
# Bytes from anywhere -> events -> messages
# --------------------------------------------------------------------------------------


def _decode(
    blocks: Iterator[bytes], strict: bool, raw: bool
) -> Generator[Event, None, None]:
    answer = _Answer(strict=strict, raw=raw, one_choice=False)
    body = _unpack(blocks)
    cut: Optional[StreamError] = None
    while not answer.done:
        try:
            piece = next(body)
        except StopIteration as end:
            cut = end.value
            break
        yield from answer.feed(piece)
    yield from answer.end(cut)


def _unpack(
    blocks: Iterator[bytes],
) -> Generator[bytes, None, Optional[StreamError]]:
    """Yields the body without compression, and returns what was wrong with that.

    What `blocks` raises is the caller's, also if it is a StreamError.
    """
    unpacking = _Unpacking("")
    for block in blocks:
        if not isinstance(block, (bytes, bytearray, memoryview)):
            kind = type(block).__name__
            raise TypeError(
                f"blocks: expected an iterable of bytes, got a {kind} in it"
            )
        body = bytes(block)
        try:
            for start in range(0, len(body), _BLOCK_SIZE):  # zlib copies what is left
                yield from unpacking.feed(body[start : start + _BLOCK_SIZE])
        except StreamError as fault:
            return fault
    try:
        yield from unpacking.end()
    except StreamError as fault:
        return fault
    return None


class _Assembly:
    """A message being put together. Text is gathered in StringIOs: in linear time, and in
    no more memory than the text."""

    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._content = io.StringIO(newline="")
        self._reasoning = io.StringIO(newline="")
        self._refusal = io.StringIO(newline="")
        self._extra: dict[str, Any] = {}
        self._calls: dict[int, ToolCall] = {}
        self._arguments: dict[int, list[str]] = {}

    def add(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            self._content.write(event.text)
        elif isinstance(event, ReasoningDelta):
            self._reasoning.write(event.text)
            for name, value in (event.extra or {}).items():
                self._add_extra(name, value)
        elif isinstance(event, RefusalDelta):
            self._refusal.write(event.text)
        elif isinstance(event, ToolCallDelta):
            self._add_call(event)

    def _add_extra(self, name: str, value: Any) -> None:
        known = self._extra.get(name)
        if isinstance(value, str):
            if not isinstance(known, io.StringIO):
                known = self._extra[name] = io.StringIO(newline="")
            known.write(value)
        elif isinstance(value, list) and isinstance(known, list):
            known += _copied(value)
        else:  # a member that changes its type: the last one stands
            self._extra[name] = _copied(value)

    def _add_call(self, delta: ToolCallDelta) -> None:
        call = self._calls.get(delta.index)
        if call is None:
            call = self._calls[delta.index] = ToolCall("", "", "")
            self._arguments[delta.index] = []
        call.id = delta.id or call.id
        call.name = delta.name or call.name
        call.type = delta.type
        if delta.extra:
            call.extra.update(_copied(delta.extra))
        if delta.arguments:
            self._arguments[delta.index].append(delta.arguments)

    def finish(self, finish_reason: Optional[str]) -> Message:
        return Message(
            content=self._content.getvalue(),
            reasoning=self._reasoning.getvalue(),
            refusal=self._refusal.getvalue(),
            tool_calls=tuple(self._finish_calls()),
            finish_reason=finish_reason,
            choice=self._choice,
            extra={
                name: _replace_surrogates(value.getvalue())
                if isinstance(value, io.StringIO)
                else value
                for name, value in self._extra.items()
            },
        )

    def _finish_calls(self) -> Iterator[ToolCall]:
        """In order, each once, and each with an id of its own."""
        taken = {""}
        seen = set()
        for index, call in sorted(self._calls.items(), key=lambda item: item[0]):
            pieces = self._arguments[index]
            is_custom = call.type == "custom"  # and then it may be any text
            call.arguments = "".join(pieces) if is_custom else _join_arguments(pieces)
            same = (call.id, call.name, call.arguments)
            if not (call.name or call.arguments) or (call.id and same in seen):
                continue  # nothing, or sent again under another index (new-api, LocalAI)
            seen.add(same)
            while call.id in taken:  # none sent (NIM), or another call's (DeepSeek)
                call.id = f"call_{os.urandom(12).hex()}"
            taken.add(call.id)
            yield call


def _copied(value: Any) -> Any:
    """So that what the caller does to an event changes no message."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return value


def _join_arguments(pieces: list[str]) -> str:
    """A tool call's arguments; once, where the server sent them more than once.

    Only what is no JSON as it came is put right, and only if that makes JSON of it.
    """
    whole = "".join(pieces)
    if len(pieces) < 2 or _is_json(whole):
        return whole
    candidates = [_last_of_equals(whole), _begun_anew(pieces)]
    if all(b.startswith(a) for a, b in zip(pieces, pieces[1:])):  # cumulative
        candidates.append(pieces[-1])
    if pieces[0].startswith("".join(pieces[1:])):  # opencodex, cut
        candidates.append(pieces[0])
    return next((text for text in candidates if _is_json(text)), whole)


def _last_of_equals(text: str) -> str:
    """The last of several JSON values that say the same, or of which those before it are
    {} (Claude on Bedrock and Vertex behind gateways). "" if the text is anything else."""
    text = text.strip()
    values: list[Any] = []
    start = place = 0
    try:
        while place < len(text):
            start = _match_blanks(text, place).end()
            value, place = _parse_json_at(text, start)
            values.append(value)
        last = text[start:]
        if values and isinstance(values[-1], str):  # LiteLLM: the same in a JSON string
            last, values[-1] = values[-1], _parse_json(values[-1])
        # As text, since 1 and true are equal in Python.
        said = [json.dumps(value, sort_keys=True) for value in values]
    except (ValueError, RecursionError) as error:
        _pass_on(error)
        return ""
    return last if all(value in ("{}", said[-1]) for value in said) else ""


def _begun_anew(pieces: list[str]) -> str:
    """What a server began anew from some piece on, in another spelling (vLLM's GLM) or
    behind a part of it (SGLang's MiniMax); "" where none did.

    Behind one of `:,[` it may be an object inside another, which was then cut.
    """
    starts = [i for i, piece in enumerate(pieces) if piece.lstrip()[:1] == "{"]
    if not starts:
        return ""
    before, again = "".join(pieces[: starts[-1]]), "".join(pieces[starts[-1] :])
    is_inside = before.rstrip()[-1:] in ("", ":", ",", "[")
    if is_inside or not _squeeze(again).startswith(_squeeze(before).rstrip("}")):
        return ""
    return again


def _squeeze(text: str) -> str:
    """Without blanks, which one server's two JSON writers set differently."""
    return "".join(text.split())


def _is_json(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        _pass_on(error)
        return False
    return True


_DELTAS = (TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta)


def _aggregate(events: Iterator[Event], deltas: bool) -> Generator[Event, None, None]:
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
            elif isinstance(event, Chunk):
                if not deltas:
                    continue
            elif not isinstance(event, Message):
                kind = f"{type(event).__module__}.{type(event).__qualname__}"
                raise TypeError(
                    f"events: expected events of this {__name__}, got a {kind} of "
                    f"another module: {event!r:.200}"
                )
            yield event
        yield from finish({})
    except ChatStreamError as error:
        error.partial = tuple(finish({})) or error.partial
        raise
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------


def _parse_args(argv: Optional[list[str]]) -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="chatstream",
        description="Stream a chat completion: its text to stdout, all else to stderr.",
        epilog="""\
examples:
  chatstream --demo "hello"                     a real answer, with no key and no network
  chatstream -m gpt-4o-mini "Why is the sky blue?"
  chatstream -p ollama -m llama3.2 "Summarize this." < article.txt

exit status: 0 done; 1 an error; 2 a wrong argument; 3 the answer ended early
(no finish_reason, length, content_filter); 130 interrupted""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="PROMPT", help="its words; -: standard input")
    add("-m", "--model", help="default: the environment variable CHATSTREAM_MODEL")
    add("-p", "--provider", help=f"one of {', '.join(PROVIDERS)}")
    add("-u", "--base-url", help="another server, such as http://localhost:8080/v1")
    add("--key-env", metavar="NAME", help="environment variable that holds the API key")
    add("-i", "-s", "--instructions", help="a leading system message")
    add(
        *("-o", "--option"),
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a member of the request's body, as JSON or else as text",
    )
    add("--usage", action="store_true", help="print the tokens used, on stderr")
    add("--json", action="store_true", help="one JSON object per event and line")
    add(
        "--demo", action="store_true", help="answer from a small server in this process"
    )
    add("--version", action="version", version=f"chatstream {__version__}")
    args = parser.parse_args(argv)
    args.model = args.model or os.environ.get("CHATSTREAM_MODEL")
    if not args.model and not args.demo:
        parser.error("no model: give -m MODEL or set CHATSTREAM_MODEL")
    if args.key_env and not os.environ.get(args.key_env, "").strip():
        parser.error(f"--key-env: the environment variable {args.key_env} is not set")
    args.body = {"stream_options": {"include_usage": True}} if args.usage else {}
    for option in args.option:
        name, equals, value = option.partition("=")
        if not name or not equals:
            parser.error(f"-o: expected NAME=VALUE, got {option!r}")
        try:
            args.body[name] = json.loads(value)
        except ValueError:
            args.body[name] = value
    return args


class _Screen:
    """Text goes to stdout as it comes, all else to stderr, on lines of its own.

    Both may be one terminal, so a line that one has begun is ended before the other
    writes; always on stderr, because what is on stdout is the answer alone.
    """

    def __init__(self) -> None:
        self._is_open = False  # stdout's line
        self._has_note = False  # stderr's line is open
        self._dim = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")

    def write(self, text: str) -> None:
        """A piece of the answer."""
        self._end_note()
        print(text, end="", flush=True)
        self._is_open = not text.endswith("\n")

    def note(self, text: str) -> None:
        """A piece of what is beside the answer."""
        if text:
            if self._is_open and not self._has_note:
                print(file=sys.stderr)
            start, end = self._dim
            print(f"{start}{text}{end}", end="", file=sys.stderr, flush=True)
            self._has_note = not text.endswith("\n")

    def line(self, text: str) -> None:
        self._end_note()
        if self._is_open:
            print(file=sys.stderr)
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """The answer is over: its last line ends, too."""
        self._end_note()
        if self._is_open:
            self._is_open = False
            print(flush=True)

    def _end_note(self) -> None:
        if self._has_note:
            self._has_note = False
            print(file=sys.stderr, flush=True)


class _ScreenHandler(logging.Handler):
    """Shows the warnings of a call."""

    def __init__(self, screen: _Screen) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.line(f"chatstream: {record.getMessage()}")


def _main(argv: Optional[list[str]] = None) -> int:
    """The command `chatstream`. -> exit status."""
    if sys.stderr is None:  # closed by the shell (2>&-)
        sys.stderr = io.StringIO()
    for output in (sys.stdout, sys.stderr):  # an ASCII terminal must not end the answer
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")
    screen = _Screen()
    handler = _ScreenHandler(screen)
    _log.addHandler(handler)
    try:
        return _answer_command(_parse_args(argv), screen)
    except KeyboardInterrupt:
        with suppress(OSError):
            screen.end()
        return 130
    except OSError as error:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has enough (`| head -1`)
            return 0
        screen.line(f"chatstream: cannot write the answer: {error}")
        return 1
    finally:
        _log.removeHandler(handler)


def _answer_command(args: Any, screen: _Screen) -> int:
    if args.demo:
        args.base_url, args.provider = _serve_demo(), None
    try:
        events = stream(
            _read_prompt(args, screen),
            model=args.model or "demo",
            instructions=args.instructions,
            provider=args.provider,
            base_url=args.base_url,
            api_key=os.environ[args.key_env].strip() if args.key_env else None,
            extra_body=args.body,
        )
        show = _show_json if args.json else _show_text
        completed = show(events, screen)
    except ChatStreamError as error:
        screen.end()
        if args.json:
            print(json.dumps(_error_to_dict(error)), flush=True)
        screen.line(f"chatstream: {_name_options(str(error))}")
        return 1
    except (ValueError, TypeError) as error:
        screen.line(f"chatstream: {_name_options(str(error))}")
        return 2
    screen.end()
    if args.usage:
        screen.line(f"chatstream: {_describe_usage(completed.usage)}")
    if completed.finish_reason not in (None, "length", "content_filter"):
        return 0
    why = completed.finish_reason or "no finish_reason"
    screen.line(f"chatstream: the answer ended early ({why})")
    return 3


def _read_prompt(args: Any, screen: _Screen) -> str:
    """The words; standard input in the place of a word -, before them, or without them."""
    # UTF-8 whatever the locale.
    words = [os.fsencode(word).decode("utf-8", "replace") for word in args.words]
    if args.demo:
        return " ".join(words) or "hello"
    if "-" in words:
        text = _read_input(screen)
        return " ".join(text if word == "-" else word for word in words)
    if not words:
        return _read_input(screen)
    text = _read_input(screen) if _has_piped_input() else ""
    return "\n\n".join(part for part in (text, " ".join(words)) if part)


def _has_piped_input() -> bool:
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_input(screen: _Screen) -> str:
    if sys.stdin is None:
        return ""
    notice = "chatstream: waiting for the prompt on standard input (Ctrl-D ends it)"
    timer = threading.Timer(1.0, screen.line, [notice])
    timer.daemon = True
    timer.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\r\n")
    finally:
        timer.cancel()


def _show_text(events: Iterable[Event], screen: _Screen) -> Completed:
    completed = Completed()
    for event in aggregate(events, deltas=True):
        if isinstance(event, TextDelta) and event.choice == 0:
            screen.write(event.text)
        elif isinstance(event, (ReasoningDelta, RefusalDelta)):
            screen.note(event.text)
        elif isinstance(event, Message):
            if event.choice and event.content:  # after -o n=2, one below the other
                screen.end()
                screen.write(f"\n{event.content}")
            for call in event.tool_calls:
                screen.line(f"tool call: {call.name}({call.arguments})")
        elif isinstance(event, Completed):
            completed = event
    return completed


def _show_json(events: Iterable[Event], screen: _Screen) -> Completed:
    completed = Completed()
    for event in events:
        print(json.dumps({"event": type(event).__name__, **asdict(event)}), flush=True)
        if isinstance(event, Completed):
            completed = event
    return completed


def _error_to_dict(error: ChatStreamError) -> dict[str, Any]:
    fields = {**vars(error), "partial": [asdict(m) for m in error.partial]}
    named = {"event": "error", "type": type(error).__name__, "message": str(error)}
    return {**named, **fields, **named}


#: What a text calls it -> what it is on the command line.
_OPTION_NAMES = {
    "pass api_key=": "give --key-env NAME",
    "the base URL has no path": "the base URL (-u) has no path",
    "base_url: ": "-u: base_url: ",
    "provider: ": "-p: provider: ",
    "model: ": "-m: model: ",
    "messages: empty": "PROMPT: empty",
    "stream: ": "-o: stream: ",
}


def _name_options(text: str) -> str:
    for name, option in _OPTION_NAMES.items():
        if name.endswith(": ") and not text.startswith(name):
            continue
        text = text.replace(name, option, 1)
    return text


def _describe_usage(usage: Optional[Usage]) -> str:
    if usage is None:
        return "the server sent no usage"
    text = (
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} completion = "
        f"{usage.total_tokens} tokens"
    )
    if usage.cached_tokens:
        text += f", {usage.cached_tokens} cached"
    if usage.reasoning_tokens:
        text += f", {usage.reasoning_tokens} reasoning"
    if "cost" in usage.extra:
        text += f", cost {usage.extra['cost']}"
    return text


def _serve_demo() -> str:
    """Start a chat-completions server of a few lines on loopback. -> its base URL."""
    import socketserver
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            prompt = json.loads(self.rfile.read(length))["messages"][-1]["content"]
            answer = (
                f"You said: {prompt.strip()}\nEach word came as an event of its own."
            )
            words = re.findall(r"\s*\S+", answer)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for word in words:
                self.send_event({"index": 0, "delta": {"content": word}})
                time.sleep(0.05)
            counts = (len(prompt.split()), len(words))
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            usage = dict(zip(names, (*counts, sum(counts))))
            end = {"index": 0, "delta": {}, "finish_reason": "stop"}
            self.send_event(end, usage=usage)
            self.send_chunk(b"data: [DONE]\n\n")
            self.send_chunk(b"")

        def send_event(self, choice: dict[str, Any], **more: Any) -> None:
            chunk = {"id": "demo-1", "model": "demo", "choices": [choice], **more}
            self.send_chunk(b"data: %b\n\n" % json.dumps(chunk).encode())

        def send_chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the client has left, which is no news

    server = Server(("127.0.0.1", 0), Handler)
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
