"""Which checkpoint is served, and what it says about itself. Read without the model: most processes carry no torch."""

from __future__ import annotations

from pathlib import Path

from agent.config import Config
from minmo_runtime.profiles import NANO, profile_folder, read_profile
from policies.facts import CheckpointFacts

SHIPPED_CHECKPOINT = NANO


def checkpoint_folder(config: Config) -> Path:
    """The folder of agent.checkpoint, else of runtime.profile; ValueError names the profiles there are."""
    return Path(config.agent.checkpoint) if config.agent.checkpoint else profile_folder(config.runtime.profile)


def checkpoint_facts(folder: Path) -> CheckpointFacts:
    """The `[facts]` of checkpoint.toml: what the policies may ask for."""
    table = read_profile(folder)
    facts = {
        key: tuple(table.get("facts", {}).get(key, ())) for key in CheckpointFacts.__struct_fields__ if key != "name"
    }
    return CheckpointFacts(name=str(table["name"]), **facts)
