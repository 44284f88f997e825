"""What becomes of a leg: refused, a new call, or a call that outlived an earlier agent. One per agent process.

The leg's first event decides: admission and campaign come from policies, the record is opened in storage before
anything is answered, then agent/live_call.py owns the leg to its end. Knows no process and no signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any, Protocol

from agent.call import Call
from agent.call_setup import CallSetup
from agent.config import Config
from agent.consultation import HandOffDesk
from agent.engine_link import EngineLink
from agent.events import Resumed, Start
from agent.live_call import START, LiveCall, utc_now
from agent.monitor import Monitor
from agent.prompts.lines import LineBook
from agent.tools.shop import Shop
from agent.workers import Workers
from minmo_runtime.api import RuntimeOverloaded
from policies.campaign import Campaign
from policies.engine import PolicyEngine
from policies.facts import CallFacts
from storage.calls import CallStore, StorageFull
from storage.entries import TurnAppended, TurnUpdated
from storage.recordings import CallRecorder
from storage.replay import Orphan
from telephony import leg as tel
from telephony.client import WorkerLeg
from telephony.frames import Tap

log = logging.getLogger(__name__)


class TakenLeg(tel.Leg, Protocol):
    """A leg that a call can be made of: a worker's, or one that we dial (agent/outbound.py)."""

    direction: str
    can_transfer: bool
    sample_rate_hz: int

    def set_tap(self, tap: Tap | None) -> None: ...


class Reception:
    """Takes legs; holds the calls that run."""

    def __init__(
        self, config: Config, store: CallStore, writer: Executor, engines: EngineLink, policy: PolicyEngine,
        book: LineBook, rendered: tuple[dict[str, bytes], int],
    ) -> None:  # fmt: skip
        """`writer` runs the store's writing methods in order; `rendered`: fixed sentences as audio, and its rate."""
        self.config, self.store, self.writer, self.engines = config, store, writer, engines
        self.policy, self.book = policy, book
        self.rendered, self.rendered_rate_hz = rendered
        self.calls: dict[str, LiveCall] = {}
        self.monitor = Monitor(self.calls)
        self.no_calls = asyncio.Event()
        self.no_calls.set()
        self.is_closing = False  # no new calls
        self.workers = Workers()
        self.hand_off = HandOffDesk(config.handoff, store, writer, engines, self.workers, self.reserve)
        self._num_reserved = 0

    @property
    def num_busy(self) -> int:
        """Streams of the engine that are taken or promised."""
        return len(self.calls) + self._num_reserved

    @contextlib.contextmanager
    def reserve(self) -> Iterator[None]:
        """One more stream of the engine; RuntimeOverloaded when there is none."""
        if self.num_busy >= self.config.runtime.max_streams:
            raise RuntimeOverloaded(f"{self.num_busy} of {self.config.runtime.max_streams} places taken")
        self._num_reserved += 1
        try:
            yield
        finally:
            self._num_reserved -= 1

    async def guard(self, leg: WorkerLeg) -> None:
        """A failed call never takes down another."""
        try:
            await self.take(leg)
        except Exception:
            log.exception("leg %s failed", leg.leg_id)
            with contextlib.suppress(tel.LegError):
                await leg.send(tel.Hangup(leg_id=leg.leg_id, cause="agent_error"))
            await self._close_failed(call_id_of(leg.leg_id), "agent_error")

    async def take(self, leg: WorkerLeg) -> None:
        """Lasts as long as the call."""
        call_id = call_id_of(leg.leg_id)
        orphans = {orphan.call_id: orphan for orphan in self.store.orphans()} if leg.is_resumed else {}
        if call_id in orphans:
            await self._resume(leg, orphans[call_id])
            return
        if leg.is_resumed or (incoming := await _first_invite(leg)) is None:
            return  # over before we looked, or nothing is known of it
        facts = CallFacts(
            call_id=call_id,
            did=incoming.did,
            ani=incoming.ani,
            started_at=utc_now(),
            trunk=incoming.trunk,
            is_number_withheld=incoming.is_withheld,
            is_number_asserted=bool(incoming.asserted_identity),
            can_transfer=leg.can_transfer,
            headers={name: value for name, value in incoming.headers.items() if name.lower().startswith("x-")},
        )
        admission = self.policy.admit(facts, self.num_busy, self.config.runtime.max_streams)
        campaign = self.policy.campaign_for(incoming.did)
        if self.is_closing:
            await self._refuse(leg, 503, self.config.policies.retry_after_s, "this agent is closing")
        elif not admission.is_admitted or campaign is None:
            await self._refuse(leg, admission.sip_status, admission.retry_after_s, "; ".join(admission.reasons))
        else:
            await self._begin(leg, incoming, facts, campaign)

    async def close_what_is_left(self) -> None:
        """Calls whose end was not waited for: the line is cut, their rows say so."""
        for call_id in list(self.calls):
            log.warning("call %s did not end in time", call_id)
            await self._close_failed(call_id, "shutdown")

    # ---------------------------------------------------------------------- new calls

    async def _refuse(self, leg: WorkerLeg, sip_status: int, retry_after_s: int, reason: str) -> None:
        log.warning("leg %s is refused with %d: %s", leg.leg_id, sip_status, reason)
        await leg.send(tel.Reject(leg_id=leg.leg_id, sip_status=sip_status, retry_after_s=retry_after_s))

    async def _begin(self, leg: WorkerLeg, incoming: tel.LegIncoming, facts: CallFacts, campaign: Campaign) -> None:
        try:
            await self._write(lambda: self._open_inbound(leg, incoming, facts, campaign))
        except StorageFull as error:
            await self._refuse(leg, 503, self.config.policies.retry_after_s, str(error))
            return
        await self._run(self._live_call(leg, facts, campaign))

    def _open_inbound(self, leg: WorkerLeg, incoming: tel.LegIncoming, facts: CallFacts, campaign: Campaign) -> None:
        self._open(
            leg, facts, campaign, did=incoming.did, ani=incoming.ani, source_address=incoming.source_address,
            display_name=incoming.display_name[:200],
        )  # fmt: skip
        self.store.note_line(
            facts.call_id, trunk=facts.trunk, is_withheld=facts.is_number_withheld,
            is_asserted=facts.is_number_asserted, headers=self.policy.named_headers(facts), now=facts.started_at,
        )  # fmt: skip

    async def open_outbound(
        self, leg: TakenLeg, facts: CallFacts, campaign: Campaign, *, party: str, caller_id: str, source: str
    ) -> None:
        """Its record, before anything is sent, and where others can read it; StorageFull. `source`: who wanted the
        call."""

        def write() -> None:
            self._open(leg, facts, campaign, did=party, ani=caller_id, source_address=source)
            self.store.flush()

        await self._write(write)

    async def run_outbound(self, leg: TakenLeg, facts: CallFacts, campaign: Campaign) -> None:
        """Lasts as long as the call."""
        try:
            await self._run(self._live_call(leg, facts, campaign))
        except Exception:
            log.exception("leg %s failed", leg.leg_id)
            await leg.send(tel.Hangup(leg_id=leg.leg_id, cause="agent_error"))
            await self._close_failed(facts.call_id, "agent_error")

    def _open(
        self, leg: TakenLeg, facts: CallFacts, campaign: Campaign, *, did: str, ani: str, source_address: str,
        display_name: str = "",
    ) -> None:  # fmt: skip
        style = self.policy.style(facts)
        self.store.open_call(
            facts.call_id,
            did=did,
            ani=ani,
            display_name=display_name,
            direction=leg.direction,
            campaign=campaign.name,
            source_address=source_address,
            sample_rate_hz=leg.sample_rate_hz,
            now=facts.started_at,
        )
        recording = self.policy.recording(facts).mode
        recorder = self.store.start_recording(facts.call_id, policy=recording, now=facts.started_at)
        _record(leg, recorder, self.monitor.tap(facts.call_id))
        decided = {name: list(v) if isinstance(v, tuple) else v for name, v in _fields(style).items()}
        self.store.update_call(facts.call_id, style=decided, language=style.language, now=facts.started_at)

    def _live_call(self, leg: TakenLeg, facts: CallFacts, campaign: Campaign) -> LiveCall:
        handoff = campaign.handoff_uri or self.config.handoff.uri
        setup = CallSetup(
            call_id=facts.call_id,
            leg_id=leg.leg_id,
            sample_rate_hz=leg.sample_rate_hz,
            facts=facts,
            policy=self.policy,
            lines=self.book.for_call(campaign.lines, self.policy.claims(facts)),
            order_digits=campaign.order_digits,
            tools=campaign.tools,
            turn_taking=self.config.turn_taking,
            digit_timeout_s=self.config.agent.digit_timeout_s,
            send_keys_cooldown_s=self.config.agent.send_keys_cooldown_s,
            rendered=self.rendered,
            rendered_rate_hz=self.rendered_rate_hz,
        )
        shop = Shop(self.store, facts.call_id, campaign.name, can_transfer=bool(handoff) and facts.can_transfer)
        return LiveCall(Call(setup), leg, self.engines, self.store, self.writer, shop, hand_off=self.hand_off)

    async def _run(self, live: LiveCall, first: Start | Resumed = START) -> None:
        """A call that is cancelled stays in `calls`, for `close_what_is_left`."""
        call_id = live.call.call_id
        self.calls[call_id] = live
        self.no_calls.clear()
        try:
            await live.run(first)
        except Exception:
            self._forget(call_id)
            raise
        self._forget(call_id)

    def _forget(self, call_id: str) -> None:
        del self.calls[call_id]
        self.monitor.call_ended(call_id)
        if not self.calls:
            self.no_calls.set()

    # ------------------------------------------------- calls that outlived an agent

    async def _resume(self, leg: WorkerLeg, orphan: Orphan) -> None:
        """Its record goes on, and so do its recording and the conversation."""
        row = self.store.reader.get_call(orphan.call_id)
        is_outbound = row["direction"] == "outbound"
        named = self.policy.campaign_named(row["campaign"])
        campaign = named if is_outbound else self.policy.campaign_for(row["did"])
        if campaign is None:
            await leg.send(tel.Hangup(leg_id=leg.leg_id, cause="campaign_gone"))
            return
        did, ani = (campaign.dids[0], row["did"]) if is_outbound else (row["did"], row["ani"])
        line = row["line"] or {"trunk": "", "is_withheld": False, "is_asserted": False, "headers": {}}
        facts = CallFacts(
            call_id=orphan.call_id, did=did, ani=ani, direction=row["direction"], started_at=row["started_at"],
            trunk=line["trunk"], is_number_withheld=line["is_withheld"], is_number_asserted=line["is_asserted"],
            headers=line["headers"], can_transfer=leg.can_transfer,
        )  # fmt: skip
        live = self._live_call(leg, facts, campaign)
        self.calls[orphan.call_id] = live  # now: the orphans are closed a moment from here
        self.no_calls.clear()
        await self._write(lambda: self._adopt(leg, orphan.call_id))
        live.call.take_over(orphan.turn_ids, leg.played_before)
        await leg.send(tel.Flush(leg_id=leg.leg_id))  # the worker's apology, if it still plays
        is_notice_heard = row["notice_end_sample"] is not None
        await self._run(live, Resumed(history_of(orphan), is_notice_heard))

    def _adopt(self, leg: WorkerLeg, call_id: str) -> None:
        self.store.adopt_call(call_id)
        _record(leg, self.store.resume_recording(call_id, now=utc_now()), self.monitor.tap(call_id))

    # ------------------------------------------------------------------------ writing

    async def _close_failed(self, call_id: str, cause: str) -> None:
        now = utc_now()
        await self._write(
            lambda: self.store.close_call(call_id, disposition="failed", cause=cause, ended_by="agent", now=now)
        )

    async def _write(self, write: Callable[[], Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.writer, write)


def call_id_of(leg_id: str) -> str:
    """The same for every agent that handles the leg; also a file name."""
    return "c-" + re.sub(r"[^A-Za-z0-9_-]", "-", leg_id)[:60]


def history_of(orphan: Orphan) -> tuple[tuple[str, str], ...]:
    """What had been said when the last agent died, as far as it was acknowledged: (role, text) in the runtime's
    words.
    """
    roles = {"caller": "user", "agent": "assistant"}
    rows: dict[str, tuple[str, str]] = {}
    for entry in orphan.entries:
        if isinstance(entry, TurnAppended) and entry.role in roles and not entry.fields.get("intent"):
            rows[entry.turn_id] = (roles[entry.role], entry.fields.get("heard_text") or "")
        elif isinstance(entry, TurnUpdated) and entry.turn_id in rows and "heard_text" in entry.fields:
            rows[entry.turn_id] = (rows[entry.turn_id][0], entry.fields["heard_text"])
    return tuple(row for row in rows.values() if row[1])


def _record(leg: TakenLeg, recorder: CallRecorder, monitor: Tap) -> None:
    """Both taps of a call: its recording and whoever listens. They read and cannot change."""

    def tap(start_sample: int, caller_pcm: bytes, agent_pcm: bytes) -> None:
        recorder.push("caller", start_sample, caller_pcm)
        recorder.push("agent", start_sample, agent_pcm)
        monitor(start_sample, caller_pcm, agent_pcm)

    leg.set_tap(tap)


def _fields(style: object) -> dict[str, object]:
    return {name: getattr(style, name) for name in style.__struct_fields__}  # type: ignore[attr-defined]


async def _first_invite(leg: WorkerLeg) -> tel.LegIncoming | None:
    async for event in leg.events():
        if isinstance(event, tel.LegIncoming):
            return event
        if isinstance(event, tel.LegDisconnected):
            return None
    return None
