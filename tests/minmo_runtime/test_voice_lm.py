"""The voice LM's row order, its training layout, and several calls in one batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minmo_runtime.model.interleave import IGNORED, InterleaveRules, Phase, Row, RowKind, VoiceTurn, training_layout
from minmo_runtime.model.voice_lm import VoiceLm, VoiceLmDims
from minmo_runtime.sampling import SamplingRules, draw_with, ras_sample

RULES = InterleaveRules(100, num_text=2, num_voice=3)
KIND = RowKind


def letters(rows):
    """Rows as short words: S start, q query, t text, T turn of speech, v voice."""
    return " ".join(
        {KIND.START: "S", KIND.TURN_OF_SPEECH: "T"}.get(r.kind, f"{r.kind.name[0].lower()}{r.index}") for r in rows
    )


def test_layout_of_the_docstring():
    layout = training_layout(3, [10, 11, 12, 13, 14], RULES)
    assert letters(layout.rows) == "S t0 t1 v10 v11 v12 t2 T v13 v14"
    assert layout.targets == (IGNORED, IGNORED, 10, 11, 12, RULES.fill_id, IGNORED, 13, 14, RULES.end_id)


def test_too_little_voice_for_the_text_is_laid_out_one_shot():
    layout = training_layout(4, [10, 11, 12, 13, 14, 15], RULES)
    assert letters(layout.rows) == "S t0 t1 t2 t3 T v10 v11 v12 v13 v14 v15"


def test_waits_for_a_whole_block_and_then_for_the_next():
    turn = VoiceTurn(RULES)
    assert turn.next_rows() == []
    turn.push_text(1)
    assert turn.next_rows() == []
    turn.push_text(1)
    assert letters(turn.next_rows()) == "S t0 t1"
    assert turn.next_rows() == []  # not before the draw is accepted
    for token in (1, 2):
        assert turn.accept(token) == token
        assert letters(turn.next_rows()) == f"v{token}"
    assert turn.accept(3) == 3
    assert turn.phase is Phase.WAITING and turn.decoded == [1, 2, 3, RULES.fill_id]
    assert turn.next_rows() == []
    turn.push_text(2)
    assert letters(turn.next_rows()) == "v3 t2 t3"  # the last voice row goes in with the next block


def test_end_is_banned_while_text_is_open_and_fill_after_it():
    turn = VoiceTurn(RULES)
    turn.push_text(2)
    turn.next_rows()
    assert set(turn.banned) == {RULES.end_id, RULES.unused_id, RULES.fill_id}
    for token in (1, 2, 3):
        turn.accept(token)
        turn.next_rows()
    turn.finish_text()
    assert letters(turn.next_rows()) == "v3 T"
    assert set(turn.banned) == {RULES.unused_id, RULES.fill_id}
    assert turn.accept(RULES.end_id) is None
    assert turn.phase is Phase.DONE and turn.next_rows() == []


def test_a_turn_ends_at_its_cap_even_if_end_is_never_drawn():
    rules = InterleaveRules(100, interleaved=False, max_voice_per_text=2.0, max_voice_extra=1)
    turn = VoiceTurn(rules)
    turn.push_text(3)
    turn.finish_text()
    while turn.next_rows():
        turn.accept(5)
    assert len(turn.voice_tokens) == 7


def test_query_prefix_stands_between_start_and_text():
    turn = VoiceTurn(RULES, num_query=2)
    turn.push_text(2)
    assert letters(turn.next_rows()) == "S q0 q1 t0 t1"


@given(
    num_text=st.integers(0, 14),
    num_voice=st.integers(1, 40),
    num_query=st.integers(0, 3),
    interleaved=st.booleans(),
    arrivals=st.lists(st.integers(0, 5), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_serving_feeds_exactly_the_rows_of_training(num_text, num_voice, num_query, interleaved, arrivals):
    """Whatever the pace at which text arrives, a turn forced to say the true tokens feeds the rows of the training
    layout.
    """
    rules = InterleaveRules(100, num_text=2, num_voice=3, interleaved=interleaved)
    voice = list(range(num_voice))
    if interleaved and num_voice * 2 <= num_text * 3:
        return  # laid out one-shot, the engine does not know that beforehand
    layout = training_layout(num_text, voice, rules, num_query)
    turn, fed, left, pushed, paces = VoiceTurn(rules, num_query), [], list(voice), 0, iter(arrivals)
    while turn.phase is not Phase.DONE:
        rows = turn.next_rows()
        if not rows:
            step = next(paces, num_text)
            step = min(step, num_text - pushed)
            if pushed == num_text:
                turn.finish_text()
            else:
                turn.push_text(step)
                pushed += step
            continue
        fed += rows
        turn.accept(left.pop(0) if left else rules.end_id)
    assert tuple(fed) == layout.rows
    # The last row of each feed predicts what was accepted: every target that is a voice token or end is met in order.
    assert [t for t in layout.targets if t not in (IGNORED, rules.fill_id)] == [*voice, rules.end_id]


def tiny_lm():
    dims = VoiceLmDims(32, 2, 2, 1, 48, speech_token_size=40, text_vocab_size=30)
    model = VoiceLm(dims).eval()
    model.init_weights(torch.Generator().manual_seed(1))
    for parameter in model.parameters():  # the zero-started parts too, so that rows really look at each other
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def speak(model, cache, plan, seed_of=lambda index: index):
    """Decode several calls side by side; `plan[i]` = (slot, text ids, step at which the call joins, steps it stalls
    on).
    """
    rules = model.dims.rules(max_voice_per_text=6.0, max_voice_extra=10)
    streams, said, step = {}, {index: [] for index in range(len(plan))}, 0
    while step < 400 and (len(streams) < len(plan) or any(s.turn.phase is not Phase.DONE for s in streams.values())):
        for index, (slot, ids, join, _) in enumerate(plan):
            if join == step:
                streams[index] = model.new_stream(slot, seed_of(index), rules, SamplingRules())
                streams[index].push(model.text_vectors(torch.tensor(ids)).detach())
                streams[index].finish()
        active = [index for index in streams if step not in plan[index][3]]
        for index, token in zip(active, model.decode_step([streams[i] for i in active], cache), strict=True):
            if token is not None:
                said[index].append(token)
        step += 1
    assert all(s.turn.phase is Phase.DONE for s in streams.values())
    return said


def test_a_row_does_not_change_when_neighbours_join_leave_or_stall():
    model = tiny_lm()
    texts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], list(range(10, 23)), [3, 3, 3, 3, 3, 3]]
    together = [
        (2, texts[0], 0, {3, 4}),
        (0, texts[1], 2, ()),
        (3, texts[2], 5, set(range(9, 14))),
        (1, texts[3], 7, {8}),
    ]
    batch = speak(model, model.new_cache(4, 256), together)
    for index, text in enumerate(texts):
        alone = speak(model, model.new_cache(4, 256), [(0, text, 0, ())], seed_of=lambda _, i=index: i)
        assert alone[0] == batch[index]
        assert batch[index]


def test_step_by_step_logits_are_those_of_one_teacher_forced_forward():
    model = tiny_lm()
    rules = model.dims.rules()
    ids, voice = torch.arange(12), list(np.random.default_rng(0).integers(0, 40, 47))
    layout = training_layout(len(ids), voice, rules)
    kinds = torch.tensor([[row.kind.value for row in layout.rows]])
    indices = torch.tensor([[int(row.index) for row in layout.rows]])
    vectors = model.text_vectors(ids).detach()
    with torch.no_grad():
        offline = model(model.embed_layout(kinds, indices, vectors[None]))[0]
    turn, cache, left, row_index = VoiceTurn(rules), model.new_cache(1, 128), list(voice), -1
    turn.push_text(len(ids))
    turn.finish_text()
    while rows := turn.next_rows():
        with torch.no_grad():
            hidden = model.trunk(embeds=model.embed_rows(rows, list(vectors))[None], cache=cache)
        row_index += len(rows)
        torch.testing.assert_close(model.llm_decoder(hidden)[0, -1], offline[row_index], atol=1e-4, rtol=0)
        turn.accept(left.pop(0) if left else rules.end_id)
    assert row_index + 1 == len(layout.rows)


def test_a_row_with_nan_ends_alone():
    model = tiny_lm()
    rules, cache = model.dims.rules(), model.new_cache(2, 64)
    streams = [model.new_stream(slot, slot, rules, SamplingRules()) for slot in range(2)]
    good = model.text_vectors(torch.tensor([1, 2, 3, 4, 5])).detach()
    streams[0].push(good * torch.nan)
    streams[1].push(good)
    tokens = model.decode_step(streams, cache)
    assert tokens[0] is None and streams[0].is_failed and streams[0].turn.phase is Phase.DONE
    assert tokens[1] is not None and not streams[1].is_failed


def test_banned_ids_are_never_drawn():
    generator = draw_with(np.random.default_rng(0))
    scores = np.zeros(6)
    drawn = {ras_sample(scores, [], SamplingRules(top_p=1.0), generator, banned=(0, 5)) for _ in range(200)}
    assert drawn == {1, 2, 3, 4}


def test_an_id_that_was_just_said_is_drawn_again_only_from_the_others():
    generator = draw_with(np.random.default_rng(0))
    scores = np.array([9.0, 1.0, 1.0])
    assert all(ras_sample(scores, [0], SamplingRules(), generator) != 0 for _ in range(20))


def test_temperature_zero_is_the_most_likely_allowed_id():
    assert ras_sample(np.array([1.0, 3.0, 2.0]), [1], SamplingRules(temperature=0.0), lambda _: 0, banned=(1,)) == 2


def test_row_is_comparable():
    assert Row(KIND.VOICE, 3) == Row(KIND.VOICE, 3)


def test_accept_without_feeding_is_refused():
    with pytest.raises(AssertionError, match="nothing was fed"):
        VoiceTurn(RULES).accept(1)
