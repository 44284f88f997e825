"""`minmo doctor --running`: the agent that runs with these settings, role by role, in words.

The same questions as /readyz of the page (agent/readiness.py), asked from another program of this user by the run
folder's sockets; so it tells also when the page itself is down.
"""

from __future__ import annotations

import asyncio
import contextlib

from agent.config import Config
from agent.doctor import Finding, State
from agent.readiness import Readiness, examine_running, is_sip_worker
from agent.run_folder import SETTINGS_FILE, find_run_folder, read_settings
from agent.supervisor.config import WebConfig
from storage.search import CallReader


def examine_running_agent(config: Config) -> list[Finding]:
    """A role that is down and without which no call is taken is a fault; another one is a warning."""
    folder = find_run_folder(config)
    if folder is None or not (folder / SETTINGS_FILE).is_file():
        return [Finding("agent", State.FAULT, "none runs with these settings: minmo serve")]
    started_with = read_settings(folder / SETTINGS_FILE)  # with the ports that were chosen

    async def ask() -> tuple[Readiness, str]:
        with contextlib.closing(CallReader.open(started_with.storage)) as reader:
            return await examine_running(started_with, folder, reader), await _page_fault(started_with.web)

    found, page_fault = asyncio.run(ask())
    findings = []
    for role in found.roles:
        is_needed = role.role in ("agent", "engine", "storage") or (is_sip_worker(role.role) and not found.is_ready)
        state = State.OK if role.is_up else State.FAULT if is_needed else State.WARNING
        findings.append(Finding(role.role, state, f"{role.text} ({role.milliseconds:.0f} ms)"))
    page = Finding("web", State.WARNING, page_fault) if page_fault else Finding("web", State.OK, "listens")
    verdict = "a call would be taken" if found.is_ready else "no call would be taken"
    return [*findings, page, Finding("ready", State.OK if found.is_ready else State.FAULT, verdict)]


async def _page_fault(web: WebConfig) -> str:
    """Why the page cannot be reached; calls do not depend on it."""
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_connection(web.host.strip("[]"), web.port)
        writer.close()
    except (OSError, TimeoutError):
        return f"the page does not answer at port {web.port}"
    return ""
