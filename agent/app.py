"""Composition root and parent process: starts worker, engine, agent and web, starts them again when they die, ends
them in order.

    minmo serve             serve(config): until SIGTERM (drains: running calls may end) or a second one (ends them)
    async with Stack(config) as stack: ...          the same, for the demo, the evaluation and live tests

What the caller and the record see when a process dies is design §5. The parent itself carries no call and no model:
if it is gone, each child notices, says BYE where it has to, and exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from agent import rendering
from agent.checkpoint import checkpoint_facts, checkpoint_folder
from agent.config import Config
from agent.engine_link import EngineLink
from agent.processes import Child, ChildFailed, ChildSpec
from agent.prompts.lines import LineBook
from agent.run_folder import (
    AUDIOSOCKET_CHECK,
    AUDIOSOCKET_SOCKET,
    ENGINE_SOCKET,
    browser_socket,
    make_run_folder,
    media_socket,
    offer_socket,
    write_settings,
)
from policies.engine import PolicyEngine

log = logging.getLogger(__name__)
READY_WITHIN_S = 60.0
RENDER_WITHIN_S = 180.0  # the first start with a checkpoint, on a slow machine


class StartError(Exception):
    """The stack cannot start; the message says what to do."""


class Stack:
    """All processes of one agent. `async with` starts them and returns when calls are taken."""

    def __init__(
        self, config: Config, *, has_web: bool = True, is_new_token_wanted: bool = False,
        engine_command: tuple[str, ...] = ("-m", "minmo_runtime.server"),
    ) -> None:  # fmt: skip
        """`engine_command`: another program with the engine's options (tests: the fake runtime behind a socket)."""
        self.checkpoint = checkpoint_folder(config)
        if not (self.checkpoint / "checkpoint.toml").is_file():
            raise StartError(
                f"UNTRAINED: no checkpoint at {self.checkpoint}; train one (minmo train all) or set agent.checkpoint"
            )
        self.config = _with_browser_workers(_with_fixed_ports(config), has_web)
        self._engine_command = engine_command
        self._has_web, self._is_new_token_wanted = has_web, is_new_token_wanted
        self.run_folder = make_run_folder(config.agent.run_folder)
        self._owns_folder = not config.agent.run_folder
        self.settings = write_settings(self.config, self.run_folder)
        self.children: dict[str, Child] = {}
        self.num_sip_workers = 1
        self.failed: asyncio.Future[None] | None = None
        self.on_line: Callable[[str, str], None] = lambda who, line: log.debug("%s: %s", who, line)  # what a child says
        self._keepers: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------------- start

    async def __aenter__(self) -> Stack:
        self.failed = asyncio.get_running_loop().create_future()
        try:
            self._begin("engine", self._engine_spec())
            if self._has_web:
                self._begin("web", self._web_spec())
            apology = await self._rendered_lines()
            self._begin("worker", self._worker_spec(apology, 0))
            await self._start_pool(apology)
            for index in range(self.config.webrtc.num_workers):
                self._begin(f"browser-{index}", self._browser_spec(index, apology))
            if self.config.audiosocket.port:
                self._begin("audiosocket", self._audiosocket_spec(apology))
            self._begin("agent", self._agent_spec())
            await self._all_ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def sip_address(self) -> str:
        """host:port to call."""
        return f"{self.config.telephony.sip_bind}:{self.config.telephony.sip_port}"

    @property
    def web_url(self) -> str:
        scheme = "https" if self.config.web.tls_cert_file else "http"
        return f"{scheme}://{self.config.web.host}:{self.config.web.port}/"

    def _begin(self, name: str, spec: ChildSpec) -> None:
        child = self.children[name] = Child(spec, on_line=lambda who, line: self.on_line(who, line))
        keeper = asyncio.create_task(child.keep_running(), name=f"parent/{name}")
        keeper.add_done_callback(self._on_keeper_done)
        self._keepers.append(keeper)

    def _on_keeper_done(self, keeper: asyncio.Task[None]) -> None:
        if keeper.cancelled() or self.failed is None or self.failed.done():
            return
        if error := keeper.exception():
            self.failed.set_exception(error)

    async def _all_ready(self) -> None:
        waiting = asyncio.gather(*(child.ready.wait() for child in self.children.values()))
        await self._or_failed(waiting, READY_WITHIN_S, "the processes are not ready")

    async def _or_failed(self, work: asyncio.Future[Any], within_s: float, what: str) -> None:
        assert self.failed is not None
        both: set[asyncio.Future[Any]] = {work, self.failed}
        done, _ = await asyncio.wait(both, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            work.result()
            return
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        if self.failed in done:
            try:
                self.failed.result()
            except ChildFailed as error:
                raise StartError(str(error)) from error
        raise StartError(f"{what} within {within_s:.0f} s")

    async def _rendered_lines(self) -> Path:
        """Fixed sentences as audio, made once per checkpoint. The worker's apology among them."""
        book = LineBook.load()
        policy = PolicyEngine.load(self.config.policies, checkpoint_facts(self.checkpoint), line_keys=book.keys)
        texts = rendering.sentences(book, policy.campaigns)
        if not texts:
            problems = "; ".join(f"{p.name}: {p.reason}" for p in policy.problems)
            raise StartError(f"no campaign can take calls: {problems or 'the folder is empty'}")
        folder = rendering.folder_for(self.config.storage.folder, self.checkpoint, self.config.runtime.models_folder)
        todo = rendering.missing(folder, texts)
        if todo:
            log.info("speaking %d fixed sentences for the first time", len(todo))
            work = asyncio.ensure_future(self._render(folder, todo, policy))
            await self._or_failed(work, RENDER_WITHIN_S, "the fixed sentences could not be spoken")
        return rendering.path_of(folder, book.lines[rendering.APOLOGY_PURPOSE][0])

    async def _render(self, folder: Path, texts: list[str], policy: PolicyEngine) -> None:
        await self.children["engine"].ready.wait()
        link = EngineLink(self.run_folder / ENGINE_SOCKET)
        try:
            await rendering.render(await link.runtime(), folder, texts, rendering.prompt(policy))
        except rendering.Untrained as error:
            raise StartError(f"UNTRAINED: parts of the checkpoint have no trained weights: {error}") from error
        finally:
            await link.close()

    # ------------------------------------------------------------------------- roles

    def _engine_spec(self) -> ChildSpec:
        command = (
            *self._engine_command, "--socket", str(self.run_folder / ENGINE_SOCKET),
            "--checkpoint", str(self.checkpoint), "--config", json.dumps(dataclasses.asdict(self.config.runtime)),
        )  # fmt: skip
        threads = str(self.config.runtime.num_threads)
        return ChildSpec("engine", command, {"OMP_NUM_THREADS": threads}, is_ready=lambda line: line == "ready")

    def _telephony(self, apology: Path, index: int = 0) -> dict[str, Any]:
        telephony = dataclasses.asdict(self.config.telephony.of_worker(index))
        if not telephony["apology_wav"] and apology.is_file():
            telephony["apology_wav"] = str(apology.absolute())
        return telephony

    def _browser_spec(self, index: int, apology: Path) -> ChildSpec:
        settings = {"telephony": self._telephony(apology), "webrtc": dataclasses.asdict(self.config.webrtc)}
        command = (
            "-m", "telephony.webrtc.worker", "--socket", str(self.run_folder / browser_socket(index)),
            "--offers", str(self.run_folder / offer_socket(index)), "--config", json.dumps(settings),
            "--parent-pid", str(os.getpid()),
        )  # fmt: skip
        return ChildSpec(f"browser-{index}", command, is_ready=_is_ready_json)

    def _audiosocket_spec(self, apology: Path) -> ChildSpec:
        settings = {"telephony": self._telephony(apology), "audiosocket": dataclasses.asdict(self.config.audiosocket)}
        command = (
            "-m", "telephony.audiosocket.worker", "--socket", str(self.run_folder / AUDIOSOCKET_SOCKET),
            "--checks", str(self.run_folder / AUDIOSOCKET_CHECK), "--config", json.dumps(settings),
            "--parent-pid", str(os.getpid()),
        )  # fmt: skip
        return ChildSpec("audiosocket", command, is_ready=_is_ready_json)

    async def _start_pool(self, apology: Path) -> None:
        """As many more SIP workers as `pool_calls` needs, by what the first says that its pjsua2 holds."""
        if not self.config.telephony.pool_calls:
            return
        first = self.children["worker"]
        waiting = asyncio.ensure_future(first.ready.wait())
        await self._or_failed(waiting, READY_WITHIN_S, "the first media worker is not ready")
        held = int(json.loads(first.ready_line)["max_calls"])
        self.num_sip_workers = math.ceil(self.config.telephony.pool_calls / held)
        for index in range(1, self.num_sip_workers):
            self._begin(f"worker-{index}", self._worker_spec(apology, index))

    def _worker_spec(self, apology: Path, index: int) -> ChildSpec:
        telephony = self._telephony(apology, index)
        command = (
            "-m", "telephony.worker", "--socket", str(self.run_folder / media_socket(index)),
            "--config", json.dumps(telephony), "--parent-pid", str(os.getpid()),
        )  # fmt: skip
        return ChildSpec(f"worker-{index}" if index else "worker", command, is_ready=_is_ready_json)

    def _agent_spec(self) -> ChildSpec:
        workers = ("--num-workers", str(self.num_sip_workers))
        return ChildSpec(
            "agent", ("-m", "agent.agent_process", *self._role_options(), *workers), is_ready=_is_ready_json
        )

    def _web_spec(self) -> ChildSpec:
        new_token = ("--new-token",) if self._is_new_token_wanted else ()
        return ChildSpec("web", ("-m", "agent.web_process", *self._role_options(), *new_token), is_ready=_is_ready_json)

    def _role_options(self) -> tuple[str, ...]:
        return (
            "--settings", str(self.settings), "--run-folder", str(self.run_folder), "--parent-pid", str(os.getpid()),
        )  # fmt: skip

    # -------------------------------------------------------------------------- stop

    async def drain(self) -> None:
        """No new calls; returns when the last one has ended, or its time is over."""
        for name in ("agent", *self._media_workers()):  # in this order nobody sees a neighbour vanish
            if name in self.children:
                child = self.children[name]
                child.is_stopping = True
                child.signal(signal.SIGTERM)
                await child.ended()

    def _media_workers(self) -> tuple[str, ...]:
        return tuple(name for name in self.children if name.split("-")[0] in ("worker", "browser", "audiosocket"))

    async def stop(self) -> None:
        """Agent first (it says goodbye and closes the rows), then the worker (BYE to whoever is left), then the rest:
        nobody sees a neighbour vanish. Nothing of ours is left behind.
        """
        for child in self.children.values():
            child.is_stopping = True
        for names in (("agent",), self._media_workers(), ("engine", "web")):
            await asyncio.gather(*(self.children[name].stop() for name in names if name in self.children))
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self.failed is not None:
            if not self.failed.done():
                self.failed.cancel()
            elif not self.failed.cancelled():
                self.failed.exception()  # retrieved
        if self._owns_folder:
            shutil.rmtree(self.run_folder, ignore_errors=True)


def serve(config: Config, *, is_new_token_wanted: bool = False) -> int:
    """`minmo serve`: exit status 0 after an ordinary end."""
    logging.basicConfig(level=config.agent.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    try:
        return asyncio.run(_serve(config, is_new_token_wanted))
    except StartError as error:
        print(f"minmo: {error}")
        return 1


async def _serve(config: Config, is_new_token_wanted: bool) -> int:
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    stack = Stack(config, is_new_token_wanted=is_new_token_wanted)
    starting = asyncio.ensure_future(stack.__aenter__())
    stopped = asyncio.ensure_future(signals.get())
    first: set[asyncio.Future[Any]] = {starting, stopped}
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    starting.result()
    print(f"ready: call sip:100@{stack.sip_address}, page {stack.web_url}", flush=True)
    assert stack.failed is not None
    try:
        either: set[asyncio.Future[Any]] = {stopped, stack.failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if stack.failed.done():
            raise StartError(str(stack.failed.exception()))
        print("no new calls; waiting for the last one (again to end them)", flush=True)
        again = asyncio.ensure_future(signals.get())
        draining = asyncio.ensure_future(stack.drain())
        end: set[asyncio.Future[Any]] = {again, draining}
        await asyncio.wait(end, return_when=asyncio.FIRST_COMPLETED)
        for task in (again, draining):
            task.cancel()
        await asyncio.gather(again, draining, return_exceptions=True)
    finally:
        stopped.cancel()
        await stack.stop()
    return 0


def _with_fixed_ports(config: Config) -> Config:
    """A port of 0 is chosen once, here: a worker that is started again must be found where it was."""
    telephony, web = config.telephony, config.web
    if not telephony.sip_port:
        telephony = dataclasses.replace(telephony, sip_port=free_port(socket.SOCK_DGRAM, telephony.sip_bind))
    if not web.port:
        web = dataclasses.replace(web, port=free_port(socket.SOCK_STREAM, web.host))
    storage = dataclasses.replace(config.storage, folder=config.storage.folder.absolute())  # children run elsewhere
    return dataclasses.replace(config, telephony=telephony, web=web, storage=storage)


def _with_browser_workers(config: Config, has_web: bool) -> Config:
    """Browsers call through the page, and need the optional packages: without either no worker for them is started."""
    if has_web and importlib.util.find_spec("aiortc") is not None:
        return config
    return dataclasses.replace(config, webrtc=dataclasses.replace(config.webrtc, num_workers=0))


def free_port(kind: socket.SocketKind, host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as probe:
        probe.bind((host.strip("[]"), 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready_json(line: str) -> bool:
    return line.startswith("{") and json.loads(line).get("ready") is True
