"""The command line: `minmo serve | demo | call | dial | train | eval | lab | bench | doctor | access | db | campaign`.

Thin: each command reads the settings, calls one function elsewhere and turns its answer into text and an exit status.
Modules are imported inside the commands: `minmo db show` does not wait for torch, and runs where an extra is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from agent.config import Config, ConfigError, load_config
from storage import show
from storage.entries import StorageError, UnknownCall

if TYPE_CHECKING:
    from agent.supervisor.auth import Door, Right
    from storage.config import StorageConfig

SHIPPED_CONFIG = Path(__file__).resolve().parent.parent / "config.toml"
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="minmo", help="A telephone agent that speaks with MinMo.", no_args_is_help=True, add_completion=False
)
access = typer.Typer(help="Who may see the page, and do what there.", no_args_is_help=True)
db = typer.Typer(help="What was said: calls, transcripts, recordings.", no_args_is_help=True)
campaign = typer.Typer(help="Which line is answered how.", no_args_is_help=True)
app.add_typer(access, name="access")
models = typer.Typer(help="The parents' public files: fetch, import, verify.", no_args_is_help=True)
app.add_typer(db, name="db")
app.add_typer(models, name="models")
app.add_typer(campaign, name="campaign")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Settings; default: config.toml here, else the shipped one.")
]
Profile = Annotated[str, typer.Option("--profile", help="Another model: `minmo models list` names them.")]
Names = Annotated[list[str] | None, typer.Argument(help="Profiles or sources; public = what minmo-8b needs.")]
Accept = Annotated[bool, typer.Option("--accept-licence", help="I have read the licences and accept them.")]
Rights = Annotated[
    str,
    typer.Option(
        help="Of listen, playback, hang_up, pause_recording, export, call, dial; with commas. Seeing calls needs none."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings(path: Path | None) -> Config:
    """The given file, else config.toml in this folder, else the shipped one, else the defaults."""
    found = path or next((file for file in (Path("config.toml"), SHIPPED_CONFIG) if file.is_file()), None)
    try:
        return load_config(found)
    except ConfigError as error:
        fail(str(error))


def with_profile(config: Config, profile: str) -> Config:
    """The settings with another model."""
    if not profile:
        return config
    return dataclasses.replace(
        config,
        agent=dataclasses.replace(config.agent, checkpoint=""),
        runtime=dataclasses.replace(config.runtime, profile=profile),
    )


def fail(text: str) -> NoReturn:
    typer.echo(f"minmo: {text}", err=True)
    raise typer.Exit(2)


@contextlib.contextmanager
def needs_training_packages() -> Iterator[None]:
    """What training and evaluating need beyond a call is an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"the package {error.name} is not installed; run: make venv-train")


# ------------------------------------------------------------------ the agent


@app.command()
def serve(
    config: ConfigFile = None,
    profile: Profile = "",
    new_token: Annotated[
        bool, typer.Option(help="Print a new token for the page; the old one no longer opens it.")
    ] = False,
) -> None:
    """Answer calls and serve the supervisors' page, until Ctrl-C."""
    from agent.app import serve as run

    raise typer.Exit(run(with_profile(settings(config), profile), is_new_token_wanted=new_token))


@app.command()
def demo(
    as_json: AsJson = False,
    checkpoint: Annotated[str, typer.Option(help="Another folder of weights.")] = "",
    seed: Annotated[int | None, typer.Option(help="Draw the same order number again.")] = None,
) -> None:
    """A caller dials the agent over SIP on this machine; exit 0 only if everything it claims was true."""
    from agent.demo import run_demo

    raise typer.Exit(run_demo(as_json=as_json, checkpoint=checkpoint, seed=seed))


@app.command()
def call(
    uri: Annotated[str, typer.Argument(help="sip:100@127.0.0.1:5060")],
    play: Annotated[Path | None, typer.Option(help="WAV that the caller says.", exists=True, dir_okay=False)] = None,
    record: Annotated[Path | None, typer.Option(help="Two-channel WAV: left the caller, right the agent.")] = None,
    dtmf: Annotated[str, typer.Option(help="Keys pressed once the agent is silent.")] = "",
) -> None:
    """Call a SIP address with your own audio; prints the timing of both sides as JSON."""
    from agent.caller import call_once

    try:
        report = call_once(uri, play=play, record=record, dtmf=dtmf)
    except ValueError as error:
        fail(str(error))
    typer.echo(json.dumps(report, indent=2))
    raise typer.Exit(not report["answered"])


@app.command(name="dial")
def dial_command(
    party: Annotated[str, typer.Argument(help="A number by the campaign's trunks, or sip:user@host.")],
    campaign_name: Annotated[str, typer.Option("--campaign", help="For which campaign.")],
    request_id: Annotated[str, typer.Option(help="The same again places no second call.")] = "",
    wait: Annotated[bool, typer.Option(help="Until the call is over; exit 0 only if it was answered.")] = False,
    config: ConfigFile = None,
) -> None:
    """Let the running agent call somebody for a campaign; prints JSON."""
    from agent.dial_command import ANSWERED, DialRefused, dial
    from agent.dial_socket import Dial

    target = {"uri": party} if party.startswith("sip:") else {"number": party}
    wanted = Dial(campaign=campaign_name, request_id=request_id, actor=f"cli:{getpass.getuser()}", **target)
    try:
        shown = dial(settings(config), wanted, is_waiting=wait)
    except DialRefused as error:
        fail(str(error))
    typer.echo(json.dumps(shown, indent=2))
    raise typer.Exit(wait and shown["disposition"] not in ANSWERED)


@app.command()
def doctor(
    config: ConfigFile = None,
    as_json: AsJson = False,
    profile: Profile = "",
    running: Annotated[bool, typer.Option("--running", help="Ask the agent that runs: would it take a call?")] = False,
) -> None:
    """What is installed, loaded and free; which bridges stand and why. Exit 1 where something is at fault."""
    from agent.doctor import State, examine
    from agent.doctor_running import examine_running_agent

    known = with_profile(settings(config), profile)
    findings = examine_running_agent(known) if running else examine(known)
    if as_json:
        typer.echo(json.dumps([{"name": f.name, "state": f.state, "text": f.text} for f in findings], indent=2))
    else:
        colours = {State.OK: "green", State.WARNING: "yellow", State.FAULT: "red"}
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            table.add_row(
                finding.name, f"[{colours[finding.state]}]{finding.state}[/]", finding.text.replace("[", r"\[")
            )
        Console().print(table)
    raise typer.Exit(any(finding.state is State.FAULT for finding in findings))


# ------------------------------------------------------------------ model


@app.command()
def train(
    stages: Annotated[list[str], typer.Argument(help="parents | connectors | all | overfit | 0a ... 4")],
    work_dir: Annotated[Path, typer.Option(help="Where data, states and results are kept.")] = Path("work"),
    minutes: Annotated[float | None, typer.Option(help="CPU time for each stage; default: what its TOML says.")] = None,
    again: Annotated[bool, typer.Option(help="Also stages that already passed.")] = False,
) -> None:
    """Train stages in order, resumable; a failed gate stops the chain and is named."""
    from minmo_runtime.training.stage import load_stage
    from minmo_runtime.training.train import GROUPS, expand
    from minmo_runtime.training.train import main as run

    try:
        for name in expand(stages):
            load_stage(name)
    except ValueError as error:
        fail(f"{error}, and the groups {', '.join(GROUPS)}")
    with needs_training_packages():
        status = run(stages, work_dir, None if minutes is None else minutes * 60, again)
    raise typer.Exit(status)


@app.command(name="eval", context_settings=PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Measure recognition, task success and barge-in as defined in docs/evaluation.md."""
    with needs_training_packages():
        from agent.evaluate import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=PASS_ON)
def lab(context: typer.Context) -> None:
    """Real calls over a line spoiled on purpose (loss, jitter, echo, noise), timed from the RTP; --help says more."""
    from agent.lab.run import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="model, media; default: both. engine, parents, gpu, soak: one, with its options"),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Real-time factors of the model and frame gaps of the media; the last line is JSON."""
    from agent.bench import run_bench

    try:
        status = run_bench(settings(config), parts or ())
    except ValueError as error:
        fail(f"bench: {error}")
    raise typer.Exit(status)


# ------------------------------------------------------------------ models


@models.command(name="list")
def models_list(config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Profiles and what each needs; sources, how complete, under which licence."""
    from minmo_runtime.models import overview

    shown = overview(settings(config).runtime.models_folder)
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
        return
    for row in shown["profiles"]:
        typer.echo(f"{row['name']:<16} {', '.join(row['needs']) or 'shipped'}")
    typer.echo(f"\nin {shown['folder']}:")
    for row in shown["sources"]:
        typer.echo(f"{row['name']:<22} {row['state']:<10} {row['size_mb']:>6} MB  {row['licence']}")


@models.command(name="fetch")
def models_fetch(
    names: Names = None,
    config: ConfigFile = None,
    accept: Accept = False,
    hub: Annotated[str, typer.Option(help="huggingface | modelscope")] = "huggingface",
    endpoint: Annotated[str, typer.Option(help="A mirror's address.")] = "",
) -> None:
    """Download what a profile needs; goes on where a broken download stopped."""
    from minmo_runtime import models as files
    from minmo_runtime import profiles

    folder = profiles.models_folder(settings(config).runtime.models_folder)
    try:
        wanted = files.wanted_sources(names or ["public"])
        files.fetch(wanted, folder, hub=hub, endpoint=endpoint, is_accepted=accept, say=typer.echo)
    except files.ModelsError as error:
        fail(str(error))


@models.command(name="import")
def models_import(
    folder: Annotated[Path, typer.Argument(help="Files fetched on another machine.", exists=True, file_okay=False)],
    names: Names = None,
    config: ConfigFile = None,
    accept: Accept = False,
) -> None:
    """Copy what a profile needs out of a folder, for a machine without network."""
    from minmo_runtime import models as files
    from minmo_runtime import profiles

    target = profiles.models_folder(settings(config).runtime.models_folder)
    try:
        files.import_folder(
            files.wanted_sources(names or ["public"]), folder, target, is_accepted=accept, say=typer.echo
        )
    except files.ModelsError as error:
        fail(str(error))


@models.command(name="verify")
def models_verify(names: Names = None, config: ConfigFile = None) -> None:
    """Compare every file with its sum; exit 1 where one differs or is missing."""
    from minmo_runtime import models as files
    from minmo_runtime import profiles

    try:
        wanted = files.wanted_sources(names or ["public"])
        problems = files.verify(wanted, profiles.models_folder(settings(config).runtime.models_folder))
    except files.ModelsError as error:
        fail(str(error))
    for problem in problems:
        typer.echo(problem)
    typer.echo(f"{len(wanted)} sources, {len(problems)} problems")
    raise typer.Exit(bool(problems))


@models.command(name="voice")
def models_voice(
    speech: Annotated[Path, typer.Argument(help="1 to 30 s of one person's clear speech.", exists=True)],
    text: Annotated[str, typer.Option(help="What is said in it, word for word.")],
    consent: Annotated[bool, typer.Option("--speaker-consents", help="This person agreed to be imitated.")] = False,
    name: Annotated[str, typer.Option(help="Name of the voice; the profiles speak with 'agent'.")] = "agent",
    config: ConfigFile = None,
) -> None:
    """Make the prompt voice that CosyVoice 2 continues, from a few seconds of speech."""
    from minmo_runtime import prompt_voice
    from minmo_runtime.profiles import models_folder

    if not consent:
        fail("a voice is a person's: run again with --speaker-consents once that person agreed to be imitated")
    try:
        path = prompt_voice.prepare(speech, text, name, models_folder(settings(config).runtime.models_folder))
    except prompt_voice.PromptVoiceError as error:
        fail(str(error))
    typer.echo(f"prompt voice: {path}")


# ------------------------------------------------------------------ db


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


# ------------------------------------------------------------------ access


@access.command(name="add")
def access_add(
    name: Annotated[str, typer.Argument(help="a-z, 0-9 and _; stands in the audit.")],
    rights: Rights = "",
    config: ConfigFile = None,
) -> None:
    """A token for one more person, shown this once; for one who has a token already, a new one."""
    try:
        typer.echo(_door(config).add_person(name, _rights(rights)))
    except ValueError as error:
        fail(str(error))


@access.command(name="change")
def access_change(name: Annotated[str, typer.Argument()], rights: Rights = "", config: ConfigFile = None) -> None:
    """From now on a person has these rights and no others; the token stays."""
    if not _door(config).change_rights(name, _rights(rights)):
        fail(f"there is no {name!r}")


@access.command(name="remove")
def access_remove(name: Annotated[str, typer.Argument()], config: ConfigFile = None) -> None:
    """Ends a person's token and sessions."""
    if not _door(config).remove_person(name):
        fail(f"there is no {name!r}")


@access.command(name="list")
def access_list(config: ConfigFile = None) -> None:
    """Everybody who may sign in, with the rights."""
    for person in _door(config).people():
        typer.echo(f"{person.name}  {', '.join(sorted(person.rights))}")


def _rights(words: str) -> frozenset[Right]:
    from agent.supervisor.auth import Right

    wanted = {right.strip() for right in words.split(",") if right.strip()}
    if unknown := wanted - set(Right):
        fail(f"--rights {', '.join(sorted(unknown))}: must be of {', '.join(Right)}")
    return frozenset(Right(right) for right in wanted)


def _door(config: Path | None) -> Door:
    from agent.supervisor.auth import Door, UnsafeStateFile

    known = settings(config)
    path = known.storage.folder / "web" / "state.json"
    if not path.exists():
        fail("the page has not been started yet: minmo serve makes the first token")
    try:
        return Door.open(path, session_s=known.web.session_hours * 3_600)[0]
    except UnsafeStateFile as error:
        fail(str(error))


# ------------------------------------------------------------------ campaigns


@campaign.command(name="validate")
def campaign_validate(config: ConfigFile = None) -> None:
    """Check every campaign against what the checkpoint was trained on; exit 1 if one is refused."""
    from agent.doctor import facts_or_fault, load_policies

    known = settings(config)
    try:
        engine = load_policies(known, facts_or_fault(known))
    except ValueError as error:
        fail(str(error))
    for valid in engine.campaigns:
        typer.echo(f"ok       {valid.name}: {', '.join(valid.dids)} -> {valid.persona.name} at {valid.shop}")
    for problem in engine.problems:
        typer.echo(f"refused  {problem.name}: {problem.reason}")
    raise typer.Exit(bool(engine.problems) or not engine.campaigns)


def main() -> None:
    try:
        app()
    except StorageError as error:
        sys.exit(f"minmo: {error}")


if __name__ == "__main__":
    main()
