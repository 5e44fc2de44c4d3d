"""Run the user's program again, unchanged, in a process of its own, with and without a treatment.

A trial is data and `run_trial` a plain function of it, so any `concurrent.futures.Executor` can run trials; the local
one is a pool of threads, each waiting for one process. Processes are forked from a server that has imported the
framework once, where the platform has that: starting one takes milliseconds instead of seconds.

The program runs where the user runs it: what it writes (checkpoints, logs), every trial writes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from isograd._changes import Change
from isograd._diagnose import Diagnosis
from isograd._recorded import diagnose_run
from isograd._rule import Options
from isograd._runs import list_runs, read_run
from isograd._verify import Arm


@dataclass(frozen=True, kw_only=True)
class Program:
    """A script with its arguments, or a module with `module`."""

    args: tuple[str, ...]
    module: bool = False


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a program.

    `seed`: 0 is the program as it is; others are added to every seed that it sets. `steps`: end it after so many
    optimizer steps. `seconds`, `memory`: limits, in s of wall time and in bytes of its processes together. `threads`:
    of the framework. `subject`: whose loss is compared, the first one where it is None. `keep`: the folder of runs to
    put its run into; it leaves nothing behind where that is None.
    """

    program: Program
    changes: tuple[Change, ...] = ()
    seed: int = 0
    steps: int | None = None
    seconds: float = 3600.0
    memory: int | None = None
    threads: int = 1
    subject: str | None = None
    keep: Path | None = None


def run_trial(trial: Trial, options: Options | None = None) -> Arm:
    """Run it, wait for it, and judge what it recorded. A run that a limit cut short says so in `error`.

    Never raises because of what the program does. `options`: of rules, as `diagnose` takes them. `end_trials` ends it
    early.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="isograd-trial-") as folder:
        out = Path(folder)
        error = _run_in_process(trial, out)
        arm = _judged(trial, out, options or {}, error)
        if trial.keep is not None and arm.steps:
            arm = _kept(arm, out / arm.diagnosis.run, trial.keep)
    return replace(arm, seconds=time.perf_counter() - began)


def _judged(trial: Trial, out: Path, options: Options, error: str) -> Arm:
    runs = [run for run in list_runs(out) if run.steps]
    if not runs or (out / _REFUSED).exists():
        return Arm(
            seed=trial.seed,
            losses=np.empty(0),
            diagnosis=Diagnosis(run="", subjects=(), steps=0),
            error=error or "it took no optimizer step",
            refused=(out / _REFUSED).exists(),
        )
    run = read_run(runs[-1].path)
    diagnosis = diagnose_run(run, options)
    history = next((h for h in run.histories if h.subject == trial.subject), run.histories[0])
    if trial.steps is not None and history.num_steps >= trial.steps:
        error = ""  # whatever the program did after it: its workers have ended, it may still wait for their answers
    return Arm.of(history, diagnosis, seed=trial.seed, error=error)


def _kept(arm: Arm, run: Path, root: Path) -> Arm:
    """Move a run into the folder of runs, where it appears whole or not at all."""
    partial = root / f".{run.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run, partial)
        partial.rename(root / run.name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        # copytree raises a list of what failed with it.
        whys = [args[2] for args in error.args[0]] if isinstance(error, shutil.Error) else [error.strerror]
        return replace(arm, unkept=f"{root} cannot be written ({whys[0] or error})")
    return replace(arm, folder=(root / run.name).absolute())


# ---- the process ------------------------------------------------------------------------------------------------

_REFUSED = "refused"
"""A file in the folder of a trial whose program has no place for the treatment."""

_under_way: set[threading.Event] = set()
"""One for each trial that this process waits for; set, it ends that trial."""


def end_trials() -> None:
    """End the trials that this process waits for now, with their children, as at a limit."""
    for interrupted in tuple(_under_way):
        interrupted.set()


def _run_in_process(trial: Trial, out: Path) -> str:
    """What ended it before its time, in words; "" for a program that ended well."""
    interrupted = threading.Event()
    _under_way.add(interrupted)
    process, why = process_context().Process(target=_child, args=(trial, out), daemon=False), ""
    try:
        process.start()
        limit = time.monotonic() + trial.seconds
        while process.is_alive() and not why:
            process.join(0.05)
            if interrupted.is_set():
                why = "it was interrupted"
            elif time.monotonic() > limit:
                why = f"it was ended at the time limit of {trial.seconds:.0f} s"
            elif trial.memory is not None and resident_memory(process.pid) > trial.memory:
                why = f"it was ended at the memory limit of {trial.memory / 2**20:.0f} MiB"
    finally:
        _under_way.discard(interrupted)
        if process.is_alive():
            end_process(process)
    process.join()
    if why or process.exitcode == 0:
        return why
    return last_words(out) or f"it ended with status {process.exitcode}"


def end_process(process: Any) -> None:
    """The process and everything that it started: it leads a group of its own."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(process.pid, number)
        process.join(1.0)
    if process.is_alive():
        process.kill()


def process_context() -> Any:
    """What starts processes for programs: a server that has imported isograd and forks, where there can be one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    ours = ("_trial", "_launch", "_watch", "_progress", "_recorded", "frameworks.torch", "frameworks.torch._ahead")
    context.set_forkserver_preload([f"isograd.{name}" for name in ours])
    return context


def be_alone(out: Path) -> None:
    """In a new process: lead a group, be silent but for the file `log` in `out`."""
    with contextlib.suppress(OSError, AttributeError):
        os.setsid()
    log = os.open(out / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - for as long as the process lives
    multiprocessing.set_start_method(None, force=True)  # the program's own processes start as they always do


def _child(trial: Trial, out: Path) -> None:
    """In the new process: lead a group, be silent, train as asked."""
    from isograd._launch import launch
    from isograd.frameworks import set_threads

    be_alone(out)
    set_threads(trial.threads)
    result = launch(
        list(trial.program.args),
        module=trial.program.module,
        steps=trial.steps,
        out=out,
        changes=trial.changes,
        seed_shift=trial.seed,
    )
    if result.note:
        print(result.note, file=sys.stderr)
    if result.refused:
        (out / _REFUSED).touch()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result.status)


def last_words(out: Path) -> str:
    """The last line that the program wrote, which of a traceback is the exception."""
    with contextlib.suppress(OSError):
        lines = (out / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""
    return ""


def resident_memory(leader: int) -> int:
    """Bytes of memory that a process and its group hold; 0 where the platform does not tell."""
    total, page = 0, _page_size()
    for entry in Path("/proc").glob("[0-9]*") if page else ():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader or int(entry.name) == leader:
                total += int((entry / "statm").read_text().split()[1]) * page
    return total


def _page_size() -> int:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE")
    return 0


def available_memory() -> int | None:
    """Bytes of memory that this machine could still give; None where the platform does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
