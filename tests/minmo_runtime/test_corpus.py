"""The corpus: nothing held out is trained on, all the agent can say is covered, labels follow the written words."""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path

import pytest

from minmo_runtime.text import digit_runs, parse_tool_line, speak_digits, system_prompt
from minmo_runtime.training import corpus, sentences
from minmo_runtime.training.copy_tasks import copy_task
from minmo_runtime.training.dialogues import Turn, dialogue
from minmo_runtime.training.noise import garble

MIN_PHRASINGS = {  # the seven intents of the domain; small talk may have fewer
    ("order_status", "order_status_number"): 40,
    ("hours", "hours_day"): 40,
    ("change", "change_day", "change_number", "change_both"): 40,
    ("person",): 40,
    ("yes",): 40,
    ("no",): 40,
    ("goodbye",): 40,
}


def tool_lines(turns: list[Turn]) -> list[str]:
    return [line for turn in turns for line in re.findall(r"<tool_call>(.*?)</tool_call>", turn.text)]


def test_no_held_out_phrasing_is_a_training_phrasing() -> None:
    trained = {text for intent in corpus.INTENTS for text in corpus.phrases()[intent]["train"]}
    held = {text for intent in corpus.INTENTS for text in corpus.phrases()[intent]["held"]}
    assert not trained & held


def test_shapes_never_make_a_held_out_phrasing() -> None:
    rng = random.Random(11)
    for intent in corpus.INTENTS:
        made = {corpus.template(intent, "train", rng) for _ in range(400)}
        assert not made & corpus.held_phrases()
        assert len(made) > len(corpus.phrases()[intent]["train"])


@pytest.mark.parametrize("intents", MIN_PHRASINGS, ids=lambda intents: intents[0])
def test_each_intent_has_enough_phrasings(intents: tuple[str, ...]) -> None:
    trained = {text for intent in intents for text in corpus.phrases()[intent]["train"]}
    assert len(trained) >= MIN_PHRASINGS[intents]
    assert all(len(corpus.phrases()[intent]["held"]) >= 3 for intent in intents)


def test_a_fifth_of_the_numbers_never_reaches_training() -> None:
    reserved = sum(corpus.is_reserved_number(f"{number:05d}") for number in range(100_000))
    assert 0.19 < reserved / 100_000 < 0.21
    for seed in range(300):
        for turn in dialogue(seed, "train"):
            if turn.role == "assistant" and turn.kind in ("look_up_order", "change_delivery"):
                number = parse_tool_line(turn.text[len("<tool_call>") : -len("</tool_call>")])[1]["order_number"]
                # A misheard digit may turn a training number into any other; that is chance, not a leak of the drawing.
                assert len(number) == corpus.NUM_DIGITS
    rng = random.Random(1)
    assert not any(corpus.is_reserved_number(corpus.order_number(rng, "train")) for _ in range(500))
    assert all(corpus.is_reserved_number(corpus.order_number(rng, "held")) for _ in range(500))


def test_caller_sentences_are_letters_only_and_cover_every_phrasing() -> None:
    texts = sentences.caller_utterances(1, "train", 6000)
    assert len(texts) == 6000
    assert not {mark for text in texts for mark in re.findall(r"[^a-z' ]", text)}
    spoken = set(texts)
    fixed = {text for intent in corpus.INTENTS for text in corpus.phrases()[intent]["train"] if "{" not in text}
    assert not fixed - spoken


def test_agent_sentences_cover_every_reply_and_every_fixed_line() -> None:
    spoken = set(sentences.agent_utterances(2, "train", 3000))
    for family, text in corpus.replies().items():
        if "{" not in text:
            assert text in spoken, family
    for line in corpus.agent_lines():
        if "{" not in line:
            assert speak_digits(line) in spoken
    assert not {mark for text in spoken for mark in re.findall(r"[^a-z'.,? ]", text)}


def test_the_agents_own_lines_are_found() -> None:
    assert corpus.agent_lines(), "agent/prompts/lines.toml gives the sentences that the voice must know"


def test_seeds_decide_everything() -> None:
    assert sentences.caller_utterances(4, "held", 50) == sentences.caller_utterances(4, "held", 50)
    assert dialogue(9, "train") == dialogue(9, "train")
    assert dialogue(9, "train") != dialogue(10, "train")
    with pytest.raises(ValueError, match="split 'test'"):
        sentences.caller_utterances(4, "test")


def test_called_values_stand_in_the_callers_words() -> None:
    """Also with recognition errors: what is called must be readable in the context, or it could only be guessed."""
    for seed in range(400):
        heard: set[str] = set()
        for turn in dialogue(seed, "train", noise=0.2):
            if turn.role == "user":
                heard.update([*turn.text.split(), *digit_runs(turn.text)])
            elif turn.is_target and turn.text.startswith("<tool_call>"):
                assert set(turn.slots) <= heard, (seed, turn)


def test_tool_lines_use_the_campaigns_tools_and_their_arguments() -> None:
    wanted = {
        "look_up_order": {"order_number"},
        "opening_hours": {"day"},
        "change_delivery": {"order_number", "day"},
        "transfer": set(),
        "hang_up": set(),
        "request_callback": set(),
    }
    seen = set()
    for seed in range(300):
        for line in tool_lines(dialogue(seed, "train")):
            name, arguments = parse_tool_line(line)
            assert set(arguments) == wanted[name]
            seen.add(name)
    assert seen == set(wanted)


def test_answers_carry_the_values_of_the_tool_result() -> None:
    for seed in range(200):
        turns = dialogue(seed, "held", noise=0.0)
        for result, answer in zip(turns, turns[1:], strict=False):
            if result.role == "tool" and answer.kind in ("say:shipped", "say:delivered", "say:delayed"):
                assert result.text.split()[-1] in answer.text


def test_copy_tasks_hold_every_slot_type() -> None:
    rng = random.Random(0)
    kinds = {turn.kind for _ in range(300) for turn in copy_task(rng, "train") if turn.is_target}
    assert {
        "look_up_order",
        "opening_hours",
        "change_delivery",
        "copy",
        "repeat",
        "say:who_are_you",
        "say:open_hours",
    } <= kinds


def test_noise_rate_is_a_word_rate() -> None:
    rng = random.Random(2)
    text = "i would like to know where my parcel is please"
    changed = sum(garble(text, rng, 0.1) != text for _ in range(1000))
    assert 500 < changed < 800  # 1 - 0.9 ** 10 = 0.65, a little less as some words can not be misspelt
    assert garble(text, rng, 0.0) == text


def test_prompt_of_the_policies_is_the_prompt_of_the_corpus() -> None:
    """The campaigns' persona and style sentences, read as data, in the form that the model learns."""
    campaigns = sorted((Path(__file__).parents[2] / "policies" / "campaigns").glob("*.toml"))
    assert campaigns
    for path in campaigns:
        table = tomllib.loads(path.read_text())
        name, shop = table["persona"]["name"], table["shop"]
        assert system_prompt(name, shop, "").startswith(f"you are {name} at {shop}. order numbers have")
