"""An exchange's side of AudioSocket, written from the protocol's description alone, and a worker for it to call.

Nothing of telephony/audiosocket is used here, so that both cannot be wrong in the same way. Source: docs.asterisk.org,
Configuration, Channel Drivers, AudioSocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from telephony.client import WorkerClient
from telephony.config import TelephonyConfig

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HANGUP, UUID, KEY, AUDIO = 0x00, 0x01, 0x03, 0x10
FRAME_S = 0.02


def message(kind: int, payload: bytes = b"") -> bytes:
    return bytes([kind]) + len(payload).to_bytes(2, "big") + payload


class Exchange:
    """One call: `await Exchange.call(port)`, then `say`, `press`, `hang_up`; look at `frames`, `heard`, `is_over`.

    Sends 20 ms of audio every 20 ms, silence where nothing is said, as an exchange does whose caller has a telephone.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: int, rate_hz: int) -> None:
        self.uuid = uuid.uuid4()
        self.kind = kind
        self.frames: list[tuple[float, int, bytes]] = []  # when each message of the agent's came, its kind and payload
        self.ended_with: int | None = None  # kind of the last message before the connection ended; -1: none at all
        self._reader, self._writer = reader, writer
        self._frame_bytes = int(2 * rate_hz * FRAME_S)
        self._mouth = bytearray()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def call(
        cls, port: int, call_uuid: uuid.UUID | None = None, kind: int = AUDIO, rate_hz: int = 8_000,
        source: str = "127.0.0.1",
    ) -> Exchange:  # fmt: skip
        exchange = cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)), kind, rate_hz)
        exchange.uuid = call_uuid or exchange.uuid
        exchange.send(message(UUID, exchange.uuid.bytes))
        exchange._tasks = [
            asyncio.create_task(exchange._speak(), name="exchange/speak"),
            asyncio.create_task(exchange._listen(), name="exchange/listen"),
        ]
        return exchange

    @property
    def heard(self) -> bytes:
        return b"".join(payload for _, kind, payload in self.frames if kind == self.kind)

    @property
    def is_over(self) -> bool:
        return self.ended_with is not None

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    def say(self, pcm: bytes) -> None:
        self._mouth += pcm

    @property
    def is_speaking(self) -> bool:
        return bool(self._mouth)

    def stop_speaking(self) -> None:
        """Not even silence from now on."""
        self._tasks[0].cancel()

    def press(self, digits: str) -> None:
        for digit in digits:
            self.send(message(KEY, digit.encode("ascii")))

    def hang_up(self) -> None:
        self.send(message(HANGUP))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _speak(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while not self.is_over and not self._writer.is_closing():
            frame = bytes(self._mouth[: self._frame_bytes])
            del self._mouth[: self._frame_bytes]
            self.send(message(self.kind, frame.ljust(self._frame_bytes, b"\0")))
            due_s += FRAME_S
            await asyncio.sleep(max(0.0, due_s - loop.time()))

    async def _listen(self) -> None:
        loop, kind = asyncio.get_running_loop(), -1
        try:
            while True:
                kind, high, low = await self._reader.readexactly(3)
                payload = await self._reader.readexactly(256 * high + low)
                self.frames.append((loop.time(), kind, payload))
        except (asyncio.IncompleteReadError, OSError):
            self.ended_with = kind


class AudioSocketWorker:
    """`with AudioSocketWorker(max_calls=2) as worker:` then `worker.port`, `await worker.agent()`."""

    def __init__(self, telephony: dict[str, Any] | None = None, **settings: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self._folder = Path(tempfile.mkdtemp(prefix="minmo-audiosocket-"))
        self.checks = self._folder / "check.sock"
        self._telephony = telephony or {}
        table = {"telephony": self._telephony, "audiosocket": {"port": self.port, "did": "100", **settings}}
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "telephony.audiosocket.worker", "--socket", str(self._folder / "media.sock"),
                "--checks", str(self.checks), "--config", json.dumps(table), "--parent-pid", str(os.getpid()),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip

    async def agent(self) -> WorkerClient:
        return await WorkerClient.connect(self._folder / "media.sock", 10.0, TelephonyConfig(**self._telephony))

    def __enter__(self) -> AudioSocketWorker:
        assert self.process.stdout is not None
        assert b'"ready": true' in self.process.stdout.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdout is not None
        for _ in range(2):  # drain, then at once
            self.process.terminate()
        self.process.stdout.close()
        self.process.wait(10)
        shutil.rmtree(self._folder, ignore_errors=True)
