"""One spoken turn of the agent inside the runtime: from the request to its last sample.

    LISTENING → PREFILL → DECODING ⇄ TOOL → SPEAKING → DONE
    (a Say whose hidden states nobody needs starts in DECODING; a cached one in REPLAY)

The state is stored here and changed by the jobs of runner.py and by stream.py; sound flows text → voice tokens → mel →
samples, each stage taking what the one before has left. Tensors are opaque here. Walk: step 9.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minmo_runtime.conversation import AudioVector, Message
from minmo_runtime.segment import Segment


class ReplyPhase(Enum):
    LISTENING = "listening"  # the caller's last words are still being encoded
    PREFILL = "prefill"  # the context goes into the LLM
    DECODING = "decoding"  # text tokens are drawn (or, for a Say, its hidden states are read)
    TOOL = "tool"  # waits for ToolResult
    SPEAKING = "speaking"  # all text is known; sound is still being made
    REPLAY = "replay"  # a Say that was spoken before: its samples are sent again
    DONE = "done"


# Which phase may follow which; anything else is our own mistake.
NEXT_PHASES: dict[ReplyPhase, frozenset[ReplyPhase]] = {
    ReplyPhase.LISTENING: frozenset({ReplyPhase.PREFILL, ReplyPhase.DONE}),
    ReplyPhase.PREFILL: frozenset({ReplyPhase.DECODING, ReplyPhase.SPEAKING, ReplyPhase.DONE}),
    ReplyPhase.DECODING: frozenset({ReplyPhase.TOOL, ReplyPhase.SPEAKING, ReplyPhase.DONE}),
    ReplyPhase.TOOL: frozenset({ReplyPhase.PREFILL, ReplyPhase.DONE}),
    ReplyPhase.SPEAKING: frozenset({ReplyPhase.DONE}),
    ReplyPhase.REPLAY: frozenset({ReplyPhase.DONE}),
    ReplyPhase.DONE: frozenset(),
}


@dataclass(eq=False)  # one is itself only: two calls' turns may hold equal values
class Reply:
    """Owned by its stream's queue; only the first of the queue is worked on."""

    turn_id: str
    phase: ReplyPhase
    forced_text: str = ""  # of a Say
    style: str = ""
    is_forced: bool = False
    is_draft: bool = False  # made ahead of the decision to speak: nothing of it leaves (drafting.py)
    forced_ids: list[int] = field(default_factory=list)
    # --- text
    text: str = ""  # spoken text so far
    text_stream: Any = None  # text.TextStream
    spoken: Any = None  # spoken_form.SpokenStream, where the voice LM reads text by its own table
    token_ids: list[int] = field(default_factory=list)  # spoken tokens
    num_drawn: int = 0  # tokens drawn by the LLM in this reply, spoken or not
    hidden: Any = None  # [D_llm], last hidden state: samples the next token
    wants_query: bool = False  # its prefill must pass the user turn again, to read the hidden states there
    tool_ids: list[int] | None = None  # inside <tool_call>
    known_numbers: list[tuple[int, ...]] = field(default_factory=list)  # of the conversation: a tool line has no others
    tool_call_id: str = ""
    num_tools: int = 0
    wanted_tool: tuple[str, dict[str, str]] | None = None  # of a draft: name and arguments, asked for when it is spoken
    user_text: str = ""  # the user turn it answers: given back if the turn was not over
    user_audio: list[AudioVector] = field(default_factory=list)  # the same as the LLM read it; empty = by its words
    # --- context
    waiting_segments: list[Segment] = field(default_factory=list)  # the user turn's speech when it was closed
    messages_before: list[Message] | None = None  # the conversation before its user turn
    messages_base: list[Message] | None = None  # the conversation before its own spoken text
    tool_line: str = ""  # "<tool_call>...</tool_call>" behind spoken text: part of the message, never spoken
    # --- query prefix of the voice LM
    query_hidden: list[Any] = field(default_factory=list)
    query_embedding: list[Any] = field(default_factory=list)
    # --- sound
    voice: Any = None  # model.voice_lm.VoiceStream
    is_voice_waiting: bool = False  # it asked for text that is not there yet
    is_voice_done: bool = False
    flow: Any = None  # model.flow.FlowState
    can_flow: bool = False  # the flow has a job
    is_in_chunk: bool = False  # that job is an Euler step, not the encoding of a chunk
    is_mel_complete: bool = False
    mels: list[Any] = field(default_factory=list)  # [1, M, T] pieces, not yet vocoded
    vocoder_state: Any = None
    is_vocoded: bool = False  # every sample was handed out
    pcm: list[NDArray[np.int16]] = field(default_factory=list)  # everything sent
    replay: list[NDArray[np.int16]] = field(default_factory=list)  # everything still to be sent again
    num_samples: int = 0
    sequence: int = 0
    started_s: float = -1.0  # engine time of the decision to speak
    first_audio_s: float = -1.0

    def become(self, phase: ReplyPhase) -> None:
        assert phase in NEXT_PHASES[self.phase], f"turn {self.turn_id}: {self.phase.value} → {phase.value}"
        self.phase = phase

    @property
    def is_sounding(self) -> bool:
        """Whether sound was sent."""
        return self.num_samples > 0
