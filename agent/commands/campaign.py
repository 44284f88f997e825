"""`minmo campaign`: which line is answered how."""

from __future__ import annotations

import typer

from agent.commands.common import ConfigFile, fail, settings

campaign = typer.Typer(help="Which line is answered how.", no_args_is_help=True)


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
