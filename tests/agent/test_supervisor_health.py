"""For machines that watch us: /healthz, /readyz, /metrics; who may read what, and what stands in it."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.monitor import AgentStatus
from agent.readiness import Readiness, RoleState
from agent.supervisor.api import create_app
from agent.supervisor.auth import Door
from agent.supervisor.config import WebConfig, WebConfigError
from agent.supervisor.health import KEPT_S, Examined
from agent.supervisor.live import LiveTail
from storage.calls import CallStore
from storage.config import StorageConfig

NOW = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)
ORIGIN = "http://localhost:8080"
TOKEN = "a-token-of-sixteen-or-more"
ROLES = ("worker", "agent", "engine", "storage")
Open = Callable[..., "AsyncIterator[httpx.AsyncClient]"]


def readiness(*down: str) -> Readiness:
    status = AgentStatus(max_calls=4, worst_lag_ms=250.0, num_stalls=2)
    return Readiness(tuple(RoleState(role, role not in down, "so", 1.0) for role in ROLES), status)


@pytest.fixture
def store(tmp_path: Path) -> AsyncIterator[CallStore]:
    storage = StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0, group_commit_ms=1)
    made = CallStore(storage)
    yield made
    made.close()


@asynccontextmanager
async def page(
    store: CallStore, folder: Path, *, found: Readiness | None = None, host: str = "127.0.0.1", **web: object
) -> AsyncIterator[httpx.AsyncClient]:
    """Nobody is signed in. `host`: who asks."""
    config = WebConfig(**web)  # type: ignore[arg-type]
    door, _ = Door.open(folder / "web.json", session_s=3_600.0)

    async def examine() -> Readiness:
        assert found is not None
        return found

    app = create_app(
        store.reader, LiveTail(store.reader, poll_ms=50, max_views=2), config, door=door, clock=lambda: NOW,
        examine=examine if found is not None else None,
    )  # fmt: skip
    transport = httpx.ASGITransport(app=app, client=(host, 4_711))
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        yield client


async def test_ready_is_200_and_says_each_role_without_a_session(store: CallStore, tmp_path: Path) -> None:
    async with page(store, tmp_path, found=readiness(), host="203.0.113.9") as client:
        answer = await client.get("/readyz")
    assert answer.status_code == 200 and answer.json()["is_ready"] is True
    assert [role["role"] for role in answer.json()["roles"]] == list(ROLES)


@pytest.mark.parametrize("down", ROLES)
async def test_a_needed_role_that_is_down_is_503_while_the_page_itself_lives(
    store: CallStore, tmp_path: Path, down: str
) -> None:
    async with page(store, tmp_path, found=readiness(down)) as client:
        answer = await client.get("/readyz")
        assert (await client.get("/healthz")).status_code == 200
    assert answer.status_code == 503
    assert [role["role"] for role in answer.json()["roles"] if not role["is_up"]] == [down]


async def test_a_page_without_an_agent_is_never_ready(store: CallStore, tmp_path: Path) -> None:
    async with page(store, tmp_path) as client:
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/metrics")).status_code == 200


async def test_many_who_ask_at_once_ask_the_roles_once() -> None:
    num_asked, now = 0, [0.0]

    async def examine() -> Readiness:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0.01)
        return readiness()

    examined = Examined(examine, lambda: now[0])
    await asyncio.gather(*(examined.now() for _ in range(50)))
    assert num_asked == 1
    now[0] += KEPT_S + 0.1
    await examined.now()
    assert num_asked == 2


async def test_figures_are_for_programs_on_this_machine(store: CallStore, tmp_path: Path) -> None:
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("203.0.113.9", 403), ("", 403)):
        async with page(store, tmp_path, host=host) as client:
            assert (await client.get("/metrics")).status_code == status, host
    behind = {"is_behind_proxy": True, "allowed_hosts": ("calls.example.org",)}
    async with page(store, tmp_path, **behind) as client:  # there everybody comes from this machine
        assert (await client.get("/metrics")).status_code == 403


@pytest.mark.parametrize("is_behind_proxy", [False, True])
async def test_with_a_token_file_the_token_is_a_must_from_everywhere(
    store: CallStore, tmp_path: Path, is_behind_proxy: bool
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    web = {"metrics_token_file": str(tmp_path / "token"), "is_behind_proxy": is_behind_proxy}
    for host in ("127.0.0.1", "203.0.113.9"):
        async with page(store, tmp_path, host=host, allowed_hosts=("calls.example.org",), **web) as client:
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
                assert (await client.get("/metrics", headers=header)).status_code == 401
            answer = await client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"})
            assert answer.status_code == 200


@pytest.mark.parametrize("content", [None, "short", "two words of some length", "\xfcber" * 10])
def test_a_useless_token_file_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content, encoding="utf-8")
    with pytest.raises(WebConfigError, match="web.metrics_token_file = "):
        WebConfig(metrics_token_file=str(tmp_path / "token"))


def figures(answer: httpx.Response) -> dict[tuple[str, ...], float]:
    """(name, label values in order) -> value, as Prometheus reads it."""
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def one_call(store: CallStore, call_id: str, value: float | None, campaign: str = "acme") -> None:
    store.open_call(call_id, did="100", ani="200", campaign=campaign, now=NOW)
    store.append_turn(call_id, "t1", role="caller", heard_text="hi", end_sample=800, now=NOW)
    store.append_turn(call_id, "t2", role="agent", heard_text="yes", start_sample=1_600, now=NOW)
    if value is not None:
        store.add_metric(call_id, "t2", "voice_to_voice_ms", value, now=NOW)
    store.add_metric(call_id, "", "long_jobs", 3.0, source="runtime", now=NOW)
    store.close_call(call_id, disposition="completed", cause="normal", now=NOW)
    store.flush()


async def test_what_happens_is_counted_once_by_campaign_and_what_is_now_is_told(
    store: CallStore, tmp_path: Path
) -> None:
    one_call(store, "before", 90.0)
    store.note_security("flood", "192.0.2.7", now=NOW, count=100)
    async with page(store, tmp_path, found=readiness("engine")) as client:
        one_call(store, "c1", 640.0)
        one_call(store, "c2", 520.0)
        one_call(store, "c3", None, campaign="harbor")
        store.open_call("c4", did="100", ani="200", campaign="harbor", now=NOW)
        store.note_security("flood", "192.0.2.7", now=NOW, count=5)
        store.note_security("malformed", "192.0.2.8", now=NOW)
        store.flush()
        for _ in range(2):  # a second scrape counts nothing again
            told = figures(await client.get("/metrics"))
        assert told[("minmo_calls_total", "acme", "completed")] == 2
        assert told[("minmo_calls_total", "harbor", "completed")] == 1
        assert told[("minmo_calls_open", "harbor")] == 1 and ("minmo_calls_open", "acme") not in told
        assert told[("minmo_voice_to_voice_seconds_count", "acme")] == 2
        assert told[("minmo_voice_to_voice_seconds_sum", "acme")] == pytest.approx(1.16)
        assert told[("minmo_voice_to_voice_seconds_bucket", "acme", "0.5")] == 0
        assert told[("minmo_voice_to_voice_seconds_bucket", "acme", "0.6")] == 1
        assert told[("minmo_turns_unmeasured_total", "harbor")] == 1
        assert told[("minmo_turns_unmeasured_total", "acme")] == 0
        assert (told[("minmo_security_events_total", "flood")], told[("minmo_security_events_total", "malformed")]) == (
            5, 1,
        )  # fmt: skip
        assert (told[("minmo_ready",)], told[("minmo_role_up", "engine")], told[("minmo_role_up", "agent")]) == (
            0,
            0,
            1,
        )
        assert (told[("minmo_agent_loop_lag_seconds",)], told[("minmo_agent_loop_stalls",)]) == (0.25, 2)
        store.close_call("c4", disposition="failed", cause="agent_error", now=NOW)
        one_call(store, "c5", 2_000.0)
        told = figures(await client.get("/metrics"))
        assert told[("minmo_calls_total", "harbor", "failed")] == 1 and ("minmo_calls_open", "harbor") not in told
        assert told[("minmo_voice_to_voice_seconds_count", "acme")] == 3


async def test_summary_tells_answers_without_a_latency(store: CallStore, tmp_path: Path) -> None:
    async with page(store, tmp_path) as client:
        token = Door.open(tmp_path / "web.json", session_s=9.0, is_new_token_wanted=True)[1]
        await client.post("/login", data={"token": token}, headers={"origin": ORIGIN})
        one_call(store, "c1", 640.0)
        told = (await client.get("/api/summary")).json()
        assert (told["num_unmeasured_calls"], told["num_unmeasured_turns"]) == (0, 0)
        one_call(store, "c2", None)
        told = (await client.get("/api/summary")).json()
        assert (told["num_unmeasured_calls"], told["num_unmeasured_turns"]) == (1, 1)
