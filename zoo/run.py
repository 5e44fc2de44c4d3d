"""Runs healthy programs under isograd and reports every false alarm: RESULTS.md and results.json beside this file.

python zoo/run.py                     # seeds 0 to 4; programs that are recorded and unchanged are only judged again
python zoo/run.py --fresh             # all of them recorded anew
python zoo/run.py --only gan --seeds 0 # some programs: their lines, no files
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from recording import HERE, Job, Recorded, jobs, record, recorded, run_folder
from scipy.stats import beta

ROOT = HERE / "isograd-runs"
ALARMS = ("warning", "error")


@dataclass(frozen=True)
class Alarm:
    """One cause at warning or above in a program that has none."""

    cause: str
    level: str
    subject: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """What became of one program under one seed."""

    command: str
    seed: int
    metric: str
    value: float
    trained: bool
    steps: int
    seconds: float
    alarms: tuple[Alarm, ...]


def upper_bound(events: int, trials: int, *, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper bound on a probability after `events` in `trials` independent trials.

    The largest p at which so few events have a probability of at least 1 - `confidence`. C. J. Clopper, E. S. Pearson,
    "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934).
    """
    return 1.0 if events >= trials else float(beta.ppf(confidence, events + 1, trials - events))


def judge(job: Job, ended: Recorded, root: Path) -> Outcome:
    """The outcome of a recorded job by the rules as they are now."""
    import isograd

    folder = run_folder(job, root)
    diagnosis = None if folder is None else isograd.diagnose(folder)
    found = () if diagnosis is None else diagnosis.at_least("warning")
    findings = [cause.finding for cause in found]
    return Outcome(
        command=job.command,
        seed=job.seed,
        metric=ended.metric,
        value=ended.value,
        trained=ended.status == 0 and ended.metric == job.goal.metric and job.goal.reached(ended.value),
        steps=0 if diagnosis is None else diagnosis.steps,
        seconds=ended.seconds,
        alarms=tuple(Alarm(f.name, f.level, f.subject, f.message) for f in findings),
    )


def outcomes(wanted: Sequence[Job], root: Path, *, workers: int, fresh: bool) -> list[Outcome]:
    """Record what is not recorded yet, with a line of progress, and judge all."""
    missing = [job for job in wanted if fresh or recorded(job, root) is None]
    for count, (job, ended) in enumerate(record(missing, root, workers=workers), 1):
        line = f"{count}/{len(missing)}  {job.command} seed {job.seed}: {ended.metric} {ended.value:.4g}"
        print(line, f"({ended.seconds:.0f} s)", file=sys.stderr, flush=True)
    ended = [recorded(job, root) for job in wanted]
    assert None not in ended
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(partial(judge, root=root), wanted, ended, chunksize=8))


def summary(rows: Iterable[Outcome]) -> dict[str, float]:
    """Counts and bounds over runs, and over programs, which are independent of each other where seeds are not."""
    rows = list(rows)
    programs = {row.command for row in rows}
    flagged = {row.command for row in rows if row.alarms}
    runs = sum(bool(row.alarms) for row in rows)
    return {
        "programs": len(programs),
        "runs": len(rows),
        "trained": sum(row.trained for row in rows),
        "runs_with_warning": runs,
        "runs_with_error": sum(any(alarm.level == "error" for alarm in row.alarms) for row in rows),
        "share_of_runs": runs / len(rows),
        "upper_bound_of_runs": upper_bound(runs, len(rows)),
        "programs_with_warning": len(flagged),
        "upper_bound_of_programs": upper_bound(len(flagged), len(programs)),
    }


def report(rows: Sequence[Outcome]) -> str:
    """RESULTS.md: the summary, every alarm with its message, and a line for each program."""
    return "\n".join([*_head(summary(rows)), *_alarms(rows), *_programs(rows), ""])


def _head(found: dict[str, float]) -> list[str]:
    return [
        "# Healthy programs",
        "",
        "What isograd says of programs that train well; `make zoo` writes this page. A false alarm is a cause at",
        "warning or error. Bounds are Clopper and Pearson's, one-sided, 95 %.",
        "",
        "| | |",
        "|---|---|",
        f"| programs x seeds | {found['programs']} programs, {found['runs']} runs |",
        f"| reached their goal | {found['trained']} of {found['runs']} |",
        (
            f"| runs with a warning or error | {found['runs_with_warning']} ({found['share_of_runs']:.1%}; "
            f"at most {found['upper_bound_of_runs']:.1%}) |"
        ),
        f"| runs with an error | {found['runs_with_error']} |",
        (
            f"| programs with a warning or error under any seed | {found['programs_with_warning']} "
            f"(at most {found['upper_bound_of_programs']:.1%}) |"
        ),
        "",
    ]


def _alarms(rows: Sequence[Outcome]) -> list[str]:
    lines = [
        f"- `{row.command}` seed {row.seed}: **{alarm.cause}** ({alarm.level}, {alarm.subject}). {alarm.message}"
        for row in rows
        for alarm in row.alarms
    ]
    return ["## False alarms", "", *(lines or ["None."]), ""]


def _programs(rows: Sequence[Outcome]) -> list[str]:
    lines = [
        "## Programs",
        "",
        "| program | steps | seconds | metric | over seeds | flagged |",
        "|---|--:|--:|---|---|--:|",
    ]
    for command, group in groupby(rows, key=lambda row: row.command):
        runs = list(group)
        seconds = sorted(row.seconds for row in runs)[len(runs) // 2]
        values = ", ".join(f"{row.value:.3g}" + ("" if row.trained else " (short of its goal)") for row in runs)
        flagged = sum(bool(row.alarms) for row in runs)
        lines.append(
            f"| `{command}` | {runs[0].steps} | {seconds:.0f} | {runs[0].metric} | {values} | {flagged or ''} |"
        )
    return lines


def write(rows: Sequence[Outcome], folder: Path = HERE) -> None:
    """Write RESULTS.md and results.json."""
    (folder / "RESULTS.md").write_text(report(rows), encoding="utf-8")
    machine = {"python": platform.python_version(), "torch": version("torch"), "isograd": version("isograd")}
    content = {"versions": machine, "summary": summary(rows), "outcomes": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Record, judge, print, and write when everything was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--only", default="", help="programs whose command line contains this")
    parser.add_argument("--fresh", action="store_true", help="record anew what is recorded")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    wanted = jobs([int(seed) for seed in args.seeds.split(",")], args.only)
    if not wanted:
        parser.error(f"no program's command line contains {args.only!r}")
    rows = outcomes(wanted, ROOT, workers=args.workers, fresh=args.fresh)
    print(report(rows))
    if not args.only and args.seeds == parser.get_default("seeds"):
        write(rows)


if __name__ == "__main__":
    main()
