"""The page as the process it is in life: started, used over TCP, killed, and in a real browser where there is one."""

from __future__ import annotations

import datetime as dt
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from storage.calls import CallStore
from storage.config import StorageConfig

ROOT = Path(__file__).parents[2]
START = """
import sys, pathlib
from agent.supervisor.config import WebConfig
from agent.supervisor.serve import run_web
from storage.config import StorageConfig
run_web(WebConfig(port=0), StorageConfig(folder=pathlib.Path(sys.argv[1])), parent_pid=int(sys.argv[2]) or None)
"""


class WebProcess:
    def __init__(self, folder: Path, parent_pid: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(folder), str(parent_pid)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert self.process.stderr is not None
        lines = [self.process.stderr.readline(), self.process.stderr.readline()]
        found = re.search(r"http://\S+", lines[0])
        assert found, lines
        self.url = found.group().rstrip("/")
        self.token = lines[1].rpartition(": ")[2].strip() if "shown this once" in lines[1] else ""

    def sign_in(self) -> httpx.Client:
        client = httpx.Client(base_url=self.url, timeout=30, transport=httpx.HTTPTransport(retries=3))
        answer = client.post("/login", data={"token": self.token}, headers={"origin": self.url})
        assert answer.status_code == 303, answer.text
        return client

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        assert self.process.stderr is not None
        self.process.stderr.close()
        return self.process.wait(30)


@pytest.fixture
def storage(tmp_path: Path) -> StorageConfig:
    return StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0, group_commit_ms=1)


@pytest.fixture
def store(storage: StorageConfig) -> Iterator[CallStore]:
    made = CallStore(storage)
    yield made
    made.close()


@pytest.fixture
def start(storage: StorageConfig) -> Iterator[Callable[..., WebProcess]]:
    """Starts the page; whatever a test leaves running is ended."""
    started: list[WebProcess] = []

    def make(**arguments: int) -> WebProcess:
        started.append(WebProcess(storage.folder, **arguments))
        return started[-1]

    yield make
    for web in started:
        if web.process.poll() is None:
            web.stop(signal.SIGKILL)


def test_live_stream_over_tcp_and_death_of_the_page_harms_nothing(
    store: CallStore, start: Callable[..., WebProcess]
) -> None:
    now = dt.datetime.now(dt.UTC)
    store.open_call("c1", did="100", ani="200", now=now)
    web = start()
    with closing(web.sign_in()) as client, client.stream("GET", "/api/live", params={"call_id": "c1"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert any(line == "event: ready" for line in lines)
        threading.Timer(0.2, lambda: store.append_turn("c1", "t1", role="caller", heard_text="hello", now=now)).start()
        data = next(line for line in lines if line.startswith("data: ") and "heard_text" in line)
        assert '"hello"' in data
        web.stop(signal.SIGKILL)
    store.append_turn("c1", "t2", role="caller", heard_text="still here", now=now)
    assert [turn["heard_text"] for turn in store.get_transcript("c1")] == ["hello", "still here"]
    again = start()
    assert again.token == ""  # shown once, at the first start only
    again.stop()


def test_page_ends_with_an_open_live_view_and_without_its_parent(
    store: CallStore, start: Callable[..., WebProcess]
) -> None:
    web = start()
    with closing(web.sign_in()) as client, client.stream("GET", "/api/live") as stream:
        assert any(line == "event: ready" for line in stream.iter_lines())
        assert web.stop() in (0, -signal.SIGTERM)
    orphan = start(parent_pid=1)  # not its parent: as if that had gone
    assert orphan.wait() == 0


@pytest.mark.live
@pytest.mark.peers("chromium")
def test_script_in_a_display_name_does_not_run_in_a_real_browser(
    store: CallStore, start: Callable[..., WebProcess], tmp_path: Path
) -> None:
    # The browser cannot type a token here, so it is handed the console's own files and data through a page of ours.
    now = dt.datetime.now(dt.UTC)
    attack = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    store.open_call("c1", did="100", ani="200", display_name=attack, now=now)
    store.append_turn("c1", "t1", role="caller", heard_text=attack, now=now)
    store.journal_append("c1", "x", now=now, text=attack)
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    store.flush()
    dom = _dom_with_cookie(start(), tmp_path, "#c1")
    assert "broken</title>" not in dom
    assert "&lt;img src=x onerror=" in dom and "<img" not in dom
    assert dom.count("<script") == 1
    assert "What was said and heard" in dom


def _dom_with_cookie(web: WebProcess, tmp_path: Path, address: str) -> str:
    """Signs in and lets the browser render the console; a small proxy of ours adds the cookie it cannot be given."""
    client = web.sign_in()

    class AddCookie(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/live"):  # endless, and the browser waits for it
                self.send_error(503)
                return
            answer = client.get(self.path)
            self.send_response(answer.status_code)
            for name in ("content-type", "content-security-policy"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *_arguments: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), AddCookie)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=8000 --dump-dom"
    )
    try:
        url = f"http://127.0.0.1:{proxy.server_port}/{address}"
        run = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'browser'}", url]
        return subprocess.run(run, check=True, capture_output=True, text=True, timeout=90).stdout
    finally:
        proxy.shutdown()
        proxy.server_close()
        client.close()
        web.stop()
