"""Trunks without a network: settings, who calls whom, which way a call goes, keys as sound, the media's verdict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agent.config import ConfigError, build_config
from telephony.config import TelephonyConfig
from telephony.dtmf import LAYOUT, DtmfDetector, tones
from telephony.leg import Answer, Hold, HoldChanged, Unhold
from telephony.loopback import LoopbackLeg
from telephony.sip.media_health import MediaCounts, health_of
from telephony.sip.outbound import OutboundAttempt
from telephony.sip.trunk import Neighbours, TrunkRefused, identify, routes_of
from telephony.trunk_config import TrunkConfig
from telephony.wire import PlaceCall

CARRIER = TrunkConfig(name="carrier", hosts=("192.0.2.1", "192.0.2.2:5080"), sources=("198.51.100.0/24",))
PBX = TrunkConfig(name="pbx", hosts=("203.0.113.5",), transport="tcp", did_from="to", is_identity_trusted=True)
CONFIG = TelephonyConfig(trunks=(CARRIER, PBX), transports=("udp", "tcp"))


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hosts": ()}, r"telephony\.trunks\['t'\]\.hosts = \(\): must be one or more"),
        ({"hosts": ("a b",)}, r"hosts = .*must be one or more"),
        ({"transport": "sctp"}, r"transport = 'sctp': must be one of udp, tcp"),
        ({"registers": True}, r"registers = True: must be false unless username"),
        ({"username": "u"}, r"password_env = '': must be set exactly when username is"),
        ({"sources": ("300.1.1.1",)}, r"sources = "),
        ({"domain": 'x"y'}, r"domain = "),
        ({"options_s": 1}, r"options_s = 1: must be 0 or 5 to 3600"),
        ({"name": "a b"}, r"name = 'a b'"),
    ],
)
def test_bad_trunk_is_named_with_its_key_and_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        TrunkConfig(**({"name": "t", "hosts": ("h",)} | settings))


def test_tables_of_the_file_become_trunks_and_survive_the_way_to_the_worker():
    table = {"telephony": {"trunks": [{"name": "carrier", "hosts": ["sip.example"], "registers": False}]}}
    config = build_config(table).telephony
    assert config.trunks == (TrunkConfig(name="carrier", hosts=("sip.example",)),)
    assert TelephonyConfig(**dataclasses.asdict(config)) == config


def test_unknown_key_of_a_trunk_and_two_of_one_name_stop_the_start():
    with pytest.raises(ConfigError, match="trunks.*regsiters: unknown key"):
        build_config({"telephony": {"trunks": [{"name": "c", "hosts": ["h"], "regsiters": True}]}})
    with pytest.raises(ValueError, match="different names"):
        TelephonyConfig(trunks=(CARRIER, CARRIER))


def test_a_public_bind_needs_a_list_or_a_trunk():
    with pytest.raises(ValueError, match="sip_bind"):
        TelephonyConfig(sip_bind="0.0.0.0")
    assert TelephonyConfig(sip_bind="0.0.0.0", trunks=(CARRIER,)).trunks


# ------------------------------------------------------------------ identity


def test_calls_come_by_the_trunk_that_has_their_source():
    neighbours = Neighbours(CONFIG)
    assert neighbours.trunk_of("198.51.100.7:5060").name == "carrier"
    assert neighbours.trunk_of("203.0.113.5:40000").name == "pbx"  # no sources: the addresses of its hosts
    assert neighbours.trunk_of("192.0.2.1:5060") is None and not neighbours.may_call_us("192.0.2.1:5060")
    assert not neighbours.may_call_us("127.0.0.1:5060")  # with trunks, loopback is no longer free


def test_who_answers_us_may_send_packets_but_not_calls():
    networks = [str(network) for network in Neighbours(CONFIG).networks()]
    assert "192.0.2.1/32" in networks and "198.51.100.0/24" in networks and "127.0.0.1/32" in networks


INVITE = {
    "From": '"Ann" <sip:+391@carrier>;tag=1', "To": "<sip:+3902@us>", "P-Called-Party-ID": "<sip:+3903@us>",
    "p-asserted-identity": '"Real" <sip:+399@carrier>', "Privacy": "id",
}  # fmt: skip


@pytest.mark.parametrize(
    ("trunk", "did", "ani", "name"),
    [
        (None, "100", "+391", "Ann"),
        (CARRIER, "100", "+391", "Ann"),  # not trusted: its P-Asserted-Identity means nothing
        (PBX, "+3902", "+399", "Real"),
        (dataclasses.replace(CARRIER, did_from="p-called-party-id"), "+3903", "+391", "Ann"),
    ],
)
def test_number_and_caller_are_read_as_the_trunk_writes_them(trunk, did, ani, name):
    who = identify("sip:100@us:5060", INVITE, trunk)
    assert (who.did, who.ani, who.display_name, who.is_withheld) == (did, ani, name, True)


def test_tel_uris_and_anonymous_callers_are_understood():
    who = identify("tel:+390212345", {"From": "<sip:anonymous@anonymous.invalid>;tag=1"}, None)
    assert (who.did, who.is_withheld) == ("+390212345", True)


# -------------------------------------------------------------------- routes


def test_a_number_goes_by_the_named_trunks_hosts_in_their_order():
    uris = [route.uri for route in routes_of("", "+39#1", ("pbx", "carrier"), CONFIG)]
    assert uris == [
        "sip:+39%231@203.0.113.5;transport=tcp", "sip:+39%231@192.0.2.1", "sip:+39%231@192.0.2.2:5080",
    ]  # fmt: skip


@pytest.mark.parametrize("number", ["", "1@evil", "1 2", "1\r\nEvil: 1", "1;x=y", "1?Replaces=x", "<1>"])
def test_what_is_no_number_is_not_called(number):
    with pytest.raises(TrunkRefused):
        routes_of("", number, (), CONFIG)


def test_unknown_trunk_and_no_trunk_are_refused():
    with pytest.raises(TrunkRefused, match="'x' is not in telephony.trunks"):
        routes_of("", "1", ("x",), CONFIG)
    with pytest.raises(TrunkRefused, match="empty"):
        routes_of("", "1", (), TelephonyConfig())


@pytest.mark.parametrize(
    ("status", "goes_on"), [(408, True), (500, True), (503, True), (486, False), (404, False), (603, False)]
)
def test_only_a_host_that_fails_is_left_for_the_next(status, goes_on):
    attempt = OutboundAttempt(PlaceCall(leg_id="l"), routes_of("", "1", ("carrier",), CONFIG), 0.0)
    assert attempt.goes_on_after(status) is goes_on
    attempt.next(status, 1.0)
    assert not attempt.goes_on_after(status)  # it was the last


def test_silent_host_is_left_after_its_time_but_not_when_it_said_trying():
    attempt = OutboundAttempt(PlaceCall(leg_id="l"), routes_of("", "1", ("carrier",), CONFIG), 10.0)
    assert not attempt.is_stuck(13.9) and attempt.is_stuck(14.1)
    attempt.has_answer = True
    assert not attempt.is_stuck(40.0)


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize("rate_hz", [8000, 16000])
def test_every_key_made_as_sound_is_heard_once(rate_hz):
    """users.md P6, J10: carriers that send keys in-band only."""
    detector, pcm = DtmfDetector(rate_hz), tones("".join(LAYOUT) + "1155", rate_hz)
    size = 2 * 137  # no multiple of anything
    heard = "".join(detector.push(pcm[at : at + size]) for at in range(0, len(pcm), size))
    assert heard == "".join(LAYOUT) + "1155"


def test_keys_are_heard_under_noise_and_speech_is_no_key(speech):
    rng = np.random.default_rng(1)
    pcm = np.frombuffer(tones("0123456789", 8000), "<i2")
    noisy = (pcm + rng.normal(0, 600, len(pcm))).astype("<i2").tobytes()
    assert DtmfDetector(8000).push(noisy) == "0123456789"
    assert DtmfDetector(8000).push(speech * 5) == ""


@pytest.mark.parametrize("hz", [(697.0,), (1209.0,), (697.0, 770.0), (440.0, 480.0), (350.0, 440.0)])
def test_single_tones_and_line_tones_are_no_key(hz):
    time_s = np.arange(8000) / 8000
    pcm = (sum(np.sin(2 * np.pi * tone * time_s) for tone in hz) * 6000).astype("<i2").tobytes()
    assert DtmfDetector(8000).push(pcm) == ""


# -------------------------------------------------------------------- health


@pytest.mark.parametrize(
    ("counts", "is_held", "verdict"),
    [
        (MediaCounts(packets_in=99, packets_out=100, level_in=90), False, "ok"),
        (MediaCounts(packets_in=99, packets_out=100, level_in=0), False, "silent_in"),
        (MediaCounts(packets_out=100), False, "one_way_in_missing"),
        (MediaCounts(packets_in=99, packets_out=100, level_in=90, num_reports=1, lost_out=49, reported_out=50), False,
         "one_way_out_missing"),
        (MediaCounts(packets_in=99, packets_out=100, level_in=90, num_reports=1, lost_out=20, reported_out=50), False,
         "ok"),
        (MediaCounts(packets_in=99, packets_out=100, level_in=90, num_reports=1, lost_out=1, reported_out=1), False,
         "ok"),
        (MediaCounts(packets_in=99, packets_out=100, level_in=90, lost_out=99), False, "ok"),
        (MediaCounts(packets_out=100), True, "held"),
    ],
)  # fmt: skip
def test_verdict_names_the_direction_that_is_missing(counts, is_held, verdict):
    health = health_of("l", counts, codec="PCMU/8000", is_held=is_held, promised_address="a", source_address="b")
    assert health.verdict == verdict


# ---------------------------------------------------------------------- hold


def test_loopback_leg_says_who_holds_whom_as_a_real_one_does():
    leg = LoopbackLeg("l", did="100")
    leg.ring()
    leg.send_now(Answer(leg_id="l"))
    leg.hold()
    leg.hold(False)
    leg.send_now(Hold(leg_id="l"))
    leg.send_now(Unhold(leg_id="l"))
    said = [(event.is_held, event.by) for event in leg.drain() if isinstance(event, HoldChanged)]
    assert said == [(True, "caller"), (False, "caller"), (True, "agent"), (False, "agent")]
