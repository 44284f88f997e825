"""`minmo access`: who may see the page, and do what there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.commands.common import ConfigFile, fail, settings

if TYPE_CHECKING:
    from agent.supervisor.auth import Door, Right

access = typer.Typer(help="Who may see the page, and do what there.", no_args_is_help=True)
Rights = Annotated[
    str,
    typer.Option(
        help="Of listen, playback, hang_up, pause_recording, export, call, dial; with commas. Seeing calls needs none."
    ),
]


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
