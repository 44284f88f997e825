"""One child process: start it, read its lines, know when it is ready, start it again when it dies.

Knows nothing of what the children do. A child runs in a process group of its own (Ctrl-C reaches only the parent,
which then ends its children in order) and watches its parent by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)
REPOSITORY = Path(__file__).resolve().parent.parent
FIRST_RESTART_S = 0.1
LAST_RESTART_S = 5.0
STABLE_AFTER_S = 20.0  # a child that lived so long starts anew without waiting
KILL_AFTER_S = 5.0
_SIGTERM_EVERY_S = 0.25


@dataclass(frozen=True)
class ChildSpec:
    name: str
    command: tuple[str, ...]  # after the Python interpreter
    environment: Mapping[str, str] = field(default_factory=dict)
    is_ready: Callable[[str], bool] = lambda _line: True  # judged on its standard output


class ChildFailed(Exception):
    """A child did not become ready; its reason stands on standard error."""


class Child:
    """One role; the process behind it may change. Owned by the parent's loop."""

    def __init__(self, spec: ChildSpec, on_line: Callable[[str, str], None] | None = None) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self.ready_line = ""
        self.num_starts = 0
        self._on_line = on_line
        self.is_stopping = False

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    async def keep_running(self, *, max_failed_starts: int = 3) -> None:
        """Until it shall stop. A child that never became ready so many times in a row raises ChildFailed."""
        try:
            await self._keep_running(max_failed_starts)
        finally:
            self.signal(signal.SIGKILL)  # cancelled while it was being started: `stop` could not see it

    async def _keep_running(self, max_failed_starts: int) -> None:
        loop = asyncio.get_running_loop()
        delay, num_failed = FIRST_RESTART_S, 0
        while not self.is_stopping:
            started_at = loop.time()
            await self._start()
            status = await self._follow()
            if self.is_stopping:
                return
            was_ready, lived_s = self.ready.is_set(), loop.time() - started_at
            self.ready.clear()
            num_failed = 0 if was_ready else num_failed + 1
            if num_failed >= max_failed_starts:
                raise ChildFailed(f"{self.spec.name} ended with {status} before it was ready, {num_failed} times")
            delay = FIRST_RESTART_S if lived_s > STABLE_AFTER_S else min(LAST_RESTART_S, 2 * delay)
            log.warning("%s ended with %s, starting it again in %.1f s", self.spec.name, status, delay)
            await asyncio.sleep(delay)

    async def stop(self, *, kill_after_s: float = KILL_AFTER_S) -> None:
        """SIGTERM until it is gone: the first one drains, any further one ends it at once; then SIGKILL."""
        self.is_stopping = True
        process = self.process
        if process is None or process.returncode is not None:
            return
        ended = asyncio.ensure_future(process.wait())
        deadline = asyncio.get_running_loop().time() + kill_after_s
        while not ended.done() and asyncio.get_running_loop().time() < deadline:
            self.signal(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=_SIGTERM_EVERY_S)
        if not ended.done():
            log.error("%s does not end, killed", self.spec.name)
            self.signal(signal.SIGKILL)
            await ended

    async def ended(self) -> None:
        """Its process is gone (or never was)."""
        if self.process is not None:
            await self.process.wait()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            # Not Process.send_signal: it may collect the exit status itself, and asyncio then invents another one.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    async def _start(self) -> None:
        self.num_starts += 1
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.spec.environment},
            process_group=0,
        )

    async def _follow(self) -> int:
        """Lines of its output until it ends; its exit status."""
        assert self.process is not None and self.process.stdout is not None
        async for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip()
            if not self.ready.is_set() and self.spec.is_ready(line):
                self.ready_line = line
                self.ready.set()
            elif self._on_line is not None:
                self._on_line(self.spec.name, line)
        return await self.process.wait()
