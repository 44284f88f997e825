"""The rules of the tree, held by a machine: islands, layers, no cycles, sizes, imports at the top, packages listed."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ISLANDS = ("telephony", "minmo_runtime", "policies", "storage")
PACKAGES = (*ISLANDS, "agent")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80

# Each heavy library lives in one place only.
HOME_OF = {
    "pjsua2": ("telephony/sip/",),
    "aiortc": ("telephony/webrtc/",),
    "webrtcvad": ("telephony/", "minmo_runtime/training/"),  # stage 4 hears calls through the gate of the leg
    "av": ("telephony/",),
    "torch": ("minmo_runtime/",),
    "safetensors": ("minmo_runtime/",),
    "tokenizers": ("minmo_runtime/",),
    "sqlalchemy": ("storage/",),
    "fastapi": ("agent/supervisor/",),
    "uvicorn": ("agent/supervisor/",),
}

# Function-local imports that are allowed, each with its reason.
LOCAL_IMPORTS = {
    "agent/__main__.py": "a command loads only what it needs: `minmo db` must not wait for torch",
    "agent/commands/access.py": "as __main__",
    "agent/commands/campaign.py": "as __main__",
    "agent/commands/db.py": "as __main__",
    "agent/commands/models.py": "as __main__",
    "agent/doctor.py": "says that torch is missing instead of failing on it",
    "minmo_runtime/models.py": "huggingface_hub and modelscope are optional",
    "minmo_runtime/prompt_voice.py": "onnxruntime is optional",
    "minmo_runtime/spoken_numbers.py": "num2words is optional: nano's voice reads its own text",
    "minmo_runtime/server.py": "the fake runtime is served without torch",
    "minmo_runtime/training/vocoder.py": "espeak-ng is there at training time only",
    "telephony/media_worker.py": "FFmpeg is loaded only for an apology at another rate",
}

# Where an import name is not the distribution's name.
DISTRIBUTION_OF = {
    "multipart": "python-multipart",
    "pjsua2": "pjsua2-python",
    "pydantic": "fastapi",
    "starlette": "fastapi",
    "webrtcvad": "webrtcvad-wheels",
}

# Declared without an import, each with its reason.
NEVER_IMPORTED = {
    "mypy": "run by make check",
    "psycopg": "SQLAlchemy loads it by the database's address",
    "pytest-asyncio": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "python-multipart": "FastAPI reads the login form with it",
    "ruff": "run by make check",
}


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported_names(tree: ast.AST) -> set[str]:
    """Every module an import statement names; `from a import b` gives a and a.b (b may be a module)."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def local_imports(tree: ast.Module) -> list[int]:
    """Lines of import statements inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return sorted(
        {node.lineno for f in functions for node in ast.walk(f) if isinstance(node, (ast.Import, ast.ImportFrom))}
    )


def top(name: str) -> str:
    return name.split(".", 1)[0]


def test_there_is_something_to_check() -> None:
    assert len(source_files()) > 30


@pytest.mark.parametrize("island", ISLANDS)
def test_islands_never_import_each_other_nor_the_agent(island: str) -> None:
    faults = [
        f"{relative(path)} imports {name}"
        for path in (ROOT / island).rglob("*.py")
        for name in sorted(imported_names(tree_of(path)))
        if top(name) in PACKAGES and top(name) != island
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "contract", ["telephony/leg.py", "minmo_runtime/api.py", "policies/facts.py", "policies/decisions.py"]
)
def test_contracts_import_nothing_of_ours(contract: str) -> None:
    ours = {name for name in imported_names(tree_of(ROOT / contract)) if top(name) in PACKAGES}
    assert not ours


def test_a_heavy_library_lives_in_one_place() -> None:
    faults = [
        f"{relative(path)} imports {library}, which belongs to {' '.join(homes)}"
        for path in source_files()
        for library, homes in HOME_OF.items()
        if library in {top(name) for name in imported_names(tree_of(path))} and not relative(path).startswith(homes)
    ]
    assert not faults, "\n".join(faults)


def test_nothing_installed_imports_the_tests() -> None:
    assert not [relative(p) for p in source_files() if "tests" in {top(n) for n in imported_names(tree_of(p))}]


def test_no_import_is_relative() -> None:
    faults = [
        f"{relative(path)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not faults


def test_there_are_no_import_cycles() -> None:
    modules = {module_name(path): path for path in source_files()}
    graph = {name: (imported_names(tree_of(path)) & modules.keys()) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_stand_at_the_top_of_the_file() -> None:
    faults = [
        f"{relative(path)}:{line}"
        for path in source_files()
        if relative(path) not in LOCAL_IMPORTS
        for line in local_imports(tree_of(path))
    ]
    assert not faults, "a local import hides a cycle or a heavy dependency: " + ", ".join(faults)


def test_every_allowed_local_import_is_still_needed() -> None:
    assert not [name for name in LOCAL_IMPORTS if not local_imports(tree_of(ROOT / name))]


def test_no_file_outgrows_its_reader() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_no_function_outgrows_a_screen() -> None:
    lengths = {
        f"{relative(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in source_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}


def test_every_module_says_what_it_is() -> None:
    silent = [
        relative(p)
        for p in source_files()
        if p.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree_of(p))
    ]
    assert not silent


def test_every_package_is_listed_and_no_other() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    present = {module_name(path) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")}
    assert sorted(listed) == sorted(present)


def test_every_dependency_is_declared_and_exact() -> None:
    project = pyproject()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = [requirement for group in groups for requirement in group]
    assert not [requirement for requirement in declared if "==" not in requirement]
    names = {requirement.split("==")[0].split("[")[0].lower().replace("_", "-") for requirement in declared}
    imported = distributions_imported_by(source_files())
    assert not imported - names, "imported, not declared"
    tested = distributions_imported_by(sorted((ROOT / "tests").rglob("*.py")))
    assert not names - imported - tested - set(NEVER_IMPORTED), "declared, never imported"


def distributions_imported_by(paths: list[Path]) -> set[str]:
    ours = {*sys.stdlib_module_names, *PACKAGES, "tests"}
    modules = {top(name) for path in paths for name in imported_names(tree_of(path))} - ours
    return {DISTRIBUTION_OF.get(name, name).lower().replace("_", "-") for name in modules}


def test_policies_pull_in_no_heavy_library() -> None:
    allowed = set(sys.stdlib_module_names) | {"msgspec", "policies"}
    imported = {top(name) for path in (ROOT / "policies").rglob("*.py") for name in imported_names(tree_of(path))}
    assert imported <= allowed


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_readme_tree_names_every_file() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree", 1)[1].split("## The walk", 1)[0]
    named = set(re.findall(r"[a-z_0-9]+", tree))
    assert not [relative(path) for path in source_files() if path.stem not in named and path.stem != "__init__"]
