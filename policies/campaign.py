"""A campaign: what one phone line is for. Read from a TOML file, checked against what the checkpoint was trained on.

A file that cannot be used is reported by name with its reason and left out; the other campaigns go on. The name of a
campaign is its file's name without `.toml`.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec

from policies.caller_claims import CallerRules, caller_faults
from policies.consent import RECORDING_MODES
from policies.duplex_manner import DuplexManner, manner_faults
from policies.facts import CheckpointFacts
from policies.outbound import OutboundRules, outbound_faults
from policies.persona import Persona
from policies.speaking_style import StyleRules, unsupported_values

TOOLS = (
    "look_up_order", "opening_hours", "change_delivery", "transfer", "hang_up", "request_callback",
    "pause_recording", "go_on_recording", "send_keys",
)  # fmt: skip
SHIPPED_ORDER_DIGITS = 5  # as the shipped sentences say it
EARLY_MEDIA = ("none", "notice")
HANDOFF_MANNERS = ("blind", "warm")
_DID = re.compile(r"\+?[0-9]{1,15}|[a-z][a-z0-9_.-]{0,63}")  # E.164, an extension, or the user part of a SIP URI
_HANDOFF_URI = re.compile(r"(sips?:[^\s<>\"]+@[^\s<>\"]+|tel:\+?[0-9]+)")


class Campaign(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dids: tuple[str, ...]  # dialled numbers that reach it
    shop: str
    persona: Persona
    style: StyleRules
    tools: tuple[str, ...]
    order_digits: int = 0  # length of an order number; 0 = the line has none
    recording: str = ""  # off | after_notice | always, at most the operator's setting; "" = that setting
    handoff_uri: str = ""  # "speak to a person"; "" = handoff.uri
    handoff_manner: str = ""  # blind | warm; "" = handoff.manner
    outbound: OutboundRules | None = None  # whom it may call; without it nobody
    duplex: DuplexManner = DuplexManner()  # how the floor is taken and yielded
    early_media: str = "none"  # none | notice: said before the answer, by 183; then the call is answered
    caller: CallerRules = CallerRules()  # which headers of a call are read, as what
    lines: dict[str, tuple[str, ...]] = {}  # fixed sentences in this line's own words (greeting, goodbye ...)
    name: str = ""  # set from the file name, never from the file


class CampaignProblem(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    reason: str
    dids: tuple[str, ...] = ()  # as far as they could be read, so that a caller gets 503 and not 404


def load_campaigns(
    folder: Path, checkpoint: CheckpointFacts, line_keys: frozenset[str]
) -> tuple[tuple[Campaign, ...], tuple[CampaignProblem, ...]]:
    """Every `*.toml` of the folder in name order; a number belongs to the first campaign that lists it."""
    campaigns: list[Campaign] = []
    problems: list[CampaignProblem] = []
    owner_of: dict[str, str] = {}
    for path in sorted(folder.glob("*.toml")):
        try:
            campaign = read_campaign(path)
        except (OSError, ValueError) as error:  # TOML and msgspec errors are ValueErrors
            problems.append(CampaignProblem(name=path.stem, reason=str(error), dids=_dids_of(path)))
            continue
        reasons = campaign_faults(campaign, checkpoint, line_keys)
        reasons += [f"dids: {did!r} belongs to {owner_of[did]}" for did in campaign.dids if did in owner_of]
        if reasons:
            problems.append(CampaignProblem(name=campaign.name, reason="; ".join(reasons), dids=campaign.dids))
            continue
        owner_of |= dict.fromkeys(campaign.dids, campaign.name)
        campaigns.append(campaign)
    return tuple(campaigns), tuple(problems)


def read_campaign(path: Path) -> Campaign:
    """Raises ValueError when the file is no TOML, or a key is unknown, missing or of the wrong type."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    if "name" in table:
        raise ValueError(f"name = {table['name']!r}: must be left out, the file name is the name")
    return msgspec.structs.replace(msgspec.convert(table, Campaign), name=path.stem)


def campaign_faults(campaign: Campaign, checkpoint: CheckpointFacts, line_keys: frozenset[str]) -> list[str]:
    """Every reason why this campaign cannot take calls; empty = valid."""
    faults = []
    if not campaign.dids:
        faults.append("dids = []: must list at least one dialled number")
    faults += [f"dids: {did!r}: must be digits or a SIP user part" for did in campaign.dids if not _DID.fullmatch(did)]
    faults += [f"tools: {tool!r}: must be one of {', '.join(TOOLS)}" for tool in campaign.tools if tool not in TOOLS]
    if not 0 <= campaign.order_digits <= 20:
        faults.append(f"order_digits = {campaign.order_digits}: must be 0 to 20")
    if campaign.order_digits not in (0, SHIPPED_ORDER_DIGITS) and "keypad_incomplete" not in campaign.lines:
        faults.append(
            f"order_digits = {campaign.order_digits}: needs lines.keypad_incomplete; the shipped sentence says that an "
            f"order number has {SHIPPED_ORDER_DIGITS} digits"
        )
    if campaign.recording and campaign.recording not in RECORDING_MODES:
        faults.append(f"recording = {campaign.recording!r}: must be one of {', '.join(RECORDING_MODES)}")
    if campaign.handoff_uri and not _HANDOFF_URI.fullmatch(campaign.handoff_uri):
        faults.append(f"handoff_uri = {campaign.handoff_uri!r}: must be sip:user@host, sips:user@host or tel:number")
    if campaign.handoff_manner not in ("", *HANDOFF_MANNERS):
        faults.append(f"handoff_manner = {campaign.handoff_manner!r}: must be {' or '.join(HANDOFF_MANNERS)}")
    if campaign.early_media not in EARLY_MEDIA:
        faults.append(f"early_media = {campaign.early_media!r}: must be {' or '.join(EARLY_MEDIA)}")
    faults += manner_faults(campaign.duplex) + outbound_faults(campaign.outbound, campaign.lines)
    faults += caller_faults(campaign.caller, campaign.lines)
    for key, text in (("shop", campaign.shop), ("persona.name", campaign.persona.name)):
        if not text.strip():
            faults.append(f"{key} = {text!r}: must not be empty")
    for key, sentences in campaign.lines.items():
        if key not in line_keys:
            faults.append(f"lines.{key}: must be one of {', '.join(sorted(line_keys))}")
        if not sentences or not all(sentence.strip() for sentence in sentences):
            faults.append(f"lines.{key} = {list(sentences)!r}: must hold at least one sentence, none empty")
    if not campaign.style.languages:
        return [*faults, "style.languages = []: must name at least one language"]
    return faults + unsupported_values(campaign.style, checkpoint)


def _dids_of(path: Path) -> tuple[str, ...]:
    """The numbers of a file that was refused, if they can be read at all."""
    try:
        dids = tomllib.loads(path.read_text(encoding="utf-8")).get("dids", [])
    except (OSError, ValueError):
        return ()
    return tuple(did for did in dids if isinstance(did, str)) if isinstance(dids, list) else ()
