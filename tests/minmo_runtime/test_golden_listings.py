"""The parents' full-size checkpoints load strictly: every key of the listings is accounted for, with its shape, in the
modules that the shipped profiles build. Sizes only (meta device); no weights are needed.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minmo_runtime.checkpoint_contents import module_of
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.encoder import VoiceEncoder
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.hift import HiftVocoder, hift_keys
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.profiles import profile_folder, read_profile

# Which part of which shipped profile a listing belongs to, and the class that it builds.
LISTINGS: dict[str, tuple[str, str, type[nn.Module]]] = {
    "cosyvoice2_llm": ("minmo-8b", "voice_lm", VoiceLm),
    "cosyvoice2_flow": ("minmo-8b", "flow", Flow),
    "cosyvoice2_hift": ("minmo-8b", "vocoder", HiftVocoder),
    "sensevoice_small": ("minmo-8b", "encoder", VoiceEncoder),
    "qwen2_5_7b": ("minmo-8b", "llm", Backbone),
}
# Ours beside the parent's: SenseVoice keeps mean and variance in am.mvn, we keep them with the weights.
OWN_KEYS = {"sensevoice_small": {"cmvn_shift", "cmvn_scale"}}


def listed(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    listing = json.loads((folder / f"{name}.json").read_text())
    with torch.device("meta"):
        return listing, {key: torch.empty(entry["shape"]) for key, entry in listing["tensors"].items()}


@functools.cache  # a strict load on the meta device changes nothing that the next one sees
def full_size(name: str) -> nn.Module:
    profile, part, kind = LISTINGS[name]
    with torch.device("meta"):
        module = module_of(part, read_profile(profile_folder(profile))[part])
    assert isinstance(module, kind)
    return module


@pytest.mark.parametrize("name", LISTINGS)
def test_every_listed_key_loads_strictly_into_the_shipped_profile(listing_dir: Path, name: str) -> None:
    listing, tensors = listed(listing_dir, name)
    assert len(tensors) == listing["n_keys"]
    module = full_size(name)
    own = OWN_KEYS.get(name, set())
    given = {**tensors, **{key: value for key, value in module.state_dict().items() if key in own}}
    module.load_state_dict(given, strict=True, assign=True)
    counted = sum(tensor.numel() for key, tensor in module.state_dict().items() if key not in own)
    assert counted == listing["n_parameters_unique"]


@pytest.mark.parametrize("name", LISTINGS)
def test_a_key_or_shape_too_many_or_too_few_is_refused(listing_dir: Path, name: str) -> None:
    _, tensors = listed(listing_dir, name)
    key = next(key for key, tensor in tensors.items() if tensor.dim() == 2 and "lm_head" not in key)
    with torch.device("meta"):
        wrong = {"one more": {**tensors, "strange.weight": torch.empty(1)}, "another shape": {**tensors}}
        wrong["another shape"][key] = torch.empty(3, 5)
    module = full_size(name)
    own = {k: v for k, v in module.state_dict().items() if k in OWN_KEYS.get(name, set())}
    wrong["one less"] = {other: tensor for other, tensor in tensors.items() if other != key}
    for what, given in wrong.items():
        with pytest.raises(RuntimeError, match="strange|size mismatch|Missing key"):
            module.load_state_dict({**given, **own}, strict=True, assign=True)
            pytest.fail(what)


def test_the_smaller_llm_has_the_sizes_of_the_voice_lms_trunk(listing_dir: Path) -> None:
    """Qwen2.5-0.5B: the same trunk as CosyVoice 2's voice LM, whose listing names every shape of it."""
    _, tensors = listed(listing_dir, "cosyvoice2_llm")
    with torch.device("meta"):
        module = module_of("llm", read_profile(profile_folder("minmo-small"))["llm"])
    trunk = {key.removeprefix("llm.model."): value for key, value in tensors.items() if key.startswith("llm.model.")}
    trunk.pop("lm_head.weight")  # tied
    module.load_state_dict(trunk, strict=True, assign=True)


def test_old_weight_norm_names_and_the_prefix_reach_every_key_of_the_vocoder(listing_dir: Path) -> None:
    _, tensors = listed(listing_dir, "cosyvoice2_hift")
    old = {
        "generator."
        + key.replace(".parametrizations.weight.original0", ".weight_g").replace(
            ".parametrizations.weight.original1", ".weight_v"
        ): tensor
        for key, tensor in tensors.items()
    }
    assert not set(old) & set(tensors)
    full_size("cosyvoice2_hift").load_state_dict(hift_keys(old), strict=True, assign=True)


def test_the_papers_sizes_hit_its_parameter_counts() -> None:
    """Table 1 of arXiv 2501.06282; what it does not print is chosen to hit these (facts/minmo.md 1.1)."""
    contents = read_profile(profile_folder("minmo-8b-paper"))
    millions = {}
    with torch.device("meta"):
        for part in ("encoder", "projector", "output_projector", "duplex"):
            millions[part] = sum(p.numel() for p in module_of(part, contents[part]).parameters()) / 1e6
    ctc_head = contents["encoder"]["vocab_size"] * (contents["encoder"]["output_size"] + 1) / 1e6  # ours
    assert millions["encoder"] - ctc_head == pytest.approx(636, rel=0.02)
    assert millions["projector"] == pytest.approx(170, rel=0.03)
    assert millions["output_projector"] == pytest.approx(6.42, rel=0.01)
    assert millions["duplex"] == pytest.approx(18, rel=0.05)
