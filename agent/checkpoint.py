"""Which checkpoint is served, and what it says about itself. Read without the model: most processes carry no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path

from agent.config import Config
from policies.facts import CheckpointFacts

SHIPPED_CHECKPOINT = Path(__file__).resolve().parent.parent / "minmo_runtime" / "checkpoints" / "nano"


def checkpoint_folder(config: Config) -> Path:
    return Path(config.agent.checkpoint) if config.agent.checkpoint else SHIPPED_CHECKPOINT


def checkpoint_facts(folder: Path) -> CheckpointFacts:
    """The `[facts]` of checkpoint.toml: what the policies may ask for."""
    table = tomllib.loads((folder / "checkpoint.toml").read_text(encoding="utf-8"))
    facts = {
        key: tuple(table.get("facts", {}).get(key, ())) for key in CheckpointFacts.__struct_fields__ if key != "name"
    }
    return CheckpointFacts(name=str(table["name"]), **facts)
