"""checkpoint.toml: the table of contents of a checkpoint folder, read and checked before a tensor is loaded.

    name = "nano"
    [facts]       languages, dialects, emotions, rates, voices: what it was trained on
    [rates]       frame times (rates.Rates)
    [tokenizers]  text = "text_tokenizer.json", ctc = "ctc_tokenizer.json"
    [encoder] ... one table of sizes per part (the part's Dims; [vocoder] has a `kind` beside them)
    [listening]   language and text form that a full-context encoder is asked for (full_context.py)
    [files.encoder]   path, sha256 of the file; tensors_sha256: the tensors as they were trained, a part's identity;
    llm_sha256, encoder_sha256: which one a connector was trained with; voice_tokenizer_sha256 (voice_lm and flow)

A part whose table is missing is a connector that a bridge stands in for. Knows no tensors. Read once at the start.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims, EncoderDims
from minmo_runtime.model.duplex import DuplexDims, DuplexPredictor
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.output_projector import OutputProjector, OutputProjectorDims
from minmo_runtime.model.projector import InputProjector, ProjectorDims
from minmo_runtime.model.vocoder import build_vocoder
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims
from minmo_runtime.profiles import Files, ProfileError, read_profile

# Every part that serving needs; the others are connectors.
NEEDED = ("encoder", "llm", "voice_lm", "flow", "vocoder")
CONNECTORS = {"projector": "in", "output_projector": "out", "duplex": "duplex"}
# A connector reads another part's vectors and is worth nothing behind a part trained anew: stage that makes it again.
TRAINED_WITH = {"projector": ("encoder", "llm"), "duplex": ("encoder", "llm"), "output_projector": ("llm",)}
_STAGE_OF_CONNECTOR = {"projector": "1a", "duplex": "4", "output_projector": "2a"}
# Parts that consume voice tokens and therefore name the tokenizer that made them.
VOICE_TOKEN_PARTS = ("voice_lm", "flow")
KEPT_PARTS = ("voice_tokenizer",)  # not served: training and new voices need them


_BUILDERS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], Callable[[Any], nn.Module]]] = {
    "encoder": (EncoderDims.from_dict, VoiceEncoder),
    "projector": (ProjectorDims.from_dict, InputProjector),
    "llm": (BackboneDims.from_dict, Backbone),
    "duplex": (DuplexDims.from_dict, DuplexPredictor),
    "output_projector": (OutputProjectorDims.from_dict, OutputProjector),
    "voice_lm": (VoiceLmDims.from_dict, VoiceLm),
    "flow": (FlowDims.from_dict, Flow),
    "vocoder": (dict, build_vocoder),
}


class CheckpointError(Exception):
    """The folder cannot be served; the message names the file, key or value and what is allowed."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What the checkpoint was trained on; the agent hands it to the policies."""

    languages: tuple[str, ...] = ()
    dialects: tuple[str, ...] = ()
    emotions: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()
    voices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listening:
    """What a full-context encoder is asked for: its language row, and whether numbers and punctuation are written."""

    language: str = "auto"
    has_itn: bool = False


def read_contents(folder: Path) -> dict[str, Any]:
    """checkpoint.toml, checked as far as that goes without tensors."""
    path = folder / "checkpoint.toml"
    if not path.is_file():
        raise CheckpointError(f"{path}: not there; a checkpoint folder holds checkpoint.toml")
    try:
        contents = read_profile(folder)
    except (tomllib.TOMLDecodeError, ProfileError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    allowed = {
        "name",
        "facts",
        "rates",
        "tokenizers",
        "captions",
        "lexicon",
        "listening",
        "files",
        "notes",
        *_BUILDERS,
        "voice_tokenizer",
        "speaker",
    }
    if unknown := sorted(set(contents) - allowed):
        raise CheckpointError(f"{path}: unknown key {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}")
    if missing := [key for key in ("name", "tokenizers", *NEEDED) if key not in contents]:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}")
    if (
        contents.get("duplex", {}).get("input", "") != "encoder"
        and "duplex" in contents
        and "projector" not in contents
    ):
        raise CheckpointError(
            f"{path}: [duplex] without [projector]: a predictor on the LLM's hidden states needs a trained projector; "
            'only one with input = "encoder" stands without'
        )
    return contents


def facts_in(contents: Mapping[str, Any]) -> CheckpointFacts:
    table = known_table(contents, "facts", CheckpointFacts)
    return CheckpointFacts(**{key: tuple(value) for key, value in table.items()})


def known_table(contents: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """The table `name`, refused if it has a key that the dataclass `kind` has not."""
    table, allowed = dict(contents.get(name, {})), sorted(field.name for field in dataclasses.fields(kind))
    if unknown := sorted(set(table) - set(allowed)):
        raise CheckpointError(f"[{name}]: unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return table


def part_path(files: Files, contents: Mapping[str, Any], part: str) -> Path:
    """Where a part's weights are, or would be."""
    return files.path(str(contents.get("files", {}).get(part, {}).get("path", f"{part}.safetensors")))


def check_voice_tokenizer(files: Mapping[str, Any]) -> None:
    hashes = {part: files.get(part, {}).get("voice_tokenizer_sha256", "") for part in VOICE_TOKEN_PARTS}
    if len(set(hashes.values())) > 1:
        raise CheckpointError(f"voice LM and flow come from different voice tokenizers: {hashes}")


def check_trained_with(files: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    """A connector and the part whose vectors it reads; where either file does not say, nothing is compared."""
    for part, others in TRAINED_WITH.items():
        for other in others if part in contents else ():
            wanted = files.get(part, {}).get(f"{other}_sha256", "")
            found = files.get(other, {}).get("tensors_sha256", "")
            if wanted and found and wanted != found:
                raise CheckpointError(
                    f"{part} was trained with the {other} {wanted}, this checkpoint holds the {other} {found}: run "
                    f"`minmo train {_STAGE_OF_CONNECTOR[part]}` with it, or ship without {part}"
                )


def module_of(part: str, table: Mapping[str, Any]) -> nn.Module:
    """A fresh module of one part from its table of sizes."""
    read_dims, build = _BUILDERS[part]
    return build(read_dims(table))


def parts() -> tuple[str, ...]:
    return tuple(_BUILDERS)


def toml_of(contents: Mapping[str, Any]) -> str:
    """checkpoint.toml as text: plain values first, then one table per mapping (tables of tables one level deep)."""
    lines = [f"{key} = {_value(value)}" for key, value in contents.items() if not isinstance(value, Mapping)]
    for key, table in contents.items():
        if not isinstance(table, Mapping):
            continue
        inner = {k: v for k, v in table.items() if isinstance(v, Mapping)}
        if len(inner) < len(table) or not table:
            lines += ["", f"[{key}]", *(f"{k} = {_value(v)}" for k, v in table.items() if k not in inner)]
        for name, values in inner.items():
            lines += ["", f"[{key}.{name}]", *(f"{k} = {_value(v)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
