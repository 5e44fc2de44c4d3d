"""Runs programs under `isograd run`, each in a process of its own. It judges nothing."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from catalog import Job

TIMEOUT = 300.0
"""Seconds after which a program is given up; the longest takes about ten on one core, twenty with Keras."""

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

KERAS_SETTINGS = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
"""One thread, as OMP_NUM_THREADS has it for PyTorch, and no start-up messages in what the program printed."""


def record(jobs: Iterable[Job], root: Path, *, workers: int = 2) -> Iterator[tuple[Job, str]]:
    """Record every job below `root`, `workers` at a time; yields each with what went wrong, "" for nothing.

    What was recorded of a job before is removed. PyTorch programs are forked from a server that has imported PyTorch,
    which would take longer than most of them run; they see what `isograd run` shows them in a fresh interpreter. Keras
    reads its backend when it is imported: its programs get a fresh one.
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
    command = ["run", "--out", str(folder), *job.options, str(job.case.script), *job.arguments]
    status = _started(command, folder, job.case.backend) if job.case.backend else _forked(command, folder, context)
    if status is None:
        return f"took longer than {TIMEOUT:.0f} s"
    if status or printed_verdict(folder) is None:
        return f"ended with status {status}: {(folder / 'output.txt').read_text()[-300:]}"
    return "" if run_folder(folder) else "left no run"


def _started(command: list[str], folder: Path, backend: str) -> int | None:
    """The exit status of `isograd` with `command` in a fresh interpreter; None when it took too long."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("ISOGRAD")}
    settings |= KERAS_SETTINGS | {"KERAS_BACKEND": backend}
    with (folder / "output.txt").open("w") as output:
        try:
            return subprocess.run(
                [sys.executable, "-m", "isograd", *command],
                stdout=output, stderr=output, cwd=folder, env=settings, timeout=TIMEOUT, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return None


def _forked(command: list[str], folder: Path, context: multiprocessing.context.ForkServerContext) -> int | None:
    """The same in a process that has PyTorch already."""
    process = context.Process(target=_run, args=(command, str(folder)))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _run(command: list[str], folder: str) -> None:
    """The process of one program."""
    descriptor = os.open(Path(folder) / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in os.environ if name.startswith("ISOGRAD")]:
        del os.environ[name]
    os.chdir(folder)
    from isograd._cli import main

    sys.exit(main(command))
