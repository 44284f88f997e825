"""A checkpoint folder: its table of contents (checkpoint.toml), its tensors (safetensors), its tokenizers.

    name = "nano"
    [facts]       languages, dialects, emotions, rates, voices: what it was trained on
    [rates]       frame times (rates.Rates)
    [tokenizers]  text = "text_tokenizer.json", ctc = "ctc_tokenizer.json"
    [encoder] ... one table of sizes per part (the part's Dims; [vocoder] has a `kind` beside them)
    [listening]   language and text form that a full-context encoder is asked for (full_context.py)
    [files.encoder]   path, sha256 of the file; tensors_sha256: the tensors as they were trained, a part's identity;
    llm_sha256, encoder_sha256: which one a connector was trained with; voice_tokenizer_sha256 (voice_lm and flow)

A part whose table is missing is a connector that a bridge stands in for; a part with a table but without weights
starts at random and makes the checkpoint UNTRAINED, said in every StreamOpened. Tensors are stored as float32,
bfloat16 or int8 (with `<key>.scale`, one per row) and run in float32. It knows nothing of calls. Read once at the
start.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from minmo_runtime.caption_search import CaptionReader
from minmo_runtime.duplex_steps import NUM_FACTS
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims, EncoderDims
from minmo_runtime.model.duplex import DuplexDims, DuplexPredictor
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.flow import Flow, FlowDims
from minmo_runtime.model.hift import HiftVocoder, hift_keys
from minmo_runtime.model.output_projector import OutputProjector, OutputProjectorDims
from minmo_runtime.model.projector import InputProjector, ProjectorDims
from minmo_runtime.model.vocoder import Vocoder, build_vocoder, sample_rate_hz
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims
from minmo_runtime.profiles import Files, ProfileError, models_folder, read_profile
from minmo_runtime.prompt_voice import PromptVoice, read_prompt_voice
from minmo_runtime.public_files import PublicFileError, read_am_mvn, read_tensors
from minmo_runtime.public_tokenizers import load_tokenizer
from minmo_runtime.rates import Rates
from minmo_runtime.text import TextTokenizer

# Every part that serving needs; the others are connectors.
NEEDED = ("encoder", "llm", "voice_lm", "flow", "vocoder")
CONNECTORS = {"projector": "in", "output_projector": "out", "duplex": "duplex"}
# Loaded and checked, but not used: the runner feeds the LLM text (bridge `in`), and says so.
NOT_SERVED = ("projector",)
# A connector reads another part's vectors and is worth nothing behind a part trained anew: stage that makes it again.
TRAINED_WITH = {"projector": ("encoder", "llm"), "duplex": ("encoder", "llm"), "output_projector": ("llm",)}
_STAGE_OF_CONNECTOR = {"projector": "1a", "duplex": "4", "output_projector": "2a"}
# Parts that consume voice tokens and therefore name the tokenizer that made them.
VOICE_TOKEN_PARTS = ("voice_lm", "flow")


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


def facts_of(folder: Path) -> CheckpointFacts:
    """What the checkpoint was trained on, without loading a tensor."""
    return _facts(read_contents(folder))


def _facts(contents: Mapping[str, Any]) -> CheckpointFacts:
    table = _known(contents, "facts", CheckpointFacts)
    return CheckpointFacts(**{key: tuple(value) for key, value in table.items()})


def _known(contents: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """The table `name`, refused if it has a key that the dataclass `kind` has not."""
    table, allowed = dict(contents.get(name, {})), sorted(kind.__dataclass_fields__)
    if unknown := sorted(set(table) - set(allowed)):
        raise CheckpointError(f"[{name}]: unknown key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    return table


def load_checkpoint(folder: str | Path, seed: int = 0, models: str | Path = "") -> Checkpoint:
    """Read a folder. Parts with sizes but no weights are filled at random from `seed` and named in `untrained`.

    `models`: where the public files lie that a profile names as "<source>:<file>" (profiles.models_folder).
    """
    folder = Path(folder)
    contents = read_contents(folder)
    listed = contents.get("files", {})
    _check_voice_tokenizer(listed)
    _check_trained_with(listed, contents)
    files = Files(folder, models_folder(str(models)))
    modules: dict[str, nn.Module] = {}
    present: dict[str, nn.Module] = {}  # with those that are not served
    untrained: list[str] = []
    warnings: list[str] = []
    torch.manual_seed(seed)
    for part, (read_dims, build) in _BUILDERS.items():
        if part not in contents:
            continue
        entry = listed.get(part, {})
        path = part_path(files, contents, part)
        is_public = ":" in str(entry.get("path", ""))
        if not path.is_file() and is_public and part not in CONNECTORS:
            raise CheckpointError(f"{path}: not there; run `minmo models fetch {contents['name']}`")
        if not path.is_file() and part in CONNECTORS:
            warnings.append(f"{part}: sizes without weights; the bridge {CONNECTORS[part]!r} stands in")
            continue
        try:
            module = build(read_dims(contents[part]))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{folder / 'checkpoint.toml'}: [{part}]: {error}") from error
        if path.is_file():
            _check_hash(path, entry.get("sha256", ""))
            load_weights(module, path, files.path(entry["cmvn"]) if "cmvn" in entry else None)
            if not any(bool(weight.any()) for weight in module.parameters()):
                untrained.append(part)  # a file of zeros is there, but nobody has trained it
        else:
            untrained.append(part)
        present[part] = module
        if part in NOT_SERVED or (isinstance(module, DuplexPredictor) and module.dims.input != "encoder"):
            warnings.append(f"{part}: weights are there, but the runner has no path for them yet; its bridge stands in")
            continue
        modules[part] = module.eval().requires_grad_(False)
        if isinstance(module, HiftVocoder):
            module.fold_weight_norm()
    _check_predictor(present, folder)
    tokenizers = {key: _tokenizer(files.path(name)) for key, name in contents["tokenizers"].items()}
    prompt = files.path(str(listed.get("prompt_voice", {}).get("path", "prompt_voice.safetensors")))
    checkpoint = Checkpoint(
        name=contents["name"],
        folder=folder,
        rates=Rates.from_dict(contents.get("rates", {})),
        facts=_facts(contents),
        text_tokenizer=TextTokenizer(tokenizers["text"]),
        ctc_tokenizer=tokenizers["ctc"],
        captions=_captions(contents.get("captions", {}), folder),
        modules=Modules(**modules),  # type: ignore[arg-type]  # one builder per field, by name
        voices=_voices(files.path(str(listed.get("voices", {}).get("path", "voices.safetensors")))),
        listening=Listening(**_known(contents, "listening", Listening)),
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


def part_path(files: Files, contents: Mapping[str, Any], part: str) -> Path:
    """Where a part's weights are, or would be."""
    return files.path(str(contents.get("files", {}).get(part, {}).get("path", f"{part}.safetensors")))


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


def _check_hash(path: Path, expected: str) -> None:
    if expected and (found := file_hash(path)) != expected:
        raise CheckpointError(f"{path}: sha256 is {found}, checkpoint.toml says {expected}")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_voice_tokenizer(files: Mapping[str, Any]) -> None:
    hashes = {part: files.get(part, {}).get("voice_tokenizer_sha256", "") for part in VOICE_TOKEN_PARTS}
    if len(set(hashes.values())) > 1:
        raise CheckpointError(f"voice LM and flow come from different voice tokenizers: {hashes}")


def _check_trained_with(files: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
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
        for name, size, other, wanted in (
            ("num_facts", own.num_facts, "runtime's turn facts", NUM_FACTS),
            ("num_pieces", own.num_pieces, "encoder's vocabulary", encoder.vocab_size),
        ):
            if size:
                pairs.append((f"duplex.{name}", size, other, wanted, "equal"))
    return pairs


def load_weights(module: nn.Module, path: Path, cmvn: Path | None = None) -> None:
    """Fill a module from one file (ours or a parent's); every difference is named with its key and shape. `cmvn`: the
    parent's am.mvn, which stands beside its weights."""
    try:
        stored = read_tensors(path)
        if cmvn is not None:
            stored["cmvn_shift"], stored["cmvn_scale"] = read_am_mvn(cmvn)
    except (PublicFileError, OSError) as error:
        raise CheckpointError(str(error)) from error
    scales = {key.removesuffix(".scale"): stored.pop(key) for key in list(stored) if key.endswith(".scale")}
    tensors = {key: _to_float(tensor, scales.get(key)) for key, tensor in stored.items()}
    if isinstance(module, HiftVocoder):
        tensors = hift_keys(tensors)
    if isinstance(module, Backbone) and module.lm_head is None:
        tensors.pop("lm_head.weight", None)  # the tied table a second time
    wanted = module.state_dict()
    for key in wanted.keys() & tensors.keys():
        if wanted[key].shape != tensors[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, the sizes in checkpoint.toml want "
                f"{list(wanted[key].shape)}"
            )
    if isinstance(module, VoiceLm):
        tensors.pop("llm.model.lm_head.weight", None)  # the tied text head a second time; never used
    result = module.load_state_dict(tensors, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"{path}: missing {_some(result.missing_keys)}; not wanted {_some(result.unexpected_keys)}"
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "nothing"


def _to_float(tensor: Tensor, scale: Tensor | None) -> Tensor:
    if tensor.dtype == torch.int8:
        assert scale is not None, "an int8 tensor needs its .scale"
        return tensor.float() * scale.float().view(-1, *([1] * (tensor.dim() - 1)))
    return tensor.float() if tensor.is_floating_point() else tensor


def save_weights(module: nn.Module, path: Path, dtype: str = "bfloat16") -> None:
    """Write a module's tensors as float32, bfloat16, or int8 with one scale a row (matrices; the rest stays
    bfloat16)."""
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"dtype {dtype!r}: must be float32, bfloat16 or int8")
    tensors: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        tensor = tensor.detach().contiguous()
        if dtype == "int8" and tensor.dim() >= 2:
            scale = tensor.float().flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
            shape = (-1, *([1] * (tensor.dim() - 1)))
            tensors[key] = (tensor.float() / scale.view(shape)).round().to(torch.int8)
            tensors[f"{key}.scale"] = scale
        elif tensor.is_floating_point() and dtype != "float32":
            tensors[key] = tensor.to(torch.bfloat16)
        else:
            tensors[key] = tensor.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path))


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
