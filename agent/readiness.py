"""Would a call be taken now? Each role is asked by the way that a call would go, all at once, within ANSWER_WITHIN_S.

    agent     its event loop answers over its socket, how late the loop was, whether it is closing
    engine    its self-test answers: silence through the encoder where nobody calls (minmo_runtime/engine.py)
    worker…   SIP media workers: an OPTIONS at their own SIP port (telephony/sip/options.py)
    browser…  media workers for browsers: their event loop answers over the socket that brings them offers
    audiosocket   the media worker for AudioSocket, where it is on: its event loop answers over a socket of its own
    storage   the database answers, the journal's disk has its reserve

Which workers there are, their sockets in the run folder say: so it is known without the agent too. Used by /readyz and
/metrics of the page (agent/supervisor/health.py) and by `minmo doctor --running`. Its words hold no path, no address.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from agent.config import Config
from agent.monitor import AgentStatus, NotRunning, agent_status
from agent.run_folder import AUDIOSOCKET_CHECK, ENGINE_SOCKET, MONITOR_SOCKET, offer_socket
from minmo_runtime.api import StreamLost
from minmo_runtime.client import RuntimeClient
from storage.search import CallReader
from telephony.sip.options import ask_options
from telephony.sip.trunk import reachable
from telephony.webrtc.signaling import OfferFailed, send_check

ANSWER_WITHIN_S = 2.0
_MEDIA_SOCKET = re.compile(r"media(?:-(\d+))?\.sock")


@dataclass(frozen=True)
class RoleState:
    role: str
    is_up: bool
    text: str
    milliseconds: float  # until it answered


@dataclass(frozen=True)
class Readiness:
    """`status`: what the agent said of itself, None when it did not answer."""

    roles: tuple[RoleState, ...]
    status: AgentStatus | None

    @property
    def is_ready(self) -> bool:
        """A call would be taken: agent, engine and storage are up, and one of the SIP workers is."""
        up = {role.role for role in self.roles if role.is_up}
        return {"agent", "engine", "storage"} <= up and any(is_sip_worker(role) for role in up)


class NotUp(Exception):
    """Why a role is not up."""


def is_sip_worker(role: str) -> bool:
    return role.partition("-")[0] == "worker"


async def examine_running(config: Config, run_folder: Path, reader: CallReader) -> Readiness:
    """Every role, in the order in which a call would need it."""
    told: list[AgentStatus] = []
    workers = [
        _asked(f"worker-{index}" if index else "worker", _ask_sip(config, index)) for index in _sip_workers(run_folder)
    ]
    others = [
        _asked(f"browser-{index}", _ask_loop_worker(run_folder / offer_socket(index)))
        for index in range(config.webrtc.num_workers)
    ]
    if config.audiosocket.port:
        others.append(_asked("audiosocket", _ask_loop_worker(run_folder / AUDIOSOCKET_CHECK)))
    roles = await asyncio.gather(
        *workers,
        *others,
        _asked("agent", _ask_agent(run_folder / MONITOR_SOCKET, config, told)),
        _asked("engine", _ask_engine(run_folder / ENGINE_SOCKET)),
        _asked("storage", asyncio.to_thread(_ask_storage, config, reader)),
    )
    return Readiness(tuple(roles), told[0] if told else None)


async def _asked(role: str, ask: Awaitable[str]) -> RoleState:
    begin_s = time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            text, is_up = await ask, True
    except TimeoutError:
        text, is_up = f"no answer within {ANSWER_WITHIN_S:g} s", False
    except NotUp as error:
        text, is_up = str(error), False
    return RoleState(role, is_up, text, round(1_000 * (time.monotonic() - begin_s), 1))


async def _ask_agent(path: Path, config: Config, told: list[AgentStatus]) -> str:
    try:
        status = await agent_status(path)
    except NotRunning:
        raise NotUp("there is none to ask") from None
    told.append(status)
    places = f"{status.num_calls} of {status.max_calls} calls, loop at most {status.worst_lag_ms:.0f} ms late"
    if status.is_closing:
        raise NotUp(f"closing, takes no new calls; {places}")
    if not status.is_engine_connected:
        raise NotUp(f"not connected to the engine; {places}")
    if not status.num_workers:
        raise NotUp(f"not connected to any SIP worker; {places}")
    if status.num_stalls:
        places += f", stood still {status.num_stalls} times for over {config.agent.loop_stall_s:g} s"
    return places


async def _ask_engine(path: Path) -> str:
    try:
        client = await RuntimeClient.connect(path)
    except OSError:
        raise NotUp("there is none to ask") from None
    try:
        await client.check()
    except StreamLost:
        raise NotUp("the self-test failed: the engine's log says why") from None
    finally:
        await client.close()
    return "self-test passed"


async def _ask_sip(config: Config, index: int) -> str:
    telephony = config.telephony
    transport = "udp" if "udp" in telephony.transports else "tcp"
    try:
        status = await ask_options(reachable(telephony.sip_bind), telephony.sip_port + index, transport)
    except OSError:
        raise NotUp("nobody listens at its SIP port") from None
    if status >= 500:
        raise NotUp(f"answered OPTIONS with {status}")
    return f"answered OPTIONS with {status}"


async def _ask_loop_worker(path: Path) -> str:
    try:
        await send_check(path, ANSWER_WITHIN_S)
    except OfferFailed as error:
        if isinstance(error.__cause__, TimeoutError):
            raise TimeoutError from None
        raise NotUp("there is none to ask") from None
    return "answered"


def _ask_storage(config: Config, reader: CallReader) -> str:
    try:
        num_open = reader.num_open_calls()
        free_mib = shutil.disk_usage(config.storage.folder).free >> 20
    except Exception as error:  # noqa: BLE001 - whatever driver and disk say, it is not up
        raise NotUp(f"does not answer: {type(error).__name__}") from None
    reserve_mib = config.storage.journal_reserve_mib
    if free_mib < reserve_mib:
        raise NotUp(f"{free_mib} MiB free, storage.journal_reserve_mib = {reserve_mib}: no new calls")
    return f"{num_open} open calls, {free_mib} MiB free"


def _sip_workers(run_folder: Path) -> range:
    """The first is always there; the others of a pool by their sockets, also one that has just died."""
    found = [_MEDIA_SOCKET.fullmatch(path.name) for path in run_folder.glob("media*.sock")]
    return range(1 + max((int(match[1] or 0) for match in found if match), default=0))
