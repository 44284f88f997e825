"""Messages made from the properties that RFC 4475 §3 and RFC 5118 §4 describe, numbered as there, and what each may
get.

None is copied: each is a whole message but for the one thing its case is about. `{to}`, `{port}`, `{n}` and `{media}`
stand for the target, the sender's port, the case's number and an RTP port. "" = silence, which is what pjsip's parser
has for what it cannot read; our own reader (telephony/sip/message.py) says 400. Where the RFC leaves it open whether an
element reads on in spite of a fault, the case says which of the two is done here.
"""

from __future__ import annotations

VIA = "Via: SIP/2.0/UDP 127.0.0.1:{port};branch=z9hG4bK{n};rport\r\nMax-Forwards: 70\r\n"
WHO = "From: <sip:raw@127.0.0.1>;tag=t{n}\r\nTo: <sip:100@127.0.0.1>\r\nCall-ID: torture-{n}\r\n"
CONTACT = "Contact: <sip:raw@127.0.0.1:{port}>\r\n"
SDP = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=audio {media} RTP/AVP 0\r\n"
OK = {"200"}
REFUSED = {"", "400"}
BAD = {"400"}
Case = tuple[str, set[str]]


def message(
    first: str = "OPTIONS sip:100@{to} SIP/2.0", via: str = VIA, who: str = WHO, cseq: str = "1 OPTIONS",
    more: str = "", length: str = "0", body: str = "", contact: str = CONTACT,
) -> str:  # fmt: skip
    """A message that is whole but for what the case changes."""
    return f"{first}\r\n{via}{who}CSeq: {cseq}\r\n{contact}{more}Content-Length: {length}\r\n\r\n{body}"


def invite(kind: str, body: str, more: str = "") -> str:
    kind = f"Content-Type: {kind}\r\n{more}"
    return message(
        "INVITE sip:100@{to} SIP/2.0", cseq="1 INVITE", more=kind, length=str(len(body.format(media=9))), body=body
    )


def after_invite(method: str, cseq: int, to_tag: str) -> str:
    """ACK of the final answer (RFC 3261 §17.1.1.3), without which the call stays for half a minute; BYE of a call."""
    who = WHO.replace("<sip:100@127.0.0.1>", f"<sip:100@127.0.0.1>;tag={to_tag}")
    via = VIA if method == "ACK" else VIA.replace("branch=z9hG4bK{n}", "branch=z9hG4bK{n}bye")
    return message(f"{method} sip:100@{{to}} SIP/2.0", via=via, who=who, cseq=f"{cseq} {method}")


def response(first: str, via: str = VIA) -> str:
    return message(first, via=via, cseq="1 INVITE", contact="")


# RFC 4475 §3.1.1: valid, however odd. What is asked for must be answered.
VALID: dict[str, Case] = {
    "4475 3.1.1.1 folded lines, blanks around separators, short names": (
        "OPTIONS sip:100@{to} SIP/2.0\r\nv: SIP/2.0/UDP 127.0.0.1:{port}\r\n  ;branch =\r\n z9hG4bK{n};rport\r\n"
        "MAX-FORWARDS: 0068\r\nf: <sip:raw@127.0.0.1>\r\n ;tag = t{n}\r\nTO :\r\n sip:100@127.0.0.1\r\n"
        "i: torture-{n}\r\nCSeq: 0009\r\n OPTIONS\r\nUnknown-Header: ;;,,;;,;\r\nl: 0\r\n\r\n", OK),
    "4475 3.1.1.2 every character a header may have": (
        message(who=WHO.replace("Call-ID: torture", "Call-ID: !%.*_+'~1@<>:\\\"/[]?{{}}-torture")), OK),
    "4475 3.1.1.3 escaped characters in the URI": (message("OPTIONS sip:%31%30%30@{to} SIP/2.0"), OK),
    "4475 3.1.1.4 escaped nulls in the URI": (message("OPTIONS sip:null-%00-null@{to} SIP/2.0"), OK | {"404"}),
    "4475 3.1.1.5 a percent sign that escapes nothing": (
        message(who=WHO.replace("From: ", 'From: "%Z%45" ')), OK),
    "4475 3.1.1.6 no blank between name and bracket": (message(who=WHO.replace("From: ", "From: raw")), OK),
    "4475 3.1.1.7 long values": (message(who=WHO.replace("From: ", 'From: "' + "long" * 60 + '" ')), OK),
    "4475 3.1.1.8 octets behind the message": (message() + "REGISTER sip:x SIP/2.0\r\n\r\n", OK),
    "4475 3.1.1.9 semicolons in the user part": (message("OPTIONS sip:100;par=u%40x@{to} SIP/2.0"), OK | {"404"}),
    "4475 3.1.1.10 transports nobody knows": (
        message(via=VIA + "Via: SIP/2.0/UNKNOWN t.example;branch=z9hG4bKx\r\n"), OK),
    "4475 3.1.1.11 several body parts": (
        invite('multipart/mixed;boundary="b"', "--b\r\nContent-Type: text/plain\r\n\r\nhi\r\n--b--\r\n"),
        {"400", "415", "488"}),
    "4475 3.1.1.12 unusual reason": (response("SIP/2.0 200 = 2**3 * 5**2 \u043d\u043e"), {""}),
    "4475 3.1.1.13 no reason": (response("SIP/2.0 100 "), {""}),
    "5118 4.1 IPv6 reference": (message("OPTIONS sip:[2001:db8::10] SIP/2.0"), OK | {"404"}),
    "5118 4.4 port behind an IPv6 reference": (message("OPTIONS sip:[2001:db8::10]:5070 SIP/2.0"), OK | {"404"}),
    "5118 4.5 IPv6 in the received parameter": (
        message(via=VIA.replace(";rport", ";received=[2001:db8::9:255];rport")), OK),
    "5118 4.7 addresses of both kinds in the headers": (
        message(via=VIA + "Via: SIP/2.0/UDP [2001:db8::9:1];branch=z9hG4bKas3\r\n"), OK),
    "5118 4.9 IPv4 mapped into IPv6": (
        message(via=VIA + "Via: SIP/2.0/UDP [::ffff:192.0.2.10]:19823;branch=z9hG4bKbh\r\n"), OK),
}  # fmt: skip

# RFC 4475 §3.1.2: invalid.
INVALID: dict[str, Case] = {
    "4475 3.1.2.1 extraneous separators": (
        message(via="Via: SIP/2.0/UDP 127.0.0.1:{port};;,;,,\r\nMax-Forwards: 70\r\n"), REFUSED),
    "4475 3.1.2.2 Content-Length larger than the message": (message(length="9999"), BAD),
    "4475 3.1.2.3 negative Content-Length": (message(length="-999"), REFUSED),
    "4475 3.1.2.4 numbers beyond 32 bits in a request": (message(cseq="36893488147419103232 OPTIONS"), REFUSED),
    "4475 3.1.2.5 numbers beyond 32 bits in a response": (
        response("SIP/2.0 503 Service Unavailable\r\nRetry-After: 949302838503028349304023988"), {""}),
    "4475 3.1.2.6 unterminated quoted string": (message(who=WHO.replace("From: ", 'From: "Mr. Raw ')), REFUSED),
    "4475 3.1.2.7 Request-URI in brackets": (message("OPTIONS <sip:100@{to}> SIP/2.0"), REFUSED),
    "4475 3.1.2.8 blanks within the Request-URI": (message("OPTIONS sip:100@{to}; lr SIP/2.0"), REFUSED),
    "4475 3.1.2.9 many blanks in the first line": (message("OPTIONS  sip:100@{to}  SIP/2.0"), OK),
    "4475 3.1.2.10 blanks at the end of the first line": (message("OPTIONS sip:100@{to} SIP/2.0  "), OK),
    "4475 3.1.2.11 escaped headers in the Request-URI": (
        message("OPTIONS sip:100@{to}?Route=%3Csip:example.com%3E SIP/2.0"), OK),
    "4475 3.1.2.12 a date in no time zone of SIP": (message(more="Date: Fri, 01 Jan 2010 16:00:00 EST\r\n"), OK),
    "4475 3.1.2.13 name-addr without brackets": (
        message(contact="Contact: sip:raw@127.0.0.1?Route=%3Csip:x%3E\r\n"), REFUSED),
    "4475 3.1.2.14 blanks within the address": (
        message(who=WHO.replace("<sip:100@127.0.0.1>", "<sip:100@127.0.0.1 >")), OK),
    "4475 3.1.2.15 display name that is no token": (
        message(who=WHO.replace("From: ", "From: Bell, Alexander ")), OK),
    "4475 3.1.2.16 unknown protocol version": (message("OPTIONS sip:100@{to} SIP/7.0"), REFUSED | {"505"}),
    "4475 3.1.2.17 CSeq of another method": (message(cseq="1 INVITE"), BAD),
    "4475 3.1.2.18 unknown method and CSeq of another": (
        message("NEWMETHOD sip:100@{to} SIP/2.0"), BAD),
    "4475 3.1.2.19 status beyond three digits": (response("SIP/2.0 4294967301 better not break the receiver"), {""}),
    "4475 3.2.1 branch that is only the cookie": (
        message(via="Via: SIP/2.0/UDP 127.0.0.1:{port};branch=z9hG4bK;rport\r\nMax-Forwards: 70\r\n"), OK),
}  # fmt: skip

# RFC 4475 §3.3 and §3.4: what an application has to decide; RFC 5118 where addresses are wrong; and some of our own.
APPLICATION: dict[str, Case] = {
    "4475 3.3.1 required headers missing": (message(who=""), REFUSED),
    "4475 3.3.2 unknown scheme": (message("OPTIONS nobodyKnows:opaque SIP/2.0"), REFUSED | {"416"}),
    "4475 3.3.3 known scheme that is none of SIP": (
        message("OPTIONS soap.beep://192.0.2.103:3002 SIP/2.0"), REFUSED | {"416"}),
    "4475 3.3.4 unknown schemes in headers": (
        message(who=WHO.replace("<sip:100@127.0.0.1>", "isbn:2983792873")), OK),
    "4475 3.3.5 extensions that are required and not there": (
        message(more="Require: nothingSupportsThis\r\nProxy-Require: norThis\r\n"), {"420"}),
    "4475 3.3.6 unknown content type": (invite("application/unknown", "abc"), {"400", "415", "488"}),
    "4475 3.3.7 unknown authorization scheme": (message(more="Authorization: NoOneKnows opaque=here\r\n"), REFUSED),
    "4475 3.3.8 several values where one is allowed": (message(who=WHO + WHO), BAD),
    "4475 3.3.9 several Content-Lengths": (message(more="Content-Length: 13\r\n"), BAD),
    "4475 3.3.10 answer whose Via is broadcast": (
        response("SIP/2.0 200 OK", "Via: SIP/2.0/UDP 255.255.255.255;branch=z9hG4bK{n}\r\n"), {""}),
    "4475 3.3.11 Max-Forwards of zero": (message(via=VIA.replace(": 70", ": 0")), OK),
    "4475 3.3.12 REGISTER with a parameter of Contact": (
        message("REGISTER sip:{to} SIP/2.0", cseq="1 REGISTER", contact="Contact: sip:raw@x;unknownparam\r\n"),
        {"405", "501"}),
    "4475 3.3.15 nothing acceptable is accepted": (
        invite("application/sdp", SDP.replace("RTP/AVP 0", "RTP/AVP 18"), "Accept: text/nobodyKnowsThis\r\n"),
        {"406", "488"}),
    "4475 3.4.1 words of RFC 2543": (
        message(via="Via: SIP/2.0/UDP 127.0.0.1:{port}\r\n", who=WHO.replace(";tag=t{n}", "")), OK),
    "5118 4.2 IPv6 without brackets": (message("OPTIONS sip:2001:db8::10 SIP/2.0"), REFUSED),
    "5118 4.3 port that may belong to the address": (
        message("OPTIONS sip:[2001:db8::10:5070] SIP/2.0"), OK),
    "5118 4.6 IPv6 in SDP": (
        invite("application/sdp", SDP.replace("IN IP4 127.0.0.1", "IN IP6 2001:db8::20")),
        {"488"}),
    "5118 4.8 addresses of both kinds in SDP": (
        invite("application/sdp", SDP + "m=audio 9 RTP/AVP 0\r\nc=IN IP6 2001:db8::20\r\n"),
        OK),
    "5118 4.10 three colons": (message("OPTIONS sip:[2001:db8:::192.0.2.1] SIP/2.0"), OK),
    "brackets missing in Via": (
        message(via="Via: SIP/2.0/UDP 2001:db8::9:1;branch=z9hG4bK{n}\r\nMax-Forwards: 70\r\n"), REFUSED),
    "unknown method": (message("NEWMETHOD sip:100@{to} SIP/2.0", cseq="1 NEWMETHOD"), {"405", "501"}),
    "SDP that is none": (invite("application/sdp", "v=0\r\nm=audio\r"), {"400", "488"}),
    "SDP with an absurd port": (invite("application/sdp", SDP.replace("{media}", "999999999")), {"400", "488", "500"}),
    "a header of 30,000 bytes": (message(more="X-Long: " + "a" * 30000 + "\r\n"), BAD),
    "nothing but zeros": ("\x00" * 500, {""}),
    "an answer nobody asked for": (message("SIP/2.0 200 OK", cseq="1 INVITE"), {""}),
}  # fmt: skip

TORTURE = VALID | INVALID | APPLICATION
