"""Tiny checkpoints with random weights in the parents' own formats: keys, files and tokenizers as they are published.

The profile is the shipped `minmo-8b` with smaller sizes, so that its references and tables are what is tested.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers

from minmo_runtime.checkpoint_contents import module_of, toml_of
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.profiles import profile_folder, read_profile
from minmo_runtime.prompt_voice import PromptVoice, write_prompt_voice
from minmo_runtime.random_checkpoint import byte_tokenizer

QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
PIECES = ("<unk>", "<s>", "</s>", "▁", *(f"<|{tag}|>" for tag in ("en", "NEUTRAL", "Speech", "woitn")))
LETTERS = "etaoinshrdlcumwfgypbvkxjqz'"

SMALL: dict[str, dict[str, Any]] = {
    "encoder": {"output_size": 32, "linear_units": 48, "num_blocks": 2, "tp_blocks": 1},
    "llm": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 304,
    },
    "voice_lm": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "speech_token_size": 27,
        "text_vocab_size": 300,
        "max_voice_per_text": 3.0,
    },
    "flow": {
        "vocab_size": 27,
        "spk_embed_dim": 8,
        "n_timesteps": 2,
        "encoder": {
            "output_size": 32,
            "attention_heads": 2,
            "linear_units": 48,
            "num_blocks": 1,
            "num_up_blocks": 1,
            "static_chunk_size": 25,
            "pre_lookahead_len": 3,
        },
        "estimator": {"channels": 32, "attention_head_dim": 8, "num_heads": 2, "n_blocks": 1, "num_mid_blocks": 1},
    },
    "vocoder": {"kind": "hift", "base_channels": 32, "f0_cond_channels": 16},
}


def write_public_checkpoint(root: Path, profile: str = "minmo-8b", seed: int = 0) -> tuple[Path, Path]:
    """(profile folder, models folder), complete: every file that the shipped profile names."""
    models, folder = root / "models", root / "profile"
    folder.mkdir(parents=True)
    contents = read_profile(profile_folder(profile))
    write_sensevoice(models / "sensevoice-small", contents, seed)
    if profile.startswith("minmo"):
        contents = _small(contents, "llm", "voice_lm", "flow", "vocoder")
        write_cosyvoice(models / "cosyvoice2-0.5b", contents, seed)
        llm = contents["files"]["llm"]["path"].partition(":")
        write_qwen(models / llm[0], contents["llm"], is_sharded=llm[2].endswith("index.json"), seed=seed)
        write_prompt_voice(random_voice(contents), models / "prompt_voice" / "agent.safetensors")
    (folder / "checkpoint.toml").write_text(toml_of(contents), encoding="utf-8")
    return folder, models


def _small(contents: dict[str, Any], *parts: str) -> dict[str, Any]:
    for part in parts:
        contents[part] = {**contents[part], **SMALL[part]}
        if part == "llm":
            contents[part].pop("head_dim", None)
    return contents


def random_voice(contents: dict[str, Any], num_tokens: int = 20) -> PromptVoice:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(contents["flow"]["vocab_size"], (num_tokens,), generator=generator)
    mel = torch.randn(1, 80, 2 * num_tokens, generator=generator) - 5
    speaker = torch.randn(1, contents["flow"]["spk_embed_dim"], generator=generator)
    return PromptVoice(speaker, tuple(tokens.tolist()), mel, "hello this is my voice")


def _module(part: str, contents: dict[str, Any], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = module_of(part, contents[part])
    if isinstance(module, (Backbone, VoiceLm)):
        module.init_weights(torch.Generator().manual_seed(seed))
    return module


# ------------------------------------------------------------------ SenseVoice


def write_sensevoice(folder: Path, contents: dict[str, Any], seed: int) -> None:
    """model.pt (keys of the parent, no mean and variance), am.mvn, a SentencePiece model."""
    folder.mkdir(parents=True)
    contents = _small(contents, "encoder")
    contents["encoder"]["vocab_size"] = len(PIECES) + len(LETTERS)
    weights = _module("encoder", contents, seed).state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith("cmvn")}
    weights["ctc.ctc_lo.weight"] *= 8  # clear decisions, so that a re-run may keep them
    torch.save({"state_dict": weights}, folder / "model.pt")
    width = contents["encoder"]["num_mel_bins"] * contents["encoder"]["lfr_m"]
    (folder / "am.mvn").write_text(am_mvn([-8.0] * width, [0.25] * width))
    (folder / "chn_jpn_yue_eng_ko_spectok.bpe.model").write_bytes(sentencepiece_model())


def am_mvn(shift: list[float], scale: list[float]) -> str:
    size = len(shift)
    rows = [
        f"<{name}> {size} {size} \n<LearnRateCoef> 0 [ {' '.join(map(str, values))} ]"
        for name, values in (("AddShift", shift), ("Rescale", scale))
    ]
    return "<Nnet> \n<Splice> 560 560 \n[ 0 ]\n" + "\n".join(rows) + "\n</Nnet> \n"


def sentencepiece_model(model_type: int = 2) -> bytes:
    """A ModelProto by hand: unknown, control and user-defined pieces, then letters with scores."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {piece: 4 for piece in PIECES if piece.startswith("<|")}
    body = b""
    for index, piece in enumerate((*PIECES, *LETTERS)):
        inner = _bytes_field(1, piece.encode()) + b"\x15" + struct.pack("<f", -float(index))
        inner += b"\x18" + bytes([kinds.get(piece, 1)])
        body += _bytes_field(1, inner)
    return body + _bytes_field(2, b"\x18" + bytes([model_type])) + _bytes_field(3, b"\x18\x01")


def _bytes_field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


# ------------------------------------------------------------ Qwen2, CosyVoice 2


def write_qwen(folder: Path, dims: dict[str, Any], is_sharded: bool, seed: int) -> None:
    """tokenizer.json and bfloat16 weights, in two shards with an index or in one file."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = {
        k: v.to(torch.bfloat16).contiguous() for k, v in _module("llm", {"llm": dims}, seed).state_dict().items()
    }
    (folder / "config.json").write_text(json.dumps(dims))
    if not is_sharded:
        save_file(weights, folder / "model.safetensors")
        return
    keys, weight_map = sorted(weights), {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_cosyvoice(folder: Path, contents: dict[str, Any], seed: int) -> None:
    """llm.pt with the tied head a second time, flow.pt, hift.pt with its old names and prefix, BlankEN's tokenizer."""
    folder.mkdir(parents=True)
    llm = _module("voice_lm", contents, seed).state_dict()
    torch.save({**llm, "llm.model.lm_head.weight": llm["llm.model.model.embed_tokens.weight"]}, folder / "llm.pt")
    torch.save(_module("flow", contents, seed).state_dict(), folder / "flow.pt")
    old = {
        "generator."
        + key.replace(".parametrizations.weight.original0", ".weight_g").replace(
            ".parametrizations.weight.original1", ".weight_v"
        ): value
        for key, value in _module("vocoder", contents, seed).state_dict().items()
    }
    torch.save(old, folder / "hift.pt")
    blank = folder / "CosyVoice-BlankEN"
    blank.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)} | {"he": 256, "ll": 257}
    (blank / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (blank / "merges.txt").write_text("#version: 0.2\nh e\nl l\n")
    added = {str(258 + index): {"content": mark} for index, mark in enumerate(QWEN_MARKS[:3])}
    (blank / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (blank / "config.json").write_text("{}")


def qwen_tokenizer() -> Tokenizer:
    return byte_tokenizer()
