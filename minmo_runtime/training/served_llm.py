"""The LLM as it is served: stage 0g's tensors, with stage 1c's additions folded in where they were made for them.

A connector reads this LLM's hidden states, so its file carries `llm_hash` of it. Additions of another LLM (it was
trained anew since) are not folded in. Knows nothing of what was learnt. Source: LoRA (arXiv 2106.09685), model/lora.py.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.lora import LoraDims, merged
from minmo_runtime.text import TextTokenizer
from minmo_runtime.training.freeze import part_hash
from minmo_runtime.training.llm import load_llm
from minmo_runtime.training.resume import load_tensors
from minmo_runtime.training.stage import part_file

LORA_PART = "llm_lora"


def base_hash(ship: Path) -> str:
    """Identity of stage 0g's tensors."""
    return part_hash(ship / "llm.safetensors")


def hash_with(base: str, additions: Path) -> str:
    """Identity of an LLM with additions folded in."""
    return hashlib.sha256(f"{base} {part_hash(additions)}".encode()).hexdigest()


def lora_of(ship: Path) -> Path | None:
    """The additions, if they were made for this LLM and the projector beside them was trained with both."""
    path, projector = ship / f"{LORA_PART}.safetensors", ship / "projector.safetensors"
    if not (path.is_file() and projector.is_file()):
        return None
    base = base_hash(ship)
    if _metadata(path).get("llm_hash") != base or _metadata(projector).get("llm_hash") != hash_with(base, path):
        return None
    return path


def llm_hash(ship: Path) -> str:
    """Identity of the LLM that is served from `ship`, if its projector is."""
    additions = lora_of(ship)
    return base_hash(ship) if additions is None else hash_with(base_hash(ship), additions)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata() or {})


def lora_metadata(dims: LoraDims, base: str) -> dict[str, str]:
    return {"dims": json.dumps(dims.to_dict()), "llm_hash": base}


def with_lora(state: dict[str, Tensor], additions: Path) -> dict[str, Tensor]:
    """A state dict of the LLM with the additions of that file folded in."""
    tensors, metadata = load_tensors(additions)
    return merged(state, tensors, LoraDims.from_dict(json.loads(metadata["dims"])).scale)


def load_served_llm(work_dir: Path) -> tuple[Backbone, TextTokenizer]:
    """What stages 2a to 3 read: the LLM that their projector will stand behind."""
    model, tokenizer = load_llm(work_dir)
    if additions := lora_of(part_file(work_dir, "llm").parent):
        model.load_state_dict(with_lora(model.state_dict(), additions))
    return model, tokenizer
