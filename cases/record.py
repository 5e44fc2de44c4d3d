"""Runs programs under `isograd run`, each in a process of its own that has PyTorch already. It judges nothing."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from catalog import Job

TIMEOUT = 300.0
"""Seconds after which a program is given up; the longest takes about ten on one core."""

PRELOADED = [
    "torch",
    "torch._dynamo",  # what the first optimizer of a process imports
    "isograd._cli",
    "isograd._launch",
    "isograd._progress",
    "isograd._recorded",
    "isograd._report",
    "isograd._watch",
    "isograd.frameworks.torch",
]


def record(jobs: Iterable[Job], root: Path, *, workers: int = 2) -> Iterator[tuple[Job, str]]:
    """Record every job below `root`, `workers` at a time; yields each with what went wrong, "" for nothing.

    What was recorded of a job before is removed. The programs are forked from a server that has imported PyTorch, which
    would take longer than most of them run; they see what `isograd run` shows them in a fresh interpreter.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda job: (job, _record(job, job.folder(root), context)), jobs)


def printed_verdict(folder: Path) -> bool | None:
    """Whether the program called itself repaired or healthy at its end; None when it did not come so far."""
    output = folder / "output.txt"
    found = re.findall(
        r"^(?:repaired|healthy): (yes|no) ", output.read_text() if output.is_file() else "", re.MULTILINE
    )
    return found[-1] == "yes" if found else None


def run_folder(folder: Path) -> Path | None:
    """The run that a job left; None when there is none."""
    return next(iter(sorted(path.parent for path in folder.glob("*/run.db") if path.parent.name != "seen")), None)


def _record(job: Job, folder: Path, context: multiprocessing.context.ForkServerContext) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.seen is not None:
        shutil.copytree(job.seen, folder / "seen")
    process = context.Process(target=_run, args=(job.options, str(job.case.script), job.arguments, str(folder)))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return f"took longer than {TIMEOUT:.0f} s"
    if process.exitcode or printed_verdict(folder) is None:
        return f"ended with status {process.exitcode}: {(folder / 'output.txt').read_text()[-300:]}"
    return "" if run_folder(folder) else "left no run"


def _run(options: list[str], script: str, arguments: list[str], folder: str) -> None:
    """The process of one program."""
    descriptor = os.open(Path(folder) / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in os.environ if name.startswith("ISOGRAD")]:
        del os.environ[name]
    os.chdir(folder)
    from isograd._cli import main

    sys.exit(main(["run", "--out", folder, *options, script, *arguments]))
