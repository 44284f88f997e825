"""Presets of turn taking: valid on every line, echoed with every value, refused by name when wrong."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from agent.floor import TURN_TAKING_RANGES, TurnTakingConfig
from policies.duplex_manner import PRESETS, RANGES, DuplexManner, decide_duplex, manner_faults
from policies.engine import PolicyEngine


def test_the_policy_and_the_floor_mean_the_same_values_and_ranges():
    assert {key: TURN_TAKING_RANGES[key] for key in RANGES} == RANGES
    fields = {field.name for field in msgspec.structs.fields(DuplexManner)} - {"preset"}
    assert fields == set(RANGES)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_stands_over_the_operators_settings(name):
    manner = DuplexManner(preset=name)
    assert manner_faults(manner) == []
    config = dataclasses.replace(TurnTakingConfig(), **decide_duplex(manner).values)
    assert all(getattr(config, key) == value for key, value in PRESETS[name].items())


def test_standard_is_the_operators_own_setting():
    assert decide_duplex(DuplexManner()).values == {}


def test_patient_waits_longer_than_standard_and_brisk_less():
    def of(name: str) -> TurnTakingConfig:
        return dataclasses.replace(TurnTakingConfig(), **decide_duplex(DuplexManner(preset=name)).values)

    for key in ("end_silence_s", "likely_end_s", "missed_end_s", "slot_patience_s", "user_done_probability"):
        assert getattr(of("brisk"), key) < getattr(of("standard"), key) < getattr(of("patient"), key), key
    for key in ("onset_voiced_s", "burst_voiced_s", "interrupt_probability", "false_end_voiced_s"):
        assert getattr(of("standard"), key) < getattr(of("noisy_line"), key), key


def test_a_value_of_the_campaign_goes_over_its_preset_and_says_so():
    decision = decide_duplex(DuplexManner(preset="patient", missed_end_s=2.2))
    assert decision.values["missed_end_s"] == 2.2 and decision.values["end_silence_s"] == 0.3
    assert decision.reasons == ("campaign asks for patient", "campaign sets missed_end_s = 2.2")


@pytest.mark.parametrize(
    ("manner", "fault"),
    [
        (DuplexManner(preset="slow"), "duplex.preset = 'slow': must be one of standard, patient, brisk, noisy_line"),
        (DuplexManner(end_silence_s=9.0), "duplex.end_silence_s = 9.0: must be 0.05 to 2"),
        (DuplexManner(decide_max_s=0.5), "duplex.decide_max_s = 0.5: decide_min_s and decide_max_s must be set"),
        (DuplexManner(decide_min_s=0.6, decide_max_s=0.5), "duplex.decide_max_s = 0.5: must be more than decide_min"),
    ],
)
def test_a_wrong_manner_is_named_with_what_is_allowed(manner, fault):
    assert any(found.startswith(fault) for found in manner_faults(manner))


def test_a_campaign_with_a_wrong_preset_is_refused_and_the_others_go_on(load, campaign_text):
    engine: PolicyEngine = load(
        {
            "good": campaign_text("300") + '[duplex]\npreset = "noisy_line"\n',
            "bad": campaign_text("301") + '[duplex]\npreset = "slow"\n',
            "typo": campaign_text("302") + "[duplex]\npatience_s = 3\n",
        }
    )
    assert [campaign.name for campaign in engine.campaigns] == ["good"]
    assert {problem.name for problem in engine.problems} == {"bad", "typo"}


def test_the_engine_decides_by_the_dialled_number(load, campaign_text, facts):
    engine = load({"a": campaign_text("300") + '[duplex]\npreset = "brisk"\n', "b": campaign_text("301")})
    assert engine.duplex(msgspec.structs.replace(facts, did="300")).preset == "brisk"
    assert engine.duplex(msgspec.structs.replace(facts, did="301")).preset == "standard"
