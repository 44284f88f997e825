"""What the fake runtime (fake.py) hears and says: a script instead of a model. Plain data."""

from __future__ import annotations

import msgspec


class FakeLine(msgspec.Struct, frozen=True, kw_only=True):
    """What the next voiced segment is heard as.

    `kind` "turn" (while the agent speaks: an interruption), "backchannel", or "noise" (voiced but no words).
    `is_complete` False: a pause inside the turn; user_done stays low, however long the silence.
    """

    text: str
    confidence: float = 0.95
    kind: str = "turn"
    is_complete: bool = True


class FakeRule(msgspec.Struct, frozen=True, kw_only=True):
    """`pattern` is searched in the user's text; its named groups and the tool's result fill `{...}` in arguments and
    text."""

    pattern: str
    text: str
    tool: str = ""
    arguments: dict[str, str] = {}


class FakeScript(msgspec.Struct, frozen=True, kw_only=True):
    lines: tuple[FakeLine, ...] = ()
    rules: tuple[FakeRule, ...] = ()
    fallback_text: str = "sorry, i did not get that."
    output_sample_rate_hz: int = 24_000
    first_audio_ms: int = 160  # from the request (or the tool result) to the first chunk
    chunk_ms: int = 600
    speed: float = 4.0  # seconds of speech made per second of call
    word_ms: int = 320  # length of one spoken word
    done_after_ms: int = 320  # trailing silence at which user_done passes 0.5
    draft_after_ms: int = 0  # trailing silence at which user_done is 0.3 and the reply is drafted; 0 = never
    first_voice_ms: int = 60  # of first_audio_ms: what is left to do when the text is there
    hangover_ms: int = 640  # silence that closes a segment
    stalls_ms: dict[int, int] = {}  # n-th StartReply (from 0) → extra delay before its first audio
    fail_at_reply: int = -1  # n-th StartReply kills the stream
