"""What the caller and the record see when one of our processes is killed (design §5).

The engine is the fake one, behind its socket: everything around it is real.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.app import Stack
from agent.caller import run_caller
from agent.caller_script import CallerScript, Hangup, Wait
from storage.search import CallReader
from tests.live.small_parent import FAKE_ENGINE, fake_config

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("pjsua2"), reason="missing: pjsua2"),
]


@pytest.fixture
async def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    config = fake_config(tmp_path)
    async with Stack(config, has_web=False, engine_command=FAKE_ENGINE) as running:
        yield running


async def call_and_kill(stack: Stack, role: str, talk_ms: int = 16_000) -> tuple[Any, dict[str, Any]]:
    """One call; `role` is killed while the agent speaks. The caller's report and the stored call."""
    script = CallerScript((Wait(talk_ms), Hangup()))
    calling = asyncio.create_task(run_caller(f"sip:100@{stack.sip_address}", script, max_duration_s=40.0))
    reader = CallReader.open(stack.config.storage)
    try:
        await until(lambda: reader.num_open_calls() == 1, 15.0)
        await asyncio.sleep(1.5)
        back_s = await death(stack, role)
        report = await calling
        await until(lambda: reader.num_open_calls() == 0, 15.0)
        call = reader.get_call(reader.list_calls(limit=1)[0]["call_id"])
        return report, {**call, "back_s": back_s}
    finally:
        calling.cancel()
        reader.close()


async def death(stack: Stack, role: str) -> float:
    """How many seconds until the next one is ready."""
    killed = stack.children[role].pid
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    await until(lambda: stack.children[role].pid != killed and stack.children[role].ready.is_set(), 15.0)
    return time.monotonic() - began


async def until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.05)


async def test_engine_death_leaves_the_call_up_and_is_kept_as_a_defect(stack: Stack) -> None:
    report, call = await call_and_kill(stack, "engine")
    assert report.ended_by == "us" and report.duration_ms > 15_000
    assert "engine_lost" in {defect["kind"] for defect in call["defects"]}
    assert call["disposition"] == "completed"


async def test_agent_death_keeps_the_call_and_the_next_agent_goes_on_with_it(stack: Stack) -> None:
    report, call = await call_and_kill(stack, "agent")
    assert report.ended_by == "us" and report.duration_ms > 15_000
    assert call["disposition"] == "completed" and call["ended_by"] == "caller"
    assert any("something went wrong" in (turn["heard_text"] or "") for turn in call["turns"])


async def test_worker_death_drops_its_calls_closes_their_rows_and_is_back_within_three_seconds(stack: Stack) -> None:
    report, call = await call_and_kill(stack, "worker", talk_ms=6_000)
    assert call["cause"] == "worker_lost" and call["disposition"] == "failed"
    assert report.answered
    back_s = [call["back_s"]]
    while min(back_s) > 3.0 and len(back_s) < 3:  # a starved machine is late once in a while, a slow start always
        back_s.append(await death(stack, "worker"))
    assert min(back_s) <= 3.0


async def test_stop_leaves_no_process_behind_and_nobody_complains(
    stack: Stack, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pids = [child.pid for child in stack.children.values()]
    await stack.stop()
    assert not [pid for pid in pids if is_alive(pid)]
    assert not stack.run_folder.exists()
    assert capfd.readouterr() == ("", "") and not caplog.records


async def test_stop_in_the_middle_of_a_call_says_bye_and_closes_its_row(
    stack: Stack, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    script = CallerScript((Wait(20_000), Hangup()))
    calling = asyncio.create_task(run_caller(f"sip:100@{stack.sip_address}", script, max_duration_s=30.0))
    reader = CallReader.open(stack.config.storage)
    await until(lambda: reader.num_open_calls() == 1, 15.0)
    await asyncio.sleep(1.5)
    await stack.stop()
    report = await calling
    assert report.answered and report.ended_by == "agent" and report.duration_ms < 15_000
    call = reader.list_calls(limit=1)[0]
    reader.close()
    assert (call["state"], call["cause"]) == ("closed", "shutdown")
    assert capfd.readouterr() == ("", "") and not caplog.records


async def test_drain_waits_for_the_last_call_and_nobody_complains(
    stack: Stack, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    script = CallerScript((Wait(5_000), Hangup()))
    calling = asyncio.create_task(run_caller(f"sip:100@{stack.sip_address}", script, max_duration_s=30.0))
    reader = CallReader.open(stack.config.storage)
    await until(lambda: reader.num_open_calls() == 1, 15.0)
    await asyncio.sleep(0.5)
    await asyncio.wait_for(stack.drain(), 20.0)
    report = await calling
    assert report.ended_by == "us" and report.duration_ms >= 5_000
    assert reader.list_calls(limit=1)[0]["cause"] == "normal"
    reader.close()
    await stack.stop()
    assert capfd.readouterr() == ("", "") and not caplog.records


async def test_children_of_a_killed_parent_end_by_themselves_within_five_seconds(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("small_parent.py")), str(tmp_path), stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert parent.stdout is not None
    pids = [int(word) for word in (await asyncio.wait_for(parent.stdout.readline(), 30.0)).split()]
    assert len(pids) == 3 and all(is_alive(pid) for pid in pids)
    parent.kill()
    await parent.wait()
    await until(lambda: not any(is_alive(pid) for pid in pids), 6.0)


def is_alive(pid: int) -> bool:
    """Zombies do not count: nobody may be there to collect them."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
