"""Language, dialect, emotion and rate of the agent in one call, decided anew from the facts, with reasons.

The campaign gives the style the call begins with and what may bend it; the checkpoint gives what can be spoken at all.
Nothing here guesses: a value that the checkpoint was not trained on is refused when the campaign is validated, so that
a decision can only name values that the model has seen (MinMo's instructions, arXiv 2501.06282 section 3.4).
"""

from __future__ import annotations

import msgspec

from policies.decisions import StyleDecision
from policies.facts import CallFacts, CheckpointFacts


class StyleRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[style]` of a campaign. The first language is the one the call begins in."""

    languages: tuple[str, ...]
    dialect: str
    emotion: str
    rate: str
    emotion_for_caller: dict[str, str] = {}  # caller's emotion as recognised -> emotion of the answer; refused today
    rate_when_not_understood: str = ""  # rate from the first turn not understood on; "" = no change


def unsupported_values(rules: StyleRules, checkpoint: CheckpointFacts) -> list[str]:
    """One line for each value the checkpoint was not trained on; empty = the rules can be kept."""
    wanted = [("style.languages", language, checkpoint.languages) for language in rules.languages]
    wanted += [
        ("style.dialect", rules.dialect, checkpoint.dialects),
        ("style.emotion", rules.emotion, checkpoint.emotions),
        ("style.rate", rules.rate, checkpoint.rates),
    ]
    wanted += [(f"style.emotion_for_caller.{k}", v, checkpoint.emotions) for k, v in rules.emotion_for_caller.items()]
    if rules.rate_when_not_understood:
        wanted.append(("style.rate_when_not_understood", rules.rate_when_not_understood, checkpoint.rates))
    unheard = [
        f"style.emotion_for_caller.{emotion}: no engine tells a caller's emotion yet; it must be left out"
        for emotion in rules.emotion_for_caller
    ]
    return unheard + [
        f"{key} = {value!r}: checkpoint {checkpoint.name} was trained on {', '.join(trained) or 'none'}"
        for key, value, trained in wanted
        if value not in trained
    ]


def decide_style(rules: StyleRules, facts: CallFacts) -> StyleDecision:
    language, emotion, rate = rules.languages[0], rules.emotion, rules.rate
    reasons = [f"campaign begins in {language}, {rules.dialect}, {emotion}, {rate}"]
    if facts.caller_language and facts.caller_language != language:
        if facts.caller_language in rules.languages:
            language = facts.caller_language
            reasons.append(f"caller speaks {language}")
        else:
            reasons.append(f"caller speaks {facts.caller_language}, which the campaign does not offer")
    if facts.caller_emotion in rules.emotion_for_caller:
        emotion = rules.emotion_for_caller[facts.caller_emotion]
        reasons.append(f"caller sounds {facts.caller_emotion}: {emotion}")
    if facts.num_turns_not_understood and rules.rate_when_not_understood:
        rate = rules.rate_when_not_understood
        reasons.append(f"{facts.num_turns_not_understood} turns not understood: {rate}")
    return StyleDecision(
        language=language,
        dialect=rules.dialect,
        emotion=emotion,
        rate=rate,
        instruction=instruction(emotion, rate),
        reasons=tuple(reasons),
    )


def instruction(emotion: str, rate: str) -> str:
    """The sentence the model gets: `instruction("calm", "normal")` -> "speak in a calm voice at a normal pace."""
    return f"speak in a {emotion} voice at a {rate} pace."
