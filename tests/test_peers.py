"""What `make test` says on a machine without the live tests' peers, and what it does where they are required.

The real live tests, in a run of their own whose PATH has no program in it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
needs_pjsua2 = pytest.mark.skipif(not importlib.util.find_spec("pjsua2"), reason="pjsua2 is not installed")


def run_live(*files: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'pytest'}"]
    return subprocess.run(
        [*command, *(f"tests/live/{file}" for file in files)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": str(folder / "empty"), "MINMO_REQUIRE_PEERS": "", **environment},
    )  # fmt: skip


@needs_pjsua2
def test_without_peers_the_last_line_counts_what_was_skipped_and_says_how_to_get_them(tmp_path: Path) -> None:
    ended = run_live("test_sipp.py", "test_baresip.py", "test_page.py", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout
    (num_skipped,) = re.findall(r"(\d+) skipped", ended.stdout)
    last = ended.stdout.splitlines()[-1]
    assert int(num_skipped) > 10
    assert last == f"SKIPPED {num_skipped} live tests: missing baresip, chromium, sipp; run: sudo make peers"


@needs_pjsua2
def test_where_peers_are_required_a_missing_one_is_a_failure(tmp_path: Path) -> None:
    ended = run_live("test_page.py", folder=tmp_path, MINMO_REQUIRE_PEERS="1")
    assert ended.returncode == 1
    assert "skipped, and MINMO_REQUIRE_PEERS=1: Skipped: missing: chromium" in ended.stdout


def test_where_peers_are_required_a_live_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    """`importorskip` skips a whole file before there is a test to count."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "pjsua2.py").write_text("raise ModuleNotFoundError('none here', name='pjsua2')\n")
    hidden = {"PYTHONPATH": str(tmp_path / "without")}
    skipped = run_live("test_sipp.py", folder=tmp_path, **hidden).stdout.splitlines()
    assert skipped[-1].startswith("SKIPPED 1 live tests: ") and "pjsua2" in skipped[-1]
    required = run_live("test_sipp.py", folder=tmp_path, MINMO_REQUIRE_PEERS="1", **hidden)
    assert required.returncode != 0 and "pjsua2" in required.stdout
