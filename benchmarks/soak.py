"""A minute of faults: 200 threads stream at 50 events/s from a server that misbehaves.

    python benchmarks/soak.py [--threads 200] [--seconds 40] [--no-urllib3]

The server, in a process of its own, picks a fault for each request at random: resets,
refusals, cuts, silence, drips, broken chunks, errors inside the answer. At the end every
answer must have been complete and right, or an error with a right beginning; no thread may
hang, no descriptor leak, memory stay flat. Exit status 1 if anything was otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import json
import logging
import multiprocessing
import os
import pathlib
import random
import resource
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

EVENTS = 50  # of one answer
PAUSE = 0.02  # between two events
IDLE_TIMEOUT = 2.0
WORDS = [f"word{n} " for n in range(EVENTS)]
TEXT = "".join(WORDS)

#: (how often, fault)
FAULTS = {
    "none": 40,
    "late terminator": 5,
    "stays open after [DONE]": 5,
    "no [DONE]": 5,
    "comments": 5,
    "broken chunk": 5,
    "reset before headers": 5,
    "close before headers": 5,
    "429": 5,
    "500": 5,
    "stalled error body": 1,
    "cut": 5,
    "reset": 5,
    "garbage chunk size": 3,
    "silence": 3,
    "error in the stream": 3,
}


def event(delta: dict, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "soak", "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(chunk).encode()


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answer(fault: str, writer: asyncio.StreamWriter) -> bool:
    """Play one fault. -> whether the connection may go on."""
    if fault == "reset before headers":
        writer.transport.abort()
        return False
    if fault == "close before headers":
        return False
    if fault in ("429", "500", "stalled error body"):
        status = "429 Slow" if fault == "429" else "500 Oops"
        length = 99 if fault == "stalled error body" else 2
        head = f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nretry-after-ms: 20\r\n\r\n"
        writer.write(head.encode() + b"{}")
        if fault == "stalled error body":
            await asyncio.sleep(20)
        return fault != "stalled error body"
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    breaks_at = random.randrange(EVENTS)
    for number, word in enumerate(WORDS):
        if number == breaks_at:
            if fault == "cut":
                return False
            if fault == "reset":
                writer.transport.abort()
                return False
            if fault == "garbage chunk size":
                writer.write(b"zz\r\n")
                return False
            if fault == "silence":
                await asyncio.sleep(IDLE_TIMEOUT * 3)
                return False
            if fault == "error in the stream":
                writer.write(framed(b'data: {"error":{"message":"soaked"}}\n\n'))
            if fault == "broken chunk":
                writer.write(framed(b'data: {"broken\n\n'))
        if fault == "comments":
            writer.write(framed(b": still there\n\n"))
        writer.write(framed(event({"content": word})))
        await writer.drain()
        await asyncio.sleep(PAUSE)
    writer.write(framed(event({}, "stop")))
    if fault != "no [DONE]":
        writer.write(framed(b"data: [DONE]\n\n"))
    if fault == "stays open after [DONE]":
        await asyncio.sleep(5)
        return False
    if fault == "late terminator":
        await asyncio.sleep(0.02)
    writer.write(b"0\r\n\r\n")
    return True


async def connection(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        going_on = True
        while going_on:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            fault = random.choices(list(FAULTS), list(FAULTS.values()))[0]
            going_on = await answer(fault, writer)
            await writer.drain()
    except (OSError, EOFError):
        pass  # the client left
    finally:
        writer.close()


def serve(port: multiprocessing.Queue) -> None:
    async def main() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1000)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def stream_until(deadline: float, url: str, outcomes: collections.Counter) -> None:
    import chatstream

    while time.monotonic() < deadline:
        text, skipped = "", 0
        try:
            events = chatstream.stream(
                "x", model="m", base_url=url, idle_timeout=IDLE_TIMEOUT
            )
            for ev in chatstream.aggregate(events, deltas=True):
                if isinstance(ev, chatstream.TextDelta):
                    text += ev.text
                elif isinstance(ev, chatstream.Completed):
                    skipped = ev.skipped
            right = text == TEXT and skipped <= 1
            outcomes["complete and right" if right else "WRONG"] += 1
        except chatstream.ChatStreamError as error:
            partial = "".join(m.content for m in error.partial)
            right = TEXT.startswith(text) and partial == text
            name = type(error).__name__
            outcomes[name if right else f"WRONG after {name}"] += 1
        except BaseException as error:
            outcomes[f"STRAY {type(error).__name__}: {error}"] += 1


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--no-urllib3", action="store_true")
    args = parser.parse_args()
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        del os.environ[name]
    if args.no_urllib3:
        sys.modules["urllib3"] = None  # type: ignore[assignment]
    import chatstream

    logging.getLogger("chatstream").setLevel(logging.ERROR)
    port: multiprocessing.Queue = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get(timeout=10)}/v1"
    before = descriptors()
    outcomes: collections.Counter = collections.Counter()
    deadline = time.monotonic() + args.seconds
    threads = [
        threading.Thread(
            target=stream_until, args=(deadline, url, outcomes), daemon=True
        )
        for _ in range(args.threads)
    ]
    for thread in threads:
        thread.start()
    time.sleep(args.seconds / 2)
    halfway = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for thread in threads:
        thread.join(max(1.0, deadline + 25 - time.monotonic()))
    hanging = sum(thread.is_alive() for thread in threads)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - halfway
    idle = descriptors() - before  # kept for reuse
    chatstream._shared_pool.cache_clear()
    gc.collect()
    leaked = descriptors() - before
    server.terminate()
    for name, count in outcomes.most_common():
        print(f"{count:7} {name}")
    print(f"hanging threads {hanging}, idle connections kept {idle}")
    print(f"leaked descriptors {leaked}, memory grown since halfway {grown} KiB")
    wrong = any(name.startswith(("WRONG", "STRAY")) for name in outcomes)
    return int(wrong or hanging > 0 or leaked > 0 or grown > 8 * 1024)


if __name__ == "__main__":
    sys.exit(main())
