"""Set-up, and what a run says about itself: scripts/setup_venv.py and check_sizes.py, tests/conftest.py, Makefile."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["pytester"]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Just what setup_venv.py reads."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup_venv.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def interpreter_without(modules: tuple[str, ...], folder: Path) -> Path:
    """A Python that runs, but whose `-m venv`, `-m pip` ... fail, as on Debian without python3-venv."""
    path = folder / "python3"
    tests = " ".join(f'*"-m {module}"*) exit 1;;' for module in modules)
    path.write_text(f'#!/bin/sh\ncase "$*" in {tests} esac\nexec {sys.executable} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def set_up(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/setup_venv.py", "run"],
        cwd=clone,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_a_python_without_venv_and_pip_is_told_the_exact_line_within_5_s(clone: Path, tmp_path: Path) -> None:
    python = interpreter_without(("venv", "virtualenv", "pip"), tmp_path)
    path = "/usr/bin:/bin"  # no uv
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = set_up(clone, PYTHON=str(python), PATH=path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, so that a busy machine does not fail it; nothing here waits for the network.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert done.returncode == 1
    assert "-venv" in done.stderr or "dnf install" in done.stderr
    assert not (clone / ".venv").exists()


def test_an_unsupported_platform_is_refused(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script(clone / "scripts" / "setup_venv.py")
    monkeypatch.setattr(script.platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit):
        script.check_platform()
    monkeypatch.undo()
    monkeypatch.setattr(script.platform, "libc_ver", lambda: ("glibc", "2.27"))
    with pytest.raises(SystemExit):
        script.check_platform()


@pytest.mark.parametrize(
    ("requires", "is_cpu"),
    [
        (["filelock", "numpy"], True),
        (["filelock", 'nvidia-cublas==13.0; platform_system == "Linux"'], False),
        (["triton"], False),
    ],
)
def test_a_torch_that_needs_cuda_is_seen_before_it_is_downloaded(
    clone: Path, monkeypatch: pytest.MonkeyPatch, requires: list[str], is_cpu: bool
) -> None:
    script = load_script(clone / "scripts" / "setup_venv.py")
    report = "WARNING: something\n" + json.dumps({"install": [{"metadata": {"requires_dist": requires}}]}) + "\n"
    monkeypatch.setattr(script, "pip", lambda *arguments, **_: (0, report))
    assert script.resolves_without_cuda("torch==1.0") is is_cpu


def test_without_a_cpu_build_in_the_sources_pytorchs_cpu_index_is_used(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(clone / "scripts" / "setup_venv.py")
    monkeypatch.setattr(script, "pip", lambda *arguments, **_: (1, "no matching distribution"))
    requirement, source = script.find_cpu_torch("2.13.0")
    assert requirement == "torch==2.13.0+cpu"
    assert source == ["--index-url", script.TORCH_CPU_INDEX]


def test_a_second_run_ends_at_once_and_a_changed_pin_does_not(clone: Path) -> None:
    script = load_script(clone / "scripts" / "setup_venv.py")
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").touch()
    assert not script.is_current("run")
    (clone / ".venv" / ".stamp-dev").write_text(script.fingerprint("dev"))
    assert script.is_current("run"), "dev holds what run needs"
    assert not script.is_current("train")
    (clone / "constraints.txt").write_text("numpy==1.0\n")
    assert not script.is_current("run")


def test_the_set_up_runs_on_the_oldest_python3_of_a_supported_system() -> None:
    """RHEL 8's is 3.6: it only looks for a newer one, but it has to get that far."""
    tree = ast.parse((ROOT / "scripts" / "setup_venv.py").read_text(), feature_version=(3, 6))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    newer = {"text", "capture_output"}  # of subprocess.run, since 3.7
    assert calls and not [call.lineno for call in calls if newer & {keyword.arg for keyword in call.keywords}]


def test_every_pin_of_pyproject_agrees_with_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    lines = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").split()
    frozen = dict(line.split("==") for line in lines)
    for requirement in declared:
        name, version = requirement.lower().split("==")
        assert frozen.get(name.split("[")[0], version) == version


# ---------------------------------------------------------------- sizes


def test_a_wheel_carries_every_file_that_lies_in_a_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    carried = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    ours = {name.partition(".")[0] for name in setuptools["packages"]}
    present = {path for name in ours for path in (ROOT / name).rglob("*") if path.is_file()}
    code = {path for path in present if path.suffix in (".py", ".pyc")}
    assert not sorted(str(path.relative_to(ROOT)) for path in present - code - carried)


def test_an_overgrown_weight_file_is_named() -> None:
    script = load_script(ROOT / "scripts" / "check_sizes.py")
    weights = script.CHECKPOINTS / "nano" / "llm.safetensors"
    assert not script.size_faults({weights: 14 * script.MIB})
    assert script.size_faults({weights: 16 * script.MIB}) == [f"{weights}: 16.0 MiB, must be at most 15"]
    assert len(script.size_faults({Path(f"f{n}"): 10 * script.MIB for n in range(7)})) == 1


# ---------------------------------------------------------------- live tests

LIVE_TEST = """
import pytest

@pytest.mark.live
@pytest.mark.peers("no-such-phone", "sh")
def test_call():
    raise AssertionError("must not run")

def test_plain():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    live\n    peers(*programs)\n")
    pytester.makepyfile(LIVE_TEST)
    return pytester


def test_missing_peers_are_skipped_and_named_in_the_last_line(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINMO_REQUIRE_PEERS", raising=False)
    result = suite.runpytest_subprocess()
    assert result.ret == 0
    assert result.outlines[-1] == "SKIPPED 1 live tests: missing no-such-phone; run: sudo make peers"


def test_a_skip_is_a_failure_where_peers_are_required(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINMO_REQUIRE_PEERS", "1")
    result = suite.runpytest_subprocess()
    result.assert_outcomes(passed=1, errors=1)


# ---------------------------------------------------------------- make


@pytest.mark.parametrize("verb", ["demo", "serve", "test", "check", "bench", "peers"])
def test_make_knows_every_verb(verb: str) -> None:
    done = subprocess.run(["make", "--dry-run", verb], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
