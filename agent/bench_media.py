"""Media bench: does a busy agent or a busy machine delay a frame?

    python -m agent.bench_media [--calls 2] [--seconds 5] [--repeat 5]

A media worker (its own process) carries `calls` calls. The agent is this process: it speaks without pause in chunks of
200 ms, as an engine delivers them. Cases: `idle`; `agent_thread` (one CPU-bound Python thread in the agent process);
`agent_thread+process` (and one busy process per CPU core, nice +5 as the engine runs). The gap between two RTP packets
of a call is taken from the kernel's receive time stamps, so how late this process reads them does not matter.
`silent_packets` counts packets without voice while the agent was speaking: audio that came too late. Figures are
medians over the repetitions; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from agent.raw_sip_peer import RawPeer, to_tag
from telephony.client import WorkerClient, WorkerLeg
from telephony.config import TelephonyConfig
from telephony.leg import Answer, LegState, LegStateChanged, Play
from telephony.process import WorkerProcess

CASES = ("idle", "agent_thread", "agent_thread+process")
_CHUNK_S = 0.2
_AHEAD_S = 0.4  # how far ahead of the wire the agent speaks: two chunks
_AGENT_RATE_HZ = 24000
_SETTLE_S = 0.5
_RTP_HEADER_BYTES = 12
_TIMESTAMP = struct.Struct("qq")
_SO_TIMESTAMPNS = 35  # Linux; not named by Python's socket module


@dataclass(frozen=True)
class CaseResult:
    load: str
    packets: int
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    gaps_over_30_ms: int
    silent_packets: int


class _Receiver(threading.Thread):
    """One call's RTP: kernel time stamp and loudness of each packet."""

    def __init__(self, media: socket.socket) -> None:
        super().__init__(daemon=True)
        media.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        media.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        media.settimeout(0.2)
        self._media = media
        self.arrived: list[tuple[float, bool]] = []
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            try:
                packet, control, _, _ = self._media.recvmsg(2048, 64)
            except TimeoutError:
                continue
            seconds, nanoseconds = _TIMESTAMP.unpack(control[0][2])
            # mu-law: 0xff and 0x7f are zero; a voiced packet has hardly any of the quietest codes
            quiet = sum(1 for code in packet[_RTP_HEADER_BYTES:] if (code & 0x7F) > 0x70)
            self.arrived.append((seconds + nanoseconds / 1e9, quiet < len(packet) // 2))


def _voice(seconds: float) -> bytes:
    time_s = np.arange(int(seconds * _AGENT_RATE_HZ)) / _AGENT_RATE_HZ
    return (np.sign(np.sin(2 * np.pi * 200 * time_s)) * 6000).astype("<i2").tobytes()


async def _speak(leg: WorkerLeg, until_s: float) -> None:
    """Chunk by chunk in real time, as an engine delivers."""
    chunk, said_s, began_s = _voice(_CHUNK_S), 0.0, time.monotonic()
    while time.monotonic() < until_s:
        while said_s < time.monotonic() - began_s + _AHEAD_S:
            await leg.send(Play(leg_id=leg.leg_id, item_id="speech", pcm=chunk, sample_rate_hz=_AGENT_RATE_HZ))
            said_s += _CHUNK_S
        await asyncio.sleep(_CHUNK_S / 4)


async def _listen(leg: WorkerLeg, confirmed: asyncio.Event) -> None:
    async for event in leg.events():
        if isinstance(event, LegStateChanged) and event.state is LegState.CONFIRMED:
            confirmed.set()


async def _measure(worker: WorkerProcess, num_calls: int, seconds: float, load: str) -> list[_Receiver]:
    client = await WorkerClient.connect(worker.socket_path)
    with ExitStack() as stack:
        peers = [stack.enter_context(_peer(worker.address)) for _ in range(num_calls)]
        receivers = [_Receiver(peer.media) for peer in peers]
        legs, tasks = [], []
        for peer, receiver in zip(peers, receivers, strict=True):
            peer.invite()
            leg = await anext(client.legs())
            confirmed = asyncio.Event()
            tasks.append(asyncio.create_task(_listen(leg, confirmed), name=f"bench-{leg.leg_id}/events"))
            await leg.send(Answer(leg_id=leg.leg_id))
            peer.request("ACK", to_tag=to_tag(await asyncio.to_thread(peer.final)))
            await confirmed.wait()
            receiver.start()
            legs.append(leg)
        stack.enter_context(_load(load))
        until_s = time.monotonic() + _SETTLE_S + seconds
        await asyncio.gather(*(_speak(leg, until_s) for leg in legs))
        for receiver in receivers:
            receiver.is_over = True
            await asyncio.to_thread(receiver.join)
        for peer, leg, task in zip(peers, legs, tasks, strict=True):
            leg.hang_up()
            peer.respond(await asyncio.to_thread(peer.receive, "BYE"), "200 OK")
            await task
    await client.close()
    return receivers


def _result(load: str, receivers: list[_Receiver]) -> CaseResult:
    gaps: list[float] = []
    silent = 0
    for receiver in receivers:
        start_s = receiver.arrived[0][0] + _SETTLE_S
        kept = [packet for packet in receiver.arrived if packet[0] >= start_s]
        gaps += [1000 * (after[0] - before[0]) for before, after in zip(kept, kept[1:], strict=False)]
        silent += sum(not is_voiced for _, is_voiced in kept)
    p50, p99 = np.percentile(gaps, [50, 99])
    return CaseResult(load, len(gaps), float(p50), float(p99), max(gaps), sum(gap > 30 for gap in gaps), silent)


@contextmanager
def _peer(address: str) -> Iterator[RawPeer]:
    peer = RawPeer(address)
    try:
        yield peer
    finally:
        peer.close()


@contextmanager
def _load(load: str) -> Iterator[None]:
    is_over = threading.Event()

    def burn() -> None:
        count = 0
        while not is_over.is_set():
            count += 1

    thread = threading.Thread(target=burn, daemon=True)
    processes: list[subprocess.Popen[bytes]] = []
    if load != "idle":
        thread.start()
    if load.endswith("+process"):
        command = [sys.executable, "-c", "import os\nos.nice(5)\nwhile True: pass"]
        processes = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        is_over.set()
        for process in processes:
            process.kill()
            process.wait()


def _median(results: list[CaseResult]) -> dict[str, object]:
    def middle(name: str) -> float:
        return round(float(statistics.median(getattr(result, name) for result in results)), 2)

    return {
        "load": results[0].load, "packets": sum(result.packets for result in results),
        "gap_ms": {"p50": middle("gap_p50_ms"), "p99": middle("gap_p99_ms"), "max": middle("gap_max_ms")},
        "worst_gap_ms": round(max(result.gap_max_ms for result in results), 2),
        "gaps_over_30_ms": sum(result.gaps_over_30_ms for result in results),
        "silent_packets": sum(result.silent_packets for result in results),
    }  # fmt: skip


def run_bench(num_calls: int = 2, seconds: float = 5.0, repeat: int = 5) -> dict[str, object]:
    """All cases; plain data, ready for JSON."""
    cases = []
    with WorkerProcess(TelephonyConfig(sip_port=0, max_calls=max(3, num_calls))) as worker:
        for load in CASES:
            results = [_result(load, asyncio.run(_measure(worker, num_calls, seconds, load))) for _ in range(repeat)]
            cases.append(_median(results))
            print(f"{load:22} {json.dumps(cases[-1])}", file=sys.stderr)
    machine = {
        "scheduling": worker.ready["scheduling"],
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
    }
    return {
        "bench": "media",
        "calls": num_calls,
        "seconds": seconds,
        "repeat": repeat,
        "cases": cases,
        "machine": machine,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agent.bench_media", description="Frame gaps under load.")
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(arguments)
    print(json.dumps(run_bench(options.calls, options.seconds, options.repeat)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
