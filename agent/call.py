"""THE MAIN LOOP of a call. Read this first.

`Call.step(event, now) -> actions` is the whole call: one `match` over everything that can happen. Events come from
the leg (telephony/leg.py), from the runtime (minmo_runtime/api.py) and from the shell (agent/events.py); actions go
back to the same three. It translates and chains, nothing else:

    who may speak          agent/turn_taking.py      (asked at every event; its actions are carried out by `_obey`)
    what was heard         agent/playout_book.py, agent/transcript.py
    what the caller said   agent/caller_side.py
    what tools may do      agent/tools/desk.py       (two phases)
    what policies decide   agent/escalation.py       (admission was before)

No clock, no I/O, no task: the shell is agent/live_call.py; tests/scenarios drive whole calls in virtual time. Walk:
hops 4-6 and 10-12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict

from agent import events as own
from agent import floor
from agent.call_setup import CACHED_PURPOSES, CallSetup
from agent.caller_side import CallerSide
from agent.caller_words import count_trailing_digits
from agent.escalation import Escalation
from agent.events import CallAction, CallEvent, Keep
from agent.keypad import Keypad, Outcome
from agent.metrics import WireTimes
from agent.playout_book import Piece, PlayoutBook, Speech
from agent.tools.catalogue import CallFrame
from agent.tools.desk import ToolDesk
from agent.transcript import Transcript
from agent.translate import play_command, predicted
from agent.turn_taking import State, TurnTaking
from minmo_runtime import api
from telephony import leg as tel
from telephony.resample import StreamResampler


class Call:
    """One call. Owned and driven by exactly one shell."""

    def __init__(self, setup: CallSetup) -> None:
        self.setup = setup
        self.call_id, self.leg_id = setup.call_id, setup.leg_id
        self.escalation = Escalation(setup.policy, setup.facts, setup.min_confidence)
        self.turns = TurnTaking(setup.floor_rules(), slot_digits=setup.order_digits)
        self.book = PlayoutBook(setup.sample_rate_hz)
        self.transcript = Transcript()
        self.caller = CallerSide(self.transcript, setup.sample_rate_hz)
        self.wire = WireTimes(setup.sample_rate_hz)
        self.keypad = Keypad(setup.order_digits, setup.digit_timeout_s)
        frame = CallFrame(setup.order_digits, setup.facts.started_at.weekday())
        self.desk = ToolDesk(setup.call_id, setup.tools, frame)
        self.sample = 0  # leg clock: caller samples received
        self._to_16k = StreamResampler(setup.sample_rate_hz, api.INPUT_SAMPLE_RATE_HZ)
        self._pushed_16k = 0
        self._output_rate_hz = setup.rendered_rate_hz
        self._has_runtime = self._was_opened = False
        self._is_confirmed = False
        self._is_over = False
        self._earlier: tuple[tuple[str, str], ...] = ()  # said to an agent process that died
        self._purposes: dict[str, str] = {}  # agent turn -> purpose
        self._flushing: dict[str, str] = {}  # item -> reason of the cut that waits for its exact count
        self._held_requests: list[api.RuntimeRequest] = []  # what must not overtake a CancelReply
        self._cut_at: dict[str, int] = {}  # turn -> leg samples played when it was cut
        self._typed = ""  # a number typed on the keypad, not answered yet
        self._owed_text = ""  # what the caller said to an engine that died before it answered
        self._waiting_reply = ""  # the turn that will answer it as soon as there is an engine
        self._must_apologise = False  # ... or in the middle of its answer
        self._audible: set[str] = set()
        self._rendered_turns: set[str] = set()  # played from audio made before; the runtime knows nothing of them
        self._refer_after = ""  # turn that announces a transfer
        self._filler_id = ""
        self._num_fillers = 0
        self._disposition, self._cause = "completed", ""
        self._out: list[CallAction] = []

    # ==================================================================== the loop

    def step(self, event: CallEvent, now: float) -> list[CallAction]:
        """Everything that follows from `event` at `now` (seconds, steady)."""
        self._out = []
        if self._is_over:
            return self._out
        match event:
            # ------------------------------------------------------------ the leg
            case tel.AudioFrame():
                self._on_audio(event, now)
            case tel.PlayoutProgress():
                self._on_played(event.item_id, event.played_samples, event.is_finished, now)
            case tel.Flushed():
                self._on_flushed(event, now)
            case tel.WireMetric():
                self._out += [Keep("add_metric", figure) for figure in self.wire.hear(event, self._speaking_turn())]
            case tel.DtmfReceived():
                self._on_key(event.digit, now)
            case tel.LegStateChanged(state=tel.LegState.CONFIRMED):
                self._on_confirmed(event, now)
            case tel.ReferResult():
                self._on_referred(event, now)
            case tel.LegDisconnected():
                self._on_disconnected(event, now)
            # -------------------------------------------------------- the runtime
            case api.StreamOpened():
                self._on_opened(event, now)
            case api.Caption():
                self._on_caption(event, now)
            case api.DuplexPrediction():
                self._floor(predicted(event), now)
            case api.TextDelta() if self._purposes.get(event.turn_id) == "reply":
                self.transcript.agent_writes(event.turn_id, event.text)
            case api.AudioDelta():
                self._give(self.book.add(event.turn_id, event.pcm, self._output_rate_hz, is_final=False, now=now))
            case api.ReplyFinished():
                self._on_reply_finished(event, now)
            case api.ReplyTruncated():
                self._on_truncated(event)
            case api.ToolCallRequested():
                self._out += self.desk.request(event) if event.turn_id in self._purposes else []
            case api.StreamFailed():
                self._on_runtime_lost(event.reason, now)
            # ---------------------------------------------------------- the shell
            case own.Start():
                self._keep_manner()
                self._open_stream(())
            case own.Resumed():
                self._on_resumed(event, now)
            case own.ToolFinished():
                self._send_all(self.desk.finished(event))
            case own.RuntimeLost():
                self._on_runtime_lost(event.reason, now)
            case own.RuntimeReady():
                # What the dead engine did not answer is said again as the open turn, so it is not history yet.
                self._open_stream(self.transcript.history(without=self.caller.turn_id if self._owed_text else ""))
            case own.Tick():
                self._on_tick(now)
            case own.ShutDown():
                self._cause = event.cause
                self._floor(floor.HangUpWanted(event.cause), now)
        return self._out

    # ============================================================= begin and end

    def _keep_manner(self) -> None:
        """The journal says which turn taking this call has, with every value as it takes effect."""
        decision = self.setup.policy.duplex(self.setup.facts)
        fields = {"preset": decision.preset, "reasons": list(decision.reasons), **asdict(self.turns.config)}
        self._out.append(Keep("journal_append", {"name": "turn_taking", **fields}))

    def _open_stream(self, history: tuple[tuple[str, str], ...]) -> None:
        self._out.append(
            api.OpenStream(
                call_id=self.call_id,
                system_prompt=self.setup.policy.system_prompt(self.escalation.facts),
                seed=self.setup.seed,
                history=self._earlier + history,
                slot_digits=self.setup.order_digits,
            )
        )

    def _on_opened(self, event: api.StreamOpened, now: float) -> None:
        is_first, self._was_opened = not self._was_opened, True
        self._has_runtime = True
        self._output_rate_hz = event.output_sample_rate_hz
        self._out.append(Keep("update_call", {"checkpoint": event.checkpoint, "bridges": list(event.bridges)}))
        if is_first and not self._is_confirmed:
            self._out.append(tel.Answer(leg_id=self.leg_id))
            notice = self.setup.policy.disclose(self.setup.facts).line
            opening = (floor.LineWanted(notice, is_protected=True), floor.LineWanted("greeting"))
            self._floor(floor.Ringing(opening), now)
        elif self._waiting_reply in self._purposes:
            self._start_reply(self._waiting_reply, self._owed_text)
        elif self._owed_text:
            self._floor(floor.LineWanted("reply"), now)  # the answer that the dead engine owed
        elif self._must_apologise:
            self._must_apologise = False
            self._floor(floor.LineWanted("apology"), now)

    def _on_confirmed(self, event: tel.LegStateChanged, now: float) -> None:
        if self._is_confirmed:
            return  # a re-INVITE
        self._is_confirmed = True
        self._out.append(Keep("answer_call", {"codec": event.codec}))
        self._floor(floor.Answered(), now)

    def _on_resumed(self, event: own.Resumed, now: float) -> None:
        """The agent process died under this call; the worker kept it."""
        self._is_confirmed = True
        self._earlier = event.history
        self._open_stream(())
        self._floor(floor.Answered(), now)
        if not event.is_notice_heard:
            self._floor(floor.LineWanted(self.setup.policy.disclose(self.setup.facts).line, is_protected=True), now)
        self._floor(floor.LineWanted("apology"), now)

    def take_over(self, turn_ids: list[str], played_items: Mapping[str, int]) -> None:
        """Go on with a call of an earlier agent: no name it used may be used again."""
        numbers = [int(digits) for name in (*turn_ids, *played_items) for digits in re.findall(r"^[acf](\d+)", name)]
        highest = max(numbers, default=0) + 100  # drafts that were never heard left no name behind
        self.turns.skip_turns(highest)
        self.transcript.skip_caller_turns(highest)
        self._num_fillers = highest

    def _on_disconnected(self, event: tel.LegDisconnected, now: float) -> None:
        self._cut_everything_played()
        self._floor(floor.Gone(), now)
        if event.by == "agent" and self._cause:
            cause = self._cause
        else:
            cause = event.cause
            if not self._is_confirmed:
                self._disposition = "abandoned"
            elif event.by == "network":
                self._disposition = "failed"
        if self._has_runtime:
            self._out.append(api.CloseStream(call_id=self.call_id))
        fields = {"disposition": self._disposition, "cause": cause, "ended_by": event.by, "end_sample": self.sample}
        self._out += [Keep("close_call", fields), own.EndCall()]
        self._is_over = True

    def _cut_everything_played(self) -> None:
        """What the caller had heard when the line went dead; no aligner is asked any more."""
        for turn in self.turns.queue:
            speech = self.book.speeches.get(turn.turn_id)
            if speech is not None and self.book.is_audible(speech):
                self._keep_cut(speech)
            self._out += self.desk.cut(turn.turn_id)

    # ================================================================ the caller

    def _on_audio(self, event: tel.AudioFrame, now: float) -> None:
        num_samples = len(event.pcm) // 2
        self.sample = event.start_sample + num_samples
        pcm = self._to_16k.push(event.pcm)
        if self._has_runtime and pcm:
            self._out.append(
                api.PushAudio(call_id=self.call_id, pcm=pcm, start_sample=self._pushed_16k, voiced=event.voiced)
            )
        self._pushed_16k += len(pcm) // 2
        seconds = num_samples / event.sample_rate_hz
        self._floor(floor.CallerAudio(event.voiced, seconds, self.sample / event.sample_rate_hz), now)
        self._watch_playout(now)

    def _on_caption(self, event: api.Caption, now: float) -> None:
        is_open = self.caller.words.hear(event)
        if is_open:
            text = self.caller.words.text
            self._floor(floor.CallerWords(text, self.caller.words.confidence, count_trailing_digits(text)), now)
        if event.is_final:
            fields = {"text": event.text, "confidence": round(event.confidence, 3), "during_reply": event.during_reply}
            self._out.append(Keep("journal_append", {"name": "caption", **fields}))
            if is_open and self.caller.turn_id and self.turns.state is State.THINKING:
                self._out += self.caller.correct_turn()

    def _on_key(self, digit: str, now: float) -> None:
        self._out.append(Keep("journal_append", {"name": "key", "digit": digit}))
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
                self._floor(floor.LineWanted(self._person_line()), now)
            case Outcome.NOTHING:
                pass

    # ============================================================ what was heard

    def _give(self, pieces: list[Piece]) -> None:
        self._out += [play_command(self.leg_id, piece, self.turns.may_duck(piece.turn_id)) for piece in pieces]

    def _on_played(self, item_id: str, played_samples: int, is_over: bool, now: float) -> None:
        found = self.book.played(item_id, played_samples, is_over=is_over, now=now)
        if found is None or found[0].is_cut:
            return
        speech, pieces = found
        self._give(pieces)
        turn_id = speech.turn_id
        if self.book.is_audible(speech):
            self._on_audible(turn_id)
            self._floor(floor.Heard(turn_id), now)
        if self.book.is_heard_out(speech):
            self._on_heard_out(turn_id, now)

    def _on_audible(self, turn_id: str) -> None:
        """From here on the caller's turn before is over: what follows is another one."""
        if turn_id not in self._purposes or turn_id in self._audible:
            return
        self._audible.add(turn_id)
        self._out += self.transcript.agent_audible(turn_id, self.sample)
        if self._purposes[turn_id] == "filler":
            return
        if self.caller.words.text and not self.caller.turn_id and self._purposes[turn_id] != "reply":
            self._out += self.caller.keep_turn()  # said over a protected line
        self.caller.turn_id = ""
        self.caller.words.begin_turn(self._pushed_16k)

    def _on_heard_out(self, turn_id: str, now: float) -> None:
        if turn_id in self._audible:  # a reply without a sound (a bare tool call) leaves no row
            self._out += self.transcript.agent_heard(turn_id, self.sample)
        self._floor(floor.Heard(turn_id, is_finished=True), now)

    def _on_turn_over(self, turn_id: str, now: float) -> None:
        """It was heard, and nobody took the floor from it: what waited for that happens now."""
        if self._purposes.get(turn_id, "").startswith("notice"):
            self._out.append(Keep("notice_finished", {"sample": self.sample}))
        for commit in self.desk.heard(turn_id):
            self._commit(commit, now)
        if self._refer_after == turn_id:
            self._refer_after = ""
            self._out.append(tel.Refer(leg_id=self.leg_id, refer_to=self.escalation.refer_to))

    def _speaking_turn(self) -> str:
        """Whose sound is on the wire."""
        filler = self.book.speeches.get(self._filler_id)
        if filler is not None and not filler.is_cut and not self.book.is_heard_out(filler):
            return self._filler_id
        return self.turns.current.turn_id if self.turns.current else ""

    def _on_reply_finished(self, event: api.ReplyFinished, now: float) -> None:
        if event.turn_id not in self._purposes:
            return
        row = self.transcript.rows.get(event.turn_id)
        if row is None or not row.generated:
            self.transcript.agent_writes(event.turn_id, event.text)
        self._give(self.book.add(event.turn_id, b"", self._output_rate_hz, is_final=True, now=now))
        if not event.num_samples and not self.desk.is_waiting_for(event.turn_id):
            fields = {"kind": "empty_reply", "detail": event.text, "turn_id": event.turn_id}
            self._out.append(Keep("add_defect", fields))
            self._floor(floor.LineWanted("apology"), now)

    # ================================================================ who may speak

    def _floor(self, event: floor.Event, now: float) -> None:
        before = self.turns.state
        for action in self.turns.step(event, now):
            self._obey(action, now)
        if self.turns.state is not before:
            fields = {"state": self.turns.state.value, "was": before.value, "sample": self.sample}
            self._out.append(Keep("journal_append", {"name": "floor", **fields}))

    def _obey(self, action: floor.Action, now: float) -> None:
        match action:
            case floor.TakeFloor():
                self._take_floor(action, now)
            case floor.Cut():
                self._cut(action.turn_id, action.reason)
            case floor.TurnOver():
                self._on_turn_over(action.turn_id, now)
            case floor.DuckPlayout():
                self._out.append(tel.Duck(leg_id=self.leg_id))
            case floor.PausePlayout():
                self._out.append(tel.Pause(leg_id=self.leg_id))
            case floor.ResumePlayout():
                self._out.append(tel.Resume(leg_id=self.leg_id))
            case floor.DiscardOverlap():
                self._out += [Keep("add_metric", figure) for figure in self.wire.resumed()]
                self._request(api.DiscardOverlap(call_id=self.call_id))
                if action.words:
                    self._out += self.caller.keep_turn(action.words, intent=action.why)
                self.caller.words.begin_turn(self._pushed_16k)
            case floor.Filler():
                self._say_filler(action.turn_id, "filler", now)
            case floor.Defect():
                fields = {"kind": action.kind, "detail": action.detail, "turn_id": action.turn_id}
                self._out.append(Keep("add_defect", fields))
            case floor.HangUp():
                self._hang_up(action.cause)

    def _take_floor(self, action: floor.TakeFloor, now: float) -> None:
        text = self._typed or self._owed_text
        purpose = action.purpose
        if purpose == "reply" and not text:
            purpose = self._how_to_answer(action)
        self._purposes[action.turn_id] = purpose
        if action.how:
            fields = {"how": action.how, "turn_id": action.turn_id, "sample": self.sample}
            self._out.append(Keep("journal_append", {"name": "end_of_turn", **fields}))
        if purpose != "reply":
            self._say_line(action.turn_id, purpose, now)
            return
        if self._typed:
            self._out += self.caller.keep_turn(text, source="keypad")
        self._typed = ""
        self._start_reply(action.turn_id, text)

    def _start_reply(self, turn_id: str, text: str) -> None:
        """`text`: the caller's turn where the runtime has not heard it by itself."""
        if not self._has_runtime:
            self._owed_text = text or self.caller.words.text
            self._waiting_reply = turn_id
            return
        self._owed_text = self._waiting_reply = ""
        if text:
            self._request(api.PushText(call_id=self.call_id, text=text))
        self._request(api.StartReply(call_id=self.call_id, turn_id=turn_id))

    def _how_to_answer(self, action: floor.TakeFloor) -> str:
        """Keeps what the caller said; the model answers it if it was understood, else the policy says what happens."""
        text = self.caller.words.text or action.caller_words
        if self.caller.turn_id:
            self._out += self.caller.correct_turn()
        elif text:
            self._out += self.caller.keep_turn(text)
        purpose = self.escalation.line_for(text, self.caller.words.confidence)
        self._out += self.escalation.take_kept()
        return purpose

    def _say_line(self, turn_id: str, purpose: str, now: float) -> None:
        if purpose == "transfer_start":
            self._refer_after = turn_id
        text = self.setup.lines.say(purpose)
        self.transcript.agent_writes(turn_id, text, source="prompt")
        rendered = self.setup.rendered.get(text)
        if purpose in CACHED_PURPOSES and rendered:
            self._rendered_turns.add(turn_id)
            self._give(self.book.add(turn_id, rendered, self.setup.rendered_rate_hz, is_final=True, now=now))
        else:
            self._request(api.Say(call_id=self.call_id, turn_id=turn_id, text=text))

    def _cut(self, turn_id: str, reason: str) -> None:
        """Stop the turn at the exact sample; the runtime is told once the leg has said which one that was."""
        self._out += self.desk.cut(turn_id)
        self._out += [Keep("add_metric", figure) for figure in self.wire.cut(turn_id)]
        if self._refer_after == turn_id:
            self._refer_after = ""
        if self._filler_id and reason != "recover":
            self._stop_playing(self._filler_id, reason)
        self._stop_playing(turn_id, reason)

    def _stop_playing(self, turn_id: str, reason: str) -> None:
        item_id = self.book.cut(turn_id)
        if item_id:
            self._flushing[item_id] = reason
            self._out += [tel.Flush(leg_id=self.leg_id, item_id=item_id), tel.Resume(leg_id=self.leg_id)]
        elif turn_id in self._purposes:
            self._tell_cut(turn_id, reason)

    def _on_flushed(self, event: tel.Flushed, now: float) -> None:
        self._on_played(event.item_id, event.played_samples, True, now)
        reason = self._flushing.pop(event.item_id, "")
        if not reason:
            return
        found = self.book.played(event.item_id, event.played_samples, is_over=True, now=now)
        if found is not None:
            self._tell_cut(found[0].turn_id, reason)
        if not self._flushing:
            self._out += self._held_requests
            self._held_requests = []

    def _tell_cut(self, turn_id: str, reason: str) -> None:
        speech = self.book.speeches[turn_id]
        played = self.book.played_of(speech) if self.book.is_audible(speech) else 0
        if reason == "false_end" and played:
            reason = "interrupt"  # the caller was quicker than our report: something was heard after all
        elif reason == "interrupt" and not played:
            reason = "false_end"
        self._cut_at[turn_id] = speech.played_samples_of_leg if played else 0
        if played and self._purposes.get(turn_id):
            self._on_audible(turn_id)
        if self._has_runtime and turn_id not in self._rendered_turns:
            cancel = api.CancelReply(call_id=self.call_id, turn_id=turn_id, played_samples=played, reason=reason)
            self._out.append(cancel)  # not through _request: it is what the others wait for
        else:
            self._keep_cut(speech)
        self._purposes.pop(turn_id, None)

    def _on_truncated(self, event: api.ReplyTruncated) -> None:
        self._out += self.transcript.agent_cut(
            event.turn_id,
            event.heard_text,
            event.generated_text,
            cut_offset_samples=self._cut_at.pop(event.turn_id, 0),
            end_sample=self.sample,
        )

    def _keep_cut(self, speech: Speech) -> None:
        """Without the encoder's alignment: as many whole words as the share of samples that were played."""
        share = self.book.played_of(speech) / max(1, speech.made_samples)
        heard, offset = self.transcript.share_of(speech.turn_id, share), speech.played_samples_of_leg
        self._out += self.transcript.agent_cut(
            speech.turn_id, heard, "", cut_offset_samples=offset, end_sample=self.sample
        )

    def _request(self, request: api.RuntimeRequest) -> None:
        if not self._has_runtime:
            return  # the new stream starts from the transcript
        (self._held_requests if self._flushing else self._out).append(request)

    def _send_all(self, actions: list[Keep | own.RunTool | own.CommitTool | api.ToolResult]) -> None:
        for action in actions:
            if isinstance(action, api.ToolResult):
                self._request(action)
            else:
                self._out.append(action)

    # ================================================================= tools, person

    def _commit(self, commit: own.CommitTool, now: float) -> None:
        match commit.name:
            case "hang_up":
                self._out.append(self.desk.committed(commit, "done"))
                self._floor(floor.HangUpWanted("agent_goodbye"), now)
            case "transfer":  # the model has said already what happens now
                self._out.append(self.desk.committed(commit, "done"))
                if self._person_line() == "transfer_start":
                    self._out.append(tel.Refer(leg_id=self.leg_id, refer_to=self.escalation.refer_to))
            case "request_callback":
                self._out.append(self.desk.committed(commit, "done"))
                self.escalation.callback_line("caller agreed to a callback")
                self._out += self.escalation.take_kept()
            case _:
                self._out.append(commit)

    def _person_line(self) -> str:
        line = self.escalation.person_line()
        self._out += self.escalation.take_kept()
        return line

    def _on_referred(self, event: tel.ReferResult, now: float) -> None:
        fields = {"name": "refer_result", "sip_status": event.sip_status, "reason": event.reason}
        self._out.append(Keep("journal_append", fields))
        if 200 <= event.sip_status < 300:
            self._disposition, self._cause = "transferred", "transferred"
            self._floor(floor.HangUpWanted("transferred"), now)
        else:
            line = self.escalation.callback_line(f"transfer refused: {event.sip_status} {event.reason}")
            self._out += self.escalation.take_kept()
            self._floor(floor.LineWanted(line), now)

    def _hang_up(self, cause: str) -> None:
        self._cause = self._cause or cause
        self._out.append(tel.Hangup(leg_id=self.leg_id, cause=cause))

    # ======================================================================== time

    def _on_tick(self, now: float) -> None:
        self._on_keypad(self.keypad.tick(now), now)
        self._floor(floor.Tick(), now)
        self._watch_playout(now)

    def _watch_playout(self, now: float) -> None:
        turn = self.turns.current
        if turn is not None and self.turns.state in (State.SPEAKING, State.PROTECTED) and turn.is_audible:
            if self.book.is_dry(turn.turn_id, now):
                self._floor(floor.PlayoutDry(turn.turn_id), now)

    def _say_filler(self, turn_id: str, key: str, now: float) -> None:
        """Heard at once, from audio made before the call: a stalled or dead engine cannot hold it up."""
        text = self.setup.lines.say(key)
        pcm = self.setup.rendered.get(text)
        fields = {"name": "filler", "turn_id": turn_id, "text": text, "is_rendered": bool(pcm)}
        self._out.append(Keep("journal_append", fields))
        if not pcm:
            return
        if item_id := self.book.hold_for_filler(turn_id):
            self._out.append(tel.Flush(leg_id=self.leg_id, item_id=item_id))
        self._num_fillers += 1
        self._filler_id = filler_id = f"f{self._num_fillers}"
        self._purposes[filler_id] = "filler"
        self._rendered_turns.add(filler_id)
        self.transcript.agent_writes(filler_id, text, source="prompt", is_in_context=False)
        self._give(self.book.add(filler_id, pcm, self.setup.rendered_rate_hz, is_final=True, now=now))

    # ============================================================ a dead engine

    def _on_runtime_lost(self, reason: str, now: float) -> None:
        """The caller hears a filler at once; the shell looks for an engine; the transcript is replayed there."""
        if not self._has_runtime:
            return
        self._has_runtime = False
        self._held_requests = []
        self._out += [Keep("add_defect", {"kind": "engine_lost", "detail": reason}), own.ReopenRuntime()]
        lost = [turn for turn in self.turns.queue if not self._is_complete(turn.turn_id)]
        if lost and self._purposes.get(lost[0].turn_id) == "reply" and not lost[0].is_audible and self.caller.turn_id:
            self._owed_text = self.transcript.rows[self.caller.turn_id].text
        else:
            self._must_apologise = bool(lost)
        for turn in lost:
            self._floor(floor.TurnLost(turn.turn_id), now)
        if lost:
            self._say_filler("", "engine_lost", now)

    def _is_complete(self, turn_id: str) -> bool:
        speech = self.book.speeches.get(turn_id)
        return speech is not None and speech.is_complete
