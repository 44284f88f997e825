"""The agent process without its neighbours' processes: legs in memory, the fake runtime behind its socket."""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import rendering
from agent.agent_process import AgentProcess
from agent.config import Config, load_config
from agent.reception import call_id_of
from agent.run_folder import ENGINE_SOCKET
from minmo_runtime.fake import FakeRuntime
from minmo_runtime.server import RuntimeServer
from storage.calls import CallStore
from telephony import leg as tel
from telephony.loopback import LoopbackLeg

FACTS = """
name = "fake"
[facts]
languages = ["en"]
dialects = ["us"]
emotions = ["calm", "brisk", "neutral"]
rates = ["normal"]
voices = ["agent"]
"""
LOUD = array("h", [6000, -6000] * 400).tobytes()  # 0.1 s
LEG_ID = "leg-1"
LINE_CAMPAIGN = """
dids = ["100"]
shop = "acme"
tools = []
persona = {name = "anna"}
style = {languages = ["en"], dialect = "us", emotion = "calm", rate = "normal"}
caller = {headers = {"X-Customer" = "customer_id"}}
[lines]
greeting = ["hello {customer_id}.", "hello."]
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "checkpoint.toml").write_text(FACTS)
    overrides: dict[str, dict[str, Any]] = {
        "agent": {"checkpoint": str(tmp_path)},
        "storage": {"folder": tmp_path / "var", "recording_segment_s": 1.0},
    }
    return load_config(None, overrides)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[RuntimeServer]:
    server = RuntimeServer(FakeRuntime(), tmp_path / ENGINE_SOCKET)
    await server.start()
    yield server
    await server.stop()


def agent_process(config: Config, folder: Path) -> AgentProcess:
    """With every fixed sentence as half a second of audio, as the stack makes them before any call."""
    process = AgentProcess(config, folder)
    reception = process.reception
    texts = rendering.sentences(reception.book, reception.policy.campaigns)
    reception.rendered, reception.rendered_rate_hz = dict.fromkeys(texts, LOUD * 5), 8000
    return process


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (many conditions, none of them an event)
            await asyncio.sleep(0.01)


async def advance(leg: LoopbackLeg, seconds: float) -> None:
    """The leg's time passes faster than ours."""
    for _ in range(round(seconds / 0.1)):
        leg.advance(800)
        await asyncio.sleep(0.005)


# ----------------------------------------------------------------------------- its end


async def test_it_ends_at_once_when_there_is_no_call(config: Config, tmp_path: Path, engine: RuntimeServer) -> None:
    process = agent_process(config, tmp_path)
    running = asyncio.create_task(process.run(os.getppid()))
    await until(lambda: process.engines.is_connected)
    process.on_signal()
    await asyncio.wait_for(running, 10.0)


async def test_sigterm_lets_the_last_call_end_by_itself_and_refuses_new_ones(
    config: Config, tmp_path: Path, engine: RuntimeServer
) -> None:
    process = agent_process(config, tmp_path)
    running = asyncio.create_task(process.run(os.getppid()))
    leg, late = LoopbackLeg(LEG_ID), LoopbackLeg("leg-2")
    call = asyncio.create_task(process.reception.guard(leg))
    leg.ring()
    await until(lambda: leg.state is tel.LegState.CONFIRMED)
    process.on_signal()
    await asyncio.sleep(0.1)
    late.ring()
    await process.reception.guard(late)
    assert late.rejected_with is not None and late.rejected_with.sip_status == 503
    assert leg.state is tel.LegState.CONFIRMED and not running.done()
    leg.hang_up()
    await asyncio.wait_for(asyncio.gather(running, call), 5.0)
    assert row_of(config)["cause"] == "normal"


async def test_a_call_beyond_what_the_engine_holds_gets_503_with_retry_after_and_is_never_answered(
    config: Config, tmp_path: Path
) -> None:
    server = RuntimeServer(FakeRuntime(max_streams=1), tmp_path / ENGINE_SOCKET)
    await server.start()
    process = agent_process(config, tmp_path)
    running = asyncio.create_task(process.run(os.getppid()))
    leg, late = LoopbackLeg(LEG_ID), LoopbackLeg("leg-2")
    call = asyncio.create_task(process.reception.guard(leg))
    leg.ring()
    await until(lambda: leg.state is tel.LegState.CONFIRMED)
    late.ring()
    await asyncio.wait_for(process.reception.guard(late), 5.0)
    assert late.rejected_with is not None
    assert late.rejected_with.sip_status == 503 and late.rejected_with.retry_after_s > 0
    assert leg.state is tel.LegState.CONFIRMED
    leg.hang_up()
    process.on_signal()
    await asyncio.wait_for(asyncio.gather(running, call), 5.0)
    await server.stop()


@pytest.mark.parametrize("answers_bye", [True, False])
async def test_a_second_sigterm_ends_calls_and_closes_their_rows(
    config: Config, tmp_path: Path, engine: RuntimeServer, answers_bye: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.agent_process.END_WITHIN_S", 0.3)
    process = agent_process(config, tmp_path)
    running = asyncio.create_task(process.run(os.getppid()))
    leg = LoopbackLeg(LEG_ID)
    if not answers_bye:  # the far end is gone: no answer, no end of the leg
        monkeypatch.setattr(leg, "_end", lambda *_: None)
    call = asyncio.create_task(process.reception.guard(leg))
    leg.ring()
    await until(lambda: leg.state is tel.LegState.CONFIRMED)
    process.on_signal()
    process.on_signal()
    await asyncio.wait_for(running, 5.0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert row_of(config)["cause"] == "shutdown" and row_of(config)["ended_by"] == "agent"


async def test_a_parent_that_is_gone_ends_it(config: Config, tmp_path: Path, engine: RuntimeServer) -> None:
    await asyncio.wait_for(AgentProcess(config, tmp_path).run(parent_pid=1 if os.getppid() != 1 else 2), 5.0)


# ------------------------------------------------------------- the line it came by


async def test_headers_that_the_campaign_names_reach_line_prompt_and_record_and_outlive_the_agent(
    config: Config, tmp_path: Path, engine: RuntimeServer
) -> None:
    (tmp_path / "campaigns").mkdir()
    (tmp_path / "campaigns" / "acme.toml").write_text(LINE_CAMPAIGN)
    named = replace(config, policies=replace(config.policies, campaigns_dir=str(tmp_path / "campaigns")))
    process = agent_process(named, tmp_path)
    leg = LoopbackLeg(LEG_ID, ani="+390212345")
    call = asyncio.create_task(process.reception.guard(leg))
    leg.ring({"x-customer": "c-17 <b>", "X-Other": "not read", "From": "sip:a@b"}, trunk="carrier", is_asserted=True)
    await until(lambda: leg.state is tel.LegState.CONFIRMED)
    live = process.reception.calls[call_id_of(LEG_ID)]
    assert live.call.setup.lines.texts["greeting"] == ("hello c-17 b.", "hello.")
    assert live.call._system_prompt().endswith("claims customer_id=c-17_b.")
    assert live.call.desk.frame.claims == {"customer_id": "c-17 b"}
    row = process.store.get_call(call_id_of(LEG_ID))
    kept = {"trunk": "carrier", "is_withheld": False, "is_asserted": True, "headers": {"X-Customer": "c-17 b"}}
    assert row["line"] == kept
    await killed(process, call)
    again = agent_process(named, tmp_path)
    resumed_leg = ResumedLeg(LEG_ID)
    resumed_leg.state = tel.LegState.CONFIRMED
    call = asyncio.create_task(again.reception.guard(resumed_leg))
    await until(lambda: call_id_of(LEG_ID) in again.reception.calls)
    facts = again.reception.calls[call_id_of(LEG_ID)].call.setup.facts
    assert (facts.trunk, facts.is_number_asserted, facts.headers) == ("carrier", True, {"X-Customer": "c-17 b"})
    resumed_leg.hang_up()
    await asyncio.wait_for(call, 5.0)
    await again.engines.close()
    again.writer.shutdown()
    again.store.close()


# ------------------------------------------------------- a call that outlived an agent


class ResumedLeg(LoopbackLeg):
    is_resumed = True


def row_of(config: Config) -> dict[str, Any]:
    store = CallStore(config.storage)
    try:
        return dict(store.reader.get_call(call_id_of(LEG_ID)))
    finally:
        store.close()


async def dead_agent(config: Config, folder: Path, *, is_notice_heard: bool) -> LoopbackLeg:
    """The leg as the worker holds it after its agent was killed in the middle of the call."""
    process = agent_process(config, folder)
    leg = LoopbackLeg(LEG_ID)
    call = asyncio.create_task(process.reception.guard(leg))
    leg.ring()
    await until(lambda: leg.state is tel.LegState.CONFIRMED)
    if is_notice_heard:
        live = process.reception.calls[call_id_of(LEG_ID)]
        async with asyncio.timeout(20):
            while live.call.turns.state.value == "protected":
                await advance(leg, 0.2)
        leg.speak(LOUD)
        await advance(leg, 3.0)
    await killed(process, call)
    return leg


async def killed(process: AgentProcess, call: asyncio.Task[None]) -> None:
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await process.engines.close()
    process.writer.shutdown()
    process.store.flush()
    process.store._writer_lock.close()  # what the kernel does when it dies


async def resumed(config: Config, folder: Path, before: LoopbackLeg) -> dict[str, Any]:
    process = agent_process(config, folder)
    leg = ResumedLeg(LEG_ID)
    leg.state, leg._playout.sample = tel.LegState.CONFIRMED, before.sample
    call = asyncio.create_task(process.reception.guard(leg))
    await until(lambda: call_id_of(LEG_ID) in process.reception.calls)
    live = process.reception.calls[call_id_of(LEG_ID)]
    await until(lambda: live.call.turns.current is not None)
    leg.speak(LOUD * 20)
    async with asyncio.timeout(20):
        while live.call.turns.state.value == "protected":
            await advance(leg, 0.2)
    await advance(leg, 6.0)
    leg.hang_up()
    await asyncio.wait_for(call, 5.0)
    reader = process.store.open_recording(call_id_of(LEG_ID))
    samples = reader.samples() if reader is not None else None
    row = process.store.get_call(call_id_of(LEG_ID))
    await process.engines.close()
    process.writer.shutdown()
    process.store.close()
    return {"row": row, "samples": samples, "resumed_at": before.sample, "ended_at": leg.sample}


async def test_the_recording_goes_on_with_the_next_agent(config: Config, tmp_path: Path, engine: RuntimeServer) -> None:
    before = await dead_agent(config, tmp_path, is_notice_heard=True)
    after = await resumed(config, tmp_path, before)
    assert after["row"]["recording_policy"] == "after_notice" and after["row"]["disposition"] == "completed"
    assert len(after["samples"]) == after["ended_at"]
    assert abs(after["samples"][after["resumed_at"] + 80 :, 0]).max() > 3000  # what the caller said to the next agent


async def test_a_notice_that_was_not_heard_is_said_again_before_anything_is_recorded(
    config: Config, tmp_path: Path, engine: RuntimeServer
) -> None:
    before = await dead_agent(config, tmp_path, is_notice_heard=False)
    after = await resumed(config, tmp_path, before)
    notice_end = after["row"]["notice_end_sample"]
    assert notice_end is not None and notice_end > after["resumed_at"]
    assert after["samples"] is not None and not after["samples"][:notice_end].any()
    assert len(after["samples"]) == after["ended_at"]


async def test_P3_a_second_after_the_hang_up_nothing_of_the_call_runs_any_more(
    config: Config, tmp_path: Path, engine: RuntimeServer
) -> None:
    """users.md P3: 100 % CPU forever after hang-up."""
    process = agent_process(config, tmp_path)
    leg = LoopbackLeg(LEG_ID)
    call = asyncio.create_task(process.reception.guard(leg))
    leg.ring()
    await until(lambda: leg.state is tel.LegState.CONFIRMED)
    name = call_id_of(LEG_ID)
    assert [task for task in asyncio.all_tasks() if name in task.get_name()]
    leg.hang_up()
    for _ in range(100):  # a second in turns of the loop: a starved one is not judged by the wall clock
        if not call.done():
            await asyncio.sleep(0.01)
    await asyncio.wait_for(call, 0)
    assert not [task for task in asyncio.all_tasks() if name in task.get_name()]
    assert not process.reception.calls and process.reception.num_busy == 0
    process.store.close()
    process.writer.shutdown()
    await process.engines.close()
