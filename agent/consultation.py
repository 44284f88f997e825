"""Warm hand-off: a person is called on a second leg, told what was said, and connected with the caller if they want to.

The second leg is counted before it starts: the caller's own worker takes it or says that it is full, and the engine's
stream for the summary is reserved at admission. Summary and sentences are made while the telephone rings. The person
takes the call with a key; a person who is busy, does not answer, refuses, hangs up or presses nothing leaves the caller
with the agent, and `call_person` returns why. A caller who hangs up meanwhile cancels this task, and with it the second
leg. Part of the shell: clocks and sockets, no decisions about the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from agent import rendering
from agent.call_setup import CallSetup
from agent.config import HandoffConfig
from agent.engine_link import EngineLink
from agent.handoff_summary import Summary, summarise
from agent.workers import Workers
from minmo_runtime import api
from minmo_runtime.text import DIGIT_WORDS
from storage.calls import CallStore
from telephony import leg as tel
from telephony.client import CallRefused, WorkerLeg, WorkerLost
from telephony.sip.bridge import call_for
from telephony.sip.causes import Cause

log = logging.getLogger(__name__)
WAIT_EVERY_S = 6.0  # between two sentences to the caller; less than turn_taking.reprompt_after_s
SPEECH_WITHIN_S = 20.0
JOINED_WITHIN_S = 3.0
_PAUSE_S = 0.25  # between the sentences of the summary
_ITEM = "summary"
_KEY_WORDS = {"*": "star", "#": "hash"}

Note = Callable[[str, str, str], None]
"""(state, reason, summary) of storage's record_handoff; the summary is given once, with `calling`."""


class NotTaken(Exception):
    """Nobody took the call; a SIP status and why."""

    def __init__(self, sip_status: int, reason: str) -> None:
        super().__init__(reason)
        self.sip_status = sip_status


class Reserve(Protocol):
    """Of agent/reception.py: one more stream of the engine, while the context lasts; RuntimeOverloaded when full."""

    def __call__(self) -> contextlib.AbstractContextManager[None]: ...


@dataclass
class HandOffDesk:
    """One per agent process."""

    settings: HandoffConfig
    store: CallStore
    writer: Executor
    engines: EngineLink
    workers: Workers
    reserve: Reserve

    async def call_person(
        self, setup: CallSetup, caller: tel.Leg, target: str, note: Note, still_ringing: Callable[[], None]
    ) -> tel.ReferResult | None:
        """None when the two were connected: the worker tells the caller's leg. `still_ringing` is called again and
        again until the person has answered."""
        summary = await self._summary(setup)
        note("calling", "", summary.written)
        try:
            with self.reserve():
                person = Person(self, setup, target)
                await person.take_over(caller, summary, note, still_ringing)
        except (NotTaken, api.RuntimeOverloaded, api.StreamLost) as error:
            status = error.sip_status if isinstance(error, NotTaken) else 503
            note("failed", f"{status} {error}", "")
            return tel.ReferResult(leg_id=setup.leg_id, sip_status=status, reason=str(error))
        note("accepted", "", "")
        return None

    async def _summary(self, setup: CallSetup) -> Summary:
        """From the record, after everything that was kept before now."""
        call = await asyncio.get_running_loop().run_in_executor(self.writer, self.store.get_call, setup.call_id)
        if call["direction"] == "outbound":
            call["ani"] = call["did"]  # the other party, whoever called whom
        key = self.settings.accept_digit
        word = DIGIT_WORDS[int(key)] if key.isdigit() else _KEY_WORDS[key]
        return summarise(call, setup.lines.say("person_greeting"), setup.lines.say("person_accept").format(key=word))


@dataclass
class Person:
    """One attempt. `take_over` returns when the two are joined."""

    desk: HandOffDesk
    setup: CallSetup
    target: str
    leg: WorkerLeg | None = None
    is_answered: bool = False
    is_told: bool = False
    is_accepted: bool = False
    ended: tel.LegDisconnected | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def take_over(self, caller: tel.Leg, summary: Summary, note: Note, still_ringing: Callable[[], None]) -> None:
        settings = self.desk.settings
        speech = asyncio.create_task(self._speak(summary), name=f"call-{self.setup.call_id}/summary")
        tasks: list[asyncio.Task[None]] = []
        try:
            self.leg = leg = await self._place(caller)
            tasks = [asyncio.create_task(self._follow(leg)), asyncio.create_task(_repeat(still_ringing))]
            await self._until(lambda: self.is_answered, settings.ring_s, 480, "nobody answered")
            note("answered", "", "")
            pcm, rate_hz = await self._made(speech)
            for play in _pieces(leg.leg_id, pcm, rate_hz):
                await leg.send(play)
            seconds = len(pcm) / 2 / rate_hz
            is_known = lambda: self.is_told or self.is_accepted  # noqa: E731
            await self._until(is_known, seconds + settings.accept_s, 480, "nobody listened")
            await self._until(lambda: self.is_accepted, settings.accept_s, 480, "nobody took the call")
            await self._join(caller, leg)
        finally:
            for task in (speech, *tasks):
                task.cancel()
            if self.leg is not None:
                self.leg.hang_up()
            await asyncio.gather(speech, *tasks, return_exceptions=True)

    async def _place(self, caller: tel.Leg) -> WorkerLeg:
        """By the worker that holds the caller: only there can the two be joined."""
        client = self.desk.workers.of_leg(caller.leg_id)
        if client is None:
            raise NotTaken(501, "this caller's line cannot be joined with another one")
        uri, number = call_for(self.target)
        try:
            return await client.place_call(
                uri, number=number, from_user=self.setup.facts.ani, headers={"X-Minmo-Call": self.setup.call_id}
            )
        except (CallRefused, WorkerLost) as error:
            raise NotTaken(503, str(error)) from error

    async def _follow(self, leg: WorkerLeg) -> None:
        async for event in leg.events():
            match event:
                case tel.LegStateChanged(state=tel.LegState.CONFIRMED):
                    self.is_answered = True
                case tel.DtmfReceived(digit=digit) if digit == self.desk.settings.accept_digit:
                    self.is_accepted = True
                case tel.PlayoutProgress(item_id=item_id, is_finished=True) if item_id == _ITEM:
                    self.is_told = True
                case tel.LegDisconnected():
                    self.ended = event
                case _:
                    continue
            self._changed.set()

    async def _until(self, condition: Callable[[], bool], within_s: float, sip_status: int, reason: str) -> None:
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    if self.ended is not None:
                        status = self.ended.sip_status if self.ended.sip_status >= 300 else sip_status
                        raise NotTaken(status, f"{reason}: {self.ended.cause}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise NotTaken(sip_status, reason) from None

    async def _join(self, caller: tel.Leg, person: WorkerLeg) -> None:
        """The person's leg ends for us when the two are connected; if they cannot be, the caller's leg is told."""
        assert isinstance(caller, WorkerLeg), caller
        caller.join(person)
        with contextlib.suppress(NotTaken):
            await self._until(lambda: self.ended is not None, JOINED_WITHIN_S, 500, "not joined")
        if self.ended is None or self.ended.cause != Cause.TRANSFERRED:
            raise NotTaken(500, "the two could not be connected")

    # ---------------------------------------------------------------- the summary

    async def _speak(self, summary: Summary) -> tuple[bytes, int]:
        """In the engine's voice, a sentence at a time."""
        runtime = await self.desk.engines.runtime()
        prompt = self.setup.policy.system_prompt(self.setup.facts)
        pcm, rate_hz = bytearray(), 0
        for text in summary.spoken:
            stream = f"{self.setup.call_id}-s{uuid.uuid4().hex[:6]}"
            said, rate_hz = await rendering.speak(runtime, stream, text, prompt)
            pcm += said + bytes(2 * int(_PAUSE_S * rate_hz))
        return bytes(pcm), rate_hz

    async def _made(self, speech: asyncio.Task[tuple[bytes, int]]) -> tuple[bytes, int]:
        try:
            return await asyncio.wait_for(speech, SPEECH_WITHIN_S)
        except (TimeoutError, RuntimeError, rendering.Untrained) as error:
            log.error("call %s: no summary: %s", self.setup.call_id, error)
            raise NotTaken(503, "the summary could not be spoken") from error


async def _repeat(still_ringing: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(WAIT_EVERY_S)
        still_ringing()


def _pieces(leg_id: str, pcm: bytes, rate_hz: int) -> list[tel.Play]:
    """A second each: one message of the ring holds no long speech."""
    size = 2 * rate_hz
    starts = range(0, len(pcm), size)
    return [
        tel.Play(
            leg_id=leg_id, item_id=_ITEM, pcm=pcm[at : at + size], sample_rate_hz=rate_hz, is_final=at == starts[-1]
        )
        for at in starts
    ]
