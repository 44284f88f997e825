"""Where the golden vectors are: `--golden-dir`, else `../shared/reference`, else the committed fixtures; a test
without its vectors skips. How they are read: golden.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "golden"
REFERENCE = Path(__file__).parents[3] / "shared" / "reference"


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--golden-dir", default=None)
    if given and not list(Path(given).glob("*_io.safetensors")):
        pytest.fail(f"--golden-dir {given}: no *_io.safetensors there")  # skipping would look like success
    folder = Path(given) if given else (REFERENCE if REFERENCE.is_dir() else FIXTURES)
    if not folder.is_dir():
        pytest.skip("no golden vectors here")
    return folder


@pytest.fixture(scope="session")
def listing_dir(golden_dir: Path) -> Path:
    """Where the full-size key listings are: they come with set A only, whatever `--golden-dir` says."""
    for folder in (golden_dir, REFERENCE):
        if (folder / "cosyvoice2_llm.json").is_file():
            return folder
    pytest.skip("no full-size listings here")
