"""What the legs have in common that come in on a line of their own and not as a SIP dialog: a browser's
(webrtc/leg.py), an exchange's AudioSocket (audiosocket/leg.py).

The states and events are those of a SIP dialog, so the agent cannot tell the difference. Everything runs on the loop of
the worker (telephony/loop_worker.py); time is an argument, but for the moment of the answer. Knows no wire.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from telephony.config import TelephonyConfig
from telephony.leg import (
    Answer,
    Hangup,
    LegCommand,
    LegDisconnected,
    LegError,
    LegEvent,
    LegIncoming,
    LegState,
    LegStateChanged,
    Reject,
)  # fmt: skip
from telephony.leg_media import LegMedia
from telephony.sip.causes import Cause, cause_of_hangup, cause_of_status
from telephony.states import check_legal


class InboundLeg(ABC):
    """One call. `sink` hears its events. A party that sends nothing for `media_timeout_s` is gone; 0 = never."""

    direction = "inbound"
    origin = ""  # in words, for refusals: "from a browser"
    can_transfer = False  # there is no REFER on these lines

    def __init__(
        self, incoming: LegIncoming, config: TelephonyConfig, sink: Callable[[Any, LegEvent], None],
        media_timeout_s: float,
    ) -> None:  # fmt: skip
        self.leg_id, self.incoming = incoming.leg_id, incoming
        self.state = LegState.INCOMING
        self.media = LegMedia(self.leg_id, config)
        self._config, self._sink, self._media_timeout_s = config, sink, media_timeout_s
        self._codec = ""
        self._since_s: float | None = None  # when the state began, as far as `on_time` has seen
        self._num_received = 0  # pieces of the party's audio
        self._num_seen, self._heard_at_s = -1, 0.0

    # ---------------------------------------------------------------- for the worker

    def carry_out(self, command: LegCommand, now_s: float) -> None:
        """A signalling command; LegError when it cannot be done."""
        check_legal(command, self.state)
        match command:
            case Answer():
                self._enter(LegState.CONNECTING)
                self._answer()
            case Reject(sip_status=sip_status, retry_after_s=retry_after_s):
                self.refuse(sip_status, retry_after_s, cause_of_status(sip_status))
            case Hangup(cause=cause):
                self.end(cause_of_hangup(cause))
            case _:
                raise LegError(f"{type(command).__name__} is not possible in a call {self.origin}")

    @abstractmethod
    def tick(self) -> None:
        """One frame of the leg's clock, while CONFIRMED."""

    @abstractmethod
    async def closed(self) -> None:
        """Everything of it has ended."""

    def refuse(self, sip_status: int, retry_after_s: int, cause: Cause) -> None:
        self._finish(cause, sip_status, "agent")

    def end(self, cause: Cause) -> None:
        by = "network" if cause in (Cause.MEDIA_TIMEOUT, Cause.NETWORK_ERROR) else "agent"
        self._finish(cause, 200 if self.state is LegState.CONFIRMED else 603, by)

    def story(self) -> list[LegEvent]:
        """What a new agent has to be told about a leg that is older than it."""
        return [self.incoming, self._state_changed()]

    def on_time(self, now_s: float) -> None:
        """Deadlines: the agent's answer, and a party that sends nothing any more."""
        self._since_s = now_s if self._since_s is None else self._since_s
        if self.state is LegState.INCOMING and now_s - self._since_s > self._config.answer_timeout_s:
            self.refuse(503, self._config.retry_after_s, Cause.OVERLOADED)
        elif self.state is LegState.CONFIRMED and self._media_timeout_s:
            if self._num_received != self._num_seen:
                self._num_seen, self._heard_at_s = self._num_received, now_s
            elif now_s - self._heard_at_s > self._media_timeout_s:
                self.end(Cause.MEDIA_TIMEOUT)

    # ------------------------------------------------------------- for the line's own

    @abstractmethod
    def _answer(self) -> None:
        """Do what makes the party hear us, then `_confirm`."""

    @abstractmethod
    def _let_go(self) -> None:
        """Leave the party's line, with whatever goodbye it has; called once."""

    def _confirm(self) -> None:
        """The party hears us from now on: what the ACK is in SIP."""
        self.media.confirmed(time.monotonic())
        self._enter(LegState.CONFIRMED)

    def _enter(self, state: LegState) -> None:
        self.state, self._since_s = state, None
        self._sink(self, self._state_changed())

    def _finish(self, cause: Cause, sip_status: int, by: str) -> None:
        if self.state is LegState.DISCONNECTED:
            return
        self._enter(LegState.DISCONNECTED)
        self._let_go()
        self._sink(self, LegDisconnected(leg_id=self.leg_id, cause=cause, sip_status=sip_status, by=by))

    def _state_changed(self) -> LegStateChanged:
        codec = self._codec if self.state is LegState.CONFIRMED else ""
        return LegStateChanged(leg_id=self.leg_id, state=self.state, sample=self.media.sample, codec=codec)
