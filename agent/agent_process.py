"""The agent process: call loops, policy, storage. Started and watched by the parent (agent/app.py).

    python -m agent.agent_process --settings FILE.json --run-folder DIR --parent-pid PID

Prints one JSON line when it takes calls. Media workers and engine are other processes: when one of them dies, this
one waits for the next; when this one dies, the worker keeps the calls up and offers them to its successor. SIGTERM
drains (no new calls, exit after the last one, at most `telephony.drain_s`); a second one, or a parent that is gone,
ends the calls and this process within `END_WITHIN_S`. What happens to one leg is agent/reception.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agent import rendering
from agent.checkpoint import checkpoint_facts, checkpoint_folder
from agent.config import Config
from agent.dial_socket import serve as serve_dialling
from agent.engine_link import EngineLink
from agent.events import ShutDown
from agent.live_call import utc_now
from agent.loop_watch import LoopWatch
from agent.monitor import AgentStatus
from agent.outbound import Dialler
from agent.prompts.lines import LineBook
from agent.reception import Reception
from agent.run_folder import (
    AUDIOSOCKET_SOCKET,
    DIAL_SOCKET,
    ENGINE_SOCKET,
    MONITOR_SOCKET,
    browser_socket,
    media_socket,
    note_run_folder,
    read_settings,
)
from policies.engine import PolicyEngine
from storage.calls import CallStore
from telephony.audiosocket.config import media_config as audiosocket_media_config
from telephony.client import WorkerClient, WorkerLost
from telephony.config import TelephonyConfig
from telephony.holdings import told
from telephony.webrtc.config import media_config
from telephony.wire import SecurityEvent

log = logging.getLogger(__name__)
RESUME_WINDOW_S = 2.0  # a worker that kept calls offers them within this long after we connected
END_WITHIN_S = 3.0  # for BYE and the last rows; design section 5 leaves 5 s for the whole process
_PARENT_POLL_S = 0.5


class AgentProcess:
    def __init__(self, config: Config, run_folder: Path, num_workers: int = 1) -> None:
        self._num_workers = num_workers  # SIP media workers
        self.config, self.run_folder = config, run_folder
        self.store = CallStore(config.storage)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="agent-writer")
        self.engines = EngineLink(run_folder / ENGINE_SOCKET)
        self.reception = self._open_reception()
        self.loop_watch = LoopWatch(config.agent.loop_stall_s)
        self._draining, self._ending = asyncio.Event(), asyncio.Event()

    def _open_reception(self) -> Reception:
        config, book, folder = self.config, LineBook.load(), checkpoint_folder(self.config)
        policy = PolicyEngine.load(
            config.policies,
            checkpoint_facts(folder),
            handoff_uri=config.handoff.uri,
            handoff_manner=config.handoff.manner,
            recording=config.storage.recording_policy,
            line_keys=book.keys,
        )
        for problem in policy.problems:
            log.error("campaign %s is refused: %s", problem.name, problem.reason)
        if config.audiosocket.port and not policy.campaign_for(config.audiosocket.did):
            log.error("audiosocket.did = %r: no campaign answers it, so its calls are refused", config.audiosocket.did)
        texts = rendering.sentences(book, policy.campaigns)
        models = config.runtime.models_folder
        rendered = rendering.load(rendering.folder_for(config.storage.folder, folder, models), texts)
        return Reception(config, self.store, self.writer, self.engines, policy, book, rendered)

    async def run(self, parent_pid: int) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.on_signal)
        loop.add_signal_handler(signal.SIGUSR1, self.tell_holdings)
        self.loop_watch.start()
        self.reception.monitor.tell_status = self.status
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve_workers(group), name="agent/workers")
                group.create_task(self._watch_parent(parent_pid), name="agent/parent")
                monitor = await self.reception.monitor.serve(self.run_folder / MONITOR_SOCKET)
                dialler = Dialler(self.reception, self.reception.workers, lambda work, name: _spawn(group, work, name))
                dialling = await serve_dialling(self.run_folder / DIAL_SOCKET, dialler.dial)
                note_run_folder(self.config.storage.folder, self.run_folder)
                await self._draining.wait()
                self.reception.is_closing = True
                await self._last_calls()
                monitor.close()
                dialling.close()
                raise _AgentOver  # and with it every task that is left
        except* _AgentOver:
            pass
        self.loop_watch.stop()
        await self.reception.close_what_is_left()
        await self.engines.close()
        self.writer.shutdown()
        self.store.close()

    def on_signal(self) -> None:
        if self._draining.is_set():
            self._ending.set()
        self._draining.set()

    def tell_holdings(self) -> None:
        """What this process holds, for whoever looks for a leak (agent/bench_soak.py)."""
        counts = {
            "tasks": len(asyncio.all_tasks()),
            "calls": len(self.reception.calls),
            "open_records": self.store.num_open,
        }
        print(told(counts | {"streams": self.engines.num_open_streams}), flush=True)

    def status(self) -> AgentStatus:
        """For whoever asks whether calls can be taken (agent/readiness.py)."""
        return AgentStatus(
            num_calls=len(self.reception.calls),
            max_calls=self.config.runtime.max_streams,
            is_closing=self.reception.is_closing,
            is_engine_connected=self.engines.is_connected,
            num_workers=len(self.reception.workers.clients),
            worst_lag_ms=round(1_000 * self.loop_watch.worst_lag_s, 1),
            num_stalls=self.loop_watch.num_stalls,
        )

    async def _last_calls(self) -> None:
        """Until the last call has ended by itself; those that are left when the end is wanted are ended."""
        over = asyncio.create_task(self.reception.no_calls.wait(), name="agent/last-call")
        wanted = asyncio.create_task(self._ending.wait(), name="agent/end-wanted")
        drain_s = self.config.telephony.drain_s
        await asyncio.wait({over, wanted}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        wanted.cancel()
        for live in list(self.reception.calls.values()):
            live.post(ShutDown())
        await asyncio.wait({over}, timeout=END_WITHIN_S)
        over.cancel()

    # ------------------------------------------------------------------------ workers

    async def _serve_workers(self, group: asyncio.TaskGroup) -> None:
        await self.engines.runtime()  # a call that nobody can answer is not taken
        for index in range(self._num_workers):
            work = self._serve_worker(group, media_socket(index), self.config.telephony, is_main=index == 0)
            group.create_task(work, name=f"agent/worker-{index}")
        for index in range(self.config.webrtc.num_workers):
            work = self._serve_worker(group, browser_socket(index), media_config(self.config.telephony))
            group.create_task(work, name=f"agent/browser-{index}")
        if self.config.audiosocket.port:
            work = self._serve_worker(group, AUDIOSOCKET_SOCKET, audiosocket_media_config(self.config.telephony))
            group.create_task(work, name="agent/audiosocket")

    async def _serve_worker(
        self, group: asyncio.TaskGroup, socket_name: str, config: TelephonyConfig, is_main: bool = False
    ) -> None:
        """One media worker, and the next in its place, until we drain. The main one decides when we are ready."""
        is_first = is_main
        while not self._draining.is_set():
            try:
                client = await WorkerClient.connect(self.run_folder / socket_name, 30.0, config)
            except WorkerLost as error:
                log.error("%s", error)
                continue
            if is_first:
                is_first = False
                group.create_task(self._close_orphans(), name="agent/orphans")
                print(json.dumps({"ready": True, "sip_port": client.hello.sip_port}), flush=True)
            client.on_security_event = self._on_security_event
            can_call = client.hello.sip_port > 0  # browsers and AudioSockets cannot be called
            if can_call:
                self.reception.workers.add(client)
            try:
                async for leg in client.legs():
                    group.create_task(self.reception.guard(leg), name=f"agent/leg-{leg.leg_id}")
            finally:
                if can_call:
                    self.reception.workers.remove(client)
                await client.close()
            if not self._draining.is_set():
                log.warning("the media worker is gone")

    def _on_security_event(self, event: SecurityEvent) -> None:
        """A row of its own, which belongs to no call."""
        log.warning("security: %s", event)
        now = utc_now()

        def keep() -> None:
            try:
                self.store.note_security(
                    event.kind, event.source_address, now=now, count=event.count, detail=event.detail
                )
            except Exception:
                log.exception("a security event is not kept")

        self.writer.submit(keep)

    async def _close_orphans(self) -> None:
        """Calls of an earlier agent that no worker offered again are over."""
        await asyncio.sleep(RESUME_WINDOW_S)
        closed = await asyncio.get_running_loop().run_in_executor(
            self.writer, lambda: self.store.close_orphans(keep=tuple(self.reception.calls))
        )
        if closed:
            log.warning("closed calls of an earlier agent: %s", ", ".join(closed))

    async def _watch_parent(self, parent_pid: int) -> None:
        while os.getppid() == parent_pid:  # noqa: ASYNC110  (the kernel gives no event for it that asyncio could await)
            await asyncio.sleep(_PARENT_POLL_S)
        log.error("the parent process is gone")
        self._ending.set()
        self._draining.set()


def _spawn(group: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str) -> None:
    group.create_task(work, name=name)


class _AgentOver(Exception):
    """Ends the task group: workers, orphans, legs that did not end in time."""


def main() -> None:
    parser = argparse.ArgumentParser(description="agent process")
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--num-workers", type=int, default=1)
    arguments = parser.parse_args()
    config = read_settings(arguments.settings)
    logging.basicConfig(level=config.agent.log_level.upper(), format="%(asctime)s agent %(levelname)s %(message)s")

    async def run() -> None:
        await AgentProcess(config, arguments.run_folder, arguments.num_workers).run(arguments.parent_pid)

    asyncio.run(run())


if __name__ == "__main__":
    main()
