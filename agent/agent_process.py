"""The agent process: call loops, policy, storage. Started and watched by the parent (agent/app.py).

    python -m agent.agent_process --settings FILE.json --run-folder DIR --parent-pid PID

Prints one JSON line when it takes calls. Media workers and engine are other processes: when one of them dies, this
one waits for the next; when this one dies, the worker keeps the calls up and offers them to its successor.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from agent import rendering
from agent.call import Call
from agent.call_setup import CallSetup
from agent.config import Config
from agent.engine_link import EngineLink
from agent.events import ShutDown
from agent.live_call import LiveCall, utc_now
from agent.prompts.lines import LineBook
from agent.run_folder import ENGINE_SOCKET, MEDIA_SOCKET, checkpoint_folder, read_settings
from agent.tools.shop import Shop
from policies.campaign import Campaign
from policies.engine import PolicyEngine
from policies.facts import CallFacts, CheckpointFacts
from storage.calls import CallStore, StorageFull
from storage.entries import TurnAppended, TurnUpdated
from storage.replay import Orphan
from telephony import leg as tel
from telephony.client import WorkerClient, WorkerLeg, WorkerLost

log = logging.getLogger(__name__)
RESUME_WINDOW_S = 2.0  # a worker that kept calls offers them within this long after we connected
_PARENT_POLL_S = 0.5


def checkpoint_facts(folder: Path) -> CheckpointFacts:
    """The `[facts]` of checkpoint.toml, read without the model: this process must not carry torch."""
    table = tomllib.loads((folder / "checkpoint.toml").read_text(encoding="utf-8"))
    facts = {
        key: tuple(table.get("facts", {}).get(key, ())) for key in CheckpointFacts.__struct_fields__ if key != "name"
    }
    return CheckpointFacts(name=str(table["name"]), **facts)


class AgentProcess:
    def __init__(self, config: Config, run_folder: Path) -> None:
        self.config, self.run_folder = config, run_folder
        self.store = CallStore(config.storage)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="agent-writer")
        self.engines = EngineLink(run_folder / ENGINE_SOCKET)
        self.book = LineBook.load()
        folder = checkpoint_folder(config)
        self.policy = PolicyEngine.load(
            config.policies,
            checkpoint_facts(folder),
            handoff_uri=config.handoff.uri,
            recording=config.storage.recording_policy,
            line_keys=self.book.keys,
        )
        for problem in self.policy.problems:
            log.error("campaign %s is refused: %s", problem.name, problem.reason)
        texts = rendering.sentences(self.book, self.policy.campaigns)
        self.rendered, self.rendered_rate_hz = rendering.load(
            rendering.folder_for(config.storage.folder, folder), texts
        )
        self.calls: dict[str, LiveCall] = {}
        self._stopping = asyncio.Event()
        self._no_calls = asyncio.Event()
        self._no_calls.set()

    async def run(self, parent_pid: int) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._serve_workers(group), name="agent/workers"),
                group.create_task(self._watch_parent(parent_pid), name="agent/parent"),
            ]
            await self._stopping.wait()
            await self._end_calls()
            for task in tasks:
                task.cancel()
        await self.engines.close()
        self.writer.shutdown()
        self.store.close()

    # ------------------------------------------------------------------------ workers

    async def _serve_workers(self, group: asyncio.TaskGroup) -> None:
        await self.engines.runtime()  # a call that nobody can answer is not taken
        is_first = True
        while True:
            try:
                client = await WorkerClient.connect(self.run_folder / MEDIA_SOCKET, 30.0, self.config.telephony)
            except WorkerLost as error:
                log.error("%s", error)
                continue
            if is_first:
                is_first = False
                group.create_task(self._close_orphans(), name="agent/orphans")
                print(json.dumps({"ready": True, "sip_port": client.hello.sip_port}), flush=True)
            async for leg in client.legs():
                group.create_task(self._guard(leg), name=f"agent/leg-{leg.leg_id}")
            await client.close()
            log.warning("the media worker is gone")

    async def _close_orphans(self) -> None:
        """Calls of an earlier agent that no worker offered again are over."""
        await asyncio.sleep(RESUME_WINDOW_S)
        closed = await asyncio.get_running_loop().run_in_executor(
            self.writer, lambda: self.store.close_orphans(keep=tuple(self.calls))
        )
        if closed:
            log.warning("closed calls of an earlier agent: %s", ", ".join(closed))

    async def _guard(self, leg: WorkerLeg) -> None:
        """A failed call never takes down another."""
        try:
            await self._take(leg)
        except Exception:
            log.exception("leg %s failed", leg.leg_id)
            with contextlib.suppress(tel.LegError):
                await leg.send(tel.Hangup(leg_id=leg.leg_id, cause="agent_error"))
            await self._close_failed(leg)

    # -------------------------------------------------------------------------- calls

    async def _take(self, leg: WorkerLeg) -> None:
        call_id = call_id_of(leg.leg_id)
        orphans = {orphan.call_id: orphan for orphan in self.store.orphans()} if leg.is_resumed else {}
        if call_id in orphans:
            await self._resume(leg, orphans[call_id])
            return
        if leg.is_resumed or (incoming := await _first_invite(leg)) is None:
            return  # over before we looked, or nothing is known of it
        now = utc_now()
        facts = CallFacts(call_id=call_id, did=incoming.did, ani=incoming.ani, started_at=now)
        admission = self.policy.admit(facts, len(self.calls), self.config.telephony.max_calls)
        campaign = self.policy.campaign_for(incoming.did)
        if not admission.is_admitted or campaign is None:
            await self._refuse(leg, admission.sip_status, admission.retry_after_s, "; ".join(admission.reasons))
            return
        try:
            await self._open(leg, incoming, facts, campaign)
        except StorageFull as error:
            await self._refuse(leg, 503, self.config.policies.retry_after_s, str(error))
            return
        await self._run(self._live_call(leg, facts, campaign))

    async def _refuse(self, leg: WorkerLeg, sip_status: int, retry_after_s: int, reason: str) -> None:
        log.warning("leg %s is refused with %d: %s", leg.leg_id, sip_status, reason)
        await leg.send(tel.Reject(leg_id=leg.leg_id, sip_status=sip_status, retry_after_s=retry_after_s))

    async def _open(self, leg: WorkerLeg, incoming: tel.LegIncoming, facts: CallFacts, campaign: Campaign) -> None:
        style = self.policy.style(facts)

        def write() -> None:
            self.store.open_call(
                facts.call_id,
                did=incoming.did,
                ani=incoming.ani,
                display_name=incoming.display_name[:200],
                direction=leg.direction,
                campaign=campaign.name,
                source_address=incoming.source_address,
                sample_rate_hz=leg.sample_rate_hz,
                now=facts.started_at,
            )
            recorder = self.store.start_recording(
                facts.call_id, policy=self.policy.recording(facts).mode, now=facts.started_at
            )
            decided = {name: list(v) if isinstance(v, tuple) else v for name, v in _fields(style).items()}
            self.store.update_call(facts.call_id, style=decided, language=style.language, now=facts.started_at)

            def tap(start_sample: int, caller_pcm: bytes, agent_pcm: bytes) -> None:
                recorder.push("caller", start_sample, caller_pcm)
                recorder.push("agent", start_sample, agent_pcm)

            leg.set_tap(tap)

        await asyncio.get_running_loop().run_in_executor(self.writer, write)

    def _live_call(self, leg: WorkerLeg, facts: CallFacts, campaign: Campaign) -> LiveCall:
        handoff = campaign.handoff_uri or self.config.handoff.uri
        setup = CallSetup(
            call_id=facts.call_id,
            leg_id=leg.leg_id,
            sample_rate_hz=leg.sample_rate_hz,
            facts=facts,
            policy=self.policy,
            lines=self.book.for_call(campaign.lines),
            order_digits=campaign.order_digits,
            tools=campaign.tools,
            turn_taking=self.config.turn_taking,
            digit_timeout_s=self.config.agent.digit_timeout_s,
            rendered=self.rendered,
            rendered_rate_hz=self.rendered_rate_hz,
        )
        shop = Shop(self.store, facts.call_id, campaign.name, can_transfer=bool(handoff))
        return LiveCall(Call(setup), leg, self.engines, self.store, self.writer, shop)

    async def _run(self, live: LiveCall, history: tuple[tuple[str, str], ...] | None = None) -> None:
        call_id = live.call.call_id
        self.calls[call_id] = live
        self._no_calls.clear()
        try:
            await live.run(history)
        finally:
            del self.calls[call_id]
            if not self.calls:
                self._no_calls.set()

    async def _resume(self, leg: WorkerLeg, orphan: Orphan) -> None:
        """A call that outlived the last agent: its record goes on, and so does the conversation."""
        row = self.store.reader.get_call(orphan.call_id)
        campaign = self.policy.campaign_for(row["did"])
        if campaign is None:
            await leg.send(tel.Hangup(leg_id=leg.leg_id, cause="campaign_gone"))
            return
        self.calls[orphan.call_id] = live = self._live_call(
            leg,
            CallFacts(call_id=orphan.call_id, did=row["did"], ani=row["ani"], started_at=row["started_at"]),
            campaign,
        )
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.writer, self.store.adopt_call, orphan.call_id)
        live.call.take_over(orphan.turn_ids, leg.played_before)
        await leg.send(tel.Flush(leg_id=leg.leg_id))  # the worker's apology, if it still plays
        await self._run(live, history_of(orphan))

    async def _close_failed(self, leg: WorkerLeg) -> None:
        call_id = call_id_of(leg.leg_id)
        now = utc_now()
        await asyncio.get_running_loop().run_in_executor(
            self.writer,
            lambda: self.store.close_call(
                call_id, disposition="failed", cause="agent_error", ended_by="agent", now=now
            ),
        )

    # ------------------------------------------------------------------------- ending

    async def _watch_parent(self, parent_pid: int) -> None:
        while os.getppid() == parent_pid:  # noqa: ASYNC110  (the kernel gives no event for it that asyncio could await)
            await asyncio.sleep(_PARENT_POLL_S)
        log.error("the parent process is gone")
        self._stopping.set()

    async def _end_calls(self) -> None:
        for live in list(self.calls.values()):
            live.post(ShutDown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_calls.wait(), 3.0)


def call_id_of(leg_id: str) -> str:
    """The same for every agent that handles the leg; also a file name."""
    return "c-" + re.sub(r"[^A-Za-z0-9_-]", "-", leg_id)[:60]


def history_of(orphan: Orphan) -> tuple[tuple[str, str], ...]:
    """What had been said when the last agent died, as far as it was acknowledged: (role, text) in the runtime's
    words.
    """
    roles = {"caller": "user", "agent": "assistant"}
    rows: dict[str, tuple[str, str]] = {}
    for entry in orphan.entries:
        if isinstance(entry, TurnAppended) and entry.role in roles and not entry.fields.get("intent"):
            rows[entry.turn_id] = (roles[entry.role], entry.fields.get("heard_text") or "")
        elif isinstance(entry, TurnUpdated) and entry.turn_id in rows and "heard_text" in entry.fields:
            rows[entry.turn_id] = (rows[entry.turn_id][0], entry.fields["heard_text"])
    return tuple(row for row in rows.values() if row[1])


def _fields(style: object) -> dict[str, object]:
    return {name: getattr(style, name) for name in style.__struct_fields__}  # type: ignore[attr-defined]


async def _first_invite(leg: WorkerLeg) -> tel.LegIncoming | None:
    async for event in leg.events():
        if isinstance(event, tel.LegIncoming):
            return event
        if isinstance(event, tel.LegDisconnected):
            return None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="agent process")
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    arguments = parser.parse_args()
    config = read_settings(arguments.settings)
    logging.basicConfig(level=config.agent.log_level.upper(), format="%(asctime)s agent %(levelname)s %(message)s")

    async def run() -> None:
        await AgentProcess(config, arguments.run_folder).run(arguments.parent_pid)

    asyncio.run(run())


if __name__ == "__main__":
    main()
