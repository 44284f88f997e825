"""Profiles: which checkpoint is served under which name, and where its files are. Data in folders beside this file.

    nano            the shipped checkpoint (minmo_runtime/checkpoints/nano)
    nano-human      SenseVoice-Small in front of nano's LLM and voice: human callers on a CPU
    minmo-small     the public parents with Qwen2.5-0.5B-Instruct
    minmo-8b        the public parents with Qwen2.5-7B-Instruct
    minmo-8b-paper  the paper's sizes, random weights, benches only

A profile's checkpoint.toml has the form of every checkpoint folder (checkpoint_contents.py), and two things more:
`base` names a profile whose tables it starts from, and a file may be "<source>:<file>", a file of a public checkpoint
under the models folder (sources.toml says what each source is). Plain files and tables: no torch here, so that the
agent and `minmo models` can ask. Read at the start, before the walk.
"""

from __future__ import annotations

import copy
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parent
NANO = PROFILES.parent / "checkpoints" / "nano"
CONTENTS = "checkpoint.toml"
MODELS_VARIABLE = "MINMO_MODELS"
# Parts of a base whose sizes are replaced as a whole: a mixture of two encoders' sizes is nobody's.
_WHOLE_TABLES = ("encoder", "llm", "voice_lm", "flow", "vocoder", "projector", "output_projector", "duplex")


class ProfileError(ValueError):
    """A profile, source or file that is not there; the message names it and what is allowed or to be done."""


def profile_names() -> tuple[str, ...]:
    return ("nano", *sorted(path.parent.name for path in PROFILES.glob(f"*/{CONTENTS}")))


def profile_folder(name: str) -> Path:
    """A shipped profile by its name, or any folder that holds a checkpoint.toml."""
    if name in profile_names():
        return NANO if name == "nano" else PROFILES / name
    if (Path(name) / CONTENTS).is_file():
        return Path(name)
    raise ProfileError(f"profile {name!r}: must be {', '.join(profile_names())}, or a folder with {CONTENTS}")


def models_folder(configured: str = "") -> Path:
    """Where public files lie: the setting, else $MINMO_MODELS, else ~/.cache/minmo/models."""
    chosen = configured or os.environ.get(MODELS_VARIABLE, "")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "minmo" / "models"


# -------------------------------------------------------------------- contents


def read_profile(folder: Path) -> dict[str, Any]:
    """checkpoint.toml with its base's tables under it; `base` and `without` are resolved and gone.

    A file of the base stands as an absolute path in the result, so that one folder is enough to find everything.
    """
    contents = tomllib.loads((folder / CONTENTS).read_text(encoding="utf-8"))
    if "base" not in contents:
        return contents
    base_folder = profile_folder(str(contents.pop("base")))
    merged = _with_absolute_files(read_profile(base_folder), base_folder)
    for part in contents.pop("without", ()):
        merged.pop(part, None)
        merged.get("files", {}).pop(part, None)
    return _merge(merged, contents)


def _with_absolute_files(contents: dict[str, Any], folder: Path) -> dict[str, Any]:
    contents = copy.deepcopy(contents)
    files = contents.setdefault("files", {})
    for part in _WHOLE_TABLES:
        if part in contents:
            files.setdefault(part, {}).setdefault("path", f"{part}.safetensors")
    files.setdefault("voices", {}).setdefault("path", "voices.safetensors")
    for entry in files.values():
        entry["path"] = _absolute(entry["path"], folder)
    for table in ("tokenizers", "captions"):
        for key, value in contents.get(table, {}).items():
            if isinstance(value, str) and (folder / value).is_file():
                contents[table][key] = str(folder / value)
    return contents


def _absolute(path: str, folder: Path) -> str:
    return path if ":" in path else str(folder / path)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        if isinstance(value, dict) and key == "files":
            base.setdefault(key, {}).update(value)  # per part as a whole: a hash belongs to its file
        elif isinstance(value, dict) and key not in _WHOLE_TABLES and isinstance(base.get(key), dict):
            base[key] = _merge(base[key], value)
        else:
            base[key] = value
    return base


# --------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """One public checkpoint: where it is published, what we read of it, its licence."""

    name: str
    huggingface: str
    modelscope: str
    files: tuple[str, ...]  # may hold `?` for the number of a shard
    size_mb: int
    licence: str
    licence_note: str = ""


def sources() -> dict[str, Source]:
    table = tomllib.loads((PROFILES / "sources.toml").read_text(encoding="utf-8"))
    return {name: Source(name, **{**entry, "files": tuple(entry["files"])}) for name, entry in table.items()}


@dataclass(frozen=True)
class Files:
    """Finds the files that a profile names."""

    folder: Path
    models: Path = field(default_factory=models_folder)

    def path(self, reference: str) -> Path:
        """ "llm.safetensors" in the folder itself, or "cosyvoice2-0.5b:llm.pt" under the models folder."""
        source, separator, name = reference.partition(":")
        return self.models / source / name if separator else self.folder / reference


def references(contents: dict[str, Any]) -> list[str]:
    """Every "<source>:<file>" that a profile names, in its order."""
    found = [str(value) for value in contents.get("tokenizers", {}).values()]
    for entry in contents.get("files", {}).values():
        found += [str(entry[key]) for key in ("path", "cmvn") if key in entry]
    return [reference for reference in found if ":" in reference]


def referenced_files(folder: Path, models: str = "") -> list[Path]:
    """Those of a profile's public files that are there, sorted; none for a checkpoint that keeps its own."""
    if not (folder / CONTENTS).is_file():
        return []
    files = Files(folder, models_folder(models))
    return sorted({path for name in references(read_profile(folder)) if (path := files.path(name)).is_file()})


def sources_of(contents: dict[str, Any]) -> list[Source]:
    """The public checkpoints that a profile needs, each once."""
    known = sources()
    names = dict.fromkeys(reference.partition(":")[0] for reference in references(contents))
    return [known[name] for name in names if name in known]
