"""Scanners that nobody here wrote, against a running agent: sipvicious and sipsak from an address that is not listed
learn nothing and leave one row and no call; from a listed address the same programs find what is there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("pjsua2")
import sipvicious  # noqa: E402

from tests.live.lines_campaign import CallingStack, calling_stack  # noqa: E402
from tests.live.stack import ENVIRONMENT  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.asyncio(loop_scope="module")]
LISTED, STRANGER = "127.0.0.1", "127.0.0.66"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CallingStack]:
    telephony = {"allowed_sources": [f"{LISTED}/32"], "transports": ["udp", "tcp"]}
    async with calling_stack(tmp_path_factory.mktemp("stack"), {"telephony": telephony}) as running:
        yield running


async def run(folder: Path, *command: str, within_s: float = 60.0) -> str:
    """All that the program said."""

    def work() -> str:
        done = subprocess.run(
            command, cwd=folder, env=ENVIRONMENT | {"HOME": str(folder)}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=within_s, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    return await asyncio.to_thread(work)


async def svmap(stack: CallingStack, folder: Path, source: str, method: str) -> str:
    host, _, port = stack.address.partition(":")
    tool = (sys.executable, "-m", f"{sipvicious.__name__}.svmap")
    return await run(folder, *tool, "-b", source, "-x", source, "-p", port, "-m", method, host)


def rows_of(stack: CallingStack, source: str) -> list[tuple[str, int]]:
    return [(row["kind"], row["count"]) for row in stack.security() if row["source_address"] == source]


@pytest.mark.parametrize("method", ["OPTIONS", "REGISTER", "INVITE"])
async def test_svmap_from_a_listed_address_finds_us_so_the_scan_works(
    method: str, stack: CallingStack, tmp_path: Path
) -> None:
    found = await svmap(stack, tmp_path, LISTED, method)
    assert stack.address in found, found


@pytest.mark.parametrize("method", ["OPTIONS", "REGISTER", "INVITE"])
async def test_svmap_from_elsewhere_learns_nothing(method: str, stack: CallingStack, tmp_path: Path) -> None:
    calls = len(stack.calls())
    found = await svmap(stack, tmp_path, STRANGER, method)
    assert stack.address not in found and "MinMo" not in found, found
    assert len(stack.calls()) == calls


async def test_svwar_from_elsewhere_finds_no_extension(stack: CallingStack, tmp_path: Path) -> None:
    host, _, port = stack.address.partition(":")
    tool = (sys.executable, "-m", f"{sipvicious.__name__}.svwar")
    options = ("-b", STRANGER, "-x", STRANGER, "-p", port, "-e", "100-120", "-m", "INVITE", "--maximumtime=8")
    found = await run(tmp_path, *tool, *options, host)
    assert "option" not in found and "| 100" not in found and "noauth" not in found, found


@pytest.mark.peers("sipsak")
async def test_sipsak_learns_from_a_listed_address_what_it_may_and_nothing_elsewhere(
    stack: CallingStack, tmp_path: Path
) -> None:
    uri = f"sip:100@{stack.address}"
    assert "SIP/2.0 200" in await run(tmp_path, "sipsak", "-vv", "--local-ip=" + LISTED, "-s", uri)
    assert "SIP/2.0" not in await run(tmp_path, "sipsak", "-vv", "--local-ip=" + STRANGER, "-s", uri)


async def test_all_scans_of_a_stranger_are_one_row_and_no_call(stack: CallingStack, tmp_path: Path) -> None:
    """After the scans above, however many packets they were."""
    await svmap(stack, tmp_path, STRANGER, "OPTIONS")
    async with asyncio.timeout(10):
        while not rows_of(stack, STRANGER):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.2)
    assert [kind for kind, _ in rows_of(stack, STRANGER)] == ["unlisted_source"]
    assert all(call["source_address"].startswith(LISTED) for call in stack.calls())
