"""What the commands share: their common options, the settings they run with, how they fail."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from agent.config import Config, ConfigError, load_config

SHIPPED_CONFIG = Path(__file__).resolve().parent.parent.parent / "config.toml"

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Settings; default: config.toml here, else the shipped one.")
]
Profile = Annotated[str, typer.Option("--profile", help="Another model: `minmo models list` names them.")]
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
