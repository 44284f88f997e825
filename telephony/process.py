"""Start and stop a media worker as a child process: for our own SIP caller, benches, tests and small parents.

Knows the worker's command line and its ready line, nothing of calls. Blocks for the half second a worker needs to
start. The socket lies in a private folder that goes away with the process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from telephony.config import TelephonyConfig

_START_WITHIN_S = 20.0
_EXIT_WITHIN_S = 5.0


class WorkerFailed(Exception):
    """The worker did not come up; its reason is on its standard error."""


class WorkerProcess:
    """`with WorkerProcess(config) as worker:` then `worker.socket_path`, `worker.address`, `worker.pid`."""

    def __init__(self, config: TelephonyConfig, stderr: IO[Any] | int | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="minmo-media-"))  # mkdtemp makes it 0700
        self.socket_path = self._folder / "media.sock"
        command = [
            sys.executable, "-m", "telephony.worker", "--socket", str(self.socket_path),
            "--config", json.dumps(dataclasses.asdict(config)), "--parent-pid", str(os.getpid()),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, cwd=Path(__file__).parent.parent
        )
        try:
            self.ready: dict[str, Any] = json.loads(self._ready_line())
        except ValueError:
            self.stop()
            raise WorkerFailed("the media worker did not start; its reason is on standard error") from None

    def _ready_line(self) -> bytes:
        assert self._process.stdout is not None
        fd, line = self._process.stdout.fileno(), b""
        deadline_s = time.monotonic() + _START_WITHIN_S
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(max(0.0, deadline_s - time.monotonic())):
                part = os.read(fd, 4096)
                if not part:
                    break
                line += part
        return line

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def address(self) -> str:
        """host:port where SIP listens; call `sip:100@{address}`."""
        return f"{self.ready['sip_address']}:{self.ready['sip_port']}"

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """SIGTERM twice (BYE at once), SIGKILL if that takes over 5 s."""
        for _ in range(2):
            if self._process.poll() is None:
                self._process.terminate()
                time.sleep(0.03)
        try:
            self._process.wait(_EXIT_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
