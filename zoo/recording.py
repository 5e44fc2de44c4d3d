"""Runs the healthy programs under `isograd run`, each in a process of its own, and keeps what they left."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import operator
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"

TIMEOUT = 300.0
"""Seconds after which a program is given up; the longest takes about fifteen on one core."""

PRELOADED = [
    "torch",
    "torch._dynamo",  # what the first optimizer of a process imports
    "sklearn.datasets",
    "isograd._cli",
    "isograd._launch",
    "isograd._progress",
    "isograd._recorded",
    "isograd._report",
    "isograd._watch",
    "isograd.frameworks.torch",
]

COMPARISONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Goal:
    """What a program must reach to count as trained, such as "accuracy >= 0.9"."""

    metric: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """Read a goal; ValueError for anything but a name, `>=` or `<=`, and a number."""
        found = re.fullmatch(r"(\S.*\S) (>=|<=) (\S+)", text)
        if found is None:
            raise ValueError(f"a goal reads like 'accuracy >= 0.9', not like {text!r}")
        return cls(found[1], found[2], float(found[3]))

    def reached(self, value: float) -> bool:
        """Whether `value` is as good as the goal or better; NaN never is."""
        return bool(COMPARISONS[self.comparison](value, self.limit))


@dataclass(frozen=True)
class Job:
    """One program, its arguments and one seed."""

    command: str
    seed: int
    goal: Goal

    @property
    def script(self) -> Path:
        return PROGRAMS / self.command.split()[0]

    @property
    def arguments(self) -> list[str]:
        return [*shlex.split(self.command)[1:], "--seed", str(self.seed)]

    def folder(self, root: Path) -> Path:
        name = re.sub(r"[^a-z0-9.]+", "-", self.command.replace(".py", "").lower()).strip("-")
        return root / name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Recorded:
    """How a program ended: its status, its last metric, wall seconds, and the digest of its text."""

    status: int
    metric: str
    value: float
    seconds: float
    digest: str


def read_goals(path: Path = HERE / "goals.toml") -> dict[str, Goal]:
    """Every command line below `programs/` and its goal, in the file's order."""
    return {command: Goal.parse(goal) for command, goal in tomllib.loads(path.read_text(encoding="utf-8")).items()}


def jobs(seeds: Iterable[int], only: str = "") -> list[Job]:
    """The jobs whose command line contains `only`, one per program and seed."""
    return [Job(command, seed, goal) for command, goal in read_goals().items() for seed in seeds if only in command]


def digest(job: Job) -> str:
    """What a record depends on: the program's text and arguments."""
    return hashlib.sha256(job.script.read_bytes() + " ".join(job.arguments).encode()).hexdigest()[:16]


def recorded(job: Job, root: Path) -> Recorded | None:
    """What was recorded of `job`; None where nothing was, or the program has changed since."""
    path = job.folder(root) / "recorded.json"
    found = Recorded(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    return found if found is not None and found.digest == digest(job) else None


def run_folder(job: Job, root: Path) -> Path | None:
    """The run folder that `job` left; None when there is none."""
    return next((path.parent for path in sorted(job.folder(root).glob("*/run.db"))), None)


def record(
    wanted: Iterable[Job], root: Path, *, workers: int = 2, options: Sequence[str] = ()
) -> Iterator[tuple[Job, Recorded]]:
    """Record every job below `root`, `workers` at a time, in the order given; earlier records of it are removed.
    `options`: of `isograd run`, beside those that say where.

    The programs are forked from a server that has imported PyTorch, which would take longer than most of them run.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda job: (job, _record(job, root, context, options)), wanted)


def _record(job: Job, root: Path, context: ForkServerContext, options: Sequence[str]) -> Recorded:
    folder = job.folder(root)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    process = context.Process(target=_run, args=(str(job.script), job.arguments, str(folder), list(options)))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    metric, value = last_metric((folder / "output.txt").read_text(encoding="utf-8"))
    ended = Recorded(process.exitcode or 0, metric, value, round(time.monotonic() - start, 1), digest(job))
    (folder / "recorded.json").write_text(json.dumps(asdict(ended)) + "\n", encoding="utf-8")
    return ended


def last_metric(output: str) -> tuple[str, float]:
    """Name and value of the last line "name: number" in what a program printed; ("", NaN) without one."""
    found = re.findall(r"^([a-zA-Z][^:\n]*): (\S+)$", output, re.MULTILINE)
    return (found[-1][0], float(found[-1][1])) if found else ("", float("nan"))


def _run(script: str, arguments: list[str], folder: str, options: list[str]) -> None:
    """The process of one program: what it prints goes to output.txt, what isograd says to verdict.txt."""
    for descriptor, name in ((1, "output.txt"), (2, "verdict.txt")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    for name in [name for name in os.environ if name.startswith("ISOGRAD")]:
        del os.environ[name]
    os.chdir(folder)
    from isograd._cli import main

    sys.exit(main(["run", "--out", folder, *options, script, *arguments]))
