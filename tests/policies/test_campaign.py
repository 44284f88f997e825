"""Campaigns: what is refused, by which words, and that one bad file never stops another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from policies.campaign import load_campaigns, read_campaign
from policies.engine import SHIPPED_CAMPAIGNS, PolicyEngine
from policies.facts import CheckpointFacts

Load = Callable[..., PolicyEngine]
Text = Callable[..., str]


def test_a_bad_campaign_is_named_and_never_stops_the_other(load: Load, campaign_text: Text) -> None:
    engine = load({"bad": campaign_text("301").replace('"calm"', '"furious"'), "good": campaign_text("300")})
    assert [campaign.name for campaign in engine.campaigns] == ["good"]
    (problem,) = engine.problems
    assert problem.name == "bad"
    assert "style.emotion = 'furious'" in problem.reason
    assert "calm, brisk" in problem.reason


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('rate = "normal"', 'rate = "fast"', "style.rate = 'fast'"),
        ('dialect = "us"', 'dialect = "scots"', "style.dialect = 'scots'"),
        ('languages = ["en"]', 'languages = ["en", "it"]', "style.languages = 'it'"),
        ('languages = ["en"]', "languages = []", "style.languages"),
        (
            'rate = "normal"',
            'rate = "normal"\nrate_when_not_understood = "fast"',
            "style.rate_when_not_understood = 'fast'",
        ),
        ('rate = "normal"', 'rate = "normal"\nemotion_for_caller = {angry = "sad"}', "style.emotion_for_caller.angry"),
        ('"hang_up"', '"charge"', "tools: 'charge'"),
        ("order_digits = 5", "order_digits = 50", "order_digits = 50"),
        ("order_digits = 5", "order_digits = 7", "order_digits = 7: needs lines.keypad_incomplete"),
        ("order_digits = 5", 'order_digits = "five"', "order_digits"),
        ("order_digits = 5", "order_digit = 5", "order_digit"),
        ("order_digits = 5", 'recording = "maybe"', "recording = 'maybe'"),
        ("order_digits = 5", 'handoff_uri = "http://example.org"', "handoff_uri = 'http://example.org'"),
        ("order_digits = 5", 'lines = {notice = ["we say nothing"]}', "lines.notice"),
        ("order_digits = 5", "lines = {greeting = []}", "lines.greeting"),
        ("order_digits = 5", 'name = "other"', "name = 'other'"),
        ('dids = ["300"]', "dids = []", "dids = []"),
        ('dids = ["300"]', 'dids = ["3 0 0"]', "dids: '3 0 0'"),
        ('shop = "blue river"', 'shop = " "', "shop = ' '"),
        ("[persona]", "[persona", ""),
    ],
)
def test_what_cannot_be_kept_is_refused_by_key_and_value(
    load: Load, campaign_text: Text, old: str, new: str, said: str
) -> None:
    text = campaign_text("300")
    assert old in text
    engine = load({"river": text.replace(old, new)})
    assert not engine.campaigns
    assert said in engine.problems[0].reason


def test_a_number_belongs_to_the_first_campaign_that_lists_it(load: Load, campaign_text: Text) -> None:
    engine = load({"a": campaign_text("300"), "b": campaign_text("300")})
    assert [campaign.name for campaign in engine.campaigns] == ["a"]
    assert engine.problems[0].reason == "dids: '300' belongs to a"


def test_every_reason_is_given_at_once(load: Load, campaign_text: Text) -> None:
    engine = load({"river": campaign_text("300").replace('"calm"', '"sad"').replace('"normal"', '"fast"')})
    assert "sad" in engine.problems[0].reason
    assert "fast" in engine.problems[0].reason


def test_the_shipped_campaigns_are_valid_and_differ_in_manner(checkpoint: CheckpointFacts) -> None:
    campaigns, problems = load_campaigns(SHIPPED_CAMPAIGNS, checkpoint, frozenset({"greeting"}))
    assert not problems
    assert {did: (c.shop, c.style.emotion) for c in campaigns for did in c.dids} == {
        "100": ("acme orders", "calm"),
        "200": ("harbor books", "brisk"),
    }


def test_a_campaign_survives_msgpack(tmp_path: Path, campaign_text: Text) -> None:
    path = tmp_path / "river.toml"
    path.write_text(campaign_text())
    campaign = read_campaign(path)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(campaign), type=type(campaign)) == campaign
