"""Calls that we place for a campaign: who may be called, by which line, and a leg that begins when the agent is ready.

Everything is asked before a packet leaves: the campaign's `[outbound]` rules, the hosts and trunks of the operator,
a free place at the engine and at a worker, the disk. Then the record is opened and the call runs like any other
(agent/live_call.py), but for its leg: the engine is made ready first, and where an inbound call is answered this one's
INVITE goes out (`DialledLeg`), so nobody who picks up waits for a model.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from agent.dial_socket import Dial, Dialled, NotDialled
from agent.live_call import utc_now
from agent.reception import Reception, call_id_of
from agent.workers import Workers
from policies.campaign import Campaign
from policies.decisions import OutboundDecision
from policies.facts import CallFacts
from storage.calls import StorageFull, UnknownCall
from telephony import leg as tel
from telephony.client import CallRefused, WorkerLeg, WorkerLost
from telephony.frames import Tap
from telephony.sip.causes import Cause
from telephony.sip.trunk import TrunkRefused, routes_of
from telephony.states import check_legal

log = logging.getLogger(__name__)
PLACED_WITHIN_S = 5.0
Spawn = Callable[[Coroutine[Any, Any, None], str], object]


class DialledLeg:
    """A leg of `telephony.leg.Leg` whose INVITE goes out with `Answer`: the agent is ready now. What was to be played
    before waits in the worker for the callee's answer. A call that no worker takes ends with cause `not_placed`."""

    direction = "outbound"
    can_transfer = True  # placed by SIP
    is_resumed = False

    def __init__(self, leg_id: str, sample_rate_hz: int, place: Callable[[], Coroutine[Any, Any, WorkerLeg]]) -> None:
        self.leg_id, self.sample_rate_hz = leg_id, sample_rate_hz
        self.state = tel.LegState.NULL
        self.played_before: dict[str, int] = {}
        self._place = place
        self._tap: Tap | None = None
        self._placed: asyncio.Future[WorkerLeg | tel.LegDisconnected] = asyncio.get_running_loop().create_future()

    async def send(self, command: tel.LegCommand) -> None:
        if self._placed.done():
            placed = self._placed.result()
            if isinstance(placed, WorkerLeg):
                await placed.send(command)
        elif isinstance(command, tel.Answer):
            await self._begin()
        elif isinstance(command, tel.Hangup | tel.Reject):
            self._fail(Cause.CANCELLED, "agent")
        else:
            check_legal(command, self.state)  # nothing is played before `Answer`

    async def events(self) -> AsyncIterator[tel.LegEvent]:
        placed = await self._placed
        if isinstance(placed, tel.LegDisconnected):
            yield tel.LegStateChanged(leg_id=self.leg_id, state=tel.LegState.DISCONNECTED)
            yield placed
            return
        async for event in placed.events():
            if isinstance(event, tel.LegStateChanged):
                self.state = event.state
            yield event

    def set_tap(self, tap: Tap | None) -> None:
        self._tap = tap

    async def _begin(self) -> None:
        try:
            leg = await asyncio.wait_for(self._place(), PLACED_WITHIN_S)
        except (CallRefused, WorkerLost, TimeoutError) as error:
            log.error("leg %s is not placed: %s", self.leg_id, error or "the worker does not answer")
            self._fail(Cause.NOT_PLACED, "network")
            return
        leg.set_tap(self._tap)
        self.state = leg.state
        self._placed.set_result(leg)

    def _fail(self, cause: Cause, by: str) -> None:
        self.state = tel.LegState.DISCONNECTED
        self._placed.set_result(tel.LegDisconnected(leg_id=self.leg_id, cause=cause, by=by))


class Dialler:
    """One per agent process. `spawn(work, name)` runs a call to its end."""

    def __init__(self, reception: Reception, workers: Workers, spawn: Spawn) -> None:
        self._reception, self._workers, self._spawn = reception, workers, spawn
        self._config = reception.config
        self._beginning: set[str] = set()  # call ids whose record is being opened

    async def dial(self, wanted: Dial) -> Dialled | NotDialled:
        """Returns when the record is open and the call is on its way."""
        reception = self._reception
        campaign = reception.policy.campaign_named(wanted.campaign)
        if campaign is None:
            return NotDialled("unknown_campaign", f"there is no valid campaign {wanted.campaign!r}")
        decision = reception.policy.outbound(campaign, wanted.number, wanted.uri)
        if not decision.is_allowed:
            return NotDialled("not_allowed", "; ".join(decision.reasons))
        try:
            routes_of(wanted.uri, wanted.number, decision.trunks, self._config.telephony)
        except TrunkRefused as error:
            return NotDialled("bad_target", str(error))
        leg_id = _leg_id_of(wanted)
        call_id = call_id_of(leg_id)
        if call_id in self._beginning or call_id in reception.calls:
            return Dialled(call_id, is_new=False)
        self._beginning.add(call_id)
        try:
            if wanted.request_id and await self._is_known(call_id):
                return Dialled(call_id, is_new=False)
            return self._no_room(campaign) or await self._begin(leg_id, wanted, campaign, decision)
        finally:
            self._beginning.discard(call_id)

    def _no_room(self, campaign: Campaign) -> NotDialled | None:
        reception, retry_s = self._reception, self._config.policies.retry_after_s
        if reception.is_closing:
            return NotDialled("closing", "this agent is closing", retry_s)
        facts = CallFacts(call_id="", did=campaign.dids[0], started_at=utc_now())
        admission = reception.policy.admit(facts, reception.num_busy, self._config.runtime.max_streams)
        if not admission.is_admitted:
            return NotDialled("busy", "; ".join(admission.reasons), admission.retry_after_s)
        if self._workers.with_room() is None:
            return NotDialled("busy", "every line is in use", retry_s)
        return None

    async def _begin(
        self, leg_id: str, wanted: Dial, campaign: Campaign, decision: OutboundDecision
    ) -> Dialled | NotDialled:
        party = wanted.number or wanted.uri
        facts = CallFacts(
            call_id=call_id_of(leg_id), did=campaign.dids[0], ani=party, direction="outbound", started_at=utc_now()
        )
        leg = DialledLeg(leg_id, self._config.telephony.sample_rate_hz, lambda: self._place(leg_id, wanted, decision))
        try:
            with self._reception.reserve():
                await self._reception.open_outbound(
                    leg, facts, campaign, party=party, caller_id=decision.caller_id, source=f"by {wanted.actor}"
                )
        except StorageFull as error:
            return NotDialled("storage_full", str(error), self._config.policies.retry_after_s)
        self._spawn(self._reception.run_outbound(leg, facts, campaign), f"agent/leg-{leg_id}")
        return Dialled(facts.call_id)

    async def _place(self, leg_id: str, wanted: Dial, decision: OutboundDecision) -> WorkerLeg:
        """By the freest worker; it refuses what configuration does not allow, and when it is full after all."""
        client = self._workers.with_room()
        if client is None:
            raise CallRefused("every line is in use")
        return await client.place_call(
            wanted.uri, number=wanted.number, trunks=decision.trunks, from_user=decision.caller_id,
            display_name=decision.display_name, leg_id=leg_id, detects_answer=True,
        )  # fmt: skip

    async def _is_known(self, call_id: str) -> bool:
        """Also one that an earlier agent placed."""

        def look() -> bool:
            try:
                self._reception.store.reader.get_call(call_id)
            except UnknownCall:
                return False
            return True

        return await asyncio.get_running_loop().run_in_executor(None, look)


def _leg_id_of(wanted: Dial) -> str:
    """The same for the same request, whoever asks again (users.md L8: one INVITE for each attempt)."""
    if not wanted.request_id:
        return f"d{uuid.uuid4().hex[:15]}"
    return "d" + hashlib.sha256(f"{wanted.campaign}/{wanted.request_id}".encode()).hexdigest()[:15]
