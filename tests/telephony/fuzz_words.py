"""What the SIP fuzzer makes its messages of: header fields and SDP lines that are odd, wrong, or right in another
place, and how a text is bent."""

from __future__ import annotations

import random

METHODS = (
    "ACK", "ACK", "BYE", "CANCEL", "INVITE", "INVITE", "UPDATE", "INFO", "REFER", "NOTIFY", "PRACK", "MESSAGE",
    "SUBSCRIBE", "OPTIONS", "PUBLISH", "REGISTER", "FOO",
)  # fmt: skip
STATUSES = (
    "100 x", "180 x", "183 x", "200 OK", "200 OK", "200 OK", "202 x", "302 x", "401 x", "407 x", "408 x", "422 x",
    "481 x", "486 x", "491 x", "500 x", "503 x", "603 x", "699 x",
)  # fmt: skip
HEADERS = (
    "Refer-To: <sip:a@127.0.0.1>", "Refer-To: garbage", "Refer-To: <sip:a@127.0.0.1?Replaces=x>", "RAck: 1 1 INVITE",
    "RAck: x", "RSeq: 1", "RSeq: 0", "RSeq: 99999999999", "Event: refer", "Event: refer;id=1", "Event: presence",
    "Event: message-summary", "Subscription-State: active", "Subscription-State: terminated;reason=noresource",
    "Subscription-State: ", "Session-Expires: 90;refresher=uas", "Session-Expires: 90;refresher=uac",
    "Session-Expires: abc", "Session-Expires: 0", "Session-Expires: 1", "x: 4000000000", "Min-SE: 90000", "Min-SE: 0",
    "Supported: timer", "Supported: 100rel,timer,replaces,norefersub,outbound,path,gruu", "Require: timer",
    "Require: 100rel", "Require: replaces", "Require: nothing", "Require: ", "Require: ,", "Proxy-Require: x",
    "Replaces: a;to-tag=b;from-tag=c", "Replaces: x", "Join: x", "Target-Dialog: x", "Referred-By: <sip:x>",
    "Content-Type: message/sipfrag", "Content-Type: multipart/mixed;boundary=b", "Content-Type: multipart/mixed",
    "Content-Type: application/sdp", "Content-Type: application/dtmf-relay", "Content-Type: x", "Content-Type: /",
    "Content-Encoding: gzip", "Content-Disposition: session", "Authorization: Digest",
    'Authorization: Digest username="a",realm="b",nonce="c",uri="d",response="e"', "WWW-Authenticate: Digest",
    'WWW-Authenticate: Digest realm="b",nonce="c"', 'Proxy-Authenticate: Digest realm="b",nonce="",qop="auth"',
    "Route: <sip:127.0.0.1;lr>", "Route: <sip:127.0.0.9:9;lr>", "Route: x", "Record-Route: <sip:127.0.0.1:9;lr>",
    "Record-Route: <sip:x>", "Record-Route: <sip:127.0.0.1:9>,<sip:127.0.0.1:8;lr>", "Privacy: id",
    "Refer-Sub: false", "Refer-Sub: true", "Expires: 0", "Expires: -1", "Identity: x", "Accept: text/plain",
    "Accept: application/sdp", "Contact: *", "Contact: <tel:1>", "Contact: <sips:a@127.0.0.1:9>",
    "Contact: <sip:x@[::1]>", "Contact: <sip:a@127.0.0.1:99999>", "Contact: x",
    "Contact: <sip:a@127.0.0.1;transport=tcp>", "Contact: <sip:a@127.0.0.1;transport=tls>",
    "Contact: <sip:a@127.0.0.1;maddr=127.0.0.9>", "Via: SIP/2.0/UDP x;branch=z9hG4bK1",
    "Via: SIP/2.0/TCP 127.0.0.1;branch=z9hG4bK2;maddr=127.0.0.9", "Via: SIP/2.0/UDP 127.0.0.1:9;received=::1;rport=9",
    "P-Asserted-Identity: <sip:", "Warning: 399 x", "Date: x", "Retry-After: x", "Timestamp: 1", "Allow: ",
    "Allow: INVITE", "MIME-Version: 9", "To: <sip:x>;tag=second", "CSeq: 7 BYE", "Call-ID: second",
    "From: <sip:y>;tag=second", "Max-Forwards: -1", "Content-Length: 3", "Reason: x",
)  # fmt: skip
SDP_LINES = (
    "", "v=0", "v=1", "o=", "o=- 999999999999999999999 1 IN IP4 127.0.0.1", "o=- 1 1 IN IP6 ::1", "s=", "t=x", "t=0",
    "b=AS:-1", "b=", "k=", "z=", "c=", "c=IN IP4 ::1", "c=IN IP6 127.0.0.1", "c=IN IP6 ::1", "c=IN IP4 0.0.0.0",
    "c=IN IP4 255.255.255.255", "c=IN IP4 224.2.1.1/127", "c=IN IP4 999.1.1.1", "c=IN IP4 name.invalid", "c=IN IP4",
    "c=IN IP9 127.0.0.1", "c=IN IP4 127.0.0.1 x", "c =IN IP4 ::1", "m=audio {port} RTP/AVP 0", "m=audio 0 RTP/AVP 0",
    "m=audio {port} RTP/AVP 8 101", "m=audio {port} RTP/AVP 18", "m=audio {port} RTP/AVP 0 0 0 0 0 0", "m=audio",
    "m=audio {port} RTP/SAVP 0", "m=audio {port} RTP/AVPF 0", "m=audio {port} RTP/AVP", "m=audio {port} TCP 0",
    "m=audio {port} RTP/AVP 128", "m=audio {port} RTP/AVP 999 -1", "m=audio 99999 RTP/AVP 0", "m=audio -1 RTP/AVP 0",
    "m=audio {port}/2 RTP/AVP 0", "m=video {port} RTP/AVP 96", "m=image {port} udptl t38", "m=text 9 RTP/AVP 98",
    "m=application 9 UDP/DTLS/SCTP webrtc", "a=rtpmap:", "a=rtpmap:0 PCMU/0", "a=rtpmap:0",
    "a=rtpmap:101 telephone-event/0", "a=rtpmap:101 telephone-event/99999999", "a=rtpmap:0 PCMU/8000/9",
    "a=rtpmap:999 x/1", "a=rtpmap:8 PCMA/8000", "a=fmtp:", "a=fmtp:101", "a=fmtp:101 ", "a=fmtp:0 x", "a=ptime:0",
    "a=ptime:99999", "a=ptime:-5", "a=ptime:x", "a=maxptime:0", "a=maxptime:1", "a=rtcp:99999999", "a=rtcp:9 IN IP4",
    "a=rtcp:9 IN IP4 ::1", "a=rtcp:", "a=rtcp-mux", "a=rtcp:9 IN IP6 ::1", "a=rtcp:9 IN IP4 name.invalid",
    "a=sendonly", "a=recvonly", "a=inactive", "a=sendrecv", "a=crypto:1 AES_CM_128_HMAC_SHA1_80 inline:",
    "a=crypto:x", "a=candidate:1 1 UDP 1 127.0.0.1 9 typ host", "a=candidate:x", "a=ice-ufrag:x", "a=ice-pwd:y",
    "a=ice-lite", "a=setup:actpass", "a=fingerprint:sha-1 00", "a=mid:1", "a=group:BUNDLE 1", "a=ssrc:1 cname:x",
    "a=ssrc:", "a=", "x=", "=", "a" * 900, "a=label:" + "9" * 900,
)  # fmt: skip
_SHARDS = (
    "\0",
    "\r\n",
    "\n",
    "\r",
    "%",
    "%00",
    "<",
    ">",
    '"',
    ";",
    ":",
    ",",
    "=",
    "\xff",
    " ",
    "\t",
    "9" * 20,
    "{}",
    "",
)


def bent(choose: random.Random, text: str) -> str:
    """One place in it replaced by something else, cut, or repeated."""
    at = choose.randrange(max(1, len(text)))
    fate = choose.random()
    if fate < 0.15:
        return text[:at]
    if fate < 0.3:
        return text[:at] + text[at : at + choose.randrange(40)] + text[at:]
    return text[:at] + choose.choice(_SHARDS) + text[at + choose.randrange(4) :]
