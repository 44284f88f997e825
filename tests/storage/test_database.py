"""SQLite's safety settings, and PostgreSQL: the DDL always, a live server where its programs are installed."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from storage.calls import CallStore
from storage.config import StorageConfig
from storage.database import create_tables, open_database
from storage.tables import metadata

SERVER_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def test_sqlite_commits_survive_a_power_cut_and_readers_do_not_wait(config: StorageConfig) -> None:
    engine = open_database(config)
    with engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 5_000, "foreign_keys": 1}
    engine.dispose()


def test_creating_tables_twice_changes_nothing(config: StorageConfig) -> None:
    engine = open_database(config)
    create_tables(engine)
    create_tables(engine)
    assert set(sa.inspect(engine).get_table_names()) == set(metadata.tables)
    engine.dispose()


def test_the_same_tables_compile_for_postgresql() -> None:
    dialect = postgresql.dialect()
    ddl = {table.name: str(CreateTable(table).compile(dialect=dialect)) for table in metadata.sorted_tables}
    assert "BIGSERIAL" in ddl["journal"] and "TIMESTAMP WITH TIME ZONE" in ddl["calls"]
    assert "UNIQUE (call_id, seq)" in ddl["journal"]
    for table in metadata.sorted_tables:
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect)).startswith("CREATE INDEX")


@pytest.fixture(scope="module")
def postgresql_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of our own, from the installed programs, on a Unix socket only."""
    pytest.importorskip("psycopg", reason="missing: psycopg")
    programs = SERVER_PROGRAMS[0]
    folder = tmp_path_factory.mktemp("pg")
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "nobody")
        for parent in folder.parents:
            if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    run = [*as_user, str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "minmo", "-N"]
    subprocess.run(run, check=True, capture_output=True, cwd=folder)
    server = subprocess.Popen(
        [*as_user, str(programs / "postgres"), "-D", str(folder / "data"), "-k", str(folder), "-h", ""],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        ready = [str(programs / "pg_isready"), "-h", str(folder), "-U", "minmo", "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready).returncode and time.monotonic() < deadline:
            time.sleep(0.1)
        yield f"postgresql+psycopg://minmo@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # "fast": does not wait for sessions, as SIGTERM would
        server.wait(30)


@pytest.mark.live
@pytest.mark.peers("postgres", "initdb")
def test_whole_call_on_a_live_postgresql(postgresql_url: str, tmp_path: Path, now: dt.datetime) -> None:
    config = StorageConfig(folder=tmp_path, database_url=postgresql_url, journal_reserve_mib=0, group_commit_ms=1)
    store = CallStore(config)
    store.seed_demo_shop()
    store.open_call("c1", did="100", ani="200", now=now)
    store.answer_call("c1", now=now, codec="PCMA/8000")
    store.append_turn("c1", "t1", role="caller", heard_text="Hello there", now=now)
    store.add_metric("c1", "t1", "duck_ms", 1, now=now)
    store.add_metric("c1", "t1", "duck_ms", 2, now=now)
    store.update_call("c1", now=now, style={"language": "en"})
    store.close()
    store = CallStore(config)  # replay on top of what is there
    assert store.close_orphans() == ["c1"]
    call = store.get_call("c1")
    assert (call["state"], call["cause"], call["started_at"], call["answered_at"]) == ("closed", "agent_lost", now, now)
    assert call["turns"][0]["metrics"] == {"duck_ms": 2.0} and call["style"] == {"language": "en"}
    assert [found["call_id"] for found in store.list_calls(text="hello THERE")] == ["c1"]
    assert [event["seq"] for event in store.reader.get_events("c1")] == list(range(7))
    assert store.look_up_order(store.list_orders()[0].order_number) is not None
    store.close()
