"""What chatstream and its peers cost a client: CPU, memory, import, cold start.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/bench.py [--quick] [--only SCENARIO] [--rounds N]
                               [--plot FILE.svg] [--json FILE]

A server in a process of its own sends answers made beforehand, over loopback. Each
contender runs in a process of its own too. They take turns of a fraction of a second, in
random order, so that a slow moment of the machine strikes all of them. The figures are
medians of the CPU time (user + system) of a turn. Those of two machines, or of two runs,
do not compare; the ratios within one turn do, and a target is compared with their median.
(For cold starts it is the ratio of the means: two of them have no moment in common, and
they are spread so evenly over a wide range that a median hits its middle less well.) A
full run takes a quarter of an hour.

Scenarios, all with chunks like OpenAI's:

    bulk         64 events in one HTTP chunk
    single       one HTTP chunk per event, many in a TCP segment
    tools        four tool calls in fragments, framed as single
    segments     one HTTP chunk and one TCP segment per event
    keepalive    requests of 20 events, one after the other
    import       CPU of the imports, over a bare interpreter
    cold         CPU of a new process up to the first text

And limits that chatstream sets itself:

    obfuscation  single, with OpenAI's random member in each chunk
    big          one event of 8 MiB in HTTP chunks of 1 KiB
    flat         CPU per event of answers of 1,000 to 400,000 events
    aggregate    what aggregate() adds
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from functools import cache

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REQUEST = {
    "model": "m",
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
}

# --------------------------------------------------------------------------------------
# The contenders: URL -> a function that asks once and iterates over what it gets.
# Each stands alone, because the cold start runs its source in a bare interpreter.
# --------------------------------------------------------------------------------------


def naive(url):
    import json

    import urllib3

    pool = urllib3.PoolManager()

    def ask():
        path = url + "/chat/completions"
        response = pool.request("POST", path, json=REQUEST, preload_content=False)
        rest = b""
        while block := response.read1(65536):
            *events, rest = (rest + block).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    yield json.loads(event[6:])
        response.release_conn()

    return ask


def http_client(url):
    import http.client
    import json

    host, _, path = url.partition("//")[2].partition("/")
    connection = http.client.HTTPConnection(host)
    headers = {"Content-Type": "application/json"}

    def ask():
        body = json.dumps(REQUEST)
        connection.request("POST", f"/{path}/chat/completions", body, headers)
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])

    return ask


def httpx_sse(url):
    import httpx
    import httpx_sse

    client = httpx.Client(timeout=None)

    def ask():
        path = url + "/chat/completions"
        with httpx_sse.connect_sse(client, "POST", path, json=REQUEST) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield event.json()

    return ask


def sseclient(url):
    import json

    import requests
    import sseclient

    session = requests.Session()

    def ask():
        path = url + "/chat/completions"
        with session.post(path, json=REQUEST, stream=True) as response:
            for event in sseclient.SSEClient(response).events():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    return ask


def openai_create(url):
    import openai

    client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)
    return lambda: client.chat.completions.create(**REQUEST)


def openai_stream(url):
    import openai

    client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)

    def ask():
        stream = client.chat.completions.stream
        with stream(model="m", messages=REQUEST["messages"]) as events:
            for event in events:
                if event.type == "chunk":
                    yield event.chunk

    return ask


def pooled(url):
    import chatstream

    return lambda: chatstream.stream("Hi", model="m", base_url=url)


def bare(url):
    import sys

    sys.modules["urllib3"] = None  # as if it were not installed
    import chatstream

    return lambda: chatstream.stream("Hi", model="m", base_url=url)


#: name: (label, what it yields, what it imports, the distributions it needs)
CONTENDERS = {
    "pooled": ("chatstream (urllib3)", "events", "chatstream", "urllib3"),
    "bare": ("chatstream (http.client)", "events", "chatstream", ""),
    "naive": ("naive loop (urllib3)", "dicts", "json, urllib3", "urllib3"),
    "http_client": ("naive loop (http.client)", "dicts", "json, http.client", ""),
    "httpx_sse": ("httpx + httpx-sse", "dicts", "httpx, httpx_sse", "httpx httpx-sse"),
    "sseclient": (
        "requests + sseclient-py",
        "dicts",
        "requests, sseclient",
        "requests sseclient-py",
    ),
    "openai_create": ("openai create()", "objects", "openai", "openai"),
    "openai_stream": ("openai .stream()", "objects", "openai", "openai"),
}


def collect_dicts(chunks):
    """-> pieces of text, and per tool call its id, name and pieces of arguments."""
    texts, calls = [], {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("content"):
                texts.append(delta["content"])
            for call in delta.get("tool_calls") or ():
                function = call["function"]
                if "id" in call:
                    calls[call["index"]] = [call["id"], function["name"]]
                calls[call["index"]].append(function["arguments"])
    return texts, calls


def collect_objects(chunks):
    texts, calls = [], {}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            if delta.content:
                texts.append(delta.content)
            for call in delta.tool_calls or ():
                if call.id:
                    calls[call.index] = [call.id, call.function.name]
                calls[call.index].append(call.function.arguments)
    return texts, calls


def collect_events(events):
    from chatstream import TextDelta, ToolCallDelta

    texts, calls = [], {}
    for event in events:
        if isinstance(event, TextDelta):
            texts.append(event.text)
        elif isinstance(event, ToolCallDelta):
            if event.index not in calls:
                calls[event.index] = [event.id, event.name]
            calls[event.index].append(event.arguments)
    return texts, calls


def digest(texts, calls):
    whole = ["".join(texts), {str(k): "".join(v) for k, v in calls.items()}]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


# --------------------------------------------------------------------------------------
# The answers and their server
# --------------------------------------------------------------------------------------

#: Pieces like those of a tokenizer; one in ten has escapes, one in ten is not ASCII.
WORDS = re.findall(
    r"\s*\S{1,7}",
    " the sky is blue because sunlight scatters off air molecules, and of that light"
    " the shorter wavelengths more than red.\n\n So-called Rayleigh scattering:\n-"
    ' "violet" 空は青い naïve café 🙂 at noon.\n- "red" at dusk.\n\n',
)
FRAGMENTS = ['{"', "city", '":"', "Lis", "bon", '","', "days", '":[', "1,", "2", "]}"]


def deltas(scenario, count):
    """The deltas between the first and the last chunk of an answer."""
    rng = random.Random(7)
    if scenario == "big":
        yield {"content": "x" * count}
    for i in range(count if scenario != "big" else 0):
        if scenario != "tools":
            yield {"content": rng.choice(WORDS)}
            continue
        index, position = divmod(i, math.ceil(count / 4))
        call = {"index": index}
        if position:
            call["function"] = {"arguments": FRAGMENTS[position % len(FRAGMENTS)]}
        else:
            call.update(id=f"call_{index}", type="function")
            call["function"] = {"name": f"weather_{index}", "arguments": ""}
        yield {"tool_calls": [call]}


@cache
def expected(scenario, count):
    chunks = ({"choices": [{"delta": delta}]} for delta in deltas(scenario, count))
    return digest(*collect_dicts(chunks))


#: What all chunks have in common.
CHUNK = {
    "id": "chatcmpl-CfzVbT3uQ0aKkq4J1m8yWn2XrLs6d",
    "object": "chat.completion.chunk",
    "created": 1764000000,
    "model": "gpt-4o-mini-2024-07-18",
    "service_tier": "default",
    "system_fingerprint": "fp_560af6e559",
}


def sse(scenario, count):
    """The SSE events of an answer, as bytes."""
    rng = random.Random(8)

    def event(delta, reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**CHUNK, "choices": [choice]}
        if scenario == "obfuscation":
            letters = rng.choices("abcdefghABCDEFGH0123456789", k=rng.randint(4, 14))
            chunk["obfuscation"] = "".join(letters)
        text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        return f"data: {text}\n\n".encode()

    yield event({"role": "assistant", "content": "", "refusal": None})
    yield from map(event, deltas(scenario, count))
    yield event({}, "tool_calls" if scenario == "tools" else "stop")
    yield b"data: [DONE]\n\n"


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def http_chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


@cache
def bake(scenario, count):
    """A whole reply."""
    events = list(sse(scenario, count))
    if scenario == "bulk":
        pieces = [b"".join(events[i : i + 64]) for i in range(0, len(events), 64)]
    elif scenario == "big":
        body = b"".join(events)
        pieces = [body[i : i + 1024] for i in range(0, len(body), 1024)]
    else:
        pieces = events
    return HEAD + b"".join(map(http_chunk, pieces)) + b"0\r\n\r\n"


@cache
def segments(count):
    return [HEAD, *map(http_chunk, sse("segments", count)), b"0\r\n\r\n"]


def receive_path(connection):
    """Read a request. -> its path; "" when there is no more."""
    data = b""
    with suppress(ConnectionResetError):
        while b"\r\n\r\n" not in data:
            block = connection.recv(65536)
            if not block:
                return ""
            data += block
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        while len(body) < length:
            body += connection.recv(65536)
        return head.split()[1].decode()
    return ""


def serve_connection(connection):
    path = receive_path(connection)
    while path:
        _, scenario, count, *_ = path.split("/")
        with suppress(ConnectionError):  # the client was too slow, and is gone
            if scenario == "segments":
                for segment in segments(int(count)):
                    connection.sendall(segment)
            else:
                connection.sendall(bake(scenario, int(count)))
        path = receive_path(connection)
    connection.close()


def serve():
    """Until our parent closes our stdin, or dies."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)

    def accept():
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(
                target=serve_connection, args=(connection,), daemon=True
            ).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


# --------------------------------------------------------------------------------------
# What runs in a process of its own, and prints one JSON object
# --------------------------------------------------------------------------------------


def peak_rss():
    """MiB of this process, at most."""
    if sys.platform == "linux":  # whose ru_maxrss begins with that of the parent
        with open("/proc/self/status") as status:
            return int(status.read().partition("VmHWM:")[2].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run_requests(name, url):
    """Ask as often as each line of stdin says, and print the CPU seconds per request."""
    ask = globals()[name](url)
    collect = globals()["collect_" + CONTENDERS[name][1]]
    for line in sys.stdin:
        start = time.process_time()
        answers = [collect(ask()) for _ in range(int(line))]
        cpu = (time.process_time() - start) / len(answers)
        digests = sorted({digest(*answer) for answer in answers})
        report = {"cpu": cpu, "rss": peak_rss(), "digests": digests}
        print(json.dumps(report), flush=True)


def run_flat(url, count):
    """CPU us per event of answers of several lengths, up to `count` events.

    A piece of each in turn, so that a slow moment of the machine strikes all alike.
    """
    import chatstream

    def answers(length):
        while True:
            yield from chatstream.stream(
                "Hi", model="m", base_url=f"{url}/single/{length}"
            )

    streams = {length: answers(length) for length in FLAT if length <= int(count)}
    costs = dict.fromkeys(streams, 0.0)
    pieces = int(count) // 1_000
    for _ in range(pieces):
        for length, events in streams.items():
            piece = min(1_000, 20 * length)
            start = time.process_time()
            for _ in itertools.islice(events, piece):
                pass
            costs[length] += (time.process_time() - start) / piece
    return {length: cost / pieces * 1e6 for length, cost in costs.items()}


def run_memory(url, count):
    """Peak memory, when nothing is kept."""
    import chatstream

    for _ in chatstream.stream("Hi", model="m", base_url=f"{url}/single/{count}"):
        pass
    return {"rss": peak_rss()}


def run_aggregate(count):
    """us per event that aggregate() adds, and its peak memory per byte of text."""
    import tracemalloc

    import chatstream

    def cost(function):
        events = [chatstream.TextDelta(" word") for _ in range(int(count))]
        start = time.process_time()
        for _ in function(iter(events)):
            pass
        return (time.process_time() - start) / len(events) * 1e6

    aggregate = chatstream.aggregate
    extra = [cost(aggregate) - cost(lambda events: events) for _ in range(5)]
    tracemalloc.start()
    for _ in aggregate(chatstream.TextDelta(" word") for _ in range(int(count))):
        pass
    peak = tracemalloc.get_traced_memory()[1] / (5 * int(count))
    return {"extra": statistics.median(extra), "peak": peak}


COLD = """
{source}
import os, sys, time
REQUEST = {request}
for item in {name}(sys.argv[1])():
    if {first}:
        break
print(time.process_time(), flush=True)
os._exit(0)
"""
FIRST = {
    "events": "item.text",
    "dicts": 'item["choices"][0]["delta"].get("content")',
    "objects": "item.choices[0].delta.content",
}
IMPORT = """
import time
start = time.process_time()
import {modules}
print(time.process_time() - start)
"""


def start_python(*args):
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    for name in ("PYTHONDONTWRITEBYTECODE", "OPENAI_BASE_URL"):
        env.pop(name, None)
    env["PYTHONPATH"] = ROOT
    command = [sys.executable, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe)


def python(*args):
    """Run a Python process. -> what it prints, as JSON."""
    process = start_python(*args)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{args[:3]} failed")
    return json.loads(output)


def child(function, *args):
    return python(__file__, "--child", function, *args)


class Contender:
    """A process of `run_requests`."""

    def __init__(self, name, url):
        self.name = name
        self.url = url
        self.process = start_python(__file__, "--child", "run_requests", name, url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def ask(self, requests, timeout=None):
        """-> the report; None if it takes longer than `timeout` seconds."""
        with suppress(BrokenPipeError):  # it ended: that is said below
            self.process.stdin.write(b"%d\n" % requests)
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            return None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}, {self.url}: failed")
        report = json.loads(line)
        _, scenario, count = self.url.rsplit("/", 2)
        if report["digests"] != [expected(scenario, int(count))]:
            raise SystemExit(
                f"{self.name}, {self.url}: not the text or tool calls sent"
            )
        return report


# --------------------------------------------------------------------------------------
# Rounds
# --------------------------------------------------------------------------------------

#: scenario: (events of a request (big: bytes), requests of a turn, the same for openai,
#: unit, how many of it are a second)
LOADS = {
    "bulk": (10_000, 1, 1_000, 1, "us/event", 1e6),
    "single": (10_000, 1, 1_000, 1, "us/event", 1e6),
    "tools": (10_000, 1, 1_000, 1, "us/event", 1e6),
    "segments": (2_000, 2, 500, 1, "us/event", 1e6),
    "obfuscation": (10_000, 1, 1_000, 1, "us/event", 1e6),
    "keepalive": (20, 60, 20, 6, "ms/request", 1e3),
    "big": (8 << 20, 1, 8 << 20, 1, "ms", 1e3),
}
#: Turns of a round, in one of three of which openai takes part, too; and cold starts of
#: those that targets are about, since starts are far from even.
TURNS, STARTS = 18, 500
FLAT = (20, 1_000, 10_000, 100_000, 400_000)
ONCE = ("flat", "aggregate")
SCENARIOS = (*LOADS, "import", "cold", *ONCE)


class Bench:
    """The samples of a run: scenario -> row -> list of figures."""

    def __init__(self, port, contenders, quick):
        self.url = f"http://127.0.0.1:{port}"
        self.contenders = contenders
        self.quick = quick
        self.samples = {}

    def add(self, scenario, row, figure):
        self.samples.setdefault(scenario, {}).setdefault(row, []).append(figure)

    def median(self, scenario, row="pooled"):
        figures = self.samples.get(scenario, {}).get(row, ())
        figures = [figure for figure in figures if not math.isnan(figure)]
        return statistics.median(figures) if figures else math.nan

    def ratio(self, scenario, row, other):
        """Of each turn, and of them the median: a slow moment of the machine has both.

        Of starts, which have no turn in common with others, that of their means: of 1,000
        its standard error is 0.7 %, that of the ratio of their medians 1.2 %.
        """
        samples = self.samples.get(scenario, {})
        if scenario == "cold" and samples:
            return statistics.mean(samples[row]) / statistics.mean(samples[other])
        pairs = zip(samples.get(row, ()), samples.get(other, ()))
        ratios = [a / b for a, b in pairs if not math.isnan(a / b)]
        return statistics.median(ratios) if ratios else math.nan

    def run(self, scenario):
        if scenario in ONCE:
            getattr(self, scenario)()
        elif scenario == "big":
            for name in self.shuffled():
                self.big(name)
        elif scenario in LOADS:
            self.load(scenario)
        else:
            for number in range(1 if self.quick else STARTS):
                for name in self.shuffled():
                    if number < self.starts(scenario, name):
                        self.start(scenario, name)

    def shuffled(self):
        """The contenders: none is always the one after the heaviest."""
        return random.sample(self.contenders, len(self.contenders))

    def starts(self, scenario, name):
        if name.startswith("openai"):  # which takes long
            return 1
        has_target = scenario == "cold" and name in ("pooled", "bare", "naive")
        return STARTS if has_target else TURNS

    def load(self, scenario):
        with ExitStack() as stack:
            turns = {}
            for name in self.contenders:
                count, requests, *fewer, unit, scale = LOADS[scenario]
                if name.startswith("openai"):
                    count, requests = fewer
                contender = Contender(name, f"{self.url}/{scenario}/{count}")
                stack.enter_context(contender).ask(1)  # to warm up
                events = count if unit == "us/event" else 1
                turns[name] = contender, requests, scale / events
            for turn in range(3 if self.quick else TURNS):
                for name in self.shuffled():
                    if name.startswith("openai") and turn % 3:
                        self.add(scenario, name, math.nan)
                        continue
                    contender, requests, scale = turns[name]
                    report = contender.ask(requests)
                    self.add(scenario, name, report["cpu"] * scale)
                    if scenario == "single":
                        self.add("memory", name, report["rss"])

    def big(self, name):
        """In a new process each: some take so long that they are asked but once."""
        if math.isinf(self.median("big", name)):
            return
        count, *_, scale = LOADS["big"]
        with Contender(name, f"{self.url}/big/{count}") as contender:
            report = contender.ask(1, timeout=3 if self.quick else 20)
        self.add("big", name, report["cpu"] * scale if report else math.inf)

    def start(self, scenario, name):
        """The import, or the cold start; CPU in ms."""
        _, kind, modules, _ = CONTENDERS[name]
        if scenario == "import":
            script = IMPORT.format(modules=modules)
        else:
            source = inspect.getsource(globals()[name])
            first = FIRST[kind]
            script = COLD.format(name=name, source=source, request=REQUEST, first=first)
        self.add(scenario, name, python("-c", script, f"{self.url}/single/20") * 1e3)

    def flat(self):
        most = FLAT[-2 if self.quick else -1]
        for count, cost in child("run_flat", self.url, most).items():
            self.add("flat", f"{count} events, us/event", cost)
        for count in (FLAT[1], most):
            answer = child("run_memory", self.url, count)
            self.add("flat", f"{count} events, MiB", answer["rss"])

    def aggregate(self):
        answer = child("run_aggregate", 200_000)
        self.add("aggregate", "us/event more", answer["extra"])
        self.add("aggregate", "peak / text", answer["peak"])


# --------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------


def spread(bench):
    """Most over least CPU per event, 1,000 events and more, beyond the first 20."""

    def total(count):
        return bench.median("flat", f"{count} events, us/event") * count

    each = [(total(n) - total(FLAT[0])) / (n - FLAT[0]) for n in FLAT[1:]]
    each = [cost for cost in each if not math.isnan(cost)]
    return max(each) / min(each) if each else math.nan


#: (what, scenario, row, over which row, at most or at least, limit)
TARGETS = [
    ("bulk / naive", "bulk", "pooled", "naive", "<=", 0.35),
    ("single / naive", "single", "pooled", "naive", "<=", 0.20),
    ("tools / naive", "tools", "pooled", "naive", "<=", 0.25),
    ("segments / naive", "segments", "pooled", "naive", "<=", 0.25),
    ("keepalive / naive", "keepalive", "pooled", "naive", "<=", 0.95),
    ("bulk, openai create() / ours", "bulk", "openai_create", "pooled", ">=", 50),
    ("single, openai create() / ours", "single", "openai_create", "pooled", ">=", 60),
    ("cold start / naive", "cold", "pooled", "naive", "<=", 1.15),
    ("cold start, bare / naive", "cold", "bare", "naive", "<=", 0.85),
    ("import, ms", "import", "pooled", None, "<=", 65),
    ("big, ms", "big", "pooled", None, "<=", 300),
    ("aggregate(), us/event more", "aggregate", "us/event more", None, "<=", 0.5),
    ("aggregate(), peak / text", "aggregate", "peak / text", None, "<=", 4),
    ("flat, most / least per event", "flat", None, None, "<=", 1.15),
]


def targets(bench):
    """-> (what, figure, sign, limit, met) of those that were measured."""
    for what, scenario, row, other, sign, limit in TARGETS:
        if other:
            figure = bench.ratio(scenario, row, other)
        else:
            figure = bench.median(scenario, row) if row else spread(bench)
        if not math.isnan(figure):
            met = figure <= limit if sign == "<=" else figure >= limit
            yield what, figure, sign, limit, met


def show(bench):
    units = {name: load[4] for name, load in LOADS.items()}
    units.update({"memory": "MiB", "import": "ms", "cold": "ms"})
    units = {name: unit for name, unit in units.items() if name in bench.samples}
    print("\nMedian, and as a multiple of the naive loop (urllib3):\n")
    print(f"{'':30}" + "".join(f"{name:>17}" for name in units))
    print(f"{'':30}" + "".join(f"{unit:>17}" for unit in units.values()))
    for name in bench.contenders if units else ():
        print(f"{CONTENDERS[name][0]:30}", end="")
        for scenario in units:
            figure = bench.median(scenario, name)
            multiple = f"{figure / bench.median(scenario, 'naive'):.2f}"
            cell = "too slow" if math.isinf(figure) else f"{figure:.3g} ({multiple})"
            print(f"{cell.replace('(nan)', ''):>17}", end="")
        print()
    for scenario in ONCE:
        for row in bench.samples.get(scenario, ()):
            print(f"{scenario + ': ' + row:34}{bench.median(scenario, row):8.3g}")
    print("\nTargets:")
    for what, figure, sign, limit, met in targets(bench):
        verdict = "pass" if met else "MISS"
        print(f"{what:34}{figure:8.3g} {sign} {limit:<6}{verdict}")


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" fill="#77797d"
 font-family="system-ui, sans-serif" font-size="13">
<title>CPU time per event</title>
<text x="8" y="20" font-size="15" font-weight="600">\
CPU time of the client per event, in microseconds (less is better)</text>
{parts}
<text x="8" y="{bottom}" font-size="11">{framing} per HTTP chunk; loopback; Python \
{python}; logarithmic axis</text>
</svg>
"""


def plot(bench, path):
    """A bar chart, on a logarithmic axis because the peers are that far apart."""
    scenario = "single" if "single" in bench.samples else "bulk"
    rows = sorted((bench.median(scenario, name), name) for name in bench.contenders)
    end = 40 + 26 * len(rows)

    def x(figure):
        return round(230 + 420 * math.log10(max(figure, 1)) / 3)

    parts = []
    for tick in (1, 10, 100, 1000):
        line = f'<path d="M{x(tick)} 36V{end}" stroke="#77797d" stroke-opacity=".35"/>'
        label = f'<text x="{x(tick)}" y="{end + 17}" text-anchor="middle">{tick}</text>'
        parts += [line, label]
    for y, (figure, name) in zip(range(40, end, 26), rows):
        ours = name in ("pooled", "bare")
        fill, weight = ("#2a7de1", "600") if ours else ("#9a9da3", "400")
        text = f'<text y="{y + 14}" font-weight="{weight}"'
        parts += [
            f'{text} x="220" text-anchor="end">{CONTENDERS[name][0]}</text>',
            f'<path d="M230 {y}H{x(figure)}v19H230z" fill="{fill}"/>',
            f'{text} x="{x(figure) + 7}">{figure:.3g}</text>',
        ]
    svg = SVG.format(
        height=end + 44,
        bottom=end + 36,
        parts="\n".join(parts),
        framing="one event" if scenario == "single" else "64 events",
        python=platform.python_version(),
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(svg)


def versions(contenders):
    """-> distribution: version, and which contenders cannot run."""
    found, missing = {}, {}
    for name in contenders:
        for package in CONTENDERS[name][3].split():
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                missing[name] = package
    return found, missing


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="2 rounds, smaller loads")
    parser.add_argument("--only", action="append", choices=SCENARIOS)
    parser.add_argument("--rounds", type=int, help="default 2")
    parser.add_argument("--plot", metavar="FILE.svg")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(globals()[sys.argv[2]](*sys.argv[3:])))
        return
    if sys.argv[1:2] == ["--serve"]:
        serve()
        return
    args = parse_args()
    found, missing = versions(CONTENDERS)
    for name, package in missing.items():
        print(f"{CONTENDERS[name][0]} is left out: {package} is not installed")
    packages = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"Python {platform.python_version()}, {platform.machine()}; {packages}")
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    names = [name for name in CONTENDERS if name not in missing]
    bench = Bench(int(server.stdout.readline()), names, args.quick)
    rounds = args.rounds or 2
    try:
        for number in range(1, rounds + 1):
            for scenario in args.only or SCENARIOS:
                print(f"round {number} of {rounds}: {scenario}", file=sys.stderr)
                bench.run(scenario)
    except KeyboardInterrupt:
        print("interrupted; this is what there is", file=sys.stderr)
    finally:
        server.kill()
        server.wait()
    show(bench)
    if args.plot:
        plot(bench, args.plot)
    if args.json:
        results = {
            "python": platform.python_version(),
            "versions": found,
            "samples": bench.samples,
            "targets": list(targets(bench)),
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
