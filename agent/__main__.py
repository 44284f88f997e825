"""The command line: `minmo serve | demo | call | dial | train | eval | lab | bench | doctor | access | db | campaign`.

Thin: each command reads the settings, calls one function elsewhere and turns its answer into text and an exit status.
Modules are imported inside the commands: `minmo db show` does not wait for torch, and runs where an extra is missing.
"""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from agent.commands.access import access
from agent.commands.campaign import campaign
from agent.commands.common import AsJson, ConfigFile, Profile, fail, needs_training_packages, settings, with_profile
from agent.commands.db import db
from agent.commands.models import models
from storage.entries import StorageError

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="minmo", help="A telephone agent that speaks with MinMo.", no_args_is_help=True, add_completion=False
)
app.add_typer(access, name="access")
app.add_typer(db, name="db")
app.add_typer(models, name="models")
app.add_typer(campaign, name="campaign")


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


def main() -> None:
    try:
        app()
    except StorageError as error:
        sys.exit(f"minmo: {error}")


if __name__ == "__main__":
    main()
