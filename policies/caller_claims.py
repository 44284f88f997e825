"""What a campaign reads of the headers that came with a call: which ones, under which names, and made harmless.

    [caller]
    headers = { "X-Customer" = "customer_id" }

A header is the caller's claim (RFC 3261 §7.3), whoever wrote it. As `{customer_id}` it stands in the campaign's own
lines, which only that caller hears; a tool's argument of that name is filled from it where the model gives none, and
checked like any other; the model is told of it as one word. A word can name something, but instruct nobody.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

import msgspec

MAX_HEADERS, MAX_CHARS = 8, 64
_HEADER = re.compile(r"[Xx]-[A-Za-z0-9-]{1,48}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_OUR_OWN = "x-minmo-"  # between our proxy, our workers and our agents
_VARIABLE = re.compile(r"\{([^{}]*)\}")
_NOT_PLAIN = re.compile(r"[^\w .,@+:/#'-]")


class CallerRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Table `[caller]` of a campaign."""

    headers: dict[str, str] = {}  # header of the INVITE, "X-...", to the name of a variable


def caller_faults(rules: CallerRules, lines: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Every reason why these rules, or lines that name a variable, cannot be used."""
    faults = []
    if len(rules.headers) > MAX_HEADERS:
        faults.append(f"caller.headers: {len(rules.headers)} of them: must be {MAX_HEADERS} at most")
    for header, name in rules.headers.items():
        if not _HEADER.fullmatch(header) or header.lower().startswith(_OUR_OWN):
            faults.append(f"caller.headers: {header!r}: must be X- and letters, digits or -, and not X-Minmo-")
        if not _NAME.fullmatch(name):
            faults.append(f"caller.headers: {header} = {name!r}: must be a small letter, then small letters, digits, _")
    for values, what in ((rules.headers.values(), "names"), (map(str.lower, rules.headers), "headers")):
        listed = list(values)
        faults += [f"caller.headers: {value!r} stands twice among the {what}" for value in _doubled(listed)]
    known = set(rules.headers.values())
    for key, sentences in lines.items():
        unknown = {name for sentence in sentences for name in _VARIABLE.findall(sentence)} - known
        faults += [f"lines.{key}: {{{name}}}: must be a name of caller.headers" for name in sorted(unknown)]
        if sentences and all(_VARIABLE.search(sentence) for sentence in sentences):
            faults.append(f"lines.{key}: must hold a sentence without a variable too, for calls that lack it")
    return faults


def named_headers(rules: CallerRules, headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a call that the campaign reads, by the names it gives them there: what may be kept. Empty ones are
    none."""
    by_name = {name.lower(): plain(value) for name, value in headers.items()}
    return {header: by_name[header.lower()] for header in rules.headers if by_name.get(header.lower())}


def claims_of(rules: CallerRules, headers: Mapping[str, str]) -> dict[str, str]:
    """The same by variable."""
    return {rules.headers[header]: value for header, value in named_headers(rules, headers).items()}


def claims_sentence(claims: Mapping[str, str]) -> str:
    """For the system prompt: each value is one word, so that none can be read as a sentence."""
    if not claims:
        return ""
    words = " ".join(f"{name}={value.replace(' ', '_')}" for name, value in claims.items())
    return f"the line of the caller claims {words}."


def filled(sentences: tuple[str, ...], claims: Mapping[str, str]) -> tuple[str, ...]:
    """The sentences that this call can say, its claims in them."""
    sayable = [text for text in sentences if set(_VARIABLE.findall(text)) <= set(claims)]
    return tuple(_VARIABLE.sub(lambda match: claims[match[1]], text) for text in sayable)


def plain(value: str) -> str:
    """Bounded, one line, no brackets, quotes or marks that mean something to a page, a database or a model."""
    text = _NOT_PLAIN.sub("", unicodedata.normalize("NFKC", value))
    return re.sub(r"\s+", " ", text).strip()[:MAX_CHARS].rstrip()


def _doubled(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})
