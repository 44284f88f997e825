"""`minmo db`: what was said, shown and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands.common import AsJson, ConfigFile, fail, settings
from storage import show
from storage.entries import UnknownCall

if TYPE_CHECKING:
    from storage.config import StorageConfig

db = typer.Typer(help="What was said: calls, transcripts, recordings.", no_args_is_help=True)


@db.command(name="list")
def db_list(
    text: Annotated[str, typer.Argument(help="Only calls in which this was said.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Calls, newest first."""
    calls = show.list_calls(settings(config).storage, limit=limit, text=text)
    if as_json:
        typer.echo(show.as_json(calls))
        return
    for row in calls:
        typer.echo(f"{row['call_id']}  {row['started_at']}  {row['ani']} -> {row['did']}  {row['disposition']}")


@db.command(name="show")
def db_show(
    call_id: Annotated[str, typer.Argument(help="Empty = the newest call.")] = "",
    config: ConfigFile = None,
    as_json: AsJson = False,
    events: Annotated[bool, typer.Option(help="With the call's journal.")] = False,
) -> None:
    """One call: transcript as heard, timings from the wire, tools, recording."""
    shown = _found_call(settings(config).storage, call_id, has_events=events)
    if shown is None:
        fail(f"no call {call_id!r}" if call_id else "no call yet")
    if as_json:
        typer.echo(show.as_json(shown))
        return
    for key, value in shown.items():
        if not isinstance(value, (list, dict)):
            typer.echo(f"{key:>24}  {value}")
    for turn in shown.get("turns", []):
        typer.echo(f"{turn['role']:>24}: {turn['heard_text']}")


def _found_call(storage: StorageConfig, call_id: str, *, has_events: bool) -> dict[str, Any] | None:
    """In the store, else among the demo's calls: these have a database of their own, but one wants to look at them."""
    from agent.demo import DEMO_FOLDER

    demo_calls = dataclasses.replace(storage, folder=storage.folder / DEMO_FOLDER.name, database_url="")
    for store in (storage, demo_calls) if demo_calls.folder.is_dir() else (storage,):
        with contextlib.suppress(UnknownCall):
            return show.show_call(store, call_id or show.last_call_id(store), has_events=has_events)
    return None


@db.command(name="export")
def db_export(
    kind: Annotated[
        str, typer.Option("--format", help="csv: one line a call; json: with turns, tools, metrics.")
    ] = "csv",
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.", dir_okay=False)] = None,
    since: Annotated[datetime | None, typer.Option(help="Calls begun from then on (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Calls begun before (UTC).")] = None,
    campaign_name: Annotated[str, typer.Option("--campaign", help="Only of this campaign.")] = "",
    text: Annotated[str, typer.Option(help="Only calls in which this was said.")] = "",
    config: ConfigFile = None,
) -> None:
    """Calls as a file for other programs, newest first. Written to the audit like an export from the page."""
    from storage.export import WRITERS, CallFilter

    if kind not in WRITERS:
        fail(f"--format {kind}: must be {' or '.join(WRITERS)}")
    zoned = [at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at for at in (since, until)]
    wanted = CallFilter(text=text, campaign=campaign_name, since=zoned[0], until=zoned[1])
    pieces = show.export(
        settings(config).storage, kind, wanted, actor=f"cli:{getpass.getuser()}", now=datetime.now(UTC)
    )
    with out.open("w", encoding="utf-8", newline="") if out is not None else contextlib.nullcontext(sys.stdout) as file:
        file.writelines(pieces)


@db.command(name="create")
def db_create(config: ConfigFile = None) -> None:
    """Create what is missing of the tables."""
    typer.echo(show.as_json(show.create(settings(config).storage)))


@db.command(name="seed")
def db_seed(config: ConfigFile = None) -> None:
    """Fill the demo shop's orders."""
    typer.echo(show.as_json(show.seed(settings(config).storage)))


@db.command(name="verify")
def db_verify(config: ConfigFile = None) -> None:
    """Check the audit chain; exit 1 where it is broken."""
    verdict = show.verify(settings(config).storage)
    typer.echo(show.as_json(verdict))
    raise typer.Exit(verdict["broken_at_id"] is not None)


@db.command(name="answers")
def db_answers(
    since: Annotated[datetime | None, typer.Option(help="Calls found out from then on (UTC).")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Who answered the calls we placed (a person, a voicemail, ...), by how long it took to find out."""
    from_utc = since.replace(tzinfo=UTC) if since else None
    rows = show.answers(settings(config).storage, since=from_utc)
    if as_json:
        typer.echo(show.as_json(rows))
        return
    bounds = [each["up_to_ms"] for each in rows[0]["bins"]] if rows else []
    heads = " ".join(f"{'<=' + format(each / 1000, 'g') if each else 'more':>5}" for each in bounds)
    typer.echo(f"{'first verdict':<16} {'calls':>5} {'final':>5} {'p50 ms':>7} {'p95 ms':>7}  {heads} s")
    for row in rows:
        times = [f"{row[name]:.0f}" if row[name] is not None else "-" for name in ("p50_ms", "p95_ms")]
        counts = " ".join(f"{each['n']:>5}" for each in row["bins"])
        typer.echo(
            f"{row['kind']:<16} {row['num_first']:>5} {row['num_final']:>5} {times[0]:>7} {times[1]:>7}  {counts}"
        )


@db.command(name="security")
def db_security(
    kind: Annotated[str, typer.Option(help="Only of this kind, e.g. unlisted_source, flood, malformed.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 100,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """What strangers and broken peers tried, latest first."""
    events = show.security(settings(config).storage, limit=limit, kind=kind)
    if as_json:
        typer.echo(show.as_json(events))
        return
    for row in events:
        typer.echo(
            f"{row['last_at']}  {row['kind']:<16} {row['source_address']:<24} {row['count']:>6}  {row['detail']}"
        )
