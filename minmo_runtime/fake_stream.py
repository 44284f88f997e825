"""One call of the fake runtime: what it hears, predicts and says, by its script (fake_script.py).

Its only clock is the caller's audio: every `PushAudio` moves it on by its samples, and everything owed until then comes
out, in order. The same requests therefore always give the same events.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import deque
from dataclasses import dataclass, field
from functools import cache

import msgspec

from minmo_runtime.api import (
    INPUT_SAMPLE_RATE_HZ,
    AudioDelta,
    CancelReply,
    Caption,
    DiscardOverlap,
    DraftEnded,
    DuplexPrediction,
    OpenStream,
    PushAudio,
    PushText,
    ReplyFinished,
    ReplyTruncated,
    RuntimeEvent,
    RuntimeRequest,
    Say,
    StartReply,
    StreamFailed,
    TextDelta,
    ToolCallRequested,
    ToolResult,
)
from minmo_runtime.fake_script import FakeLine, FakeRule, FakeScript

_TONE_HZ = 180.0
_PREDICTION_SAMPLES = INPUT_SAMPLE_RATE_HZ * 160 // 1000


@dataclass(eq=False)  # one is itself only: two calls' turns may hold equal values
class _Turn:
    turn_id: str
    text: str = ""
    due_sample: int = 0  # input sample at which the next piece is owed
    words: list[str] = field(default_factory=list)
    sent_words: int = 0
    sent_samples: int = 0
    sequence: int = 0
    is_finished: bool = False
    rule: FakeRule | None = None
    groups: dict[str, str] = field(default_factory=dict)
    waiting_tool: str = ""
    playback_from: int = -1  # input sample at which its first chunk was sent


class FakeStream:
    """One call, without IO: `receive(request)` returns the events that follow from it."""

    def __init__(self, request: OpenStream, script: FakeScript) -> None:
        self.call_id = request.call_id
        self.script = script
        self.context: list[tuple[str, str]] = [("system", request.system_prompt), *request.history]
        self.sample = 0
        self._lines = deque(script.lines)
        self._line: FakeLine | None = None
        self._segment_start = -1
        self._last_voiced = 0
        self._words_heard = 0
        self._next_prediction = _PREDICTION_SAMPLES
        self._user_text: list[str] = []
        self._overlap_text: list[str] = []
        self._segment_in_reply = False
        self._turns: deque[_Turn] = deque()
        self._last_turn: _Turn | None = None
        self._draft: tuple[str, int] | None = None  # what it answers, and the sample at which it was begun
        self._num_replies = 0
        self._num_tools = 0
        self.is_failed = False

    # ------------------------------------------------------------------ requests

    def receive(self, request: RuntimeRequest) -> list[RuntimeEvent]:
        if self.is_failed:
            return []
        match request:
            case PushAudio():
                return self._push_audio(request)
            case PushText():
                self._user_text = [request.text]
                return self._look_at_draft()
            case StartReply():
                return self._start_reply(request)
            case Say():
                turn = _Turn(request.turn_id, request.text, words=request.text.split())
                turn.due_sample = self.sample + self._ms(self.script.first_audio_ms)
                # A Say overtakes a reply that only waits for its tool ("one moment, please").
                if self._turns and self._turns[0].waiting_tool:
                    self._turns.appendleft(turn)
                else:
                    self._turns.append(turn)
                self._last_turn = turn
                return self._drop_draft()
            case ToolResult():
                return self._tool_result(request)
            case CancelReply():
                return [*self._drop_draft(), *self._cancel(request)]
            case DiscardOverlap():
                self._overlap_text = []
                if self._segment_start >= 0 and self._segment_in_reply and self._line is not None:
                    self._line = msgspec.structs.replace(
                        self._line, kind="noise"
                    )  # what is left of it is not listened to
                return []
            case _:
                return []

    def is_speaking(self) -> bool:
        """Whether audio that was sent is, by the input clock, still being played."""
        turn = self._last_turn
        if turn is None or turn.playback_from < 0:
            return False
        played_s = (self.sample - turn.playback_from) / INPUT_SAMPLE_RATE_HZ
        return not turn.is_finished or played_s < turn.sent_samples / self.script.output_sample_rate_hz

    def _push_audio(self, request: PushAudio) -> list[RuntimeEvent]:
        num_samples = len(request.pcm) // 2
        self.sample = request.start_sample + num_samples
        events = self._listen(request, num_samples)
        while (turn := self._turns[0] if self._turns else None) and not turn.waiting_tool:
            if turn.due_sample > self.sample:
                break
            events += self._speak(turn)
        events += self._look_at_draft()
        while self._next_prediction <= self.sample:
            prediction = self._predict(self._next_prediction)
            events.append(prediction)
            self._begin_draft(prediction)
            self._next_prediction += _PREDICTION_SAMPLES
        return events

    # ----------------------------------------------------------------- listening

    def _listen(self, request: PushAudio, num_samples: int) -> list[RuntimeEvent]:
        events: list[RuntimeEvent] = []
        if request.voiced:
            if self._segment_start < 0:
                self._segment_start = request.start_sample
                self._line = self._lines.popleft() if self._lines else FakeLine(text="", kind="noise")
                self._words_heard = 0
                self._segment_in_reply = self.is_speaking()
            self._last_voiced = self.sample
            events += self._partial()
        elif self._segment_start >= 0 and self.sample - self._last_voiced >= self._ms(self.script.hangover_ms):
            events += self._close_segment()
        return events

    def _partial(self) -> list[RuntimeEvent]:
        assert self._line is not None
        words = self._line.text.split()
        heard = min(len(words), (self.sample - self._segment_start) // self._ms(self.script.word_ms))
        if heard <= self._words_heard:
            return []
        self._words_heard = heard
        return [self._caption(" ".join(words[:heard]), is_final=False)]

    def _close_segment(self) -> list[RuntimeEvent]:
        line = self._line
        assert line is not None
        events: list[RuntimeEvent] = []
        if line.text and line.kind != "noise":
            events.append(self._caption(line.text, is_final=True))
            (self._overlap_text if self._segment_in_reply else self._user_text).append(line.text)
        self._segment_start = -1
        return events

    def _caption(self, text: str, is_final: bool) -> Caption:
        assert self._line is not None
        return Caption(
            call_id=self.call_id,
            text=text,
            is_final=is_final,
            confidence=self._line.confidence,
            start_sample=self._segment_start,
            end_sample=self._last_voiced,
            during_reply=self._segment_in_reply,
        )

    def _predict(self, sample: int) -> DuplexPrediction:
        silence = sample - self._last_voiced
        line, probabilities = self._line, {}
        is_complete = line is None or line.is_complete
        if self._segment_start >= 0 and self._segment_in_reply and line is not None:
            speech_ms = 1000 * (self._last_voiced - self._segment_start) // INPUT_SAMPLE_RATE_HZ
            sure = 0.9 if speech_ms >= 320 else 0.4
            name = "interrupt" if line.kind == "turn" else "backchannel" if line.kind == "backchannel" else "idle"
            probabilities[name] = sure
        elif not self._user_text and (line is None or self._segment_start < 0):
            probabilities["idle"] = 0.95
        elif silence < self._ms(self.script.done_after_ms) or not is_complete:
            may_be_over = 0 < self._ms(self.script.draft_after_ms) <= silence
            probabilities = {"user_continues": 0.65, "user_done": 0.3} if may_be_over else {"user_continues": 0.9}
        elif line is not None and line.kind == "noise":
            probabilities["idle"] = 0.9
        else:
            probabilities["user_done"] = 0.9
        return DuplexPrediction(call_id=self.call_id, sample=sample, **probabilities)

    def _heard(self) -> str:
        """Text of the open user turn; an open segment counts with all its words (the fake hears ahead)."""
        open_text = ""
        if self._segment_start >= 0 and self._line is not None and self._line.kind == "turn":
            open_text = self._line.text
        # Overlap that was neither discarded nor cut by (the reply simply ended) opens this user turn.
        return " ".join(part for part in (*self._overlap_text, *self._user_text, open_text) if part)

    def _take_user_turn(self) -> str:
        text = self._heard()
        if self._segment_start >= 0 and self._line is not None and self._line.kind == "turn":
            self._segment_start = -1
        self._user_text, self._overlap_text = [], []
        return text

    # ------------------------------------------------------------------ drafting

    def _begin_draft(self, prediction: DuplexPrediction) -> None:
        is_silent = self.sample - self._last_voiced >= self._ms(self.script.draft_after_ms) > 0
        if self._draft or not is_silent or self._turns or self.is_speaking() or prediction.user_done <= 0.2:
            return
        if text := self._heard():
            self._draft = text, self.sample

    def _look_at_draft(self) -> list[RuntimeEvent]:
        """It stands as long as the caller's words are the same."""
        return self._drop_draft() if self._draft and self._draft[0] != self._heard() else []

    def _drop_draft(self) -> list[RuntimeEvent]:
        draft, self._draft = self._draft, None
        return [DraftEnded(call_id=self.call_id, outcome="discarded")] if draft else []

    # ------------------------------------------------------------------ speaking

    def _start_reply(self, request: StartReply) -> list[RuntimeEvent]:
        events: list[RuntimeEvent] = []
        number, self._num_replies = self._num_replies, self._num_replies + 1
        if number == self.script.fail_at_reply:
            self.is_failed = True
            return [StreamFailed(call_id=self.call_id, reason="scripted failure")]
        if self._segment_start >= 0 and self._line is not None and self._line.text and self._line.kind == "turn":
            events.append(self._caption(self._line.text, is_final=True))
        text = self._take_user_turn()
        self.context.append(("user", text))
        turn = _Turn(request.turn_id)
        due = self.sample + self._ms(self.script.first_audio_ms)
        if self._draft and self._draft[0] == text:
            written = self._draft[1] + self._ms(self.script.first_audio_ms - self.script.first_voice_ms)
            due = max(self.sample, written) + self._ms(self.script.first_voice_ms)
            events.append(DraftEnded(call_id=self.call_id, outcome="committed", turn_id=turn.turn_id))
            self._draft = None
        events += self._drop_draft()
        turn.due_sample = due + self._ms(self.script.stalls_ms.get(number, 0))
        self._turns.append(turn)
        self._last_turn = turn
        for rule in self.script.rules:
            if found := re.search(rule.pattern, text):
                turn.rule, turn.groups = rule, {k: v or "" for k, v in found.groupdict().items()}
                break
        if turn.rule is not None and turn.rule.tool:
            turn.waiting_tool = f"{self.call_id}/tool{self._num_tools}"
            self._num_tools += 1
            arguments = {k: v.format_map(turn.groups) for k, v in turn.rule.arguments.items()}
            events.append(
                ToolCallRequested(
                    call_id=self.call_id,
                    turn_id=turn.turn_id,
                    tool_call_id=turn.waiting_tool,
                    name=turn.rule.tool,
                    arguments=arguments,
                )
            )
        else:
            self._write(turn)
        return events

    def _tool_result(self, request: ToolResult) -> list[RuntimeEvent]:
        for turn in self._turns:
            if turn.waiting_tool == request.tool_call_id:
                self.context.append(("tool", request.content))
                turn.waiting_tool = ""
                words = request.content.split()
                turn.groups.update(zip(words[0::2], words[1::2], strict=False))
                turn.groups["result"] = request.content
                turn.due_sample = max(turn.due_sample, self.sample + self._ms(self.script.first_audio_ms))
                self._write(turn)
        return []

    def _write(self, turn: _Turn) -> None:
        template = turn.rule.text if turn.rule is not None else self.script.fallback_text
        turn.text = template.format_map(_Blank(turn.groups))
        turn.words = turn.text.split()

    def _speak(self, turn: _Turn) -> list[RuntimeEvent]:
        """The next chunk of `turn`: its words as text, then as many samples of tone as they last."""
        script = self.script
        events: list[RuntimeEvent] = []
        per_chunk = max(1, script.chunk_ms // script.word_ms)
        words = turn.words[turn.sent_words : turn.sent_words + per_chunk]
        if turn.playback_from < 0:
            turn.playback_from = turn.due_sample
            self._last_turn = turn
        if words:
            text = " ".join(words)
            joined = text if turn.sent_words == 0 else " " + text
            num_samples = len(words) * script.word_ms * script.output_sample_rate_hz // 1000
            pcm = _tone(turn.sent_samples, num_samples, script.output_sample_rate_hz)
            events.append(TextDelta(call_id=self.call_id, turn_id=turn.turn_id, text=joined))
            events.append(AudioDelta(call_id=self.call_id, turn_id=turn.turn_id, sequence=turn.sequence, pcm=pcm))
            turn.sent_words += len(words)
            turn.sent_samples += num_samples
            turn.sequence += 1
            turn.due_sample += int(num_samples / script.output_sample_rate_hz / script.speed * INPUT_SAMPLE_RATE_HZ)
        if turn.sent_words == len(turn.words):
            turn.is_finished = True
            self._turns.remove(turn)
            self.context.append(("assistant", turn.text))
            events.append(
                ReplyFinished(call_id=self.call_id, turn_id=turn.turn_id, text=turn.text, num_samples=turn.sent_samples)
            )
        return events

    def _cancel(self, request: CancelReply) -> list[RuntimeEvent]:
        turn = next((t for t in self._turns if t.turn_id == request.turn_id), None)
        if turn is None and self._last_turn is not None and self._last_turn.turn_id == request.turn_id:
            turn = self._last_turn
        if turn is None:
            return [ReplyTruncated(call_id=self.call_id, turn_id=request.turn_id, heard_text="", generated_text="")]
        generated = " ".join(turn.words[: turn.sent_words])
        word_samples = self.script.word_ms * self.script.output_sample_rate_hz // 1000
        heard = "" if request.reason == "false_end" else " ".join(turn.words[: request.played_samples // word_samples])
        if turn in self._turns:
            self._turns.remove(turn)
        elif self.context and self.context[-1] == ("assistant", turn.text):
            self.context.pop()
        if request.reason == "false_end":  # the draft never was: the user turn goes on
            if self.context and self.context[-1][0] == "user":
                self._user_text.insert(0, self.context.pop()[1])
        elif heard:
            self.context.append(("assistant", heard))
        if request.reason != "recover":
            self._user_text += self._overlap_text
            self._segment_in_reply = False
        self._overlap_text = []
        self._last_turn = None
        return [ReplyTruncated(call_id=self.call_id, turn_id=turn.turn_id, heard_text=heard, generated_text=generated)]

    def _ms(self, milliseconds: int) -> int:
        return milliseconds * INPUT_SAMPLE_RATE_HZ // 1000


class _Blank(dict[str, str]):
    """A template field that nobody filled reads as nothing."""

    def __missing__(self, key: str) -> str:
        return ""


def _tone(start: int, num_samples: int, rate_hz: int) -> bytes:
    """A tone that swells and fades twice a second: voiced for any energy detector, continuous over chunks."""
    period, begin = _period(rate_hz), 2 * (start % rate_hz)
    return (period * (2 + num_samples // rate_hz))[begin : begin + 2 * num_samples]


@cache
def _period(rate_hz: int) -> bytes:
    """One second of it, after which it repeats."""
    times_s = [index / rate_hz for index in range(rate_hz)]
    swells = [0.75 + 0.25 * math.sin(4 * math.pi * time_s) for time_s in times_s]
    tone = [6000 * math.sin(2 * math.pi * _TONE_HZ * time_s) for time_s in times_s]
    return array("h", (int(a * b) for a, b in zip(tone, swells, strict=True))).tobytes()
