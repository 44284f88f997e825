"""Rights apart: who may listen, end a call, take lists away, call from the page; each written to the audit."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from agent.monitor import Monitor
from agent.supervisor.api import create_app
from agent.supervisor.auth import ALL_RIGHTS, Door, Right, WrongToken
from agent.supervisor.config import WebConfig
from agent.supervisor.live import LiveTail
from agent.supervisor.serve import browser_desk
from storage import show, tables
from storage.calls import CallStore
from storage.config import StorageConfig
from storage.export import CallFilter
from telephony.webrtc.config import WebRtcConfig
from telephony.webrtc.signaling import Answered, Offer, Refused, Reply

NOW = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)
ORIGIN = "http://localhost:8080"
FORMULA = '=HYPERLINK("http://evil","x")'


@dataclass
class FakeCall:
    sample_rate_hz: int = 16_000
    ended_with: list[str] = field(default_factory=list)
    kept: list[tuple[bool, str]] = field(default_factory=list)

    def hang_up(self, cause: str) -> None:
        self.ended_with.append(cause)

    def keep_recording(self, is_kept: bool, by: str) -> None:
        self.kept.append((is_kept, by))


class Workers:
    """Stands for the media workers."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []
        self.reply: Reply = Answered(leg_id="b1", sdp="v=0 answer")

    async def offer(self, offer: Offer) -> Reply:
        self.offers.append(offer)
        return self.reply


@dataclass
class Page:
    store: CallStore
    storage: StorageConfig
    door: Door
    client: httpx.AsyncClient
    call: FakeCall
    workers: Workers
    monitor: Monitor
    live: LiveTail

    async def sign_in(self, *rights: Right) -> None:
        token = self.door.add_person("ann", frozenset(rights))
        answer = await self.client.post("/login", data={"token": token}, headers={"origin": ORIGIN})
        assert answer.status_code == 303, answer.text

    async def post(self, path: str, body: object = None) -> httpx.Response:
        return await self.client.post(path, json=body if body is not None else {}, headers={"origin": ORIGIN})

    def audited(self) -> list[tuple[str, str, str]]:
        with self.store.engine.connect() as connection:
            rows = connection.execute(sa.select(tables.audit).order_by(tables.audit.c.id)).all()
        return [(row.actor, row.action, row.object_id) for row in rows]


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    storage = StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0, group_commit_ms=1)
    store = CallStore(storage)
    store.open_call("c1", did="100", ani="+49301", display_name=FORMULA, campaign="acme", now=NOW)
    recorder = store.start_recording("c1", policy="always", now=NOW)
    for lane in ("caller", "agent"):
        recorder.push(lane, 0, bytes(2 * 4_000))
    store.append_turn("c1", "t1", role="caller", heard_text="where is my order", now=NOW)
    store.add_metric("c1", "t1", "voice_to_voice_ms", 640.0, now=NOW)
    store.close_call("c1", disposition="completed", cause="normal", now=NOW + dt.timedelta(seconds=9))
    store.open_call("c2", did="100", ani="200", campaign="other", now=NOW + dt.timedelta(hours=1))
    store.flush()
    call = FakeCall()
    monitor = Monitor({"c2": call})
    server = await monitor.serve(tmp_path / "monitor.sock")
    door, _ = Door.open(tmp_path / "web.json", session_s=3_600.0)
    workers = Workers()
    desk = browser_desk(WebRtcConfig(), [], 1.0, store.reader)
    desk.off_because, desk.workers = "", workers  # type: ignore[assignment]
    live = LiveTail(store.reader, poll_ms=50, max_views=2)
    app = create_app(
        store.reader, live, WebConfig(), door=door, clock=lambda: NOW, desk=desk,
        monitor_socket=tmp_path / "monitor.sock",
    )  # fmt: skip
    transport = httpx.ASGITransport(app=app, client=("203.0.113.9", 4_711))
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        yield Page(store, storage, door, client, call, workers, monitor, live)
    server.close()
    store.close()


async def test_without_a_right_each_act_is_refused_by_name_and_nothing_happens(page: Page) -> None:
    await page.sign_in()
    answers = {
        "listen": await page.client.get("/api/calls/c2/listen"),
        "hang_up": await page.post("/api/calls/c2/hang-up"),
        "pause_recording": await page.post("/api/calls/c2/recording/pause"),
        "playback": await page.client.get("/api/calls/c1/recording"),
        "right playback": await page.client.get("/api/calls/c1/peaks"),
        "right export": await page.client.get("/api/calls?limit=101"),
        "export": await page.client.get("/api/export/calls.csv"),
        "call": await page.post("/api/browser-calls/tokens"),
    }
    for right, answer in answers.items():
        assert answer.status_code == 403, right
        assert right in answer.json()["error"]
    assert page.call.ended_with == [] and page.call.kept == []
    assert [action for _, action, _ in page.audited()] == ["login"]
    assert (await page.client.get("/api/calls/c1")).status_code == 200  # seeing needs no right


async def test_one_right_does_not_bring_another(page: Page) -> None:
    await page.sign_in(Right.LISTEN)
    assert (await page.post("/api/calls/c2/hang-up")).status_code == 403
    await page.sign_in(Right.HANG_UP)
    assert (await page.client.get("/api/calls/c2/listen")).status_code == 403
    assert (await page.client.get("/api/me")).json()["rights"] == ["hang_up"]


async def test_hearing_a_recording_and_its_peaks_is_audited_under_the_persons_name(page: Page) -> None:
    await page.sign_in(Right.PLAYBACK)
    assert (await page.client.get("/api/calls/c1/recording", headers={"range": "bytes=0-99"})).status_code == 206
    assert (await page.client.get("/api/calls/c1/peaks")).json()["seconds"] == pytest.approx(0.5)
    assert {("ann", "listen", "c1"), ("ann", "peaks", "c1")} <= set(page.audited())


async def test_lists_are_audited_with_what_was_searched_and_are_bounded_without_the_right_to_export(page: Page) -> None:
    await page.sign_in()
    for _ in range(3):  # the console asks again and again
        assert len((await page.client.get("/api/calls?text=order&limit=100")).json()["calls"]) == 1
    assert (await page.client.get("/api/calls?state=open&now=1&limit=100")).status_code == 200
    with page.store.engine.connect() as connection:
        rows = connection.execute(sa.select(tables.audit.c.detail).where(tables.audit.c.action == "list")).scalars()
        assert list(rows) == [
            {"filters": {"text": "order", "limit": 100}}, {"filters": {"state": "open", "limit": 100}}
        ]  # fmt: skip
    await page.sign_in(Right.EXPORT)
    assert len((await page.client.get("/api/calls?limit=500")).json()["calls"]) == 2


@pytest.mark.parametrize("path", ["/api/calls", "/api/calls/c1", "/api/calls/c1/peaks", "/api/calls/c1/recording"])
async def test_what_cannot_be_audited_is_not_shown(page: Page, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("insert", {}, Exception("disk full"))

    await page.sign_in(Right.PLAYBACK)
    monkeypatch.setattr("agent.supervisor.rights.append_audit", broken)
    with pytest.raises(sa.exc.OperationalError):
        await page.client.get(path)


async def test_a_live_view_of_all_calls_goes_back_a_little_and_further_only_with_the_right_to_export(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.supervisor.api.MAX_CAUGHT_UP", 2)
    from_where: list[int | None] = []

    async def stream(*, after_id: int | None, **_: object) -> AsyncIterator[str]:
        from_where.append(after_id)
        yield ""

    monkeypatch.setattr(page.live, "stream", stream)
    last = page.store.reader.last_journal_id()
    assert last > 3
    await page.sign_in()
    for address in ("/api/live?after_id=0", "/api/live?call_id=c1&after_id=0", "/api/live"):
        await page.client.get(address)
    await page.sign_in(Right.EXPORT)
    await page.client.get("/api/live", headers={"last-event-id": "1"})
    assert from_where == [last - 2, 0, None, 1]
    assert [("ann", "follow", ""), ("ann", "follow", "c1")] == [row for row in page.audited() if row[1] == "follow"]


def test_people_of_before_playback_keep_what_they_could_hear_live_and_lose_it_aloud_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "web.json"
    door, _ = Door.open(path, session_s=100.0)
    tokens = {name: door.add_person(name, frozenset()) for name in ("ann", "bob")}
    old = json.loads(path.read_bytes())
    del old["version"]
    old["people"]["ann"]["rights"] = ["listen", "recording"]
    old["people"]["bob"]["rights"] = ["export"]
    path.write_text(json.dumps(old))
    door, token = Door.open(path, session_s=100.0)
    assert token is None
    people = {person.name: person.rights for person in door.people()}
    assert people["supervisor"] == ALL_RIGHTS
    assert people["ann"] == {Right.LISTEN, Right.PLAYBACK, Right.PAUSE_RECORDING}
    assert people["bob"] == {Right.EXPORT}
    assert "bob can no longer hear recordings" in caplog.text and "ann" not in caplog.text
    cookie = door.login(tokens["bob"], "a", 0.0)  # the token is what it was
    assert door.change_rights("bob", frozenset({Right.PLAYBACK})) and not door.change_rights("eve", frozenset())
    person = door.who(cookie, 1.0)
    assert person is not None and person.rights == {Right.PLAYBACK}
    assert {p.name: p.rights for p in Door.open(path, session_s=100.0)[0].people()}["ann"] == people["ann"]


async def test_ending_a_call_is_audited_under_the_persons_name_before_it_happens(page: Page) -> None:
    await page.sign_in(Right.HANG_UP)
    assert (await page.post("/api/calls/c2/hang-up")).status_code == 200
    assert page.call.ended_with == ["supervisor"]
    assert ("ann", "hang_up", "c2") in page.audited()
    assert (await page.post("/api/calls/c1/hang-up")).status_code == 404
    assert (await page.post("/api/calls/..%2fx/hang-up")).status_code == 404


async def test_an_audit_that_cannot_be_written_stops_the_act(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("insert", {}, Exception("disk full"))

    await page.sign_in(Right.HANG_UP)
    monkeypatch.setattr("agent.supervisor.interventions.append_audit", broken)
    with pytest.raises(sa.exc.OperationalError):
        await page.post("/api/calls/c2/hang-up")
    assert page.call.ended_with == []


async def test_pausing_the_recording_has_its_own_right_and_is_audited_under_the_persons_name(page: Page) -> None:
    await page.sign_in(Right.PAUSE_RECORDING)
    assert (await page.post("/api/calls/c2/recording/pause")).json() == {"status": "paused"}
    assert (await page.post("/api/calls/c2/recording/go-on")).json() == {"status": "recording"}
    assert page.call.kept == [(False, "supervisor:ann"), (True, "supervisor:ann")]
    actions = page.audited()
    assert ("ann", "recording_pause", "c2") in actions and ("ann", "recording_go_on", "c2") in actions
    assert (await page.post("/api/calls/c1/recording/pause")).status_code == 404  # it is over
    assert (await page.post("/api/calls/c2/recording/delete")).status_code == 422


async def test_listening_is_audited_and_a_call_that_is_over_cannot_be_heard(page: Page) -> None:
    await page.sign_in(Right.LISTEN)
    assert (await page.client.get("/api/calls/c1/listen")).status_code == 404
    assert ("ann", "listen_live", "c1") in page.audited()


async def test_csv_is_one_line_a_call_and_no_formula_of_a_caller_is_run(page: Page) -> None:
    await page.sign_in(Right.EXPORT)
    answer = await page.client.get("/api/export/calls.csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["call_id"] for row in rows] == ["c2", "c1"]
    assert rows[1]["display_name"] == "'" + FORMULA
    assert rows[1]["ani"] == "+49301"
    assert (rows[1]["seconds"], rows[1]["voice_to_voice_ms_p50"]) == ("9.0", "640")
    assert rows[1]["transcript"] == "caller: where is my order"
    assert "attachment" in answer.headers["content-disposition"]
    assert ("ann", "export", "") in page.audited()


async def test_json_has_everything_and_filters_narrow_it(page: Page) -> None:
    await page.sign_in(Right.EXPORT)
    calls = (await page.client.get("/api/export/calls.json", params={"campaign": "acme"})).json()
    assert [call["call_id"] for call in calls] == ["c1"]
    assert calls[0]["turns"][0]["heard_text"] == "where is my order"
    since = {"since": "2026-11-22T16:30:00Z"}
    assert [call["call_id"] for call in (await page.client.get("/api/export/calls.json", params=since)).json()] == [
        "c2"
    ]
    assert (await page.client.get("/api/export/calls.xml")).status_code == 422


def test_export_by_command_line_is_audited_too_and_pages_through_all(tmp_path: Path) -> None:
    storage = StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0, group_commit_ms=1)
    store = CallStore(storage, is_background=False)
    for index in range(230):
        store.open_call(f"c{index}", did="100", ani="1", now=NOW + dt.timedelta(seconds=index))
        store.close_call(f"c{index}", disposition="completed", cause="normal", now=NOW + dt.timedelta(hours=1))
    store.close()
    text = "".join(show.export(storage, "json", CallFilter(), actor="cli:ann", now=NOW))
    assert [call["call_id"] for call in json.loads(text)] == [f"c{index}" for index in reversed(range(230))]
    assert show.verify(storage)["rows"] == 1


async def test_token_starts_one_call_without_a_session_and_says_who_calls(page: Page) -> None:
    await page.sign_in(Right.CALL)
    ticket = (await page.post("/api/browser-calls/tokens", {"did": "200"})).json()
    assert ticket["expires_in_s"] == 60
    page.client.cookies.clear()
    offer = {"token": ticket["token"], "sdp": "v=0 offer" + "x" * 20_000}
    answer = await page.post("/api/browser-calls", offer)
    assert answer.json() == {"call_id": "c-b1", "sdp": "v=0 answer"}
    offered = page.workers.offers[0]
    assert (offered.did, offered.ani, offered.display_name) == ("200", "web-ann", "ann (browser)")
    assert offered.source_address == "203.0.113.9:4711"
    assert (await page.post("/api/browser-calls", offer)).status_code == 401  # a token counts once
    assert (await page.post("/api/browser-calls", offer | {"token": "v1.x.y"})).status_code == 401
    assert (await page.post("/api/browser-calls", offer | {"sdp": "x" * 70_000})).status_code == 413
    elsewhere = await page.client.post("/api/browser-calls", json=offer, headers={"origin": "http://evil.example"})
    assert elsewhere.status_code == 403
    assert len(page.workers.offers) == 1


@pytest.mark.parametrize(("said", "status"), [(503, 503), (603, 503), (488, 488), (404, 404)])
async def test_refusal_reaches_the_browser_with_its_reason(page: Page, said: int, status: int) -> None:
    await page.sign_in(Right.CALL)
    page.workers.reply = Refused(status=said, reason="all lines are busy", retry_after_s=7)
    ticket = (await page.post("/api/browser-calls/tokens", {"did": "100"})).json()
    answer = await page.post("/api/browser-calls", {"token": ticket["token"], "sdp": "v=0"})
    assert (answer.status_code, answer.json()["error"]) == (status, "all lines are busy")
    assert answer.headers["retry-after"] == "7"


def test_removed_person_is_out_at_once_and_another_process_may_do_it(tmp_path: Path) -> None:
    path = tmp_path / "web.json"
    door, _ = Door.open(path, session_s=100.0)
    token = door.add_person("ann", frozenset({Right.LISTEN}))
    cookie = door.login(token, "a", 0.0)
    person = door.who(cookie, 1.0)
    assert person is not None and (person.name, person.rights) == ("ann", frozenset({Right.LISTEN}))
    other_process, _ = Door.open(path, session_s=100.0)
    assert other_process.remove_person("ann") and not other_process.remove_person("ann")
    assert door.who(cookie, 1.0) is None
    with pytest.raises(WrongToken):
        door.login(token, "a", 1.0)


def test_first_person_has_every_right_and_names_are_plain(tmp_path: Path) -> None:
    door, token = Door.open(tmp_path / "web.json", session_s=100.0)
    person = door.who(door.login(token or "", "a", 0.0), 1.0)
    assert person is not None and (person.name, person.rights) == ("supervisor", ALL_RIGHTS)
    for name in ("supervisor", "", "Ann", "a~b", "a.b", "x" * 33):
        with pytest.raises(ValueError, match="name"):
            door.add_person(name, frozenset())
