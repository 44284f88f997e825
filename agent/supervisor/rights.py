"""What a handler asks before it acts: does the person who is signed in have this right?"""

from __future__ import annotations

from fastapi import HTTPException, Request

from agent.supervisor.auth import Person, Right


def person_with(request: Request, right: Right) -> Person:
    """The person; 403 that names the missing right. The guard has let nobody else in."""
    person: Person | None = request.state.person
    if person is None:
        raise HTTPException(401, "sign in first")
    if right not in person.rights:
        raise HTTPException(403, f"{person.name} does not have the right {right}; minmo access add gives it")
    return person
