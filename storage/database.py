"""Opens the database and creates the tables. SQLite for one machine, PostgreSQL for more; nothing above this file can
tell.

SQLite runs in WAL with synchronous=FULL: a commit that returned survives a power cut, and readers never wait for the
writer.
"""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from storage.config import StorageConfig
from storage.tables import metadata


def open_database(config: StorageConfig) -> Engine:
    """An engine on `config.url`; safe to use from several threads."""
    url = sa.make_url(config.url)
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = sa.create_engine(url)
    busy_timeout_ms = config.busy_timeout_ms

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not open transactions behind SQLAlchemy's back
        for pragma in (
            f"busy_timeout={busy_timeout_ms}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: upgrading a read lock later fails with "locked" whatever the timeout.
        mode = "IMMEDIATE" if connection.get_execution_options().get("writes") else "DEFERRED"
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def create_tables(engine: Engine) -> None:
    """Creates what is missing. Idempotent; two processes may start at once."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": 0x6D696E6D6F})
        metadata.create_all(connection)
    path = engine.url.database
    if engine.dialect.name == "sqlite" and path and path != ":memory:":
        os.chmod(path, 0o600)


def writing(engine: Engine) -> Connection:
    """A connection for a short write transaction: `with writing(engine) as c, c.begin(): ...`."""
    return engine.connect().execution_options(writes=True)


def fitting(table: sa.Table, values: dict[str, Any]) -> dict[str, Any]:
    """Texts cut to their column's length: the journal's payload has the whole, SQLite would not mind, PostgreSQL would
    refuse the row."""
    lengths = {column.name: getattr(column.type, "length", None) for column in table.columns}
    return {
        name: value[: lengths[name]] if isinstance(value, str) and lengths.get(name) else value
        for name, value in values.items()
    }


def insert_new(connection: Connection, table: sa.Table, values: dict[str, Any]) -> bool:
    """Inserts unless the row is already there; true when it was new. Makes every retry harmless."""
    values = fitting(table, values)
    if connection.dialect.name == "postgresql":  # its driver gives no row count here, SQLite before 3.35 no RETURNING
        first_key = next(iter(table.primary_key))
        statement = postgresql.insert(table).values(values).on_conflict_do_nothing().returning(first_key)
        return connection.execute(statement).first() is not None
    return connection.execute(sqlite.insert(table).values(values).on_conflict_do_nothing()).rowcount == 1
