"""Give disk back: artifacts can be built again, checkpoints fetched or written again. Ledger and progress stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from labkit import host
from labkit._files import PARTIAL, Busy, locked
from labkit.types import LabkitError

KINDS = ("partial", "artifacts", "checkpoints")


def clean(kinds: tuple[str, ...] = ("partial", "artifacts"), *, dry: bool = False) -> list[tuple[Path, int]]:
    """Remove what is listed (`partial`: leftovers of interrupted work); returns (path, bytes) of each.

    What another process is building or fetching right now is left alone. `dry` only tells.
    """
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise LabkitError(f"Cannot clean {wrong[0]!r}; expected {', '.join(KINDS)}.")
    removed = []
    for folder, guard in _candidates(kinds):
        try:
            with locked(guard, wait=False):
                removed.append((folder, _bytes(folder)))
                if not dry:
                    shutil.rmtree(folder, ignore_errors=True)
        except Busy:
            continue
    return removed


def _candidates(kinds: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """(folder to remove, its lock) for the wanted kinds."""
    found: dict[Path, Path] = {}
    home = host.home()
    if "artifacts" in kinds:
        for folder in home.glob("artifacts/*/*"):
            if folder.is_dir() and not folder.name.startswith(PARTIAL):
                found[folder] = folder.parent / f".lock-{folder.name}"
    if "checkpoints" in kinds:
        for folder in home.glob("checkpoints/*"):
            if folder.is_dir() and not folder.name.startswith(PARTIAL):
                found[folder] = folder.parent / f".lock-{folder.name}"
    if "partial" in kinds:
        for folder in home.rglob(f"{PARTIAL}*"):
            if folder.is_dir() and not any(parent in found for parent in folder.parents):
                found[folder] = _lock_of(folder)
    return sorted(found.items())


def _lock_of(partial: Path) -> Path:
    """The lock whose holder writes `partial`: a .partial-NAME-PID beside NAME, or a download in its model's folder."""
    name = partial.name.removeprefix(PARTIAL).rpartition("-")[0]
    if name:
        return partial.parent / f".lock-{name.removesuffix('-old')}"
    return partial.parent.parent / f".lock-{partial.parent.name}"


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
