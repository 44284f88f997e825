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
from agent.metrics import echo_figures
from telephony import leg as tel
from telephony.sip.causes import disposition_of_unanswered

TRANSFERRED_UNKNOWN = "transferred_unknown"  # the caller took our REFER and left without a word of its outcome


@dataclass
class CallRecord:
    setup: CallSetup
    context: CallContext
    is_confirmed: bool = False  # answered, by whichever agent
    disposition: str = "completed"
    cause: str = ""  # why we end it; empty = whatever the leg says
    _is_notice_kept: bool = False
    _is_sound_wanted: bool = True  # nobody has paused the recording
    _is_party_told: bool = True  # but for a party that the call was handed to: it has not heard the notice yet

    def keep_manner(self, config: TurnTakingConfig) -> None:
        """Which turn taking this call has, with every value as it takes effect."""
        decision = self.setup.policy.duplex(self.setup.facts)
        reasons = list(decision.reasons)
        self.context.journal("turn_taking", preset=decision.preset, reasons=reasons, **asdict(config))

    def confirmed(self, codec: str) -> None:
        self.is_confirmed = True
        self.context.keep("answer_call", codec=codec)

    def recording_switched(self, is_kept: bool, by: str) -> None:
        self._is_sound_wanted = is_kept
        if self._is_party_told:
            self._switch_recording(is_kept, by)

    def new_party(self) -> None:
        """Consent to be recorded is a party's own: where it follows from the notice, sound is kept again from there."""
        if self.setup.policy.recording(self.setup.facts).mode == "after_notice" and self._is_party_told:
            self._is_party_told = False
            if self._is_sound_wanted:
                self._switch_recording(False, "new_party")

    def notice_heard(self) -> None:
        if not self._is_notice_kept:
            self._is_notice_kept = True
            self.context.keep("notice_finished", sample=self.context.sample)
        if not self._is_party_told:
            self._is_party_told = True
            if self._is_sound_wanted:
                self._switch_recording(True, "notice")

    def _switch_recording(self, is_kept: bool, by: str) -> None:
        method = "go_on_recording" if is_kept else "pause_recording"
        self.context.keep(method, sample=self.context.sample, by=by)

    def line_judged(self, event: tel.MediaHealth | tel.EchoMeasured) -> None:
        """Each is said once: whether audio crosses both ways; how strongly the line sends our voice back."""
        fields = {name: getattr(event, name) for name in event.__struct_fields__ if name != "leg_id"}
        self.context.journal("media_health" if isinstance(event, tel.MediaHealth) else "echo_measured", **fields)
        if isinstance(event, tel.EchoMeasured):
            self._keep_echo(event)
        elif event.verdict.startswith("one_way"):
            detail = f"{event.packets_in} packets in, {event.packets_out} out, {event.codec}, {event.promised_address}"
            self.context.keep("add_defect", kind=event.verdict, detail=detail)

    def _keep_echo(self, event: tel.EchoMeasured) -> None:
        if event.verdict != "none":
            self.context.keep_figures(echo_figures(event))
        if event.verdict == "strong":
            echo = f"our voice comes back {event.return_loss_db:.0f} dB quieter after {event.delay_ms} ms"
            detail = f"{echo}, {event.enhancement_db:.0f} dB of it removed, {event.left_dbov:.0f} dBov left"
            self.context.keep("add_defect", kind="echo_not_cancelled", detail=detail)

    def left_for_transfer(self) -> None:
        """The caller is gone, most likely to where we sent it."""
        self.disposition = self.cause = TRANSFERRED_UNKNOWN

    def ended(self, event: tel.LegDisconnected) -> None:
        """The row is closed, with our cause where it was we who hung up."""
        is_ours = event.by == "agent" or self.cause == TRANSFERRED_UNKNOWN
        cause = self.cause if is_ours and self.cause else event.cause
        if not self.is_confirmed and self.setup.facts.direction == "outbound":
            self.disposition = disposition_of_unanswered(cause, event.by)
        elif cause == event.cause and not self.is_confirmed:
            self.disposition = "abandoned"
        elif cause == event.cause and event.by == "network":
            self.disposition = "failed"
        self.context.journal("leg_ended", cause=event.cause, sip_status=event.sip_status, by=event.by)
        fields = {"disposition": self.disposition, "cause": cause, "ended_by": event.by}
        self.context.keep("close_call", **fields, end_sample=self.context.sample)
