"""Start and stop a media worker as a child process: for the parent, our own SIP caller, benches and tests.

Knows the worker's command line and its ready line, nothing of calls. The socket lies in a private folder that goes away with
the process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from telephony.config import TelephonyConfig


class WorkerFailed(Exception):
    """The worker did not come up; what it wrote is in the message."""


class WorkerProcess:
    """`async with WorkerProcess(config) as worker:` `worker.ready["sip_port"]`, `worker.socket_path`, `worker.pid`."""

    def __init__(self, config: TelephonyConfig, stderr: IO[Any] | None = None) -> None:
        self.config = config
        self.ready: dict[str, Any] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="minmo-media-"))  # mkdtemp makes it 0700
        self.socket_path = self._folder / "media.sock"
        self._stderr = stderr
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> WorkerProcess:
        settings = json.dumps(dataclasses.asdict(self.config))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "telephony.worker", "--socket", str(self.socket_path), "--config", settings,
            "--parent-pid", str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=self._stderr,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), 15)
        except TimeoutError:
            line = b""
        if not line:
            await self.__aexit__()
            raise WorkerFailed("the media worker did not start; its reason is on standard error")
        self.ready = json.loads(line)
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def sip_uri(self) -> str:
        """Where this worker can be called, without the user part."""
        return f"{self.ready['sip_address']}:{self.ready['sip_port']}"

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()

    async def __aexit__(self, *_: object) -> None:
        """SIGTERM twice (BYE at once), and SIGKILL if that takes over 5 s."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            await asyncio.sleep(0.05)
            if process.returncode is None:
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
