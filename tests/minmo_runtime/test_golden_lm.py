"""The voice LM and its sampling against numbers made by the public reference code (random weights, small sizes).

The vectors under `tests/fixtures/golden/` are copies; `--golden-dir` or the sibling folder `../shared/reference`
replace them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minmo_runtime.model.interleave import InterleaveRules, RowKind, VoiceTurn, training_layout
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims
from minmo_runtime.sampling import SamplingRules, nucleus, probabilities, ras_sample

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "golden"
SHARED = ROOT.parent / "shared" / "reference"
# Of the trace: 0 start, 1 task, 2 text, 3 speech; the enum has the same numbers.
TRACE_KIND = {RowKind.START: 0, RowKind.TURN_OF_SPEECH: 1, RowKind.TEXT: 2, RowKind.VOICE: 3}


@pytest.fixture(scope="module")
def golden(request):
    chosen = request.config.getoption("--golden-dir", default=None)
    folder = Path(chosen) if chosen else SHARED if (SHARED / "lm_io.safetensors").exists() else FIXTURES
    if not (folder / "lm_io.safetensors").exists():
        pytest.skip(f"no golden vectors in {folder}")
    return folder


@pytest.fixture(scope="module")
def lm(golden):
    config = json.loads((golden / "lm_config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    dims = VoiceLmDims(
        **{name: config[name] for name in names},
        speech_token_size=config["speech_token_size"],
        text_vocab_size=config["vocab_size"],
        rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
    )
    model = VoiceLm(dims)
    model.load_state_dict(load_file(golden / "lm_weights.safetensors"), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def io(golden):
    return load_file(golden / "lm_io.safetensors")


def decode(lm, rules, text_ids, prompt_text_ids, prompt_voice):
    """Greedy decode as the reference did, with every fed row and the logits behind it."""
    turn = VoiceTurn(rules, prompt_voice=prompt_voice, num_prompt_text=len(prompt_text_ids))
    ids = [*prompt_text_ids, *text_ids]
    vectors = list(lm.text_vectors(torch.tensor(ids)))
    turn.push_text(len(ids))
    turn.finish_text()
    cache, fed, logits = lm.new_cache(1, 256), [], []
    while rows := turn.next_rows():
        with torch.no_grad():
            hidden = lm.trunk(embeds=lm.embed_rows(rows, vectors)[None], cache=cache)
            scores = lm.llm_decoder(hidden)[0]
        fed += [(TRACE_KIND[row.kind], ids[row.index] if row.kind is RowKind.TEXT else row.index) for row in rows]
        logits.append(scores)
        allowed = scores[-1].clone()
        allowed[list(turn.banned)] = -torch.inf
        turn.accept(int(allowed.argmax()))
    return turn, fed, torch.cat(logits)


def check_trace(io, name, fed, logits):
    """Same rows in the same order, and the same logits at the last row of each of the reference's forward calls.

    The reference spends a forward call on the voice row before a forced fill; ours feeds that row together with the
    next block, so the comparison is by row and not by call.
    """
    kinds, indices = io[f"{name}.trace.kind"].tolist(), io[f"{name}.trace.id"].tolist()
    expected = [(kind, index if kind in (2, 3) else 0) for kind, index in zip(kinds, indices, strict=True)]
    assert fed == expected
    calls = io[f"{name}.trace.forward_index"]
    last_rows = [row for row in range(len(calls)) if row + 1 == len(calls) or calls[row + 1] != calls[row]]
    torch.testing.assert_close(logits[last_rows], io[f"{name}.out.step_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["unistream0", "unistream1"])
def test_one_shot_decode_is_the_references(lm, io, name):
    text, prompt = io[f"{name}.in.text"][0].tolist(), io[f"{name}.in.prompt_text"][0].tolist()
    # `ban_other_stops` off: the reference's one-shot decode also ends on fill (unistream1 does).
    rules = lm.dims.rules(interleaved=False, min_voice_per_text=2.0, max_voice_extra=0, ban_other_stops=False)
    turn, fed, logits = decode(lm, rules, text, prompt, io[f"{name}.in.prompt_speech_token"][0].tolist())
    assert turn.voice_tokens == io[f"{name}.out.tokens"].tolist()
    check_trace(io, name, fed, logits)


@pytest.mark.parametrize("name", ["unistream0", "unistream1"])
def test_one_forward_over_all_rows_is_the_references(lm, io, name):
    with torch.no_grad():
        hidden = lm.trunk(embeds=io[f"{name}.in.full_input_embeds"])
        torch.testing.assert_close(hidden, io[f"{name}.out.full_hidden"], atol=1e-4, rtol=0)
        torch.testing.assert_close(lm.llm_decoder(hidden), io[f"{name}.out.full_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bistream0", "bistream1", "bistream2", "bistream3"])
def test_interleaved_decode_is_the_references_with_its_oddity_switched_on(lm, io, name):
    """The repeated voice row before the final text is reproduced here and switched off by default (see
    InterleaveRules).
    """
    text, prompt = io[f"{name}.in.text"][0].tolist(), io[f"{name}.in.prompt_text"][0].tolist()
    rules = lm.dims.rules(accept_early_fill=True, repeat_last_row=True, ban_other_stops=False, max_voice_extra=1000)
    turn, fed, logits = decode(lm, rules, text, prompt, io[f"{name}.in.prompt_speech_token"][0].tolist())
    assert turn.voice_tokens == io[f"{name}.out.tokens"].tolist()
    assert turn.decoded == io[f"{name}.out.emitted_with_fill_eos"].tolist()
    check_trace(io, name, fed, logits)


@pytest.mark.parametrize("name", ["train_unistream", "train_mixed"])
def test_training_layout_targets_logits_and_loss_are_the_references(lm, io, name):
    texts, speech = io[f"{name}.in.text_token"], io[f"{name}.in.speech_token"]
    rules = lm.dims.rules(interleaved=name == "train_mixed")
    losses_logits, losses_targets = [], []
    for item in range(len(texts)):
        num_text = int(io[f"{name}.in.text_token_len"][item])
        voice = speech[item, : int(io[f"{name}.in.speech_token_len"][item])].tolist()
        layout = training_layout(num_text, voice, rules)
        length = len(layout.rows)
        assert length == int(io[f"{name}.out.input_len"][item])
        # The golden target stands at the row that predicts it, as ours does.
        assert list(layout.targets) == io[f"{name}.out.target"][item, :length].tolist()
        kinds = torch.tensor([[row.kind.value for row in layout.rows]])
        indices = torch.tensor([[row.index for row in layout.rows]])
        assert kinds[0].tolist() == io[f"{name}.out.input_kind"][item, :length].tolist()
        semantic = lm.text_vectors(texts[item : item + 1, :num_text])
        with torch.no_grad():
            logits = lm(lm.embed_layout(kinds, indices, semantic))[0]
        torch.testing.assert_close(logits, io[f"{name}.out.logits"][item, :length], atol=1e-4, rtol=0)
        losses_logits.append(logits)
        losses_targets += layout.targets
    loss = torch.nn.functional.cross_entropy(torch.cat(losses_logits), torch.tensor(losses_targets), ignore_index=-1)
    torch.testing.assert_close(loss, io[f"{name}.out.loss"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", range(4))
def test_ras_nucleus_and_forced_draws_are_the_references(golden, case):
    io = load_file(golden / "ras_io.safetensors")
    facts = json.loads((golden / "ras_facts.json").read_text())[case]
    scores, decoded = io[f"ras{case}.in.log_probs"].numpy(), io[f"ras{case}.in.decoded"].tolist()
    rules = SamplingRules()
    ids, weights = nucleus(probabilities(scores), rules.top_p, rules.top_k)
    assert ids.tolist() == io[f"ras{case}.mid.nucleus_ids"].tolist()
    np.testing.assert_allclose(weights, io[f"ras{case}.mid.nucleus_weights_unnormalised"].numpy(), atol=1e-6)
    draws = iter([lambda _: facts["first_pick_index"], lambda w: int(np.argmax(w))])
    token = ras_sample(scores, decoded, rules, lambda w: next(draws)(w))
    assert token == int(io[f"ras{case}.out.token_with_forced_draws"]) == facts["result"]
    assert (next(draws, None) is None) == facts["repetition_branch"]


def test_full_size_listing_is_our_state_dict(golden):
    listing_file = golden / "cosyvoice2_llm.json"
    if not listing_file.exists():
        pytest.skip("the full-size listing is not in the fixtures")
    listing = json.loads(listing_file.read_text())
    with torch.device("meta"):
        model = VoiceLm(VoiceLmDims(896, 24, 14, 2, 4864, speech_token_size=6561, text_vocab_size=151936))
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    theirs = {key: list(shape) for key, shape in shapes(listing).items()}
    assert theirs.pop("llm.model.lm_head.weight") == [151936, 896]
    assert ours == theirs


def shapes(listing):
    """Key -> shape, whichever of the listing's forms it has."""
    table = listing.get("tensors", listing)
    return {key: value["shape"] if isinstance(value, dict) else value for key, value in table.items()}


def test_rules_name_the_three_stop_ids(golden):
    config = json.loads((golden / "lm_config.json").read_text())
    rules = InterleaveRules(config["speech_token_size"])
    assert [rules.end_id, rules.unused_id, rules.fill_id] == config["stop_token_ids"]
