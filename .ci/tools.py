"""Other people's tools with chatstream, against a server on loopback.

    python .ci/tools.py [NAME ...]     dask, fastapi, vcr, truststore, gevent, pool

Each check runs as a script in a process of its own, because gevent and truststore change
the whole process. Needs distributed, fastapi, uvicorn, httpx, vcrpy, truststore, trustme,
gevent and urllib3; none of them is needed by chatstream.
"""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import re
import ssl
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds: nothing here is meant to take as long


class Handler(http.server.BaseHTTPRequestHandler):
    """What it answers depends on the prompt's first word."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        self.server.asked.append(prompt)
        word = prompt.split()[0]
        if word == "fail" or (word == "busy" and self.server.asked.count(prompt) == 1):
            error = {"error": {"message": f"cannot {prompt}", "code": "odd"}}
            body = json.dumps(error).encode()
            self.send_response(400 if word == "fail" else 503)
            self.send_header("Retry-After", "7" if word == "fail" else "0.1")
            self.send_header("X-Request-Id", "request-1")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        if word == "meet":  # answered only when all have come
            self.server.barrier.wait(PATIENCE)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in ("answer ", "to ", prompt):
            self.event({"delta": {"content": piece}})
            if word in ("slow", "cut"):
                if word == "slow":
                    self.rfile.read(1)  # until the client leaves
                    self.server.left.set()
                self.close_connection = True
                return
        self.event({"delta": {}, "finish_reason": "stop"})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, choice: dict) -> None:
        chunk = {"id": "1", "model": "m", "choices": [{"index": 0, **choice}]}
        self.chunk(b"data: %b\n\n" % json.dumps(chunk).encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.connections = 0
        self.left = threading.Event()
        self.barrier = threading.Barrier(40)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that leaves


def example(word: str) -> str:
    """The README's first example that has this in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return next(c for c in re.findall(r"```python\n(.*?)```", text, re.S) if word in c)


def environment(url: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env.pop("SSL_CERT_FILE", None)
    return {**env, "OPENAI_BASE_URL": url, "PYTHONPATH": str(ROOT)}


def run(script: str, url: str, **more: str) -> str:
    """-> what the script prints, in a folder of its own with these files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in {"script.py": script, **more}.items():
            path = pathlib.Path(folder, name.replace("_py", ".py"))
            path.write_text(text, encoding="utf-8")
        env = {**environment(url), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
        if "ca_pem" in more:
            env["SSL_CERT_FILE"] = f"{folder}/ca_pem"
        child = subprocess.run(
            [sys.executable, "-B", "script.py"],
            cwd=folder,
            env=env,
            capture_output=True,
            timeout=PATIENCE,
        )
    assert child.returncode == 0, child.stderr.decode()
    return child.stdout.decode()


DASK = """
import chatstream
import distributed
import os
from recipe import ask

def insist(prompt):
    return chatstream.complete(prompt, model="m").content

def check(error):
    assert type(error) is chatstream.StatusError, repr(error)
    assert (error.status, error.code, error.retry_after) == (400, "odd", 7.0)
    assert (error.message, error.request_id) == ("cannot fail", "request-1")
    assert "odd" in error.body and error.headers["retry-after"] == "7"
    assert error.partial == () and "cannot fail" in str(error)

if __name__ == "__main__":
    with distributed.Client(
        n_workers=2, threads_per_worker=8, processes=True, dashboard_address=None
    ) as client:
        workers = {os.getpid(), *client.run(os.getpid).values()}
        assert len(workers) == 3, workers
        prompts = [f"prompt {n}" for n in range(49)] + ["fail"]
        answers = dict(client.gather(client.map(ask, prompts)))
        check(answers.pop("fail"))  # which the function returned
        assert answers == {p: f"answer to {p}" for p in prompts[:-1]}
        futures = client.map(insist, prompts)
        check(futures[-1].exception())  # which it raised
        assert client.gather(futures[:-1]) == list(answers.values())
"""


def dask() -> str:
    server = Server()
    run(DASK, server.url, recipe_py=example("dask.Client"))
    assert len(server.asked) == 100
    return "two processes, 50 prompts, an error with all its fields"


def fastapi() -> str:
    import httpx

    server = Server()
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "app.py").write_text(example("FastAPI"), encoding="utf-8")
        child = subprocess.Popen(
            [sys.executable, "-B", "-m", "uvicorn", "app:app", "--port=0"],
            cwd=folder,
            env=environment(server.url),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        watchdog = threading.Timer(PATIENCE, child.kill)
        watchdog.start()
        try:
            said = ""
            while not (url := re.search(r"running on (http://[\d.]+:\d+)", said)):
                assert child.poll() is None, said
                said += child.stderr.readline().decode()
            options = {"base_url": url[1], "trust_env": False, "timeout": PATIENCE}
            with httpx.Client(**options) as web:
                assert web.get("/ask?prompt=hello").text == "answer to hello"
                with web.stream("GET", "/ask?prompt=slow") as response:
                    assert next(response.iter_text()) == "answer "
                    assert not server.left.is_set()
            started = time.monotonic()
            assert server.left.wait(PATIENCE), "the upstream runs on"
            took = time.monotonic() - started
        finally:
            watchdog.cancel()
            child.terminate()
            child.communicate()
    return f"the browser left, and {took:.2f} s later the upstream was closed"


VCR = """
import chatstream
import sys
import vcr

url = sys.stdin.readline().strip()
def ask(mode):
    hidden = {"filter_headers": ["authorization"], "record_mode": mode}
    with vcr.use_cassette("cassette.yaml", **hidden) as cassette:
        options = {"base_url": url, "api_key": "sk-secret", "max_retries": 0}
        texts = [
            ev.text
            for ev in chatstream.stream("hello", model="m", **options)
            if isinstance(ev, chatstream.TextDelta)
        ]
    return texts, cassette.play_count

recorded = ask("once")
print("recorded", flush=True)
sys.stdin.readline()  # the server is gone
replayed = ask("none")
assert "".join(replayed[0]) == "".join(recorded[0]) == "answer to hello", replayed
assert (recorded[1], replayed[1]) == (0, 1)
assert "sk-secret" not in open("cassette.yaml").read()
"""


def vcr() -> str:
    server = Server()
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-B", "-c", VCR],
            cwd=folder,
            env=environment(server.url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        child.stdin.write(server.url.encode() + b"\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"recorded\n"
        server.shutdown()
        server.server_close()
        child.communicate(b"\n", timeout=PATIENCE)
    assert child.returncode == 0
    assert len(server.asked) == 1
    return "recorded, and replayed with the server gone"


TRUSTSTORE = """
import chatstream
import os
import truststore

truststore.inject_into_ssl()
is_known = "SSL_CERT_FILE" in os.environ
try:
    text = chatstream.complete("hello", model="m", max_retries=0).content
except chatstream.TransportError as error:
    assert "certificate" in str(error).lower(), error
    print("refused")
else:
    assert is_known and text == "answer to hello", text
    print("accepted")
"""


def truststore() -> str:
    import trustme

    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    server = Server(tls)
    unknown = run(TRUSTSTORE, server.url)
    assert unknown == "refused\n"
    pem = authority.cert_pem.bytes().decode()
    known = run(TRUSTSTORE, server.url, ca_pem=pem)
    return f"an unknown authority is refused, one in SSL_CERT_FILE {known.strip()}"


GEVENT = """
from gevent import monkey

monkey.patch_all()
import chatstream
import gevent

prompts = [f"meet {n}" for n in range(40)]
def ask(prompt):
    return chatstream.complete(prompt, model="m", max_retries=0).content

for job, prompt in [(gevent.spawn(ask, prompt), prompt) for prompt in prompts]:
    assert job.get(timeout=60) == f"answer to {prompt}"

events = chatstream.stream("slow", model="m")
assert next(events).text == "answer "
gevent.spawn_later(0.2, chatstream.cancel, events)
try:
    next(events)
except chatstream.CancelledError:
    print("cancelled")
"""


def gevent() -> str:
    server = Server()
    assert run(GEVENT, server.url) == "cancelled\n"
    assert server.left.wait(PATIENCE)
    return "40 greenlets at once, and a cancel() from another"


POOL = """
import chatstream
import threading
import urllib3

with urllib3.PoolManager(maxsize=1) as pool:
    def ask(prompt):
        return chatstream.stream(prompt, model="m", pool=pool)
    for prompt in ("one", "two", "busy", "three"):
        answer = chatstream.complete(prompt, model="m", pool=pool)
        assert answer.content == f"answer to {prompt}"
        assert answer.completed.finish_reason == "stop"
    try:
        chatstream.complete("fail", model="m", pool=pool)
        raise SystemExit("no error")
    except chatstream.StatusError as error:
        assert (error.status, error.message) == (400, "cannot fail")
    try:
        list(ask("cut"))
        raise SystemExit("no error")
    except chatstream.TruncatedStreamError:
        pass
    events = ask("slow")
    assert next(events).text == "answer "
    threading.Timer(0.2, chatstream.cancel, [events]).start()
    try:
        next(events)
        raise SystemExit("no error")
    except chatstream.CancelledError:
        print(urllib3.__version__)
"""


def pool() -> str:
    server = Server()
    version = run(POOL, server.url).strip()
    assert server.left.wait(PATIENCE)
    # One for all that ended well, one after the cut; a busy server's and a refusal's are
    # kept as well.
    assert server.connections == 2, server.connections
    return f"urllib3 {version}: calls, a retry, an error, a cut, a cancel()"


CHECKS = [dask, fastapi, vcr, truststore, gevent, pool]


def main() -> None:
    sys.dont_write_bytecode = True
    wanted = sys.argv[1:] or [check.__name__ for check in CHECKS]
    failed = []
    for check in [check for check in CHECKS if check.__name__ in wanted]:
        started = time.monotonic()
        try:
            said = check()
        except Exception as error:
            said = f"FAILED: {type(error).__name__}: {error}"
            failed.append(check.__name__)
        took = time.monotonic() - started
        print(f"{check.__name__}: {said} ({took:.0f} s)", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
