"""Stages 1-4: what stands where in a call, and the scores' arithmetic. No synthesis, no training."""

import numpy as np
import pytest
import torch

from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.text import TextTokenizer
from minmo_runtime.training.alignment_calls import AUDIO, call_turns, is_spoken, lay_out
from minmo_runtime.training.dialogues import Turn
from minmo_runtime.training.llm import encode_row
from minmo_runtime.training.semantic import caller_span, read_reply, replies_of
from minmo_runtime.training.speaker import equal_error_rate
from minmo_runtime.training.text_tokenizer import build


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(build())


TURNS = (
    Turn("system", "you are mia at north star."),
    Turn("assistant", "hello. how can i help you?"),
    Turn("user", "where is order 45612"),
    Turn("assistant", "<tool_call>look_up_order order_number 45612</tool_call>", True, "look_up_order"),
    Turn("tool", "status shipped day monday"),
    Turn("assistant", "order 45612 was shipped.", True, "say:shipped"),
    Turn("user", "keypad 0"),
    Turn("assistant", "goodbye.<tool_call>hang_up</tool_call>", True, "hang_up"),
)


def test_only_what_is_spoken_reaches_the_voice():
    found = replies_of(list(TURNS))
    assert [(reply.text, reply.caller) for reply in found] == [
        ("hello. how can i help you?", -1),
        ("order 45612 was shipped.", 2),
        ("goodbye.", 6),
    ]
    assert {reply.pace for reply in found} == {"normal"}


def test_the_query_is_exactly_the_callers_own_words(tokenizer):
    for reply in replies_of(list(TURNS))[1:]:
        ids = encode_row(reply.before, tokenizer).ids
        span = caller_span(reply, tokenizer)
        assert ids[span] == tokenizer.encode(reply.before[reply.caller].text)


def test_hidden_states_of_a_reply_are_those_that_sampled_its_tokens(tokenizer):
    llm = Backbone(BackboneDims(16, 1, 2, 1, 24, vocab_size=tokenizer.vocab_size)).eval()
    reply = replies_of(list(TURNS))[1]
    row = read_reply(llm, tokenizer, reply, max_query=3)
    ids = [*encode_row(reply.before, tokenizer).ids, *tokenizer.encode("<|im_start|>assistant\n")]
    # Step by step, as service does it: the state behind the context samples the first token, that token's the next.
    for position, token in enumerate(row["ids"].tolist()):
        with torch.no_grad():
            last = llm(torch.tensor([ids]))[0, -1]
        np.testing.assert_allclose(row["hidden"][position], last.numpy(), atol=2e-3)
        ids.append(token)
    assert tokenizer.decode(row["ids"].tolist()) == reply.text
    assert len(row["query_hidden"]) == len(row["query_embedding"]) == 3


def test_audio_stands_where_the_callers_text_stood(tokenizer):
    features = [np.zeros((50, 80), np.float16)]  # 50 fbank frames -> 13 encoder frames -> 6 positions
    call = lay_out(TURNS, features, tokenizer)
    assert int((call.ids == AUDIO).sum()) == 6
    bridge = lay_out(TURNS, features, tokenizer, ["where is order 45612"])
    assert bridge.ids.tolist() == encode_row(TURNS, tokenizer).ids
    assert [turn.kind for _, _, turn in call.spans] == ["look_up_order", "say:shipped", "hang_up"]
    for laid_out in (call, bridge):
        for first, end, _ in laid_out.spans:
            assert laid_out.target[first:end].all() and not laid_out.target[first - 1]
    # What is learnt is the same text behind either input.
    wanted = [[laid_out.ids[a:b].tolist() for a, b, _ in laid_out.spans] for laid_out in (call, bridge)]
    assert wanted[0] == wanted[1]


def test_calls_come_back_from_their_seed():
    assert call_turns(3, "train", 5) == call_turns(3, "train", 5)
    assert any(is_spoken(turn) for turn in call_turns(3, "train", 5))


def test_equal_error_rate_of_perfect_and_of_useless_scores():
    same = np.array([True] * 50 + [False] * 50)
    assert equal_error_rate(np.arange(100, 0, -1.0), same) < 0.02
    rng = np.random.default_rng(0)
    assert 0.3 < equal_error_rate(rng.random(2000), rng.random(2000) < 0.5) < 0.7
