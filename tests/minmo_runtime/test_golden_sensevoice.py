"""The voice encoder reproduces SenseVoice: features, blocks, tags, log-probabilities; and streaming equals offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minmo_runtime.features import FbankStream, fbank, stack_frames
from minmo_runtime.model.dims import EncoderDims
from minmo_runtime.model.encoder import EncoderState, VoiceEncoder, collapse


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_dir / "sensevoice_io.safetensors")


@pytest.fixture(scope="module")
def parent(golden_dir: Path) -> VoiceEncoder:
    model = json.loads((golden_dir / "sensevoice_config.json").read_text())["model"]
    dims = EncoderDims(
        output_size=model["output_size"],
        attention_heads=model["attention_heads"],
        linear_units=model["linear_units"],
        num_blocks=model["num_blocks"],
        tp_blocks=model["tp_blocks"],
        vocab_size=model["vocab_size"],
        kernel_size=model["kernel_size"],
        front_end="lfr",
        lfr_m=7,
        lfr_n=6,
        fsmn_padding="symmetric",
        num_queries=16,
    )
    encoder = VoiceEncoder(dims).eval()
    encoder.load_state_dict(load_file(golden_dir / "sensevoice_weights.safetensors"))
    return encoder


def test_fbank_equals_kaldi(golden: dict[str, torch.Tensor]) -> None:
    for name in [key.split(".")[0] for key in golden if key.endswith("in.wav")]:
        torch.testing.assert_close(fbank(golden[f"{name}.in.wav"]), golden[f"{name}.out.fbank"], atol=2e-3, rtol=0)


def test_frame_stacking_for_every_length(golden: dict[str, torch.Tensor]) -> None:
    for key in [key for key in golden if key.startswith("lfr.in.")]:
        torch.testing.assert_close(
            stack_frames(golden[key], 7, 6), golden[key.replace(".in.", ".out.")], atol=0, rtol=0
        )


@torch.no_grad()
def test_encoder_blocks(golden: dict[str, torch.Tensor], parent: VoiceEncoder) -> None:
    lengths = golden["encoder.in.lens"].long()
    hidden = parent.encoder(golden["encoder.in.xs"], lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(hidden[row, :length], golden["encoder.out.hidden"][row, :length], atol=1e-4, rtol=0)


@torch.no_grad()
def test_full_model_with_queries(golden: dict[str, torch.Tensor], parent: VoiceEncoder, golden_dir: Path) -> None:
    config = json.loads((golden_dir / "sensevoice_config.json").read_text())
    facts = json.loads((golden_dir / "sensevoice_facts.json").read_text())
    for name, fact in facts.items():
        if not name.startswith("full"):
            continue
        features, lengths = golden[f"{name}.in.feats"], golden[f"{name}.in.lens"].long()
        norm = config["textnorm"]["withitn" if fact["use_itn"] else "woitn"]
        rows = [config["lid"][fact["language"]], *config["event_emo_ids"], norm]
        queries = torch.tensor(rows).expand(len(features), -1)
        log_probs = parent.ctc_log_probs(parent(features, lengths + len(rows), queries))
        for row, length in enumerate((lengths + len(rows)).tolist()):
            torch.testing.assert_close(
                log_probs[row, :length], golden[f"{name}.out.log_probs"][row, :length], atol=1e-4, rtol=0
            )
            assert collapse(log_probs[row, :length].argmax(-1)) == fact["ctc_greedy_token_ids"][row]


def streaming_encoder() -> VoiceEncoder:
    torch.manual_seed(0)
    dims = EncoderDims(
        output_size=32,
        attention_heads=4,
        linear_units=64,
        num_blocks=3,
        vocab_size=20,
        chunk_frames=4,
        left_context_frames=12,
    )
    return VoiceEncoder(dims).eval()


@torch.no_grad()
def test_streaming_equals_offline_for_random_pieces() -> None:
    encoder, generator = streaming_encoder(), torch.Generator().manual_seed(1)
    wave = torch.randn(16_000 * 3, generator=generator) * 0.1
    features = fbank(wave)
    whole = features[: len(features) // 16 * 16]
    offline = encoder(whole[None])[0]
    stream, state, pending, got, position = FbankStream(), encoder.init_state(), torch.zeros(0, 80), [], 0
    while position < len(wave):
        size = int(torch.randint(1, 3000, (1,), generator=generator))
        pending = torch.cat([pending, stream.push(wave[position : position + size])])
        position += size
        while len(pending) >= 16:
            hidden, state = encoder.forward_chunk(pending[None, :16], state)
            got.append(hidden[0])
            pending = pending[16:]
    torch.testing.assert_close(torch.cat(got), offline, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_row_is_alone_when_neighbours_join_and_leave() -> None:
    encoder = streaming_encoder()
    chunks = torch.randn(10, 16, 80, generator=torch.Generator().manual_seed(2))
    alone_state, alone = encoder.init_state(), []
    for chunk in chunks:
        hidden, alone_state = encoder.forward_chunk(chunk[None], alone_state)
        alone.append(hidden[0])
    mine, other, got = encoder.init_state(), encoder.init_state(), []
    for index, chunk in enumerate(chunks):
        if index % 3 == 1:  # the neighbour is there only now and then, with loud input
            hidden, state = encoder.forward_chunk(
                torch.stack([chunk * 9 + 3, chunk]), EncoderState.stack([other, mine])
            )
            other, mine = state.row(0), state.row(1)
            got.append(hidden[1])
        else:
            hidden, mine = encoder.forward_chunk(chunk[None], mine)
            got.append(hidden[0])
    torch.testing.assert_close(torch.stack(got), torch.stack(alone), atol=1e-5, rtol=1e-4)
