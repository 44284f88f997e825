"""A checkpoint folder in memory: its parts, tokenizers and voices, checked against each other.

A part whose table is missing in checkpoint.toml (checkpoint_contents.py) is a connector that a bridge stands in for,
and so is one whose weights are not there; another part with a table but without weights starts at random and makes the
checkpoint UNTRAINED, said in every StreamOpened. It knows nothing of calls. Read once at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmo_runtime.caption_search import CaptionReader
from minmo_runtime.checkpoint_contents import (
    CONNECTORS,
    KEPT_PARTS,
    CheckpointError,
    CheckpointFacts,
    Listening,
    check_trained_with,
    check_voice_tokenizer,
    facts_in,
    known_table,
    module_of,
    part_path,
    parts,
    read_contents,
)
from minmo_runtime.duplex_steps import NUM_FACTS, SERVED_NUM_FACTS
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.duplex import DuplexPredictor
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.hift import HiftVocoder
from minmo_runtime.model.output_projector import OutputProjector
from minmo_runtime.model.projector import InputProjector
from minmo_runtime.model.vocoder import Vocoder, sample_rate_hz
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.profiles import Files, models_folder
from minmo_runtime.prompt_voice import PromptVoice, read_prompt_voice
from minmo_runtime.public_files import PublicFileError
from minmo_runtime.public_tokenizers import load_tokenizer
from minmo_runtime.rates import Rates
from minmo_runtime.text import TextTokenizer
from minmo_runtime.weight_files import check_hash, load_weights


@dataclass
class Modules:
    """The boxes of the figure that this checkpoint holds, in the order of the figure."""

    encoder: VoiceEncoder
    llm: Backbone
    voice_lm: VoiceLm
    flow: Flow
    vocoder: Vocoder
    projector: InputProjector | None = None
    duplex: DuplexPredictor | None = None
    output_projector: OutputProjector | None = None

    def __iter__(self) -> Iterator[str]:
        """Names of the parts that are there."""
        return (name for name, module in vars(self).items() if module is not None)


@dataclass
class Checkpoint:
    """Everything the runner needs, on the CPU, in eval mode."""

    name: str
    folder: Path
    rates: Rates
    facts: CheckpointFacts
    text_tokenizer: TextTokenizer
    ctc_tokenizer: Tokenizer
    modules: Modules
    captions: CaptionReader = CaptionReader()
    voices: dict[str, Tensor] = field(default_factory=dict)  # name → speaker vector [1, spk_embed_dim] of the flow
    listening: Listening = Listening()
    voice_text: TextTokenizer | None = None  # of the voice LM, where its text table is not the LLM's (bridge `out`)
    lexicon: dict[str, str] = field(default_factory=dict)  # words said otherwise than written (bridge `out`)
    prompt_voice: PromptVoice | None = None  # a few seconds of speech that a parent's voice continues
    untrained: tuple[str, ...] = ()  # parts that started at random
    warnings: list[str] = field(default_factory=list)

    @property
    def bridges(self) -> tuple[str, ...]:
        return tuple(bridge for part, bridge in CONNECTORS.items() if getattr(self.modules, part) is None)

    def default_voice(self) -> Tensor:
        """The agent's voice: the first of facts.voices that has a vector; a flow of one voice needs none (zeros)."""
        for name in (*self.facts.voices, *self.voices):
            if name in self.voices:
                return self.voices[name]
        return torch.zeros(1, self.modules.flow.dims.spk_embed_dim)

    @property
    def label(self) -> str:
        """Goes into StreamOpened.checkpoint and into every call row and benchmark line."""
        return f"{self.name} UNTRAINED({','.join(self.untrained)})" if self.untrained else self.name


def load_checkpoint(folder: str | Path, seed: int = 0, models: str | Path = "") -> Checkpoint:
    """Read a folder. Parts with sizes but no weights are filled at random from `seed` and named in `untrained`.

    `models`: where the public files lie that a profile names as "<source>:<file>" (profiles.models_folder).
    """
    folder = Path(folder)
    contents = read_contents(folder)
    listed = contents.get("files", {})
    check_voice_tokenizer(listed)
    check_trained_with(listed, contents)
    files = Files(folder, models_folder(str(models)))
    torch.manual_seed(seed)
    modules, untrained, warnings = _modules(folder, contents, files)
    untrained += _check_kept(files, listed)
    tokenizers = {key: _tokenizer(files.path(name)) for key, name in contents["tokenizers"].items()}
    prompt = files.path(str(listed.get("prompt_voice", {}).get("path", "prompt_voice.safetensors")))
    checkpoint = Checkpoint(
        name=contents["name"],
        folder=folder,
        rates=Rates.from_dict(contents.get("rates", {})),
        facts=facts_in(contents),
        text_tokenizer=TextTokenizer(tokenizers["text"]),
        ctc_tokenizer=tokenizers["ctc"],
        captions=_captions(contents.get("captions", {}), folder),
        modules=Modules(**modules),  # type: ignore[arg-type]  # one builder per field, by name
        voices=_voices(files.path(str(listed.get("voices", {}).get("path", "voices.safetensors")))),
        listening=Listening(**known_table(contents, "listening", Listening)),
        voice_text=TextTokenizer(tokenizers["voice"]) if "voice" in tokenizers else None,
        lexicon={str(word): str(said) for word, said in contents.get("lexicon", {}).items()},
        prompt_voice=read_prompt_voice(prompt) if prompt.is_file() else None,
        untrained=tuple(untrained),
        warnings=warnings,
    )
    if "prompt_voice" in listed and checkpoint.prompt_voice is None:
        warnings.append(f"{prompt}: no prompt voice; `minmo models voice` makes one from a few seconds of speech")
    _check_fit(checkpoint)
    return checkpoint


def _modules(
    folder: Path, contents: Mapping[str, Any], files: Files
) -> tuple[dict[str, nn.Module], list[str], list[str]]:
    """The parts that are served, by name; the names of those that start at random; what is to be said about others."""
    modules: dict[str, nn.Module] = {}
    untrained: list[str] = []
    warnings: list[str] = []
    for part in parts():
        if part not in contents:
            continue
        path = part_path(files, contents, part)
        if not path.is_file() and part in CONNECTORS:
            warnings.append(f"{part}: sizes without weights; the bridge {CONNECTORS[part]!r} stands in")
            continue
        try:
            module = module_of(part, contents[part])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / 'checkpoint.toml'}: [{part}]: {error}") from error
        if not _fill(module, path, contents, files, part):
            untrained.append(part)
        modules[part] = module.eval().requires_grad_(False)
        if isinstance(module, HiftVocoder):
            module.fold_weight_norm()
    duplex = modules.get("duplex")
    if isinstance(duplex, DuplexPredictor) and duplex.dims.input != "encoder":
        _check_predictor(modules, folder)
    return modules, untrained, warnings


def _check_kept(files: Files, listed: Mapping[str, Any]) -> list[str]:
    """Files that no call needs but training and new voices do (the voice tokenizer): whole, and trained by anybody.

    Returns the names of those that hold nothing but zeros.
    """
    empty = []
    for name, entry in listed.items():
        path = files.path(str(entry.get("path", f"{name}.safetensors")))
        if name in KEPT_PARTS and path.is_file():
            check_hash(path, entry.get("sha256", ""))
            if not any(bool(tensor.any()) for tensor in load_file(str(path)).values()):
                empty.append(name)
    return empty


def _fill(module: nn.Module, path: Path, contents: Mapping[str, Any], files: Files, part: str) -> bool:
    """Whether trained weights were there."""
    entry = contents.get("files", {}).get(part, {})
    if not path.is_file():
        if ":" in str(entry.get("path", "")):
            raise CheckpointError(f"{path}: not there; run `minmo models fetch {contents['name']}`")
        return False
    check_hash(path, entry.get("sha256", ""))
    load_weights(module, path, files.path(entry["cmvn"]) if "cmvn" in entry else None)
    # A file of zeros is there, but nobody has trained it.
    return any(bool(weight.any()) for weight in module.parameters())


def _check_predictor(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """A profile has sizes for every connector; whether a predictor may stand depends on the files that are there."""
    duplex = modules.get("duplex")
    if isinstance(duplex, DuplexPredictor) and duplex.dims.input != "encoder" and "projector" not in modules:
        raise CheckpointError(
            f"{folder / 'checkpoint.toml'}: the duplex predictor is there without a trained projector and is refused: "
            "it reads the LLM's hidden states of the caller's audio"
        )


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except PublicFileError as error:
        raise CheckpointError(str(error)) from error


def _captions(table: Mapping[str, Any], folder: Path) -> CaptionReader:
    try:
        return CaptionReader.from_table(table, folder)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'checkpoint.toml'}: [captions]: {error}") from error


def _voices(path: Path) -> dict[str, Tensor]:
    """Speaker vectors by name, [D] or [1, D] in the file."""
    return {name: vector.float().view(1, -1) for name, vector in load_file(str(path)).items()} if path.is_file() else {}


def _check_fit(checkpoint: Checkpoint) -> None:
    """Sizes that two parts must share."""
    modules = checkpoint.modules
    voice_dims, flow_dims, llm_dims = modules.voice_lm.dims, modules.flow.dims, modules.llm.dims
    pairs: list[tuple[str, int, str, int, str]] = [
        ("llm.vocab_size", llm_dims.vocab_size, "text tokenizer", checkpoint.text_tokenizer.vocab_size, "at least"),
        ("voice_lm.speech_token_size", voice_dims.speech_token_size, "flow", flow_dims.vocab_size, "equal"),
        ("encoder.vocab_size", modules.encoder.dims.vocab_size, "CTC tokenizer",
         checkpoint.ctc_tokenizer.get_vocab_size(), "equal"),
        ("rates.output_sample_rate_hz", checkpoint.rates.output_sample_rate_hz, "vocoder",
         sample_rate_hz(modules.vocoder), "equal"),
    ]  # fmt: skip
    pairs += _connector_sizes(modules)
    for name, value, other, wanted, relation in pairs:
        if value < wanted or (relation == "equal" and value != wanted):
            raise CheckpointError(f"{name} = {value}: must be {relation} to that of the {other}, {wanted}")


def _connector_sizes(modules: Modules) -> list[tuple[str, int, str, int, str]]:
    encoder, llm = modules.encoder.dims, modules.llm.dims
    pairs: list[tuple[str, int, str, int, str]] = []
    if modules.projector is not None:
        dims = modules.projector.dims
        pairs.append(("projector.encoder_size", dims.encoder_size, "encoder", encoder.output_size, "equal"))
        pairs.append(("projector.llm_hidden_size", dims.llm_hidden_size, "llm", llm.hidden_size, "equal"))
        if dims.num_pieces:
            pairs.append(("projector.num_pieces", dims.num_pieces, "encoder's vocabulary", encoder.vocab_size, "equal"))
    if modules.duplex is not None:
        own = modules.duplex.dims
        if own.input == "encoder" and not encoder.chunk_frames:
            raise CheckpointError(
                "duplex.input = 'encoder': only behind an encoder that streams (chunk_frames above 0)"
            )
        width = encoder.output_size if own.input == "encoder" else 2 * llm.hidden_size
        pairs.append(("duplex.input_size", own.input_size, "pooled input", 2 * width, "equal"))
        num_facts = own.num_facts if own.num_facts in SERVED_NUM_FACTS else NUM_FACTS
        for name, size, other, wanted in (
            ("num_facts", own.num_facts, "runtime's turn facts", num_facts),
            ("num_pieces", own.num_pieces, "encoder's vocabulary", encoder.vocab_size),
        ):
            if size:
                pairs.append((f"duplex.{name}", size, other, wanted, "equal"))
    return pairs
