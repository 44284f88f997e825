"""The voice encoder reproduces SenseVoice: front end, blocks, queries, log-probabilities; and streaming equals
offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minmo_runtime.features import FbankStream, fbank, stack_frames
from minmo_runtime.full_context import EVENT_EMOTION_ROWS, LANGUAGE_ROWS, TEXT_NORM_ROWS, hear, query_rows
from minmo_runtime.model.dims import EncoderDims
from minmo_runtime.model.encoder import EncoderState, VoiceEncoder, collapse
from minmo_runtime.public_files import read_am_mvn
from tests.minmo_runtime.golden import Case, Tensors, max_error, scenario, scenarios


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> Case:
    return Case(golden_dir, "sensevoice")


@pytest.fixture(scope="module")
def config(case: Case) -> dict[str, Any]:
    return case.config


@pytest.fixture(scope="module")
def io(case: Case) -> Tensors:
    return case.vectors()


def golden_dims(config: dict[str, Any], weights: Tensors, **changes: Any) -> EncoderDims:
    """The reference's constructor values in our names."""
    model, front = config["model"], config["frontend"]
    assert model["sanm_shfit"] == 0, "shifted FSMN taps: SenseVoice has none"
    names = "output_size attention_heads linear_units num_blocks tp_blocks vocab_size kernel_size".split()
    return EncoderDims(
        **{name: model[name] for name in names},
        num_mel_bins=front["n_mels"],
        front_end="lfr",
        lfr_m=front["lfr_m"],
        lfr_n=front["lfr_n"],
        fsmn_padding="symmetric",
        num_queries=len(weights["embed.weight"]),
        **changes,
    )


@pytest.fixture(scope="module")
def parent(case: Case, config: dict[str, Any]) -> VoiceEncoder:
    weights = case.weights()
    encoder = VoiceEncoder(golden_dims(config, weights)).eval()
    encoder.load_state_dict(weights, strict=True)
    return encoder


def test_front_end_is_the_references(case: Case, config: dict[str, Any], io: Tensors) -> None:
    """Kaldi fbank, stacking, then mean and variance from am.mvn (whose "mean" row is already negated)."""
    front = config["frontend"]
    for name in scenarios(io, "frontend"):
        v = scenario(io, name)
        features = fbank(v["in.wav"], front["n_mels"])
        assert max_error(features, v["out.fbank"]) < 2e-3
        mvn = case.folder / "sensevoice_am.mvn"
        if not mvn.is_file():
            continue
        shift, scale = read_am_mvn(mvn)
        stacked = stack_frames(v["out.fbank"], front["lfr_m"], front["lfr_n"])
        assert len(stacked) == int(v["out.n"])
        assert max_error((stacked + shift) * scale, v["out.feats"]) < 1e-4  # from the reference's own fbank
        ours = (stack_frames(features, front["lfr_m"], front["lfr_n"]) + shift) * scale
        assert max_error(ours, v["out.feats"]) < 2e-3


def test_the_encoder_applies_the_file_of_means_by_itself(case: Case, config: dict[str, Any], io: Tensors) -> None:
    mvn = case.folder / "sensevoice_am.mvn"
    if not mvn.is_file():
        pytest.skip("sensevoice_am.mvn is not in this golden folder")
    weights = case.weights()
    encoder = VoiceEncoder(golden_dims(config, weights, has_cmvn=True)).eval()
    shift, scale = read_am_mvn(mvn)
    encoder.load_state_dict({**weights, "cmvn_shift": shift, "cmvn_scale": scale}, strict=True)
    front = config["frontend"]
    for name in scenarios(io, "frontend"):
        v = scenario(io, name)
        stacked = stack_frames(v["out.fbank"], front["lfr_m"], front["lfr_n"])
        assert max_error(encoder.normalise(stacked), v["out.feats"]) < 1e-4


def test_frame_stacking_for_every_length(config: dict[str, Any], io: Tensors) -> None:
    front, v = config["frontend"], scenario(io, "lfr")
    for key in [key for key in v if key.startswith("in.")]:
        assert torch.equal(stack_frames(v[key], front["lfr_m"], front["lfr_n"]), v[key.replace("in.", "out.")])


@torch.no_grad()
def test_encoder_blocks(io: Tensors, parent: VoiceEncoder) -> None:
    v = scenario(io, "encoder")
    seen: Tensors = {}
    stack = parent.encoder
    for name, module in (
        ("encoders0", stack.encoders0[-1]),
        ("encoders_last", stack.encoders[-1]),
        ("after_norm", stack.after_norm),
    ):
        module.register_forward_hook(lambda _, __, made, name=name: seen.__setitem__(name, made))
    lengths = v["in.lens"].long()
    hidden = stack(v["in.xs"], lengths)
    pairs = {name: (made, v[f"mid.{name}"]) for name, made in seen.items() if f"mid.{name}" in v}
    pairs["hidden"] = (hidden, v["out.hidden"])
    for name, (made, expected) in pairs.items():
        for row, length in enumerate(lengths.tolist()):
            assert max_error(made[row, :length], expected[row, :length]) < 1e-4, name


def test_query_rows_are_the_references(config: dict[str, Any]) -> None:
    assert config["lid"] == LANGUAGE_ROWS
    assert config["textnorm"] == TEXT_NORM_ROWS
    assert config["event_emo_ids"] == list(EVENT_EMOTION_ROWS)
    with pytest.raises(ValueError, match=r"language 'xx': must be one of auto, zh, en, yue, ja, ko, nospeech"):
        query_rows("xx")


@torch.no_grad()
def test_full_model_with_queries(case: Case, io: Tensors, parent: VoiceEncoder) -> None:
    for name, fact in case.facts.items():
        if not name.startswith("full"):
            continue
        v = scenario(io, name)
        features, lengths = v["in.feats"], v["in.lens"].long()
        rows = query_rows(fact["language"], has_itn=fact["use_itn"])
        queries = torch.tensor(rows).expand(len(features), -1)
        log_probs = parent.ctc_log_probs(parent(features, lengths + len(rows), queries))
        for row, length in enumerate((lengths + len(rows)).tolist()):
            assert max_error(log_probs[row, :length], v["out.log_probs"][row, :length]) < 1e-4
            assert collapse(log_probs[row, :length].argmax(-1)) == fact["ctc_greedy_token_ids"][row]


@torch.no_grad()
def test_samples_become_the_references_log_probs_as_a_call_is_served(
    case: Case, config: dict[str, Any], io: Tensors
) -> None:
    """Samples in pieces, means from am.mvn inside the encoder, segments of unequal length in one batch."""
    mvn = case.folder / "sensevoice_am.mvn"
    if not mvn.is_file():
        pytest.skip("sensevoice_am.mvn is not in this golden folder")
    weights = case.weights()
    encoder = VoiceEncoder(golden_dims(config, weights, has_cmvn=True)).eval()
    shift, scale = read_am_mvn(mvn)
    encoder.load_state_dict({**weights, "cmvn_shift": shift, "cmvn_scale": scale}, strict=True)
    waves = {name: scenario(io, name) for name in scenarios(io, "frontend")}
    fbanks = {name: pushed_in_pieces(v["in.wav"], config["frontend"]["n_mels"]) for name, v in waves.items()}
    compared = 0
    for full, fact in case.facts.items():
        v = scenario(io, full)
        for name, wave in waves.items():
            if not torch.equal(v["in.feats"], wave["out.feats"][None]):
                continue
            rows = query_rows(fact["language"], has_itn=fact["use_itn"])
            others = [fbank for other, fbank in fbanks.items() if other != name]
            expected = v["out.log_probs"][0]
            for heard in (hear(encoder, [fbanks[name]], rows)[0], hear(encoder, [*others, fbanks[name]], rows)[-1]):
                made = torch.from_numpy(heard.log_probs)
                assert max_error(made, expected[len(rows) :]) < 1e-3, (full, name)  # of the features' 2e-3
                assert list(heard.tag_ids) == expected[: len(rows)].argmax(-1).tolist()
                compared += 1
    if not compared:
        pytest.skip("no full* scenario here begins with the samples of a frontend*")


def pushed_in_pieces(wave: torch.Tensor, num_mel_bins: int) -> torch.Tensor:
    stream = FbankStream(num_mel_bins)
    return torch.cat([stream.push(piece) for piece in wave.split(997)])


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
