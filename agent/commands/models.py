"""`minmo models`: the parents' public files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from agent.commands.common import AsJson, ConfigFile, fail, settings

models = typer.Typer(help="The parents' public files: fetch, import, verify.", no_args_is_help=True)
Names = Annotated[list[str] | None, typer.Argument(help="Profiles or sources; public = what minmo-8b needs.")]
Accept = Annotated[bool, typer.Option("--accept-licence", help="I have read the licences and accept them.")]


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
