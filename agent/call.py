"""THE MAIN LOOP of a call. Read this first.

`Call.step(event, now) -> actions` is the whole call: one `match` over everything that can happen. Events come from
the leg (telephony/leg.py), from the runtime (minmo_runtime/api.py) and from the shell (agent/events.py); actions go
back to the same three. It translates and chains, nothing else:

    who may speak          agent/turn_taking.py      (asked at every event; its actions are carried out by `_obey`)
    what the agent says    agent/agent_side.py       (and what of it was heard, and where it was cut)
    what the caller said   agent/caller_side.py, agent/keypad.py
    when we answer         agent/answering.py        (at once, or after early media)
    who answered our call  agent/callee_side.py      (a person, a machine; what follows)
    the engine's stream    agent/runtime_side.py     (opened, lost, opened again)
    what tools may do      agent/tools/desk.py       (two phases)
    what policies decide   agent/escalation.py       (admission was before)
    what time it is        agent/hold_clock.py       (it stands still while the party is on hold)
    what is kept           agent/call_record.py, agent/transcript.py, agent/metrics.py

No clock, no I/O, no task: the shell is agent/live_call.py; tests/scenarios drive whole calls in virtual time. Walk:
hops 4-6 and 10-12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from agent import events as own
from agent import floor
from agent.agent_side import AgentSide
from agent.agent_turns import State
from agent.answering import Answering
from agent.call_context import CallContext
from agent.call_record import CallRecord
from agent.call_setup import CallSetup
from agent.callee_side import CalleeSide
from agent.caller_side import CallerSide
from agent.escalation import Escalation
from agent.events import CallAction, CallEvent
from agent.hold_clock import HoldClock
from agent.keypad import Keypad, Outcome
from agent.metrics import EngineCounts, OverlapCounts, WireTimes
from agent.playout_book import PlayoutBook
from agent.runtime_side import RuntimeSide
from agent.tools.catalogue import RECORDING_TOOLS, CallFrame
from agent.tools.desk import DeskAction, ToolDesk
from agent.tools.key_sender import KeySender
from agent.transcript import Transcript
from agent.translate import predicted
from agent.turn_taking import TurnTaking
from minmo_runtime import api
from telephony import leg as tel


class Call:
    """One call. Owned and driven by exactly one shell."""

    def __init__(self, setup: CallSetup) -> None:
        self.setup = setup
        self.call_id, self.leg_id = setup.call_id, setup.leg_id
        self.context = CallContext(setup.call_id, setup.leg_id)
        self.record = CallRecord(setup, self.context)
        self.turns = TurnTaking(setup.floor_rules(), slot_digits=setup.order_digits)
        self.transcript = Transcript()
        self.caller = CallerSide(self.context, self.transcript, setup.sample_rate_hz)
        self.runtime = RuntimeSide.of(setup, self.context)
        self.book = PlayoutBook(setup.sample_rate_hz)
        self.agent = AgentSide(
            setup, self.context, self.runtime, self.transcript, self.caller, self.book, self.turns.may_duck
        )
        self.wire = WireTimes(setup.sample_rate_hz)
        opening = (self._notice(), floor.LineWanted(setup.greeting))
        self.callee = CalleeSide(setup, self.context, self.record, self.wire, opening)
        self.answering = Answering(self.context, setup.policy.is_notice_early(setup.facts))
        self.engine, self.overlaps = EngineCounts(), OverlapCounts()
        self.keypad = Keypad(setup.order_digits, setup.digit_timeout_s)
        self.escalation = Escalation(self.context, setup.policy, setup.facts)
        claims = setup.policy.claims(setup.facts)
        frame = CallFrame(setup.order_digits, setup.facts.started_at.weekday(), claims)
        self.desk = ToolDesk(setup.call_id, setup.tools, frame)
        self.clock = HoldClock()
        self.keys_out = KeySender(setup.send_keys_cooldown_s)
        self._typed = ""  # a number typed on the keypad, not answered yet
        self._is_over = False

    # ==================================================================== the loop

    def step(self, event: CallEvent, real_now: float) -> list[CallAction]:
        """Everything that follows from `event` at `real_now` (seconds, steady)."""
        self.context.actions = []
        if self._is_over:
            return []
        now = self.clock.at(real_now, event.is_held if isinstance(event, tel.HoldChanged) else None)
        match event:
            # ------------------------------------------------------------ the leg
            case tel.AudioFrame():
                self._on_audio(event, now)
            case tel.PlayoutProgress():
                self._on_played(event.item_id, event.played_samples, event.is_finished, now)
            case tel.Flushed():
                self._on_played(event.item_id, event.played_samples, True, now)
                self.agent.on_flushed(event, now)
            case tel.WireMetric():
                self.context.keep_figures(self.wire.hear(event, self.agent.on_wire(self._turn_id())))
            case tel.AnswerEvidence():
                self._follow(self.callee.on_evidence(event), now)
            case tel.DtmfReceived():
                self._on_key(event.digit, now)
            case tel.LegStateChanged(state=tel.LegState.CONFIRMED):
                self._on_confirmed(event, now)
            case tel.ReferResult():
                self._on_referred(event, now)
            case tel.Referred():
                self._on_sent_elsewhere(event, now)
            case tel.HoldChanged():
                self._on_hold_changed(event, now)
            case tel.MediaHealth() | tel.EchoMeasured():
                self.record.line_judged(event)
            case tel.LegDisconnected():
                self._on_disconnected(event, now)
            # -------------------------------------------------------- the runtime
            case api.StreamOpened():
                self._on_opened(event, now)
            case api.Caption():
                self._on_caption(event, now)
            case api.DuplexPrediction():
                self._floor(predicted(event), now)
            case api.TextDelta():
                self.agent.on_text(event)
            case api.AudioDelta():
                self.agent.on_audio(event, now)
            case api.ReplyFinished() if event.turn_id in self.agent.purposes:
                self._on_reply_finished(event, now)
            case api.ReplyTruncated():
                self.agent.on_truncated(event)
            case api.DraftEnded():
                self.engine.draft_ended(event)
            case api.JobOverran():
                self.engine.job_overran(event)
            case api.ContextReused():
                self.engine.context_reused(event)
            case api.ToolCallRequested() if event.turn_id in self.agent.purposes:
                self._on_tool_wanted(event, now)
            case api.StreamFailed():
                self._on_runtime_lost(event.reason, now)
            # ---------------------------------------------------------- the shell
            case own.Start():
                self.record.keep_manner(self.turns.config)
                self.runtime.open(self._system_prompt())
            case own.Resumed():
                self._on_resumed(event, now)
            case own.ToolFinished():
                self._carry(self.desk.finished(event))
            case own.RuntimeLost():
                self._on_runtime_lost(event.reason, now)
            case own.RuntimeReady():
                self._on_runtime_ready()
            case own.PersonRinging():
                self._on_person_ringing(now)
            case own.Tick():
                self._on_tick(now)
            case own.RecordingWanted():
                self.record.recording_switched(event.is_kept, event.by)
            case own.ShutDown():
                self.record.cause = event.cause
                self._floor(floor.HangUpWanted(event.cause), now)
        return self.context.actions

    # ============================================================= begin and end

    def _system_prompt(self) -> str:
        return self.setup.policy.system_prompt(self.escalation.facts)

    def _notice(self) -> floor.LineWanted:
        return floor.LineWanted(self.setup.policy.disclose(self.setup.facts).line, is_protected=True)

    def _on_opened(self, event: api.StreamOpened, now: float) -> None:
        """The call is answered only now: nobody is let in to silence."""
        is_first, runtime = self.runtime.opened(event), self.runtime
        if is_first and not self.record.is_confirmed:
            self._floor(self.answering.ready(self.callee.opening, now), now)
        elif runtime.waiting_reply in self.agent.purposes:
            runtime.start_reply(runtime.waiting_reply, runtime.owed_text, "")
        elif runtime.owed_text:
            self._floor(floor.LineWanted("reply"), now)  # the answer that the dead engine owed
        elif runtime.must_apologise:
            runtime.must_apologise = False
            self._floor(floor.LineWanted("apology"), now)

    def _on_confirmed(self, event: tel.LegStateChanged, now: float) -> None:
        if self.record.is_confirmed:
            return  # a re-INVITE
        self.record.confirmed(event.codec)
        self.callee.answered()
        self._follow([floor.Answered(), *self.answering.confirmed(self.callee.opening)], now)

    def _on_resumed(self, event: own.Resumed, now: float) -> None:
        """The agent process died under this call; the worker kept it."""
        self.record.is_confirmed = True
        self.runtime.earlier = event.history
        self.runtime.open(self._system_prompt())
        self._floor(floor.Answered(), now)
        if not event.is_notice_heard:
            self._floor(self._notice(), now)
        self._floor(floor.LineWanted("apology"), now)

    def take_over(self, turn_ids: list[str], played_items: Mapping[str, int]) -> None:
        """Go on with a call of an earlier agent: no name it used may be used again."""
        numbers = [int(digits) for name in (*turn_ids, *played_items) for digits in re.findall(r"^[acf](\d+)", name)]
        highest = max(numbers, default=0) + 100  # drafts that were never heard left no name behind
        self.turns.skip_turns(highest)
        self.transcript.skip_caller_turns(highest)
        self.agent.num_fillers = highest

    def _on_disconnected(self, event: tel.LegDisconnected, now: float) -> None:
        for turn in self.turns.queue:
            self.agent.line_went_dead(turn.turn_id)
            self._carry(self.desk.cut(turn.turn_id))
        self._floor(floor.Gone(), now)
        self.runtime.close()
        self.context.keep_figures([*self.engine.figures(), *self.overlaps.figures()])
        self.callee.ended()
        self.record.ended(event)
        self.context.add(own.EndCall())
        self._is_over = True

    # ================================================================ the caller

    def _on_audio(self, event: tel.AudioFrame, now: float) -> None:
        num_samples = len(event.pcm) // 2
        self.context.sample = event.start_sample + num_samples
        if self.clock.is_held:  # what comes now is music, or an exchange; the runtime's clock goes on
            self.runtime.push(bytes(len(event.pcm)), is_voiced=False)
            return
        self.runtime.push(event.pcm, is_voiced=event.voiced)
        rate_hz = event.sample_rate_hz
        self._floor(floor.CallerAudio(event.voiced, num_samples / rate_hz, self.context.sample / rate_hz), now)
        self._follow(self.callee.on_audio(event.voiced), now)
        self._watch_playout(now)

    def _on_hold_changed(self, event: tel.HoldChanged, now: float) -> None:
        """The leg keeps what is being said at its sample, and goes on there (telephony/playout.py)."""
        self.wire.on_hold()
        self._floor(floor.OnHold(self.clock.held_s), now)
        self.context.journal("hold" if event.is_held else "unhold", by=event.by, sample=self.context.sample)

    def _on_caption(self, event: api.Caption, now: float) -> None:
        self._follow(self.callee.on_caption(event), now)
        words = self.caller.on_caption(event, is_thinking=self.turns.state is State.THINKING)
        if words is not None:
            self._floor(words, now)

    def _on_key(self, digit: str, now: float) -> None:
        self.context.journal("key", digit=digit)
        self._floor(floor.KeyPressed(), now)
        self._on_keypad(self.keypad.press(digit, now), now)

    def _on_keypad(self, outcome: Outcome, now: float) -> None:
        match outcome:
            case Outcome.NUMBER:
                self._typed = self.setup.lines.keypad_text.format(digits=self.keypad.digits)
                self._floor(floor.LineWanted("reply"), now)
            case Outcome.INCOMPLETE:
                self._floor(floor.LineWanted("keypad_incomplete"), now)
            case Outcome.PERSON:
                self._floor(floor.LineWanted(self.escalation.person_line()), now)
            case Outcome.NOTHING:
                pass

    # ============================================================ what was heard

    def _on_played(self, item_id: str, played_samples: int, is_over: bool, now: float) -> None:
        speech = self.agent.on_played(item_id, played_samples, is_over, now)
        if speech is None:
            return
        self.answering.on_played(speech.turn_id, self.book.is_heard_out(speech))
        if self.book.is_audible(speech):
            self._floor(floor.Heard(speech.turn_id), now)
        if self.book.is_heard_out(speech):
            self.agent.heard_out(speech.turn_id)
            self._floor(floor.Heard(speech.turn_id, is_finished=True), now)

    def _on_turn_over(self, turn_id: str, now: float) -> None:
        """It was heard, and nobody took the floor from it: what waited for that happens now."""
        purpose = self.agent.purposes.get(turn_id, "")
        if purpose.startswith("notice"):
            self.record.notice_heard()
        for commit in self.desk.heard(turn_id):
            self._commit(commit, now)
        self.escalation.heard(turn_id)
        self._follow(self.callee.on_turn_over(purpose), now)

    def _on_reply_finished(self, event: api.ReplyFinished, now: float) -> None:
        self.agent.on_finished(event, now)
        if not event.num_samples and not self.desk.is_waiting_for(event.turn_id):
            self.context.keep("add_defect", kind="empty_reply", detail=event.text, turn_id=event.turn_id)
            self._floor(floor.LineWanted("apology"), now)

    def _turn_id(self) -> str:
        return self.turns.current.turn_id if self.turns.current else ""

    # ================================================================ who may speak

    def _floor(self, event: floor.Event, now: float) -> None:
        before = self.turns.state
        for action in self.turns.step(event, now):
            self._obey(action, now)
        if self.turns.state is not before:
            state = self.turns.state.value
            self.context.journal("floor", state=state, was=before.value, sample=self.context.sample)

    def _follow(self, wanted: Sequence[floor.Event], now: float) -> None:
        for event in wanted:
            self._floor(event, now)

    def _obey(self, action: floor.Action, now: float) -> None:
        match action:
            case floor.TakeFloor():
                self._take_floor(action, now)
            case floor.Cut():
                self._cut(action.turn_id, action.reason)
            case floor.TurnOver():
                self._on_turn_over(action.turn_id, now)
            case floor.DuckPlayout():
                self.context.add(tel.Duck(leg_id=self.leg_id))
            case floor.PausePlayout():
                self.overlaps.paused()
                self.context.add(tel.Pause(leg_id=self.leg_id))
            case floor.ResumePlayout():
                self.context.add(tel.Resume(leg_id=self.leg_id))
            case floor.DiscardOverlap():
                self._discard_overlap(action)
            case floor.Filler():
                self.agent.say_filler(action.turn_id, "filler", now)
            case floor.Defect():
                self.context.keep("add_defect", kind=action.kind, detail=action.detail, turn_id=action.turn_id)
            case floor.HangUp():
                self.record.cause = self.record.cause or action.cause
                self.context.add(tel.Hangup(leg_id=self.leg_id, cause=action.cause))

    def _take_floor(self, action: floor.TakeFloor, now: float) -> None:
        text = self._typed or self.runtime.owed_text
        purpose = action.purpose
        if purpose == "reply" and not text:  # the model answers if the caller was understood, else policies decide
            said = self.caller.close_turn(action.caller_words)
            purpose = self.escalation.line_for(said, self.caller.words.confidence)
        self.agent.purposes[action.turn_id] = purpose
        if action.how:
            self.context.journal("end_of_turn", how=action.how, turn_id=action.turn_id, sample=self.context.sample)
        if purpose != "reply":
            if purpose == "transfer_start":
                self.escalation.announce(action.turn_id)
            self.agent.say_line(action.turn_id, purpose, now)
            return
        if self._typed:
            self.caller.keep_turn(text, source="keypad")
        self._typed = ""
        self.callee.on_reply()
        self.runtime.start_reply(action.turn_id, text, self.caller.words.text)

    def _cut(self, turn_id: str, reason: str) -> None:
        self._carry(self.desk.cut(turn_id))
        self.context.keep_figures(self.wire.cut(turn_id))
        self.overlaps.cut()
        self.escalation.cut(turn_id)
        self.agent.cut(turn_id, reason)

    def _discard_overlap(self, action: floor.DiscardOverlap) -> None:
        self.context.keep_figures(self.wire.resumed())
        self.overlaps.resumed()
        self.runtime.ask(api.DiscardOverlap(call_id=self.call_id))
        if action.words:
            self.caller.keep_turn(action.words, intent=action.why)
        self.caller.begin_turn()

    # ================================================================= tools, person

    def _on_tool_wanted(self, asked: api.ToolCallRequested, now: float) -> None:
        is_too_soon = asked.name == "send_keys" and not self.keys_out.is_ready(now)
        self._carry(self.desk.request(asked, "keys were sent a moment ago" if is_too_soon else ""))

    def _carry(self, actions: Sequence[DeskAction]) -> None:
        for action in actions:
            if isinstance(action, api.ToolResult):
                self.runtime.ask(action)
            else:
                self.context.add(action)
            if isinstance(action, own.RunTool) and action.name in RECORDING_TOOLS:  # at once: it may be a card's number
                self.record.recording_switched(RECORDING_TOOLS[action.name], "agent")

    def _commit(self, commit: own.CommitTool, now: float) -> None:
        """The reply that asked for it was heard to its end."""
        if commit.name == "send_keys":
            self._send_keys(commit, now)
            return
        if commit.name not in ("hang_up", "transfer", "request_callback"):
            self.context.add(commit)
            return
        self.context.add(self.desk.committed(commit, "done"))
        match commit.name:
            case "hang_up":
                self._floor(floor.HangUpWanted("agent_goodbye"), now)
            case "transfer":  # the model has said already what happens now
                if self.escalation.person_line() == "transfer_start":
                    self.escalation.refer()
            case "request_callback":
                self.escalation.callback_line("caller agreed to a callback")

    def _send_keys(self, commit: own.CommitTool, now: float) -> None:
        keys = commit.arguments["keys"]
        if not self.keys_out.is_ready(now):  # the same reply asked for two rows
            self.context.add(self.desk.committed(commit, "refused", {"reason": "keys were sent a moment ago"}))
            return
        self.keys_out.sent(keys, now)
        self.context.add(tel.SendDtmf(leg_id=self.leg_id, digits=keys), self.desk.committed(commit, "done"))
        self.context.journal("keys_sent", keys=keys, sample=self.context.sample)

    def _on_person_ringing(self, now: float) -> None:
        if self.turns.state is State.LISTENING and not self.turns.is_caller_voiced(now):
            self._floor(floor.LineWanted("transfer_wait"), now)

    def _on_referred(self, event: tel.ReferResult, now: float) -> None:
        if not event.sip_status:
            self.escalation.left(event)
            self.record.left_for_transfer()
            return
        if line := self.escalation.referred(event):
            self._floor(floor.LineWanted(line), now)
        else:
            self.record.disposition = self.record.cause = "transferred"
            self._floor(floor.HangUpWanted("transferred"), now)

    def _on_sent_elsewhere(self, event: tel.Referred, now: float) -> None:
        """The party hands us on. Whoever hears us next has been told nothing yet: the notice, before anything else."""
        self.context.journal("referred", target=event.target, sip_status=event.sip_status)
        if event.sip_status == 200:
            self.record.new_party()
            self._floor(floor.LinesWanted((self._notice(),)), now)

    # ====================================================== time, and a dead engine

    def _on_tick(self, now: float) -> None:
        if self.clock.is_held:
            self._floor(floor.OnHold(self.clock.held_s), now)
            return
        self.answering.on_tick(now)
        if self.escalation.is_progress_due(now):
            self._on_person_ringing(now)
        self._on_keypad(self.keypad.tick(now), now)
        self._floor(floor.Tick(), now)
        self._watch_playout(now)

    def _watch_playout(self, now: float) -> None:
        turn = self.turns.current
        if turn is not None and self.turns.state in (State.SPEAKING, State.PROTECTED) and turn.is_audible:
            if self.book.is_dry(turn.turn_id, now):
                self._floor(floor.PlayoutDry(turn.turn_id), now)

    def _on_runtime_lost(self, reason: str, now: float) -> None:
        """The caller hears a filler at once; the shell looks for an engine; the transcript is replayed there."""
        if not self.runtime.is_up:
            return
        self.runtime.lost(reason)
        lost = [turn for turn in self.turns.queue if not self.agent.is_complete(turn.turn_id)]
        is_reply = bool(lost) and self.agent.purposes.get(lost[0].turn_id) == "reply"
        if is_reply and not lost[0].is_audible and self.caller.turn_id:
            self.runtime.owed_text = self.transcript.rows[self.caller.turn_id].text
        else:
            self.runtime.must_apologise = bool(lost)
        for turn in lost:
            self._floor(floor.TurnLost(turn.turn_id), now)
        if lost:
            self.agent.say_filler("", "engine_lost", now)

    def _on_runtime_ready(self) -> None:
        # What the dead engine did not answer is said again as the open turn, so it is not history yet.
        open_turn = self.caller.turn_id if self.runtime.owed_text else ""
        self.runtime.open(self._system_prompt(), self.transcript.history(without=open_turn))
