"""The door: token, cookie, throttling, state file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.supervisor.auth import (
    MAX_FAILURES,
    MAX_SOURCES,
    WINDOW_S,
    Door,
    Right,
    TooManyAttempts,
    UnsafeStateFile,
    WrongToken,
)
from agent.supervisor.config import WebConfig, WebConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "web" / "state.json"


def opened(path: Path, session_s: float = 100.0) -> tuple[Door, str]:
    door, token = Door.open(path, session_s=session_s)
    assert token is not None
    return door, token


def test_token_is_shown_once_and_not_kept(path: Path) -> None:
    _, token = opened(path)
    assert len(token) >= 32
    assert token.encode() not in path.read_bytes()
    again, second = Door.open(path, session_s=100.0)
    assert second is None
    again.login(token, "1.2.3.4", 0.0)


def test_state_file_is_for_its_owner_only_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        opened(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(UnsafeStateFile, match="0600"):
        Door.open(path, session_s=100.0)


def test_new_token_ends_the_old_one_and_its_sessions(path: Path) -> None:
    door, token = opened(path)
    cookie = door.login(token, "a", 0.0)
    door, new_token = Door.open(path, session_s=100.0, is_new_token_wanted=True)
    assert new_token is not None and new_token != token
    assert not door.is_signed_in(cookie, 1.0)
    with pytest.raises(WrongToken):
        door.login(token, "a", 1.0)


def test_new_first_token_takes_nobody_elses(path: Path) -> None:
    door, _ = opened(path)
    ann = door.add_person("ann", frozenset({Right.EXPORT}))
    door, _ = Door.open(path, session_s=100.0, is_new_token_wanted=True)
    person = door.who(door.login(ann, "a", 0.0), 1.0)
    assert person is not None and (person.name, person.rights) == ("ann", {Right.EXPORT})


def test_new_token_of_a_person_ends_that_persons_sessions_and_no_others(path: Path) -> None:
    door, token = opened(path)
    first, ann = door.login(token, "a", 0.0), door.login(door.add_person("ann", frozenset()), "a", 0.0)
    bob = door.login(door.add_person("bob", frozenset()), "a", 0.0)
    door.add_person("ann", frozenset())
    assert not door.is_signed_in(ann, 1.0)
    assert door.is_signed_in(bob, 1.0) and door.is_signed_in(first, 1.0)
    door.remove_person("bob")
    door.add_person("bob", frozenset())  # somebody else of that name
    assert not door.is_signed_in(bob, 1.0)


def test_state_file_that_others_can_read_is_refused_also_for_a_new_token(path: Path) -> None:
    opened(path)
    path.chmod(0o644)
    with pytest.raises(UnsafeStateFile, match="0600"):
        Door.open(path, session_s=100.0, is_new_token_wanted=True)


def test_cookie_holds_until_it_expires_and_over_a_restart(path: Path) -> None:
    door, token = opened(path, session_s=100.0)
    cookie = door.login(token, "a", 1_000.0)
    restarted, _ = Door.open(path, session_s=100.0)
    assert restarted.is_signed_in(cookie, 1_099.0)
    assert not restarted.is_signed_in(cookie, 1_100.0)


def test_changed_or_made_up_cookies_are_refused(path: Path) -> None:
    door, token = opened(path)
    cookie = door.login(token, "a", 0.0)
    expiry, nonce, signature = cookie.split(".")
    for forged in (
        f"{int(expiry) + 1}.{nonce}.{signature}",
        f"{expiry}.{nonce}.{'0' * 64}",
        f"{expiry}.{nonce}.",
        cookie[:-1],
        "",
        "..",
        "é.ü.ß",
        "a" * 5_000,
    ):
        assert not door.is_signed_in(forged, 0.0), forged


def test_signing_out_ends_every_session(path: Path) -> None:
    door, token = opened(path)
    cookies = [door.login(token, "a", 0.0) for _ in range(2)]
    door.sign_out_everywhere()
    assert not any(door.is_signed_in(cookie, 1.0) for cookie in cookies)
    assert not Door.open(path, session_s=100.0)[0].is_signed_in(cookies[0], 1.0)


def test_guessing_source_has_to_wait_and_others_do_not(path: Path) -> None:
    door, token = opened(path)
    for attempt in range(MAX_FAILURES):
        with pytest.raises(WrongToken):
            door.login("guess", "attacker", float(attempt))
    with pytest.raises(TooManyAttempts) as refused:
        door.login(token, "attacker", 10.0)
    assert 0 < refused.value.retry_after_s <= WINDOW_S
    door.login(token, "supervisor", 10.0)
    door.login(token, "attacker", WINDOW_S + 10.0)


def test_flood_from_many_sources_does_not_fill_the_memory(path: Path) -> None:
    door, _ = opened(path)
    for source in range(MAX_SOURCES + 500):
        with pytest.raises(WrongToken):
            door.login("guess", str(source), 0.0)
    assert len(door._failures) == MAX_SOURCES


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "calls.example.org"])
def test_public_bind_without_tls_or_proxy_is_refused(host: str) -> None:
    with pytest.raises(WebConfigError, match=r"web\.host"):
        WebConfig(host=host)
    assert WebConfig(host=host, is_behind_proxy=True, allowed_hosts=("calls.example.org",)).is_https


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.53"])
def test_loopback_needs_nothing(host: str) -> None:
    assert not WebConfig(host=host).is_https


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 70_000},
        {"poll_ms": 1},
        {"tls_cert_file": "x.pem"},
        {"tls_cert_file": "/nowhere/x.pem", "tls_key_file": "/nowhere/y.pem"},
        {"is_behind_proxy": True},
    ],
)
def test_wrong_setting_is_named(settings: dict[str, object]) -> None:
    with pytest.raises(WebConfigError, match=r"web\."):
        WebConfig(**settings)  # type: ignore[arg-type]
