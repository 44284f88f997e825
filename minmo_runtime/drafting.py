"""Speculative reply: the answer is written before it is certain that the caller has finished, and spoken only then.

At a low P(user_done) the LLM answers what was heard so far. Such a draft is a `Reply` without a turn id: it may prefill
and draw text, at the lowest urgency (scheduler.py); its text is kept back, a tool it asks for is not asked for, its
voice does not begin. When the agent takes the floor and the caller's words are still the same, the draft becomes that
turn: token for token the reply that would have been made, a prefill and some decode steps earlier. Otherwise it is
thrown away and the context is as if it had never been. Knows no tensors and no clock. Walk: step 9. Source: design
§7 (speculative drafting); the cut back to the common prefix is conversation.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

from minmo_runtime.conversation import Conversation
from minmo_runtime.ear import Ear
from minmo_runtime.reply import Reply, ReplyPhase
from minmo_runtime.text import normalise_spoken


@dataclass(eq=False)
class Drafting:
    """Owned by its stream; at most one draft at a time."""

    ear: Ear
    conversation: Conversation
    probability: float  # P(user_done) above which a draft begins; 1 = never
    reply: Reply | None = None
    _raw_text: str = ""

    def consider(self, user_done: float, *, needs_query: bool) -> None:
        """The caller may have finished, and nobody speaks: begin, if there are words to answer."""
        if self.reply is not None or user_done <= self.probability:
            return
        raw = self._heard()
        text = normalise_spoken(raw)
        if not text or self.ear.is_audio_behind:
            return
        self._raw_text = raw
        self.reply = Reply("", ReplyPhase.PREFILL, is_draft=True, user_text=text, wants_query=needs_query)
        self.reply.messages_before = list(self.conversation.messages)
        self.conversation.add("user", text, self.ear.audio_so_far())
        self.conversation.retarget("assistant")

    @property
    def is_stale(self) -> bool:
        """Whether the caller has said something else since."""
        if self.reply is None or (raw := self._heard()) == self._raw_text:
            return False
        self._raw_text = raw
        return normalise_spoken(raw) != self.reply.user_text

    def discard(self) -> Reply | None:
        """The context is again what it was; the cache follows with its next prefill. Returns what was thrown away."""
        draft, self.reply = self.reply, None
        if draft is None:
            return None
        assert draft.messages_before is not None, "a draft keeps the conversation before it"
        self.conversation.messages = draft.messages_before
        self.conversation.retarget()
        return draft

    def commit(self, asked: Reply, user_text: str) -> Reply | None:
        """The draft as the turn that was asked for; None if it does not answer `user_text`."""
        draft = self.reply
        if draft is None or draft.user_text != user_text:
            return None
        self.reply = None
        draft.is_draft, draft.turn_id, draft.started_s = False, asked.turn_id, asked.started_s
        return draft

    def _heard(self) -> str:
        """The words that a reply would answer now: overlap that nobody discarded stands in front."""
        return " ".join(part for part in (self.ear.heard_so_far(True), self.ear.heard_so_far(False)) if part)
