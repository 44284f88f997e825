"""What all parts of one call share: its names, its place in time, and the one list of what follows from an event.

The order in that list is the order in which the shell carries it out. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from agent.events import CallAction, Keep


@dataclass
class CallContext:
    """Made by agent/call.py; its parts add to it."""

    call_id: str
    leg_id: str
    sample: int = 0  # the leg's clock: caller samples received
    pushed_16k: int = 0  # the same on the runtime's clock
    actions: list[CallAction] = field(default_factory=list)

    def add(self, *actions: CallAction) -> None:
        self.actions += actions

    def keep(self, method: str, **fields: Any) -> None:
        """A method of the store, with its arguments."""
        self.actions.append(Keep(method, fields))

    def journal(self, name: str, **fields: Any) -> None:
        self.keep("journal_append", name=name, **fields)

    def keep_figures(self, figures: Iterable[dict[str, Any]]) -> None:
        """Figures of agent/metrics.py."""
        self.actions += [Keep("add_metric", figure) for figure in figures]
