"""One call inside the runtime: what it was told, what it owes, what may be worked on next. No tensors, no clock, no IO.

Requests come in through `receive`, jobs (runner.py) change the ear, the conversation and the replies, events leave
through `outbox`. `now` is the engine's time in seconds; the caller's audio has its own clock in samples. Walk: steps
6 and 10.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minmo_runtime import bridges
from minmo_runtime.api import (
    AudioDelta,
    CancelReply,
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
    TextDelta,
    ToolCallRequested,
    ToolResult,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import Conversation, Message
from minmo_runtime.drafting import Drafting
from minmo_runtime.ear import Ear
from minmo_runtime.listening import Listening, heard_so_far
from minmo_runtime.rates import Rates, input_samples
from minmo_runtime.reply import Reply, ReplyPhase
from minmo_runtime.segment import Moment
from minmo_runtime.text import TextTokenizer, normalise_spoken

MAX_CACHED_SENTENCES = 64  # of all calls together; about 3 s of 24 kHz audio each, 10 MB in all
MAX_MOMENTS = 64  # an engine that is later than that skips predictions; the patience in agent/turn_taking stays
TURN_END, TOOL_CALL, TOOL_CALL_END = "<|im_end|>", "<tool_call>", "</tool_call>"
_MARKUP = re.compile(r"<[^<>]*>|[<>|]")


def plain(text: str) -> str:
    """Text from outside cannot hold special tokens: anything that looks like one is taken out; the model reads lower
    case."""
    return " ".join(_MARKUP.sub(" ", text.lower()).split())


@dataclass(eq=False)
class Truncation:
    """A cut reply whose heard words are being looked for in its own audio (ALIGN jobs). Tensors are opaque here."""

    reply: Reply
    played_samples: int
    reason: str
    audio: Any = None  # features not yet encoded
    encoder_state: Any = None
    log_probs: list[Any] = field(default_factory=list)


class Stream:
    """Owned and changed by the engine only."""

    def __init__(self, request: OpenStream, config: RuntimeConfig, rates: Rates, tokenizer: TextTokenizer) -> None:
        self.call_id = request.call_id
        self.slot = -1  # of both caches; given by the engine
        self.config = config
        self.rates = rates
        self.seed = request.seed
        self.slot_digits = request.slot_digits
        self.ear = Ear(request.call_id, config)
        self.conversation = Conversation(tokenizer, config.max_context_tokens)
        self.conversation.add("system", plain(request.system_prompt))
        for role, text in request.history:
            self.conversation.add(role, plain(text))
        self.conversation.retarget()
        self.listening = Listening(self.conversation)
        self.drafting = Drafting(self.ear, self.conversation, config.draft_probability)
        self.replies: deque[Reply] = deque()
        self.last_reply: Reply | None = None  # finished, its audio may still be playing
        self.truncations: deque[Truncation] = deque()
        self.outbox: list[RuntimeEvent] = []
        self.playback_end_s = 0.0
        self.failure = ""
        self.needs_hidden = (
            False  # whether a Say must run through the LLM (a trained output projector reads hidden states)
        )
        self.predicts_itself = False  # whether a trained duplex predictor replaces the endpointer
        self.prediction_samples = input_samples(config.prediction_ms)
        self.moments: deque[Moment] = deque(maxlen=MAX_MOMENTS)  # predictions that are owed
        self.new_frames: list[Any] = []  # [n, D] encoder frames that no prediction has seen
        self.predictor_state: Any = None  # model.causal_transformer.LayerState
        self.say_cache: dict[tuple[str, str], list[NDArray[np.int16]]] = {}
        self._next_prediction = self.prediction_samples

    # ----------------------------------------------------------------- requests

    def receive(self, request: RuntimeRequest, now: float) -> None:
        match request:
            case PushAudio():
                self.ear.push(request, self.is_agent_speaking(now))
                self._predict(now)
            case PushText():
                self.ear.replace_user_turn(plain(request.text))
            case StartReply():
                self._start_reply(request, now)
            case Say():
                self._say(request, now)
            case ToolResult():
                self._take_tool_result(request)
            case CancelReply():
                self._cancel(request, now)
            case DiscardOverlap():
                self.ear.discard(overlap=True)
                self.listening.drop()
            case _:
                raise ValueError("not a request to an open stream")

    def listen(self, now: float) -> None:
        """More of the caller's voice is there for the LLM: in the call's context while nobody works on it, else on the
        listening branch."""
        if self.truncations:
            return
        reply = self.replies[0] if self.replies else self.drafting.reply
        if reply is None and not self.is_agent_speaking(now):
            self.expect_user_turn()
            return
        if not self.listening.is_apart:
            self._fork(reply or self.last_reply, now)
        self.listening.grow(self.ear.audio_so_far())

    def _fork(self, reply: Reply | None, now: float) -> None:
        """The listening branch begins: behind what was heard of the reply, or, before its first sample, in the user
        turn that it answers."""
        if reply is None or reply.phase is ReplyPhase.LISTENING:
            return
        if reply.is_sounding:
            base = self.conversation.messages if reply.messages_base is None else reply.messages_base
            played = reply.num_samples - self.buffered_s(now) * self.rates.output_sample_rate_hz
            heard = plain(heard_so_far(reply.text, played, reply.num_samples))
            self.listening.fork([*base, *([Message("assistant", heard)] if heard else [])])
        elif not reply.is_draft:
            base = self.conversation.messages if reply.messages_before is None else reply.messages_before
            self.listening.fork(base, reply.user_audio)
        elif self.listening.feeds_predictor:
            assert reply.messages_before is not None, "a draft keeps the conversation before it"
            self.listening.fork(reply.messages_before)

    @property
    def owes_reading(self) -> bool:
        """Whether the duplex predictor waits for the LLM."""
        if self.replies or self.truncations or self.drafting.reply or not self.listening.feeds_predictor:
            return self.listening.owes_reading
        return self.conversation.opening == "user" and not self.conversation.is_current()

    def expect_user_turn(self, settled: str = "") -> None:
        """The caller's voice, or what has settled of the words of the open segment, goes into the LLM's cache ahead of
        the turn's end. If later words differ, the common prefix shrinks: the cache is cut back there, and nothing else
        has to be undone."""
        if self.replies or self.truncations or self.drafting.reply:
            return
        self.listening.decide()
        if self.ear.hears_audio and not self.ear.is_typed:
            if audio := self.ear.audio_so_far():
                self.conversation.retarget("user", audio)
            return
        text = " ".join(part for part in (*self.ear.overlap_text, *self.ear.user_text, settled) if part)
        self.conversation.retarget("user", plain(normalise_spoken(text)))

    def _start_reply(self, request: StartReply, now: float) -> None:
        self.ear.adopt_overlap()  # neither discarded nor cut by: it is part of what is answered
        self.ear.close_segment()
        reply = Reply(request.turn_id, ReplyPhase.LISTENING, waiting_segments=list(self.ear.segments), started_s=now)
        self.replies.append(reply)

    def _say(self, request: Say, now: float) -> None:
        self.drop_draft()
        self.listening.decide()  # what is heard over this sentence begins behind it
        text = " ".join(request.text.split())
        reply = Reply(
            request.turn_id,
            ReplyPhase.PREFILL if self.needs_hidden else ReplyPhase.DECODING,
            forced_text=text,
            forced_ids=self.conversation.tokenizer.encode(plain(text)),
            style=request.style,
            is_forced=True,
            started_s=now,
        )
        if cached := self.say_cache.get((text, request.style)):
            reply.phase, reply.replay = ReplyPhase.REPLAY, list(cached)
        if not reply.forced_ids:
            reply.phase = ReplyPhase.REPLAY  # nothing to say: finished at once
        self.replies.append(reply)  # while a tool runs it passes: "one moment, please"

    def _take_tool_result(self, request: ToolResult) -> None:
        for reply in self.replies:
            if reply.phase is ReplyPhase.TOOL and reply.tool_call_id == request.tool_call_id:
                self.conversation.add("tool", plain(request.content))
                self.conversation.retarget("assistant")
                reply.tool_call_id = ""
                reply.become(ReplyPhase.PREFILL)

    def _cancel(self, request: CancelReply, now: float) -> None:
        reply = next((r for r in self.replies if r.turn_id == request.turn_id), None)
        if reply is None and self.last_reply is not None and self.last_reply.turn_id == request.turn_id:
            reply = self.last_reply
        if reply is None:
            self.emit(ReplyTruncated(call_id=self.call_id, turn_id=request.turn_id, heard_text="", generated_text=""))
            return
        self.drop_draft()
        self.listening.decide()
        if reply in self.replies:
            self.replies.remove(reply)
        self.last_reply = None
        self.playback_end_s = min(self.playback_end_s, now)
        if request.reason == "recover":
            self.ear.discard(overlap=True)
        else:
            self.ear.adopt_overlap()
        played = 0 if request.reason == "false_end" else max(0, min(request.played_samples, reply.num_samples))
        self.truncations.append(Truncation(reply, played, request.reason))
        if played == 0:
            self.finish_truncation(self.truncations[-1], "")
        elif reply.phase is ReplyPhase.DONE and played == reply.num_samples:
            self.finish_truncation(self.truncations[-1], reply.text)

    # -------------------------------------------------------------- what is next

    @property
    def head(self) -> Reply | None:
        """The reply that is worked on, else a draft; none while a cut is being resolved (it decides the context)."""
        if self.truncations:
            return None
        return self.replies[0] if self.replies else self.drafting.reply

    def advance(self) -> None:
        """Transitions that need no model: the user turn is fully heard → its text goes into the context."""
        if not self.replies and self.drafting.is_stale:
            self.drop_draft()
            self.expect_user_turn(self.ear.running_text())  # what the draft had read of the turn stays in the cache
        reply = self.head
        if reply is not None and reply.phase is ReplyPhase.TOOL and not reply.is_draft:
            self._let_a_say_pass()
        if reply is None or reply.phase is not ReplyPhase.LISTENING:
            return
        if any(not segment.is_final for segment in reply.waiting_segments):
            return
        user_text, audio = normalise_spoken(self.ear.take_user_turn()), self.ear.take_user_audio()
        if draft := self.drafting.commit(reply, user_text):
            draft.user_audio = audio
            self._speak_draft(draft)
            return
        self.drop_draft()
        reply.messages_before = list(self.conversation.messages)
        self.listening.decide()
        reply.user_text, reply.user_audio = user_text, audio
        self.conversation.add("user", user_text, audio)
        self.conversation.retarget("assistant")
        reply.wants_query = self.needs_hidden
        reply.become(ReplyPhase.PREFILL)

    def _speak_draft(self, draft: Reply) -> None:
        """It is the reply that was asked for: what it kept back goes out."""
        self.replies[0] = draft
        self._count_draft(draft, "committed")
        if draft.text:
            self.emit(TextDelta(call_id=self.call_id, turn_id=draft.turn_id, text=draft.text))
        if draft.wanted_tool is not None:
            self.request_tool(draft, *draft.wanted_tool)

    def drop_draft(self) -> None:
        """What was written ahead answers nothing any more."""
        if draft := self.drafting.discard():
            self._count_draft(draft, "discarded")

    def _count_draft(self, draft: Reply, outcome: str) -> None:
        tokens = draft.num_drawn
        self.emit(DraftEnded(call_id=self.call_id, turn_id=draft.turn_id, outcome=outcome, num_text_tokens=tokens))

    def _let_a_say_pass(self) -> None:
        """A Say that queued behind a reply need not wait for that reply's tool."""
        say = next((reply for reply in self.replies if reply.is_forced), None)
        if say is not None:
            self.replies.remove(say)
            self.replies.appendleft(say)

    def buffered_s(self, now: float) -> float:
        """Audio sent and, by the clock, not yet played."""
        return max(0.0, self.playback_end_s - now)

    def is_agent_speaking(self, now: float) -> bool:
        if self.buffered_s(now) > 0:
            return True
        reply = self.head
        return reply is not None and reply.is_sounding and reply.phase is not ReplyPhase.DONE

    def has_room_ahead(self, now: float) -> bool:
        return self.buffered_s(now) < self.config.max_ahead_s

    # ------------------------------------------------------------------ results

    def emit(self, event: RuntimeEvent) -> None:
        self.outbox.append(event)

    def send_text(self, reply: Reply, text: str) -> None:
        reply.text += text
        if text and not reply.is_draft:
            self.emit(TextDelta(call_id=self.call_id, turn_id=reply.turn_id, text=text))

    def send_audio(self, reply: Reply, pcm: NDArray[np.int16], now: float) -> None:
        if not len(pcm):
            return
        if reply.first_audio_s < 0:
            reply.first_audio_s = now
        self.emit(
            AudioDelta(
                call_id=self.call_id, turn_id=reply.turn_id, sequence=reply.sequence, pcm=pcm.astype("<i2").tobytes()
            )
        )
        reply.pcm.append(pcm)
        reply.sequence += 1
        reply.num_samples += len(pcm)
        self.playback_end_s = max(self.playback_end_s, now) + len(pcm) / self.rates.output_sample_rate_hz

    def finish_reply(self, reply: Reply) -> None:
        """All text and audio were handed out."""
        assert self.replies[0] is reply, f"turn {reply.turn_id} is not the one being worked on"
        self.replies.popleft()
        reply.become(ReplyPhase.DONE)
        self.last_reply = reply
        if reply.is_forced and reply.pcm:
            self._remember(reply)
        reply.messages_base = list(self.conversation.messages)
        self._add_spoken(plain(reply.text) + reply.tool_line)
        self.emit(
            ReplyFinished(call_id=self.call_id, turn_id=reply.turn_id, text=reply.text, num_samples=reply.num_samples)
        )

    def finish_truncation(self, truncation: Truncation, heard_text: str) -> None:
        """The heard words are known: the context becomes what really happened (design §4 rule 4)."""
        self.truncations.remove(truncation)
        reply = truncation.reply
        if truncation.reason == "false_end":
            if reply.messages_before is not None:
                self.conversation.messages = reply.messages_before
                self.ear.give_back(reply.user_text, reply.user_audio)
        else:
            if reply.messages_base is not None:
                self.conversation.messages = reply.messages_base
            if reply.phase is ReplyPhase.TOOL:
                self._forget_tool_call()
            self._add_spoken(plain(heard_text))
        reply.phase = ReplyPhase.DONE
        self.conversation.retarget()
        if truncation.reason != "recover":
            self.expect_user_turn(self.ear.running_text())  # what was read of the turn stays in the cache
        self.emit(
            ReplyTruncated(
                call_id=self.call_id, turn_id=reply.turn_id, heard_text=heard_text, generated_text=reply.text
            )
        )

    def _add_spoken(self, text: str) -> None:
        """Into the context. What was said while a tool ran stands before the tool's result, as it was said."""
        if not text:
            return
        self.conversation.add("assistant", text)
        messages = self.conversation.messages
        waiting = self.replies[0] if self.replies else None
        if waiting is not None and waiting.num_tools and len(messages) > 1 and messages[-2].role == "tool":
            messages[-2:] = [messages[-1], messages[-2]]
        self.conversation.retarget()

    def request_tool(self, reply: Reply, name: str, arguments: dict[str, str]) -> None:
        if reply.is_draft:  # no tool, whatever it does, runs for words that may not be the caller's last
            reply.wanted_tool = name, arguments
            return
        reply.num_tools += 1
        reply.tool_call_id = f"{self.call_id}/{reply.turn_id}/{reply.num_tools}"
        self.emit(
            ToolCallRequested(
                call_id=self.call_id,
                turn_id=reply.turn_id,
                tool_call_id=reply.tool_call_id,
                name=name,
                arguments=arguments,
            )
        )

    def _forget_tool_call(self) -> None:
        """A call for a tool whose result will never come does not stay in the context."""
        messages = self.conversation.messages
        for index in range(len(messages) - 1, -1, -1):
            if TOOL_CALL in messages[index].text:
                del messages[index]
                return

    def _remember(self, reply: Reply) -> None:
        """Keep a fixed sentence's samples, so that the next call gets it at once; a bounded number of them."""
        key = (reply.forced_text, reply.style)
        if key not in self.say_cache:
            while len(self.say_cache) >= MAX_CACHED_SENTENCES:
                del self.say_cache[next(iter(self.say_cache))]
            self.say_cache[key] = list(reply.pcm)

    # ---------------------------------------------------------------- prediction

    def predict_every(self, step_ms: int) -> None:
        """From now on a trained predictor answers, at its own steps."""
        self.predicts_itself = True
        self.prediction_samples = self._next_prediction = input_samples(step_ms)

    @property
    def can_predict(self) -> bool:
        """Whether everything that the oldest owed prediction may know has been encoded, and read if it reads that."""
        if not self.moments or (self.listening.feeds_predictor and self.owes_reading):
            return False
        return self.moments[0].num_chunks <= self.ear.num_chunks_encoded

    def predicted(self, prediction: DuplexPrediction, now: float) -> None:
        """The answer to an owed prediction; at a likely end of the caller's turn a draft begins."""
        self.emit(prediction)
        if not (self.replies or self.truncations or self.is_agent_speaking(now)):
            self.drafting.consider(prediction.user_done, needs_query=self.needs_hidden)

    def _predict(self, now: float) -> None:
        while self._next_prediction <= self.ear.clock:
            moment = self.ear.moment(self._next_prediction, self.is_agent_speaking(now))
            if self.predicts_itself:
                self.moments.append(moment)  # answered when what was heard by then is encoded (predictor.py)
            else:
                self.predicted(bridges.predict(self.call_id, self.ear.view(moment, self.slot_digits)), now)
            self._next_prediction += self.prediction_samples
