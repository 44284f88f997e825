"""Who the agent is in a campaign: its name, and the sentence of the system prompt that says so.

The wording is the text form that the language model was trained on (lower case, short sentences); a test compares it
with the training corpus, because the two islands may not import each other.
"""

from __future__ import annotations

import msgspec


class Persona(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str

    def introduction(self, shop: str) -> str:
        """`Persona(name="anna", ...).introduction("acme")` -> "you are anna at acme."""
        return f"you are {self.name} at {shop}."
