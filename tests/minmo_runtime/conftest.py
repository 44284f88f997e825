"""Where the golden vectors are: `--golden-dir`, else the committed fixtures, else `../shared/reference`; a test
without its vectors skips."""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
REFERENCE = Path(__file__).parents[3] / "shared" / "reference"


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--golden-dir", default=None)
    folder = Path(given) if given else (REFERENCE if REFERENCE.is_dir() else FIXTURES)
    if not folder.is_dir():
        pytest.skip("no golden vectors here")
    return folder
