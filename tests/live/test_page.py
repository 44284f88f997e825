"""The supervisors' page in a real browser: the first-start token, a call while it is spoken and after it, and a caller
whose display name is an attack.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pjsua2")

from agent.caller import run_caller  # noqa: E402
from agent.caller_script import CallerScript, Say, Wait, WaitForAgent  # noqa: E402
from tests.live.browser import Browser, browser  # noqa: E402
from tests.live.served import Served, wait_for, what_was  # noqa: E402
from tests.live.speech import clip_pcm  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("chromium")]
# Asked until all answer: on a busy machine one of them may not within its two seconds.
READY = """
(async () => {
  for (let attempt = 0; ; attempt += 1) {
    const answer = await fetch('/readyz');
    const { is_ready, roles } = await answer.json();
    if (answer.status === 200 || attempt === 20) return [answer.status, is_ready, roles.map((role) => role.role)];
    await new Promise((done) => setTimeout(done, 1000));
  }
})()
"""
ATTACK = "<script>window.owned=1</script><img src=x onerror=window.owned=2>"


def sign_in(page: Browser, token: str) -> None:
    page.wait("document.getElementById('token')")
    page.value(f"document.getElementById('token').value = {json.dumps(token)}")
    page.value("setTimeout(() => document.querySelector('form').requestSubmit())")


async def ask_until(is_over: threading.Event, address: str) -> None:
    """An attacker by name who asks once, and hangs up when told to: on a busy machine the answer may take its time."""
    script = CallerScript((WaitForAgent(silent_ms=2_500, timeout_ms=60_000), Say(clip_pcm("hours_day")), Wait(120_000)))
    calling = asyncio.create_task(run_caller(f"sip:100@{address}", script, from_user="mallory", display_name=ATTACK))
    await asyncio.to_thread(is_over.wait, 200)
    calling.cancel()  # its worker says BYE
    with contextlib.suppress(asyncio.CancelledError):
        await calling


def was_answered(call: dict[str, Any] | None) -> bool:
    """The caller's words are kept, and the agent has spoken since."""
    roles = [turn["role"] for turn in call["turns"] if turn["end_sample"] is not None] if call else []
    return "caller" in roles and "agent" in roles[roles.index("caller") :]


def test_supervisor_reads_a_call_while_it_is_spoken_and_a_display_name_is_only_text(
    served: Served, tmp_path: Path
) -> None:
    is_answered = threading.Event()
    calling = threading.Thread(target=lambda: asyncio.run(ask_until(is_answered, served.address)), daemon=True)
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(browser(tmp_path))
        page.open(served.page_url)
        page.wait("location.pathname === '/login'")
        sign_in(page, "wrong")
        page.wait("document.querySelector('.problem')")
        assert "not the token" in page.text()
        page.complaints.clear()  # the browser logs the 401
        sign_in(page, served.token)
        page.wait("location.pathname === '/' && document.getElementById('connection').textContent === 'live'")

        status, is_ready, roles = page.value(READY)  # the shipped engine's self-test, OPTIONS at the worker's port, ...
        assert (status, is_ready) == (200, True)
        assert set(roles) >= {"worker", "agent", "engine", "storage"}
        figures = page.value("fetch('/metrics').then((answer) => answer.text())")
        assert 'minmo_role_up{role="engine"}' in figures
        page.complaints.clear()

        stack.callback(is_answered.set)  # whatever fails: the line is free for the next test
        calling.start()
        is_it = f"link => link.querySelector('.who').textContent === {json.dumps(ATTACK)}"
        row = f"[...document.querySelectorAll('#calls a')].find({is_it})"
        page.wait(f"{row} && {row}.querySelector('.badge').textContent === 'now'", 60)
        page.value(f"{row}.click()")
        transcript = "document.querySelector('.transcript').innerText"
        page.wait(f"document.querySelector('.transcript') && {transcript}.includes('how can i help you')", 60)
        assert page.value("document.querySelector('.heading .badge').textContent") == "now"
        page.picture(tmp_path / "live.png")

        wait_for(lambda: was_answered(served.call_of("mallory")), 90, "no answer")
        is_answered.set()
        calling.join(30)
        assert not calling.is_alive()
        page.wait("document.querySelector('audio') && document.querySelector('audio').readyState >= 1", 30)
        page.picture(tmp_path / "ended.png")
        page.command("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        page.picture(tmp_path / "ended_on_a_phone.png")
        assert page.value("document.querySelector('.transcript .words').clientWidth") > 250
        call = served.closed_call_of("mallory")
        said = page.value(transcript)
        assert what_was(call, "caller") and what_was(call, "caller") in said
        assert all(turn["heard_text"] in said for turn in call["turns"] if turn["role"] == "agent")
        seconds = page.value("document.querySelector('audio').duration")
        recorded = call["recording"]
        assert abs(seconds - recorded["num_samples"] / recorded["sample_rate_hz"]) < 0.2

        facts = page.value("document.querySelector('.facts').innerText")
        assert "first word" in facts and " ms" in facts.partition("first word")[2].splitlines()[1]
        assert page.value("document.querySelector('h2').textContent") == ATTACK
        assert page.value("document.querySelectorAll('main img, main script, #calls img, #calls script').length") == 0
        assert page.value("window.owned") is None
        assert page.complaints == []
    assert (tmp_path / "live.png").stat().st_size > 20_000
