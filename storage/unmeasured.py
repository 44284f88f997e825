"""Answers without a latency: turns of the agent that should have a `voice_to_voice_ms` and have none.

One is owed where a caller was heard speaking and the agent's next words, fillers aside, began after that: the same rule
by which the wire is measured (agent/metrics.py). Greetings, questions into a silence, answers to keys and words spoken
at once with the caller owe none. A figure that is missing for a whole class of turns makes every percentile a lie, so
it is counted and shown.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from storage.search import CallReader
from storage.tables import calls, row_as_dict, turn_metrics, turns

_BATCH = 200
_MAX_KNOWN = 100_000


def unmeasured(call_turns: Sequence[Mapping[str, Any]], measured: Iterable[str]) -> list[str]:
    """Ids of the turns that owe a latency and have none. `call_turns`: of one call, in order."""
    has_latency = set(measured)
    owed_since: int | None = None  # where the caller fell silent
    found = []
    for turn in call_turns:
        if turn["role"] == "caller":
            is_spoken = turn["source"] == "voice" and bool(turn["heard_text"])
            owed_since = turn["end_sample"] if is_spoken else None
        elif turn["role"] == "agent" and turn["heard_text"] and not turn["turn_id"].startswith("f"):
            is_after = owed_since is not None and (turn["start_sample"] or 0) >= owed_since
            if is_after and turn["turn_id"] not in has_latency:
                found.append(turn["turn_id"])
            owed_since = None
    return found


class UnmeasuredCount:
    """Counts them over many calls; what it has found in a closed call it need not read again."""

    def __init__(self, reader: CallReader) -> None:
        self._engine = reader.engine
        self._known: dict[str, int] = {}

    def of_call(self, call_id: str) -> int:
        """Turns of one closed call."""
        self._read([call_id])
        return self._known[call_id]

    def since(self, at: dt.datetime) -> tuple[int, int]:
        """(calls, turns) among the calls that ended since then."""
        query = sa.select(calls.c.call_id).where(calls.c.state == "closed", calls.c.ended_at >= at)
        with self._engine.connect() as connection:
            wanted = list(connection.execute(query).scalars())
        if len(self._known) > _MAX_KNOWN:
            self._known.clear()
        self._read(wanted)
        counts = [self._known[call_id] for call_id in wanted]
        return sum(count > 0 for count in counts), sum(counts)

    def _read(self, wanted: Sequence[str]) -> None:
        new = [call_id for call_id in wanted if call_id not in self._known]
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            self._known.update({call_id: len(found) for call_id, found in self._found(batch).items()})

    def _found(self, batch: list[str]) -> dict[str, list[str]]:
        m = turn_metrics.c
        of_turns = sa.select(turns).where(turns.c.call_id.in_(batch)).order_by(turns.c.call_id, turns.c.position)
        of_metrics = sa.select(m.call_id, m.turn_id).where(m.call_id.in_(batch), m.name == "voice_to_voice_ms")
        by_call: dict[str, list[dict[str, Any]]] = {call_id: [] for call_id in batch}
        measured: dict[str, list[str]] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(of_turns):
                by_call[row.call_id].append(row_as_dict(row))
            for row in connection.execute(of_metrics):
                measured.setdefault(row.call_id, []).append(row.turn_id)
        return {call_id: unmeasured(found, measured.get(call_id, ())) for call_id, found in by_call.items()}
