"""`minmo serve` as a user starts it, with the shipped weights, once for all live tests: real peers call it.

A process of its own with a settings file, a database, a page and a demo shop of its own. `Served.call_of` is the only
way the tests look at a call: the store, as any other process sees it. An answer that is late is waited for, not given
up (`recover_after_s`): other tests have the same cores, and what a caller is owed is tested in virtual time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.app import free_port
from agent.run_folder import ENGINE_SOCKET, SHIPPED_CHECKPOINT
from storage.config import StorageConfig
from storage.orders import Order, list_orders, seed_demo_shop
from storage.recordings import RecordingReader
from storage.search import CallReader
from tests.live.baresip import Baresip
from tests.live.stack import ENVIRONMENT

START_WITHIN_S = 240.0  # the first start speaks the fixed sentences; the machine may be busy with something else
SETTINGS = """
[agent]
log_level = "warning"
run_folder = "{folder}/run"
[turn_taking]
recover_after_s = 30.0
[telephony]
sip_port = {sip_port}
[web]
port = {web_port}
[storage]
folder = "{folder}/var"
[handoff]
uri = "{handoff_uri}"
"""


@dataclass
class Served:
    """The running agent, and what it stored."""

    folder: Path
    address: str
    page_url: str
    token: str
    handoff_uri: str
    order: Order  # one that was shipped, delivered or delayed: its answer names status and day
    process: subprocess.Popen[str]

    @property
    def engine_socket(self) -> Path:
        return self.folder / "run" / ENGINE_SOCKET

    def reader(self) -> contextlib.closing[CallReader]:
        return contextlib.closing(CallReader.open(StorageConfig(folder=self.folder / "var")))

    def call_of(self, ani: str) -> dict[str, Any] | None:
        """The newest call from this number, with turns, tools, metrics and recording; None while there is none."""
        with self.reader() as reader:
            found = [row["call_id"] for row in reader.list_calls(limit=20) if row["ani"] == ani]
            return reader.get_call(found[0]) if found else None

    def events_of(self, call_id: str) -> list[dict[str, Any]]:
        with self.reader() as reader:
            return reader.get_events(call_id)

    def recording_of(self, call_id: str) -> RecordingReader:
        with self.reader() as reader:
            recording = reader.open_recording(call_id)
            assert recording is not None, "no recording"
            return recording

    def closed_call_of(self, ani: str, within_s: float = 30.0) -> dict[str, Any]:
        wait_for(lambda: (self.call_of(ani) or {}).get("state") == "closed", within_s, f"call of {ani} is not closed")
        call = self.call_of(ani)
        assert call is not None
        return call

    def has_said(self, ani: str, words: str) -> bool:
        """Whether the caller heard these words of the agent to the end of the turn they stand in."""
        call = self.call_of(ani) or {"turns": []}
        turns = [turn for turn in call["turns"] if turn["role"] == "agent" and turn["end_sample"] is not None]
        return any(words in (turn["heard_text"] or "") for turn in turns)


def wait_for(condition: Callable[[], bool], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {within_s:.0f} s")
        time.sleep(0.3)  # most conditions read the whole store


def ask(served: Served, peer: Baresip, ani: str, said: np.ndarray, answer: str) -> None:
    """Says a clip until the agent answers with these words, at most three times, as a caller on a bad line does."""
    for _ in range(3):
        peer.say(said)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: served.has_said(ani, answer), 25, f"no answer {answer!r}")
            return
    turns = (served.call_of(ani) or {"turns": []})["turns"]
    raise AssertionError(f"no answer {answer!r}: {[(turn['role'], turn['heard_text']) for turn in turns]}")


def what_was(call: dict[str, Any], role: str) -> str:
    """All that one side said, as it was heard."""
    return " ".join(turn["heard_text"] or "" for turn in call["turns"] if turn["role"] == role)


def tools_of(call: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Calls of one tool, with what they were asked and what came of them."""
    return [tool for tool in call["tool_calls"] if tool["name"] == name]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Starts it and waits until it takes calls; skips where there are no weights."""
    if not importlib.util.find_spec("pjsua2"):
        pytest.skip("missing: pjsua2")
    if not (SHIPPED_CHECKPOINT / "checkpoint.toml").is_file():
        pytest.skip("UNTRAINED: no weights in this checkout")
    sip_port, handoff_port = (free_port(socket.SOCK_DGRAM, "127.0.0.1") for _ in range(2))
    ports = {"sip_port": sip_port, "web_port": free_port(socket.SOCK_STREAM, "127.0.0.1")}
    handoff_uri = f"sip:desk-7@127.0.0.1:{handoff_port}"
    settings = folder / "minmo.toml"
    settings.write_text(SETTINGS.format(folder=folder, handoff_uri=handoff_uri, **ports))
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "agent", "serve", "--config", str(settings)],
            cwd=folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True,
        )  # fmt: skip
        try:
            yield _when_ready(process, folder, handoff_uri)
        finally:
            process.terminate()
            try:
                process.wait(10)  # no call is left, so there is nothing to drain
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _when_ready(process: subprocess.Popen[str], folder: Path, handoff_uri: str) -> Served:
    def is_ready() -> bool:
        assert process.poll() is None, (
            f"minmo serve ended: {(folder / 'out').read_text()}{(folder / 'err').read_text()}"
        )
        return "ready: " in (folder / "out").read_text()

    wait_for(is_ready, START_WITHIN_S, "minmo serve is not ready")
    address, page_url = re.search(r"ready: call sip:100@(\S+), page (\S+)", (folder / "out").read_text()).groups()
    (token,) = re.findall(r"token \(shown this once\): (\S+)", (folder / "err").read_text())
    with contextlib.closing(CallReader.open(StorageConfig(folder=folder / "var"))) as reader:
        seed_demo_shop(reader.engine)
        with reader.engine.connect() as connection:
            order = next(row for row in list_orders(connection) if row.status in ("shipped", "delivered", "delayed"))
    return Served(folder, address, page_url, token, handoff_uri, order, process)
