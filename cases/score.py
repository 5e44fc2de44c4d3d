"""Runs every program of `programs/` under isograd, scores what it says, and writes RESULTS.md and results.json.

python cases/score.py                      # seeds 0, 1 and 2, recorded anew
python cases/score.py --rescore            # what was recorded before, judged by the rules as they are now
python cases/score.py --seeds 0 --only vgg # some programs: their lines, no files
python cases/score.py --keras              # those of programs/keras/, into RESULTS-keras.md and results-keras.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tables
from baselines import BASELINES
from catalog import Case, Job, jobs_of, read_cases, read_keras_cases
from judge import Outcome, judge
from record import record
from scoreboard import baseline_score, calibration, given, score

HERE = Path(__file__).parent
ROOT = HERE / "runs"


def recorded(jobs: Sequence[Job], root: Path, workers: int) -> list[tuple[Job, str]]:
    """Record all jobs, with a line of progress; returns those that went wrong, with the reason."""
    problems = []
    for count, (job, problem) in enumerate(record(jobs, root, workers=workers), 1):
        if problem:
            problems.append((job, problem))
        if sys.stderr.isatty():
            print(f"\r{count}/{len(jobs)} {job.case.name[:40]:40s}", end="", file=sys.stderr, flush=True)
    return problems


def judged(jobs: Sequence[Job], root: Path, workers: int) -> list[Outcome]:
    """The outcome of every job that left a run, in the order of `jobs`."""
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(partial(judge, root=root), jobs, chunksize=4)
        return [outcome for outcome in found if outcome is not None]


def results(outcomes: Sequence[Outcome], cases: dict[str, Case]) -> dict[str, Any]:
    """What results.json holds."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    by_seed = {seed: [outcome for outcome in outcomes if outcome.seed == seed] for seed in seeds}
    scores = {"all": score(outcomes, cases)} | {str(seed): score(found, cases) for seed, found in by_seed.items()}
    entries = given(outcomes, cases)
    return {
        "schema": 1,
        "isograd": version("isograd"),
        **{name: version(name) for name in tables.frameworks(cases)},
        "machine": platform.machine(),
        "seeds": seeds,
        "score": {name: asdict(found) | {"rates": found.rates} for name, found in scores.items()},
        "baselines": {name: asdict(baseline_score(outcomes, name)) for name in BASELINES},
        "calibration": [asdict(row) for row in calibration(entries)],
        "given": [asdict(entry) for entry in entries],
        "runs": [asdict(outcome) | {"causes": [asdict(named) for named in outcome.causes]} for outcome in outcomes],
    }


def main() -> int:
    """Record, judge, print, write; 0, or 1 when a program did not run."""
    options = _options()
    every = read_keras_cases() if options.keras else read_cases()
    cases = {case.name: case for case in every if any(part in case.name for part in options.only)}
    if not cases:
        print(f"no program is called {' or '.join(options.only)}", file=sys.stderr)
        return 2
    jobs = jobs_of(tuple(cases.values()), options.seeds)
    start = time.perf_counter()
    problems = [] if options.rescore else recorded(jobs, options.root, options.workers)
    outcomes = judged(jobs, options.root, options.workers)
    print(tables.lines(outcomes, cases))
    print(tables.summary(outcomes, cases))
    for job, problem in problems:
        print(f"{job.case.name} ({job.variant}, seed {job.seed}) {problem}", file=sys.stderr)
    print(f"{len(outcomes)} of {len(jobs)} runs in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if len(outcomes) < len(jobs):
        missing = len(jobs) - len(outcomes)
        print(f"{missing} runs are missing: record them without --rescore", file=sys.stderr)
        return 1
    if options.only == [""]:
        _write(options.out, outcomes, cases, ending="-keras" if options.keras else "")
    return 1 if problems else 0


def _write(folder: Path, outcomes: Sequence[Outcome], cases: dict[str, Case], *, ending: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(results(outcomes, cases), indent=1, allow_nan=False) + "\n"
    (folder / f"results{ending}.json").write_text(content, encoding="utf-8")
    (folder / f"RESULTS{ending}.md").write_text(tables.document(outcomes, cases), encoding="utf-8")
    readme = HERE.parent / "README.md"
    if folder == HERE and not ending:
        text = readme.read_text(encoding="utf-8")
        readme.write_text(tables.replaced(text, tables.readme(outcomes, cases)), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keras", action="store_true", help="the Keras programs in place of the PyTorch programs")
    parser.add_argument("--seeds", type=_numbers, default=(0, 1, 2), metavar="0,1,2")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], metavar="PART,…")
    parser.add_argument("--rescore", action="store_true", help="judge what was recorded before")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--root", type=Path, help="where runs are kept (default: cases/runs, cases/runs/keras)")
    parser.add_argument("--out", type=Path, default=HERE, help="where the tables go (default: cases)")
    options = parser.parse_args()
    options.root = options.root or (ROOT / "keras" if options.keras else ROOT)
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
