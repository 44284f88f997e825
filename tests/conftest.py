"""What every test shares: live tests say which programs they need, and the run says which were missing.

    @pytest.mark.live
    @pytest.mark.peers("baresip", "sipp")

A live test whose peers are not installed is skipped and the last line of the run names them; with MINMO_REQUIRE_PEERS=1
(set by .ci/run) every skipped live test is a failure, whatever it was skipped for.

Under pytest-xdist with `--dist loadfile` whole files are dealt out; but tests whose calls the shipped weights answer
(the fixture `served`) go to one worker, whatever their file: they share one agent, and two engines beside each other
would leave neither the core it needs to keep up.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling, Scheduling

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


def tests_answered_by_nano() -> frozenset[str]:
    """Node ids, without parameters. Read from the files: who deals the tests out has not imported them."""
    found = set()
    for path in sorted((Path(__file__).parent / "live").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
            if is_test and any(arg.arg == "served" for arg in node.args.args):
                found.add(f"tests/live/{path.name}::{node.name}")
    return frozenset(found)


class LiveScheduling(LoadFileScheduling):
    """File by file, but for what nano answers. The order is that of the collection (`--no-loadscope-reorder`)."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._by_nano = tests_answered_by_nano()

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.partition("[")[0] in self._by_nano:
            return "answered by nano"
        return str(super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling | None:
    return LiveScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Live tests last; of them, first what nano answers (it takes longest), then the files with the most tests."""
    sizes = Counter(item.path for item in items if item.get_closest_marker("live"))
    by_nano = tests_answered_by_nano() if sizes else frozenset()
    most = sum(sizes.values())

    def place(item: pytest.Item) -> tuple[int, str]:
        if not item.get_closest_marker("live"):
            return -most - 1, ""
        is_by_nano = "served" in getattr(item, "fixturenames", ())
        if is_by_nano != (item.nodeid.partition("[")[0] in by_nano):
            raise pytest.UsageError(f"{item.nodeid}: `served` must be an argument of the test function itself")
        return (-most, "") if is_by_nano else (-sizes[item.path], item.path.name)

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    programs = [name for marker in item.iter_markers("peers") for name in marker.args]
    if missing := [name for name in programs if not find_program(name)]:
        pytest.skip(f"missing: {', '.join(missing)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.get_closest_marker("live"):
        if are_peers_required():
            report.outcome = "failed"
            report.longrepr = f"skipped, and MINMO_REQUIRE_PEERS=1: {_reason(report)}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called where the run is summed up, wherever the test ran (pytest-xdist)."""
    if report.skipped and "live" in report.keywords:
        _skipped_live[report.nodeid] = _reason(report)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A live file that skips itself as a whole (`importorskip`) has no test that could be counted."""
    report = yield
    if report.skipped and collector.path.parent.name == "live":
        _skipped_live[collector.nodeid] = _reason(report)
        if are_peers_required():
            report.outcome = "failed"
            report.longrepr = f"skipped, and MINMO_REQUIRE_PEERS=1: {_reason(report)}"
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last line, after pytest's own summary."""
    if _skipped_live and not are_peers_required() and not hasattr(config, "workerinput"):
        print(skip_summary(_skipped_live.values()))


def skip_summary(reasons: Iterable[str]) -> str:
    """["Skipped: missing: sipp", ...] -> "SKIPPED 2 live tests: missing baresip, sipp; run: sudo make peers"."""
    reasons = list(reasons)
    missing = {name.strip() for reason in reasons for hit in _MISSING.findall(reason) for name in hit.split(",")}
    if not missing:
        others = "; ".join(sorted({reason.removeprefix("Skipped: ") for reason in reasons}))
        return f"SKIPPED {len(reasons)} live tests: {others}"
    return f"SKIPPED {len(reasons)} live tests: missing {', '.join(sorted(missing))}; run: sudo make peers"
