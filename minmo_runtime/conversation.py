"""The context of one call as ChatML messages, and which of its positions the LLM's cache already holds.

The messages are the truth; the cache is brought in line with them by cutting to the common prefix and prefilling
the rest, so a cut after a barge-in (design §4 rule 4) is an ordinary edit, and so is a user turn that grows while the
caller speaks. A position is a token id, or, where a trained projector hears the caller, a vector of the caller's voice
in the place of the words. It knows nothing of tensors. Walk: step 8. Training data is rendered by the same function
(`text.chat_turn`; alignment_calls.lay_out for voices).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minmo_runtime.text import ROLE_OPEN, TURN_CLOSE, TextTokenizer, chat_turn

ROLES = ("system", "user", "assistant", "tool")


@dataclass(eq=False, slots=True)
class AudioVector:
    """One position of the caller's voice, as the LLM reads it. Equal to itself only."""

    vector: Any  # [D]
    was_predicted_on: bool = False  # the duplex predictor has had it with its hidden state


Position = int | AudioVector


@dataclass(frozen=True)
class Message:
    """`audio`: what the LLM reads in the place of `text` (a caller's words behind a trained projector)."""

    role: str
    text: str
    audio: tuple[AudioVector, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r}: must be one of {', '.join(ROLES)}")


@dataclass(eq=False)
class Conversation:
    """Owned by its stream. `cached_ids` are the positions whose keys and values are in the LLM's slot."""

    tokenizer: TextTokenizer
    max_tokens: int
    messages: list[Message] = field(default_factory=list)
    cached_ids: list[Position] = field(default_factory=list)
    target_ids: list[Position] = field(default_factory=list)
    opening: str = ""  # role of the message to come, whose opening ends target_ids
    user_span: tuple[int, int] = (0, 0)  # positions of the last user turn's content in target_ids, open or closed
    shared_lengths: tuple[int, ...] = ()  # of target_ids: the system prompt; everything before the caller's first turn
    kept_rows: dict[int, Any] = field(default_factory=dict)  # cached position of a user turn → (hidden, input vector)
    _rendered: dict[Message, list[Position]] = field(default_factory=dict)

    def add(self, role: str, text: str, audio: Sequence[AudioVector] = ()) -> None:
        self.messages.append(Message(role, text, tuple(audio)))

    def retarget(self, opening: str = "", begun: str | Sequence[AudioVector] = "") -> None:
        """Recompute what the cache should hold: all messages, then `opening` (the role of the message to come, or
        "") and as much of that message as is known already."""
        self.opening = opening
        self._rendered = {m: self._rendered.get(m) or self._positions(m) for m in self.messages}
        rendered = [self._rendered[m] for m in self.messages]
        last = self._begun(opening, begun) if opening else []
        self._drop_oldest(rendered, len(last))
        self.target_ids, self.user_span, self.shared_lengths = [], (0, 0), ()
        head, tail = len(self._begun("user", "")), len(self.tokenizer.encode(TURN_CLOSE))
        is_shared = True
        for message, positions in zip(self.messages, rendered, strict=True):
            if message.role == "user":
                is_shared = False
                self.user_span = (len(self.target_ids) + head, len(self.target_ids) + len(positions) - tail)
            self.target_ids += positions
            if is_shared and message.role in ("system", "assistant"):
                self.shared_lengths = (*self.shared_lengths[:1], len(self.target_ids))
        if opening == "user":
            self.user_span = (len(self.target_ids) + head, len(self.target_ids) + len(last))
        self.target_ids += last

    def text_ids(self) -> list[int]:
        """The messages in words, where the LLM may have heard a voice: what was said, for those who read it."""
        return [token for m in self.messages for token in self.tokenizer.encode(chat_turn(m.role, m.text))]

    def common_prefix(self, needs_last: bool = True) -> int:
        """How many cached positions are still right; with `needs_last` at least one is left to feed, for its hidden
        state."""
        limit = min(len(self.cached_ids), len(self.target_ids) - needs_last)
        for position in range(limit):
            if self.cached_ids[position] != self.target_ids[position]:
                return position
        return max(0, limit)

    def is_current(self) -> bool:
        """Whether the cache holds exactly what it should."""
        return self.cached_ids == self.target_ids

    def cut(self, length: int) -> None:
        """The slot was truncated to `length` positions."""
        del self.cached_ids[length:]
        for position in [position for position in self.kept_rows if position >= length]:
            del self.kept_rows[position]

    def forget_rows(self, before: int) -> None:
        """Of earlier turns nobody asks any more."""
        for position in [position for position in self.kept_rows if position < before]:
            del self.kept_rows[position]

    def waiting_ids(self) -> Sequence[Position]:
        """Positions still to be fed (call after the slot was cut to the common prefix)."""
        return self.target_ids[len(self.cached_ids) :]

    def _positions(self, message: Message) -> list[Position]:
        if not message.audio:
            return list(self.tokenizer.encode(chat_turn(message.role, message.text)))
        return [*self._begun(message.role, message.audio), *self.tokenizer.encode(TURN_CLOSE)]

    def _begun(self, role: str, content: str | Sequence[AudioVector]) -> list[Position]:
        """A message that is not closed. Of a voice that speaks without end the latest half of the context is kept."""
        opened = ROLE_OPEN.format(role=role)
        if isinstance(content, str):
            return list(self.tokenizer.encode(opened + content))
        return [*self.tokenizer.encode(opened), *content[-(self.max_tokens // 2) :]]

    def _drop_oldest(self, rendered: list[list[Position]], reserve: int) -> None:
        """Beyond `max_tokens` the oldest messages behind the system prompt go, a caller's turn with its answer at
        once."""
        first = 1 if self.messages and self.messages[0].role == "system" else 0
        while len(self.messages) > first + 1 and sum(map(len, rendered)) + reserve > self.max_tokens:
            del self.messages[first], rendered[first]
            while len(self.messages) > first + 1 and self.messages[first].role in ("assistant", "tool"):
                del self.messages[first], rendered[first]
