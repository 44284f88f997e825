"""The media workers that the agent process is connected to now: who takes another call, who holds this leg.

Filled by agent/agent_process.py; read by whoever places a call (agent/outbound.py, agent/consultation.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from telephony.client import WorkerClient


@dataclass
class Workers:
    clients: list[WorkerClient] = field(default_factory=list)  # of SIP workers; nobody else can be called

    def add(self, client: WorkerClient) -> None:
        self.clients.append(client)

    def remove(self, client: WorkerClient) -> None:
        self.clients.remove(client)

    def with_room(self) -> WorkerClient | None:
        """The one with the most free places. It may still refuse: it counts joined parties too, we do not."""
        free = [client for client in self.clients if client.num_free > 0]
        return max(free, key=lambda client: client.num_free, default=None)

    def of_leg(self, leg_id: str) -> WorkerClient | None:
        """None for a leg that is no SIP call, and for one that is over."""
        return next((client for client in self.clients if client.has_leg(leg_id)), None)
