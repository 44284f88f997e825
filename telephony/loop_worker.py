"""A media worker whose calls live on its event loop: browsers (webrtc/worker.py), AudioSocket (audiosocket/worker.py).

One clock for all its legs. It ticks every frame by the monotonic time; a loop that was late makes up for it, so that a
leg's samples stay true to real time. What a worker does between calls and agent is telephony/media_worker.py. Knows no
wire: whoever derives from `LoopEndpoint` brings legs in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from telephony.config import TelephonyConfig
from telephony.holdings import told
from telephony.inbound_leg import InboundLeg
from telephony.leg import LegState, LegStateChanged
from telephony.media_worker import Admission, CannotDo, MediaWorker, Sink
from telephony.sip.causes import Cause
from telephony.wire import PlaceCall, SecurityEvent

_STEP_S = 0.01
_GOODBYE_S = 1.0
_MAX_TICKS_AT_ONCE = 10  # 200 ms; what is beyond was lost anyway


class LoopEndpoint:
    """Implements `media_worker.Endpoint`. `sink` hears every leg; `admission` is asked for every new one."""

    sip_port = 0  # cannot be called: `agent_process` reads it so

    def __init__(self, config: TelephonyConfig, max_calls: int, sink: Sink, admission: Admission) -> None:
        self.config, self.max_calls = config, max_calls
        self.legs: dict[str, InboundLeg] = {}
        self._sink, self._admission = sink, admission
        self._closing: set[asyncio.Task[None]] = set()
        self.num_late_ticks = 0

    def take(self, leg: InboundLeg) -> None:
        """A call that rings."""
        self.legs[leg.leg_id] = leg
        self._sink(leg, leg.incoming)
        self._sink(leg, LegStateChanged(leg_id=leg.leg_id, state=LegState.INCOMING))

    def place_call(self, request: PlaceCall) -> InboundLeg:
        raise CannotDo("nobody can be called on this line")

    def join(self, leg: InboundLeg, other: InboundLeg | None) -> None:
        raise CannotDo("calls of this line cannot be joined with another")

    def forget(self, leg: InboundLeg) -> None:
        """The agent has been told of the end."""
        if self.legs.pop(leg.leg_id, None) is not None:
            task = asyncio.get_running_loop().create_task(leg.closed(), name=f"leg-{leg.leg_id}/closed")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def check_deadlines(self, now_s: float) -> None:
        for leg in list(self.legs.values()):
            leg.on_time(now_s)

    def end_all(self, cause: Cause) -> None:
        for leg in list(self.legs.values()):
            leg.end(cause)

    def reason_of(self, error: Exception) -> str | None:
        return None

    async def closed(self) -> None:
        """Every call that ended has said its goodbye."""
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def run_clock(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        period_s = self.config.ptime_ms / 1000
        due_s = loop.time() + period_s
        while True:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            num_due = 1 + int((loop.time() - due_s) / period_s)
            due_s += num_due * period_s
            self.num_late_ticks += num_due - 1
            for _ in range(min(num_due, _MAX_TICKS_AT_ONCE)):
                self._tick()

    def _tick(self) -> None:
        for leg in list(self.legs.values()):
            if leg.state is LegState.CONFIRMED:
                try:
                    leg.tick()
                except Exception:  # noqa: BLE001 - one call's trouble must not stop the others' clock
                    traceback.print_exc(file=sys.stderr)
                    leg.end(Cause.NETWORK_ERROR)


Calls = TypeVar("Calls", bound=LoopEndpoint)


class LoopWorker(MediaWorker, Generic[Calls]):
    """`make_endpoint(sink, admission)` is called once, on the loop that runs the worker; `calls` is what it made."""

    def __init__(
        self, config: TelephonyConfig, socket_path: Path, parent_pid: int,
        make_endpoint: Callable[[Sink, Admission], Calls],
    ) -> None:  # fmt: skip
        def make(sink: Sink, admission: Admission) -> Calls:
            self.calls = make_endpoint(sink, admission)
            return self.calls

        super().__init__(config, socket_path, parent_pid, make)

    def tell(self, event: SecurityEvent) -> None:
        """To the agent, and one line for the operator's log."""
        print(f"worker: {event}", file=sys.stderr)
        self._link.send(event)

    def counts(self) -> dict[str, int]:
        """What is held for calls, for whoever looks for a leak."""
        return super().counts() | {"tasks": len(asyncio.all_tasks())}

    async def run(self, servers: Sequence[asyncio.Server], scheduling: str) -> None:
        """Until told to stop. `servers`: where calls come in; they are closed at the end. Says that it is ready."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        signal.signal(signal.SIGUSR1, lambda _number, _frame: print(told(self.counts()), flush=True))
        clock = asyncio.create_task(self.calls.run_clock(), name="worker/clock")
        ready = {"ready": True, "max_calls": self.calls.max_calls, "pid": os.getpid(), "scheduling": scheduling}
        print(json.dumps(ready), flush=True)
        loop = asyncio.get_running_loop()
        try:
            while not self.is_over:
                self.step(loop.time())
                await asyncio.sleep(_STEP_S)
        finally:
            self.finish()
            clock.cancel()
            for server in servers:
                server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.calls.closed(), _GOODBYE_S)
