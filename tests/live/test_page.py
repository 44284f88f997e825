"""The supervisors' page in a real browser: the first-start token, a call while it is spoken and after it, and a caller
whose display name is an attack.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("pjsua2")

from agent.caller import run_caller  # noqa: E402
from agent.caller_script import CallerScript, Hangup, Say, WaitForAgent  # noqa: E402
from tests.live.browser import Browser, browser  # noqa: E402
from tests.live.served import Served, what_was  # noqa: E402
from tests.live.speech import clip_pcm  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("chromium")]
ATTACK = "<script>window.owned=1</script><img src=x onerror=window.owned=2>"


def sign_in(page: Browser, token: str) -> None:
    page.wait("document.getElementById('token')")
    page.value(f"document.getElementById('token').value = {json.dumps(token)}")
    page.value("setTimeout(() => document.querySelector('form').requestSubmit())")


def test_supervisor_reads_a_call_while_it_is_spoken_and_a_display_name_is_only_text(
    served: Served, tmp_path: Path
) -> None:
    script = CallerScript((
        WaitForAgent(silent_ms=2_500, timeout_ms=60_000), Say(clip_pcm("hours_day")),
        WaitForAgent(silent_ms=3_000, timeout_ms=60_000), Hangup(),
    ))  # fmt: skip
    uri = f"sip:100@{served.address}"
    calling = threading.Thread(
        target=lambda: asyncio.run(run_caller(uri, script, from_user="mallory", display_name=ATTACK)), daemon=True
    )
    with browser(tmp_path) as page:
        page.open(served.page_url)
        page.wait("location.pathname === '/login'")
        sign_in(page, "wrong")
        page.wait("document.querySelector('.problem')")
        assert "not the token" in page.text()
        page.complaints.clear()  # the browser logs the 401
        sign_in(page, served.token)
        page.wait("location.pathname === '/' && document.getElementById('connection').textContent === 'live'")

        calling.start()
        is_it = f"link => link.querySelector('.who').textContent === {json.dumps(ATTACK)}"
        row = f"[...document.querySelectorAll('#calls a')].find({is_it})"
        page.wait(f"{row} && {row}.querySelector('.badge').textContent === 'now'", 60)
        page.value(f"{row}.click()")
        transcript = "document.querySelector('.transcript').innerText"
        page.wait(f"document.querySelector('.transcript') && {transcript}.includes('how can i help you')", 60)
        assert page.value("document.querySelector('.heading .badge').textContent") == "now"
        page.picture(tmp_path / "live.png")

        calling.join(150)
        assert not calling.is_alive()
        page.wait("document.querySelector('audio') && document.querySelector('audio').readyState >= 1", 30)
        page.picture(tmp_path / "ended.png")
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
