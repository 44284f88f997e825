"""Who answered the calls that were placed, and how long it took to find out: a histogram over all kept calls.

Read from the journal (`answered_by`, written by agent/callee_side.py): the first verdict of a call is the decision
whose time counts; what the call was in the end is counted beside it.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from storage import tables

ENTRY = "answered_by"
BINS_MS = (500, 1000, 1500, 2000, 3000, 4000, 6000, 10_000)  # upper ends; what is slower is in a bin without one


def answer_histogram(engine: Engine, *, since: dt.datetime | None = None) -> list[dict[str, Any]]:
    """One row a class: `num_first` and `num_final` calls, `p50_ms` and `p95_ms` of the first decisions (None without
    one), `bins` [{up_to_ms, n}]."""
    first, final = _verdicts(engine, since)
    rows = []
    for kind in sorted({kind for kind, _ in first} | set(final)):
        times = sorted(time for found, time in first if found == kind and time is not None)
        rows.append({
            "kind": kind, "num_first": sum(found == kind for found, _ in first), "num_final": final[kind],
            "p50_ms": _percentile(times, 0.5), "p95_ms": _percentile(times, 0.95), "bins": _binned(times),
        })  # fmt: skip
    return rows


def _verdicts(engine: Engine, since: dt.datetime | None) -> tuple[list[tuple[str, float | None]], Counter[str]]:
    """(class, decision time) of each call's first verdict; how many calls ended as which class."""
    j = tables.journal.c
    query = sa.select(j.call_id, j.payload).where(j.kind == ENTRY).order_by(j.call_id, j.seq)
    if since is not None:
        query = query.where(j.at >= since)
    first: dict[str, tuple[str, float | None]] = {}
    last: dict[str, str] = {}
    with engine.connect() as connection:
        for call_id, payload in connection.execute(query):
            first.setdefault(call_id, (payload["kind"], payload["decision_ms"]))
            last[call_id] = payload["kind"]
    return list(first.values()), Counter(last.values())


def _percentile(ordered: list[float], share: float) -> float | None:
    """Nearest rank."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def _binned(times: list[float]) -> list[dict[str, Any]]:
    bounds = [0.0, *map(float, BINS_MS), float("inf")]
    return [
        {"up_to_ms": high if high < float("inf") else None, "n": sum(low < time <= high for time in times)}
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
