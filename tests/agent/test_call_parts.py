"""The parts a call is made of: keypad, caller's words, play-out book, wire times, judgement of texts."""

from __future__ import annotations

from array import array

import pytest

from agent.caller_words import CallerWords, count_trailing_digits
from agent.demo_script import exchanges, judge_exchanges, number_audio
from agent.keypad import Keypad, Outcome
from agent.metrics import EngineCounts, WireTimes
from agent.playout_book import PlayoutBook
from agent.prompts.lines import LineBook
from agent.recognise import plain_words, word_error_rate
from minmo_runtime.api import Caption, ContextReused, DraftEnded, JobOverran
from telephony.leg import WireMetric

LOUD = array("h", [8000, -8000] * 1200).tobytes()  # 0.1 s at 24 kHz


# -------------------------------------------------------------------------- keypad


def test_number_is_complete_at_its_length() -> None:
    keypad = Keypad(5)
    assert [keypad.press(digit, 0.0) for digit in "45612"][-1] is Outcome.NUMBER and keypad.digits == "45612"


def test_lone_zero_is_a_person_and_a_leading_one_is_a_digit() -> None:
    keypad = Keypad(5)
    assert keypad.press("0", 0.0) is Outcome.NOTHING and keypad.tick(0.5) is Outcome.NOTHING
    assert keypad.tick(1.3) is Outcome.PERSON
    assert [keypad.press(digit, 2.0) for digit in "00612"][-1] is Outcome.NUMBER and keypad.digits == "00612"


@pytest.mark.parametrize("keys", ["456#", "456"])
def test_short_number_is_incomplete(keys: str) -> None:
    keypad = Keypad(5)
    outcome = [keypad.press(key, 1.0) for key in keys][-1]
    assert Outcome.INCOMPLETE in (outcome, keypad.tick(5.1))


def test_star_starts_anew() -> None:
    keypad = Keypad(5)
    assert [keypad.press(key, 0.0) for key in "99*45612"][-1] is Outcome.NUMBER and keypad.digits == "45612"


def test_a_row_longer_than_a_number_is_thrown_away_and_the_next_number_counts() -> None:
    keypad = Keypad(5)
    outcomes = [keypad.press(key, 0.35 * place) for place, key in enumerate("4111111111111111")]
    assert outcomes.count(Outcome.NUMBER) == 1 and set(outcomes[5:]) == {Outcome.NOTHING}
    assert keypad.tick(6.0) is Outcome.NOTHING and keypad.tick(7.5) is Outcome.INCOMPLETE
    assert [keypad.press(key, 9.0) for key in "45612"][-1] is Outcome.NUMBER and keypad.digits == "45612"


def test_another_number_after_a_pause_is_a_number() -> None:
    keypad = Keypad(5)
    assert [keypad.press(key, 1.0) for key in "45612"][-1] is Outcome.NUMBER
    assert [keypad.press(key, 4.0) for key in "99001"][-1] is Outcome.NUMBER and keypad.digits == "99001"


# ---------------------------------------------------------------- the caller's words


def caption(text: str, start: int, end: int, confidence: float = 1.0) -> Caption:
    return Caption(call_id="c", text=text, is_final=True, confidence=confidence, start_sample=start, end_sample=end)


def test_segments_join_to_one_turn_and_later_ones_to_the_next() -> None:
    words = CallerWords()
    words.hear(caption("where is", 0, 16_000))
    words.hear(caption("my order", 20_000, 30_000))
    assert words.text == "where is my order"
    words.begin_turn(40_000)
    assert words.text == ""
    assert not words.hear(caption("my order please", 20_000, 36_000))  # late, of the turn before
    assert words.hear(caption("yes", 44_000, 50_000)) and words.text == "yes"


@pytest.mark.parametrize(
    ("text", "count"), [("it is four five double six", 4), ("45612", 5), ("number 45 please", 0), ("", 0)]
)
def test_digits_at_the_end_are_counted(text: str, count: int) -> None:
    assert count_trailing_digits(text) == count


# -------------------------------------------------------------------- play-out book


def test_played_samples_come_back_in_the_turns_own_rate() -> None:
    book = PlayoutBook(8_000)
    book.add("a1", LOUD, 24_000, is_final=False, now=0.0)
    speech, _ = book.played("a1", 400, is_over=False, now=0.1) or (None, None)
    assert speech is not None and book.played_of(speech) == 1_200 and book.is_audible(speech)


def test_silence_at_the_start_is_not_heard() -> None:
    book = PlayoutBook(8_000)
    book.add("a1", bytes(4_800) + LOUD, 24_000, is_final=False, now=0.0)
    found = book.played("a1", 700, is_over=False, now=0.1)
    assert found is not None and not book.is_audible(found[0])


def test_nothing_of_a_cut_turn_goes_out() -> None:
    book = PlayoutBook(8_000)
    assert book.add("a1", LOUD, 24_000, is_final=False, now=0.0)
    assert book.cut("a1") == "a1"
    assert book.add("a1", LOUD, 24_000, is_final=True, now=0.0) == []
    assert book.cut("never") == "" and book.add("never", LOUD, 24_000, is_final=True, now=0.0) == []


def test_turn_goes_on_in_a_new_item_after_a_filler() -> None:
    book = PlayoutBook(8_000)
    book.add("a1", LOUD, 24_000, is_final=False, now=0.0)
    assert book.hold_for_filler("a1") == "a1"
    book.played("a1", 800, is_over=True, now=0.2)
    pieces = book.add("a1", LOUD, 24_000, is_final=True, now=1.0)
    assert {piece.item_id for piece in pieces} == {"a1.1"}
    found = book.played("a1.1", 400, is_over=False, now=1.1)
    assert found is not None and found[0].played_samples_of_leg == 1_200


def test_dry_is_told_only_when_everything_must_have_left() -> None:
    book = PlayoutBook(8_000)
    book.add("a1", LOUD, 24_000, is_final=False, now=0.0)
    book.played("a1", 400, is_over=False, now=0.1)
    assert not book.is_dry("a1", 0.15) and book.is_dry("a1", 0.3)


# ----------------------------------------------------------------------- wire times


def heard(times: WireTimes, *metrics: tuple[str, int]) -> list[tuple[str, float]]:
    figures = [
        figure for kind, at in metrics for figure in times.hear(WireMetric(leg_id="l", kind=kind, sample=at), "a1")
    ]
    return [(figure["name"], figure["value"]) for figure in figures]


def test_voice_to_voice_counts_from_the_last_word() -> None:
    times = WireTimes(8_000)
    assert heard(times, ("caller_onset", 800), ("caller_offset", 8_000), ("agent_onset", 13_600)) == [
        ("voice_to_voice_ms", 700.0),
    ]  # fmt: skip


def test_first_word_counts_from_the_ack_which_may_lie_before_the_leg_clock_began() -> None:
    assert heard(WireTimes(8_000), ("answered", -120), ("agent_onset", 80)) == [("first_word_ms", 25.0)]
    early_media = WireTimes(8_000)
    assert heard(early_media, ("answered", 24_000), ("agent_onset", 26_000), ("agent_onset", 90_000)) == [
        ("first_word_ms", 250.0),
    ]  # fmt: skip


def test_a_call_that_another_agent_answered_has_no_first_word() -> None:
    assert heard(WireTimes(8_000), ("agent_onset", 80_000)) == []


def test_answer_that_begins_before_the_offset_is_reported_is_measured_too() -> None:
    times = WireTimes(8_000)
    heard(times, ("caller_onset", 0), ("agent_onset", 8_400))
    assert heard(times, ("caller_offset", 8_000)) == [("voice_to_voice_ms", 50.0)]


def test_an_answer_behind_a_filler_is_measured_from_the_callers_last_word() -> None:
    times = WireTimes(8_000)
    heard(times, ("caller_onset", 0), ("caller_offset", 8_000))
    filler = times.hear(WireMetric(leg_id="l", kind="agent_onset", sample=20_000), "f1")
    assert [(figure["name"], figure["value"]) for figure in filler] == [("filler_ms", 1_500.0)]
    assert heard(times, ("agent_offset", 24_000), ("agent_onset", 32_000)) == [("voice_to_voice_ms", 3_000.0)]
    assert heard(times, ("agent_offset", 40_000), ("agent_onset", 44_000)) == []


def test_silence_in_an_overlap_is_a_stop_or_a_pause_by_what_is_decided() -> None:
    for decide, name in (("cut", "stop_ms"), ("resumed", "pause_ms")):
        times = WireTimes(8_000)
        events = (("agent_onset", 0), ("caller_onset", 8_000), ("agent_ducked", 9_600), ("agent_offset", 12_000))
        assert ("duck_ms", 200.0) in heard(times, *events)
        figures = times.cut("a1") if decide == "cut" else times.resumed()
        assert [(figure["name"], figure["value"]) for figure in figures] == [(name, 500.0)]


# --------------------------------------------------------------------- texts, lines


def test_the_engines_drafts_and_long_jobs_are_figures_of_the_call() -> None:
    counts = EngineCounts()
    for outcome in ("committed", "discarded", "discarded"):
        counts.draft_ended(DraftEnded(call_id="c", outcome=outcome))
    for part, milliseconds in (("flow", 31.0), ("encode", 40.0), ("flow", 28.0)):
        counts.job_overran(JobOverran(call_id="c", part=part, milliseconds=milliseconds))
    for source, positions in (("prefix", 40), ("branch", 12), ("prefix", 2)):
        counts.context_reused(ContextReused(call_id="c", source=source, num_positions=positions))
    figures = {figure["name"]: figure["value"] for figure in counts.figures()}
    assert figures == {
        "drafted": 3, "drafts_committed": 1, "drafts_discarded": 2,
        "long_jobs": 3, "longest_encode_ms": 40.0, "longest_flow_ms": 31.0,
        "positions_from_prefix": 42, "positions_from_branch": 12,
    }  # fmt: skip
    assert {(figure["turn_id"], figure["source"]) for figure in counts.figures()} == {("", "runtime")}


def test_numbers_are_compared_digit_by_digit() -> None:
    assert plain_words("Order 45612, please.") == plain_words("order four five six one two please")
    assert word_error_rate("order 45612", "order four five six one three") == pytest.approx(1 / 6)
    assert word_error_rate("", "anything") == 1.0


def test_campaign_words_its_lines_but_never_the_notice() -> None:
    book = LineBook.load()
    lines = book.for_call({"greeting": ("hello there",), "notice": ("nothing",)})
    assert lines.say("greeting") == "hello there"
    assert "automated assistant" in lines.say("notice")
    assert "notice" not in book.keys


def test_same_line_rotates() -> None:
    lines = LineBook.load().for_call({})
    assert len({lines.say("filler"), lines.say("filler")}) == 2


# -------------------------------------------------------------------- the demo's judge


def test_demo_judges_intent_slots_and_words_of_every_exchange() -> None:
    wanted = exchanges("45612", "shipped", "wednesday", "ten", "four")
    said = [{"label": e.label, "start_ms": 10_000 * (i + 1)} for i, e in enumerate(wanted)]
    answers = [
        ("i can look up an order, change a delivery", None),
        ("on saturday we are open from ten to four.", ("opening_hours", {"day": "saturday"})),
        ("sure. what is your order number?", None),
        ("order 45612 was shipped. it will arrive on wednesday.", ("look_up_order", {"order_number": "45612"})),
        ("thank you for calling. goodbye.", ("hang_up", {})),
    ]
    call = {"sample_rate_hz": 8_000, "turns": [], "tool_calls": []}
    for index, (text, tool) in enumerate(answers):
        start = 8 * (10_000 * (index + 1) + 3_000)
        turn = {"turn_id": f"a{index}", "role": "agent", "generated_text": text, "start_sample": start, "intent": ""}
        call["turns"].append(turn)
        if tool:
            call["tool_calls"].append({"turn_id": f"a{index}", "name": tool[0], "arguments": tool[1]})
    assert [verdict.fault for verdict in judge_exchanges(wanted, said, call)] == [""] * 5
    call["tool_calls"][1]["arguments"] = {"order_number": "45613"}
    call["turns"][1]["generated_text"] = "we are closed."
    faults = [verdict.fault for verdict in judge_exchanges(wanted, said, call)]
    assert "45613" in faults[3] and "does not say" in faults[1]


def test_any_order_number_can_be_said() -> None:
    assert len(number_audio("90817")) > 2 * 8_000 * 2  # more than two seconds
