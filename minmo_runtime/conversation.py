"""The text context of one call as ChatML messages, and which of its tokens the LLM's cache already holds.

The messages are the truth; the cache is brought in line with them by cutting to the common prefix and prefilling
the rest, so a cut after a barge-in (design §4 rule 4) is an ordinary edit. It knows nothing of tensors. Walk: step 8.
Training data is rendered by the same function (`text.chat_turn`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minmo_runtime.text import ROLE_OPEN, TURN_CLOSE, TextTokenizer, chat_turn

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    role: str
    text: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r}: must be one of {', '.join(ROLES)}")


@dataclass(eq=False)
class Conversation:
    """Owned by its stream. `cached_ids` are the ids whose keys and values are in the LLM's slot."""

    tokenizer: TextTokenizer
    max_tokens: int
    messages: list[Message] = field(default_factory=list)
    cached_ids: list[int] = field(default_factory=list)
    target_ids: list[int] = field(default_factory=list)
    opening: str = ""  # role of the message to come, whose opening ends target_ids
    user_span: tuple[int, int] = (0, 0)  # positions of the last user message's text in target_ids

    def add(self, role: str, text: str) -> None:
        self.messages.append(Message(role, text))

    def retarget(self, opening: str = "", begun: str = "") -> None:
        """Recompute what the cache should hold: all messages, then `opening` (the role of the message to come, or
        "") and as much of that message as is known already."""
        self.opening = opening
        rendered = [self.tokenizer.encode(chat_turn(m.role, m.text)) for m in self.messages]
        last = self.tokenizer.encode(ROLE_OPEN.format(role=opening) + begun) if opening else []
        self._drop_oldest(rendered, len(last))
        self.target_ids, self.user_span = [], (0, 0)
        head = len(self.tokenizer.encode(ROLE_OPEN.format(role="user")))
        tail = len(self.tokenizer.encode(TURN_CLOSE))
        for message, ids in zip(self.messages, rendered, strict=True):
            if message.role == "user":
                self.user_span = (len(self.target_ids) + head, len(self.target_ids) + len(ids) - tail)
            self.target_ids += ids
        self.target_ids += last

    def common_prefix(self) -> int:
        """How many cached positions are still right; at least one target id is left to feed, for its hidden state."""
        limit = min(len(self.cached_ids), len(self.target_ids) - 1)
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

    def waiting_ids(self) -> Sequence[int]:
        """Ids still to be fed (call after the slot was cut to the common prefix)."""
        return self.target_ids[len(self.cached_ids) :]

    def _drop_oldest(self, rendered: list[list[int]], reserve: int) -> None:
        """Beyond `max_tokens` the oldest messages behind the system prompt go, a caller's turn with its answer at
        once."""
        first = 1 if self.messages and self.messages[0].role == "system" else 0
        while len(self.messages) > first + 1 and sum(map(len, rendered)) + reserve > self.max_tokens:
            del self.messages[first], rendered[first]
            while len(self.messages) > first + 1 and self.messages[first].role in ("assistant", "tool"):
                del self.messages[first], rendered[first]
