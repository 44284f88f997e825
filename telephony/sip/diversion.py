"""As whom we call the target of a bridged transfer: an exchange in the middle is neither the caller nor its carrier.

Most carriers refuse a number in From that is not the customer's (`transfer_from = "ours"`, the default); some take the
caller's, when a Diversion says through whom the call came. Either way the target can see both: From and
P-Asserted-Identity (RFC 3325, only of trunks that are trusted with it), and Diversion with the number that was dialled
(RFC 5806 §5). A withheld number is told to nobody (RFC 3323). Pure.
"""

from __future__ import annotations

from telephony.leg import LegIncoming
from telephony.trunk_config import TrunkConfig


def as_whom(caller: LegIncoming | None, trunk: TrunkConfig | None, own_host: str) -> tuple[str, dict[str, str]]:
    """(user part of From, "" = our number; headers) for a call to the target by `trunk`, None: straight to its host."""
    if caller is None:  # a call that we placed
        return "", {}
    host = trunk.aor_host if trunk else own_host
    dialled = _user(caller.did)
    headers = {"Diversion": f"<sip:{dialled}@{host}>;reason=unconditional"} if dialled else {}
    number = "" if caller.is_withheld else _user(caller.ani)
    if not number or trunk is None or trunk.transfer_from == "caller":
        return number, headers
    if trunk.is_identity_trusted:
        headers["P-Asserted-Identity"] = f"<sip:{number}@{host}>"
    return "", headers


def _user(value: str) -> str:
    """What may stand before the @ as it is; the caller's own host and parameters stay with it."""
    return "".join(char for char in value if char.isascii() and (char.isalnum() or char in "+-_."))[:64]
