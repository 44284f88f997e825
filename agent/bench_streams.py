"""The soak of the engine's process alone: streams opened, spoken to, answered, cut and closed, as fast as they go.

What is talked to is the process of `minmo serve` (minmo_runtime/server.py) over its socket, as the agent does; no
telephony, no real time. The client's own side is read too: it is the agent's. Which kind of stream comes next is drawn
from a seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from agent.growth import held_by
from agent.holdings import Inquiry, Ledger, say_progress
from agent.lab.rtp import RATE_HZ
from agent.lab.scenarios import clip
from agent.processes import Child, ChildSpec
from minmo_runtime import api
from minmo_runtime.client import RuntimeClient
from minmo_runtime.config import RuntimeConfig
from telephony.resample import StreamResampler

# Kind -> how often: answered in full, cut in mid-reply, closed in mid-reply, a fixed sentence, nothing at all.
WEIGHTS = {"answer": 2, "cancel": 4, "close": 4, "say": 2, "silent": 1}
SYSTEM = "you are mia at the garden shop. speak in a friendly voice at a normal pace. order numbers have 5 digits."
READY_WITHIN_S = 120.0
STREAM_WITHIN_S = 60.0
_PIECE_S = 0.1  # silence pushed to the fake while an answer is awaited: its clock is the caller's audio
_POLL_S = 0.01
_REST_S = 0.5


class Stream:
    """One call's stream; `run()` says what came of it: done | lost | late."""

    def __init__(
        self, client: RuntimeClient, name: str, kind: str, seed: int, speech: bytes, needs_clock: bool
    ) -> None:
        self._client, self._name, self._kind, self._seed, self._speech = client, name, kind, seed, speech
        self._needs_clock = needs_clock
        self._has_sound, self._is_ended, self._is_cut = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._pushed = 0

    async def run(self) -> str:
        name, client = self._name, self._client
        await client.send(api.OpenStream(call_id=name, system_prompt=SYSTEM, seed=self._seed))
        reading = asyncio.create_task(self._read(), name=f"stream-{name}")
        outcome = "done"
        try:
            async with asyncio.timeout(STREAM_WITHIN_S):
                await self._talk()
        except api.StreamLost:
            outcome = "lost"
        except TimeoutError:
            outcome = "late"
        await client.send(api.CloseStream(call_id=name))
        await reading
        return outcome

    async def _talk(self) -> None:
        name = self._name
        if self._kind == "silent":
            return
        if self._kind == "say":  # a sentence of its own: a cached one would not be spoken
            text = f"order {self._seed}"
            await self._client.send(api.Say(call_id=name, turn_id="t", text=text))
            await self._until(self._is_ended)
            return
        await self._push(self._speech, is_voiced=True)
        await self._client.send(api.StartReply(call_id=name, turn_id="t"))
        await self._until(self._is_ended if self._kind == "answer" else self._has_sound)
        if self._kind == "cancel":
            await self._client.send(api.CancelReply(call_id=name, turn_id="t", played_samples=2_400))
            await self._until(self._is_cut)

    async def _until(self, happened: asyncio.Event) -> None:
        silence = bytes(2 * round(_PIECE_S * api.INPUT_SAMPLE_RATE_HZ))
        while not happened.is_set() and not self._is_ended.is_set():
            if self._needs_clock:
                await self._push(silence, is_voiced=False)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(happened.wait(), _POLL_S)

    async def _push(self, pcm: bytes, *, is_voiced: bool) -> None:
        await self._client.send(api.PushAudio(call_id=self._name, pcm=pcm, start_sample=self._pushed, voiced=is_voiced))
        self._pushed += len(pcm) // 2

    async def _read(self) -> None:
        async for event in self._client.events(self._name):
            match event:
                case api.AudioDelta():
                    self._has_sound.set()
                case api.ReplyFinished() | api.ToolCallRequested() | api.StreamFailed():
                    self._is_ended.set()
                case api.ReplyTruncated():
                    self._is_cut.set()


def kinds(seed: int) -> Iterator[str]:
    dice = random.Random(seed)
    while True:
        yield dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


@contextlib.asynccontextmanager
async def engine_alone(
    command: tuple[str, ...], checkpoint: Path, folder: Path
) -> AsyncIterator[tuple[Child, Inquiry]]:
    """The engine's process as the parent starts it, at `folder`/engine.sock."""
    inquiry = Inquiry()
    options = (
        "--socket", str(folder / "engine.sock"), "--checkpoint", str(checkpoint),
        "--config", json.dumps(dataclasses.asdict(RuntimeConfig())),
    )  # fmt: skip
    spec = ChildSpec("engine", (*command, *options), {"OMP_NUM_THREADS": "1"}, is_ready=lambda line: line == "ready")
    child = Child(spec, on_line=inquiry.on_line)
    keeper = asyncio.create_task(child.keep_running(max_failed_starts=1), name="soak/engine")
    try:
        ready = asyncio.create_task(child.ready.wait())
        await asyncio.wait({ready, keeper}, timeout=READY_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        if not child.ready.is_set():
            raise RuntimeError("the engine did not start; its reason stands above")
        yield child, inquiry
    finally:
        await child.stop()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def run_streams(
    child: Child,
    inquiry: Inquiry,
    socket_path: Path,
    num_streams: int,
    at_once: int,
    every: int,
    seed: int,
    *,
    needs_clock: bool,
) -> tuple[Ledger, Counter[str]]:
    """Readings of engine and client, and what came of the streams ("kind: outcome")."""
    ledger, outcomes, order = Ledger(), Counter[str](), kinds(seed)
    resampler = StreamResampler(RATE_HZ, api.INPUT_SAMPLE_RATE_HZ)
    speech = resampler.push(clip("order_status")) + resampler.finish()
    client = await RuntimeClient.connect(socket_path)
    room = asyncio.Semaphore(at_once)

    async def one(number: int, kind: str) -> None:
        async with room:
            outcome = await Stream(client, f"s{number}", kind, seed + number, speech, needs_clock).run()
            outcomes[f"{kind}: {outcome}"] += 1

    try:
        for begin in range(0, num_streams, every):
            numbers = range(begin, min(begin + every, num_streams))
            await asyncio.gather(*(one(number, next(order)) for number in numbers))
            await asyncio.sleep(_REST_S)
            ledger.note("engine", numbers[-1] + 1, *await inquiry.ask("engine", child))
            own = held_by(os.getpid()) | {"tasks": len(asyncio.all_tasks()), "streams": client.num_held}
            ledger.note("client", numbers[-1] + 1, own)
            say_progress(ledger, numbers[-1] + 1)
    finally:
        await client.close()
    return ledger, outcomes
