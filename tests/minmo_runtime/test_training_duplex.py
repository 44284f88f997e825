"""Stage 4: the gate of training is that of service, the rules it is judged by are those of the floor. No synthesis."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from agent.floor import TurnTakingConfig
from minmo_runtime.bridges import TurnView
from minmo_runtime.duplex_steps import FACT_NAMES, NUM_FACTS, facts, last_pieces, pool
from minmo_runtime.model.duplex import DuplexDims, DuplexPredictor, StepInputs
from minmo_runtime.random_checkpoint import letter_tokenizer
from minmo_runtime.training import overlaps
from minmo_runtime.training.data import Utterance
from minmo_runtime.training.duplex import hide_pieces, operating_point, predictor_before, set_operating_point
from minmo_runtime.training.duplex_data import made_from
from minmo_runtime.training.duplex_scenes import LABEL, Mark, pause_kind
from minmo_runtime.training.duplex_score import FloorRules, Judged, bridge_chances, score, shifted
from minmo_runtime.training.resume import save_tensors
from minmo_runtime.training.stage import load_stage
from minmo_runtime.training.voicing import voiced_packets
from telephony.config import TelephonyConfig
from telephony.voice_activity import VoiceActivity

STEP = 1280  # samples of 80 ms


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Buzzing syllables with pauses and a noise floor, int16 at 8 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 8000)) / 8000
    buzz = sum(np.sin(2 * np.pi * 130 * k * time) / k for k in range(1, 12))
    envelope = np.repeat(rng.random(int(seconds * 5) + 1) > 0.5, 1600)[: len(time)]
    return (buzz * envelope * 4000 + rng.normal(0, 30, len(time))).astype(np.int16)


@pytest.mark.parametrize("seed", range(3))
def test_training_hears_voice_where_the_leg_does(seed: int) -> None:
    pcm = speech_like(4.0, seed)
    activity = VoiceActivity(TelephonyConfig())
    leg = [activity.push(pcm[start : start + 160].tobytes()) for start in range(0, len(pcm), 160)]
    assert voiced_packets(pcm, 8000).tolist() == leg
    assert True in leg and False in leg


def test_the_rules_are_those_of_the_turn_taking() -> None:
    theirs = TurnTakingConfig()
    for rule in dataclasses.fields(FloorRules):
        assert getattr(theirs, rule.name) == getattr(FloorRules(), rule.name), rule.name


# --------------------------------------------------------------------- one step


def test_facts_have_names_and_stay_near_one() -> None:
    view = TurnView(1600, False, 16 * 900, 0, text="my order number is 456", has_segment=True, slot_digits=5)
    values = dict(zip(FACT_NAMES, facts(view), strict=True))
    assert len(values) == NUM_FACTS and max(map(abs, values.values())) <= 2
    assert values["is_slot_open"] == 1 and values["is_slot_full"] == 0
    assert values["silence_480"] == 1 and values["silence_1600"] == pytest.approx(900 / 1600)


def test_pieces_are_the_last_ones_and_of_the_overlap_while_the_agent_speaks() -> None:
    tokenizer = letter_tokenizer(40)
    whole = tokenizer.encode("no wait").ids
    view = TurnView(0, True, 0, 0, overlap_text="no wait", is_agent_speaking=True)
    assert last_pieces(tokenizer, view, "ignored", 4) == whole[-4:]
    silent = TurnView(0, True, 0, 0)
    assert last_pieces(tokenizer, silent, "hi", 8)[-2:] == tokenizer.encode("hi").ids[-2:]
    assert last_pieces(tokenizer, silent, "", 3) == [0, 0, 0]


def test_new_frames_become_their_mean_and_the_last_one() -> None:
    frames = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 0.0]])]
    assert pool(frames, 2).tolist() == [3.0, 2.0, 5.0, 0.0]
    assert pool([], 2).tolist() == [0.0] * 4


def test_pauses_are_named_by_what_they_stand_between() -> None:
    words = "hello it is four five please".split()
    assert [pause_kind(words, i) for i in range(1, 6)] == [
        "pause_opener", "pause_words", "pause_number", "pause_digits", "pause_words",
    ]  # fmt: skip


# ---------------------------------------------------------------------- scores


def scene(done: np.ndarray, marks: list[Mark], silence_s: np.ndarray, **others: np.ndarray) -> Judged:
    """A scene whose caller says words, with P(user_done) given and the rest to user_continues or idle."""
    length = len(done)
    values = np.zeros((length, NUM_FACTS), np.float32)
    values[:, FACT_NAMES.index("silence_3200")] = silence_s / 3.2
    values[:, FACT_NAMES.index("has_text")] = 1
    values[:, FACT_NAMES.index("is_voiced")] = silence_s == 0
    chances = np.zeros((length, 6), np.float32)
    chances[:, LABEL["user_done"]] = done
    chances[:, LABEL["interrupt"]] = others.get("interrupt", np.zeros(length))
    chances[:, LABEL["idle"]] = 1 - chances.sum(1)
    speaks = others.get("speaks", np.zeros(length, bool))
    return Judged(chances, values, speaks, (np.arange(length) + 1) * STEP, marks, False)


def test_a_pause_that_is_taken_and_an_end_that_is_answered_late_are_counted() -> None:
    silence = np.concatenate([np.zeros(5), np.arange(1, 11) * 0.08, np.zeros(5), np.arange(1, 31) * 0.08])
    marks = [Mark("pause_words", 5 * STEP, 15 * STEP), Mark("end", 20 * STEP, 50 * STEP)]
    calm = np.where(np.arange(50) >= 26, 0.9, 0.05)
    found = score([scene(calm, marks, silence)])
    assert found["takeover"] == 0 and found["n_pauses"] == 1
    assert found["delay_p50_s"] == pytest.approx(7 * 0.08)
    hasty = np.where((np.arange(50) == 9) | (np.arange(50) >= 26), 0.9, 0.1)
    assert score([scene(hasty, marks, silence)])["takeover_predicted"] == 1


def test_without_a_prediction_the_patience_answers() -> None:
    silence = np.concatenate([np.zeros(5), np.arange(1, 31) * 0.08])
    found = score([scene(np.zeros(35), [Mark("end", 5 * STEP, 35 * STEP)], silence)])
    assert found["delay_p50_s"] == pytest.approx(1.6) and found["ends_unanswered"] == 0


def test_an_interruption_stops_the_agent_and_a_cough_does_not() -> None:
    silence = np.concatenate([np.zeros(12), np.arange(1, 9) * 0.08])
    speaks = np.ones(20, bool)
    strong = np.full(20, 0.9, np.float32)
    mark = [Mark("interrupt", 0, 12 * STEP)]
    found = score([scene(np.zeros(20), mark, silence, speaks=speaks, interrupt=strong)])
    assert found["interrupts_640ms"] == 1
    short = np.concatenate([np.zeros(2), np.arange(1, 19) * 0.08])
    cough = [Mark("noise", 0, 2 * STEP)]
    assert score([scene(np.zeros(20), cough, short, speaks=speaks, interrupt=strong)])["noises_stopped"] == 0


def test_the_bridge_is_judged_as_it_comes_every_160_ms() -> None:
    values = np.zeros((6, NUM_FACTS), np.float32)
    values[:, FACT_NAMES.index("bridge_user_done")] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    done = bridge_chances(values)[:, LABEL["user_done"]]
    np.testing.assert_allclose(done, [0.1, 0.2, 0.2, 0.4, 0.4, 0.6])


# -------------------------------------------------------------- operating point


def test_a_bias_divides_the_odds_and_nothing_else() -> None:
    torch.manual_seed(0)
    predictor = DuplexPredictor(DuplexDims(6, hidden_size=16, num_heads=2, ffn_size=16)).eval()
    steps = StepInputs(torch.randn(1, 9, 6), torch.zeros(1, 9, dtype=torch.bool))
    with torch.no_grad():
        before = predictor(steps)[0].exp().numpy()
        set_operating_point(predictor, {"user_done": 7.0, "user_waits": 2.0})
        after = predictor(steps)[0].exp().numpy()
    np.testing.assert_allclose(after, shifted(shifted(before, "user_done", 7.0), "user_waits", 2.0), atol=1e-6)


def test_the_operating_point_is_as_careful_as_the_bridges_delay_allows() -> None:
    silence = np.concatenate([np.zeros(5), np.arange(1, 11) * 0.08, np.zeros(5), np.arange(1, 31) * 0.08])
    marks = [Mark("pause_words", 5 * STEP, 15 * STEP), Mark("end", 20 * STEP, 50 * STEP)]
    # Rather sure in the pause, more so behind the end: between the two there is a point without a take-over.
    done = np.full(50, 0.01)
    done[8:15], done[24:] = 0.6, 0.99
    scenes = [scene(done, marks, silence)]
    assert score(scenes)["takeover"] == 1
    odds = operating_point(scenes, {**score(scenes), "delay_p50_s": 0.6})
    moved = [dataclasses.replace(scenes[0], chances=shifted(done_of(scenes[0]), "user_done", odds["user_done"]))]
    assert score(moved)["takeover"] == 0 and score(moved)["delay_p50_s"] <= 0.6


def done_of(judged: Judged) -> np.ndarray:
    return judged.chances


def test_a_predictor_from_before_a_fact_was_known_makes_nothing_of_it(tmp_path: Path) -> None:
    stage = load_stage("4")
    older = DuplexPredictor(DuplexDims(6, hidden_size=16, num_heads=2, ffn_size=16, num_facts=3)).eval()
    before = stage.folder(tmp_path) / "before"
    before.mkdir(parents=True)
    save_tensors(before / "duplex.safetensors", older.state_dict(), {})
    wider = predictor_before(stage, tmp_path, DuplexDims(6, hidden_size=16, num_heads=2, ffn_size=16, num_facts=5))
    vectors, speaks, facts_now = torch.randn(1, 9, 6), torch.ones(1, 9, dtype=torch.bool), torch.randn(1, 9, 5)
    assert wider is not None
    with torch.no_grad():
        expected = older(StepInputs(vectors, speaks, facts_now[..., :3]))
        torch.testing.assert_close(wider(StepInputs(vectors, speaks, facts_now)), expected)


def test_an_interruption_by_a_person_is_counted_with_the_others_and_apart() -> None:
    silence, speaks = np.concatenate([np.zeros(12), np.arange(1, 9) * 0.08]), np.ones(20, bool)
    strong = np.full(20, 0.9, np.float32)
    scenes = [
        scene(np.zeros(20), [Mark("person", 0, 12 * STEP)], silence, speaks=speaks, interrupt=strong),
        scene(np.zeros(20), [Mark("interrupt", 0, 12 * STEP)], silence, speaks=speaks, interrupt=0.0 * strong),
    ]
    found = score(scenes)
    assert found["n_interrupts"] == 2 and found["interrupts_1s"] == 0.5
    assert found["n_people"] == 1 and found["people_1s"] == found["people_stop"] == 1


# --------------------------------------------------------------- over the agent


class Recordings:
    """One person, very loud."""

    def draw(self, rng: np.random.Generator, digit_share: float) -> Utterance:
        return Utterance(np.full(1600, 0.9, np.float32), "words", None, (0, -1, 0), True)


def test_a_person_is_as_loud_as_the_mouth_and_comes_now_and_then() -> None:
    rng = np.random.default_rng(0)
    found = [overlaps.person(Recordings(), rng) for _ in range(200)]
    waves = [wave for wave in found if wave is not None]
    assert 40 < len(waves) < 80 and overlaps.person(None, rng) is None
    assert np.sqrt(np.mean(waves[0] ** 2)) == pytest.approx(0.1, rel=0.01)


def test_what_is_judged_was_never_trained_on() -> None:
    for phrases in (overlaps.HUMS, overlaps.BACKCHANNELS, overlaps.STOPS):
        assert not set(phrases["train"]) & set(phrases["held"])
    rng = random.Random(0)
    trained, held = ({overlaps.backchannel(rng, split) for _ in range(3000)} for split in ("train", "held"))
    assert not trained & held and len(held) == 10


def test_hidden_pieces_leave_everything_else() -> None:
    pieces = torch.ones(8, 5, 3, dtype=torch.long)
    steps = StepInputs(torch.randn(8, 5, 4), torch.zeros(8, 5, dtype=torch.bool), None, pieces)
    hidden = hide_pieces(steps, np.random.default_rng(0), 0.5)
    assert hidden.vectors is steps.vectors and 0 < int((hidden.pieces == 0).sum()) < pieces.numel()


def test_the_stage_stands_in_its_file() -> None:
    text = (Path(__file__).parents[2] / "minmo_runtime/training/stages/4.toml").read_text()
    assert "bridge_takeover" in text and "bridge_delay_p50_s" in text


def test_scenes_of_other_settings_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "ship").mkdir()
    save_tensors(tmp_path / "ship" / "encoder.safetensors", {"a": torch.zeros(1)}, {})
    key = made_from(tmp_path, 1, "held", 10, None)
    assert key == made_from(tmp_path, 1, "held", 10, tmp_path / "no_recordings_here")
    others = [made_from(tmp_path, 2, "held", 10, None), made_from(tmp_path, 1, "held", 20, None)]
    save_tensors(tmp_path / "ship" / "encoder.safetensors", {"a": torch.ones(1)}, {})
    assert len({key, *others, made_from(tmp_path, 1, "held", 10, None)}) == 4
