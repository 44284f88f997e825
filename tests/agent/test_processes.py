"""The parent and its children: started, watched, and ended in order without a word."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from pathlib import Path

import pytest

from agent.app import Stack
from agent.config import Config, load_config
from agent.processes import Child, ChildFailed, ChildSpec
from minmo_runtime import server
from minmo_runtime.config import RuntimeConfig

DRAINING = """
import signal, time
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append(1))
print("ready", flush=True)
while len(received) < 2:
    time.sleep(0.01)
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


# Settings with a choice of words, or with a narrow range.
OTHER_VALUES: dict[str, str | float] = {
    "device": "cuda", "dtype": "bfloat16", "weights": "int8", "draft_probability": 0.7,
}  # fmt: skip


def child_of(code: str) -> Child:
    return Child(ChildSpec("child", ("-c", code), is_ready=lambda line: line == "ready"))


async def started(code: str) -> tuple[Child, asyncio.Task[None]]:
    child = child_of(code)
    keeper = asyncio.create_task(child.keep_running())
    async with asyncio.timeout(20):
        await child.ready.wait()
    return child, keeper


async def test_a_child_that_drains_at_the_first_sigterm_is_ended_by_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    child, keeper = await started(DRAINING)
    await child.stop(kill_after_s=20.0)
    await keeper
    assert child.process is not None and child.process.returncode == 0
    assert child.num_starts == 1 and not caplog.records


async def test_a_child_that_ignores_sigterm_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    child, keeper = await started(DEAF)
    await child.stop(kill_after_s=0.1)
    await keeper
    assert child.process is not None and child.process.returncode == -9
    assert "does not end, killed" in caplog.text


async def test_a_dead_child_is_started_again_and_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    child, keeper = await started(DRAINING)
    first = child.pid
    child.signal(9)
    async with asyncio.timeout(20):
        while child.pid == first or not child.ready.is_set():  # noqa: ASYNC110  (no event for a new pid)
            await asyncio.sleep(0.02)
    assert "starting it again" in caplog.text
    await child.stop(kill_after_s=20.0)
    await keeper


async def test_a_child_that_never_becomes_ready_fails_the_start() -> None:
    with pytest.raises(ChildFailed, match="child ended with 3 before it was ready, 2 times"):
        await child_of("raise SystemExit(3)").keep_running(max_failed_starts=2)


async def test_a_keeper_that_is_cancelled_leaves_no_process_behind() -> None:
    child, keeper = await started(DEAF)
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    await asyncio.wait_for(child.ended(), 20)
    assert child.process is not None and child.process.returncode == -9


# --------------------------------------------------------------------------- the stack


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "checkpoint.toml").write_text('name = "test"')
    overrides = {
        "agent": {"checkpoint": str(tmp_path)},
        "telephony": {"sip_port": 0},
        "web": {"port": 0},
        "storage": {"folder": str(tmp_path / "var")},
    }
    return load_config(None, overrides)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RuntimeConfig)])
def test_every_runtime_setting_reaches_the_engine(config: Config, field: str) -> None:
    default = getattr(config.runtime, field)
    other = OTHER_VALUES.get(field, "another" if isinstance(default, str) else default + 1)
    changed = dataclasses.replace(config.runtime, **{field: other})
    _, _, *words = Stack(dataclasses.replace(config, runtime=changed))._engine_spec().command
    assert server.parse(words).config == changed != RuntimeConfig()


class Told(Child):
    """No process: notes the order in which it is told."""

    def __init__(self, name: str, told: list[str], all_children: dict[str, Child]) -> None:
        super().__init__(ChildSpec(name, ()))
        self._told, self._all = told, all_children

    def signal(self, number: int) -> None:
        self._told.append(f"{self.spec.name} drains")

    async def ended(self) -> None:
        self._told.append(f"{self.spec.name} ended")

    async def stop(self, *, kill_after_s: float = 0.0) -> None:
        assert all(child.is_stopping for child in self._all.values()), "one of them might be started again meanwhile"
        self._told.append(f"{self.spec.name} stopped")


async def test_the_stack_ends_its_processes_so_that_nobody_misses_a_neighbour(config: Config) -> None:
    stack, told = Stack(config), list[str]()
    for name in ("engine", "web", "worker", "agent"):
        stack.children[name] = Told(name, told, stack.children)
    await stack.stop()
    assert told == ["agent stopped", "worker stopped", "engine stopped", "web stopped"]


async def test_a_drain_ends_the_worker_after_the_agent_has_left_it(config: Config) -> None:
    stack, told = Stack(config), list[str]()
    for name in ("engine", "web", "worker", "agent"):
        stack.children[name] = Told(name, told, stack.children)
    await stack.drain()
    assert told == ["agent drains", "agent ended", "worker drains", "worker ended"]


async def test_a_stack_that_could_not_start_leaves_nothing_behind(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    stack = Stack(config, has_web=False)
    stack._begin("engine", ChildSpec("engine", ("-c", DEAF), is_ready=lambda line: line == "ready"))
    await asyncio.sleep(0)  # the keeper has begun, its process has not
    await stack.stop()
    process = stack.children["engine"].process
    if process is not None:
        await asyncio.wait_for(process.wait(), 20)
        assert not os.path.exists(f"/proc/{process.pid}")
    assert not stack.run_folder.exists() and "starting it again" not in caplog.text
