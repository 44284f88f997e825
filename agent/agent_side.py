"""The agent's half of a call: what is said, what of it was heard, and where it was cut.

A turn of the agent gets its sound from the runtime or from audio made before the call, piece by piece through the
play-out book to the leg. A cut has two steps: the leg is told to flush, and its answer says how many samples were
really played; only then is the runtime told, and its aligner says which words those were. Decides nothing; pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from agent.call_context import CallContext
from agent.call_setup import CACHED_PURPOSES, CallSetup
from agent.caller_side import CallerSide
from agent.playout_book import Piece, PlayoutBook, Speech
from agent.runtime_side import RuntimeSide
from agent.transcript import Transcript
from agent.translate import play_command
from minmo_runtime import api
from telephony import leg as tel


@dataclass
class AgentSide:
    setup: CallSetup
    context: CallContext
    runtime: RuntimeSide
    transcript: Transcript
    caller: CallerSide
    book: PlayoutBook
    may_duck: Callable[[str], bool]  # may the worker duck this turn by itself?
    purposes: dict[str, str] = field(default_factory=dict)  # turn -> "reply", "filler" or the key of a fixed line
    num_fillers: int = 0
    _filler_id: str = ""
    _audible: set[str] = field(default_factory=set)
    _rendered: set[str] = field(default_factory=set)  # turns from audio made before; the runtime knows nothing of them
    _flushing: dict[str, str] = field(default_factory=dict)  # item -> reason of the cut that waits for its exact count
    _cut_at: dict[str, int] = field(default_factory=dict)  # turn -> leg samples played when it was cut

    # ------------------------------------------------------------- what is said

    def say_line(self, turn_id: str, purpose: str, now: float) -> None:
        """A fixed sentence, from prepared audio where it must not wait for the engine."""
        text = self.setup.lines.say(purpose)
        self.transcript.agent_writes(turn_id, text, source="prompt")
        rendered = self.setup.rendered.get(text)
        if purpose in CACHED_PURPOSES and rendered:
            self._play_rendered(turn_id, rendered, now)
        else:
            self.runtime.ask(api.Say(call_id=self.context.call_id, turn_id=turn_id, text=text))

    def say_filler(self, turn_id: str, key: str, now: float) -> None:
        """Heard at once, before the rest of `turn_id`: a stalled or dead engine cannot hold it up."""
        text = self.setup.lines.say(key)
        pcm = self.setup.rendered.get(text)
        self.context.journal("filler", turn_id=turn_id, text=text, is_rendered=bool(pcm))
        if not pcm:
            return
        if item_id := self.book.hold_for_filler(turn_id):
            self.context.add(tel.Flush(leg_id=self.context.leg_id, item_id=item_id))
        self.num_fillers += 1
        self._filler_id = filler_id = f"f{self.num_fillers}"
        self.purposes[filler_id] = "filler"
        self.transcript.agent_writes(filler_id, text, source="prompt", is_in_context=False)
        self._play_rendered(filler_id, pcm, now)

    def on_text(self, event: api.TextDelta) -> None:
        if self.purposes.get(event.turn_id) == "reply":
            self.transcript.agent_writes(event.turn_id, event.text)

    def on_audio(self, event: api.AudioDelta, now: float) -> None:
        rate_hz = self.runtime.output_rate_hz
        self._give(self.book.add(event.turn_id, event.pcm, rate_hz, is_final=False, now=now))

    def on_finished(self, event: api.ReplyFinished, now: float) -> None:
        """All of the reply was made."""
        row = self.transcript.rows.get(event.turn_id)
        if row is None or not row.generated:
            self.transcript.agent_writes(event.turn_id, event.text)
        self._give(self.book.add(event.turn_id, b"", self.runtime.output_rate_hz, is_final=True, now=now))

    def is_complete(self, turn_id: str) -> bool:
        speech = self.book.speeches.get(turn_id)
        return speech is not None and speech.is_complete

    def _play_rendered(self, turn_id: str, pcm: bytes, now: float) -> None:
        self._rendered.add(turn_id)
        self._give(self.book.add(turn_id, pcm, self.setup.rendered_rate_hz, is_final=True, now=now))

    def _give(self, pieces: list[Piece]) -> None:
        leg_id = self.context.leg_id
        self.context.add(*(play_command(leg_id, piece, self.may_duck(piece.turn_id)) for piece in pieces))

    # ----------------------------------------------------------- what was heard

    def on_played(self, item_id: str, played_samples: int, is_over: bool, now: float) -> Speech | None:
        """The speech that has got on; None when it is not ours, or was cut."""
        found = self.book.played(item_id, played_samples, is_over=is_over, now=now)
        if found is None or found[0].is_cut:
            return None
        speech, pieces = found
        self._give(pieces)
        if self.book.is_audible(speech):
            self._begin_audible(speech.turn_id)
        return speech

    def heard_out(self, turn_id: str) -> None:
        if turn_id in self._audible:  # a reply without a sound (a bare tool call) leaves no row
            self.context.add(*self.transcript.agent_heard(turn_id, self.context.sample))

    def on_wire(self, current_turn_id: str) -> str:
        """Whose sound is on the wire while `current_turn_id` has the floor."""
        filler = self.book.speeches.get(self._filler_id)
        if filler is not None and not filler.is_cut and not self.book.is_heard_out(filler):
            return self._filler_id
        return current_turn_id

    def _begin_audible(self, turn_id: str) -> None:
        """From here on the caller's turn before is over: what follows is another one."""
        if turn_id not in self.purposes or turn_id in self._audible:
            return
        self._audible.add(turn_id)
        self.context.add(*self.transcript.agent_audible(turn_id, self.context.sample))
        if self.purposes[turn_id] != "filler":
            is_reply = self.purposes[turn_id] == "reply"
            self.caller.end_turn(is_answered=is_reply)

    # -------------------------------------------------------------- what is cut

    def cut(self, turn_id: str, reason: str) -> None:
        """Stop the turn at the exact sample, and a filler that stands in for it."""
        if self._filler_id and reason != "recover":
            self._stop(self._filler_id, reason)
        self._stop(turn_id, reason)

    def on_flushed(self, event: tel.Flushed, now: float) -> None:
        """The leg has said where it stopped."""
        reason = self._flushing.pop(event.item_id, "")
        if not reason:
            return
        found = self.book.played(event.item_id, event.played_samples, is_over=True, now=now)
        if found is not None:
            self._tell_cut(found[0].turn_id, reason)
        if not self._flushing:
            self.runtime.release()

    def on_truncated(self, event: api.ReplyTruncated) -> None:
        """The aligner has said which words were heard."""
        offset = self._cut_at.pop(event.turn_id, 0)
        self._keep_as_heard(event.turn_id, event.heard_text, event.generated_text, offset)

    def line_went_dead(self, turn_id: str) -> None:
        """Keep what had been heard of a turn; no aligner is asked any more."""
        speech = self.book.speeches.get(turn_id)
        if speech is not None and self.book.is_audible(speech):
            self._keep_share(speech)

    def _stop(self, turn_id: str, reason: str) -> None:
        item_id = self.book.cut(turn_id)
        if item_id:
            self._flushing[item_id] = reason
            self.runtime.is_held = True
            leg_id = self.context.leg_id
            self.context.add(tel.Flush(leg_id=leg_id, item_id=item_id), tel.Resume(leg_id=leg_id))
        elif turn_id in self.purposes:
            self._tell_cut(turn_id, reason)

    def _tell_cut(self, turn_id: str, reason: str) -> None:
        speech = self.book.speeches[turn_id]
        played = self.book.played_of(speech) if self.book.is_audible(speech) else 0
        if reason == "false_end" and played:
            reason = "interrupt"  # the caller was quicker than our report: something was heard after all
        elif reason == "interrupt" and not played:
            reason = "false_end"
        self._cut_at[turn_id] = speech.played_samples_of_leg if played else 0
        if played:
            self._begin_audible(turn_id)
        if self.runtime.is_up and turn_id not in self._rendered:
            self.runtime.cancel(turn_id, played_samples=played, reason=reason)
        else:
            self._keep_share(speech)
        self.purposes.pop(turn_id, None)

    def _keep_share(self, speech: Speech) -> None:
        """Without the encoder's alignment: as many whole words as the share of samples that were played."""
        share = self.book.played_of(speech) / max(1, speech.made_samples)
        heard = self.transcript.share_of(speech.turn_id, share)
        self._keep_as_heard(speech.turn_id, heard, "", speech.played_samples_of_leg)

    def _keep_as_heard(self, turn_id: str, heard: str, generated: str, cut_offset_samples: int) -> None:
        self.context.add(
            *self.transcript.agent_cut(
                turn_id, heard, generated, cut_offset_samples=cut_offset_samples, end_sample=self.context.sample
            )
        )
