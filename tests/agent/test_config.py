"""config.toml: complete, and refused with key, value and what is allowed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
import re
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from agent import rendering
from agent.checkpoint import SHIPPED_CHECKPOINT, checkpoint_facts
from agent.config import DERIVED, Config, ConfigError, build_config, load_config
from agent.config_file import field_docstrings, render
from agent.prompts.lines import LineBook
from minmo_runtime import text
from minmo_runtime.training.dialogues import DialogueWriter
from policies.engine import PolicyEngine
from policies.facts import CallFacts, CheckpointFacts
from policies.speaking_style import instruction

CONFIG_TOML = Path(__file__).resolve().parents[2] / "config.toml"
SECTIONS = get_type_hints(Config)
FIELDS = [(name, field.name) for name, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def test_config_toml_lists_every_setting_with_its_default_and_no_other() -> None:
    written = tomllib.loads(CONFIG_TOML.read_text(encoding="utf-8"))
    listed = {(section, key) for section, values in written.items() for key in values}
    assert listed == set(FIELDS) - set(DERIVED)
    assert load_config(CONFIG_TOML) == Config()


def test_config_toml_is_what_the_dataclasses_say() -> None:
    assert CONFIG_TOML.read_text(encoding="utf-8") == render(Config()), "run: python -m agent.config_file > config.toml"


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_every_setting_says_what_it_means(section: str, key: str) -> None:
    assert field_docstrings(SECTIONS[section]).get(key)


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_secrets_are_only_referred_to(section: str, key: str) -> None:
    is_secret = re.search(r"password|secret|(^|_)token($|_)|api_key|_key($|_)", key) is not None
    assert not is_secret or key.endswith(("_env", "_file"))


@pytest.mark.parametrize(("section", "key"), sorted(set(FIELDS) - set(DERIVED)))
def test_a_wrong_type_is_refused_by_name(section: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{section}\.{key} = .*: must be "):
        build_config({section: {key: {"a": "table"}}})


NUMBERS = [(s, k) for s, k in FIELDS if get_type_hints(SECTIONS[s])[k] in (int, float)]


@pytest.mark.parametrize("value", [-1e12, 1e12])
@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_every_number_has_a_range(section: str, key: str, value: float) -> None:
    number = int(value) if get_type_hints(SECTIONS[section])[key] is int else value
    with pytest.raises(ConfigError, match=rf"{section}\.\w+ = .*: must be "):
        build_config({section: {key: number}})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"telephony": {"ptime_ms": 25}}, "telephony.ptime_ms = 25: must be 10, 20, 30 or 40"),
        ({"telephony": {"ptime": 20}}, "telephony.ptime = 20: unknown key; did you mean ptime_ms?"),
        ({"telefony": {}}, "[telefony]: unknown section; did you mean telephony?"),
        ({"telephony": 3}, "telephony = 3: must be a section, [telephony]"),
        ({"telephony": {"max_calls": True}}, "telephony.max_calls = True: must be a whole number"),
        ({"telephony": {"max_calls": 2.0}}, "telephony.max_calls = 2.0: must be a whole number"),
        ({"telephony": {"codecs": [1]}}, "telephony.codecs = 1: must be text in quotes"),
        ({"telephony": {"handoff_uri": "sip:a@b"}}, "must be left out, set handoff.uri"),
        ({"handoff": {"uri": "somebody"}}, "handoff.uri = 'somebody': must be sip:user@host"),
        ({"agent": {"log_level": "loud"}}, "agent.log_level = 'loud': must be debug"),
        (
            {"runtime": {"max_streams": 1}},
            "runtime.max_streams = 1: must be at least the calls at once of telephony (3)",
        ),
        ({"storage": {"database_url": "postgresql://minmo:hunter2@db/minmo"}}, "storage.database_url: must not hold"),
    ],
)
def test_a_wrong_setting_stops_the_start(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        build_config(table)
    assert "hunter2" not in str(refused.value)


def test_a_file_of_ones_own_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[handoff]\nuri = "sip:desk@pbx"\n[telephony]\nagent_stall_s = 3\n')
    config = load_config(path, {"telephony": {"sip_port": 0}})
    assert config.telephony.agent_stall_s == 3.0
    assert config.telephony.sip_port == 0
    assert config.telephony.handoff_uri == "sip:desk@pbx", "the worker falls back to the same desk"


@pytest.mark.parametrize("content", ["[telephony", 'a = "b', "\x00"])
def test_a_broken_file_is_refused_by_path(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: "):
        load_config(path)


def test_a_missing_file_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_config(tmp_path / "none.toml")


# ---------------------------------------------------------------- what two islands must agree on without knowing each
# other


@pytest.fixture
def policies() -> PolicyEngine:
    nano = CheckpointFacts(
        name="nano",
        languages=("en",),
        dialects=("us",),
        emotions=("calm", "brisk"),
        rates=("normal",),
        voices=("agent",),
    )
    return PolicyEngine.load(Config().policies, nano, line_keys=LineBook.load().keys)


def test_the_shipped_campaigns_use_known_lines(policies: PolicyEngine) -> None:
    assert not policies.problems
    assert len(policies.campaigns) == 2


@pytest.mark.parametrize("did", ["100", "200"])
@pytest.mark.parametrize("num_missed", [0, 2])
def test_the_prompt_is_the_one_the_model_was_trained_on(policies: PolicyEngine, did: str, num_missed: int) -> None:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    facts = CallFacts(call_id="c1", did=did, started_at=now, num_turns_not_understood=num_missed)
    campaign = policies.campaign_for(did)
    assert campaign is not None
    trained = text.system_prompt(
        campaign.persona.name, campaign.shop, policies.style(facts).instruction, campaign.order_digits
    )
    assert policies.system_prompt(facts) == trained


def test_style_instructions_are_sentences_of_the_training_dialogues(policies: PolicyEngine) -> None:
    opened = [DialogueWriter(random.Random(seed), "train", 0.0).write(0)[0].text for seed in range(400)]
    trained = {match[0] for line in opened if (match := re.search(r"speak in [^.]*\.", line))}
    facts = checkpoint_facts(SHIPPED_CHECKPOINT)
    assert {instruction(emotion, rate) for emotion in facts.emotions for rate in facts.rates} <= trained


def test_fixed_sentences_are_spoken_under_the_prompt_of_a_call(policies: PolicyEngine, call_facts: CallFacts) -> None:
    assert rendering.prompt(policies) == policies.system_prompt(call_facts)


def test_every_notice_the_policies_can_ask_for_has_its_words(policies: PolicyEngine, call_facts: CallFacts) -> None:
    assert policies.disclose(call_facts).line in LineBook.load().protected
    assert {"notice", "notice_without_recording"} <= LineBook.load().protected.keys()


@pytest.fixture
def call_facts() -> CallFacts:
    return CallFacts(call_id="c1", did="100", started_at=dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
