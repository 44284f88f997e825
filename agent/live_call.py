"""The shell of one call: the only place where a call meets clocks, sockets and threads.

One inbox, one loop: events of the leg, of the runtime and of the clock go into `Call.step`, its actions are carried
out in order. One task group per call; ending the call ends every task of it. Decides nothing: agent/call.py does.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

from agent.call import Call
from agent.consultation import HandOffDesk
from agent.engine_link import EngineLink
from agent.events import (
    CallAction,
    CallEvent,
    CallPerson,
    CommitTool,
    EndCall,
    Keep,
    PersonRinging,
    RecordingWanted,
    ReopenRuntime,
    Resumed,
    RuntimeLost,
    RuntimeReady,
    RunTool,
    ShutDown,
    Start,
    Tick,
)
from agent.tools.shop import Shop
from minmo_runtime import api
from storage.calls import CallStore, StorageError
from telephony import leg as tel

log = logging.getLogger(__name__)
TICK_S = 0.05
START = Start()
MAX_INBOX = 2_000  # about 20 s of frames; a loop that is so far behind drops nothing, its producers wait
ALIVE_AFTER_END_S = 5.0  # for the last writes


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class LiveCall:
    """`await LiveCall(...).run()` lasts as long as the call."""

    def __init__(
        self, call: Call, leg: tel.Leg, engines: EngineLink, store: CallStore, writer: Executor, shop: Shop,
        clock: Callable[[], dt.datetime] = utc_now, hand_off: HandOffDesk | None = None,
    ) -> None:  # fmt: skip
        """`writer` runs the store's methods, one after another, off the loop (each may wait for the disk). `hand_off`:
        calls a person for a warm hand-off."""
        self.call, self.leg, self.engines, self.store = call, leg, engines, store
        self._writer, self._shop, self._clock = writer, shop, clock
        self._inbox: asyncio.Queue[CallEvent] = asyncio.Queue(MAX_INBOX)
        self._runtime: api.Runtime | None = None
        self._group: asyncio.TaskGroup | None = None
        self._hand_off = hand_off
        self._handoff_id = ""  # of the person who is being called now
        self._name = f"call-{call.call_id}"

    async def run(self, first: Start | Resumed = START) -> None:
        """`first`: a new call, or one that was up already."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as self._group:
                helpers = [self._spawn("leg", self._read_leg()), self._spawn("clock", self._tick())]
                await self._inbox.put(first)
                is_over = False
                while not is_over:
                    event = await self._inbox.get()
                    for action in self.call.step(event, loop.time()):
                        is_over = isinstance(action, EndCall) or is_over
                        await self._carry_out(action)
                for task in helpers:
                    task.cancel()
                raise _CallOver
        except* _CallOver:
            pass
        finally:
            await self._close_stream()
            await self._drain()

    @property
    def sample_rate_hz(self) -> int:
        return self.call.setup.sample_rate_hz

    def hang_up(self, cause: str) -> None:
        """From outside, at once."""
        self.post(ShutDown(cause))

    def keep_recording(self, is_kept: bool, by: str) -> None:
        """From outside: sound is kept from now on, or not."""
        self.post(RecordingWanted(is_kept, by))

    def post(self, event: CallEvent) -> None:
        """From outside: shut down, pause the recording. Dropped when the call is over."""
        if not self._inbox.full():
            self._inbox.put_nowait(event)

    # ------------------------------------------------------------------ carrying out

    async def _carry_out(self, action: CallAction) -> None:
        match action:
            case Keep():
                if action.method == "close_call":
                    self._note_handoff("abandoned", "the caller hung up", "")
                self._keep(action)
            case RunTool():
                self._spawn("tool", self._run_tool(action))
            case CommitTool():
                self._spawn("tool", self._commit_tool(action))
            case ReopenRuntime():
                self._runtime = None
                self._spawn("engine", self._find_engine())
            case CallPerson(target=target):
                self._spawn("person", self._call_person(target))
            case EndCall():
                pass
            case api.OpenStream():
                self._spawn("engine", self._open_stream(action))
            case _ if isinstance(action, api.Message):
                await self._ask(action)
            case _:
                await self._command(action)

    async def _command(self, command: tel.LegCommand) -> None:
        try:
            await self.leg.send(command)
        except tel.LegError as error:  # e.g. the caller has hung up a moment ago
            log.warning("call %s: %s", self.call.call_id, error)

    async def _ask(self, request: api.RuntimeRequest) -> None:
        if self._runtime is None:
            return
        try:
            await self._runtime.send(request)
        except api.StreamLost as error:
            self._runtime = None
            if not isinstance(request, api.CloseStream):
                self.post(RuntimeLost(str(error)))

    def _keep(self, keep: Keep) -> None:
        self._write(
            lambda now: getattr(self.store, keep.method)(self.call.call_id, **keep.arguments, now=now), keep.method
        )

    def _write(self, write: Callable[[dt.datetime], Any], what: str) -> None:
        now = self._clock()

        def guarded() -> None:
            try:
                write(now)
            except StorageError as error:
                log.error("call %s: %s is not kept: %s", self.call.call_id, what, error)
            except Exception:
                log.exception("call %s: %s is not kept", self.call.call_id, what)

        self._writer.submit(guarded)

    # ------------------------------------------------------------------------- tools

    async def _run_tool(self, asked: RunTool) -> None:
        done = await asyncio.get_running_loop().run_in_executor(None, self._shop.check, asked)
        await self._inbox.put(done)

    async def _commit_tool(self, heard: CommitTool) -> None:
        # On the writer's thread: it must come after everything that was kept before it.
        now = self._clock()
        state, result = await asyncio.get_running_loop().run_in_executor(self._writer, self._shop.commit, heard, now)
        self._keep(self.call.desk.committed(heard, state, result))

    # --------------------------------------------------------------- a person to take over

    async def _call_person(self, target: str) -> None:
        """Cancelled with the call: then nobody is called any more."""
        if self._hand_off is None:
            await self._inbox.put(tel.ReferResult(leg_id=self.leg.leg_id, sip_status=501, reason="no hand-off here"))
            return
        self._handoff_id = f"h{uuid.uuid4().hex[:8]}"

        def note(state: str, reason: str, summary: str) -> None:
            self._note_handoff(state, reason, summary, target)

        result = await self._hand_off.call_person(
            self.call.setup, self.leg, target, note, lambda: self.post(PersonRinging())
        )
        if result is not None:
            await self._inbox.put(result)

    def _note_handoff(self, state: str, reason: str, summary: str, target: str = "") -> None:
        """Nothing when nobody is being called."""
        if not self._handoff_id:
            return
        fields = {"handoff_id": self._handoff_id, "state": state, "reason": reason}
        self._keep(Keep("record_handoff", fields | {"target": target, "summary": summary}))
        if state not in ("calling", "answered"):
            self._handoff_id = ""

    # ----------------------------------------------------------------------- sources

    async def _read_leg(self) -> None:
        async for event in self.leg.events():
            await self._inbox.put(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self._inbox.put(Tick())

    async def _open_stream(self, request: api.OpenStream) -> None:
        """Room in the engine is there as long as as many calls are let in as it holds streams."""
        try:
            runtime = await self.engines.runtime()
            await runtime.send(request)
        except api.StreamLost as error:
            log.warning("call %s: %s", self.call.call_id, error)
            await self._find_engine()
            return
        except api.RuntimeOverloaded as error:
            log.error("call %s: %s", self.call.call_id, error)
            await self._command(tel.Reject(leg_id=self.call.leg_id, sip_status=503, retry_after_s=5))
            return
        self._runtime = runtime
        await self._read_runtime(runtime)  # in this task: one that is cancelled before it starts would never read

    async def _close_stream(self) -> None:
        """Once more: the engine may have opened it after the call's own end was decided. Idempotent."""
        if self._runtime is not None:
            with contextlib.suppress(api.StreamLost):
                await self._runtime.send(api.CloseStream(call_id=self.call.call_id))

    async def _read_runtime(self, runtime: api.Runtime) -> None:
        try:
            async for event in runtime.events(self.call.call_id):
                await self._inbox.put(event)
        except api.StreamLost as error:
            await self._inbox.put(RuntimeLost(str(error)))

    async def _find_engine(self) -> None:
        await self.engines.runtime()
        await self._inbox.put(RuntimeReady())

    # -------------------------------------------------------------------------- tasks

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._group is not None
        return self._group.create_task(work, name=f"{self._name}/{name}")

    async def _drain(self) -> None:
        """Everything kept so far has been handed to the store."""
        await asyncio.get_running_loop().run_in_executor(self._writer, lambda: None)


class _CallOver(Exception):
    """Ends the task group, and with it every task of the call."""
