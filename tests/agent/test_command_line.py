"""`minmo`: every verb is there, and a wrong setting or a missing call is told in one line."""

from __future__ import annotations

import datetime as dt
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.__main__ import app
from agent.demo import demo_config
from minmo_runtime.random_checkpoint import write_random_checkpoint
from storage.calls import CallStore
from storage.config import StorageConfig

runner = CliRunner()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Settings with a random checkpoint that knows the shipped campaigns' styles, and a database of their own."""
    folder = write_random_checkpoint(tmp_path / "checkpoint")
    contents = folder / "checkpoint.toml"
    text = (
        contents.read_text()
        .replace('["neutral"]', '["calm", "brisk"]')
        .replace("[facts]", '[facts]\ndialects = ["us"]')
    )
    contents.write_text(text)
    path = tmp_path / "minmo.toml"
    path.write_text(f'[agent]\ncheckpoint = "{folder}"\n[storage]\nfolder = "{tmp_path / "var"}"\n')
    return path


@pytest.mark.parametrize("verb", ["serve", "demo", "call", "train", "eval", "bench", "doctor", "db", "campaign"])
def test_every_verb_is_there(verb: str) -> None:
    assert verb in runner.invoke(app, ["--help"]).output


def test_a_wrong_setting_stops_with_key_value_and_what_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[telephony]\nptime_ms = 25\n")
    done = runner.invoke(app, ["db", "list", "--config", str(path)])
    assert done.exit_code == 2
    assert done.stderr.strip() == "minmo: telephony.ptime_ms = 25: must be 10, 20, 30 or 40"


def test_valid_campaigns_are_listed_with_their_numbers(config_file: Path) -> None:
    done = runner.invoke(app, ["campaign", "validate", "--config", str(config_file)])
    assert done.exit_code == 0, done.output
    assert "ok       acme_orders: 100 -> anna at acme orders" in done.output
    assert "ok       harbor_books: 200 -> ben at harbor books" in done.output


def test_a_refused_campaign_fails_the_validation_by_name(config_file: Path, tmp_path: Path) -> None:
    contents = tmp_path / "checkpoint" / "checkpoint.toml"
    contents.write_text(contents.read_text().replace(', "brisk"', ""))
    done = runner.invoke(app, ["campaign", "validate", "--config", str(config_file)])
    assert done.exit_code == 1
    assert "ok       acme_orders" in done.output
    assert "refused  harbor_books: style.emotion = 'brisk'" in done.output


def test_the_doctor_names_bridges_and_untrained_weights(config_file: Path) -> None:
    done = runner.invoke(app, ["doctor", "--json", "--config", str(config_file)])
    findings = {finding["name"]: finding for finding in json.loads(done.output)}
    assert done.exit_code == 1
    assert findings["checkpoint"]["state"] == "fault"
    assert "UNTRAINED" in findings["checkpoint"]["text"]
    assert findings["bridges"]["text"] == "bridges=[in, duplex]"
    assert "CTC text" in findings["bridge in"]["text"]
    assert "calls in real time (measured: work per second of audio" in findings["calls"]["text"]
    assert findings["campaign acme_orders"]["state"] == "ok"
    assert findings["handoff"]["state"] == "warning"


def test_a_missing_checkpoint_is_a_finding_and_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "minmo.toml"
    path.write_text(f'[agent]\ncheckpoint = "{tmp_path / "none"}"\n')
    done = runner.invoke(app, ["doctor", "--json", "--config", str(path)])
    assert done.exit_code == 1
    assert {f["name"] for f in json.loads(done.output) if f["state"] == "fault"} == {"checkpoint", "campaigns"}


def test_an_unknown_call_is_told_in_one_line(config_file: Path) -> None:
    done = runner.invoke(app, ["db", "show", "nobody", "--config", str(config_file)])
    assert done.exit_code == 2
    assert done.stderr.strip() == "minmo: no call 'nobody'"


def test_a_call_of_the_demo_is_shown_although_it_has_a_database_of_its_own(config_file: Path, tmp_path: Path) -> None:
    assert runner.invoke(app, ["db", "show", "--config", str(config_file)]).stderr.strip() == "minmo: no call yet"
    now = dt.datetime(2026, 1, 5, tzinfo=dt.UTC)
    store = CallStore(StorageConfig(folder=tmp_path / "var" / "demo"))
    store.open_call("c1", did="100", ani="200", now=now)
    store.close_call("c1", disposition="completed", cause="normal", now=now)
    store.close()
    for words in (["c1"], []):
        done = runner.invoke(app, ["db", "show", *words, "--json", "--config", str(config_file)])
        assert json.loads(done.output)["call_id"] == "c1"
    done = runner.invoke(app, ["db", "show", "nobody", "--config", str(config_file)])
    assert done.stderr.strip() == "minmo: no call 'nobody'"


def test_the_demos_weights_are_found_whichever_folder_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes run in the repository, not where `minmo demo --checkpoint weights` was typed."""
    monkeypatch.chdir(tmp_path)
    assert demo_config("weights").agent.checkpoint == str(tmp_path / "weights")
    assert demo_config("").agent.checkpoint == ""


def test_an_unknown_stage_is_told_in_one_line(tmp_path: Path) -> None:
    done = runner.invoke(app, ["train", "9z", "--work-dir", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.startswith("minmo: no training stage '9z'; there are: 0a, ")
    assert done.stderr.endswith(" and the groups parents, connectors, all\n")


def test_a_fresh_database_lists_no_call(config_file: Path) -> None:
    done = runner.invoke(app, ["db", "list", "--json", "--config", str(config_file)])
    assert json.loads(done.output) == []


def test_the_demo_shop_is_seeded_once(config_file: Path) -> None:
    first = json.loads(runner.invoke(app, ["db", "seed", "--config", str(config_file)]).output)
    again = json.loads(runner.invoke(app, ["db", "seed", "--config", str(config_file)]).output)
    assert first["new_orders"] > 0
    assert again == {"new_orders": 0, "orders": first["orders"]}


def test_a_package_of_an_extra_that_is_missing_is_named_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "agent.evaluate", None)  # as if it could not be imported
    ended = runner.invoke(app, ["eval"])
    assert ended.exit_code == 2 and "is not installed; run: make venv-train" in ended.output
