"""What every media worker does between its calls and its agent, whatever carries the calls: SIP (worker.py), WebRTC
(webrtc/worker.py) or AudioSocket (audiosocket/worker.py).

Offers each call to the agent with rings of its own, carries out the agent's commands, refuses what cannot be done, and
keeps calls whose agent is stalled or lost (agent_watch.py). Knows the calls only through `Endpoint` and `EndpointLeg`.
Whoever runs it calls `step(now_s)` every 10 ms or so; media never waits for that. Time is an argument, but for signals.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from telephony.agent_link import AgentLink
from telephony.agent_watch import AgentWatch, WatchAction
from telephony.config import TelephonyConfig
from telephony.leg import (
    Flush,
    LegCommand,
    LegDisconnected,
    LegError,
    LegEvent,
    LegIncoming,
    LegState,
    Play,
    Refer,
    ReferResult,
)  # fmt: skip
from telephony.leg_media import LegMedia
from telephony.ring import LegRings
from telephony.sip.causes import Cause
from telephony.wire import Alive, CommandRefused, Hello, JoinLegs, LegOpened, PlaceCall, ToWorker

_DEADLINES_EVERY_S = 0.25
_EXIT_WITHIN_S = 3.0
_RING_BURIAL_S = 2.0
APOLOGY_ITEM = "worker-apology"


class CannotDo(Exception):
    """A command that configuration or this kind of endpoint does not allow; nothing was sent."""


class EndpointLeg(Protocol):
    """One call as the worker sees it."""

    leg_id: str
    direction: str
    can_transfer: bool
    state: LegState
    media: LegMedia

    def carry_out(self, command: LegCommand, now_s: float) -> None: ...

    def refuse(self, sip_status: int, retry_after_s: int, cause: Cause) -> None: ...

    def end(self, cause: Cause) -> None: ...

    def story(self) -> list[LegEvent]: ...


Sink = Callable[[Any, LegEvent], None]
Admission = Callable[[], int]
"""0 = another call may enter, else the SIP status to refuse it with."""


class Endpoint(Protocol):
    """Whatever carries calls: it tells the worker's sink of every leg and asks its admission for every new one."""

    sip_port: int
    max_calls: int

    @property
    def legs(self) -> dict[str, Any]: ...

    def place_call(self, request: PlaceCall) -> Any: ...

    def join(self, leg: Any, other: Any) -> None: ...

    def forget(self, leg: Any) -> None: ...

    def check_deadlines(self, now_s: float) -> None: ...

    def end_all(self, cause: Cause) -> None: ...

    def reason_of(self, error: Exception) -> str | None:
        """Why a command failed, when the error is the endpoint's own; None: it is nobody's, let it rise."""


@dataclass
class _Outlet:
    """The rings one leg shares with the present agent."""

    rings: LegRings
    wake_fd: int


class MediaWorker:
    """One agent's link and the calls of one endpoint. `make_endpoint(sink, admission)` is called once."""

    def __init__(
        self, config: TelephonyConfig, socket_path: Path, parent_pid: int,
        make_endpoint: Callable[[Sink, Admission], Endpoint],
    ) -> None:  # fmt: skip
        self.config = config
        self._apology = read_apology(config)
        self._parent_pid = parent_pid
        self._link = AgentLink(socket_path)
        self._watch = AgentWatch(config)
        self._outlets: dict[str, _Outlet] = {}
        self._buried: list[tuple[float, _Outlet]] = []
        self._given_up: set[str] = set()  # legs that no new agent gets
        self._now_s = time.monotonic()
        self._deadlines_at_s = 0.0
        self._sigterms = 0
        self._drain_until_s: float | None = None
        self._stop_until_s: float | None = None
        self._endpoint = make_endpoint(self._on_leg, self._admission)
        self.hello = Hello(
            sip_address=config.sip_bind, sip_port=self._endpoint.sip_port, max_calls=self._endpoint.max_calls,
            worker_pid=os.getpid(),
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """What is held for calls, for whoever looks for a leak."""
        return {"legs": len(self._endpoint.legs), "rings": len(self._outlets) + len(self._buried)}

    # --------------------------------------------------------------------- time

    def step(self, now_s: float) -> None:
        """One turn: what the agent asked for, and deadlines."""
        self._now_s = now_s
        self._serve_agent()
        if now_s >= self._deadlines_at_s:
            self._deadlines_at_s = now_s + _DEADLINES_EVERY_S
            self._check_deadlines()

    def finish(self) -> None:
        """Send what is left to say."""
        self._link.flush()

    def on_signal(self, number: int, _frame: Any) -> None:
        self._sigterms += number == signal.SIGTERM
        if self._drain_until_s is None:
            self._drain_until_s = time.monotonic() + self.config.drain_s
        elif self._sigterms > 1:
            self._drain_until_s = 0.0

    @property
    def is_over(self) -> bool:
        """Told to stop, and no call is left (or its time is over)."""
        if self._stop_until_s is not None:
            return not self._endpoint.legs or self._now_s > self._stop_until_s
        return self._drain_until_s is not None and not self._endpoint.legs

    def _check_deadlines(self) -> None:
        self._endpoint.check_deadlines(self._now_s)
        self._act(self._watch.on_time(self._now_s))
        is_orphan = os.getppid() != self._parent_pid
        is_drained = self._drain_until_s is not None and self._now_s > self._drain_until_s
        if (is_orphan or is_drained) and self._stop_until_s is None:
            self._stop_until_s = self._now_s + _EXIT_WITHIN_S
            self._endpoint.end_all(Cause.SHUTDOWN)
        while self._buried and self._buried[0][0] < self._now_s:
            _close(self._buried.pop(0)[1])

    def _admission(self) -> int:
        is_full = len(self._endpoint.legs) >= self._endpoint.max_calls
        is_closing = self._drain_until_s is not None or self._stop_until_s is not None
        return 503 if is_full or is_closing or not self._watch.can_take_calls else 0

    # ------------------------------------------------------------ agent -> legs

    def _serve_agent(self) -> None:
        messages, is_connected = self._link.receive()
        if messages:
            self._watch.on_sign_of_life(self._now_s)
        for message in messages:
            self._carry_out(message)
        if not is_connected:
            self._act(self._watch.on_lost(self._now_s))
        if self._link.accept():
            self._watch.on_connected(self._now_s)
            self.greet()
            for leg in list(self._endpoint.legs.values()):
                if leg.leg_id not in self._given_up:
                    self._open(leg, is_resumed=True)
        self._link.flush()

    def greet(self) -> None:
        """First words to a new agent."""
        self._link.send(self.hello)

    def _carry_out(self, message: ToWorker) -> None:
        if isinstance(message, Alive):
            return
        try:
            if isinstance(message, PlaceCall):
                self._place_call(message)
                return
            leg = self._endpoint.legs.get(message.leg_id)
            if leg is None:
                return  # it ended while the command was on its way; the agent will read so
            if isinstance(message, JoinLegs):
                self._endpoint.join(leg, self._endpoint.legs.get(message.other_leg_id))
            else:
                leg.carry_out(message, self._now_s)
        except (LegError, CannotDo, ValueError) as error:
            self._refuse(message, str(error))
        except Exception as error:
            reason = self._endpoint.reason_of(error)
            if reason is None:
                raise
            self._refuse(message, reason)

    def _refuse(self, message: Any, reason: str) -> None:
        print(f"worker: {type(message).__name__} {message.leg_id}: {reason}", file=sys.stderr)
        if isinstance(message, Refer | JoinLegs):
            self._link.send(ReferResult(leg_id=message.leg_id, sip_status=400, reason=reason))
        else:
            self._link.send(CommandRefused(leg_id=message.leg_id, command=type(message).__name__, reason=reason))

    def _place_call(self, request: PlaceCall) -> None:
        if len(self._endpoint.legs) >= self._endpoint.max_calls:
            raise CannotDo("all calls of this worker are in use")
        if self._drain_until_s is not None:
            raise CannotDo("the worker is shutting down")
        self._endpoint.place_call(request)

    # ------------------------------------------------------------ legs -> agent

    def _on_leg(self, leg: EndpointLeg, event: LegEvent) -> None:
        if leg.leg_id in self._given_up and isinstance(event, ReferResult):
            leg.end(Cause.TRANSFERRED if event.sip_status < 300 else Cause.AGENT_LOST)
        if isinstance(event, LegIncoming) or (leg.direction == "outbound" and leg.leg_id not in self._outlets):
            if leg.leg_id not in self._given_up and self._link.is_connected:
                self._open(leg, is_resumed=False)
        if isinstance(event, LegDisconnected):
            for progress in leg.media.final_progress():
                self._link.send(progress)
        self._link.send(event)
        if isinstance(event, LegDisconnected):
            self._close_outlet(leg)
            self._given_up.discard(leg.leg_id)
            self._endpoint.forget(leg)

    def _open(self, leg: EndpointLeg, is_resumed: bool) -> None:
        """Fresh rings for the present agent."""
        self._close_outlet(leg)
        rings = LegRings.create(self.config.sample_rate_hz, self.config.max_unplayed_s)
        outlet = self._outlets[leg.leg_id] = _Outlet(rings, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        opened = LegOpened(
            leg_id=leg.leg_id, direction=leg.direction, sample_rate_hz=self.config.sample_rate_hz,
            to_agent_bytes=rings.to_agent_bytes, to_worker_bytes=rings.to_worker_bytes, is_resumed=is_resumed,
            state=leg.state, played=leg.media.played() if is_resumed else {}, can_transfer=leg.can_transfer,
        )  # fmt: skip
        self._link.send(opened, (rings.fd, outlet.wake_fd))
        if is_resumed:
            for event in leg.story():
                self._link.send(event)
        leg.media.attach(rings, outlet.wake_fd)

    def _close_outlet(self, leg: EndpointLeg) -> None:
        leg.media.attach(None)
        outlet = self._outlets.pop(leg.leg_id, None)
        if outlet is not None:  # the clock thread may be using it this very moment
            self._buried.append((self._now_s + _RING_BURIAL_S, outlet))

    # --------------------------------------------------- an agent that is not there

    def _act(self, action: WatchAction) -> None:
        if action is WatchAction.NOTHING:
            return
        if self._endpoint.legs:
            print(f"worker: agent {self._watch.state}: {action} ({len(self._endpoint.legs)} legs)", file=sys.stderr)
        for leg in list(self._endpoint.legs.values()):
            try:
                self._act_on(leg, action)
            except Exception as error:
                reason = self._endpoint.reason_of(error)
                if reason is None:
                    raise
                print(f"worker: {action} of {leg.leg_id}: {reason}", file=sys.stderr)  # the others get theirs

    def _act_on(self, leg: EndpointLeg, action: WatchAction) -> None:
        if action is WatchAction.APOLOGISE_IF_SILENT:
            if leg.media.is_idle:
                self._play_apology(leg)
        elif action is WatchAction.GIVE_UP:
            self._give_up(leg)
        else:
            self._close_outlet(leg)
            if leg.state is LegState.CONFIRMED:
                leg.media.local_commands.append(Flush(leg_id=leg.leg_id))
                self._play_apology(leg)
            elif leg.direction == "inbound":
                leg.refuse(503, self.config.retry_after_s, Cause.AGENT_LOST)
            else:
                leg.end(Cause.AGENT_LOST)

    def _play_apology(self, leg: EndpointLeg) -> None:
        if self._apology and leg.state is LegState.CONFIRMED:
            item_id = f"{APOLOGY_ITEM}-{self._now_s:.3f}"
            leg.media.local_commands.append(Play(
                leg_id=leg.leg_id, item_id=item_id, pcm=self._apology, sample_rate_hz=self.config.sample_rate_hz,
                is_final=True,
            ))  # fmt: skip

    def _give_up(self, leg: EndpointLeg) -> None:
        self._given_up.add(leg.leg_id)
        if not self.config.handoff_uri or leg.state is not LegState.CONFIRMED:
            leg.end(Cause.AGENT_LOST)
            return
        try:
            leg.carry_out(Refer(leg_id=leg.leg_id, refer_to=self.config.handoff_uri), self._now_s)
        except Exception as error:
            known = isinstance(error, LegError | CannotDo | ValueError)
            reason = str(error) if known else self._endpoint.reason_of(error)
            if reason is None:
                raise
            print(f"worker: handoff of {leg.leg_id} failed: {reason}", file=sys.stderr)
            leg.end(Cause.AGENT_LOST)


def read_apology(config: TelephonyConfig) -> bytes:
    """The prepared apology at the leg's rate; ValueError when the file is not 16-bit mono."""
    if not config.apology_wav:
        return b""
    with wave.open(config.apology_wav, "rb") as file:
        if file.getsampwidth() != 2 or file.getnchannels() != 1:
            raise ValueError(f"telephony.apology_wav = {config.apology_wav!r}: must be 16-bit mono")
        pcm, rate = file.readframes(file.getnframes()), file.getframerate()
    if rate == config.sample_rate_hz:
        return pcm
    from telephony.resample import StreamResampler  # loads FFmpeg's libraries, which the worker otherwise does without

    resampler = StreamResampler(rate, config.sample_rate_hz)
    return resampler.push(pcm) + resampler.finish()


def _close(outlet: _Outlet) -> None:
    outlet.rings.close()
    os.close(outlet.wake_fd)
