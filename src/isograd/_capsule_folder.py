"""The folder of a run's capsules: each is put there whole or not at all, and the least interesting make room."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isograd._capsule import FACTS, FOLDER, Capsule, list_capsules
from isograd._runs import process_start

_PARTIAL = ".partial-"
"""What hidden folders begin with that are being written or removed: <host>-<pid>-<when it started>-<random digits>."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much the capsules of one run may take. `number`: how many; `bytes`: of all of them together."""

    number: int = 8
    bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.number < 1 or self.bytes < 1:
            raise ValueError("a run keeps at least 1 capsule of at least 1 byte")


def capsule_name(step: int, subject: str = "") -> str:
    """`step-000118`, or `step-000118-discriminator`."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "-" for c in subject).strip("-.")[:40]
    return f"step-{step:06d}" + (f"-{kept}" if kept else "")


def free_path(folder: Path, name: str, taken: frozenset[Path] = frozenset()) -> Path:
    """Where a capsule of that name can go: with -2, -3 … behind it if there is one, or it is in `taken`."""
    path, number = folder / name, 1
    while path in taken or os.path.lexists(path):
        number += 1
        path = folder / f"{name}-{number}"
    return path


def write_capsule(path: Path, facts: Mapping[str, Any], write_tensors: Callable[[Path], None]) -> None:
    """Put a capsule at `path`, where none may be; `write_tensors(folder)` writes its safetensors files.

    It is written beside, synchronized and renamed: whoever is killed meanwhile leaves a whole capsule or none. Raises
    OSError, or what `write_tensors` raises; then nothing is left behind.
    """
    path.parent.mkdir(exist_ok=True)  # a run's folder that somebody removed stays removed
    partial = _partial(path.parent)
    partial.mkdir()
    try:
        write_tensors(partial)
        text = json.dumps(facts, allow_nan=False, ensure_ascii=False, indent=1)
        (partial / FACTS).write_bytes(text.encode("utf-8", "backslashreplace"))
        for file in (*partial.iterdir(), partial):
            _synchronize(file)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _synchronize(path.parent)


def _partial(folder: Path) -> Path:
    host = "".join(c for c in platform.node() if c.isalnum())[:40] or "host"
    return folder / f"{_PARTIAL}{host}-{os.getpid()}-{process_start(os.getpid()) or 0}-{os.urandom(4).hex()}"


def _synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- what leaves ----------------------------------------------------------------------------------------------------


def prune(folder: Path, limits: Limits) -> list[Path]:
    """Remove capsules of the run at `folder` until the limits hold; what was removed, in this order.

    The oldest uninteresting ones go first. Interesting are the first of the run and the first of each kind of reason;
    the newest is what the run is about just now. Where those are too much, the oldest go first, and of them the first
    of the run last. The newest always stays.
    """
    capsules = sorted(list_capsules(folder), key=_age)
    number, size, removed = len(capsules), sum(capsule.bytes for capsule in capsules), []
    for capsule in _by_interest(capsules):
        if number <= limits.number and size <= limits.bytes:
            break
        if _remove(capsule.path):
            removed.append(capsule.path)
            number, size = number - 1, size - capsule.bytes
    return removed


def _age(capsule: Capsule) -> tuple[int, int, str]:
    with contextlib.suppress(OSError):
        return capsule.path.stat().st_mtime_ns, capsule.step, capsule.path.name
    return 0, capsule.step, capsule.path.name


def _by_interest(capsules: list[Capsule]) -> list[Capsule]:
    """Oldest first -> least interesting first, without the newest."""
    seen: set[str] = set()
    interesting: list[Capsule] = []
    others: list[Capsule] = []
    for capsule in capsules:
        (others if capsule.kinds <= seen else interesting).append(capsule)
        seen |= capsule.kinds
    return [c for c in (*others, *interesting[1:], *interesting[:1]) if c is not capsules[-1]]


def _remove(path: Path) -> bool:
    """Remove a capsule; whether it is gone. Killed meanwhile, it leaves no half of one."""
    try:
        partial = _partial(path.parent)
        path.rename(partial)
    except OSError:
        return False
    shutil.rmtree(partial, ignore_errors=True)
    return True


def sweep(root: Path) -> None:
    """Remove what writers that are gone have left half done in the runs below `root`. Raises nothing."""
    with contextlib.suppress(OSError):
        for run in root.iterdir():
            for partial in _partials(run / FOLDER):
                if not _is_alive(partial.name):
                    shutil.rmtree(partial, ignore_errors=True)


def _partials(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in folder.iterdir() if path.name.startswith(_PARTIAL) and not path.is_symlink()]
    return []


def _is_alive(name: str) -> bool:
    """Whether the process that named a partial folder may still be at work: it runs, or ran on another host."""
    try:
        host, pid, started, _ = name.removeprefix(_PARTIAL).split("-")
        if not _partial(Path()).name.startswith(f"{_PARTIAL}{host}-"):
            return True
        return process_start(int(pid)) == int(started) if int(started) else _answers(int(pid))
    except ValueError:
        return False


def _answers(pid: int) -> bool:
    """Whether there is a process with that number, where nobody knows when it started."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
