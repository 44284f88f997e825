"""What a media worker does about its agent: there, stalled, lost, or never seen. A state machine without a clock.

    ABSENT --connected--> PRESENT --silent for agent_stall_s--> STALLED --sign of life--> PRESENT
                          PRESENT, STALLED --connection gone--> LOST --connected--> PRESENT (calls are offered again)
                                                                LOST --agent_lost_hold_s over--> ABSENT (calls handed
                                                                off)

The worker carries out the `WatchAction`s; what they mean for a call is in `worker.py`.
"""

from __future__ import annotations

from enum import StrEnum

from telephony.config import TelephonyConfig


class AgentState(StrEnum):
    ABSENT = "absent"
    PRESENT = "present"
    STALLED = "stalled"
    LOST = "lost"


class WatchAction(StrEnum):
    NOTHING = "nothing"
    APOLOGISE_IF_SILENT = "apologise_if_silent"  # the agent may come to itself: nothing of its is dropped
    APOLOGISE = "apologise"  # what it had queued is dropped, the apology is played
    GIVE_UP = "give_up"  # REFER to the handoff, or BYE


class AgentWatch:
    """Owned by the worker's main loop."""

    def __init__(self, config: TelephonyConfig) -> None:
        self._stall_s, self._hold_s = config.agent_stall_s, config.agent_lost_hold_s
        self.state = AgentState.ABSENT
        self._since_s = 0.0  # last sign of life, or when the agent was lost

    @property
    def can_take_calls(self) -> bool:
        return self.state is AgentState.PRESENT

    def on_connected(self, now_s: float) -> None:
        self.state, self._since_s = AgentState.PRESENT, now_s

    def on_sign_of_life(self, now_s: float) -> None:
        if self.state in (AgentState.PRESENT, AgentState.STALLED):
            self.state, self._since_s = AgentState.PRESENT, now_s

    def on_lost(self, now_s: float) -> WatchAction:
        if self.state in (AgentState.ABSENT, AgentState.LOST):
            return WatchAction.NOTHING
        self.state, self._since_s = AgentState.LOST, now_s
        return WatchAction.APOLOGISE

    def on_time(self, now_s: float) -> WatchAction:
        if self.state is AgentState.PRESENT and now_s - self._since_s > self._stall_s:
            self.state = AgentState.STALLED
            return WatchAction.APOLOGISE_IF_SILENT
        if self.state is AgentState.LOST and now_s - self._since_s > self._hold_s:
            self.state = AgentState.ABSENT
            return WatchAction.GIVE_UP
        return WatchAction.NOTHING
