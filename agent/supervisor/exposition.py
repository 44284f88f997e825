"""Figures for Prometheus, in its text exposition format, by its own client library (design §6).

What happened is read from the journal, a row once: counters and histograms begin at zero with the page's process, as
Prometheus expects of any process, and a scrape costs what is new since the last one. What is now (open calls, who is
up) is asked at the scrape. Latencies are the ones measured on the wire, in seconds, by campaign.
"""

from __future__ import annotations

import threading

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from agent.readiness import Readiness
from storage.search import CallReader
from storage.security import SecurityTail
from storage.unmeasured import UnmeasuredCount

__all__ = ["CONTENT_TYPE", "Exposition"]

# The limits of design §7 are among them: 160, 350, 400, 500, 600, 750, 800 ms, 1 s, 1.2 s.
BUCKETS_S = (0.05, 0.1, 0.16, 0.25, 0.35, 0.4, 0.5, 0.6, 0.75, 0.8, 1.0, 1.2, 1.6, 2.4, 5.0)
LATENCIES = {
    "voice_to_voice_ms": "End of the caller's speech to the first sound of the answer",
    "first_word_ms": "ACK to the agent's first sound",
    "duck_ms": "Onset of the caller to the agent 12 dB quieter",
    "stop_ms": "Onset of the caller to the agent's last sound, where the turn was cut",
}
_ROWS = 2_000


class Exposition:
    """One per page process. `text` may be called from several threads."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader
        self._unmeasured = UnmeasuredCount(reader)
        self._security = SecurityTail(reader.engine)
        self._after_id = reader.last_journal_id()
        self._scraping = threading.Lock()
        self._registry = registry = CollectorRegistry()
        self._ended = Counter("minmo_calls", "Calls that ended", ["campaign", "disposition"], registry=registry)
        self._open = Gauge("minmo_calls_open", "Calls that run now", ["campaign"], registry=registry)
        self._latency = {
            name: Histogram(
                f"minmo_{name.removesuffix('_ms')}_seconds", help_, ["campaign"], buckets=BUCKETS_S, registry=registry
            )
            for name, help_ in LATENCIES.items()
        }
        self._without = Counter(
            "minmo_turns_unmeasured", "Answers without a latency, in calls that ended", ["campaign"], registry=registry
        )
        self._tried = Counter(
            "minmo_security_events", "What strangers and broken peers tried", ["kind"], registry=registry
        )
        self._ready = Gauge("minmo_ready", "1 while a call would be taken", registry=registry)
        self._role_up = Gauge("minmo_role_up", "1 while this role answers", ["role"], registry=registry)
        self._lag = Gauge("minmo_agent_loop_lag_seconds", "Worst of the last minute", registry=registry)
        self._stalls = Gauge("minmo_agent_loop_stalls", "Since the agent started", registry=registry)
        self._places = Gauge("minmo_agent_max_calls", "Calls that the engine has memory for", registry=registry)

    def text(self, readiness: Readiness | None) -> bytes:
        with self._scraping:
            self._count_what_happened()
            for kind, count in self._security.new().items():
                self._tried.labels(kind).inc(count)
            self._open.clear()
            for campaign, count in self._reader.num_open_by_campaign().items():
                self._open.labels(campaign).set(count)
            self._tell_roles(readiness)
            return generate_latest(self._registry)

    def _count_what_happened(self) -> None:
        while rows := self._reader.tail_figures(after_id=self._after_id, limit=_ROWS):
            for row in rows:
                campaign, payload = row["campaign"], row["payload"]
                if row["kind"] == "call_closed":
                    self._ended.labels(campaign, payload["disposition"]).inc()
                    self._without.labels(campaign).inc(self._unmeasured.of_call(row["call_id"]))
                elif (histogram := self._latency.get(payload["name"])) is not None:
                    histogram.labels(campaign).observe(payload["value"] / 1_000)
            self._after_id = rows[-1]["id"]

    def _tell_roles(self, readiness: Readiness | None) -> None:
        self._role_up.clear()
        self._ready.set(readiness is not None and readiness.is_ready)
        for role in readiness.roles if readiness is not None else ():
            self._role_up.labels(role.role).set(role.is_up)
        status = readiness.status if readiness is not None else None
        if status is not None:  # else the last that it said stands, beside minmo_role_up 0
            self._lag.set(status.worst_lag_ms / 1_000)
            self._stalls.set(status.num_stalls)
            self._places.set(status.max_calls)
