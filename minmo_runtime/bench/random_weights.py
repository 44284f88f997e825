"""A profile at its full sizes with random weights, made on the device itself: 15 GB need not cross the bus.

Compute costs the same whatever the numbers say, so this measures speed; what is said means nothing. Tokenizers are the
byte and letter ones of random_checkpoint.py. A profile whose encoder sees whole segments cannot stream, so its calls
are measured without the caller's audio, and it says so in `bridges`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minmo_runtime.checkpoint_contents import CheckpointFacts, module_of
from minmo_runtime.model.hift import HiftVocoder
from minmo_runtime.model.layers import RotaryTable
from minmo_runtime.profiles import profile_folder, read_profile
from minmo_runtime.random_checkpoint import byte_tokenizer, letter_tokenizer
from minmo_runtime.rates import Rates
from minmo_runtime.text import TextTokenizer
from minmo_runtime.weights import Checkpoint, Modules

SERVED = ("encoder", "llm", "output_projector", "voice_lm", "flow", "vocoder")
_STD = 0.02


def random_profile(name: str, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Every part that the engine's passes use, with sizes from the profile `name`."""
    return random_checkpoint_of(read_profile(profile_folder(name)), device, dtype)


def random_checkpoint_of(contents: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Checkpoint:
    tables = {part: contents[part] for part in SERVED if part in contents}
    modules = {
        part: random_module(part, table, device, torch.float32 if part == "vocoder" else dtype)
        for part, table in tables.items()
    }
    letters = letter_tokenizer(tables["encoder"]["vocab_size"])
    return Checkpoint(
        name=f"{contents['name']} random",
        folder=Path(),
        rates=Rates.from_dict(contents.get("rates", {})),
        facts=CheckpointFacts(),
        text_tokenizer=TextTokenizer(byte_tokenizer()),
        ctc_tokenizer=letters,
        modules=Modules(**modules),  # type: ignore[arg-type]  # one builder per field, by name
        untrained=tuple(modules),
    )


@torch.no_grad()
def random_module(part: str, table: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One part, alone, in eval mode."""
    if part == "vocoder" or device.type == "cpu":
        # Small, or its buffers (windows, tables) are made by its constructor.
        module = module_of(part, table).to(device, dtype)
    else:
        with torch.device("meta"):
            module = module_of(part, table)
        module = module.to(dtype).to_empty(device=device)
        for inner in module.modules():
            if isinstance(inner, RotaryTable):  # its tables are made at first use
                inner.cos = inner.sin = torch.empty(0, device=device)
        for buffer in module.buffers():
            buffer.zero_()
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, _STD)
            else:
                parameter.fill_(0.0 if parameter.numel() == 1 else 0.01)
    if isinstance(module, HiftVocoder):
        module.fold_weight_norm()
    return module.eval().requires_grad_(False)
