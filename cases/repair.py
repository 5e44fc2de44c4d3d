"""Lets `isograd fix` treat every faulty program of `programs/`; writes REPAIRS.md and repairs.json beside this file.

python cases/repair.py                    # every program; what is recommended is applied with seeds 0, 1 and 2
python cases/repair.py --only vgg,relu    # some programs; the others' results stay
python cases/repair.py --report           # REPAIRS.md written anew from repairs.json

A program is repaired by a treatment where it says so itself at its end, untouched but for `isograd run --apply`, with
every seed. Beside the recommended treatment stand, with the same seeds: a remedy of the catalogue drawn at random, the
learning rate divided by ten, and gradients clipped to a global norm of 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from catalog import Case, Job, read_cases
from numpy.random import default_rng
from record import printed_verdict, record, run_folder

from isograd._errors import IsogradError
from isograd._recorded import diagnose_run
from isograd._runs import read_run
from isograd._treat import every_treatment, treat

HERE = Path(__file__).parent
ROOT = HERE / "runs" / "repairs"
RESULTS = HERE / "repairs.json"
RATE, CLIP = "lower-learning-rate:factor=0.1", "clip-gradient-norm:max_norm=1.0"
ARMS = ("recommended", "random", "rate", "clip")
LABELS = {
    "recommended": "`isograd fix`",
    "random": "a remedy at random",
    "rate": "the learning rate divided by ten",
    "clip": "clip at 1.0",
}


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What became of one program.

    `treatments`: of each arm with each seed what `--apply` was given; `repaired`: whether the program then called
    itself so. `ratio`: seconds of the search over those of the untreated run in it.
    """

    case: str
    status: int
    causes: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    outcome: str = ""
    tried: int = 0
    seconds: float = 0.0
    ratio: float = 0.0
    treatments: dict[str, list[list[str]]] = field(default_factory=dict)
    repaired: dict[str, list[bool]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Treated(Job):
    """A job whose program is treated."""

    arm: str
    treatment: tuple[str, ...]

    @property
    def seen(self) -> Path:
        """What `--apply` knows the program from."""
        return recorded_run(self.case)

    @property
    def options(self) -> list[str]:
        """What `isograd run` is given before the script."""
        return [part for text in self.treatment for part in ("--apply", text)]

    def folder(self, root: Path) -> Path:
        """Where its run is kept."""
        return root / self.arm / super().folder(root).relative_to(root)


def fixed(case: Case, *, jobs: int) -> tuple[int, dict[str, Any], float]:
    """`isograd fix --json` of a program: its status, what it printed, its seconds."""
    command = [sys.executable, "-m", "isograd", "fix", "--json", "--jobs", str(jobs), str(case.script)]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=1800, check=False)
    found = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip().splitlines()[-1][-120:]}
    return done.returncode, found, time.perf_counter() - began


def recommended(found: dict[str, Any]) -> tuple[str, ...]:
    """What `--apply` takes, once for each remedy; empty where nothing is recommended."""
    best = found.get("best")
    if best is None:
        return ()
    text = found["trials"][best]["treatment"]
    return (text,) if isinstance(text, str) else tuple(text)


def recorded_run(case: Case) -> Path:
    """The untreated run of the program with seed 0 that `make cases` left. Raises ValueError where there is none."""
    found = run_folder(Job(case=case, variant="faulty", seed=0).folder(HERE / "runs"))
    if found is None:
        raise ValueError(f"there is no recorded run of {case.name}: run `make cases` first")
    return found


def applicable(case: Case) -> list[tuple[str, ...]]:
    """Every treatment of the catalogue in its default form that the program has a place for."""
    diagnosis = diagnose_run(read_run(recorded_run(case)), {})
    options = [*treat(diagnosis), *every_treatment(diagnosis.histories[0])]
    return list({t.texts: t.texts for t in options if t.changes and t.applicability == "automatic"})


def jobs_of(case: Case, best: tuple[str, ...], seeds: Sequence[int]) -> list[Treated]:
    """The treated runs of a program: what is recommended, and what it is compared with, with every seed."""
    pool = applicable(case)
    chosen = default_rng(list(case.name.encode())).integers(len(pool))
    others = {"random": pool[chosen], "rate": (RATE,), "clip": (CLIP,)}
    arms = {"recommended": best, **others} if best else others
    return [
        Treated(case=case, variant="faulty", seed=seed, arm=arm, treatment=treatment)
        for arm, treatment in arms.items()
        for seed in seeds
    ]


def repair(case: Case, seeds: Sequence[int], *, jobs: int) -> Repair:
    """Search for a treatment, apply it and what it is compared with, and ask the program each time."""
    status, found, _ = fixed(case, jobs=jobs)
    best = recommended(found)
    treated = jobs_of(case, best, seeds)
    problems = dict(record(treated, ROOT, workers=jobs))
    verdicts = {job: not problems[job] and bool(printed_verdict(job.folder(ROOT))) for job in treated}
    baseline = found.get("baseline", {})
    return Repair(
        case=case.name,
        status=status,
        causes=tuple(cause["cause"] for cause in baseline.get("causes", ())),
        confirmed=tuple(baseline.get("confirmed", ())),
        outcome=found["trials"][found["best"]]["outcome"] if best else found.get("error", "nothing"),
        tried=len(found.get("trials", ())),
        seconds=found.get("seconds", 0.0),
        ratio=found.get("seconds", 0.0) / max(found.get("baseline_seconds", 0.0), 1e-9),
        treatments={arm: [list(job.treatment) for job in treated if job.arm == arm] for arm in ARMS},
        repaired={arm: [verdicts[job] for job in treated if job.arm == arm] for arm in ARMS},
    )


# ---- the report ---------------------------------------------------------------------------------------------------

Healthy = Sequence[tuple[str, int, float]]
"""Name, exit status and seconds of the search in each healthy program."""


def is_repaired(one: Repair, arm: str) -> bool:
    """Whether an arm repaired the program with every seed that was tried."""
    return bool(one.repaired[arm]) and all(one.repaired[arm])


def line(one: Repair) -> str:
    """One program for the terminal."""
    marks = " ".join(f"{arm} {sum(one.repaired[arm])}/{len(one.repaired[arm])}" for arm in ARMS)
    return f"{one.case:38s} {one.outcome[:12]:12s} {_recommended(one):60s} {marks} x{one.ratio:.1f}"


def document(repairs: Sequence[Repair], healthy: Healthy, why: Mapping[str, str]) -> str:
    """REPAIRS.md. `why`: of each program, why nothing but another source can repair it; "" where a change may."""
    reachable = [one for one in repairs if not why[one.case] or any(is_repaired(one, arm) for arm in ARMS)]
    recommended = [one for one in repairs if one.treatments["recommended"]]
    failed = [one for one in recommended if not is_repaired(one, "recommended")]
    wrong = [one.case for one in failed if not any(one.repaired["recommended"])]
    partly = [one.case for one in failed if one.case not in wrong]
    ratios = [one.ratio for one in repairs if one.seconds]
    beyond = [[one.case, why[one.case]] for one in repairs if one not in reachable]
    fix_head = ["program", "causes found", "recommended", "outcome", "repaired", "random", "rate", "clip", "time"]
    parts = [
        "# What `isograd fix` repairs",
        "Written by `python cases/repair.py`. " + (__doc__ or "").split("\n\n")[-1].strip(),
        f"{len(repairs)} faulty programs; {len(reachable)} of the faults can be reached from outside of the source.",
        _table(["", "repaired, of the reachable", "repaired, of all"], [_arm(a, repairs, reachable) for a in ARMS]),
        f"A treatment is recommended for {len(recommended)} programs.",
        f"It repairs with no seed: {_listed(wrong)}; with some seeds only: {_listed(partly)}.",
        f"Time of the search over that of the faulty run: median {median(ratios):.1f}, worst {max(ratios):.1f}.",
        "## Programs",
        _table(fix_head, [_row(one) for one in repairs]),
        "## Out of reach",
        _table(["program", "why"], beyond),
        "## Healthy programs",
        _table(["program", "status", "seconds"], [[name, str(status), f"{s:.1f}"] for name, status, s in healthy]),
    ]
    return "\n\n".join(parts) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _arm(arm: str, repairs: Sequence[Repair], reachable: Sequence[Repair]) -> list[str]:
    done, total = sum(is_repaired(one, arm) for one in reachable), max(1, len(reachable))
    return [
        LABELS[arm],
        f"{done} of {len(reachable)} ({done / total:.0%})",
        str(sum(is_repaired(one, arm) for one in repairs)),
    ]


def _row(one: Repair) -> list[str]:
    text = _recommended(one)
    marks = [f"{sum(one.repaired[arm])}/{len(one.repaired[arm])}" if one.repaired[arm] else "" for arm in ARMS]
    return [one.case, ", ".join(one.causes), f"`{text}`" if text else "", one.outcome, *marks, f"{one.ratio:.1f}"]


def _recommended(one: Repair) -> str:
    return " + ".join(one.treatments["recommended"][0]) if one.treatments["recommended"] else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body])


def _write(repairs: Sequence[Repair], healthy: Healthy) -> None:
    content = {"schema": 1, "repairs": [asdict(one) for one in repairs], "healthy": healthy}
    RESULTS.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    why = {case.name: case.unreachable for case in read_cases()}
    (HERE / "REPAIRS.md").write_text(document(repairs, healthy, why), encoding="utf-8")


def read_results() -> tuple[list[Repair], list[tuple[str, int, float]]]:
    """What repairs.json holds."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Repair)}
    repairs = [Repair(**{k: v for k, v in one.items() if k in known}) for one in content["repairs"]]
    return repairs, [(name, status, seconds) for name, status, seconds in content["healthy"]]


def main() -> int:
    """Repair, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[""], metavar="PART,…")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--report", action="store_true", help="write REPAIRS.md from repairs.json")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.report:
        _write(*read_results())
        return 0
    found, calm = read_results() if RESULTS.exists() else ([], [])
    repairs, healthy = {one.case: one for one in found}, {one[0]: one for one in calm}
    for case in read_cases():
        if not any(part in case.name for part in options.only):
            continue
        if case.accepted:
            repairs[case.name] = repair(case, options.seeds, jobs=options.jobs)
            print(line(repairs[case.name]), flush=True)
        else:
            status, _, seconds = fixed(case, jobs=options.jobs)
            healthy[case.name] = case.name, status, seconds
            print(f"{case.name:38s} healthy: status {status}, {seconds:.1f} s", flush=True)
        # After every program: a study of half an hour may be interrupted.
        _write([repairs[name] for name in sorted(repairs)], [healthy[name] for name in sorted(healthy)])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (IsogradError, ValueError) as error:
        sys.exit(f"{shlex.quote(sys.argv[0])}: {error}")
