"""Fail when what git tracks outgrows what a clone should cost: tree 60 MiB, nano's weights 40 MiB, one file 15 MiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MIB = 1024 * 1024
ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = Path("minmo_runtime/checkpoints")
TREE_LIMIT_MIB, WEIGHTS_LIMIT_MIB, WEIGHT_FILE_LIMIT_MIB = 60, 40, 15


def tracked_sizes(root: Path) -> dict[Path, int]:
    """Bytes on disk of every tracked file that exists."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    paths = [Path(name) for name in listing.split("\0") if name]
    return {path: (root / path).stat().st_size for path in paths if (root / path).is_file()}


def size_faults(sizes: dict[Path, int]) -> list[str]:
    weights = {path: size for path, size in sizes.items() if path.is_relative_to(CHECKPOINTS)}
    faults = [
        f"{what}: {size / MIB:.1f} MiB, must be at most {limit}"
        for what, size, limit in (
            ("tracked tree", sum(sizes.values()), TREE_LIMIT_MIB),
            (f"{CHECKPOINTS}", sum(weights.values()), WEIGHTS_LIMIT_MIB),
        )
        if size > limit * MIB
    ]
    return faults + [
        f"{path}: {size / MIB:.1f} MiB, must be at most {WEIGHT_FILE_LIMIT_MIB}"
        for path, size in sorted(weights.items())
        if size > WEIGHT_FILE_LIMIT_MIB * MIB
    ]


def main() -> int:
    sizes = tracked_sizes(ROOT)
    faults = size_faults(sizes)
    for fault in faults:
        print(f"size: {fault}", file=sys.stderr)
    if not faults:
        print(f"size: {sum(sizes.values()) / MIB:.1f} MiB tracked in {len(sizes)} files")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
