"""What a call's row and journal say of its life: the manner it was led in, what its line was like, how and why it
ended.

Owns the disposition and the cause. It writes through the call's context and decides nothing: agent/call.py tells it
what happened. Pure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from agent.call_context import CallContext
from agent.call_setup import CallSetup
from agent.floor import TurnTakingConfig
from telephony import leg as tel
from telephony.sip.causes import disposition_of_unanswered


@dataclass
class CallRecord:
    setup: CallSetup
    context: CallContext
    is_confirmed: bool = False  # answered, by whichever agent
    disposition: str = "completed"
    cause: str = ""  # why we end it; empty = whatever the leg says

    def keep_manner(self, config: TurnTakingConfig) -> None:
        """Which turn taking this call has, with every value as it takes effect."""
        decision = self.setup.policy.duplex(self.setup.facts)
        reasons = list(decision.reasons)
        self.context.journal("turn_taking", preset=decision.preset, reasons=reasons, **asdict(config))

    def confirmed(self, codec: str) -> None:
        self.is_confirmed = True
        self.context.keep("answer_call", codec=codec)

    def recording_switched(self, is_kept: bool, by: str) -> None:
        method = "go_on_recording" if is_kept else "pause_recording"
        self.context.keep(method, sample=self.context.sample, by=by)

    def media_health(self, event: tel.MediaHealth) -> None:
        """Said once, two seconds after the answer: one-way audio has its name in the record."""
        fields = {name: getattr(event, name) for name in event.__struct_fields__ if name != "leg_id"}
        self.context.journal("media_health", **fields)
        if event.verdict.startswith("one_way"):
            detail = f"{event.packets_in} packets in, {event.packets_out} out, {event.codec}, {event.promised_address}"
            self.context.keep("add_defect", kind=event.verdict, detail=detail)

    def ended(self, event: tel.LegDisconnected) -> None:
        """The row is closed, with our cause where it was we who hung up."""
        cause = self.cause if event.by == "agent" and self.cause else event.cause
        if not self.is_confirmed and self.setup.facts.direction == "outbound":
            self.disposition = disposition_of_unanswered(cause, event.by)
        elif cause == event.cause and not self.is_confirmed:
            self.disposition = "abandoned"
        elif cause == event.cause and event.by == "network":
            self.disposition = "failed"
        self.context.journal("leg_ended", cause=event.cause, sip_status=event.sip_status, by=event.by)
        fields = {"disposition": self.disposition, "cause": cause, "ended_by": event.by}
        self.context.keep("close_call", **fields, end_sample=self.context.sample)
