"""What chatstream and its peers cost: CPU, memory, import, cold start. (Linux.)

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/bench.py [--help]

A server in a process of its own sends answers made beforehand, over loopback. Each
contender has a process, too. They take turns of a fraction of a second in random order,
so that a slow moment of the machine strikes all. The figures are medians of the CPU
time (user + system) of a turn. Those of two machines, or of two runs, do not compare;
the ratios within one turn do, and a target is compared with their median. The README
here says what each scenario is.
"""

# ruff: noqa: F821  what a contender uses is imported in its own process

from __future__ import annotations

import argparse
import collections
import contextlib
import http.server
import importlib.metadata
import inspect
import json
import math
import multiprocessing
import os
import pathlib
import platform
import py_compile
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, islice
from statistics import mean, median

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.update(PYTHONPATH=str(HERE.parent), NO_PROXY="127.0.0.1")
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
BODY = {**REQUEST, "stream": True}

# The contenders: each returns a function that asks once, and returns what iterates over
# the items. A cold start runs the source of one in a bare interpreter.


def ours(url):
    return lambda: chatstream.stream("Hi", model="m", base_url=url)


def naive(url):
    pool, path = urllib3.PoolManager(), url + "/chat/completions"

    def ask():
        response = pool.request("POST", path, json=BODY, preload_content=False)
        rest = b""
        while block := response.read1(65536):
            *events, rest = (rest + block).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    yield json.loads(event[6:])
        response.release_conn()

    return ask


def stdlib(url):
    host, _, path = url.partition("//")[2].partition("/")
    connection = http.client.HTTPConnection(host)
    headers = {"Content-Type": "application/json"}

    def ask():
        body = json.dumps(BODY)
        connection.request("POST", f"/{path}/chat/completions", body, headers)
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])

    return ask


def httpx_client(url):
    client, path = httpx.Client(timeout=None), url + "/chat/completions"

    def ask():
        with httpx_sse.connect_sse(client, "POST", path, json=BODY) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield event.json()

    return ask


def requests_sse(url):
    session, path = requests.Session(), url + "/chat/completions"

    def ask():
        with session.post(path, json=BODY, stream=True) as response:
            for event in sseclient.SSEClient(response).events():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    return ask


def openai_create(url):
    client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)
    return lambda: client.chat.completions.create(**BODY)


def openai_stream(url):
    client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)

    def ask():
        with client.chat.completions.stream(**REQUEST) as events:
            yield from (event.chunk for event in events if event.type == "chunk")

    return ask


def of_event(event):
    is_text = isinstance(event, chatstream.TextDelta)
    return event.text if is_text else getattr(event, "arguments", "")


def of_dict(chunk):
    delta = chunk["choices"][0]["delta"]
    calls = delta.get("tool_calls") or ()
    return delta.get("content") or "".join(c["function"]["arguments"] for c in calls)


def of_object(chunk):
    delta = chunk.choices[0].delta
    calls = delta.tool_calls or ()
    return delta.content or "".join(call.function.arguments for call in calls)


#: function: (label, what gives an item's text or arguments, what it imports)
CONTENDERS = {
    "ours": ("**chatstream**", of_event, "chatstream"),
    "naive": ("urllib3 and json.loads, naive loop", of_dict, "json, urllib3"),
    "stdlib": ("http.client, `for line in response`", of_dict, "json, http.client"),
    "httpx_client": ("httpx + httpx-sse", of_dict, "httpx, httpx_sse"),
    "requests_sse": ("requests + sseclient-py", of_dict, "json, requests, sseclient"),
    "openai_create": ("openai, `create(stream=True)`", of_object, "openai"),
    "openai_stream": ("openai, `.stream()`", of_object, "openai"),
}

#: Pieces like those of a tokenizer; one in ten has escapes, one in ten is not ASCII.
WORDS = re.findall(
    r"\s*\S{1,7}",
    " the sky is blue because sunlight scatters off air molecules, and of that light"
    " the shorter wavelengths more than red.\n\n So-called Rayleigh scattering:\n-"
    ' "violet" 空は青い naïve café 🙂 at noon.\n- "red" at dusk.\n\n',
)
FRAGMENTS = ['{"', "city", '":"', "Lis", "bon", '","', "days", '":[', "1,", "2", "]}"]
CHUNK = """{"id":"chatcmpl-CfzVbT3uQ0aKkq4J1m8yWn2XrLs6d",
"object":"chat.completion.chunk","created":1764000000,"model":"gpt-4o-mini-2024-07-18",
"service_tier":"default","system_fingerprint":"fp_560af6e559"}"""  # of all chunks


def deltas(scenario, count):
    """The deltas between the first and the last chunk of an answer."""
    if scenario == "big":
        return [{"content": "x" * count}]
    if scenario != "tools":
        return [{"content": w} for w in random.Random(7).choices(WORDS, k=count)]
    calls = []
    for i in range(count):
        index, n = divmod(i, math.ceil(count / 4))
        call = {"index": index, "function": {"arguments": FRAGMENTS[n % 11]}}
        if n == 0:
            function = {"arguments": "", "name": "f"}
            call = {"id": f"call_{index}", "index": index, "function": function}
        calls.append({"tool_calls": [call]})
    return calls


@cache
def expected(scenario, count):
    chunks = ({"choices": [{"delta": delta}]} for delta in deltas(scenario, count))
    return "".join(map(of_dict, chunks))


@cache
def bake(scenario, count):
    """A whole reply, in the segments in which it is sent."""
    rng = random.Random(8)

    def event(delta, reason=None):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**json.loads(CHUNK), "choices": [choice]}
        noise = "".join(rng.choices("abcdefghABCDEFGH0123456789", k=rng.randint(4, 14)))
        if scenario == "obfuscation":
            chunk["obfuscation"] = noise
        elif scenario == "varied":  # in front of the text and behind it
            chunk = {"x" + noise: rng.random(), **chunk, "y" + noise: None}
        text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
        return f"data: {text}\n\n".encode()

    pieces = [event({"role": "assistant", "content": "", "refusal": None})]
    pieces += map(event, deltas(scenario, count))
    pieces.append(event({}, "tool_calls" if scenario == "tools" else "stop"))
    pieces.append(b"data: [DONE]\n\n")
    if scenario == "bulk":
        pieces = [b"".join(pieces[i : i + 64]) for i in range(0, len(pieces), 64)]
    elif scenario == "big":
        body = b"".join(pieces)
        pieces = [body[i : i + 1024] for i in range(0, len(body), 1024)]
    pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    pieces.insert(0, head + b"Transfer-Encoding: chunked\r\n\r\n")
    return pieces if scenario == "segments" else [b"".join(pieces)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        _, scenario, count, *_ = self.path.split("/")
        # A slower loop would be what is measured: clients then wait for each segment.
        collections.deque(map(self.connection.sendall, bake(scenario, int(count))), 0)


def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


@cache
def connected(name, url):
    exec(f"import {CONTENDERS[name][2]}", globals())
    ask = globals()[name](url)
    collections.deque(ask(), 0)  # to warm up
    return ask


def load(name, url, requests, right):
    """-> CPU seconds per request, and the peak of memory in MiB."""
    piece, ask = CONTENDERS[name][1], connected(name, url)
    start = time.process_time()
    texts = [[*map(piece, ask())] for _ in range(requests)]
    cpu = (time.process_time() - start) / requests
    if {*map("".join, texts)} != {right}:
        raise SystemExit(f"{name}, {url}: not what was sent")
    # Not ru_maxrss, which begins with that of the parent.
    status = pathlib.Path("/proc/self/status").read_text()
    return cpu, int(status.partition("VmHWM:")[2].split()[0]) / 1024


def start(name, url):
    """-> CPU seconds of a new process: of the imports or, with a URL, up to a text."""
    _, piece, modules = CONTENDERS[name]
    code = f"import os, time\nstart = time.process_time()\nimport {modules}\n"
    if url:
        source = "\n".join(map(inspect.getsource, [globals()[name], piece]))
        code += f"""start, REQUEST, BODY = 0, {REQUEST}, {BODY}\n{source}
next(item for item in {name}("{url}")() if {piece.__name__}(item))\n"""
    code += "print(time.process_time() - start, flush=True)\nos._exit(0)"
    return [float(subprocess.check_output([sys.executable, "-c", code]))]


def lengths(url):
    """-> CPU us per event of answers of each length, of which a piece each in turn, and
    the most over the least of 1,000 events and more, beyond the first 20."""
    asks = [connected("ours", f"{url}/single/{n}") for n in FLAT]
    streams = [chain.from_iterable(iter(ask, None)) for ask in asks]
    costs = [0.0] * len(FLAT)
    for _ in range(PIECES):
        for i, events in enumerate(streams):
            start, size = time.process_time(), min(1_000, 20 * FLAT[i])
            collections.deque(islice(events, size), 0)
            costs[i] += (time.process_time() - start) / size / PIECES * 1e6
    each = [(n * c - 20 * costs[0]) / (n - 20) for n, c in [*zip(FLAT, costs)][1:]]
    return [*costs, max(each) / min(each)]


def aggregation():
    """-> seconds per event that aggregate() adds."""
    import chatstream

    def cost(function):
        events = [chatstream.TextDelta(" word") for _ in range(200_000)]
        start = time.process_time()
        collections.deque(function(iter(events)), 0)
        return (time.process_time() - start) / len(events)

    return [cost(chatstream.aggregate) - cost(iter)]


EVENT = "µs per event"
BIG = "an event of 8 MiB in HTTP chunks of 1 KiB, ms"
ADDS = "`aggregate()` adds, µs per event"
SPREAD = "most over least per event, of 1000 events and more"
LOAD = (18, EVENT, (10_000, 1), (1_000, 1))
#: scenario: (turns of a round, unit, events and requests of a turn, those of openai)
SCENARIOS = {
    **dict.fromkeys(["bulk", "single", "tools"], LOAD),
    "segments": (18, EVENT, (2_000, 2), (500, 1)),
    **dict.fromkeys(["varied", "obfuscation"], LOAD),
    "keepalive": (18, "ms per request", (20, 60), (20, 6)),
    "memory": (0, "MiB"),  # a column only, from `single`
    "import": (18, "ms"),
    "cold": (500, "ms"),  # so many because starts are far from even
    **dict.fromkeys(["big", "aggregate"], (18, "")),
    "flat": (1, ""),
}
FLAT, PIECES = (20, 1_000, 10_000, 100_000, 400_000), 400  # of 1,000 events

#: Runs functions in a process of its own.
Child = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
#: scenario -> row -> turn -> figure
samples = collections.defaultdict(lambda: collections.defaultdict(dict))


def jobs(scenario, url):
    """-> (rows, in one turn of how many, unit of a second, function, *arguments)."""
    turns, unit, *loads = SCENARIOS[scenario]

    def answers(name, scenario, count, requests):
        right = expected(scenario, count)
        return load, name, f"{url}/{scenario}/{count}", requests, right

    if scenario == "aggregate":
        yield [ADDS], 1, 1e6, aggregation
    elif scenario == "big":
        yield [BIG], 1, 1e3, *answers("ours", "big", 8 << 20, 1)
    elif scenario == "flat":
        yield [*(f"{n} events, {EVENT}" for n in FLAT), SPREAD], 1, 1, lengths, url
    for name in CONTENDERS if unit else ():
        is_openai = name.startswith("openai")
        if loads:
            scale = 1e6 / loads[is_openai][0] if unit == EVENT else 1e3
            job = answers(name, scenario, *loads[is_openai])
            yield [name], 3 if name == "openai_stream" else 1, scale, *job
        else:
            # All starts of those that a target is about, 18 of the others, 1 of openai.
            every = 1 if name in ("ours", "naive") else turns // 18
            where = url + "/single/20" if scenario == "cold" else None
            yield [name], turns if is_openai else every, 1e3, start, name, where


def run(scenario, url, number, turns):
    with contextlib.ExitStack() as stack:
        each = [(stack.enter_context(Child()), *job) for job in jobs(scenario, url)]
        for i in range(turns):
            # In random order: none is always the one after the heaviest.
            for child, rows, every, scale, *job in random.sample(each, len(each)):
                if i % every == 0:
                    results = child.submit(*job).result()
                    for row, cpu in zip(rows, results):
                        samples[scenario][row][number, i] = cpu * scale
                    if scenario == "single":
                        samples["memory"][rows[0]][number, i] = results[1]


def figure(scenario, row, other=None):
    """The median, of a row or of its ratios to another one in the same turn."""
    one, two = samples[scenario][row], samples[scenario][other or row]
    if scenario == "cold" and other:
        # Of 1,000 starts its standard error is 0.7 %, that of the medians' 1.2 %.
        return mean(one.values()) / mean(two.values())
    return median(one[i] / two[i] if other else one[i] for i in one.keys() & two.keys())


#: what: (scenario, row, over which row, at most or at least, limit)
TARGETS = {
    "bulk / naive": ("bulk", "ours", "naive", "<=", 0.28),
    "single / naive": ("single", "ours", "naive", "<=", 0.18),
    "tools / naive": ("tools", "ours", "naive", "<=", 0.22),
    "segments / naive": ("segments", "ours", "naive", "<=", 0.22),
    "varied / httpx-sse": ("varied", "ours", "httpx_client", "<=", 1),
    "keepalive / naive": ("keepalive", "ours", "naive", "<=", 0.90),
    "bulk, openai create() / ours": ("bulk", "openai_create", "ours", ">=", 75),
    "single, openai create() / ours": ("single", "openai_create", "ours", ">=", 65),
    "cold start / naive": ("cold", "ours", "naive", "<=", 0.85),
    "import, ms": ("import", "ours", None, "<=", 60),
    BIG: ("big", BIG, None, "<=", 300),
    ADDS: ("aggregate", ADDS, None, "<=", 0.5),
    SPREAD: ("flat", SPREAD, None, "<=", 1.15),
}


def show():
    """Tables in Markdown, of all contenders and of chatstream alone. Then targets."""
    columns = [name for name in SCENARIOS if name in samples and SCENARIOS[name][1]]
    print("\n|", *(f"| {name}, {SCENARIOS[name][1]}" for name in columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, (label, *_) in CONTENDERS.items() if columns else ():
        pairs = [(figure(column, name), figure(column, "naive")) for column in columns]
        print(
            "|", label, *(f"| {one:.3g} ({one / two:.2f})" for one, two in pairs), "|"
        )
    print("\n| | figure |\n|---|---|")
    for scenario in ("big", "flat", "aggregate"):
        for row in sorted(sorted(samples.get(scenario, ())), key=len):
            print(f"| {row} | {figure(scenario, row):.3g} |")
    print("\nTargets:")
    for what, (scenario, row, other, sign, limit) in TARGETS.items():
        if scenario in samples:
            value = figure(scenario, row, other)
            met = value <= limit if sign == "<=" else value >= limit
            print(f"{what:46}{value:8.3g} {sign} {limit:<6}{'pass' if met else 'MISS'}")


def plot(path):
    """A bar chart of `single`, logarithmic because the peers are that far apart."""
    bars = sorted((figure("single", name), name) for name in samples["single"])
    title = "CPU time of the client per event, in microseconds (less is better)"
    note = f"one event per HTTP chunk; loopback; Python {platform.python_version()}"
    height = 26 * len(bars) + 90
    svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}"
 fill="#77797d" font-family="system-ui, sans-serif" font-size="13">
<text x="8" y="20" font-size="15" font-weight="600">{title}</text>
<text x="8" y="{height - 10}">{note}; logarithmic axis</text>
"""
    for y, (value, name) in zip(range(40, height, 26), bars):
        fill, weight = ("#2a7de1", 600) if name == "ours" else ("#9a9da3", 400)
        label = re.sub("[*`]", "", CONTENDERS[name][0])
        x = round(250 + 400 * math.log10(max(value, 1)) / 3)
        svg += f"""\
<text y="{y + 14}" font-weight="{weight}" x="240" text-anchor="end">{label}</text>
<path d="M250 {y}H{x}v19H250z" fill="{fill}"/>
<text y="{y + 14}" font-weight="{weight}" x="{x + 7}">{value:.3g}</text>
"""
    pathlib.Path(path).write_text(svg + "</svg>\n", encoding="utf-8")


def main():
    names = [name for name in SCENARIOS if name != "memory"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one turn of each")
    parser.add_argument("--only", action="append", choices=names)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plot", metavar="FILE.svg", help="draw `single`")
    args = parser.parse_args()
    py_compile.compile(HERE.parent / "chatstream.py")  # as pip does for the peers
    with Child() as server:
        url = server.submit(serve).result()
        for number in range(1, args.rounds + 1):
            for name in args.only or names:
                print(f"round {number} of {args.rounds}: {name}", file=sys.stderr)
                run(name, url, number, 1 if args.quick else SCENARIOS[name][0])
    required = (HERE / "requirements.txt").read_text()
    packages = re.findall(r"^[\w-]+(?===)", required, re.MULTILINE)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    print(f"Python {platform.python_version()}, {', '.join(versions)}.")
    show()
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main()
