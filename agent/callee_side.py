"""The callee of a call that we placed: who answered, and what follows from it.

The greeting begins at once, whoever it is; meanwhile evidence and captions make a verdict (answered_by.py). For a
person nothing changes. For a machine the agent falls silent and the campaign's `[outbound]` rules say what to do: hang
up, leave a message after the beep (or after the greeting, where none comes), tell a call screener who calls. Whoever
comes to the telephone later hears notice and greeting from the start.

Asks for the floor by events and never takes it: agent/turn_taking.py decides. Writes to the call's record what was
found, when and why. Does nothing in a call that came in. Pure; time is the leg's samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from agent import floor
from agent.answered_by import PEOPLE, AnsweredBy, Verdict, WhoAnswered
from agent.call_context import CallContext
from agent.call_record import CallRecord
from agent.call_setup import CallSetup
from agent.metrics import WireTimes
from minmo_runtime.api import INPUT_SAMPLE_RATE_HZ, Caption
from telephony import leg as tel

VOICEMAIL_LINE, SCREENER_LINE = "voicemail_message", "screener_reply"
LATEST_DECISION_S = 30.0  # since the answer: an undecided callee is treated as a person, as it was until then
SILENCE_WITHOUT_BEEP_S = 2.0  # after a machine's greeting: it may record without having beeped
LONGEST_GREETING_S = 30.0  # of a machine, since the verdict
NOT_THE_BEEP_S = 2.0  # a voice for so long while our message is said: the greeting goes on
SCREENER_WAITS_S = 0.6  # of silence: it has said all, and listens
LONGEST_SCREENING_S = 30.0  # after our answer
LINGER_S = 0.3  # between the message's last word and BYE
DISPOSITIONS = {
    AnsweredBy.VOICEMAIL: "voicemail",
    AnsweredBy.IVR: "ivr",
    AnsweredBy.CALL_SCREENER: "call_screened",
    AnsweredBy.CARRIER_MESSAGE: "carrier_message",
}
MESSAGE_LEFT = "voicemail_left"


class Stage(StrEnum):
    OFF = "off"  # a call that came in, or that is not answered
    OPENING = "opening"  # we speak to whoever it is
    HOLDING = "holding"  # a machine speaks: we are silent
    LEAVING = "leaving"  # it records: our message
    REPLYING = "replying"  # to a call screener
    SCREENED = "screened"  # it knows who calls: a person may come
    LEFT = "left"  # the message was heard out
    SETTLED = "settled"  # nothing more is asked


@dataclass
class CalleeSide:
    setup: CallSetup
    context: CallContext
    record: CallRecord
    wire: WireTimes
    opening: tuple[floor.LineWanted, ...]  # notice and greeting
    stage: Stage = Stage.OFF
    who: WhoAnswered = field(default_factory=lambda: WhoAnswered(8000))
    _action: str = ""  # what the campaign wants, now that a machine has answered
    _is_greeted: bool = False  # notice and greeting were heard out
    _since: int = 0  # of the stage
    _machine_since: int = 0
    _last_voiced: int = 0
    _first_decision_ms: float | None = None

    # ------------------------------------------------------------------ what happens

    def answered(self) -> None:
        """The callee's line is open. Detection begins, for our own calls."""
        if self.setup.facts.direction == "outbound":
            self.who = WhoAnswered(self.setup.sample_rate_hz)
            self._enter(Stage.OPENING)

    def on_evidence(self, event: tel.AnswerEvidence) -> list[floor.Event]:
        if self.stage in (Stage.OFF, Stage.SETTLED):
            return []
        self.context.journal(
            "answer_evidence", sound=event.kind, sample=event.sample, frequency_hz=event.frequency_hz,
            ms=self._ms(event.num_samples),
        )  # fmt: skip
        began = event.sample - event.num_samples
        is_expected = self.stage in (Stage.LEAVING, Stage.SCREENED) and began >= self._since
        wanted = self._follow(self.who.hear(event, may_be_person=is_expected, is_greeted=self._is_greeted))
        if event.kind == "beep" and self._waits_to_leave:
            wanted += self._leave_message()
        elif event.kind == "speaking" and self.stage is Stage.LEAVING:
            spoke_s = (event.sample - max(began, self._since)) / self.setup.sample_rate_hz
            wanted += self._hold() if spoke_s >= NOT_THE_BEEP_S else []
        return wanted

    def on_caption(self, caption: Caption) -> list[floor.Event]:
        if self.stage in (Stage.OFF, Stage.SETTLED):
            return []
        rate_hz = self.setup.sample_rate_hz
        first, last = (
            sample * rate_hz // INPUT_SAMPLE_RATE_HZ for sample in (caption.start_sample, caption.end_sample)
        )  # fmt: skip
        return self._follow(self.who.read(caption.text, first, last))

    def on_audio(self, is_voiced: bool) -> list[floor.Event]:
        """Every frame: what time alone brings."""
        if self.stage in (Stage.OFF, Stage.SETTLED):
            return []
        if is_voiced:
            self._last_voiced = self.context.sample
        wanted = self._follow(self.who.pass_time(self.context.sample))
        silence_s = (self.context.sample - self._last_voiced) / self.setup.sample_rate_hz
        waited_s = (self.context.sample - self._since) / self.setup.sample_rate_hz
        match self.stage:
            case Stage.HOLDING:
                wanted += self._wait_for_machine(silence_s)
            case Stage.SCREENED if waited_s >= LONGEST_SCREENING_S:
                wanted += self._hang_up()
            case Stage.LEFT if waited_s >= LINGER_S:
                wanted += self._hang_up()
            case Stage.OPENING if self.context.sample >= LATEST_DECISION_S * self.setup.sample_rate_hz:
                self.settle()
        return wanted

    def on_turn_over(self, purpose: str) -> list[floor.Event]:
        """One of our turns was heard to its end."""
        if purpose == VOICEMAIL_LINE and self.stage is Stage.LEAVING:
            self.record.disposition = MESSAGE_LEFT
            self._enter(Stage.LEFT)
            return [floor.MachineAnswered()]
        elif purpose == SCREENER_LINE and self.stage is Stage.REPLYING:
            self._enter(Stage.SCREENED)
            return [floor.MachineAnswered()]
        elif purpose == self.setup.greeting:
            self._is_greeted = True
            if self.who.kind is AnsweredBy.HUMAN:
                self.settle()
        return []

    def on_reply(self) -> None:
        """The agent answers what a person said: it is a conversation."""
        if self.stage is Stage.OPENING and self.who.kind is AnsweredBy.HUMAN:
            self.settle()

    def settle(self) -> None:
        """Who it is will not be asked any more."""
        if self.stage not in (Stage.OFF, Stage.SETTLED):
            self._enter(Stage.SETTLED)
            self.context.add(tel.StopAnswerDetection(leg_id=self.context.leg_id))

    def ended(self) -> None:
        """The call is over: the record says so where nobody was found out."""
        if self.setup.facts.direction == "outbound" and self.record.is_confirmed and self._first_decision_ms is None:
            self._keep(Verdict(AnsweredBy.UNDECIDED, "the call ended first", AnsweredBy.UNDECIDED), ())

    # ------------------------------------------------------------------ what follows

    def _follow(self, verdict: Verdict | None) -> list[floor.Event]:
        if verdict is None:
            return []
        if verdict.kind is AnsweredBy.HUMAN:
            self._keep(verdict, ())
            return self._greet_again() if self.stage is not Stage.OPENING else []
        if verdict.was in PEOPLE:
            self._machine_since = self.context.sample
        decision = self.setup.policy.answered(self.setup.facts, verdict.kind.value)
        self._action = decision.action
        self._keep(verdict, decision.reasons)
        if self._action == "go_on":
            wanted = self._greet_again() if self.stage is not Stage.OPENING else []
            self.settle()
            return wanted
        self.record.disposition = DISPOSITIONS[verdict.kind]
        if self._action == "hang_up" and verdict.kind is not AnsweredBy.VOICEMAIL:
            return self._hang_up()
        return self._hold()

    def _wait_for_machine(self, silence_s: float) -> list[floor.Event]:
        """It speaks. A screener that has said all is answered; a voicemail, once we are sure, is left or spoken to."""
        if self.context.sample - self._machine_since >= LONGEST_GREETING_S * self.setup.sample_rate_hz:
            return self._hang_up()
        if self.who.kind is AnsweredBy.CALL_SCREENER:
            reply = floor.LineWanted(SCREENER_LINE, is_protected=True)
            return self._say(Stage.REPLYING, reply) if silence_s >= SCREENER_WAITS_S else []
        if not self.who.is_sure:
            return []
        if self._action == "hang_up":
            return self._hang_up()
        return self._leave_message() if silence_s >= SILENCE_WITHOUT_BEEP_S else []

    @property
    def _waits_to_leave(self) -> bool:
        is_voicemail = self.who.kind is AnsweredBy.VOICEMAIL and self._action == "leave_message"
        return is_voicemail and self.stage is Stage.HOLDING

    def _hold(self) -> list[floor.Event]:
        is_silent = self.stage in (Stage.HOLDING, Stage.SCREENED)
        self._enter(Stage.HOLDING)
        return [] if is_silent else [floor.MachineAnswered()]

    def _leave_message(self) -> list[floor.Event]:
        """Who speaks comes first (the notice): whoever hears the message must know."""
        notice = self.opening[0]
        return self._say(Stage.LEAVING, notice, floor.LineWanted(VOICEMAIL_LINE, is_protected=True))

    def _greet_again(self) -> list[floor.Event]:
        self.record.disposition, self._is_greeted = "completed", False
        return self._say(Stage.OPENING, *self.opening)

    def _say(self, stage: Stage, *lines: floor.LineWanted) -> list[floor.Event]:
        self._enter(stage)
        return [floor.LinesWanted(lines)]

    def _hang_up(self) -> list[floor.Event]:
        cause = self.record.disposition
        self.settle()
        return [floor.HangUpWanted(cause)]

    def _enter(self, stage: Stage) -> None:
        self.stage, self._since = stage, self.context.sample

    # ------------------------------------------------------------------ what is kept

    def _keep(self, verdict: Verdict, reasons: tuple[str, ...]) -> None:
        sample = self.context.sample
        is_decided = verdict.kind is not AnsweredBy.UNDECIDED
        decision_ms = self._ms(sample - self.wire.answered_sample) if is_decided else None
        self.context.journal(
            "answered_by", kind=verdict.kind.value, was=verdict.was.value, reasons=[verdict.reason, *reasons],
            decision_ms=decision_ms, sample=sample,
        )  # fmt: skip
        if self._first_decision_ms is None and decision_ms is not None:
            self._first_decision_ms = decision_ms
            self.context.keep_figures([{"turn_id": "", "name": "answer_decision_ms", "value": decision_ms}])

    def _ms(self, num_samples: int) -> float:
        return round(1000 * num_samples / self.setup.sample_rate_hz, 1)
