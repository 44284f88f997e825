"""The conversation as it was heard: what goes into the record, and what a new engine is told after a death.

Each agent turn is kept twice, as generated and as heard, with the offset at which it was cut. Pure: it returns `Keep`s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.events import Keep


@dataclass
class Row:
    turn_id: str
    role: str  # caller | agent
    text: str  # as heard
    generated: str = ""
    source: str = "voice"
    is_kept: bool = False
    is_in_context: bool = True  # a backchannel and a filler are in the record, not in the model's context


@dataclass
class Transcript:
    rows: dict[str, Row] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)  # by when it began to be heard
    _num_caller_turns: int = 0

    def skip_caller_turns(self, num_turns: int) -> None:
        """An earlier agent of this call has used so many ids."""
        self._num_caller_turns += num_turns

    # ------------------------------------------------------------------- caller

    def caller_spoke(
        self,
        text: str,
        *,
        start_sample: int,
        end_sample: int,
        confidence: float,
        source: str = "voice",
        intent: str = "",
    ) -> tuple[str, list[Keep]]:
        """A caller turn; returns its id."""
        self._num_caller_turns += 1
        turn_id = f"c{self._num_caller_turns}"
        self._add(Row(turn_id, "caller", text, source=source, is_kept=True, is_in_context=not intent))
        fields = {"heard_text": text, "start_sample": start_sample, "end_sample": end_sample}
        fields |= {"confidence": round(confidence, 4), "source": source} | ({"intent": intent} if intent else {})
        return turn_id, [Keep("append_turn", {"turn_id": turn_id, "role": "caller", **fields})]

    def caller_corrected(self, turn_id: str, text: str, *, end_sample: int, confidence: float) -> list[Keep]:
        """The caller went on (a false end), or a caption came late."""
        row = self.rows[turn_id]
        if row.text == text:
            return []
        row.text = text
        return [
            Keep(
                "update_turn",
                {"turn_id": turn_id, "heard_text": text, "end_sample": end_sample, "confidence": round(confidence, 4)},
            )
        ]

    # -------------------------------------------------------------------- agent

    def agent_writes(self, turn_id: str, text: str, *, source: str = "voice", is_in_context: bool = True) -> None:
        """Text as it is generated; nothing is kept before something of it is heard."""
        row = self.rows.get(turn_id)
        if row is None:
            row = self.rows[turn_id] = Row(turn_id, "agent", "", source=source, is_in_context=is_in_context)
        row.generated += text

    def agent_audible(self, turn_id: str, start_sample: int) -> list[Keep]:
        row = self.rows.setdefault(turn_id, Row(turn_id, "agent", ""))
        if row.is_kept:
            return []
        row.is_kept = True
        self._order.append(turn_id)
        fields = {"generated_text": row.generated, "start_sample": start_sample, "source": row.source}
        return [Keep("append_turn", {"turn_id": turn_id, "role": "agent", **fields})]

    def agent_heard(self, turn_id: str, end_sample: int) -> list[Keep]:
        """To its end: everything that was generated was heard."""
        row = self.rows[turn_id]
        row.text = row.generated
        fields = {"generated_text": row.generated, "heard_text": row.text, "end_sample": end_sample}
        return [*self.agent_audible(turn_id, end_sample), Keep("update_turn", {"turn_id": turn_id, **fields})]

    def agent_cut(
        self, turn_id: str, heard: str, generated: str, *, cut_offset_samples: int, end_sample: int
    ) -> list[Keep]:
        """`cut_offset_samples` of it were played (leg rate). A draft of which nothing was heard leaves no row."""
        row = self.rows.setdefault(turn_id, Row(turn_id, "agent", ""))
        row.generated = generated or row.generated
        if not row.is_kept:
            row.is_in_context = False
            return [
                Keep("journal_append", {"name": "draft_discarded", "turn_id": turn_id, "generated_text": row.generated})
            ]
        row.text = heard
        fields = {"generated_text": row.generated, "heard_text": heard, "cut_offset_samples": cut_offset_samples}
        fields |= {"end_sample": end_sample, "was_interrupted": True}
        return [Keep("update_turn", {"turn_id": turn_id, **fields})]

    def share_of(self, turn_id: str, share: float) -> str:
        """As many whole words of what was generated, rounded down."""
        words = self.rows[turn_id].generated.split() if turn_id in self.rows else []
        return " ".join(words[: int(len(words) * share)])

    # ------------------------------------------------------------------ context

    def history(self, without: str = "") -> tuple[tuple[str, str], ...]:
        """What a fresh stream is told: (role, text) in the runtime's words, heard text only; one turn may be left
        out.
        """
        roles = {"caller": "user", "agent": "assistant"}
        rows = [self.rows[turn_id] for turn_id in self._order if turn_id != without]
        return tuple((roles[row.role], row.text) for row in rows if row.text and row.is_in_context)

    def _add(self, row: Row) -> None:
        self.rows[row.turn_id] = row
        self._order.append(row.turn_id)
