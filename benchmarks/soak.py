"""A minute of faults: 200 threads stream at 50 events/s from a server that misbehaves.

    python benchmarks/soak.py [--threads 200] [--seconds 40] [--pool]

Exit status 1 if an answer was neither complete and right nor an error with a right
beginning, if a thread hangs, more descriptors are open than threads may keep, or memory
grows. --pool: through a urllib3 PoolManager.
"""

import argparse
import asyncio
import collections
import contextlib
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
import chatstream

EVENTS, PAUSE, IDLE_TIMEOUT = 50, 0.02, 2.0  # of one answer; seconds between two events
TEXT = "".join(f"word{n} " for n in range(EVENTS))
#: Each as often as it stands here; those with a number are a reply's status.
FAULTS = "comments broken late open unmarked reset-before-headers close-before-headers"
FAULTS += " 429 500 stalled-500 cut reset garbage silence error" + 8 * " none"
FAULTS = FAULTS.split()
BAD = {"error": 'data: {"error":{"message":"soaked"}}\n\n', "broken": 'data: {"bro\n\n'}
EVENT = 'data: {"id":"s","choices":[{"index":0,"delta":{%s},"finish_reason":%s}]}\n\n'


async def answer(reader, writer, fault):
    """Play one fault. -> whether the connection may go on."""

    def send(text):
        writer.write(f"{len(text):x}\r\n{text}\r\n".encode())

    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().split(b"length:")[1].split()[0]))
    if "before-headers" in fault:
        return writer.transport.abort() if fault.startswith("reset") else False
    if fault[-3:] in ("429", "500"):
        stalls = fault.startswith("stalled")
        head = f"HTTP/1.1 {fault[-3:]} No\r\nContent-Length: {99 if stalls else 2}\r\n"
        writer.write(f"{head}retry-after-ms: 20\r\n\r\n{{}}".encode())
        await asyncio.sleep(20 if stalls else 0)
        return not stalls
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    breaks_at = random.randrange(EVENTS)
    for number in range(EVENTS):
        if number == breaks_at and fault in ("cut", "reset", "garbage", "silence"):
            writer.write(b"zz\r\n" if fault == "garbage" else b"")
            await asyncio.sleep(IDLE_TIMEOUT * 3 if fault == "silence" else 0)
            return writer.transport.abort() if fault == "reset" else False
        if number == breaks_at and fault in BAD:
            send(BAD[fault])
        if fault == "comments":
            send(": still there\n\n")
        send(EVENT % (f'"content":"word{number} "', "null"))
        await writer.drain()
        await asyncio.sleep(PAUSE)
    send(EVENT % ("", '"stop"') + "data: [DONE]\n\n" * (fault != "unmarked"))
    await asyncio.sleep({"open": 5, "late": 0.02}.get(fault, 0))
    writer.write(b"0\r\n\r\n")
    return fault != "open"


async def connection(reader, writer):
    with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
        while await answer(reader, writer, random.choice(FAULTS)):
            await writer.drain()


async def serve(port):
    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1000)
    port.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def stream_until(end, outcomes, options):
    while time.monotonic() < end:
        text, name = "", ""
        try:
            events = chatstream.stream("x", model="m", **options)
            for ev in chatstream.aggregate(events, deltas=True):
                text += ev.text if isinstance(ev, chatstream.TextDelta) else ""
            name = "complete" if text == TEXT and ev.skipped <= 1 else "WRONG"
        except chatstream.ChatStreamError as error:
            partial = "".join(message.content for message in error.partial)
            is_right = TEXT.startswith(text) and partial == text
            name = type(error).__name__ + " WRONG" * (not is_right)
        except BaseException as error:
            name = f"WRONG {error!r}"
        outcomes[name] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--pool", action="store_true")
    args = parser.parse_args()
    logging.getLogger("chatstream").setLevel(logging.ERROR)
    fork = multiprocessing.get_context("fork")
    port = fork.Queue()
    fork.Process(target=lambda: asyncio.run(serve(port)), daemon=True).start()
    url = f"http://127.0.0.1:{port.get(timeout=10)}/v1"
    options = {"base_url": url, "idle_timeout": IDLE_TIMEOUT}
    if args.pool:
        import urllib3

        options["pool"] = urllib3.PoolManager(maxsize=args.threads)
    before, outcomes = len(os.listdir("/proc/self/fd")), collections.Counter()
    end = time.monotonic() + args.seconds
    job = {"target": stream_until, "args": (end, outcomes, options), "daemon": True}
    threads = [threading.Thread(**job) for _ in range(args.threads)]
    for thread in threads:
        thread.start()
    time.sleep(args.seconds / 2)
    halfway = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for thread in threads:
        thread.join(max(1.0, end + 25 - time.monotonic()))
    hanging = sum(thread.is_alive() for thread in threads)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - halfway
    kept = len(os.listdir("/proc/self/fd")) - before
    for name, count in outcomes.most_common():
        print(f"{count:7} {name}")
    print(f"hanging threads {hanging}; connections kept {kept}; grown by {grown} KiB")
    is_wrong = any("WRONG" in name for name in outcomes) or not outcomes["complete"]
    return int(is_wrong or hanging > 0 or kept > args.threads or grown > 8 * 1024)


if __name__ == "__main__":
    sys.exit(main())
