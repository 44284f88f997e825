"""What every test shares: live tests say which programs they need, and the run says which were missing.

    @pytest.mark.live
    @pytest.mark.peers("baresip", "sipp")

A live test whose peers are not installed is skipped and the last line of the run names them; with MINMO_REQUIRE_PEERS=1
(set by .ci/run) every skipped live test is a failure, whatever it was skipped for.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

# PostgreSQL's server programs are not on PATH on Debian.
EXTRA_PATH = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
_MISSING = re.compile(r"missing:? ([\w, +-]+)")
_skipped_live: dict[str, str] = {}  # test id -> reason


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(EXTRA_PATH))


def are_peers_required() -> bool:
    return os.environ.get("MINMO_REQUIRE_PEERS") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    meaning = "folder of golden vectors (default: ../shared/reference, else the fixtures)"
    parser.addoption("--golden-dir", default=None, help=meaning)


def pytest_runtest_setup(item: pytest.Item) -> None:
    programs = [name for marker in item.iter_markers("peers") for name in marker.args]
    if missing := [name for name in programs if not find_program(name)]:
        pytest.skip(f"missing: {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.get_closest_marker("live"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped_live[item.nodeid] = reason
        if are_peers_required():
            report.outcome = "failed"
            report.longrepr = f"skipped, and MINMO_REQUIRE_PEERS=1: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A live file that skips itself as a whole (`importorskip`) has no test that could be counted."""
    report = yield
    if report.skipped and collector.path.parent.name == "live":
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        _skipped_live[collector.nodeid] = reason
        if are_peers_required():
            report.outcome = "failed"
            report.longrepr = f"skipped, and MINMO_REQUIRE_PEERS=1: {reason}"
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last line, after pytest's own summary."""
    if _skipped_live and not are_peers_required():
        print(skip_summary(_skipped_live.values()))


def skip_summary(reasons: Iterable[str]) -> str:
    """["Skipped: missing: sipp", ...] -> "SKIPPED 2 live tests: missing baresip, sipp; run: sudo make peers"."""
    reasons = list(reasons)
    missing = {name.strip() for reason in reasons for hit in _MISSING.findall(reason) for name in hit.split(",")}
    if not missing:
        others = "; ".join(sorted({reason.removeprefix("Skipped: ") for reason in reasons}))
        return f"SKIPPED {len(reasons)} live tests: {others}"
    return f"SKIPPED {len(reasons)} live tests: missing {', '.join(sorted(missing))}; run: sudo make peers"
