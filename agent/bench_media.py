"""Media bench: does a busy agent, a busy machine or a full house delay a frame?

    python -m agent.bench_media [--calls 2] [--seconds 5] [--repeat 5] [--load idle ...]
    python -m agent.bench_media --calls 100 --repeat 1 --load idle       over as many workers as that needs
    python -m agent.bench_media --delay                                  added delay, RTP in to RTP out
    python -m agent.bench_media --ramp --calls 100                       how many the whole agent holds (bench_many.py)
    python -m agent.bench_media --browsers --calls 10                    WebRTC (bench_browsers.py)

Media workers (processes of their own, as many as their pjsua2 asks for) carry the calls. The agent is this process: it
speaks without pause in chunks of 200 ms, as an engine delivers them. Loads: `idle`; `agent_thread` (one CPU-bound
Python thread in the agent process); `agent_thread+process` (and one busy process per CPU core, nice +5 as the engine
runs); `agent_thread+model` (and nano itself at work for four calls). The gap between two RTP packets of a call is taken
from the kernel's receive time stamps, so how late this process reads them does not matter. `silent_packets` counts
packets without voice while the agent was speaking: audio that came too late. The added delay is that of a click which
goes in by RTP, is played back by the agent as it hears it, and comes out: jitter buffer, both rings and this process
are in it. Gap figures are medians over the repetitions; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from agent.bench_browsers import run_browsers
from agent.bench_many import run_ramp
from agent.bench_wire import Clicker, RtpReader, cpu_s, delays_ms, rtp_address
from agent.raw_sip_peer import RawPeer, to_tag
from agent.run_folder import SHIPPED_CHECKPOINT
from telephony.client import WorkerClient, WorkerLeg
from telephony.config import TelephonyConfig
from telephony.leg import Answer, AudioFrame, LegError, LegState, LegStateChanged, Play
from telephony.process import WorkerProcess

LOADS = ("idle", "agent_thread", "agent_thread+process")
MODEL_LOAD = "agent_thread+model"
_MODEL_STARTED_CPU_S, _MODEL_STARTED_WITHIN_S = 8.0, 150.0  # torch is imported, the weights are read
_CHUNK_S = 0.2
_AHEAD_S = 0.4  # how far ahead of the wire the agent speaks: two chunks
_AGENT_RATE_HZ = 24000
_SETTLE_S = 0.5
_STARTED_AT_ONCE = 4  # workers
_RTP_PORTS_FROM = 20_000  # below Linux's ephemeral ports
_ANSWERED_WITHIN_S = 30.0


@dataclass(frozen=True)
class CaseResult:
    load: str
    packets: int
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    gaps_over_30_ms: int
    silent_packets: int
    calls_per_s: float
    worker_cpu_percent_per_call: float


@dataclass
class BenchCall:
    """One call, both ends of it ours."""

    peer: RawPeer
    leg: WorkerLeg
    reading: asyncio.Task[None]
    media_address: tuple[str, int]


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


async def _listen(leg: WorkerLeg, confirmed: asyncio.Event, is_echoing: bool) -> None:
    async for event in leg.events():
        if isinstance(event, LegStateChanged) and event.state is LegState.CONFIRMED:
            confirmed.set()
        elif is_echoing and isinstance(event, AudioFrame) and any(event.pcm):
            # Only the clicks, each as an item of its own: what was late once must not make all that follows late.
            item_id = f"click-{event.start_sample}"
            with contextlib.suppress(LegError):
                await leg.send(Play(leg_id=leg.leg_id, item_id=item_id, pcm=event.pcm,
                                    sample_rate_hz=event.sample_rate_hz, is_final=True))  # fmt: skip


async def _dial(client: WorkerClient, address: str, peer: RawPeer, is_echoing: bool) -> BenchCall:
    peer.invite()
    leg = await asyncio.wait_for(anext(client.legs()), _ANSWERED_WITHIN_S)
    confirmed = asyncio.Event()
    reading = asyncio.create_task(_listen(leg, confirmed, is_echoing), name=f"bench-{leg.leg_id}/events")
    await leg.send(Answer(leg_id=leg.leg_id))
    final = await asyncio.to_thread(peer.final)
    peer.request("ACK", to_tag=to_tag(final))
    await asyncio.wait_for(confirmed.wait(), _ANSWERED_WITHIN_S)
    return BenchCall(peer, leg, reading, rtp_address(final))


async def _hang_up(call: BenchCall) -> None:
    call.leg.hang_up()
    call.peer.respond(await asyncio.to_thread(call.peer.receive, "BYE"), "200 OK")
    await call.reading


def _shares(num_calls: int, workers: Sequence[WorkerProcess]) -> list[int]:
    """How many calls each worker gets: filled one after another."""
    shares, left = [], num_calls
    for worker in workers:
        shares.append(min(left, int(worker.ready["max_calls"])))
        left -= shares[-1]
    assert not left, f"{left} calls have no worker"
    return shares


async def _measure(workers: Sequence[WorkerProcess], num_calls: int, seconds: float, load: str) -> CaseResult:
    clients = [await WorkerClient.connect(worker.socket_path) for worker in workers]
    with ExitStack() as stack:
        began_s = time.monotonic()
        groups = [
            _dial_all(client, worker.address, [stack.enter_context(_peer(worker.address)) for _ in range(share)])
            for client, worker, share in zip(clients, workers, _shares(num_calls, workers), strict=True)
        ]
        calls = [call for group in await asyncio.gather(*groups) for call in group]
        calls_per_s = num_calls / (time.monotonic() - began_s)
        reader = RtpReader([call.peer.media for call in calls])
        reader.start()
        stack.enter_context(_load(load))
        used_s = sum(cpu_s(worker.pid) for worker in workers)
        start_s = time.time() + _SETTLE_S
        until_s = time.monotonic() + _SETTLE_S + seconds
        await asyncio.gather(*(_speak(call.leg, until_s) for call in calls))
        used_s = sum(cpu_s(worker.pid) for worker in workers) - used_s
        await asyncio.to_thread(reader.stop)
        await asyncio.gather(*(_hang_up(call) for call in calls))
    for client in clients:
        await client.close()
    gaps = [gap for arrivals in reader.arrivals for gap in arrivals.gaps_ms(start_s)]
    p50, p99 = np.percentile(gaps, [50, 99])
    return CaseResult(
        load, len(gaps), float(p50), float(p99), max(gaps), sum(gap > 30 for gap in gaps),
        sum(arrivals.silent(start_s) for arrivals in reader.arrivals), calls_per_s,
        100 * used_s / (seconds + _SETTLE_S) / num_calls,
    )  # fmt: skip


async def _dial_all(client: WorkerClient, address: str, peers: list[RawPeer]) -> list[BenchCall]:
    """One after another at one worker; the workers side by side."""
    return [await _dial(client, address, peer, False) for peer in peers]


async def measure_delay(worker: WorkerProcess, seconds: float) -> list[float]:
    """Click by click, ms."""
    client = await WorkerClient.connect(worker.socket_path)
    with _peer(worker.address) as peer:
        call = await _dial(client, worker.address, peer, True)
        reader, clicker = RtpReader([peer.media]), Clicker(peer.media, call.media_address)
        reader.start()
        clicker.start()
        await asyncio.sleep(seconds)
        await asyncio.to_thread(clicker.stop)
        await asyncio.to_thread(reader.stop)
        await _hang_up(call)
    await client.close()
    return delays_ms(clicker.sent_s, reader.arrivals[0].onsets_s())


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


@contextmanager
def _model_at_work() -> Iterator[None]:
    """Nano, for four calls that listen and speak all the time, niced as the engine is; from when it is at work."""
    run = "import os, sys\nos.nice(5)\nfrom minmo_runtime.bench.engine import main\nwhile True: main(sys.argv[1:])"
    command = [sys.executable, "-c", run, "--checkpoint", str(SHIPPED_CHECKPOINT), "--calls", "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + _MODEL_STARTED_WITHIN_S
        while cpu_s(process.pid) < _MODEL_STARTED_CPU_S:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the model did not get to work")
            time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def worker_pool(num_calls: int) -> Iterator[list[WorkerProcess]]:
    """As many workers as `num_calls` need; the first one says how many calls its pjsua2 holds."""

    def start(index: int) -> WorkerProcess:
        # Ranges of their own: two workers that look for a free one at the same time may find the same.
        first = _RTP_PORTS_FROM + index * 4 * max(4, min(num_calls, 64))
        return WorkerProcess(TelephonyConfig(sip_port=0, max_calls=max(4, num_calls), rtp_port_first=first))

    with ExitStack() as stack:
        workers = [stack.enter_context(start(0))]
        num_more = -(-num_calls // int(workers[0].ready["max_calls"])) - 1
        with ThreadPoolExecutor(_STARTED_AT_ONCE) as starting:
            for worker in starting.map(start, range(1, num_more + 1)):
                workers.append(stack.enter_context(worker))
        yield workers


def _median(results: list[CaseResult]) -> dict[str, object]:
    def middle(name: str) -> float:
        return round(float(statistics.median(getattr(result, name) for result in results)), 2)

    return {
        "load": results[0].load, "packets": sum(result.packets for result in results),
        "gap_ms": {"p50": middle("gap_p50_ms"), "p99": middle("gap_p99_ms"), "max": middle("gap_max_ms")},
        "worst_gap_ms": round(max(result.gap_max_ms for result in results), 2),
        "gaps_over_30_ms": sum(result.gaps_over_30_ms for result in results),
        "silent_packets": sum(result.silent_packets for result in results),
        "calls_accepted_per_s": middle("calls_per_s"),
        "worker_cpu_percent_per_call": middle("worker_cpu_percent_per_call"),
    }  # fmt: skip


def run_bench(
    num_calls: int = 2, seconds: float = 5.0, repeat: int = 5, loads: Sequence[str] = LOADS
) -> dict[str, object]:
    """All cases; plain data, ready for JSON."""
    cases = []
    with worker_pool(num_calls) as workers:
        for load in loads:
            with _model_at_work() if load == MODEL_LOAD else contextlib.nullcontext():
                results = [asyncio.run(_measure(workers, num_calls, seconds, load)) for _ in range(repeat)]
            cases.append(_median(results))
            print(f"{load:22} {json.dumps(cases[-1])}", file=sys.stderr)
        machine = _machine() | {"scheduling": workers[0].ready["scheduling"]}
    return {
        "bench": "media", "calls": num_calls, "workers": len(workers), "seconds": seconds, "repeat": repeat,
        "cases": cases, "machine": machine,
    }  # fmt: skip


def run_delay(seconds: float) -> dict[str, object]:
    """Added one-way delay. No echo removal: what comes back is meant here."""
    with WorkerProcess(TelephonyConfig(sip_port=0, echo_max_delay_ms=0, local_duck_db=0.0)) as worker:
        found = asyncio.run(measure_delay(worker, seconds))
    p50, p99 = np.percentile(found, [50, 99]) if found else (float("nan"), float("nan"))
    delay = {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "n": len(found)}
    return {"bench": "media_delay", "added_delay_ms": delay, "machine": _machine()}


def _machine() -> dict[str, object]:
    return {"cpus": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2), "kernel": platform.release()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agent.bench_media", description="Frame gaps under load.")
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--load", action="append", choices=[*LOADS, MODEL_LOAD], help="default: all but the model")
    parser.add_argument("--delay", action="store_true", help="added delay, RTP in to RTP out, and nothing else")
    parser.add_argument("--ramp", action="store_true", help="how many calls hold, up to --calls: agent/bench_many.py")
    parser.add_argument("--step", type=int, default=8, help="of the ramp: calls added at each level")
    parser.add_argument("--browsers", action="store_true", help="WebRTC: delay, calls a process: bench_browsers.py")
    options = parser.parse_args(arguments)
    if options.ramp:
        found = asyncio.run(run_ramp(options.calls, options.step, options.seconds))
        print(json.dumps(found))
        return 0 if found["calls_held"] else 1
    if options.browsers:
        found = asyncio.run(run_browsers(options.calls, options.seconds))
        print(json.dumps(found))
        return 0 if found["calls_held_by_one_process"] else 1
    result = run_delay(max(options.seconds, 10.0))
    if not options.delay:
        result |= run_bench(options.calls, options.seconds, options.repeat, options.load or LOADS)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
