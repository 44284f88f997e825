"""The voice LM and its sampling against numbers made by the public reference code (random weights, small sizes).

The reference's oddities are reproduced here behind switches that service leaves off (interleave.InterleaveRules):
the last input fed twice after a fill, 15 voice tokens without new text behind a prompt of whole blocks, any stop id
ending a one-shot turn, a fill taken before its place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minmo_runtime.model.interleave import InterleaveRules, RowKind, VoiceTurn, training_layout
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims
from minmo_runtime.sampling import SamplingRules, nucleus, probabilities, ras_sample
from tests.minmo_runtime.golden import Case, Tensors, max_error, scenario, scenarios

# Of the trace: 0 start, 1 task, 2 text, 3 speech; the enum has the same numbers.
TRACE_KIND = {RowKind.START: 0, RowKind.TURN_OF_SPEECH: 1, RowKind.TEXT: 2, RowKind.VOICE: 3}
TOLERANCE = 1e-4
# The parent's one-shot limits, constants of its code: voice tokens per text token.
MIN_PER_TEXT, MAX_PER_TEXT = 2.0, 20.0


@pytest.fixture(scope="module")
def case(golden_dir: Path) -> Case:
    return Case(golden_dir, "lm")


@pytest.fixture(scope="module")
def io(case: Case) -> Tensors:
    return case.vectors()


@pytest.fixture(scope="module")
def lm(case: Case) -> VoiceLm:
    config = case.config
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size rope_theta "
    names += "rms_norm_eps speech_token_size"
    dims = VoiceLmDims(
        **{name: config[name] for name in names.split()},
        text_vocab_size=config["vocab_size"],
        num_text=config["mix_ratio"][0],
        num_voice=config["mix_ratio"][1],
        max_voice_per_text=MAX_PER_TEXT,
    )
    model = VoiceLm(dims)
    model.load_state_dict(case.weights(), strict=True)
    return model.eval()


# Its interleaved decode; it has no cap in its last phase.
AS_REFERENCE: dict[str, Any] = {
    "accept_early_fill": True,
    "repeat_last_input": True,
    "continue_whole_prompt": True,
    "ban_other_stops": False,
    "max_voice_extra": 1000,
}

Decoded = tuple[VoiceTurn, list[tuple[int, int]], torch.Tensor]


def decode(lm: VoiceLm, rules: InterleaveRules, v: Tensors) -> Decoded:
    """Greedy decode as the reference did, with every fed row and the logits behind it."""
    prompt_text, text = v["in.prompt_text"][0].tolist(), v["in.text"][0].tolist()
    turn = VoiceTurn(rules, prompt_voice=v["in.prompt_speech_token"][0].tolist(), num_prompt_text=len(prompt_text))
    ids = [*prompt_text, *text]
    vectors = list(lm.text_vectors(torch.tensor(ids, dtype=torch.long)))
    turn.push_text(len(ids))
    turn.finish_text()
    longest = len(v["trace.kind"]) + round(rules.max_voice_per_text + 2) * len(ids) + 64
    cache, fed, logits = lm.new_cache(1, longest), [], []
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


def check_trace(v: Tensors, fed: list[tuple[int, int]], logits: torch.Tensor) -> None:
    """Same rows in the same order, and the same logits at the last row of each of the reference's forward calls.

    The reference spends a forward call on the voice row before a forced fill; ours feeds that row together with the
    next block, so the comparison is by row and not by call.
    """
    kinds, indices = v["trace.kind"].tolist(), v["trace.id"].tolist()
    assert fed == [(kind, index if kind in (2, 3) else 0) for kind, index in zip(kinds, indices, strict=True)]
    calls = v["trace.forward_index"].tolist()
    last_rows = [row for row in range(len(calls)) if row + 1 == len(calls) or calls[row + 1] != calls[row]]
    assert max_error(logits[last_rows], v["out.step_logits"]) < TOLERANCE


def test_one_shot_decode_is_the_references(lm: VoiceLm, io: Tensors) -> None:
    # `ban_other_stops` off: the reference's one-shot decode also ends on fill and on the unused id.
    rules = lm.dims.rules(interleaved=False, min_voice_per_text=MIN_PER_TEXT, max_voice_extra=0, ban_other_stops=False)
    for name in scenarios(io, "unistream"):
        v = scenario(io, name)
        turn, fed, logits = decode(lm, rules, v)
        assert turn.voice_tokens == v["out.tokens"].tolist(), name
        check_trace(v, fed, logits)


@torch.no_grad()
def test_one_forward_over_all_rows_is_the_references(lm: VoiceLm, io: Tensors) -> None:
    for name in scenarios(io, "unistream"):
        v = scenario(io, name)
        hidden = lm.trunk(embeds=v["in.full_input_embeds"])
        assert max_error(hidden, v["out.full_hidden"]) < TOLERANCE, name
        assert max_error(lm.llm_decoder(hidden), v["out.full_logits"]) < TOLERANCE, name


def test_interleaved_decode_is_the_references_with_its_oddity_switched_on(lm: VoiceLm, io: Tensors) -> None:
    """The repeated input before the final text is reproduced here and off in service: training has no such row."""
    rules = lm.dims.rules(**AS_REFERENCE)
    for name in scenarios(io, "bistream"):
        v = scenario(io, name)
        turn, fed, logits = decode(lm, rules, v)
        assert turn.voice_tokens == v["out.tokens"].tolist(), name
        assert turn.decoded == v["out.emitted_with_fill_eos"].tolist(), name
        check_trace(v, fed, logits)


def test_replies_in_company_are_the_references(lm: VoiceLm, io: Tensors) -> None:
    """As served: every interleaved scenario in one batch, text arriving token by token, the likeliest id each time."""
    rules = lm.dims.rules(**AS_REFERENCE)
    likeliest = SamplingRules(temperature=0.0)
    all_v = [scenario(io, name) for name in scenarios(io, "bistream")]
    longest = max(len(v["trace.kind"]) for v in all_v) + 64
    cache, streams, waiting = lm.new_cache(len(all_v), longest), [], []
    for slot, v in enumerate(all_v):
        prompt_text, voice = v["in.prompt_text"][0], v["in.prompt_speech_token"][0].tolist()
        stream = lm.new_stream(slot, slot, rules, likeliest, prompt_voice=voice, num_prompt_text=len(prompt_text))
        stream.push(lm.text_vectors(prompt_text))
        streams.append(stream)
        waiting.append(list(lm.text_vectors(v["in.text"][0])))
    for _ in range(2 * longest):
        for stream, vectors in zip(streams, waiting, strict=True):
            if vectors:
                stream.push(vectors.pop(0)[None])
                if not vectors:
                    stream.finish()
        lm.decode_step(streams, cache)
    for stream, v in zip(streams, all_v, strict=True):
        assert stream.turn.decoded == v["out.emitted_with_fill_eos"].tolist()


def test_service_feeds_each_voice_row_once(lm: VoiceLm, io: Tensors) -> None:
    """Without the switch the rows of a reply are its training layout: no row stands twice."""
    for name in scenarios(io, "bistream"):
        v = scenario(io, name)
        turn, fed, _ = decode(lm, lm.dims.rules(), v)
        prompt = v["in.prompt_speech_token"][0].tolist()
        voice = [index for kind, index in fed if kind == TRACE_KIND[RowKind.VOICE]]
        assert voice == [*prompt, *turn.voice_tokens][: len(voice)], name


@torch.no_grad()
def test_training_layout_targets_logits_and_loss_are_the_references(lm: VoiceLm, io: Tensors) -> None:
    for name in scenarios(io, "train_"):
        v = scenario(io, name)
        rules = lm.dims.rules(interleaved=name == "train_mixed")
        all_logits, all_targets = [], []
        for item, num_text in enumerate(v["in.text_token_len"].tolist()):
            voice = v["in.speech_token"][item, : int(v["in.speech_token_len"][item])].tolist()
            layout = training_layout(num_text, voice, rules)
            length = len(layout.rows)
            assert length == int(v["out.input_len"][item])
            # The golden target stands at the row that predicts it, as ours does.
            assert list(layout.targets) == v["out.target"][item, :length].tolist()
            kinds = torch.tensor([[row.kind.value for row in layout.rows]])
            indices = torch.tensor([[row.index for row in layout.rows]])
            assert kinds[0].tolist() == v["out.input_kind"][item, :length].tolist()
            semantic = lm.text_vectors(v["in.text_token"][item : item + 1, :num_text])
            logits = lm(lm.embed_layout(kinds, indices, semantic))[0]
            assert max_error(logits, v["out.logits"][item, :length]) < TOLERANCE
            all_logits.append(logits)
            all_targets += layout.targets
        logits, targets = torch.cat(all_logits), torch.tensor(all_targets)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)
        assert max_error(loss, v["out.loss"]) < TOLERANCE
        is_counted = targets >= 0
        hits = (logits.argmax(-1) == targets)[is_counted].float().mean()
        assert max_error(hits, v["out.acc"]) < TOLERANCE


def test_ras_nucleus_and_forced_draws_are_the_references(golden_dir: Path) -> None:
    case = Case(golden_dir, "ras")
    io, rules = case.vectors(), SamplingRules()
    for fact in case.facts:
        v = scenario(io, f"ras{fact['case']}")
        scores, decoded = v["in.log_probs"].numpy(), v["in.decoded"].tolist()
        ids, weights = nucleus(probabilities(scores), rules.top_p, rules.top_k)
        assert ids.tolist() == v["mid.nucleus_ids"].tolist()
        np.testing.assert_allclose(weights, v["mid.nucleus_weights_unnormalised"].numpy(), atol=1e-6)
        seen: list[np.ndarray] = []

        def draw(weights: np.ndarray, seen: list[np.ndarray] = seen, first: int = fact["first_pick_index"]) -> int:
            seen.append(weights)
            return first if len(seen) == 1 else int(np.argmax(weights))

        token = ras_sample(scores, decoded, rules, draw)
        assert token == int(v["out.token_with_forced_draws"]) == fact["result"]
        assert (len(seen) == 2) == fact["repetition_branch"]
        if "mid.second_draw_probs" in v:  # from the FULL softmax, the repeated id banned
            np.testing.assert_allclose(seen[1], v["mid.second_draw_probs"].numpy(), atol=1e-6)


def test_rules_name_the_three_stop_ids(case: Case) -> None:
    config = case.config
    rules = InterleaveRules(config["speech_token_size"])
    assert [rules.end_id, rules.unused_id, rules.fill_id] == config["stop_token_ids"]


def fed_rows(
    rules: InterleaveRules, num_text: int, drawn: list[int], prompt_voice: list[int] | None = None
) -> list[str]:
    """The rows of every pass, as in the facts of the vectors (`S`, `t0`, `T`, `s7`), for ids drawn in this order."""
    turn, passes = VoiceTurn(rules, prompt_voice=prompt_voice or ()), []
    turn.push_text(num_text)
    turn.finish_text()
    names = {RowKind.START: "S", RowKind.TURN_OF_SPEECH: "T", RowKind.TEXT: "t", RowKind.VOICE: "s"}
    while rows := turn.next_rows():
        passes.append(" ".join(names[row.kind] + (str(row.index) if names[row.kind].islower() else "") for row in rows))
        turn.accept(drawn[len(passes) - 1])
    return passes


def test_a_fill_straight_behind_text_makes_the_reference_feed_that_text_twice() -> None:
    """Seen in sets whose model draws *fill* at once; service feeds each row once."""
    rules = InterleaveRules(10, num_text=2, num_voice=3, accept_early_fill=True)
    drawn = [rules.fill_id, 4, rules.end_id]
    assert fed_rows(rules, 3, drawn) == ["S t0 t1", "t2 T", "s4"]
    as_reference = replace(rules, repeat_last_input=True)
    assert fed_rows(as_reference, 3, drawn) == ["S t0 t1", "S t0 t1 t2 T", "s4"]
    assert fed_rows(as_reference, 5, [1, 12, 12, 4, 10]) == ["S t0 t1", "s1", "t2 t3", "t2 t3 t4 T", "s4"]


def test_behind_a_prompt_of_whole_blocks_text_follows_and_in_the_reference_voice_does() -> None:
    rules = InterleaveRules(10, num_text=2, num_voice=3)
    drawn, prompt = [4, 5, 6, 7, rules.end_id], [1, 2, 3]
    assert fed_rows(rules, 5, drawn, prompt)[0] == "S t0 t1 s1 s2 s3 t2 t3"
    as_reference = replace(rules, continue_whole_prompt=True)
    assert fed_rows(as_reference, 5, drawn, prompt)[:4] == ["S t0 t1 s1 s2 s3", "s4", "s5", "s6 t2 t3"]
