"""No fake stands in the path of the demo: without the weights of any one part it fails, and says what it could not do.

Each part is taken away alone, in a copy of the shipped checkpoint: all zeros (refused at the start), or its own numbers
in random order (the call is made, and fails). Of the second kind the voice LM's call takes a minute and a half of a
core: with MINMO_ALL_DEMOS=1, a release's check.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pjsua2")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from agent.run_folder import SHIPPED_CHECKPOINT  # noqa: E402
from minmo_runtime.checkpoint_contents import KEPT_PARTS, parts  # noqa: E402
from tests.live.stack import ENVIRONMENT  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.slow]
CONTENTS = SHIPPED_CHECKPOINT / "checkpoint.toml"
FILES: dict[str, dict[str, str]] = tomllib.loads(CONTENTS.read_text())["files"] if CONTENTS.is_file() else {}
SERVED_PARTS = [part for part in (*parts(), *KEPT_PARTS) if part in FILES]


def checkpoint_with(part: str, change: Any, folder: Path) -> Path:
    """A copy of the shipped checkpoint in which every tensor of one part went through `change`."""
    copy = folder / "checkpoint"
    shutil.copytree(SHIPPED_CHECKPOINT, copy)
    path = copy / FILES[part]["path"]
    save_file({key: change(tensor) for key, tensor in load_file(path).items()}, path)
    contents = (copy / "checkpoint.toml").read_text()
    new_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "checkpoint.toml").write_text(contents.replace(FILES[part]["sha256"], new_hash))
    return copy


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    """As large as what was trained, but nothing was learned."""
    if tensor.dim() < 2:
        return tensor  # norms and biases: so that nothing overflows
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(1))  # the same call every time
    values = tensor.float().flatten()[order]
    return values.view(tensor.shape).to(tensor.dtype).contiguous()


CHANGES = {"random": random_like, "zero": torch.zeros_like}
COULD_NOT = {
    "voice_lm": "the agent is not intelligible|the fixed sentences could not be spoken",
    "encoder": r"on ['\"].+['\"] \(understood as ['\"]",  # ... what it understood, and did
}
LEARNED_NOTHING = tuple(COULD_NOT) if os.environ.get("MINMO_ALL_DEMOS") == "1" else ("encoder",)
DEMOS = [("random", part) for part in LEARNED_NOTHING] + [("zero", part) for part in SERVED_PARTS]  # longest first


@dataclass(frozen=True)
class Ended:
    status: int
    line: dict[str, Any]  # for machines
    text: str  # for people

    @property
    def faults(self) -> str:
        return self.text.partition("FAILED")[2]


def demo(kind: str, part: str, folder: Path) -> Ended:
    """`minmo demo --json` with one part changed. Other tests' calls go first: this one fails however long it takes."""
    folder.mkdir()
    checkpoint = checkpoint_with(part, CHANGES[kind], folder)
    command = ["nice", sys.executable, "-m", "agent", "demo", "--json", "--checkpoint", str(checkpoint), "--seed", "1"]
    ended = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=580
    )
    (folder / "text").write_text(ended.stderr)
    return Ended(ended.returncode, json.loads(ended.stdout.splitlines()[-1]), ended.stderr)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[Ended]]]:
    """All of them, the next one while a test looks at the last."""
    folder = tmp_path_factory.mktemp("demos")
    with ThreadPoolExecutor(1) as pool:
        yield {key: pool.submit(demo, *key, folder / "-".join(key)) for key in DEMOS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("part", SERVED_PARTS)
def test_demo_is_refused_by_name_when_the_weights_of_a_part_are_zero(
    part: str, demos: dict[tuple[str, str], Future[Ended]]
) -> None:
    ended = demos["zero", part].result()
    assert ended.status == 1 and ended.line["answered"] is False
    assert f"UNTRAINED({part})" in ended.faults, ended.text


@pytest.mark.parametrize("part", LEARNED_NOTHING)
def test_demo_fails_and_says_what_it_could_not_do_when_a_part_has_learned_nothing(
    part: str, demos: dict[tuple[str, str], Future[Ended]]
) -> None:
    ended = demos["random", part].result()
    assert ended.status == 1
    assert re.search(COULD_NOT[part], ended.faults), ended.text
