"""The media worker process: pjsua2 on one side, the agent's socket and rings on the other; SIP and media and nothing
else.

    python -m telephony.worker --socket DIR/media.sock [--config JSON | --config-file FILE] [--parent-pid PID]

Prints one JSON line on stdout when it takes calls: {"ready": true, "sip_address": …, "sip_port": …, "max_calls": …, …}.
SIGTERM: no new calls, wait for the last (at most drain_s), exit; a second SIGTERM, or a parent that is gone: BYE at
once and exit within 5 s. The agent's death ends no call (agent_watch.py). One loop; time enters here and is handed
down.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telephony.agent_link import AgentLink
from telephony.agent_watch import AgentWatch, WatchAction
from telephony.config import TelephonyConfig
from telephony.leg import Flush, LegDisconnected, LegError, LegEvent, LegIncoming, LegState, Play, Refer, ReferResult
from telephony.priority import run_first
from telephony.ring import LegRings
from telephony.sip.causes import Cause
from telephony.sip.endpoint import SipEndpoint, SipError
from telephony.sip.leg import SipLeg
from telephony.sip.trunk import TrunkRefused
from telephony.wire import Alive, CommandRefused, Hello, LegOpened, PlaceCall, SendDtmf, ToWorker

_TICK_MS = 10
_DEADLINES_EVERY_S = 0.25
_EXIT_WITHIN_S = 3.0
_RING_BURIAL_S = 2.0
APOLOGY_ITEM = "worker-apology"


@dataclass
class _Outlet:
    """The rings one leg shares with the present agent."""

    rings: LegRings
    wake_fd: int


class Worker:
    def __init__(self, config: TelephonyConfig, socket_path: Path, parent_pid: int) -> None:
        self.config = config
        self._apology = read_apology(config)
        self._parent_pid = parent_pid
        self._link = AgentLink(socket_path)
        self._watch = AgentWatch(config)
        self._outlets: dict[str, _Outlet] = {}
        self._buried: list[tuple[float, _Outlet]] = []
        self._given_up: set[str] = set()  # legs that no new agent gets
        self._now_s = time.monotonic()
        self._sigterms = 0
        self._drain_until_s: float | None = None
        self._stop_until_s: float | None = None
        self._endpoint = SipEndpoint(config, self._on_leg, self._admission)
        self.hello = Hello(
            sip_address=config.sip_bind, sip_port=self._endpoint.sip_port, max_calls=self._endpoint.max_calls,
            worker_pid=os.getpid(),
        )  # fmt: skip

    # --------------------------------------------------------------------- loop

    def run(self) -> None:
        """Until told to stop. Signalling is at most `_TICK_MS` late; media never waits for this loop."""
        deadlines_at_s = 0.0
        while not self._is_over():
            self._now_s = time.monotonic()
            self._endpoint.poll(self._now_s, _TICK_MS)
            self._serve_agent()
            if self._now_s >= deadlines_at_s:
                deadlines_at_s = self._now_s + _DEADLINES_EVERY_S
                self._check_deadlines()
        self._link.flush()

    def on_signal(self, number: int, _frame: Any) -> None:
        self._sigterms += number == signal.SIGTERM
        if self._drain_until_s is None:
            self._drain_until_s = time.monotonic() + self.config.drain_s
        elif self._sigterms > 1:
            self._drain_until_s = 0.0

    def _is_over(self) -> bool:
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
            self._link.send(self.hello)
            for leg in list(self._endpoint.legs.values()):
                if leg.leg_id not in self._given_up:
                    self._open(leg, is_resumed=True)
        self._link.flush()

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
            if isinstance(message, SendDtmf):
                leg.dialDtmf(message.digits)
            else:
                leg.carry_out(message, self._now_s)
        except (LegError, TrunkRefused, ValueError) as error:
            self._refuse(message, str(error))
        except SipError as error:
            self._refuse(message, error.info(False))

    def _refuse(self, message: Any, reason: str) -> None:
        print(f"worker: {type(message).__name__} {message.leg_id}: {reason}", file=sys.stderr)
        if isinstance(message, Refer):
            self._link.send(ReferResult(leg_id=message.leg_id, sip_status=400, reason=reason))
        else:
            self._link.send(CommandRefused(leg_id=message.leg_id, command=type(message).__name__, reason=reason))

    def _place_call(self, request: PlaceCall) -> None:
        if len(self._endpoint.legs) >= self._endpoint.max_calls:
            raise TrunkRefused("all calls of this worker are in use")
        if self._drain_until_s is not None:
            raise TrunkRefused("the worker is shutting down")
        self._endpoint.place_call(request)

    # ------------------------------------------------------------ legs -> agent

    def _on_leg(self, leg: SipLeg, event: LegEvent) -> None:
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

    def _open(self, leg: SipLeg, is_resumed: bool) -> None:
        """Fresh rings for the present agent."""
        self._close_outlet(leg)
        rings = LegRings.create(self.config.sample_rate_hz, self.config.max_unplayed_s)
        outlet = self._outlets[leg.leg_id] = _Outlet(rings, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        opened = LegOpened(
            leg_id=leg.leg_id, direction=leg.direction, sample_rate_hz=self.config.sample_rate_hz,
            to_agent_bytes=rings.to_agent_bytes, to_worker_bytes=rings.to_worker_bytes, is_resumed=is_resumed,
            state=leg.state, played=leg.media.played() if is_resumed else {},
        )  # fmt: skip
        self._link.send(opened, (rings.fd, outlet.wake_fd))
        if is_resumed:
            for event in leg.story():
                self._link.send(event)
        leg.media.attach(rings, outlet.wake_fd)

    def _close_outlet(self, leg: SipLeg) -> None:
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
            if action is WatchAction.APOLOGISE_IF_SILENT:
                if leg.media.is_idle:
                    self._play_apology(leg)
            elif action is WatchAction.APOLOGISE:
                self._close_outlet(leg)
                if leg.state is LegState.CONFIRMED:
                    leg.media.local_commands.append(Flush(leg_id=leg.leg_id))
                    self._play_apology(leg)
                elif leg.direction == "inbound":
                    leg.refuse(503, self.config.retry_after_s, Cause.AGENT_LOST)
                else:
                    leg.end(Cause.AGENT_LOST)
            else:
                self._give_up(leg)

    def _play_apology(self, leg: SipLeg) -> None:
        if self._apology and leg.state is LegState.CONFIRMED:
            item_id = f"{APOLOGY_ITEM}-{self._now_s:.3f}"
            leg.media.local_commands.append(Play(
                leg_id=leg.leg_id, item_id=item_id, pcm=self._apology, sample_rate_hz=self.config.sample_rate_hz,
                is_final=True,
            ))  # fmt: skip

    def _give_up(self, leg: SipLeg) -> None:
        self._given_up.add(leg.leg_id)
        if not self.config.handoff_uri or leg.state is not LegState.CONFIRMED:
            leg.end(Cause.AGENT_LOST)
            return
        try:
            leg.carry_out(Refer(leg_id=leg.leg_id, refer_to=self.config.handoff_uri), self._now_s)
        except (LegError, ValueError, SipError) as error:
            print(f"worker: handoff of {leg.leg_id} failed: {error}", file=sys.stderr)
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


def _stdout_to(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.dup2(fd, 1)
    os.close(fd)


def _close(outlet: _Outlet) -> None:
    outlet.rings.close()
    os.close(outlet.wake_fd)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="telephony.worker", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--socket", required=True, type=Path)
    parser.add_argument("--config", default="", help="settings of [telephony] as a JSON object")
    parser.add_argument("--config-file", type=Path, help="the same, in a file")
    parser.add_argument("--parent-pid", type=int, default=os.getppid())
    options = parser.parse_args(arguments)
    text = options.config_file.read_text() if options.config_file else options.config
    scheduling = run_first()
    ready_out = os.dup(1)
    _stdout_to(os.devnull)  # pjlib greets on stdout before its log level can be set
    try:
        config = TelephonyConfig(**(json.loads(text) if text else {}))
        worker = Worker(config, options.socket, options.parent_pid)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"telephony.worker: {error}")
    except SipError as error:
        print(f"telephony.worker: SIP did not start: {error.info(False)}", file=sys.stderr)
        os._exit(1)
    os.dup2(2, 1)  # from here on pjsip's errors belong to stderr; our stdout was for the ready line only
    signal.signal(signal.SIGTERM, worker.on_signal)
    signal.signal(signal.SIGINT, worker.on_signal)
    hello = worker.hello
    ready = {
        "ready": True, "sip_address": hello.sip_address, "sip_port": hello.sip_port, "max_calls": hello.max_calls,
        "pid": hello.worker_pid, "socket": str(options.socket), "scheduling": scheduling,
    }  # fmt: skip
    os.write(ready_out, (json.dumps(ready) + "\n").encode())
    worker.run()
    options.socket.unlink(missing_ok=True)
    sys.stderr.flush()
    os._exit(0)  # pjsua2's own destruction order is not to be relied on


if __name__ == "__main__":
    main()
