"""The page over ASGI: who gets in, what an attacker's texts and addresses do, recordings by id, the live stream."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from agent.supervisor.api import create_app, percentiles
from agent.supervisor.auth import Door
from agent.supervisor.config import WebConfig
from agent.supervisor.guard import OFFER_PATH
from agent.supervisor.live import LiveTail, as_event
from agent.supervisor.recordings import parse_range
from storage.audit import verify_audit
from storage.calls import CallStore
from storage.config import StorageConfig

NOW = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)
ORIGIN = "http://localhost:8080"
ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>'
CONSOLE = Path(__file__).parents[2] / "agent" / "supervisor" / "console"
EVERYTHING = ("/", "/console/console.js", "/api/summary", "/api/calls", "/api/calls/c1", "/api/calls/c1/events",
              "/api/calls/c1/recording", "/api/calls/c1/peaks", "/api/live", "/api/openapi.json")  # fmt: skip


@dataclass
class Page:
    store: CallStore
    client: httpx.AsyncClient
    token: str
    live: LiveTail
    now: dt.datetime = NOW

    async def sign_in(self) -> None:
        answer = await self.client.post("/login", data={"token": self.token}, headers={"origin": ORIGIN})
        assert answer.status_code == 303, answer.text


def fill(store: CallStore) -> None:
    store.open_call("c1", did="100", ani="+49301", display_name=ATTACK, campaign="acme", now=NOW)
    store.note_line("c1", trunk="t", is_withheld=True, is_asserted=False, headers={"X-Customer": ATTACK}, now=NOW)
    recorder = store.start_recording("c1", policy="always", now=NOW)
    sound = np.arange(16_000, dtype=np.int16)
    for at in range(0, 16_000, 800):
        recorder.push("caller", at, sound[at : at + 800].tobytes())
        recorder.push("agent", at, (-sound[at : at + 800]).tobytes())
    store.append_turn("c1", "t1", role="caller", heard_text=ATTACK, now=NOW)
    store.append_turn("c1", "t2", role="agent", generated_text="hello there", now=NOW)
    store.update_turn("c1", "t2", heard_text="hello", was_interrupted=True, now=NOW)
    store.add_metric("c1", "t2", "voice_to_voice_ms", 640.0, now=NOW)
    store.close_call("c1", disposition="completed", cause="normal", now=NOW)
    store.open_call("c2", did="100", ani="200", now=NOW)
    store.flush()


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    storage = StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0, group_commit_ms=1)
    store = CallStore(storage)
    fill(store)
    config = WebConfig(poll_ms=50, max_live_views=2)
    door, token = Door.open(tmp_path / "web.json", session_s=3_600.0)
    live = LiveTail(store.reader, poll_ms=config.poll_ms, max_views=config.max_live_views)
    made = Page(store, None, token or "", live)  # type: ignore[arg-type]
    app = create_app(store.reader, live, config, door=door, clock=lambda: made.now)
    transport = httpx.ASGITransport(app=app, client=("203.0.113.9", 4_711))
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        made.client = client
        yield made
    store.close()


# ----------------------------------------------------------------- who gets in


@pytest.mark.parametrize("path", EVERYTHING)
async def test_nothing_is_shown_without_signing_in(page: Page, path: str) -> None:
    answer = await page.client.get(path)
    assert (answer.status_code, answer.headers.get("location")) == ((303, "/login") if path == "/" else (401, None))
    assert "acme" not in answer.text and "RIFF" not in answer.text


async def test_every_route_there_is_needs_the_cookie(page: Page) -> None:
    await page.sign_in()
    paths = (await page.client.get("/api/openapi.json")).json()["paths"]
    page.client.cookies.clear()
    open_ones = {"/healthz", "/readyz", "/metrics", "/login", OFFER_PATH}  # the last has a token of its own
    for path in set(paths) - open_ones:
        for method in paths[path]:
            address = path.format(call_id="c1", kind="csv", wanted="pause")
            answer = await page.client.request(method, address, headers={"origin": ORIGIN, "content-length": "0"})
            assert answer.status_code == 401, (method, path)


async def test_token_leads_in_and_the_cookie_is_out_of_scripts_reach(page: Page) -> None:
    answer = await page.client.post("/login", data={"token": page.token}, headers={"origin": ORIGIN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "path=/" in cookie
    assert (await page.client.get("/")).status_code == 200
    page.now += dt.timedelta(hours=2)
    assert (await page.client.get("/api/calls")).status_code == 401  # the session has ended


async def test_wrong_token_then_too_many(page: Page) -> None:
    for _ in range(5):
        answer = await page.client.post("/login", data={"token": ATTACK}, headers={"origin": ORIGIN})
        assert answer.status_code == 401 and "set-cookie" not in answer.headers and "alert(" not in answer.text
    answer = await page.client.post("/login", data={"token": page.token}, headers={"origin": ORIGIN})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0


async def test_signing_out_ends_the_session_on_the_server(page: Page) -> None:
    await page.sign_in()
    cookies = dict(page.client.cookies)
    answer = await page.client.post("/logout", headers={"origin": ORIGIN})
    assert answer.status_code == 303
    page.client.cookies.update(cookies)
    assert (await page.client.get("/api/calls")).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8080", "", "169.254.169.254", "127.0.0.1.evil"]
)
async def test_foreign_host_header_is_refused(page: Page, host: str) -> None:
    await page.sign_in()
    answer = await page.client.get("/api/calls", headers={"host": host})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://localhost:8080", "http://localhost:9999", "null", "http://localhost", ""]
)
async def test_request_from_another_origin_is_refused(page: Page, origin: str) -> None:
    await page.sign_in()
    for method, path in (("POST", "/logout"), ("POST", "/login"), ("GET", "/api/live"), ("GET", "/api/calls")):
        answer = await page.client.request(method, path, headers={"origin": origin, "content-length": "0"})
        assert answer.status_code == 403, (method, path)


async def test_changing_request_without_an_origin_is_refused(page: Page) -> None:
    answer = await page.client.post("/login", data={"token": page.token})
    assert answer.status_code == 403


async def test_large_or_unmeasured_bodies_are_refused(page: Page) -> None:
    big = await page.client.post("/login", content=b"x" * 5_000, headers={"origin": ORIGIN})

    async def chunks() -> AsyncIterator[bytes]:
        yield b"token=x"

    chunked = await page.client.post("/login", content=chunks(), headers={"origin": ORIGIN})
    assert (big.status_code, chunked.status_code) == (413, 413)


# ------------------------------------------------------------- attackers' texts


async def test_display_name_is_data_and_never_markup(page: Page) -> None:
    await page.sign_in()
    answer = await page.client.get("/api/calls/c1")
    assert answer.json()["display_name"] == ATTACK
    line = {"trunk": "t", "is_withheld": True, "is_asserted": False, "headers": {"X-Customer": ATTACK}}
    assert answer.json()["line"] == line
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/login"):
        assert "alert(" not in (await page.client.get(path)).text


async def test_no_script_but_ours_can_run(page: Page) -> None:
    await page.sign_in()
    for path in ("/", "/login", "/api/calls", "/nothing"):
        policy = (await page.client.get(path)).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
    html = "".join(path.read_text(encoding="utf-8") for path in CONSOLE.glob("*.html"))
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", html)


def test_console_makes_elements_from_text_only() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in CONSOLE.glob("*.js"))
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "srcdoc",
    ):
        assert forbidden not in scripts
    assert "https://" not in scripts and "http://" not in scripts


def test_event_stream_cannot_be_broken_out_of() -> None:
    text = "hi\n\nevent: journal\ndata: {}\r\u2028\n\n"
    row = {"id": 7, "call_id": "c1", "seq": 1, "at": NOW, "kind": "x", "payload": {"text": text}}
    event = as_event(row)
    assert event.endswith("\n\n") and event.count("\n\n") == 1 and event.count("event:") == 2
    data = next(line for line in event.split("\n") if line.startswith("data: "))
    assert json.loads(data[6:])["payload"]["text"] == text


async def test_unknown_and_crooked_ids_are_all_404(page: Page) -> None:
    await page.sign_in()
    for call_id in ("nobody", "..", "%2e%2e%2fc1", "..%2f..%2fetc%2fpasswd", "c1%00", "c1'--", "a" * 100):
        for suffix in ("", "/events", "/recording", "/peaks"):
            answer = await page.client.get(f"/api/calls/{call_id}{suffix}")
            is_empty_list = answer.status_code == 200 and answer.json() == {"events": []}
            assert answer.status_code == 404 or is_empty_list, (call_id, suffix, answer.status_code)


async def test_no_path_reaches_the_file_system(page: Page) -> None:
    await page.sign_in()
    for name in (
        "../api.py",
        "..%2fapi.py",
        "%2e%2e/auth.py",
        "index.html",
        "",
        "console.js/../../auth.py",
        "/etc/passwd",
    ):
        answer = await page.client.get(f"/console/{name}")
        assert answer.status_code == 404, name
    assert (await page.client.get("/console/console.js")).headers["content-type"].startswith("text/javascript")


async def test_no_answer_holds_a_path_of_the_server(page: Page, tmp_path: Path) -> None:
    await page.sign_in()
    for path in EVERYTHING:
        if path == "/api/live":
            continue
        answer = await page.client.get(path)
        assert str(tmp_path) not in answer.text and "recordings/" not in answer.text, path


async def test_bad_parameters_are_refused_by_name_without_echo(page: Page) -> None:
    await page.sign_in()
    answer = await page.client.get("/api/calls", params={"limit": "9999", "before": ATTACK, "state": "x"})
    assert answer.status_code == 422 and "limit" in answer.text and "alert" not in answer.text


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/api/calls", "before", "0001-01-01T00:00:00+14:00"),
        ("/api/export/calls.csv", "since", "9999-12-31T23:59:59-14:00"),
        ("/api/live", "after_id", "9" * 23),
        ("/api/calls/c1/events", "after_seq", "9" * 23),
    ],
)
async def test_what_no_calendar_and_no_database_holds_is_refused_too(
    page: Page, path: str, name: str, value: str
) -> None:
    await page.sign_in()
    answer = await page.client.get(path, params={name: value})
    assert answer.status_code == 422 and name in answer.text


async def test_time_without_a_zone_is_utc(page: Page) -> None:
    await page.sign_in()
    before, after = NOW.replace(tzinfo=None), (NOW + dt.timedelta(minutes=1)).replace(tzinfo=None)
    counts = [
        len((await page.client.get("/api/calls", params={"before": at.isoformat(), "limit": 10})).json()["calls"])
        for at in (before, after)
    ]
    assert counts[0] < counts[1]


# ------------------------------------------------------------------- the content


async def test_list_detail_and_summary(page: Page) -> None:
    await page.sign_in()
    calls = (await page.client.get("/api/calls")).json()["calls"]
    assert {call["call_id"]: call["state"] for call in calls} == {"c1": "closed", "c2": "open"}
    found = (await page.client.get("/api/calls", params={"text": "hello", "state": "closed"})).json()["calls"]
    assert [call["call_id"] for call in found] == ["c1"]
    call = (await page.client.get("/api/calls/c1")).json()
    assert call["turns"][1]["metrics"] == {"voice_to_voice_ms": 640.0}
    assert call["recording"] == {"num_samples": 16_000, "sample_rate_hz": 8_000}
    summary = (await page.client.get("/api/summary")).json()
    assert summary["num_open_calls"] == 1
    assert summary["latencies"] == [{"name": "voice_to_voice_ms", "n": 1, "p50": 640.0, "p95": 640.0}]


async def test_recording_whole_and_in_ranges(page: Page) -> None:
    await page.sign_in()
    path = "/api/calls/c1/recording"
    whole = await page.client.get(path)
    size = 44 + 16_000 * 4
    assert (whole.status_code, len(whole.content), whole.headers["accept-ranges"]) == (200, size, "bytes")
    frames, rate = soundfile.read(io.BytesIO(whole.content), dtype="int16")
    assert (
        rate == 8_000
        and np.array_equal(frames[:, 0], np.arange(16_000))
        and np.array_equal(frames[:, 1], -frames[:, 0])
    )
    for header, first, last in (
        ("bytes=0-99", 0, 99),
        ("bytes=1000-1999", 1_000, 1_999),
        (f"bytes={size - 10}-", size - 10, size - 1),
        ("bytes=-10", size - 10, size - 1),
        ("bytes=0-", 0, size - 1),
    ):
        part = await page.client.get(path, headers={"range": header})
        assert part.status_code == 206, header
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert part.content == whole.content[first : last + 1]
    refused = await page.client.get(path, headers={"range": f"bytes={size}-"})
    assert (refused.status_code, refused.headers["content-range"]) == (416, f"bytes */{size}")
    head = await page.client.head(path)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    assert (await page.client.get("/api/calls/c2/recording")).status_code == 404


async def test_peaks_have_both_lanes(page: Page) -> None:
    await page.sign_in()
    peaks = (await page.client.get("/api/calls/c1/peaks", params={"bins": 10})).json()
    assert peaks["seconds"] == 2.0 and len(peaks["caller"]) == len(peaks["agent"]) == 10
    assert peaks["caller"] == sorted(peaks["caller"])


async def test_views_and_listening_are_audited_once(page: Page) -> None:
    await page.sign_in()
    for _ in range(3):
        await page.client.get("/api/calls/c1")
        await page.client.get("/api/calls/c1/recording")
    verdict = verify_audit(page.store.engine)
    assert (verdict.num_rows, verdict.broken_at_id) == (3, None)  # login, view, listen


async def test_live_view_sees_what_the_agent_acknowledges_and_goes_on_after_a_break(page: Page) -> None:
    stream = page.live.stream(call_id="c2")
    ready = await anext(stream)
    page.store.append_turn("c2", "t1", role="caller", heard_text="hello", now=NOW)
    event = await asyncio.wait_for(anext(stream), 5)
    assert '"heard_text": "hello"' in event
    await stream.aclose()  # type: ignore[attr-defined]
    assert page.live.num_views == 0
    last_id = int(re.findall(r"^id: (\d+)", ready, re.MULTILINE)[0])
    again = page.live.stream(call_id="c2", after_id=last_id)
    await anext(again)
    assert await asyncio.wait_for(anext(again), 5) == event
    await again.aclose()  # type: ignore[attr-defined]


async def test_live_view_ends_with_its_session(page: Page) -> None:
    is_allowed = True
    stream = page.live.stream(is_allowed=lambda: is_allowed)
    await anext(stream)
    is_allowed = False
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(stream), 5)


async def test_one_live_view_too_many_is_refused(page: Page) -> None:
    await page.sign_in()
    page.live.num_views = 2
    answer = await page.client.get("/api/live")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", (0, 999)),
        ("bytes=0-99", (0, 99)),
        ("bytes=100-", (100, 999)),
        ("bytes=-100", (900, 999)),
        ("bytes=-5000", (0, 999)),
        ("bytes=0-5000", (0, 999)),
        ("bytes=1000-", None),
        ("bytes=5-4", None),
        ("bytes=-0", None),
        ("bytes=0-1,5-6", (0, 999)),
        ("bytes=-", (0, 999)),
        ("items=0-5", (0, 999)),
        ("bytes=" + "9" * 50 + "-", (0, 999)),
    ],
)
def test_range_header(header: str, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 1_000) == expected


def test_percentiles_are_nearest_rank() -> None:
    assert percentiles("x", [4, 1, 3, 2]) == {"name": "x", "n": 4, "p50": 2, "p95": 4}
