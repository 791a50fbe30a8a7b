# chatstream 1.0.0: stream a chat completion from a Python script. One file, MIT.
# The Python distribution chatstream-py: copy this file beside your code, or install a
# checkout. It is its own documentation; the README of the distribution has recipes.
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the chatstream authors; the licence is at the end of this file.
"""Stream a chat completion from any OpenAI-compatible server.

    import chatstream

    for ev in chatstream.stream("Why is the sky blue?", model="gpt-4o-mini"):
        if isinstance(ev, chatstream.TextDelta):
            print(ev.text, end="", flush=True)

`stream()` sends one `POST {base_url}/chat/completions` and yields events as the server
sends them. `aggregate()` turns those events into whole messages:

    for ev in chatstream.aggregate(chatstream.stream("Hi", model="gpt-4o-mini")):
        if isinstance(ev, chatstream.Message):
            print(ev.content)

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
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn, Optional, Union

# dataclasses, http.client, ssl, urllib and urllib3 are imported where they are first
# needed: together they would be most of the time that `import chatstream` takes.

__version__ = "1.0.0"

__all__ = [
    "stream",
    "aggregate",
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

#: Bytes that are read of a reply that is not 2xx: enough for any error message.
_MAX_ERROR_BODY = 64 * 1024

#: Seconds for reading that, however it drips: the status is known and worth more.
_ERROR_BODY_SECONDS = 5.0

#: Seconds after `[DONE]` in which the body may still end, so that its connection can
#: be used again. The caller has its Completed before that.
_GRACE_SECONDS = 0.05

#: Bytes that are logged of a request's body, at DEBUG: not the whole of an image.
_MAX_LOGGED = 2000

#: First and longest wait between two tries, in seconds; each is twice the one before.
_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.2, 30.0

#: A server that asks for a longer wait than this (seconds) is not waited for.
_LONGEST_RETRY_AFTER = 120.0

#: Connections kept for reuse, per host. Above it urllib3 would drop one and warn.
_POOL_SIZE = 256

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

    partial: tuple[Message, ...] = ()
    request_id: str = ""

    def __init__(self, text: str = "", **fields: Any) -> None:
        # The fields live in __dict__, which is what pickle and copy carry over.
        super().__init__(text)
        vars(self).update(fields)


class MissingAPIKeyError(ChatStreamError):
    """The provider wants a key and there is none. Raised by stream() itself.

    env_key: str, the environment variable that was looked at.
    instructions: str, where to get a key; "" if the provider has none.
    """

    env_key: str = ""
    instructions: str = ""


class StatusError(ChatStreamError):
    """A reply that is not 2xx, and no other try would help (else RetryLimitError).

    status: int, the HTTP status.
    body: str, the first 64 KiB of the reply's body; "" if it could not be read.
    message: str, the sentence in it that is meant for people; "" if there is none.
    code: the error code as the server sent it (str, int, None ...); never converted.
    retry_after: float, the seconds that the server asked to wait; None if it did not.
    """

    status: int = 0
    body: str = ""
    message: str = ""
    code: Any = None
    retry_after: float | None = None


class RetryLimitError(StatusError):
    """A retryable status, and the retries are spent or too long a wait was asked for.

    attempts: int, the requests made.
    """

    attempts: int = 0


class TransportError(ChatStreamError):
    """No answer began: no connection, TLS failure, reset, or cut before the first event.

    The cause is chained (`__cause__`).

    attempts: int, the requests made.
    """

    attempts: int = 0


class StreamError(ChatStreamError):
    """A 2xx answer went wrong: it is no event stream, or too large, or one of those below."""


class IdleTimeoutError(StreamError, TimeoutError):
    """Silence for `idle_timeout`, or no chunk for `event_timeout`. Never retried.

    seconds: float, the bound that struck; the text says which one.
    """

    seconds: float = 0.0


class TruncatedStreamError(StreamError):
    """Cut after something was yielded.

    With strict=True also: ended without a finish_reason or [DONE].
    """


class MalformedChunkError(StreamError):
    """With strict=True: data that is not a JSON object.

    data: str, the text of it.
    """

    data: str = ""


class ServerError(StreamError):
    """The server reported an error inside its 200 answer.

    code, type: as the server sent them; None if it did not.
    message: str, the sentence that is meant for people.
    raw: the error's parsed JSON, or its text where it is not JSON.
    """

    code: Any = None
    type: Any = None
    message: str = ""
    raw: Any = None


# --------------------------------------------------------------------------------------
# @dataclass, but without its import
# --------------------------------------------------------------------------------------


if TYPE_CHECKING:
    from dataclasses import dataclass as _dataclass
    from dataclasses import field as _field
else:
    # The same at run time. To import dataclasses (and with it inspect), and to have it
    # write all methods of all classes, was a quarter of `import chatstream`. What its
    # functions, such as asdict(), look for on a class it still makes, at their first look.

    _field = dict  # the arguments of field(); no other default is a dict

    class _Factory:
        """The default of a parameter whose value is made anew for each object."""

        def __repr__(self) -> str:
            return "<factory>"

    class _Later:
        """The attribute `name` of `cls`, until it is first looked up."""

        def __init__(self, name: str, cls: type, fields: dict[str, dict]) -> None:
            self.name, self.cls, self.fields = name, cls, fields

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            from dataclasses import field, fields, make_dataclass

            specs = [(name, object, field(**f)) for name, f in self.fields.items()]
            made = make_dataclass(self.cls.__name__, specs)
            for f in fields(made):
                f.type = self.cls.__annotations__[f.name]
            setattr(self.cls, self.name, getattr(made, self.name))
            return getattr(made, self.name)

    def _make_init(cls: type, fields: dict[str, dict]) -> Any:
        source = f"def make(anew):\n  def __init__(self, {', '.join(fields)}):"
        for name, field in fields.items():
            source += f"\n    self.{name} = {name}"
            if "default_factory" in field:
                factory = field["default_factory"].__name__
                source += f" if {name} is not anew else {factory}()"
        made: dict[str, Any] = {}
        exec(source + "\n  return __init__", globals(), made)
        anew = _Factory()
        init = made["make"](anew)
        given = [field for field in fields.values() if field]
        init.__defaults__ = tuple(field.get("default", anew) for field in given)
        init.__annotations__ = {**cls.__annotations__, "return": None}
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        return init

    def _dataclass(cls: type) -> type:
        fields = {}  # name -> the arguments of its field()
        for name in cls.__annotations__:
            fields[name] = default = vars(cls).get(name, {})
            if not isinstance(default, dict):
                fields[name] = {"default": default}
            elif default:
                delattr(cls, name)

        def values(self: Any) -> dict[str, Any]:
            return {name: getattr(self, name) for name in fields}

        def eq(self: Any, other: Any) -> Any:
            same = other.__class__ is self.__class__
            return values(self) == values(other) if same else NotImplemented

        def repr(self: Any) -> str:
            shown = [n for n, field in fields.items() if field.get("repr", True)]
            text = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
            return f"{self.__class__.__qualname__}({text})"

        def replace(self: Any, **changes: Any) -> Any:
            return self.__class__(**{**values(self), **changes})

        made = {
            "__init__": _make_init(cls, fields),
            "__eq__": eq,
            "__hash__": None,
            "__repr__": repr,
            "__replace__": replace,
            "__match_args__": tuple(fields),
        }
        for name in ("__dataclass_fields__", "__dataclass_params__"):
            made[name] = _Later(name, cls, fields)
        for name in made.keys() - vars(cls).keys():
            setattr(cls, name, made[name])
        return cls


# --------------------------------------------------------------------------------------
# Events and values
# --------------------------------------------------------------------------------------


@_dataclass
class TextDelta:
    """A piece of the answer.

    text: str, never empty, always valid Unicode.
    choice: int, the choice it belongs to; 0 unless several were asked for (`n=`).
    """

    text: str
    choice: int = 0


@_dataclass
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


@_dataclass
class RefusalDelta:
    """A piece of a refusal.

    text: str, never empty.
    choice: int.
    """

    text: str
    choice: int = 0


@_dataclass
class ToolCallDelta:
    """A piece of a tool call.

    index: int, the call's position in its message, counted from 0 by first appearance,
        whatever index the server sent.
    id, name: str, as known so far; "" while unknown.
    arguments: str, this delta's fragment of the JSON text; may be "".
    extra: dict, members of the call that are not OpenAI's; None if there are none.
    choice: int.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    extra: Optional[dict[str, Any]] = None
    choice: int = 0


@_dataclass
class Chunk:
    """With raw=True: one JSON object as sent, before the events made from it.

    data: dict, the parsed JSON.
    """

    data: dict[str, Any]


@_dataclass
class ToolCall:
    """A whole tool call, in Message.tool_calls.

    id: str, unique in its message, made up where the server sent none.
    name: str, the function.
    arguments: str, the JSON text as the model wrote it: it may be invalid, or "".
    extra: dict, members that are not OpenAI's; they go back with to_dict(), because
        Gemini refuses the next turn without its thought signature.
    """

    id: str
    name: str
    arguments: str
    extra: dict[str, Any] = _field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The call as it stands in a request's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {**self.extra, "id": self.id, "type": "function", "function": function}


@_dataclass
class Message:
    """A whole message, from aggregate(). Append it to the history as it is.

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
    extra: dict[str, Any] = _field(default_factory=dict)

    def to_dict(self, *, reasoning: bool = False) -> dict[str, Any]:
        """The message as it stands in a request's `messages`.

        reasoning: bool, default False because some servers refuse it. True adds `extra`,
            which OpenRouter, DeepSeek and Kimi want back inside a tool loop.
        """
        message: dict[str, Any] = dict(self.extra) if reasoning else {}
        message["role"] = self.role
        message["content"] = self.content or (None if self.tool_calls else "")
        if self.refusal:
            message["refusal"] = self.refusal
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


@_dataclass
class Usage:
    """Tokens of a request, as the server counted them; 0 where it said nothing.

    cached_tokens are part of prompt_tokens, reasoning_tokens of completion_tokens.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@_dataclass
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
    """

    response_id: str = ""
    model: str = ""
    finish_reason: Optional[str] = None
    finish_reasons: dict[int, str] = _field(default_factory=dict)
    usage: Optional[Usage] = None
    skipped: int = 0
    request_id: str = ""


#: What stream() and aggregate() yield.
Event = Union[
    TextDelta, ReasoningDelta, RefusalDelta, ToolCallDelta, Chunk, Message, Completed
]


@_dataclass
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
    headers: dict[str, str] = _field(default_factory=dict, repr=False)


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
# The two public functions
# --------------------------------------------------------------------------------------


def stream(
    messages: str | Iterable[dict[str, Any] | Message],
    *,
    model: str,
    instructions: str | None = None,
    provider: str | Provider | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    extra_body: Mapping[str, Any] | None = None,
    connect_timeout: float | None = 10.0,
    idle_timeout: float | None = 300.0,
    event_timeout: float | None = 900.0,
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
        may carry a query string (Azure's `?api-version=`). None: the provider's.
    api_key: str, sent as a bearer token. None or "": the provider's environment variable.
    headers: mapping of str to str, on top of ours and of the provider's; replaces a
        header of the same name, whatever the case. None: none.
    extra_body: mapping, members of the request's body whose names stream() itself uses.
        None: none.
    connect_timeout: float, seconds for TCP, TLS and proxy, and for each block of the
        request that the server does not take; None: no bound. Not for the answer.
    idle_timeout: float, seconds of silence on the socket, before the headers and between
        any two reads; None: no bound.
    event_timeout: float, seconds in which bytes come but no chunk (keep-alive comments);
        None: no bound. The caller's own time between two next() does not count.
    max_retries: int, tries after the first one: on a connection failure (not a bad
        certificate), on 408, 429 and 5xx, and when the connection breaks before anything
        was yielded. `x-should-retry` true or false overrides the status; the code or type
        insufficient_quota is never retried. The wait is what `retry-after-ms` or
        `Retry-After` says (RFC 9110, 10.2.3; over 120 s: no more tries), else
        0.2 s x 2^n x (0.9 to 1.1), at most 30 s.
    strict: bool, True makes an error of what is otherwise logged as a warning: data that
        is not a JSON object, an end without finish_reason or [DONE], a cut or silence
        after the answer was finished.
    raw: bool, True also yields each parsed chunk, as Chunk.
    pool: a urllib3 PoolManager (or ProxyManager, or SOCKS manager) of the caller's, for
        private CAs, client certificates and proxies; its own headers stay, ours come on
        top. None: a shared one, and the proxy variables of the environment and
        SSL_CERT_FILE are honoured.
    params: the other members of the request's body, sent as they are (`temperature=`,
        `tools=`, `stream_options=` ...).

    Raises ValueError, TypeError and MissingAPIKeyError at the call, and the other
    ChatStreamErrors out of the loop.
    """
    where = _choose_provider(provider, base_url)
    scheme, host, port, target = _split_url(
        where.base_url if base_url is None else base_url
    )
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
    return _run(
        _Request(
            scheme=scheme,
            host=host,
            port=port,
            target=target,
            headers=sent_headers,
            body=_build_body(messages, model, instructions, params, extra_body),
            connect_timeout=_check_seconds("connect_timeout", connect_timeout),
            idle_timeout=_check_seconds("idle_timeout", idle_timeout),
            event_timeout=_check_seconds("event_timeout", event_timeout),
            max_retries=_check_retries(max_retries),
            strict=bool(strict),
            raw=bool(raw),
            pool=_check_pool(pool),
            secrets=_find_secrets(
                key, {**(getattr(pool, "headers", None) or {}), **sent_headers}, target
            ),
        )
    )


def aggregate(
    events: Iterable[Event], *, deltas: bool = False
) -> Generator[Event, None, None]:
    """Turn events into whole messages.

    Silent while deltas arrive; at each Completed one Message per choice that has text,
    reasoning, refusal or tool calls, in ascending order of choice, then the Completed
    itself; then it starts afresh. Events that end without a Completed give their
    messages all the same.

    events: any iterable of events; closed when this generator is closed.
    deltas: bool, True also passes on all other events as they come; default False.

    Raises what `events` raises; a ChatStreamError gets the messages so far as .partial.
    """
    messages = _aggregate(iter(events), deltas)
    next(messages)  # the dummy
    return messages


# --------------------------------------------------------------------------------------
# Arguments -> request
# --------------------------------------------------------------------------------------


@_dataclass
class _Request:
    """All that a try needs."""

    __repr__ = object.__repr__  # any other would show the key

    scheme: str
    host: str
    port: int
    target: str
    headers: dict[str, str]
    body: bytes
    connect_timeout: float | None
    idle_timeout: float | None
    event_timeout: float | None
    max_retries: int
    strict: bool
    raw: bool
    pool: Any
    secrets: tuple[str, ...]

    @property
    def origin(self) -> str:
        return _origin(self.scheme, self.host, self.port)

    @property
    def public_url(self) -> str:
        """The URL for logs and messages: query values may be secret."""
        return self.origin + self.target.partition("?")[0]


def _choose_provider(provider: str | Provider | None, base_url: str | None) -> Provider:
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


def _choose_key(provider: Provider, api_key: str | None) -> str:
    if api_key is not None and not isinstance(api_key, str):
        raise TypeError(f"api_key: expected a str, got a {type(api_key).__name__}")
    source, key = "api_key", api_key or ""
    if not key and provider.env_key:
        source, key = provider.env_key, os.environ.get(provider.env_key, "")
        if not key.strip():
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


def _split_url(base_url: Any) -> tuple[str, str, int, str]:
    """Base URL -> scheme, host, port, request target."""
    from urllib.parse import quote, urlsplit

    if not isinstance(base_url, str):
        raise TypeError(f"base_url: expected a str, got a {type(base_url).__name__}")
    wanted = "base_url: expected http(s)://host[:port][/path][?query]"
    shown = base_url.partition("?")[0].partition("#")[0]
    if "@" in shown.partition("//")[2].partition("/")[0]:
        raise ValueError(f"{wanted}, without user:password@; use headers= or api_key=")
    if "@" in base_url:  # user:pass/word@host: a password all the same
        shown = "a URL with @ in it"
    try:
        url = urlsplit(base_url.strip())
        host, port = url.hostname, url.port
        if host and not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError:
        raise ValueError(
            f"{wanted}, with a valid host and port; got {shown!r}"
        ) from None
    if url.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError(f"{wanted}, got {shown!r}")
    if any(c <= " " or c in "#\x7f" for c in base_url.strip()):
        raise ValueError(f"{wanted}, no blanks and no #fragment; got {shown!r}")
    safe = "/%:@!$&'()*+,;=-._~"
    target = quote(url.path.rstrip("/"), safe=safe) + "/chat/completions"
    if url.query:
        target += "?" + quote(url.query, safe=safe + "?")
    return url.scheme, host, port or _DEFAULT_PORTS[url.scheme], target


def _origin(scheme: str, host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    shown = "" if port == _DEFAULT_PORTS[scheme] else f":{port}"
    return f"{scheme}://{host}{shown}"


def _check_seconds(name: str, value: Any) -> float | None:
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


def _check_retries(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"max_retries: expected an int, got {value!r}")
    if value < 0:
        raise ValueError(f"max_retries: expected 0 or more, got {value!r}")
    return value


def _check_pool(pool: Any) -> Any:
    """By what it can do: urllib3 is not imported here."""
    able = hasattr(pool, "connection_from_url") and hasattr(pool, "urlopen")
    if pool is not None and (isinstance(pool, type) or not able):
        kind = type(pool).__name__
        raise TypeError(f"pool: expected a urllib3 PoolManager, got a {kind}")
    return pool


def _build_body(
    messages: Any, model: Any, instructions: Any, params: Any, extra_body: Any
) -> bytes:
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
        raise TypeError("stream: it is always true; use aggregate() for whole messages")
    if "timeout" in params:
        raise TypeError("timeout: use connect_timeout, idle_timeout and event_timeout")
    history = [{"role": "system", "content": instructions}] if instructions else []
    history += _check_messages(messages)
    body = {"model": model, "messages": history, "stream": True, **params}
    body.update(extra_body)
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except RecursionError:
        raise ValueError("the request's body is nested too deeply for JSON") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"the body cannot be written as JSON: {error}") from None


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    wanted = "messages: expected a str, or a sequence of dicts and Messages"
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}] if messages else []
    elif isinstance(messages, (bytes, Mapping, Message)):
        raise TypeError(f"{wanted}, got a {type(messages).__name__}")
    try:
        messages = list(messages)
    except TypeError:
        raise TypeError(f"{wanted}, got a {type(messages).__name__}") from None
    if not messages:
        raise ValueError(f"{wanted}, got none")
    for position, message in enumerate(messages):
        if not isinstance(message, (dict, Message)):
            kind = type(message).__name__
            raise TypeError(
                f"messages[{position}]: expected a dict or Message, got {kind}"
            )
    return [m.to_dict() if isinstance(m, Message) else m for m in messages]


#: A header whose name holds one of these has a secret value.
_SECRET_NAMES = ("auth", "key", "token", "secret", "cookie")

#: Fewer characters are a dummy ("ollama"), and would be found everywhere.
_SHORTEST_SECRET = 8


def _find_secrets(key: str, headers: Mapping[str, str], target: str) -> tuple[str, ...]:
    """What must not be seen in an error, even if the server sends it back."""
    from urllib.parse import unquote

    found = [key]
    for name, value in headers.items():
        if any(word in name.lower() for word in _SECRET_NAMES):
            found += [value, value.rpartition(" ")[2]]
    for pair in target.partition("?")[2].split("&"):
        value = pair.partition("=")[2]
        found += [value, unquote(value)]
    secrets = {s for s in found if len(s) >= _SHORTEST_SECRET}
    return tuple(sorted(secrets, key=len, reverse=True))


# --------------------------------------------------------------------------------------
# The state of one answer, which the layers below share
# --------------------------------------------------------------------------------------


class _Call:
    """A tool call being assembled."""

    __slots__ = ("position", "id", "name", "has_arguments")

    def __init__(self, position: int) -> None:
        self.position = position
        self.id = ""
        self.name = ""
        self.has_arguments = False


class _Choice:
    """What is known of one choice."""

    __slots__ = ("index", "finish_reason", "streamed", "calls", "by_index")

    def __init__(self, index: int) -> None:
        self.index = index
        self.finish_reason = ""
        self.streamed = False  # something was yielded for it
        self.calls: list[_Call] = []
        self.by_index: dict[int, _Call] = {}  # the server's index -> the call


#: Whose text: event type, choice, and the call of a ToolCallDelta, else None.
_HalfKey = tuple[Any, int, Optional[_Call]]


class _State:
    """What is known of one answer."""

    def __init__(self, strict: bool, raw: bool, content_type: str) -> None:
        self.strict = strict
        self.raw = raw
        self.content_type = content_type
        self.response_id = ""
        self.model = ""
        self.usage: Usage | None = None
        self.choices: dict[int, _Choice] = {}
        self.skipped = 0
        self.done = False  # [DONE] has come
        #: A chunk has come since _read_blocks() last looked.
        self.progress = False
        #: Why no more bytes come, other than by a proper end. Kept, not raised, so that
        #: what arrived whole is yielded first.
        self.fault: StreamError | None = None
        #: First halves of surrogate pairs, by the kind of text they belong to.
        self.halves: dict[_HalfKey, str] = {}

    @property
    def finished(self) -> bool:
        choices = self.choices.values()
        return bool(choices) and all(c.finish_reason for c in choices)


# --------------------------------------------------------------------------------------
# Tries and waits
# --------------------------------------------------------------------------------------


class _Retryable(Exception):
    """`error` ends the call unless another try is left."""

    def __init__(self, error: RetryLimitError | TransportError) -> None:
        super().__init__(error)
        self.error = error


def _run(request: _Request) -> Generator[Event, None, None]:
    """The retry loop around _attempt(), and where it sleeps."""
    delays = _backoff()
    for attempt in itertools.count(1):
        try:
            yield from _attempt(request)
            return
        except TransportError as final:
            final.attempts = attempt
            raise
        except _Retryable as failed:
            error, cause = failed.error, failed.__cause__
        error.attempts = attempt
        delay = next(delays)
        if isinstance(error, StatusError) and error.retry_after is not None:
            delay = error.retry_after
        if attempt > request.max_retries or delay > _LONGEST_RETRY_AFTER:
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
        time.sleep(delay)


def _backoff() -> Iterator[float]:
    """0.2 s, doubling; times 0.9 to 1.1, so that not all clients come back together."""
    import random

    delay = _FIRST_BACKOFF
    while True:
        yield min(delay * random.uniform(0.9, 1.1), _LONGEST_BACKOFF)
        delay = min(delay * 2, _LONGEST_BACKOFF)


def _attempt(request: _Request) -> Generator[Event, None, None]:
    """One request and its answer. Raises _Retryable where another try may help."""
    if _log.isEnabledFor(logging.DEBUG):
        shown = request.body[:_MAX_LOGGED].decode()  # json.dumps() wrote ASCII
        _log.debug("POST %s %s", request.public_url, shown)
    request_id = ""
    reply = None
    try:
        reply = _open(request)
        request_id = _find_request_id(reply.response.headers)
        if not 200 <= reply.response.status < 300:
            _raise_status(request, reply)
        yield from _answer(request, reply, request_id)
    except (_Retryable, ChatStreamError) as failed:
        error = failed.error if isinstance(failed, _Retryable) else failed
        error.request_id = request_id
        _make_presentable(error, failed.__cause__, request.secrets)
        raise
    finally:
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


def _find_request_id(headers: Any) -> str:
    found = (headers.get(name) for name in _REQUEST_ID_HEADERS)
    return next((str(value) for value in found if value), "")


def _presentable(value: Any, secrets: tuple[str, ...], depth: int = 0) -> Any:
    """The same value, fit to be shown: without secrets, and valid Unicode."""
    if isinstance(value, str):
        value = _replace_surrogates(value)
        for secret in secrets:
            value = value.replace(secret, "***")
    elif isinstance(value, (list, tuple, dict)) and depth > 50:
        value = "..."
    elif isinstance(value, (list, tuple)):
        value = type(value)(_presentable(item, secrets, depth + 1) for item in value)
    elif isinstance(value, dict):
        value = {
            _presentable(key, secrets): _presentable(item, secrets, depth + 1)
            for key, item in value.items()
        }
    return value


def _make_presentable(
    error: ChatStreamError, cause: BaseException | None, secrets: tuple[str, ...]
) -> None:
    """One line of text, and no secret in any field or in the causes."""
    vars(error).update(_presentable(vars(error), secrets))
    error.args = (" ".join(_presentable(str(error), secrets).split()),)
    while cause is not None:
        if any(secret in repr((cause.args, vars(cause))) for secret in secrets):
            cause.args = _presentable(cause.args, secrets)
            vars(cause).update(_presentable(vars(cause), secrets))
        cause = cause.__cause__ or cause.__context__


def _answer(
    request: _Request, reply: _Reply, request_id: str
) -> Generator[Event, None, None]:
    """The layers, from the bytes of a 2xx reply to its events, and how it ended."""
    headers = reply.response.headers
    state = _State(request.strict, request.raw, headers.get("content-type", ""))
    blocks = _read_blocks(reply, state, request.idle_timeout, request.event_timeout)
    plain = _decompress(blocks, state, headers.get("content-encoding", ""))
    events = _read_events(_split_events(_split_lines(plain)), state)

    first = next(events, None)
    if first is not None:
        yield first
        yield from events  # not a loop: this costs nothing per event
    _judge_end(request, state, first is not None)
    reasons = {
        c.index: c.finish_reason for c in state.choices.values() if c.finish_reason
    }
    _log.debug("done: %d, finish reasons %s", reply.response.status, reasons)
    try:
        yield Completed(
            response_id=state.response_id,
            model=state.model,
            finish_reason=reasons.get(0),
            finish_reasons=reasons,
            usage=state.usage,
            skipped=state.skipped,
            request_id=request_id,
        )
    finally:  # also for a caller who leaves now, as next(aggregate(...)) does
        if state.done:
            reply.drain(blocks)


def _judge_end(request: _Request, state: _State, started: bool) -> None:
    """Raise or log what was wrong with the way the answer ended, if anything was."""
    if state.done or (state.fault is None and state.finished):
        return
    fault = state.fault or TruncatedStreamError(
        "the stream ended without a finish_reason: the answer may be cut"
    )
    # Broken off after its finish reason, or ended properly without one: bad if strict.
    if not request.strict and (state.fault is None or state.finished):
        _log.warning("%s", fault)
    elif state.fault is None or started or isinstance(fault, IdleTimeoutError):
        raise fault
    else:
        broken = TransportError(f"{request.public_url}: {fault}")
        raise _Retryable(broken) from fault.__cause__


# --------------------------------------------------------------------------------------
# Transport: request -> reply
# --------------------------------------------------------------------------------------


class _Reply:
    """A reply whose headers are there, and what to do with its connection.

    response: http.client.HTTPResponse; on urllib3 the one inside its own response, or that
        itself, should there be none inside.
    sock: the connection's socket, where the connection can be used again; else None.
    errors: what reading may raise; set by _open().
    file: what stands between the response and its socket, for a chunked body.
    complete: set by _read_blocks() when the body has come to its proper end.
    """

    def __init__(
        self, response: Any, sock: Any, release: Callable[[bool], None]
    ) -> None:
        self.response = response
        self.errors: tuple[type[Exception], ...] = ()
        self.sock = sock
        self.complete = False
        self.file = _WatchedFile(response)
        self._release = release

    def drain(self, blocks: Iterator[bytes]) -> None:
        """After [DONE]: read the end of the body if it is about to come."""
        if self.sock is None or self.complete:
            return
        self.file.deadline = deadline = time.monotonic() + _GRACE_SECONDS
        self.sock.settimeout(_GRACE_SECONDS)
        for _ in blocks:
            if time.monotonic() > deadline:
                break

    def close(self) -> None:
        """Keep the connection for the next call if the body is read, else close it."""
        self.response.close()
        self._release(self.complete)


class _WatchedFile:
    """Takes the place of a chunked response's file, to see the lines around its chunks.

    http.client takes an end of the connection for the end of the body once it has seen a
    chunk size that begins with 0; and it reads trailers for as long as they come, which
    drain() ends with `deadline` (of time.monotonic(); None: there is none). Of a response
    that is not chunked it sees nothing.
    """

    def __init__(self, response: Any) -> None:
        self.last_line: bytes = b""
        self.deadline: float | None = None
        file: Any = getattr(response, "fp", None)
        self.chunked = False
        if file is not None and response.chunked is True:
            self.chunked = True
            self.read, self.read1, self.close = file.read, file.read1, file.close
            self.flush, self.fileno = file.flush, file.fileno
            self._readline = file.readline
            response.fp = self

    def readline(self, limit: int = -1) -> bytes:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OSError("the body does not end")
        self.last_line = self._readline(limit)
        return self.last_line

    @property
    def ended(self) -> bool:
        """RFC 9112, 7.1: the last chunk and the trailers end with an empty line."""
        return not self.chunked or self.last_line in (b"\r\n", b"\n")


class _Upload(io.BytesIO):
    """The request's body, sent from a file so that each block has a timeout of its own.

    Tells how far we got: before its first block we were still connecting.
    """

    sent = False

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size)
        self.sent = not block  # more was asked for than there is: all was sent
        return block


def _open(request: _Request) -> _Reply:
    """Connect, send, and wait for the headers."""
    import http.client

    urllib3: Any
    try:
        import urllib3
    except ImportError:
        urllib3 = None
    errors: tuple[type[Exception], ...]
    errors = (OSError, http.client.HTTPException, ValueError)
    if urllib3:
        errors += (urllib3.exceptions.HTTPError,)

    body = _Upload(request.body)
    try:
        if urllib3:
            reply = _open_pooled(urllib3, request, body)
        else:
            reply = _open_plain(request, body)
    except errors as error:
        cause = _root_cause(error)
    else:
        reply.errors = errors
        return reply
    text = f"{request.public_url}: {str(cause) or type(cause).__name__}"
    if isinstance(cause, socket.timeout) and body.sent:
        raise _idle_timeout(request.idle_timeout, "before the headers") from cause
    if isinstance(cause, socket.timeout) and body.tell():
        raise TransportError(f"{text} while sending the request") from cause
    # By name: urllib3 1.26 has a CertificateError of its own.
    if type(cause).__name__ in ("SSLCertVerificationError", "CertificateError"):
        text += "; SSL_CERT_FILE=ca.pem makes a private certificate authority trusted"
        raise TransportError(text) from cause
    raise _Retryable(TransportError(text)) from cause


def _root_cause(error: BaseException) -> BaseException:
    """The error of the socket inside those that urllib3 puts around it."""
    import http.client

    while not isinstance(error, (OSError, http.client.HTTPException)):
        inner = [item for item in error.args if isinstance(item, Exception)]
        context = None if error.__suppress_context__ else error.__context__
        found = (*inner, error.__cause__, context)
        deeper = next((item for item in found if item is not None), None)
        if deeper is None:
            break
        error = deeper
    return error


def _open_pooled(urllib3: Any, request: _Request, body: _Upload) -> _Reply:
    """On urllib3, whose response keeps the http.client.HTTPResponse that we read."""
    pool = request.pool
    if pool is None:
        proxy = _find_proxy(request)
        pool = _shared_pool(urllib3, proxy, _tls_settings(request, proxy))
    for name in ("urllib3.connectionpool", "urllib3.connection"):
        logging.getLogger(name).addFilter(_hide_query)  # adds it once
    wrapper = pool.urlopen(
        "POST",
        request.origin + request.target,
        body=body,
        headers=_merge_headers(
            pool.headers or {},
            request.headers,
            {"Content-Length": str(len(request.body))},
        ),
        timeout=urllib3.Timeout(
            connect=request.connect_timeout, read=request.idle_timeout
        ),
        retries=False,
        redirect=False,
        preload_content=False,
        decode_content=False,
    )
    # Its own read1() costs three times as much (and 1.26 has none).
    response = getattr(wrapper, "_original_response", None) or wrapper

    def release(complete: bool) -> None:
        if not complete:
            wrapper.close()
        wrapper.release_conn()

    connection = wrapper.connection
    return _Reply(response, connection and connection.sock, release)


@lru_cache(maxsize=16)
def _shared_pool(urllib3: Any, proxy: _Proxy | None, tls: Any) -> Any:
    """One pool for all calls with the same proxy and certificates."""
    options: dict[str, Any] = {"maxsize": _POOL_SIZE}
    if tls is not None and not urllib3.__version__.startswith("1."):
        # Not for 1.26: it gives a context no host name to check where that is an IP
        # address. Left alone, it makes the same checks itself.
        options["ssl_context"] = _tls_context(tls)
        if proxy is not None and proxy.scheme == "https":
            options["proxy_ssl_context"] = options["ssl_context"]
    if proxy is None:
        return urllib3.PoolManager(**options)
    return urllib3.ProxyManager(proxy.url, proxy_headers=dict(proxy.headers), **options)


if hasattr(os, "register_at_fork"):  # a forked child must not write to our connections
    os.register_at_fork(after_in_child=_shared_pool.cache_clear)


def _hide_query(record: logging.LogRecord) -> bool:
    """urllib3 logs the target of a request whole; its query may hold a key (Gemini)."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            re.sub(r"(/chat/completions)\?\S*", r"\1", arg)
            if isinstance(arg, str)
            else arg
            for arg in record.args
        )
    return True


def _open_plain(request: _Request, body: _Upload) -> _Reply:
    """On http.client: one connection a call."""
    import http.client

    proxy = _find_proxy(request)
    peer = proxy or request
    tls = _tls_settings(request, proxy)
    headers = {**request.headers, "Content-Length": str(len(request.body))}
    target = request.target
    tunnel = proxy is not None and request.scheme == "https"
    if proxy is not None and not tunnel:
        target = request.origin + target  # RFC 9112, 3.2.2: absolute-form
        headers.update(proxy.headers)
    if tunnel and peer.scheme == "https":
        raise TransportError("an https:// proxy for an https:// server needs urllib3")
    connection: http.client.HTTPConnection
    if peer.scheme == "https" or tunnel:
        connection = http.client.HTTPSConnection(
            peer.host,
            peer.port,
            timeout=request.connect_timeout,
            context=_tls_context(tls),
        )
    else:
        connection = http.client.HTTPConnection(
            peer.host, peer.port, timeout=request.connect_timeout
        )
    if tunnel and proxy is not None:
        connection.set_tunnel(request.host, request.port, dict(proxy.headers))
    try:
        connection.connect()
        sock = connection.sock
        # A server may refuse a large request before it has all of it.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", target, body=body, headers=headers)
        sock.settimeout(request.idle_timeout)
        response = connection.getresponse()
    except BaseException:
        connection.close()
        raise
    return _Reply(response, None, lambda complete: connection.close())


class _Proxy(NamedTuple):
    """A proxy from the environment. Hashable: the shared pools are kept by it."""

    scheme: str
    host: str
    port: int
    headers: tuple[tuple[str, str], ...]

    @property
    def url(self) -> str:
        return _origin(self.scheme, self.host, self.port)


def _find_proxy(request: _Request) -> _Proxy | None:
    """HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, as urllib.request reads them.

    The proxy's credentials join request.secrets.
    """
    if "_proxy" not in " ".join(os.environ).lower():
        return None  # spares the import
    import urllib.request
    from base64 import b64encode
    from urllib.parse import unquote, urlsplit

    settings = urllib.request.getproxies_environment()
    value = settings.get(request.scheme) or settings.get("all")
    bypass: Any = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]
    if not value or bypass(f"{request.host}:{request.port}", settings):
        return None
    url = urlsplit(value if "://" in value else "http://" + value)
    port: int | None = -1
    with suppress(ValueError):  # raising here would chain it: it may quote the password
        port = url.port
    if port == -1:
        raise TransportError("the proxy in the environment has a bad port")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise TransportError(
            f"the environment asks for a {url.scheme}:// proxy; http:// and https:// are "
            "supported (for SOCKS pass pool=urllib3.contrib.socks.SOCKSProxyManager(...))"
        )
    headers: tuple[tuple[str, str], ...] = ()
    if url.username is not None:
        credentials = f"{unquote(url.username)}:{unquote(url.password or '')}".encode()
        token = b64encode(credentials).decode()
        secrets = (token, unquote(url.password or ""))
        request.secrets += tuple(s for s in secrets if len(s) >= _SHORTEST_SECRET)
        headers = (("Proxy-Authorization", f"Basic {token}"),)
    return _Proxy(url.scheme, url.hostname, port or _DEFAULT_PORTS[url.scheme], headers)


def _tls_settings(request: _Request, proxy: _Proxy | None) -> Any:
    """What the certificates depend on; None where there is no TLS."""
    if request.scheme != "https" and (proxy is None or proxy.scheme != "https"):
        return None
    return os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")


@lru_cache(maxsize=16)
def _tls_context(settings: Any) -> Any:
    """One per `settings`, which OpenSSL reads itself; the same on both transports."""
    import ssl

    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


# --------------------------------------------------------------------------------------
# Response -> bytes
# --------------------------------------------------------------------------------------


def _read_blocks(
    reply: _Reply,
    state: _State,
    idle_timeout: float | None,
    event_timeout: float | None,
) -> Iterator[bytes]:
    """The body as it arrives. Ends with `state.fault` set, or `reply.complete`.

    read1() hands over what has come at once, also inside an HTTP chunk that is not whole
    yet; readline() and iteration would wait for it, and hide a cut.
    """
    import http.client

    response = reply.response
    read1, monotonic = response.read1, time.monotonic
    quiet = 0.0  # seconds spent waiting since the last chunk
    empty = True
    while True:
        started = monotonic()
        try:
            block = read1(_BLOCK_SIZE)
        except reply.errors as error:
            cause = _root_cause(error)
            state.fault = _cut(str(cause) or type(cause).__name__)
            if isinstance(cause, http.client.IncompleteRead):  # says no more than that
                state.fault = _cut("the connection ended, or its framing broke")
            if isinstance(cause, socket.timeout):
                state.fault = _idle_timeout(idle_timeout, "between two reads")
            state.fault.__cause__ = cause
            return
        if reply.file.chunked and (response.chunk_left or 0) < 0:
            state.fault = _cut("negative chunk size")  # int() lets it pass
            return
        if not block:
            missing = getattr(response, "length", 0)
            if missing:
                state.fault = _cut(f"{missing} bytes short of its Content-Length")
            elif not reply.file.ended:
                state.fault = _cut("without its last chunk")
            elif empty and _seems_cut_in_headers(response):
                state.fault = _cut("inside its headers, it seems")
            else:
                reply.complete = True
            return
        quiet += monotonic() - started
        empty = False
        yield block
        if state.progress:
            state.progress = False
            quiet = 0.0
        elif event_timeout is not None and quiet > event_timeout:
            state.fault = IdleTimeoutError(
                "idle timeout waiting for SSE: bytes, but no chunk "
                f"for {event_timeout:g} s (event_timeout)",
                seconds=event_timeout,
            )
            return


def _seems_cut_in_headers(response: Any) -> bool:
    """For an empty body. http.client takes the end of the connection for the end of the
    headers; what tells is a header that is missing or broken off."""
    headers = response.headers
    if response.chunked or getattr(response, "length", 0) is not None:
        return False
    if response.version < 11 or "close" in headers.get("connection", "").lower():
        return False  # the end of the connection was to be the end (RFC 9112, 9.6)
    if "content-length" in headers or "transfer-encoding" in headers:
        return True  # with its whole value it would have given a length, or chunks
    return bool(headers.defects) or "/" not in headers.get("content-type", "")


def _idle_timeout(seconds: float | None, where: str) -> IdleTimeoutError:
    seconds = seconds or 0.0
    return IdleTimeoutError(
        f"idle timeout waiting for SSE: silence {where} for {seconds:g} s (idle_timeout)",
        seconds=seconds,
    )


def _cut(how: str) -> TruncatedStreamError:
    return TruncatedStreamError(f"the answer was cut: {how}")


def _decompress(
    blocks: Iterator[bytes], state: _State, encoding: str
) -> Iterator[bytes]:
    """Undo a Content-Encoding that was not asked for (nginx: gzip), block by block."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return blocks
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise StreamError(
            f"expected Content-Encoding gzip, deflate or none, got {encoding!r}"
        )
    return _inflate(blocks, state)


#: zlib's code for "the header tells".
_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS


def _inflate(blocks: Iterator[bytes], state: _State) -> Iterator[bytes]:
    inflater: Any = None
    head = b""
    for block in blocks:
        if inflater is None:
            head += block
            if len(head) < 2:
                continue
            # RFC 1950 and 1952 begin in a known way; some servers' "deflate" is bare.
            zlib_header = head[0] & 15 == 8 and (head[0] << 8 | head[1]) % 31 == 0
            wrapped = zlib_header or head.startswith(b"\x1f\x8b")
            inflater = zlib.decompressobj(_ZLIB_OR_GZIP if wrapped else -zlib.MAX_WBITS)
            block = head
        plain = block  # until decompress() gives none: it may still hold output back
        while plain:
            try:
                plain = inflater.decompress(block, _BLOCK_SIZE)
            except zlib.error as error:
                raise StreamError(
                    f"the answer's compression is broken: {error}"
                ) from error
            if plain:
                yield plain
            block = inflater.unconsumed_tail
            if inflater.eof:  # another gzip member may follow, or padding
                plain = block = inflater.unused_data.lstrip(b"\0")
                if block:
                    inflater = zlib.decompressobj(_ZLIB_OR_GZIP)
    whole = inflater.eof if inflater else not head
    if not whole and state.fault is None:
        state.fault = _cut("its compressed data is incomplete")


# --------------------------------------------------------------------------------------
# Replies that are not 2xx
# --------------------------------------------------------------------------------------


def _raise_status(request: _Request, reply: _Reply) -> NoReturn:
    """Raise StatusError, or _Retryable with a RetryLimitError."""
    response = reply.response
    status, headers = response.status, response.headers
    body = _read_error_body(reply)
    parsed = _parse_json(body)
    if parsed is None:
        message, code, kind = _title(body), None, None
    else:
        message, code, kind = _describe_error(parsed)
    text = f"HTTP {status} from {request.public_url}: {message or response.reason}"
    if 300 <= status < 400:
        location = re.split("[?#]", headers.get("location", ""))[0]
        location = re.sub("//.*@", "//", location)  # user:password
        text += f" (redirects are not followed; Location: {location})"
    fields = {
        "status": status,
        "body": body,
        "message": message,
        "code": code,
        "retry_after": _retry_after(headers),
    }
    retry = status in (408, 429) or status >= 500
    retry = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), retry)
    if not retry or "insufficient_quota" in (code, kind):
        raise StatusError(text, **fields)
    raise _Retryable(RetryLimitError(text, **fields))


def _read_error_body(reply: _Reply) -> str:
    """What can be had of it in a few seconds. Nothing here may hide the status."""
    state = _State(False, False, "")
    encoding = reply.response.headers.get("content-encoding", "")
    pieces: list[bytes] = []
    left = _MAX_ERROR_BODY
    with suppress(StreamError), _time_limit(reply.response, _ERROR_BODY_SECONDS):
        for block in _decompress(
            _read_blocks(reply, state, None, None), state, encoding
        ):
            pieces.append(block[:left])
            left -= len(pieces[-1])
            if not left:
                break
    return b"".join(pieces).decode("utf-8", "replace")


@contextmanager
def _time_limit(response: Any, seconds: float) -> Iterator[None]:
    """Shut the connection down after `seconds`, whatever read is waiting on it.

    A timeout of the socket would bound each read, not their sum; and urllib3 gives no
    access to the socket of a connection that will close. So this is another handle of
    it, whose address family does not matter to shutdown().
    """
    try:
        handle = socket.fromfd(response.fileno(), socket.AF_INET, socket.SOCK_STREAM)
    except (AttributeError, OSError, ValueError):  # the body is empty and closed
        yield
        return

    def shut() -> None:
        with suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        handle.close()


def _retry_after(headers: Any) -> float | None:
    """Seconds; None if the server does not say, or says what is no time to wait."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit
        except ValueError:
            seconds = _seconds_until(value) if name == "retry-after" else -1.0
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None


def _seconds_until(date: str) -> float:
    """An HTTP-date (RFC 9110, 5.6.7), which is always in GMT; -1.0 if it is none."""
    import calendar
    from email.utils import parsedate

    try:
        return calendar.timegm(parsedate(date) or ()) - time.time()
    except (TypeError, ValueError, OverflowError):
        return -1.0


def _parse_json(text: str) -> Any:
    """-> the JSON value; None if the text is not JSON (or is null)."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _title(text: str) -> str:
    """The sentence in an error page: the title alone of HTML, whose body may hold the
    caller's address (Cloudflare), else the beginning of the text."""
    if text.lstrip()[:1] == "<":
        import html

        title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
        text = html.unescape(title[1]) if title else ""
    return " ".join(text.split())[:300]


#: Where servers put the sentence, in the order in which they are believed.
_MESSAGE_MEMBERS = (
    "error",
    "message",
    "detail",
    "details",
    "msg",
    "base_resp",
    "status_msg",
    "errors",
)


def _describe_error(value: Any) -> tuple[str, Any, Any]:
    """An error's parsed JSON, of whatever shape -> message, code, type."""
    body = _first_dict(value)
    error = _first_dict(body.get("error")) or body
    code = error.get("code", body.get("code"))
    if code is None:
        code = _first_dict(body.get("base_resp")).get("status_code")
    kind = error.get("type", body.get("type"))
    return _find_sentence(value), code, kind


def _first_dict(value: Any) -> dict[str, Any]:
    """`value` if it is a dict; of a list (Gemini's errors) the first dict in it; else {}."""
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, dict)), None)
    return value if isinstance(value, dict) else {}


def _find_sentence(value: Any, depth: int = 0) -> str:
    """The first sentence in an error's JSON, also in JSON inside a string; else ""."""
    found: Iterable[Any] = ()
    if isinstance(value, str):
        inner = _parse_json(value) if value.lstrip()[:1] in ("{", "[") else None
        return _find_sentence(inner, depth + 1) if inner else " ".join(value.split())
    if isinstance(value, list):
        found = value
    elif isinstance(value, dict):
        found = (value[name] for name in _MESSAGE_MEMBERS if name in value)
    if depth > 8:
        return ""
    sentences = (_find_sentence(item, depth + 1) for item in found)
    return next((sentence for sentence in sentences if sentence), "")


# --------------------------------------------------------------------------------------
# Bytes -> lines -> SSE events
# --------------------------------------------------------------------------------------


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines end in LF, CRLF or CR (WHATWG SSE, 9.2.5), and in nothing else.

    A line is searched for its end only where it is new, and joined once: a large event
    in small reads stays linear.
    """
    unfinished: list[bytes] = []  # pieces of the last line
    size = 0  # of them together
    after_cr = False
    bom = b"\xef\xbb\xbf"  # of the first line only
    for block in blocks:
        if after_cr or b"\r" in block:
            if after_cr and block.startswith(b"\n"):
                block = block[1:]
            after_cr = block.endswith(b"\r")
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = block.split(b"\n")
        last = lines.pop()
        if lines:
            if unfinished:
                unfinished.append(lines[0])
                lines[0] = b"".join(unfinished)
                unfinished = []
                size = 0
            if bom:
                lines[0] = lines[0].removeprefix(bom)
                bom = b""
            yield from lines
        if last:
            size += len(last)
            _check_size(size)
            unfinished.append(last)
    if unfinished:
        yield b"".join(unfinished).removeprefix(bom)


#: What _split_events() finds: an event's data; an error's; [DONE]; a body that is not
#: SSE; the same where comments or fields stood beside it.
_DATA, _ERROR, _DONE, _BODY, _STRAY = "data", "error", "done", "body", "stray"


def _split_events(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """SSE events (WHATWG SSE, 9.2.6) -> (kind, data).

    Unlike a browser it also gives an event that the end of the body cuts short of its
    blank line (llama.cpp, xAI, Groq), and does not wait for the blank line of [DONE].
    """
    kind = _DATA
    data: list[bytes] = []
    other: list[bytes] | None = []  # lines that are no SSE, until the first data
    has_fields = False  # besides data: a comment, or another field
    size = 0  # of the lines in data, or else in other
    for line in lines:
        if not line:
            if data:
                yield kind, b"\n".join(data)
                data = []
            kind = _DATA
        elif line.startswith(b"data: {") and not data:
            data.append(line[6:])  # nearly all are like this; as below, but faster
            other = None
            size = len(line)
        elif line.startswith(b"data:"):
            value = line[5:].removeprefix(b" ")
            if value.strip() == b"[DONE]":
                if data:
                    yield kind, b"\n".join(data)
                yield _DONE, b""
                return
            if data:
                size += len(line)
                _check_size(size)
            else:
                other = None
                size = len(line)
            data.append(value)
        else:
            name, _, value = line.partition(b":")
            if name == b"event":
                kind = _ERROR if value.strip() == b"error" else _DATA
            elif name == b"error":  # a field of llama.cpp's and gpustack's
                if data:
                    yield kind, b"\n".join(data)
                yield _ERROR, value  # at which the reader stops
            elif name not in (b"", b"id", b"retry", b"data"):
                if other is not None:
                    other.append(line)
                    size += len(line) + 1
                    _check_size(size)
                continue
            has_fields = True
    if data:
        yield kind, b"\n".join(data)
    elif other:
        yield _STRAY if has_fields else _BODY, b"\n".join(other)


def _check_size(size: int) -> None:
    if size > _MAX_EVENT:
        raise StreamError(
            f"expected events of at most {_MAX_EVENT} bytes, got a larger one"
        )


# --------------------------------------------------------------------------------------
# SSE events -> chunks -> our events
# --------------------------------------------------------------------------------------


def _read_events(
    sse_events: Iterable[tuple[str, bytes]], state: _State
) -> Iterator[Event]:
    """Chunks -> events. match() and _learn() spare the JSON parser where the result is
    known without it (see "The shortcut" below); without them all is the same."""
    match: _Matcher = _match_nothing
    unused = 0  # matchers in a row that never matched
    for kind, data in sse_events:
        event = match(data) if kind is _DATA else None
        if event is not None:
            state.progress = True
            unused = 0
            yield event
            continue
        if kind is _DONE:
            state.done = True
            break
        if kind is _ERROR:
            yield from _flush_halves(state)
            raise _server_error(data.strip())
        match = _match_nothing
        for chunk in _parse_chunks(kind, data, state):
            state.progress = True
            if state.raw:
                yield Chunk(chunk)
            events = _read_chunk(state, chunk)
            yield from events
            if _is_error(chunk):
                yield from _flush_halves(state)
                raise _server_error(data, chunk)
            if unused < _PATIENCE and not state.raw and not state.halves:
                match = _learn(data, chunk, events)
                unused += match is not _match_nothing
    yield from _flush_halves(state)
    if state.skipped:
        _log.warning("skipped data that is no JSON object, %d time(s)", state.skipped)


#: Not strict: control characters may stand in a string as they are (VT, FF).
_parse_json_at = json.JSONDecoder(strict=False).raw_decode


def _parse_object(data: bytes) -> dict[str, Any] | None:
    """-> the JSON object that `data` is; None if it is anything else."""
    text = data.decode("utf-8", "replace").strip(" \t\r\n")
    try:
        value, end = _parse_json_at(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and end == len(text) else None


def _parse_chunks(kind: str, data: bytes, state: _State) -> Iterator[dict[str, Any]]:
    """The JSON objects in an SSE event, or in a body that is none."""
    chunk = _parse_object(data)
    if kind is not _DATA:
        if chunk is not None and ("choices" in chunk or _is_error(chunk)):
            yield chunk
        elif data.strip() and state.fault is None:
            _check_body(kind, data, state.content_type)
    elif chunk is not None:
        yield chunk
    else:
        for line in data.split(b"\n"):  # several events without blank lines between
            chunk = _parse_object(line)
            if chunk is not None:
                yield chunk
            elif line.strip() and state.fault is None:  # else it is what was cut
                state.skipped += 1
                if state.strict:
                    text = line.decode("utf-8", "replace")
                    shown = f"expected a JSON object after data:, got {text[:200]!r}"
                    raise MalformedChunkError(shown, data=text)


def _check_body(kind: str, data: bytes, content_type: str) -> None:
    """Raise for a body that is no event stream; for lines beside SSE only if they are an
    error."""
    text = data.decode("utf-8", "replace").strip()
    parsed = _parse_json(text)
    if _is_error(_first_dict(parsed)):  # Gemini: [{"error": ...}]
        raise _server_error(data, parsed)
    if kind is _BODY:
        shown = content_type or "no content type"
        raise StreamError(f"expected an event stream, got {shown!r}: {text[:200]!r}")


def _is_error(chunk: dict[str, Any]) -> bool:
    """Whether the server reports an error with this chunk."""
    if chunk.get("error"):  # null, {}, "" and [] are no error
        return True
    if chunk.get("choices"):
        return False
    return (
        chunk.get("object") == "error"  # vLLM, Mistral
        or chunk.get("type") == "error"
        or bool(chunk.get("detail"))  # FastAPI
        or bool(_first_dict(chunk.get("base_resp")).get("status_code"))  # MiniMax
    )


def _server_error(data: bytes, parsed: Any = None) -> ServerError:
    text = data.decode("utf-8", "replace")
    raw = parsed if parsed is not None else _parse_json(text)
    if raw is None:
        raw = text
    message, code, kind = _describe_error(raw)
    message = message or text[:300]
    shown = f" (code {code})" if code is not None else ""
    return ServerError(
        f"the server reported an error inside its answer: {message}{shown}",
        message=message,
        code=code,
        type=kind,
        raw=raw,
    )


def _read_chunk(state: _State, chunk: dict[str, Any]) -> list[Event]:
    """-> the chunk's events; the rest of what it says goes to `state`.

    The functions below append to the list `events`.
    """
    events: list[Event] = []
    if not state.response_id:
        state.response_id = _str(chunk.get("id"))
    if not state.model:
        state.model = _str(chunk.get("model"))
    choices = chunk.get("choices")
    if isinstance(choices, list):
        for position, choice in enumerate(choices):
            if isinstance(choice, dict):
                index = choice.get("index")
                if type(index) is not int:  # Cloudflare sends none
                    index = position
                _read_choice(state, index, choice, events)
    _read_usage(state, _first_dict(chunk.get("x_groq")).get("usage"))
    _read_usage(state, chunk.get("usage"))
    return events


def _str(value: Any) -> str:
    return _replace_surrogates(value) if isinstance(value, str) else ""


def _read_choice(
    state: _State, index: int, data: dict[str, Any], events: list[Event]
) -> None:
    choice = state.choices.get(index)
    if choice is None:
        choice = state.choices[index] = _Choice(index)
    before = len(events)
    delta = data.get("delta")
    if delta and isinstance(delta, dict):
        _read_delta(state, choice, delta, events)
    elif isinstance(data.get("message"), dict) and not choice.streamed:
        # An answer in one piece: MiniMax's summary, or a server that ignores stream:true.
        _read_delta(state, choice, data["message"], events)
    if len(events) > before:
        choice.streamed = True
    reason = data.get("finish_reason")
    if reason and not choice.finish_reason:  # OpenRouter repeats it, with another one
        choice.finish_reason = _str(reason)
    _read_usage(state, data.get("usage"))  # Moonshot


def _read_usage(state: _State, data: Any) -> None:
    """The last that counts anything stands: many send zeros or null before or after."""
    if data and isinstance(data, dict):
        prompt = _first_dict(data.get("prompt_tokens_details"))
        completion = _first_dict(data.get("completion_tokens_details"))
        usage = Usage(
            _count(data, "prompt_tokens"),
            _count(data, "completion_tokens"),
            _count(data, "total_tokens"),
            _count(prompt, "cached_tokens")
            or _count(data, "prompt_cache_hit_tokens")  # DeepSeek
            or _count(data, "cached_tokens"),  # Moonshot
            _count(completion, "reasoning_tokens") or _count(data, "reasoning_tokens"),
        )
        if state.usage is None or any(vars(usage).values()):
            state.usage = usage


def _count(data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    if isinstance(value, float) and math.isfinite(value):
        return int(value)
    return value if type(value) is int else 0


def _read_delta(
    state: _State, choice: _Choice, delta: dict[str, Any], events: list[Event]
) -> None:
    """A delta, or a whole message, which has the same members."""
    _read_reasoning(state, choice, delta, events)
    content = delta.get("content")
    if content:
        if isinstance(content, str):
            _add_text(state, TextDelta, choice, content, events)
        elif isinstance(content, list):  # Mistral
            for part in content:
                _read_part(state, choice, part, events)
    refusal = delta.get("refusal")
    if refusal and isinstance(refusal, str):
        _add_text(state, RefusalDelta, choice, refusal, events)
    calls = delta.get("tool_calls")
    if calls and isinstance(calls, list):
        for call in calls:
            if isinstance(call, dict):
                _read_call(state, choice, call, events)
    elif isinstance(delta.get("function_call"), dict):
        # Before tools there was one function: call 0 (functionary, llama-cpp-python).
        call = {"index": 0, "function": delta["function_call"]}
        _read_call(state, choice, call, events)


def _read_reasoning(
    state: _State, choice: _Choice, delta: dict[str, Any], events: list[Event]
) -> None:
    """Servers name it in three ways, and some send the same text under two names."""
    extra = {
        name: value
        for name, value in delta.items()
        if name.startswith("reasoning")
        and value
        and isinstance(value, (str, list, dict))
    }
    if not extra:
        return
    text = ""
    for name in ("reasoning_content", "reasoning", "reasoning_details"):
        text = text or _find_texts(extra.get(name))
    text = _join_halves(state, (ReasoningDelta, choice.index, None), text)
    events.append(ReasoningDelta(text, choice.index, extra))


def _find_texts(value: Any, depth: int = 0) -> str:
    """The text in a str, in a part ({"text": ...}), or in a list of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and depth < 8:
        return "".join(_find_texts(item, depth + 1) for item in value)
    if isinstance(value, dict) and depth < 8:
        for name in ("text", "content", "thinking", "reasoning"):
            if value.get(name):
                return _find_texts(value[name], depth + 1)
    return ""


def _read_part(state: _State, choice: _Choice, part: Any, events: list[Event]) -> None:
    """A part of a content list: text parts are text, the others reasoning."""
    text = _find_texts(part)
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if text and kind in ("text", "output_text"):
        _add_text(state, TextDelta, choice, text, events)
    elif text:
        _add_text(state, ReasoningDelta, choice, text, events)


def _add_text(
    state: _State,
    kind: type[TextDelta] | type[ReasoningDelta] | type[RefusalDelta],
    choice: _Choice,
    text: str,
    events: list[Event],
) -> None:
    text = _join_halves(state, (kind, choice.index, None), text)
    if text:
        events.append(kind(text, choice.index))


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _join_halves(state: _State, key: _HalfKey, text: str) -> str:
    """Make `text` valid Unicode.

    Servers in JavaScript cut between the halves of a surrogate pair, in two escapes. The
    first half waits here for the second; one without the other becomes U+FFFD.
    """
    if key in state.halves and text:
        text = state.halves.pop(key) + text
    if text.isascii() or not _has_surrogate(text):
        return text
    if "\ud800" <= text[-1] <= "\udbff":
        state.halves[key] = text[-1]
        text = text[:-1]
    return _replace_surrogates(text)


def _replace_surrogates(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _flush_halves(state: _State) -> Iterator[Event]:
    """First halves whose second never came."""
    for kind, choice, call in state.halves:
        if call is None:
            yield kind("\ufffd", choice)
        else:
            yield kind(call.position, call.id, call.name, "\ufffd", None, choice)
    state.halves.clear()


def _read_call(
    state: _State, choice: _Choice, data: dict[str, Any], events: list[Event]
) -> None:
    """A tool-call delta: find its call, and add what it says."""
    function = _first_dict(data.get("function"))
    id = _str(data.get("id"))
    name = _str(function.get("name"))
    call = _find_call(choice, data.get("index"), id, name)
    is_named = bool(id and not call.id or name and not call.name)
    call.id = call.id or id
    call.name = call.name or name
    arguments = function.get("arguments")
    if isinstance(arguments, (dict, list)):  # Writer, early llama.cpp
        arguments = (
            "" if call.has_arguments else json.dumps(arguments, ensure_ascii=False)
        )
    if not isinstance(arguments, str):
        arguments = ""
    call.has_arguments = call.has_arguments or bool(arguments)
    arguments = _join_halves(state, (ToolCallDelta, choice.index, call), arguments)
    known = ("index", "id", "type", "function")
    extra = {k: v for k, v in data.items() if k not in known and v is not None}
    if is_named or arguments or extra:
        events.append(
            ToolCallDelta(
                call.position,
                call.id,
                call.name,
                arguments,
                extra or None,
                choice.index,
            )
        )


def _find_call(choice: _Choice, index: Any, id: str, name: str) -> _Call:
    """The call that a delta belongs to, or a new one.

    By its index; without one (older Mistral, Gemini, Ollama) by its id, or else the last
    one unless a name begins another. Ollama, Cerebras and Gemini send whole calls that
    all have index 0: there a name with a new id is a new call; so is another name without
    an id after arguments (LiteLLM for Ollama).
    """
    calls, by_index = choice.calls, choice.by_index
    call: _Call | None
    if type(index) is int:
        call = by_index.get(index)
    else:
        index = None
        call = next((c for c in calls if id and c.id == id), None)
        if call is None and calls and not name:
            call = calls[-1]
    if call is not None and name and call.name:
        if id:
            another = id != call.id
        else:
            another = call.has_arguments and name != call.name
        if another:
            call = None
    if call is None:
        call = _Call(len(calls))
        calls.append(call)
        if index is not None:
            by_index[index] = call
    return call


# --------------------------------------------------------------------------------------
# The shortcut: chunks that differ in one string from the chunk before
# --------------------------------------------------------------------------------------


# Most chunks are the chunk before with another string in them. Once that is proven for a
# chunk, those that follow need no JSON parser: data with the same bytes around a valid
# string literal is the same JSON but for that string, and so gives the same event but for
# its text. Any chunk that is read in full ends the use of the matcher, so that between
# learning and matching nothing has changed; and none is learned from a chunk whose second
# reading would differ from its first.

#: The data of a chunk -> its event, if it is like the chunk learned from; else None.
_Matcher = Callable[[bytes], Optional[Event]]

#: After so many matchers in a row that never matched, no more are learned.
_PATIENCE = 8

#: Members that OpenAI and others fill with random letters, against eavesdroppers.
_PADDING = ("obfuscation", "p")


def _is_plain(padding: bytes) -> bool:
    """Letters, digits and _: no escape, so that it is a string literal as it is."""
    return padding.isalnum() or padding.replace(b"_", b"").isalnum()


def _match_nothing(data: bytes) -> Event | None:
    return None


def _make_matcher(
    head: bytes, middle: bytes, tail: bytes, make: Callable[[str], Event]
) -> _Matcher:
    """Match head + string + tail, or head + string + middle + padding + tail."""
    fixed_size = len(head) + len(tail)

    def match(data: bytes) -> Event | None:
        inner = data.removeprefix(head).removesuffix(tail)
        if len(data) - len(inner) != fixed_size:
            return None
        if middle:
            inner, _, padding = inner.partition(middle)
            if not padding or not _is_plain(padding):
                return None
        try:
            text = inner.decode()
        except UnicodeDecodeError:
            return None
        if '"' in text or "\\" in text or not text.isprintable():
            # Escapes, or no valid literal at all: let the JSON parser say.
            literal = f'"{text}"'
            try:
                text, end = _parse_json_at(literal)
            except ValueError:
                return None
            if end != len(literal) or _has_surrogate(text):
                return None
        return make(text) if text else None

    return match


def _learn(data: bytes, chunk: dict[str, Any], events: list[Event]) -> _Matcher:
    """Cut `data`, the text of `chunk`, around the string of its only event.

    The cut is proven: with other strings in the holes it must parse to the same JSON but
    for those strings. Alters `chunk`, which nobody else has.
    """
    if len(events) != 1:
        return _match_nothing
    try:
        holder, key, make = _find_string(events[0], chunk["choices"][0]["delta"])
    except (LookupError, TypeError, AttributeError):  # its text came from elsewhere
        return _match_nothing
    literal = json.dumps(holder[key], ensure_ascii=False)[1:].encode()
    start = _find_literal(data, key)
    if start < 0 or not data.startswith(literal, start):
        return _match_nothing
    head, tail = data[:start], data[start + len(literal) - 1 :]
    middle, probe = b"", b"probe"
    holder[key] = "probe"
    for name in _PADDING:
        start = _find_literal(tail, name) if name in chunk else -1
        end = tail.find(b'"', start)
        if start >= 0 and _is_plain(tail[start:end]):
            middle, tail = tail[:start], tail[end:]
            probe += middle + b"probe"
            chunk[name] = "probe"
            break
    if _parse_object(head + probe + tail) != chunk:
        return _match_nothing
    return _make_matcher(head, middle, tail, make)


def _find_literal(data: bytes, key: str) -> int:
    """-> where the string of the first member `key` begins, behind its quote; or -1."""
    for form in (b'"%b":"', b'"%b": "'):
        start = data.find(form % key.encode())
        if start >= 0:
            return start + len(form) - 2 + len(key)
    return -1


_CALL_MEMBERS = {"tool_calls", "function_call"}


def _find_string(
    event: Event, delta: dict[str, Any]
) -> tuple[dict[str, Any], str, Callable[[str], Event]]:
    """-> where in its delta the event's text stands, and how to make such an event.

    Raises LookupError if it stands nowhere.
    """
    holder = delta
    if not isinstance(event, ToolCallDelta) and (delta.keys() & _CALL_MEMBERS):
        raise LookupError
    if isinstance(event, TextDelta):
        choice, key, text = event.choice, "content", event.text

        def make(text: str) -> Event:
            return TextDelta(text, choice)

    elif isinstance(event, ReasoningDelta) and event.extra and len(event.extra) == 1:
        choice, key, text = event.choice, next(iter(event.extra)), event.text

        def make(text: str) -> Event:
            return ReasoningDelta(text, choice, {key: text})

    elif isinstance(event, ToolCallDelta) and event.extra is None:
        call = delta["tool_calls"][0]
        holder, key, text = call["function"], "arguments", event.arguments
        choice, index, id, name = event.choice, event.index, event.id, event.name
        if type(call["index"]) is not int or holder.get("name"):
            raise LookupError  # read twice, it may begin a second call

        def make(text: str) -> Event:
            return ToolCallDelta(index, id, name, text, None, choice)

    else:
        raise LookupError
    if holder[key] != text or not text:
        raise LookupError
    return holder, key, make


# --------------------------------------------------------------------------------------
# Events -> messages
# --------------------------------------------------------------------------------------


class _Draft:
    """A message being assembled. Text is gathered in StringIOs: in linear time, and in no
    more memory than the text."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.content = io.StringIO(newline="")
        self.reasoning = io.StringIO(newline="")
        self.refusal = io.StringIO(newline="")
        self.extra: dict[str, Any] = {}
        self.calls: dict[int, ToolCall] = {}
        self.arguments: dict[int, io.StringIO] = {}

    def add_extra(self, extra: dict[str, Any]) -> None:
        for name, value in extra.items():
            known = self.extra.get(name)
            if isinstance(value, str):
                if not isinstance(known, io.StringIO):
                    known = self.extra[name] = io.StringIO(newline="")
                known.write(value)
            elif isinstance(value, list) and isinstance(known, list):
                known += value
            else:  # a member that changes its type: the last one stands
                self.extra[name] = list(value) if isinstance(value, list) else value

    def add_call(self, delta: ToolCallDelta) -> None:
        call = self.calls.get(delta.index)
        if call is None:
            call = self.calls[delta.index] = ToolCall("", "", "")
            self.arguments[delta.index] = io.StringIO(newline="")
        call.id = delta.id or call.id
        call.name = delta.name or call.name
        if delta.extra:
            call.extra.update(delta.extra)
        self.arguments[delta.index].write(delta.arguments)

    def finish(self, finish_reason: str | None) -> Message:
        calls = []
        taken = {""}
        for index, call in sorted(self.calls.items()):
            call.arguments = self.arguments[index].getvalue()
            if call.name or call.arguments:
                while call.id in taken:  # none sent (NIM), or another call's (DeepSeek)
                    call.id = f"call_{os.urandom(12).hex()}"
                taken.add(call.id)
                calls.append(call)
        return Message(
            content=self.content.getvalue(),
            reasoning=self.reasoning.getvalue(),
            refusal=self.refusal.getvalue(),
            tool_calls=tuple(calls),
            finish_reason=finish_reason,
            choice=self.choice,
            extra={
                name: _replace_surrogates(value.getvalue())
                if isinstance(value, io.StringIO)
                else value
                for name, value in self.extra.items()
            },
        )


def _aggregate(events: Iterator[Event], deltas: bool) -> Generator[Event, None, None]:
    """The first event is a dummy, which aggregate() takes: a generator that was never
    started runs no `finally`, and `events` is to be closed in any case."""
    drafts: dict[int, _Draft] = {}

    def draft(choice: int) -> _Draft:
        if choice not in drafts:
            drafts[choice] = _Draft(choice)
        return drafts[choice]

    def finish(reasons: Mapping[int, str]) -> list[Message]:
        messages = [drafts[c].finish(reasons.get(c)) for c in sorted(drafts)]
        drafts.clear()
        return [
            m for m in messages if m.content or m.reasoning or m.refusal or m.tool_calls
        ]

    try:
        yield Completed()  # the dummy
        for event in events:
            if isinstance(event, TextDelta):
                draft(event.choice).content.write(event.text)
            elif isinstance(event, ReasoningDelta):
                draft(event.choice).reasoning.write(event.text)
                if event.extra:
                    draft(event.choice).add_extra(event.extra)
            elif isinstance(event, RefusalDelta):
                draft(event.choice).refusal.write(event.text)
            elif isinstance(event, ToolCallDelta):
                draft(event.choice).add_call(event)
            elif isinstance(event, Completed):
                yield from finish(event.finish_reasons)
            if deltas or isinstance(event, (Completed, Message)):
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


def _parse_args(argv: list[str] | None) -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="chatstream",
        description="Stream a chat completion: its text to stdout, all else to stderr.",
        epilog="""\
examples:
  chatstream --demo "hello"                     a real answer, with no key and no network
  chatstream -m gpt-4o-mini "Why is the sky blue?"
  chatstream -p ollama -m llama3.2 < question.txt

exit status: 0 done; 1 an error; 2 a wrong argument; 3 the answer ended early
(no finish_reason, length, content_filter); 130 interrupted""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="none, or -: standard input")
    add("-m", "--model", help="default: the environment variable CHATSTREAM_MODEL")
    add("-p", "--provider", help=f"one of {', '.join(PROVIDERS)}")
    add("-u", "--base-url", help="another server, such as http://localhost:8080/v1")
    add("--key-env", metavar="NAME", help="environment variable that holds the API key")
    add("-i", "--instructions", help="a leading system message")
    add("--json", action="store_true", help="one JSON object per event and line")
    add(
        "--demo", action="store_true", help="answer from a small server in this process"
    )
    add("--version", action="version", version=f"chatstream {__version__}")
    args = parser.parse_args(argv)
    args.model = args.model or os.environ.get("CHATSTREAM_MODEL")
    if not args.model and not args.demo:
        parser.error("no model: give -m MODEL or set CHATSTREAM_MODEL")
    if args.key_env and not os.environ.get(args.key_env):
        parser.error(f"--key-env: the environment variable {args.key_env} is not set")
    return args


def _main(argv: list[str] | None = None) -> int:
    """The command `chatstream`. -> exit status."""
    if sys.stderr is None:  # closed by the shell (2>&-)
        sys.stderr = io.StringIO()
    for output in (sys.stdout, sys.stderr):  # an ASCII terminal must not end the answer
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")
    try:
        return _answer_command(_parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has enough (`| head -1`). Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _answer_command(args: Any) -> int:
    prompt = " ".join(  # UTF-8 whatever the locale
        os.fsencode(word).decode("utf-8", "replace") for word in args.prompt
    )
    if prompt in ("", "-"):
        read = sys.stdin.buffer.read() if sys.stdin else b""
        prompt = read.decode("utf-8", "replace").rstrip("\r\n")
    if args.demo:
        os.environ["no_proxy"] = "*"
        args.base_url, args.provider = _serve_demo(), None
    try:
        events = stream(
            prompt,
            model=args.model or "demo",
            instructions=args.instructions,
            provider=args.provider,
            base_url=args.base_url,
            api_key=os.environ[args.key_env] if args.key_env else None,
        )
        return _show_json(events) if args.json else _show_text(events)
    except ChatStreamError as error:
        if args.json:
            shown = {
                "event": "error",
                "type": type(error).__name__,
                "message": str(error),
            }
            print(json.dumps(shown), flush=True)
        print(f"chatstream: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError) as error:
        print(f"chatstream: {error}", file=sys.stderr)
        return 2


def _show_text(events: Iterable[Event]) -> int:
    dim, normal = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    last = "\n"  # what stdout ends with
    finish_reason = None
    for event in aggregate(events, deltas=True):
        if isinstance(event, TextDelta):
            last = event.text
            print(last, end="", flush=True)
        elif isinstance(event, (ReasoningDelta, RefusalDelta)):
            print(f"{dim}{event.text}{normal}", end="", file=sys.stderr, flush=True)
        elif isinstance(event, Message):
            if event.reasoning or event.refusal:
                print(file=sys.stderr)
            for call in event.tool_calls:
                print(f"tool call: {call.name}({call.arguments})", file=sys.stderr)
        elif isinstance(event, Completed):
            finish_reason = event.finish_reason
    if not last.endswith("\n"):
        print(flush=True)
    return _exit_status(finish_reason)


def _show_json(events: Iterable[Event]) -> int:
    from dataclasses import asdict

    finish_reason = None
    for event in events:
        print(json.dumps({"event": type(event).__name__, **asdict(event)}), flush=True)
        if isinstance(event, Completed):
            finish_reason = event.finish_reason
    return _exit_status(finish_reason)


def _exit_status(finish_reason: str | None) -> int:
    if finish_reason not in (None, "length", "content_filter"):
        return 0
    why = finish_reason or "no finish_reason"
    print(f"chatstream: the answer ended early ({why})", file=sys.stderr)
    return 3


def _serve_demo() -> str:
    """Start a chat-completions server of a few lines on loopback. -> its base URL."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            prompt = json.loads(self.rfile.read(length))["messages"][-1]["content"]
            answer = (
                f"You said: {prompt.strip()}\nEach word came as an event of its own."
            )
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for word in re.findall(r"\s*\S+", answer):
                self.send_event({"index": 0, "delta": {"content": word}})
                time.sleep(0.05)
            self.send_event({"index": 0, "delta": {}, "finish_reason": "stop"})
            self.send_chunk(b"data: [DONE]\n\n")
            self.send_chunk(b"")

        def send_event(self, choice: dict[str, Any]) -> None:
            chunk = {"id": "demo-1", "model": "demo", "choices": [choice]}
            self.send_chunk(b"data: %b\n\n" % json.dumps(chunk).encode())

        def send_chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
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
