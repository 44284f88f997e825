"""CONTRACT: the MinMo runtime, as requests in and events out.

The agent opens one stream per call, pushes the caller's audio all the time (also while the agent speaks), and decides
who has the floor; the runtime listens, predicts, and speaks. Requests and events are frozen tagged structs of builtins:
the same contract suite runs in-process, over a Unix socket, and later over Ray. No tensor, callback or object crosses.

Input audio is 16 kHz int16 mono; output audio is int16 mono at `StreamOpened.output_sample_rate_hz`. This file imports
nothing of ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

INPUT_SAMPLE_RATE_HZ = 16_000


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    call_id: str


# ------------------------------------------------------------- requests: agent -> runtime


class OpenStream(Message, frozen=True):
    """Start a stream. `system_prompt` is the persona plus the style instruction, in the text form the checkpoint was
    trained on.
    """

    system_prompt: str
    seed: int = 0
    # Transcript replay after an engine death: alternating (role, text), role in {"user", "assistant", "tool"}.
    history: tuple[tuple[str, str], ...] = ()
    slot_digits: int = 0  # length of the number the campaign expects from the caller, 0 = unknown


class PushAudio(Message, frozen=True):
    """Caller audio, any length; `start_sample` counts from the call's first sample at 16 kHz."""

    pcm: bytes
    start_sample: int
    voiced: bool


class PushText(Message, frozen=True):
    """A caller turn that did not come by voice: keypad digits, or a line of a test. Replaces the open user turn."""

    text: str


class StartReply(Message, frozen=True):
    """The agent takes the floor: close the user turn and answer as turn `turn_id`."""

    turn_id: str


class Say(Message, frozen=True):
    """Speak exactly `text` as turn `turn_id` (greeting, notice, re-prompt, apology): same voice, kept in the context as
    assistant text.
    """

    turn_id: str
    text: str
    style: str = ""


class ToolResult(Message, frozen=True):
    """Answer to `ToolCallRequested`; the reply goes on with it. `content` is in the checkpoint's line format."""

    turn_id: str
    tool_call_id: str
    content: str


class CancelReply(Message, frozen=True):
    """Cut turn `turn_id` after `played_samples` (output rate) were heard.

    reason "interrupt": what was heard stays in the context, the overlap audio opens the next user turn.
    reason "false_end": nothing was heard; the draft is discarded and the user turn goes on.
    reason "recover": like interrupt, without overlap.
    Answered by `ReplyTruncated`.
    """

    turn_id: str
    played_samples: int
    reason: str = "interrupt"


class DiscardOverlap(Message, frozen=True):
    """The overlap was a backchannel, noise or echo: forget it, the reply goes on."""


class CloseStream(Message, frozen=True):
    """End; frees every resource of the call. Idempotent."""


# --------------------------------------------------------------- events: runtime -> agent


class StreamOpened(Message, frozen=True):
    output_sample_rate_hz: int
    checkpoint: str
    bridges: tuple[str, ...] = ()  # which connectors a bridge stands in for: "in", "out", "duplex"
    memory_bytes: int = 0  # what this call holds in the engine's caches, as allocated; 0 = not known


class Caption(Message, frozen=True):
    """What the encoder's CTC head heard of the caller; a final caption closes a segment.

    `confidence` in [0, 1] = mean posterior of the emitted tokens. `during_reply` marks overlap with agent speech.
    """

    text: str
    is_final: bool
    confidence: float
    start_sample: int
    end_sample: int
    during_reply: bool = False


class DuplexPrediction(Message, frozen=True):
    """Six-class posterior at input sample `sample` (16 kHz clock), masked by who speaks."""

    sample: int
    idle: float = 0.0
    user_continues: float = 0.0
    user_done: float = 0.0
    user_waits: float = 0.0
    backchannel: float = 0.0
    interrupt: float = 0.0


class TextDelta(Message, frozen=True):
    """Text of the reply as it is generated (spoken text only, never a tool-call body)."""

    turn_id: str
    text: str


class AudioDelta(Message, frozen=True):
    """Speech of the reply; int16 mono at the output rate, in order. `sequence` counts from 0 within the turn."""

    turn_id: str
    sequence: int
    pcm: bytes


class ToolCallRequested(Message, frozen=True):
    """The model wants a tool. Arguments are strings exactly as generated; the agent validates them."""

    turn_id: str
    tool_call_id: str
    name: str
    arguments: dict[str, str]


class DraftEnded(Message, frozen=True):
    """What became of a reply that was written before `StartReply`, at a low P(user_done); nothing of it was sent yet.

    outcome "committed": it is turn `turn_id`, whose text follows. "discarded": the caller went on, `turn_id` is empty.
    """

    outcome: str
    turn_id: str = ""
    num_text_tokens: int = 0


class JobOverran(Message, frozen=True):
    """A job that this call shared took longer than `runtime.max_job_ms`; everything else waited. `part` is its kind
    (encode, prefill, decode, voice, flow, vocode, ...).
    """

    part: str
    milliseconds: float


class ContextReused(Message, frozen=True):
    """Positions of this call's context that were copied and not read again. source "prefix": another call began with
    the same words (system prompt, greeting); "branch": they were read on the listening branch.
    """

    source: str
    num_positions: int


class ReplyFinished(Message, frozen=True):
    """All text and audio of the turn were delivered. `num_samples` is the total at the output rate."""

    turn_id: str
    text: str
    num_samples: int


class ReplyTruncated(Message, frozen=True):
    """After `CancelReply`: `heard_text` = whole words aligned inside the played audio; `generated_text` = all text
    made.
    """

    turn_id: str
    heard_text: str
    generated_text: str


class StreamFailed(Message, frozen=True):
    """This stream only has failed (NaN, out of memory, lost engine); others go on."""

    reason: str


RuntimeRequest = (
    OpenStream | PushAudio | PushText | StartReply | Say | ToolResult | CancelReply | DiscardOverlap | CloseStream
)
RuntimeEvent = (
    StreamOpened
    | Caption
    | DuplexPrediction
    | TextDelta
    | AudioDelta
    | ToolCallRequested
    | DraftEnded
    | JobOverran
    | ContextReused
    | ReplyFinished
    | ReplyTruncated
    | StreamFailed
)


class RuntimeOverloaded(Exception):
    """No room for another stream; the caller gets 503 + Retry-After."""


class StreamLost(Exception):
    """The engine that held this stream is gone; replay the transcript on another."""


class Runtime(Protocol):
    """Implemented by the engine in-process, its socket client, and the deterministic fake."""

    async def send(self, request: RuntimeRequest) -> None:
        """Raises RuntimeOverloaded on OpenStream without room."""
        ...

    async def check(self) -> None:
        """Returns when the runtime has shown that it works; raises when it does not. A hung one does not return."""
        ...

    def events(self, call_id: str) -> AsyncIterator[RuntimeEvent]:
        """Events of one call in order, ending after CloseStream or StreamFailed."""
        ...
