"""What chatstream and its peers cost a client: CPU, memory, import, cold start. (Linux.)

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/bench.py [--quick] [--only SCENARIO] [--rounds N]
                               [--markdown] [--plot FILE.svg]

A server in a process of its own sends answers made beforehand, over loopback. Each
contender has a process, too. They take turns of a fraction of a second, in random order,
so that a slow moment of the machine strikes all of them. The figures are medians of the
CPU time (user + system) of a turn. Those of two machines, or of two runs, do not compare;
the ratios within one turn do, and a target is compared with their median. (Of cold starts
it is the ratio of the means: two of them have no moment in common, and they are spread
evenly over a wide range.) The README here says what each scenario is.
"""

# ruff: noqa: F821  what a contender uses is imported in its own process

from __future__ import annotations

import argparse
import hashlib
import http.server
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from functools import cache

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
REQUIREMENTS = HERE / "requirements.txt"
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
BODY = {**REQUEST, "stream": True}

# --------------------------------------------------------------------------------------
# The contenders: each asks again and again, and yields what it gets, and a None at the
# end of each answer. A cold start runs the source of one in a bare interpreter.
# --------------------------------------------------------------------------------------


def ours(url):
    while True:
        yield from chatstream.stream("Hi", model="m", base_url=url)
        yield None


def naive(url):
    pool, path = urllib3.PoolManager(), url + "/chat/completions"
    while True:
        response = pool.request("POST", path, json=BODY, preload_content=False)
        rest = b""
        while block := response.read1(65536):
            *events, rest = (rest + block).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    yield json.loads(event[6:])
        response.release_conn()
        yield None


def http_client(url):
    host, _, path = url.partition("//")[2].partition("/")
    connection = http.client.HTTPConnection(host)
    headers = {"Content-Type": "application/json"}
    while True:
        body = json.dumps(BODY)
        connection.request("POST", f"/{path}/chat/completions", body, headers)
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
        yield None


def httpx_client(url):
    client, path = httpx.Client(timeout=None), url + "/chat/completions"
    while True:
        with httpx_sse.connect_sse(client, "POST", path, json=BODY) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield event.json()
        yield None


def requests_client(url):
    session, path = requests.Session(), url + "/chat/completions"
    while True:
        with session.post(path, json=BODY, stream=True) as response:
            for event in sseclient.SSEClient(response).events():
                if event.data != "[DONE]":
                    yield json.loads(event.data)
        yield None


def openai_create(url):
    client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)
    while True:
        yield from client.chat.completions.create(**BODY)
        yield None


def openai_stream(url):
    client = openai.OpenAI(api_key="none", base_url=url, max_retries=0)
    while True:
        with client.chat.completions.stream(**REQUEST) as events:
            yield from (event.chunk for event in events if event.type == "chunk")
        yield None


def of_event(event):
    return getattr(event, "text", "") or getattr(event, "arguments", "")


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
    ours: ("**chatstream**", of_event, "chatstream"),
    naive: ("urllib3 and json.loads, naive loop", of_dict, "json, urllib3"),
    http_client: ("http.client, `for line in response`", of_dict, "json, http.client"),
    httpx_client: ("httpx + httpx-sse", of_dict, "httpx, httpx_sse"),
    requests_client: ("requests + sseclient-py", of_dict, "json, requests, sseclient"),
    openai_create: ("openai, `create(stream=True)`", of_object, "openai"),
    openai_stream: ("openai, `.stream()`", of_object, "openai"),
}
CONTENDERS = {function.__name__: row for function, row in CONTENDERS.items()}

#: Pieces like those of a tokenizer; one in ten has escapes, one in ten is not ASCII.
WORDS = re.findall(
    r"\s*\S{1,7}",
    " the sky is blue because sunlight scatters off air molecules, and of that light"
    " the shorter wavelengths more than red.\n\n So-called Rayleigh scattering:\n-"
    ' "violet" 空は青い naïve café 🙂 at noon.\n- "red" at dusk.\n\n',
)
FRAGMENTS = ['{"', "city", '":"', "Lis", "bon", '","', "days", '":[', "1,", "2", "]}"]
CHUNK = """{"id":"chatcmpl-CfzVbT3uQ0aKkq4J1m8yWn2XrLs6d","object":"chat.completion.chunk",
"created":1764000000,"model":"gpt-4o-mini-2024-07-18","service_tier":"default",
"system_fingerprint":"fp_560af6e559"}"""  # what all chunks begin with


def deltas(scenario, count):
    """The deltas between the first and the last chunk of an answer."""
    if scenario == "big":
        yield {"content": "x" * count}
    elif scenario != "tools":
        yield from ({"content": w} for w in random.Random(7).choices(WORDS, k=count))
    for i in range(count if scenario == "tools" else 0):
        index, position = divmod(i, math.ceil(count / 4))
        arguments = FRAGMENTS[position % len(FRAGMENTS)] if position else ""
        call = {"index": index, "function": {"arguments": arguments}}
        if not position:
            call = {"id": f"call_{index}", **call}
            call["function"]["name"] = "f"
        yield {"tool_calls": [call]}


def digest(texts):
    return hashlib.sha256("".join(texts).encode()).hexdigest()


@cache
def expected(scenario, count):
    chunks = ({"choices": [{"delta": delta}]} for delta in deltas(scenario, count))
    return digest(map(of_dict, chunks))


def sse(scenario, count):
    """The SSE events of an answer, as bytes."""
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

    yield event({"role": "assistant", "content": "", "refusal": None})
    yield from map(event, deltas(scenario, count))
    yield event({}, "tool_calls" if scenario == "tools" else "stop")
    yield b"data: [DONE]\n\n"


@cache
def bake(scenario, count):
    """A whole reply, in the segments in which it is sent."""
    pieces = list(sse(scenario, count))
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
        for segment in bake(scenario, int(count)):
            self.wfile.write(segment)


def serve():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        yield server.server_address[1]
        server.serve_forever()


def run_requests(name, url):
    """As often as stdin says. -> CPU seconds per request, peak memory, what came."""
    _, piece, modules = CONTENDERS[name]
    exec(f"import {modules}", globals())
    items = globals()[name](url)
    for line in sys.stdin:
        start = time.process_time()
        texts = [[*map(piece, iter(items.__next__, None))] for _ in range(int(line))]
        cpu = (time.process_time() - start) / len(texts)
        # Not ru_maxrss, which begins with that of the parent.
        status = pathlib.Path("/proc/self/status").read_text()
        rss = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        yield {"cpu": cpu, "rss": rss, "digests": [*{*map(digest, texts)}]}


def run_aggregate():
    """-> seconds per event that aggregate() adds."""
    from chatstream import TextDelta, aggregate

    def cost(function):
        events = [TextDelta(" word") for _ in range(200_000)]
        start = time.process_time()
        for _ in function(iter(events)):
            pass
        return (time.process_time() - start) / len(events)

    extra = [cost(aggregate) - cost(lambda events: events) for _ in range(5)]
    yield statistics.median(extra)


CLOCK = "import time; start = time.process_time(); "
TEMPLATES = {
    "import": CLOCK + "import {modules}; print(time.process_time() - start)",
    "cold": """import os, time, {modules}
REQUEST = {request}
BODY = dict(REQUEST, stream=True)
{source}
next(item for item in {name}("{url}") if {piece}(item))
print(time.process_time(), flush=True)
os._exit(0)""",
}


def start_python(*args):
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "NO_PROXY": "127.0.0.1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command, pipe = [sys.executable, *map(str, args)], subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)


def ask(process, line=""):
    """-> what a process says to a line."""
    print(line, file=process.stdin, flush=True)
    said = process.stdout.readline()
    if not said:
        raise SystemExit(f"{process.args} failed")
    return json.loads(said)


def once(*args):
    with start_python(*args) as process:
        return ask(process)


EVENT = "µs per event"
#: scenario: (events and requests of a turn, the same for openai, unit)
LOADS = dict.fromkeys(["bulk", "single", "tools"], (10_000, 1, 1_000, 1, EVENT))
LOADS["segments"] = (2_000, 2, 500, 1, EVENT)
LOADS["varied"] = LOADS["obfuscation"] = LOADS["single"]
LOADS["keepalive"] = (20, 60, 20, 6, "ms per request")
UNITS = {name: load[-1] for name, load in LOADS.items()}
UNITS.update({"memory": "MiB", "import": "ms", "cold": "ms"})
BIG = "an event of 8 MiB in HTTP chunks of 1 KiB, ms"
ADDS = "`aggregate()` adds, µs per event"
SCENARIOS = [*LOADS, "import", "cold", "big", "flat", "aggregate"]
#: Turns of a round, in one of three of which openai takes part, too; and cold starts of
#: those that a target is about, since starts are far from even.
TURNS, STARTS = 18, 500
FLAT = {20: 1_000, 1_000: 20, 10_000: 2, 100_000: 1, 400_000: 1}  # events: requests


class Bench:
    """The samples of a run: scenario -> row -> list of figures."""

    def __init__(self, url, contenders, quick):
        self.url, self.contenders, self.quick = url, contenders, quick
        self.samples = {}

    def add(self, scenario, row, figure):
        self.samples.setdefault(scenario, {}).setdefault(row, []).append(figure)

    def median(self, scenario, row):
        figures = self.samples.get(scenario, {}).get(row, ())
        figures = [figure for figure in figures if not math.isnan(figure)]
        return statistics.median(figures) if figures else math.nan

    def ratio(self, scenario, row, other):
        """Of each turn, and of them the median: a slow moment of the machine has both.

        Of starts that of their means: of 1,000 its standard error is 0.7 %, that of the
        ratio of their medians 1.2 %.
        """
        one, two = (self.samples.get(scenario, {}).get(r, ()) for r in (row, other))
        ratios = [a / b for a, b in zip(one, two) if not math.isnan(a / b)]
        if scenario == "cold" and ratios:
            return statistics.mean(one) / statistics.mean(two)
        return statistics.median(ratios) if ratios else math.nan

    def spread(self):
        """Most over least CPU per event, 1,000 events and more, beyond the first 20."""
        totals = {n: self.median("flat", f"{n} events, {EVENT}") * n for n in FLAT}
        each = [(totals[n] - totals[20]) / (n - 20) for n in FLAT if n > 20]
        each = [cost for cost in each if not math.isnan(cost)]
        return max(each) / min(each) if each else math.nan

    def run(self, scenario):
        if scenario == "aggregate":
            self.add(scenario, ADDS, once(__file__, "run_aggregate") * 1e6)
        elif scenario not in TEMPLATES:
            self.load(scenario)
        for number in (
            range(1 if self.quick else STARTS) if scenario in TEMPLATES else ()
        ):
            for name in random.sample(self.contenders, len(self.contenders)):
                has_target = scenario == "cold" and name in ("ours", "naive")
                most = STARTS if has_target else TURNS
                if number < (1 if name.startswith("openai") else most):
                    self.add(scenario, name, self.start(scenario, name) * 1e3)

    def start(self, scenario, name):
        """-> CPU seconds of the import, or the cold start, in a new process."""
        _, piece, modules = CONTENDERS[name]
        source = "\n".join(map(inspect.getsource, [globals()[name], piece]))
        names = {"name": name, "piece": piece.__name__, "request": REQUEST}
        names.update(modules=modules, source=source, url=f"{self.url}/single/20")
        return once("-c", TEMPLATES[scenario].format(**names))

    def jobs(self, scenario):
        """-> (row, contender, scenario of the answers, events, requests, scale)."""
        if scenario == "big":
            yield BIG, "ours", "big", 8 << 20, 1, 1e3
        elif scenario == "flat":
            for count, requests in [*FLAT.items()][: -1 if self.quick else None]:
                row = f"{count} events, {EVENT}"
                yield row, "ours", "single", count, requests, 1e6 / count
        for name in self.contenders if scenario in LOADS else ():
            count, requests, *fewer, unit = LOADS[scenario]
            if name.startswith("openai"):
                count, requests = fewer
            scale = 1e6 / count if unit == EVENT else 1e3
            yield name, name, scenario, count, requests, scale

    def load(self, scenario):
        turns = []
        for row, name, answers, count, requests, scale in self.jobs(scenario):
            where = f"{self.url}/{answers}/{count}"
            process = start_python(__file__, "run_requests", name, where)
            if scenario != "big":
                ask(process, 1)  # to warm up
            turns.append((row, process, requests, scale, expected(answers, count)))
        for turn in range(1 if scenario == "big" else 3 if self.quick else TURNS):
            # In random order: none is always the one after the heaviest.
            for row, process, requests, scale, text in random.sample(turns, len(turns)):
                if row.startswith("openai") and turn % 3:
                    self.add(scenario, row, math.nan)
                    continue
                report = ask(process, requests)
                if report["digests"] != [text]:
                    raise SystemExit(f"{row}, {scenario}: not what was sent")
                self.add(scenario, row, report["cpu"] * scale)
                if scenario == "single":
                    self.add("memory", row, report["rss"])
        for _, process, *_ in turns:
            process.kill()
            process.communicate()


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
    "flat, most / least per event": ("flat", None, None, "<=", 1.15),
}


def show(bench, as_markdown):
    """Tables in Markdown: of all contenders, and of chatstream alone. Then the targets."""
    units = {name: unit for name, unit in UNITS.items() if name in bench.samples}
    print("\n|", *(f"| {name}, {unit}" for name, unit in units.items()), "|")
    print("|---" * (len(units) + 1) + "|")
    for name in bench.contenders if units else ():
        cells = [CONTENDERS[name][0]]
        for scenario in units:
            figure = bench.median(scenario, name)
            multiple = f" ({figure / bench.median(scenario, 'naive'):.2f})"
            cells.append(f"{figure:.3g}{multiple}".replace(" (nan)", ""))
        print(f"| {' | '.join(cells)} |")
    print("\n| | figure |\n|---|---|")
    for scenario in ("big", "flat", "aggregate"):
        for row in bench.samples.get(scenario, ()):
            print(f"| {row} | {bench.median(scenario, row):.3g} |")
    print("" if as_markdown else "\nTargets:")
    for what, (scenario, row, other, sign, limit) in TARGETS.items():
        figure = bench.ratio(scenario, row, other) if other else bench.spread()
        figure = figure if other or not row else bench.median(scenario, row)
        met = figure <= limit if sign == "<=" else figure >= limit
        if not (as_markdown or math.isnan(figure)):
            print(
                f"{what:46}{figure:8.3g} {sign} {limit:<6}{'pass' if met else 'MISS'}"
            )


def plot(bench, path):
    """A bar chart of `single`, logarithmic because the peers are that far apart."""
    rows = sorted((bench.median("single", name), name) for name in bench.contenders)
    title = "CPU time of the client per event, in microseconds (less is better)"
    note = f"one event per HTTP chunk; loopback; Python {platform.python_version()}"
    height = 26 * len(rows) + 90
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}"',
        ' fill="#77797d" font-family="system-ui, sans-serif" font-size="13">',
        f'<text x="8" y="20" font-size="15" font-weight="600">{title}</text>',
        f'<text x="8" y="{height - 10}">{note}; logarithmic axis</text>',
    ]
    for y, (figure, name) in zip(itertools.count(40, 26), rows):
        fill, weight = ("#2a7de1", 600) if name == "ours" else ("#9a9da3", 400)
        text = f'<text y="{y + 14}" font-weight="{weight}"'
        label = re.sub("[*`]", "", CONTENDERS[name][0])
        x = round(250 + 400 * math.log10(max(figure, 1)) / 3)
        svg.append(f'{text} x="240" text-anchor="end">{label}</text>')
        svg.append(f'<path d="M250 {y}H{x}v19H250z" fill="{fill}"/>')
        svg.append(f'{text} x="{x + 7}">{figure:.3g}</text>')
    pathlib.Path(path).write_text("\n".join([*svg, "</svg>", ""]), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller loads")
    parser.add_argument("--only", action="append", choices=SCENARIOS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plot", metavar="FILE.svg", help="draw `single`")
    parser.add_argument("--markdown", action="store_true", help="no targets, to paste")
    args = parser.parse_args()
    versions = [f"Python {platform.python_version()}"]
    for package in re.findall(r"^[\w-]+(?===)", REQUIREMENTS.read_text(), re.MULTILINE):
        versions.append(f"{package} {importlib.metadata.version(package)}")
    server = start_python(__file__, "serve")
    bench = Bench(f"http://127.0.0.1:{ask(server)}", list(CONTENDERS), args.quick)
    try:
        for number in range(1, args.rounds + 1):
            for scenario in args.only or SCENARIOS:
                print(f"round {number} of {args.rounds}: {scenario}", file=sys.stderr)
                bench.run(scenario)
    finally:
        server.kill()
        server.communicate()
    print(f"{', '.join(versions)}.")
    show(bench, args.markdown)
    if args.plot:
        plot(bench, args.plot)


if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):  # a child
        for said in globals()[sys.argv[1]](*sys.argv[2:]):
            print(json.dumps(said), flush=True)
    else:
        main()
