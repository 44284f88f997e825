"""`minmo doctor --profile` and `minmo models`: what is there, what stands in, what is missing, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.__main__ import app
from agent.checkpoint import checkpoint_facts, checkpoint_folder
from agent.commands.common import with_profile
from agent.config import Config, build_config
from agent.doctor import State, examine
from agent.rendering import folder_for
from tests.minmo_runtime.public_files import write_public_checkpoint


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def findings(config: Config) -> dict[str, tuple[State, str]]:
    return {finding.name: (finding.state, finding.text) for finding in examine(config)}


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINMO_MODELS", str(tmp_path / "none"))


def test_doctor_says_what_an_absent_profile_needs_and_how_to_get_it() -> None:
    found = findings(with_profile(Config(), "minmo-8b"))
    assert found["files qwen2.5-7b-instruct"][0] is State.FAULT
    assert "minmo models fetch minmo-8b --accept-licence" in found["files cosyvoice2-0.5b"][1]
    assert "llm 28.37" in found["memory"][1] and "GiB free on cpu" in found["memory"][1]
    assert found["bridges"][1] == "bridges=[in, out, duplex]"
    assert "minmo models voice" in found["prompt voice"][1]
    assert found["checkpoint"][1].startswith("minmo-8b: no weights of encoder, llm")


def test_doctor_of_a_complete_profile_names_what_is_loaded(tmp_path: Path) -> None:
    folder, models = write_public_checkpoint(tmp_path)
    config = build_config({"runtime": {"profile": str(folder), "models_folder": str(models)}})
    found = findings(config)
    assert found["checkpoint"][0] is State.OK, found["checkpoint"]
    assert "encoder, llm, voice_lm, flow, vocoder" in found["checkpoint"][1]
    assert found["prompt voice"][0] is State.OK and found["memory"][0] is State.OK


def test_a_profile_is_chosen_by_setting_or_option_and_a_folder_goes_before_it() -> None:
    config = build_config({"runtime": {"profile": "nano-human"}})
    assert checkpoint_folder(config).name == "nano-human"
    facts = checkpoint_facts(checkpoint_folder(config))
    assert facts.name == "nano-human" and facts.emotions == checkpoint_facts(checkpoint_folder(Config())).emotions
    other = build_config({"runtime": {"profile": "nano-human"}, "agent": {"checkpoint": "/x"}})
    assert checkpoint_folder(other) == Path("/x")
    assert checkpoint_folder(with_profile(other, "minmo-small")).name == "minmo-small"


def test_another_prompt_voice_means_that_fixed_sentences_are_spoken_again(tmp_path: Path) -> None:
    folder, models = write_public_checkpoint(tmp_path)
    before = folder_for(tmp_path, folder, str(models))
    assert folder_for(tmp_path, folder, str(models)) == before
    voice = models / "prompt_voice" / "agent.safetensors"
    voice.write_bytes(voice.read_bytes() + b" ")
    assert folder_for(tmp_path, folder, str(models)) != before


def test_an_unknown_profile_is_refused_with_those_there_are() -> None:
    found = findings(with_profile(Config(), "gpt"))
    assert found["checkpoint"][0] is State.FAULT and "must be nano, minmo-8b" in found["checkpoint"][1]


def test_models_list_shows_profiles_sources_and_licences() -> None:
    status, text = run("models", "list", "--json")
    shown = json.loads(text)
    assert status == 0 and {row["name"] for row in shown["profiles"]} >= {"nano", "minmo-8b", "nano-human"}
    assert all(row["state"] == "absent" and row["licence"] for row in shown["sources"])


def test_fetch_shows_the_licences_and_asks_for_acceptance() -> None:
    status, text = run("models", "fetch", "nano-human")
    assert status == 2 and "FunASR Model Open Source License" in text and "--accept-licence" in text


def test_verify_of_nothing_says_what_is_not_there() -> None:
    status, text = run("models", "verify", "nano-human")
    assert status == 1 and "model.pt is not there" in text


def test_a_voice_is_made_only_of_a_person_who_agreed(tmp_path: Path) -> None:
    speech = tmp_path / "x.wav"
    speech.write_bytes(b"")
    status, text = run("models", "voice", str(speech), "--text", "hello")
    assert status == 2 and "--speaker-consents" in text


def test_doctor_refuses_a_number_by_audiosocket_that_no_campaign_answers() -> None:
    wrong = build_config({"audiosocket": {"port": 19_019, "did": "999"}})
    (fault,) = [finding for finding in examine(wrong) if finding.name == "audiosocket"]
    assert fault.state is State.WARNING and fault.text.startswith("audiosocket.did = '999': must be one of 100, 200")
