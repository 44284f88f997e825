"""Whole calls as text, from a seed: what nano's LLM learns from and is tested with (stages 0g, 1a-1c, 2a-2b).

The agent's side is a plain policy over (what was asked last, intent, what stands in the caller's words). Labels follow
the words AS THEY ARE WRITTEN, after recognition errors and number normalisation: a number that lost a digit is asked
for again. Knows nothing of tokens or of training. Data: `corpus`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from minmo_runtime.text import digit_runs, format_tool_line, normalise_spoken, system_prompt, time_words
from minmo_runtime.training import corpus, general
from minmo_runtime.training.noise import garble

RESULT_WORDS = {"preparing": ("preparing", "being packed", "packed")}  # other families: their own name
ORDER_FAMILIES = ("shipped", "shipped", "shipped", "delivered", "delayed", "preparing", "preparing", "returned")
UNDATED_FAMILIES = ("cancelled", "unpaid")
TASKS = (
    *("order_status", "order_status_number", "order_status_number", "hours", "hours_day", "hours_day") * 3,
    *("change", "change_day", "change_number", "change_both", "change_both") * 2,
    *("person", "person", "number_only", "day_only", "keypad", "keypad_zero"),
    *("hello", "hear_me", "how_are_you", "who_are_you", "are_you_robot", "what_can_you_do", "thanks", "wait", "repeat"),
    *("slower", "trouble", "trouble", "off_topic", "garbage", "goodbye", "no", "yes"),
)
FOLLOW_UPS = {  # what the agent waits for -> what callers then say
    "number": ("number_only",) * 12 + ("wait", "repeat"),
    "day": ("day_only",) * 8 + ("wait", "repeat"),
    "more": ("no",) * 4 + ("yes",) * 3 + ("goodbye", "goodbye", "thanks", "repeat", "repeat"),
    "person": ("yes", "yes", "no"),
    "callback": ("yes", "yes", "no"),
}
NUMBER_INTENTS = frozenset("order_status_number number_only change_number change_both keypad".split())
DAY_INTENTS = frozenset("hours_day day_only change_day change_both".split())
STRANGE_SHARE = 0.3  # of the callers' turns with a value, in training


@dataclass(frozen=True)
class Turn:
    """role: system, user, assistant or tool. Turns with `is_target` are learnt; `kind` names them in the scores."""

    role: str
    text: str
    is_target: bool = False
    kind: str = ""
    slots: tuple[str, ...] = ()


@dataclass
class Pending:
    """What the agent asked for last, and what it already knows of the task. Owned by DialogueWriter."""

    slot: str = ""  # number | day | more | person | callback | ""
    task: str = ""  # status | change | hours
    number: str = ""
    day: str = ""


@dataclass
class DialogueWriter:
    """Writes one call. `noise` is the share of words that recognition got wrong."""

    rng: random.Random
    split: str
    noise: float
    turns: list[Turn] = field(default_factory=list)
    pending: Pending = field(default_factory=Pending)
    name: str = "mia"
    shop: str = "the garden shop"
    is_over: bool = False
    last_said: str = ""
    known_number: str = ""  # the order that was last found in this call
    num_not_understood: int = 0

    def write(self, num_tasks: int) -> list[Turn]:
        self._open()
        while num_tasks > 0 and not self.is_over:
            if self.pending.slot and self.rng.random() < 0.85:
                self._exchange(self.rng.choice(FOLLOW_UPS[self.pending.slot]))
            else:
                num_tasks -= 1
                self._exchange(self.rng.choice(TASKS))
        for _ in range(3):
            if self.is_over:
                break
            follow_up = self.rng.choice(FOLLOW_UPS.get(self.pending.slot, ("goodbye", "no", "person")))
            self._exchange(follow_up)
        return self.turns

    # ------------------------------------------------------------ the two sides

    def _open(self) -> None:
        rng = self.rng
        self.name, self.shop = corpus.persona_name(rng), corpus.shop_name(rng)
        emotion = rng.choice("neutral friendly calm cheerful warm serious brisk".split())
        rate = rng.choice(("slow", "normal", "fast"))
        style = "" if rng.random() < 0.1 else f"speak in a {emotion} voice at a {rate} pace."
        self.turns.append(Turn("system", system_prompt(self.name, self.shop, style)))
        notice = "you are speaking with an automated assistant."
        if rng.random() < 0.6:
            notice += " this call is recorded."
        greeting = corpus.greeting(rng, self.name, self.shop) if rng.random() < 0.8 else "hello, how can i help you?"
        draw = rng.random()
        if draw < 0.5:
            self._say_only(f"{notice} {greeting}")
        elif draw < 0.75:
            self._say_only(notice)
            self._say_only(greeting)
        elif draw < 0.9:
            self._say_only(greeting)

    def _exchange(self, intent: str) -> None:
        if self.rng.random() < 0.04:
            self._say_only(self.rng.choice(corpus.agent_lines() or ("are you still there?",)).split("{")[0].strip())
        text = self._caller_text(intent)
        self.turns.append(Turn("user", text))
        runs = digit_runs(text)
        number = runs[-1] if runs and intent in NUMBER_INTENTS else ""
        days = [word for word in text.split() if word in corpus.DAYS]
        day_name = days[-1] if days and intent in DAY_INTENTS else ""
        num_before = len(self.turns)
        if intent != "garbage":
            self.num_not_understood = 0
        self._answer(intent, number, day_name)
        self._maybe_cut(num_before)

    def _caller_text(self, intent: str) -> str:
        rng, split = self.rng, self.split
        number = corpus.order_number(rng, split)
        if intent == "keypad_zero":
            return "keypad 0"
        if intent == "keypad":
            typed = number if rng.random() < 0.85 else number[: rng.randint(1, 4)]
            return rng.choice(("keypad {}", "my order number is {}")).format(typed if len(typed) > 1 else number)
        if intent == "garbage":
            return self._garbage()
        draw = rng.random()
        spoken = corpus.restarted_number(number, rng) if draw < 0.08 else corpus.spoken_number(number, rng)
        if 0.08 < draw < 0.13:
            length = rng.choice((2, 3, 4, 4, 6, 6, 7))
            spoken = corpus.spoken_number("".join(rng.choice("0123456789") for _ in range(length)), rng)
        template = corpus.phrase(intent, split, rng)
        if split == "train" and intent in NUMBER_INTENTS | DAY_INTENTS and rng.random() < STRANGE_SHARE:
            template = corpus.with_strange_words(template, intent, rng)
        text = corpus.fill_phrase(template, spoken, corpus.day(rng))
        if intent in DAY_INTENTS and rng.random() < 0.03:
            text = f"{text} no {corpus.day(rng)}"
        return normalise_spoken(garble(text, rng, self.noise))

    def _garbage(self) -> str:
        rng = self.rng
        draw = rng.random()
        if draw < 0.5:
            return garble(general.random_words(rng, 2, 6), rng, 0.4) or "uh"
        if draw < 0.8:
            return garble(general.general_sentence(rng), rng, 0.35) or "uh"
        return rng.choice(("uh", "um", "the", "a", "and", "i", "so", "the the", "it it", "and the", "is", "of"))

    def _answer(self, intent: str, number: str, day_name: str) -> None:
        pending = self.pending
        if intent == "number_only" or intent == "keypad":
            is_change = pending.slot in ("number", "day") and pending.task == "change"
            self._with_number("change" if is_change else "status", number)
        elif intent in ("order_status", "order_status_number"):
            self._with_number("status", number)
        elif intent == "day_only" and pending.task == "change" and pending.slot in ("day", "number"):
            self._change(pending.number, day_name)
        elif intent in ("hours", "hours_day", "day_only"):
            self._hours(day_name)
        elif intent.startswith("change"):
            self._change(number, day_name, is_new=True)
        else:
            self._small(intent)

    def _with_number(self, task: str, number: str) -> None:
        if task == "change":
            self._change(number, self.pending.day)
        elif not number:
            self._say("ask_number")
            self.pending = Pending("number", "status")
        elif len(number) != corpus.NUM_DIGITS:
            self._say("bad_number")
            self.pending = Pending("number", "status")
        else:
            self._look_up(number)

    def _look_up(self, number: str) -> None:
        rng = self.rng
        self._call("look_up_order", order_number=number)
        self.pending = Pending("more")
        if rng.random() < 0.1:
            self.turns.append(Turn("tool", "status not_found"))
            self._say("not_found", n=number)
            self.pending = Pending("number", "status")
        elif rng.random() < 0.03:
            self._fail()
        elif rng.random() < 0.12:
            family = rng.choice(UNDATED_FAMILIES)
            self.turns.append(Turn("tool", f"status {family}"))
            self._say(family, with_more=True, n=number)
            self.known_number = number
        else:
            family, day_name = rng.choice(ORDER_FAMILIES), corpus.day(rng)
            word = rng.choice(RESULT_WORDS.get(family, (family,)))
            self.turns.append(Turn("tool", f"status {word} day {day_name}"))
            self._say(family, with_more=True, n=number, on_d=corpus.on_day(day_name))
            self.known_number = number

    def _hours(self, day_name: str) -> None:
        if not day_name:
            self._say("ask_day_hours")
            self.pending = Pending("day", "hours")
            return
        rng = self.rng
        self._call("opening_hours", day=day_name)
        self.pending = Pending("more")
        if rng.random() < 0.2:
            self.turns.append(Turn("tool", rng.choice(("closed", "status closed", f"day {day_name} closed"))))
            self._say("closed", with_more=True, on_d=corpus.on_day(day_name))
        elif rng.random() < 0.03:
            self._fail()
        else:
            opens = time_words(rng.randint(6, 11), rng.choice((0, 0, 0, 30, 15, 45, 5, 10, 20, 40, 50)))
            closes = time_words(rng.randint(12, 23), rng.choice((0, 0, 0, 30, 15, 45, 5, 10, 20, 40, 50)))
            prefix = f"day {day_name} " if rng.random() < 0.3 else ""
            self.turns.append(Turn("tool", f"{prefix}open {opens} close {closes}"))
            self._say("open_hours", with_more=True, on_d=corpus.on_day(day_name), open=opens, close=closes)

    def _change(self, number: str, day_name: str, is_new: bool = False) -> None:
        number_here = number or (self.known_number if is_new else "")
        if not number_here:
            self._say("ask_number_change")
            self.pending = Pending("number", "change", "", day_name)
        elif len(number_here) != corpus.NUM_DIGITS:
            self._say("bad_number")
            self.pending = Pending("number", "change", "", day_name)
        elif not day_name:
            self._say("ask_day_change")
            self.pending = Pending("day", "change", number_here)
        else:
            self._call("change_delivery", order_number=number_here, day=day_name)
            self.pending = Pending("more")
            self._changed(number_here, day_name)

    def _changed(self, number: str, day_name: str) -> None:
        draw = self.rng.random()
        if draw < 0.1:
            self.turns.append(Turn("tool", "result not_found"))
            self._say("not_found", n=number)
            self.pending = Pending("number", "change", "", day_name)
        elif draw < 0.2:
            self.turns.append(Turn("tool", "result too_late"))
            self._say("too_late", with_more=True, n=number)
        elif draw < 0.23:
            self._fail()
        else:
            self.turns.append(Turn("tool", "result changed"))
            self._say("changed", with_more=True, n=number, on_d=corpus.on_day(day_name))
            self.known_number = number

    def _fail(self) -> None:
        self.turns.append(Turn("tool", "error"))
        self._say("tool_error")
        self.pending = Pending("callback")

    def _small(self, intent: str) -> None:
        slot = self.pending.slot
        if intent in ("person", "keypad_zero") or (intent == "yes" and slot == "person"):
            self._transfer()
        elif intent == "goodbye" or (intent == "no" and slot not in ("person", "callback")):
            self._hang_up()
        elif intent == "no":
            self._say("no_callback")
            self.pending = Pending("more")
        elif intent == "yes" and slot == "callback":
            self._call("request_callback")
            self.turns.append(Turn("tool", "result stored"))
            self._say("callback", with_more=True)
            self.pending = Pending("more")
        elif intent == "yes":
            self._say("what_else")
            self.pending = Pending()
        elif intent == "wait":
            self._say("wait", is_repeatable=False)
        elif intent == "repeat":
            self._repeat()
        elif intent == "garbage":
            self.num_not_understood += 1
            if self.num_not_understood >= 2:
                self._say("not_understood_again")
                self.pending = Pending("person")
            else:
                self._say("not_understood", is_repeatable=False)
        else:
            self._say(intent, name=self.name, shop=self.shop)
            self.pending = Pending({"thanks": "more", "trouble": "person"}.get(intent, ""))

    def _transfer(self) -> None:
        self._call("transfer")
        draw = self.rng.random()
        if draw < 0.5:
            self.is_over = True
        elif draw < 0.7:
            self.turns.append(Turn("tool", "status connecting"))
            self._say("connecting")
            self.is_over = True
        else:
            self.turns.append(Turn("tool", "status busy"))
            self._say("busy")
            self.pending = Pending("callback")

    def _hang_up(self) -> None:
        text = corpus.reply("goodbye")
        self.turns.append(Turn("assistant", f"{text}<tool_call>hang_up</tool_call>", True, "hang_up"))
        self.is_over = True

    def _repeat(self) -> None:
        if self.last_said:
            self.turns.append(Turn("assistant", self.last_said, True, "repeat", tuple(digit_runs(self.last_said))))
        else:
            self._say("hello")
            self.pending = Pending()

    # ------------------------------------------------------------ turns

    def _say(self, family: str, with_more: bool = False, is_repeatable: bool = True, **slots: str) -> None:
        text = corpus.reply(family, **slots)
        if with_more:
            text = f"{text} {corpus.replies()['more']}"
        values = tuple(value for key, value in slots.items() if f"{{{key}}}" in corpus.replies()[family])
        self.turns.append(Turn("assistant", text, True, f"say:{family}", values))
        if is_repeatable:
            self.last_said = text

    def _call(self, tool: str, **arguments: str) -> None:
        line = format_tool_line(tool, arguments)
        self.turns.append(Turn("assistant", f"<tool_call>{line}</tool_call>", True, tool, tuple(arguments.values())))
        if tool not in ("transfer", "hang_up") and self.rng.random() < 0.04:
            self._say_only(self.rng.choice(("one moment please.", "let me check.")))

    def _say_only(self, text: str) -> None:
        """A sentence the agent said by itself: in the context, not learnt."""
        if text:
            self.turns.append(Turn("assistant", text))

    def _maybe_cut(self, num_before: int) -> None:
        """A barge-in: of the last sentence only the heard words stay, and the caller goes on with something else."""
        last = self.turns[-1]
        if self.is_over or len(self.turns) <= num_before or last.role != "assistant" or self.rng.random() > 0.12:
            return
        words = last.text.split()
        num_heard = self.rng.randint(0, len(words) - 1)
        self.turns[-1:] = [Turn("assistant", " ".join(words[:num_heard]))] if num_heard else []
        if num_heard * 2 < len(words) or self.pending.slot in ("more", "person", "callback"):
            self.pending = Pending()


def dialogue(seed: int | str, split: str, noise: float | None = None) -> list[Turn]:
    """One call. noise None: a third of the calls clean, the rest with 3-15 % of the words misrecognised."""
    rng = random.Random(f"dialogue/{split}/{seed}")
    if noise is None:
        noise = 0.0 if rng.random() < 0.35 else rng.uniform(0.03, 0.15)
    return DialogueWriter(rng, split, noise).write(num_tasks=rng.choice((1, 1, 2, 2, 3)))
