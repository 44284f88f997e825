"""The table "Users' pains, row by row" of docs/telephony.md: every row has a test that exists and is named after it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| ([PLJ]\d+(?:, [PLJ]\d+)*) \| [^|]+ \| (`.+`) \|$", re.MULTILINE)
TEST = re.compile(r"`([^`]+)::(test_\w+)`")


def table() -> list[tuple[list[str], str]]:
    """Ids and the cell of tests of each row."""
    text = (ROOT / "docs" / "telephony.md").read_text(encoding="utf-8").split("## Users' pains", 1)[1]
    return [(ids.split(", "), tests) for ids, tests in ROW.findall(text.split("\n## ", 1)[0])]


def rows() -> list[tuple[list[str], str, str]]:
    """Ids, file and test; a row that needs two tests comes twice."""
    return [(ids, path, name) for ids, tests in table() for path, name in TEST.findall(tests)]


def test_every_row_names_a_test_that_exists_and_bears_its_name() -> None:
    faults = []
    for ids, path, name in rows():
        file = ROOT / path
        if not file.is_file() or f"def {name}(" not in file.read_text(encoding="utf-8"):
            faults.append(f"{path}::{name} is not there")
        if not name.startswith(f"test_{'_'.join(ids)}_"):
            faults.append(f"{name} is not named after {', '.join(ids)}")
    assert not faults


def test_rows_are_many_and_none_is_answered_twice() -> None:
    ids = [one for names, _ in table() for one in names]
    assert len(ids) == len(set(ids)) and len(ids) >= 35


def test_every_test_that_is_named_after_a_row_is_in_the_table() -> None:
    listed = {name for _, _, name in rows()}
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= set(re.findall(r"def (test_[PLJ]\d+_\w+)\(", path.read_text(encoding="utf-8")))
    assert found == listed
