"""The whole stack with a pool of SIP workers: as many as its calls need, all served by one agent; and a
call whose caller sends no sound has one-way audio named in its record."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

pytest.importorskip("pjsua2")

from agent.app import Stack  # noqa: E402
from agent.config import load_config  # noqa: E402
from tests.live.sip_agent import until  # noqa: E402
from tests.live.sipp import sipp  # noqa: E402
from tests.live.stack import _FAKE_CHECKPOINT, _FAKE_ENGINE, REPOSITORY  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("sipp")]


def rows(folder, query):
    database = folder / "var" / "minmo.sqlite3"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


async def test_pool_has_as_many_workers_as_its_calls_need_and_one_way_audio_is_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "checkpoint.toml").write_text(_FAKE_CHECKPOINT)
    settings = {
        "telephony": {"sip_port": 0, "pool_calls": 4}, "storage": {"folder": tmp_path / "var"},
        "agent": {"checkpoint": str(tmp_path / "fake")},
    }  # fmt: skip
    config = load_config(None, settings)
    async with Stack(config, has_web=False, engine_command=(_FAKE_ENGINE,)) as stack:
        workers = [name for name in stack.children if name.startswith("worker")]
        assert len(workers) == stack.num_sip_workers == 2  # the wheel holds 4, one stays free: 3 each
        host, _, port = stack.sip_address.rpartition(":")
        for number in range(2):
            folder = tmp_path / f"caller-{number}"
            folder.mkdir()
            with sipp(folder, f"{host}:{int(port) + number}", 4000, "", ("-m", "1"), timeout_s=60) as process:
                await until(lambda: process.poll() is not None, 60)  # noqa: B023
                assert process.returncode == 0
        await until(lambda: [row[0] for row in rows(tmp_path, "select state from calls")] == ["closed"] * 2)
        defects = {row[0] for row in rows(tmp_path, "select kind from defects")}
        assert "one_way_in_missing" in defects
