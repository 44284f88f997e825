"""`minmo models`: the parents' public files on this machine: fetch, import from a folder, verify, list.

Each source (profiles/sources.toml) has a folder under the models folder, with the files we read and SHA256SUMS beside
them, in sha256sum's own format. Fetching is left to huggingface_hub or modelscope (optional): they show progress and go
on where a broken download stopped. Nothing is fetched or imported before its licence is accepted. A machine without
network imports what another one fetched, or any folder that holds the files.

Knows nothing of modules. Used by the command line, not in the walk.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minmo_runtime.profiles import (
    Source,
    models_folder,
    profile_folder,
    profile_names,
    read_profile,
    sources,
    sources_of,
)

SUMS = "SHA256SUMS"
HUBS = ("huggingface", "modelscope")
_ADVICE = "pip install 'minmo-agent[public]'"
_BLOCK = 1 << 20
Say = Callable[[str], None]


class ModelsError(Exception):
    """What could not be fetched, imported or verified; the message says what to do."""


@dataclass(frozen=True)
class SourceState:
    """One source on this machine."""

    source: Source
    folder: Path
    present: tuple[str, ...]
    missing: tuple[str, ...]  # as sources.toml names them; a pattern if no file matches it

    @property
    def text(self) -> str:
        if not self.missing:
            return "complete"
        return "absent" if not self.present else f"missing {', '.join(self.missing)}"


def wanted_sources(names: Iterable[str]) -> list[Source]:
    """Of profile names, source names, or "public" (what minmo-8b needs), each source once."""
    known, found = sources(), dict[str, Source]()
    for name in names:
        profile = "minmo-8b" if name == "public" else name
        if profile in known:
            found[profile] = known[profile]
        elif profile in profile_names():
            found |= {source.name: source for source in sources_of(read_profile(profile_folder(profile)))}
        else:
            allowed = ", ".join(("public", *profile_names(), *known))
            raise ModelsError(f"{name!r}: must be one of {allowed}")
    return list(found.values())


def overview(configured: str = "") -> dict[str, Any]:
    """Profiles with what each needs, sources with their state: what `minmo models list` shows."""
    folder = models_folder(configured)
    needs = {name: sources_of(read_profile(profile_folder(name))) for name in profile_names()}
    return {
        "folder": str(folder),
        "profiles": [{"name": name, "needs": [source.name for source in found]} for name, found in needs.items()],
        "sources": [
            {
                "name": source.name,
                "state": state_of(source, folder).text,
                "size_mb": source.size_mb,
                "licence": source.licence,
            }
            for source in sources().values()
        ],
    }


def state_of(source: Source, models: Path) -> SourceState:
    folder = models / source.name
    present, missing = [], []
    for pattern in source.files:
        names = _matching(folder, pattern)
        present += names
        if not names or (shards := _missing_shards(names)):
            missing += shards if names else [pattern]
    return SourceState(source, folder, tuple(present), tuple(missing))


def _matching(folder: Path, pattern: str) -> list[str]:
    if not folder.is_dir():
        return []
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def _missing_shards(names: list[str]) -> list[str]:
    """model-00001-of-00004: the names say how many there are."""
    found = [match for name in names if (match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name))]
    if not found:
        return []
    stem, _, total, suffix = found[0].groups()
    wanted = {f"{stem}{number:0{len(total)}d}-of-{total}{suffix}" for number in range(1, int(total) + 1)}
    return sorted(wanted - set(names))


# --------------------------------------------------------------------- licences


def licence_text(wanted: Iterable[Source]) -> str:
    lines = []
    for source in wanted:
        lines.append(f"{source.name} ({source.huggingface}): {source.licence}, about {source.size_mb} MB")
        if source.licence_note:
            lines.append(f"    {source.licence_note}")
    return "\n".join(lines)


def require_licences(wanted: list[Source], is_accepted: bool) -> None:
    if wanted and not is_accepted:
        raise ModelsError(f"licences:\n{licence_text(wanted)}\nread them, then run again with --accept-licence")


# ---------------------------------------------------------------- fetch, import


def fetch(
    wanted: list[Source], models: Path, *, hub: str = "huggingface", endpoint: str = "", is_accepted: bool, say: Say
) -> None:
    """Bring every file of these sources that is not here yet, then write and check their sums."""
    if hub not in HUBS:
        raise ModelsError(f"hub {hub!r}: must be {' or '.join(HUBS)}")
    require_licences(wanted, is_accepted)
    for source in wanted:
        if not state_of(source, models).missing:
            say(f"{source.name}: complete already")
            continue
        folder = models / source.name
        folder.mkdir(parents=True, exist_ok=True)
        say(f"{source.name}: fetching about {source.size_mb} MB from {hub} into {folder}")
        try:
            published = _from_huggingface(source, folder, endpoint) if hub == "huggingface" else None
            if hub == "modelscope":
                _from_modelscope(source, folder, endpoint)
        except ModelsError:
            raise
        except Exception as error:  # either library's own errors: no network, no such repository, disk full
            raise ModelsError(
                f"{source.name}: {type(error).__name__}: {error}; run again to go on from here"
            ) from error
        if missing := state_of(source, models).missing:
            raise ModelsError(f"{source.name}: the hub does not have {', '.join(missing)}")
        sums = write_sums(source, models)
        for name, expected in (published or {}).items():
            if sums.get(name, expected) != expected:
                raise ModelsError(
                    f"{folder / name}: sha256 is {sums[name]}, the hub says {expected}: delete it, fetch again"
                )
        say(f"{source.name}: {len(sums)} files, sums in {folder / SUMS}")


def _from_huggingface(source: Source, folder: Path, endpoint: str) -> dict[str, str]:
    """Returns the sums that the hub itself publishes (its large files)."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelsError(f"huggingface_hub is not installed: {_ADVICE}") from error
    address = endpoint or None
    huggingface_hub.snapshot_download(
        source.huggingface, local_dir=folder, allow_patterns=list(source.files), endpoint=address
    )
    names = state_of(source, folder.parent).present
    entries = huggingface_hub.HfApi(endpoint=address).get_paths_info(source.huggingface, list(names))
    large = ((entry.path, getattr(entry, "lfs", None)) for entry in entries)  # the hub hashes its large files only
    return {path: lfs.sha256 for path, lfs in large if lfs is not None}


def _from_modelscope(source: Source, folder: Path, endpoint: str) -> None:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelsError(f"modelscope is not installed: {_ADVICE}") from error
    options = {"endpoint": endpoint} if endpoint else {}
    snapshot_download(source.modelscope, local_dir=str(folder), allow_patterns=list(source.files), **options)


def import_folder(wanted: list[Source], given: Path, models: Path, *, is_accepted: bool, say: Say) -> None:
    """Copy files fetched elsewhere. `given` holds one folder per source, or, for a single source, its files."""
    require_licences(wanted, is_accepted)
    for source in wanted:
        origin = given / source.name if (given / source.name).is_dir() else given
        found = [name for pattern in source.files for name in _matching(origin, pattern)]
        lacking = [pattern for pattern in source.files if not _matching(origin, pattern)] + _missing_shards(found)
        if lacking:
            raise ModelsError(f"{origin}: has no {', '.join(lacking)} of {source.name}")
        if bad := _differing(origin, _read_sums(origin / SUMS)):
            raise ModelsError(f"{origin}: {', '.join(bad)} differ from {SUMS} there: broken on the way")
        for name in found:
            target = models / source.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")  # a copy that breaks off is never taken for whole
            shutil.copyfile(origin / name, partial)
            partial.replace(target)
        say(f"{source.name}: {len(write_sums(source, models))} files from {origin}")


# ------------------------------------------------------------------------- sums


def write_sums(source: Source, models: Path) -> dict[str, str]:
    state = state_of(source, models)
    sums = {name: file_sum(state.folder / name) for name in state.present}
    text = "".join(f"{value}  {name}\n" for name, value in sums.items())
    (state.folder / SUMS).write_text(text, encoding="utf-8")
    return sums


def verify(wanted: list[Source], models: Path) -> list[str]:
    """Everything that is not as it was when it came; empty = all is well."""
    problems = []
    for source in wanted:
        state = state_of(source, models)
        problems += [f"{state.folder}: {name} is not there" for name in state.missing]
        sums = _read_sums(state.folder / SUMS)
        if not sums and not state.missing:
            problems.append(f"{state.folder / SUMS}: not there; import the folder again")
        problems += [f"{state.folder / name}: differs from {SUMS}" for name in _differing(state.folder, sums)]
    return problems


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines() if "  " in line)
    return {name: value for value, name in rows}


def _differing(folder: Path, sums: dict[str, str]) -> list[str]:
    return [name for name, value in sums.items() if (folder / name).is_file() and file_sum(folder / name) != value]


def file_sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
