"""What the LLM reads of the caller's open turn while the caller still speaks, on the call's context or on a fork of it.

While nobody else works on the context, the open turn grows in it. While a reply does, the turn grows on the *listening
branch*: a fork of the context, cut at the last word estimated as heard, in a cache slot of its own (design §4a). An
interruption or a false end turns the branch into the call's context as far as the two agree (prefill.py), a backchannel
drops it. What they have in common is never fed twice. Knows no tensors and no clock. Walk: step 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minmo_runtime.conversation import AudioVector, Conversation, Message


@dataclass(eq=False)
class Branch:
    """A conversation that may not have happened so. `voice`: what the caller had said before it began."""

    conversation: Conversation
    voice: tuple[AudioVector, ...] = ()
    is_over: bool = False  # decided: nothing is added, what it holds may be taken over


@dataclass(eq=False)
class Listening:
    """Owned by its stream; at most one branch at a time."""

    conversation: Conversation
    slot: int = -1  # of the branch, in the LLM's cache; -1 = none is kept
    feeds_predictor: bool = False  # whether the duplex predictor reads hidden states: then no position may wait
    branch: Branch | None = None

    @property
    def is_apart(self) -> bool:
        """Whether a branch grows."""
        return self.branch is not None and not self.branch.is_over

    @property
    def owes_reading(self) -> bool:
        """Whether the branch holds positions that the LLM has not read."""
        branch = self.branch
        return branch is not None and not branch.is_over and not branch.conversation.is_current()

    def fork(self, messages: Sequence[Message], voice: Sequence[AudioVector] = ()) -> None:
        """Begin a branch behind these messages; `voice` opens its user turn."""
        if self.slot < 0:
            return
        own = Conversation(self.conversation.tokenizer, self.conversation.max_tokens, list(messages))
        self.branch = Branch(own, tuple(voice))

    def grow(self, voice: Sequence[AudioVector]) -> None:
        """The caller has said this since the branch began."""
        if self.branch is not None and not self.branch.is_over and voice:
            self.branch.conversation.retarget("user", (*self.branch.voice, *voice))

    def decide(self) -> None:
        """The overlap is part of the call, or the reply was called off."""
        if self.branch is not None:
            self.branch.is_over = True

    def drop(self) -> None:
        self.branch = None


def heard_so_far(text: str, played_samples: float, num_samples: int) -> str:
    """The words of a reply that are estimated as heard: in proportion to the sound. "one two three four", half of it
    played -> "one two"."""
    words = text.split()
    if num_samples <= 0:
        return ""
    return " ".join(words[: int(len(words) * max(0.0, min(1.0, played_samples / num_samples)))])
