"""From a training work folder to a checkpoint folder that the runtime serves.

`python -m minmo_runtime.training.ship --work WORK --out FOLDER` takes the parts in `WORK/ship`, their sizes
(`<part>.json`, or "dims" in the weight file's metadata), the two tokenizers and the agent's voice vector, and writes
checkpoint.toml with a hash for each file. A connector whose gates failed is left out by `--without`: its bridge then
stands in. It trains nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

from safetensors import safe_open

from minmo_runtime.checkpoint_contents import (
    KEPT_PARTS,
    NEEDED,
    TRAINED_WITH,
    VOICE_TOKEN_PARTS,
    CheckpointError,
    module_of,
    parts,
    toml_of,
)
from minmo_runtime.text import TextTokenizer
from minmo_runtime.training.freeze import part_hash
from minmo_runtime.training.ngram import NGRAM_FILE
from minmo_runtime.training.served_llm import hash_with, lora_of, with_lora
from minmo_runtime.training.stage import STAGES_DIR
from minmo_runtime.weight_files import file_hash, load_weights, save_weights
from minmo_runtime.weights import load_checkpoint

TOKENIZERS = {"text": "text_tokenizer.json", "ctc": "ctc_tokenizer.json"}
# Which stage's TOML holds a part's sizes where neither the JSON nor the metadata does.
_STAGE_OF = {"encoder": "0b", "vocoder": "0e", "flow": "0f", "llm": "0g", "voice_lm": "0h"}
_VOCABULARY = {"llm": "vocab_size", "voice_lm": "text_vocab_size"}
# The emotions are those of the instructions that the LLM is trained with (dialogues.py); the voice has one manner.
FACTS: dict[str, Any] = {
    "languages": ["en"],
    "dialects": ["us"],
    "emotions": ["neutral", "friendly", "calm", "cheerful", "warm", "serious", "brisk"],
    "rates": ["normal"],
    "voices": ["agent"],
}


def sizes_of(ship: Path, part: str) -> dict[str, Any]:
    """The part's table of sizes."""
    beside = ship / f"{part}.json"
    weights = ship / f"{part}.safetensors"
    if beside.is_file():
        table = json.loads(beside.read_text())
    elif weights.is_file() and "dims" in (_metadata(weights)):
        table = json.loads(_metadata(weights)["dims"])
    elif part in _STAGE_OF:
        table = tomllib.loads((STAGES_DIR / f"{_STAGE_OF[part]}.toml").read_text())["settings"]["dims"]
    else:
        raise CheckpointError(f"{ship}: the sizes of {part} are neither in {part}.json nor in its weights' metadata")
    table.pop("code_hash", None)
    if part in _VOCABULARY:
        table.setdefault(_VOCABULARY[part], TextTokenizer.from_file(ship / TOKENIZERS["text"]).vocab_size)
    if part == "vocoder":
        table.setdefault("kind", "source_filter")
    return table


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata() or {})


def voice_tokenizer_hash(ship: Path, part: str) -> str:
    """Which voice tokens a part was trained on; "" where it does not say."""
    beside = ship / f"{part}.json"
    if beside.is_file() and "code_hash" in (table := json.loads(beside.read_text())):
        return str(table["code_hash"])
    weights = ship / f"{part}.safetensors"
    metadata = _metadata(weights) if weights.is_file() else {}
    return metadata.get("voice_tokenizer_hash", "")


def identities(source: Path, part: str, lora: Path | None = None) -> dict[str, str]:
    """What later loading compares: the trained tensors' hash of a part that others read, and whose vectors it reads."""
    found = {}
    if any(part in others for others in TRAINED_WITH.values()):
        own = part_hash(source)
        found["tensors_sha256"] = hash_with(own, lora) if part == "llm" and lora is not None else own
    metadata = _metadata(source)
    for other in TRAINED_WITH.get(part, ()):
        if digest := metadata.get(f"{other}_hash", ""):
            found[f"{other}_sha256"] = digest
    return found


def assemble(
    ship: Path,
    out: Path,
    name: str = "nano",
    without: tuple[str, ...] = (),
    facts: dict[str, Any] = FACTS,
    dtype: str = "bfloat16",
    int8_parts: tuple[str, ...] = (),
) -> list[str]:
    """Write `out` (`int8_parts` in int8 with a scale per row, the others as `dtype`); returns what is missing or was
    left out. The folder is loaded once, so what is written can be served."""
    out.mkdir(parents=True, exist_ok=True)
    remarks: list[str] = []
    tables: dict[str, Any] = {}
    files: dict[str, Any] = {}
    # Stage 1c teaches the LLM to hear; behind captions as text it is the base that was measured.
    lora = None if "projector" in without else lora_of(ship)
    for part in parts():
        source = ship / f"{part}.safetensors"
        if part in without or not (source.is_file() or part in NEEDED):
            remarks.append(f"{part}: left out" if part in without else f"{part}: not trained")
            (out / f"{part}.safetensors").unlink(missing_ok=True)
            continue
        tables[part] = sizes_of(ship, part)
        if not source.is_file():
            remarks.append(f"{part}: no weights, starts at random (UNTRAINED)")
            (out / f"{part}.safetensors").unlink(missing_ok=True)
            continue
        module = module_of(part, tables[part])
        load_weights(module, source)
        if part == "llm" and lora is not None:
            module.load_state_dict(with_lora(module.state_dict(), lora))
            remarks.append("llm: with the additions of stage 1c")
        save_weights(module, out / f"{part}.safetensors", "int8" if part in int8_parts else dtype)
        files[part] = {"path": f"{part}.safetensors", "sha256": file_hash(out / f"{part}.safetensors")}
        if part in VOICE_TOKEN_PARTS and (digest := voice_tokenizer_hash(ship, part)):
            files[part]["voice_tokenizer_sha256"] = digest
        files[part] |= identities(source, part, lora)
    for part in KEPT_PARTS:  # as they are: what was trained on their codes keeps their hash
        if (ship / f"{part}.safetensors").is_file():
            for path in ship.glob(f"{part}.*"):
                shutil.copyfile(path, out / path.name)
            files[part] = {"path": f"{part}.safetensors", "sha256": file_hash(out / f"{part}.safetensors")}
    for file in TOKENIZERS.values():
        shutil.copyfile(ship / file, out / file)
    for extra in ("voices.safetensors", NGRAM_FILE, "MODEL_CARD.md"):
        if (ship / extra).is_file():
            shutil.copyfile(ship / extra, out / extra)
    contents = {
        "name": name,
        "facts": facts,
        "tokenizers": TOKENIZERS,
        "captions": {"ngram": NGRAM_FILE} if (ship / NGRAM_FILE).is_file() else {},
        **tables,
        "files": files,
    }
    (out / "checkpoint.toml").write_text(toml_of(contents), encoding="utf-8")
    checkpoint = load_checkpoint(out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**20
    remarks.append(f"{checkpoint.label}: {size:.1f} MiB, bridges=[{', '.join(checkpoint.bridges)}]")
    return remarks


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint folder out of a training work folder")
    parser.add_argument("--work", type=Path, required=True, help="work folder of training (with ship/ inside)")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--name", default="nano")
    parser.add_argument(
        "--without", nargs="*", default=[], help="connectors whose gates failed: their bridges stand in"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--int8", nargs="*", default=["llm", "voice_lm"], help="parts stored as int8, one scale a row")
    arguments = parser.parse_args()
    try:
        remarks = assemble(
            arguments.work / "ship",
            arguments.out,
            arguments.name,
            tuple(arguments.without),
            dtype=arguments.dtype,
            int8_parts=tuple(arguments.int8),
        )
    except CheckpointError as error:
        sys.exit(str(error))
    print("\n".join(remarks))


if __name__ == "__main__":
    main()
