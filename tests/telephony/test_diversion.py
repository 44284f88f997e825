"""As whom the target of a bridged transfer is called: RFC 3323, RFC 3325, RFC 5806."""

from __future__ import annotations

import pytest

from telephony.leg import LegIncoming
from telephony.sip.diversion import as_whom
from telephony.trunk_config import TrunkConfig

TRUSTED = TrunkConfig(name="t", hosts=("sip.carrier.example",), caller_id="+390299", is_identity_trusted=True)
PLAIN = TrunkConfig(name="p", hosts=("sip.carrier.example",), caller_id="+390299")
CALLERS = TrunkConfig(name="c", hosts=("sip.carrier.example",), transfer_from="caller")
DIVERSION = "<sip:100@sip.carrier.example>;reason=unconditional"


def caller(ani: str = "+390212", did: str = "100", is_withheld: bool = False) -> LegIncoming:
    return LegIncoming(leg_id="l", did=did, ani=ani, is_withheld=is_withheld)


def test_by_a_trunk_it_is_our_number_and_the_callers_where_the_trunk_is_trusted() -> None:
    asserted = {"Diversion": DIVERSION, "P-Asserted-Identity": "<sip:+390212@sip.carrier.example>"}
    assert as_whom(caller(), TRUSTED, "192.0.2.1") == ("", asserted)
    assert as_whom(caller(), PLAIN, "192.0.2.1") == ("", {"Diversion": DIVERSION})


def test_trunk_may_want_the_callers_number_in_from() -> None:
    assert as_whom(caller(), CALLERS, "192.0.2.1") == ("+390212", {"Diversion": DIVERSION})


def test_straight_to_a_host_the_target_sees_who_calls() -> None:
    user, headers = as_whom(caller(), None, "192.0.2.1")
    assert (user, headers["Diversion"]) == ("+390212", "<sip:100@192.0.2.1>;reason=unconditional")


@pytest.mark.parametrize("trunk", [TRUSTED, CALLERS, None])
def test_withheld_number_is_told_to_nobody(trunk: TrunkConfig | None) -> None:
    user, headers = as_whom(caller(is_withheld=True), trunk, "192.0.2.1")
    assert not user and "P-Asserted-Identity" not in headers and "+390212" not in str(headers)


def test_call_that_we_placed_has_no_caller_and_no_header_can_be_smuggled() -> None:
    assert as_whom(None, TRUSTED, "192.0.2.1") == ("", {})
    user, headers = as_whom(caller('a>;x\r\nEvil: 1"', "1@evil>"), CALLERS, "h")
    assert user == "axEvil1" and headers["Diversion"] == DIVERSION.replace("100", "1evil")


@pytest.mark.parametrize(("key", "value"), [("transfer_from", "theirs"), ("inband_dtmf", "yes")])
def test_bad_words_are_refused_with_what_is_allowed(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"trunks\\['t'\\].{key} = '{value}': must be one of"):
        TrunkConfig(name="t", hosts=("h",), **{key: value})
