"""Browser calls measured: how many one worker process carries, what each costs, and the delay it adds.

    minmo bench media --browsers [--calls 10] [--seconds 6]

One worker process for browsers (telephony/webrtc/worker.py), the agent is this process, the browsers are aiortc in a
process of their own (telephony/webrtc/peer.py). Levels 1, 2, 3, 5, 8, 10 ... calls: the agent speaks in all of them,
and the spacing of its packets is taken where they arrive; a level holds when its 99th percentile is below 25 ms and
nothing is missing. The delay is that of clicks which go in by SRTP, are played back by the agent as it hears them, and
come out: Opus on both sides, jitter buffer, rings and this process are in it. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.bench_many import machine_s
from agent.bench_wire import cpu_s
from telephony.client import WorkerClient, WorkerLeg
from telephony.config import TelephonyConfig
from telephony.leg import Answer, AudioFrame, LegError, Play
from telephony.webrtc.config import WebRtcConfig, media_config

MAX_GAP_P99_MS = 25.0
MIN_DELIVERED = 0.98
LEVELS = (1, 2, 3, 5, 8, 10, 12, 15, 20, 25, 30, 40, 50)
_RATE_HZ = 24_000
_CHUNK_S = 0.2
_READY_WITHIN_S = 30.0


@dataclass(frozen=True)
class BrowserWorker:
    process: asyncio.subprocess.Process
    folder: Path
    config: TelephonyConfig

    @property
    def offers(self) -> Path:
        return self.folder / "offers.sock"


@contextlib.asynccontextmanager
async def browser_worker(telephony: TelephonyConfig, settings: WebRtcConfig) -> AsyncIterator[BrowserWorker]:
    """A worker of its own, without a page."""
    folder = Path(tempfile.mkdtemp(prefix="minmo-browsers-"))
    table = {"webrtc": dataclasses.asdict(settings), "telephony": dataclasses.asdict(telephony)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "telephony.webrtc.worker", "--socket", str(folder / "media.sock"), "--offers",
        str(folder / "offers.sock"), "--config", json.dumps(table), "--parent-pid", str(os.getpid()),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        await asyncio.wait_for(process.stdout.readline(), _READY_WITHIN_S)
        yield BrowserWorker(process, folder, media_config(telephony))
    finally:
        for _ in range(2):
            if process.returncode is None:
                process.terminate()
                await asyncio.sleep(0.1)
        await process.wait()
        shutil.rmtree(folder, ignore_errors=True)


class Desk:
    """The agent's side: answers every call and speaks all the time, or plays back what it hears."""

    def __init__(self, client: WorkerClient, is_echoing: bool) -> None:
        self._client, self._is_echoing = client, is_echoing
        self._task = asyncio.create_task(self._serve(), name="bench/desk")
        self._legs: set[asyncio.Task[None]] = set()

    async def _serve(self) -> None:
        async for leg in self._client.legs():
            await leg.send(Answer(leg_id=leg.leg_id))
            for work in (self._listen(leg), *([] if self._is_echoing else [self._speak(leg)])):
                task = asyncio.create_task(work, name=f"bench-{leg.leg_id}")
                self._legs.add(task)
                task.add_done_callback(self._legs.discard)

    async def _listen(self, leg: WorkerLeg) -> None:
        async for event in leg.events():
            if self._is_echoing and isinstance(event, AudioFrame) and _is_loud(event.pcm):
                with contextlib.suppress(LegError):
                    await leg.send(Play(leg_id=leg.leg_id, item_id=f"click-{event.start_sample}", pcm=event.pcm,
                                        sample_rate_hz=event.sample_rate_hz, is_final=True))  # fmt: skip

    async def _speak(self, leg: WorkerLeg) -> None:
        chunk = (b"\x00\x10" * 60 + b"\x00\xf0" * 60) * round(_CHUNK_S * _RATE_HZ / 120)
        said_s, began_s = 0.0, time.monotonic()
        while True:
            while said_s < time.monotonic() - began_s + 2 * _CHUNK_S:
                with contextlib.suppress(LegError):  # it has just ended
                    await leg.send(Play(leg_id=leg.leg_id, item_id="speech", pcm=chunk, sample_rate_hz=_RATE_HZ))
                said_s += _CHUNK_S
            await asyncio.sleep(_CHUNK_S / 2)

    async def stop(self) -> None:
        for task in (self._task, *self._legs):
            task.cancel()
        await asyncio.gather(self._task, *self._legs, return_exceptions=True)


def _is_loud(pcm: bytes) -> bool:
    """A click; what Opus makes of silence is not."""
    return max(abs(sample) for sample in memoryview(pcm).cast("h")) > 2_000


async def _peers(worker: BrowserWorker, num_calls: int, seconds: float, *flags: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "telephony.webrtc.peer", "--offers", str(worker.offers), "--calls", str(num_calls),
        "--seconds", str(seconds), *flags, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the browsers' process ended with {process.returncode}")
    found: dict[str, Any] = json.loads(output)
    return found


async def measure_delay(seconds: float) -> dict[str, Any]:
    """One call, clicks: {p50, p99, max, n} in ms."""
    telephony = TelephonyConfig(echo_max_delay_ms=0, local_duck_db=0.0)  # what comes back is meant here
    async with browser_worker(telephony, WebRtcConfig(max_calls=1)) as worker:
        client = await WorkerClient.connect(worker.folder / "media.sock", config=worker.config)
        desk = Desk(client, is_echoing=True)
        found = await _peers(worker, 1, seconds, "--clicks")
        await desk.stop()
        await client.close()
    delay: dict[str, Any] = found["delay_ms"]
    return delay


async def measure_level(num_calls: int, seconds: float) -> dict[str, Any]:
    async with browser_worker(TelephonyConfig(), WebRtcConfig(max_calls=num_calls)) as worker:
        client = await WorkerClient.connect(worker.folder / "media.sock", config=worker.config)
        desk = Desk(client, is_echoing=False)
        used_s, machine, began_s = cpu_s(worker.process.pid), machine_s(), time.monotonic()
        found = await _peers(worker, num_calls, seconds)
        took_s, used_s = time.monotonic() - began_s, cpu_s(worker.process.pid) - used_s
        after = machine_s()
        await desk.stop()
        await client.close()
    gap = found["gap_ms"]["p99"]
    holds = not found["refused"] and gap is not None and gap < MAX_GAP_P99_MS and found["delivered"] >= MIN_DELIVERED
    return found | {
        "calls": num_calls, "holds": holds, "worker_cpu_percent": round(100 * used_s / took_s, 1),
        "machine_busy": round((after[0] - machine[0]) / (after[1] - machine[1]), 3),
    }  # fmt: skip


async def run_browsers(most: int, seconds: float) -> dict[str, Any]:
    """Delay, then level after level up to `most` calls or the first that does not hold."""
    delay = await measure_delay(max(seconds, 10.0))
    levels: list[dict[str, Any]] = []
    for num_calls in (*(level for level in LEVELS if level < most), most):
        levels.append(await measure_level(num_calls, seconds))
        print(json.dumps(levels[-1]), file=sys.stderr, flush=True)
        if not levels[-1]["holds"]:
            break
    held = [level["calls"] for level in levels if level["holds"]]
    return {
        "bench": "browsers", "added_delay_ms": delay, "calls_held_by_one_process": held[-1] if held else 0,
        "levels": levels, "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
    }  # fmt: skip
