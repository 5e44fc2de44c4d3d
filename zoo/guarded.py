"""Runs healthy programs under a guard that may do everything, and reports every bit and every step that it changed.

python zoo/guarded.py                     # all programs, seed 0, against what zoo/run.py has recorded without a guard
python zoo/guarded.py --only gan --seeds 0,1
python zoo/guarded.py --fresh             # also the runs without a guard are recorded anew

There should be nothing to report: a healthy program has no bad step, and a guard that does nothing changes nothing.
The exit status says whether there is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from recording import HERE, Job, jobs, record, recorded, run_folder

import isograd
from isograd import History

ROOT = HERE / "isograd-runs"
GUARDED = ROOT / "guarded"

GUARD = "skip,clip,rewind"

HARMLESS = ("snapshots", "guard-refused")
"""What a guard tells without having acted: the memory it takes, and optimizers that it leaves alone."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One program under a guard beside the same without: what the guard did, and where the runs part."""

    job: Job
    actions: Counter[str]
    why: tuple[str, ...]
    difference: str

    @property
    def is_clean(self) -> bool:
        """Whether the guard did nothing and changed nothing."""
        return not self.difference and not set(self.actions) - set(HARMLESS)


def compare(job: Job) -> Comparison:
    """What was recorded of a job with a guard, beside what was without."""
    plain, guarded = (run_folder(job, root) for root in (ROOT, GUARDED))
    if plain is None or guarded is None:
        return Comparison(job=job, actions=Counter(), why=(), difference="no run folder")
    one, other = (isograd.open_run(folder) for folder in (plain, guarded))
    told = [
        (history.subject, event)
        for history in other.histories
        for event in history.events
        if event.kind.startswith(("guard-", "bad-step", "rewound", "snapshots", "treatment-"))
    ]
    acted = [(subject, event) for subject, event in told if event.kind not in HARMLESS]
    return Comparison(
        job=job,
        actions=Counter(event.kind for _, event in told),
        why=tuple(f"{subject}, step {event.step}: {event.kind}: {event.data.get('why')}" for subject, event in acted),
        difference=_difference(one.histories, other.histories) or _printed(job),
    )


def _difference(plain: Sequence[History], guarded: Sequence[History]) -> str:
    """Where the losses and gradient norms of two runs part first; "" where every one is the same to the last bit."""
    series = [
        {(h.subject, name): h[name] for h in histories for name in ("loss", "global_grad_norm") if name in h}
        for histories in (plain, guarded)
    ]
    if series[0].keys() != series[1].keys():
        return f"watched are {sorted(series[0])} and {sorted(series[1])}"
    for (subject, name), one in series[0].items():
        other = series[1][subject, name]
        if not np.array_equal(one.steps, other.steps):
            return f"{subject}: {len(one.steps)} and {len(other.steps)} steps"
        parted = np.flatnonzero(~((one.values == other.values) | (np.isnan(one.values) & np.isnan(other.values))))
        if len(parted):
            return f"{subject}: {name} parts at step {one.steps[parted[0]]}"
    return ""


def _printed(job: Job) -> str:
    """Whether the programs printed the same: their last line is a metric of the trained model in full precision."""
    texts = [(job.folder(root) / "output.txt").read_text(encoding="utf-8") for root in (ROOT, GUARDED)]
    return "" if texts[0] == texts[1] else "what the programs print differs"


def report(rows: Sequence[Comparison]) -> str:
    """A summary, and a line for everything that should not be."""
    bad = [row for row in rows if not row.is_clean]
    lines = [f"{len(rows)} runs under --guard {GUARD}: {len(bad)} with a step or a bit that the guard changed."]
    for row in rows:
        refused = ", optimizer refused" * ("guard-refused" in row.actions)
        if row.difference or refused or row in bad:
            lines.append(f"  {row.job.command} seed {row.job.seed}: {row.difference or 'same bits'}{refused}")
            lines += [f"    {why}" for why in row.why]
    return "\n".join(lines)


def _recorded(wanted: Sequence[Job], root: Path, *, workers: int, fresh: bool, options: Sequence[str] = ()) -> None:
    missing = [job for job in wanted if fresh or recorded(job, root) is None]
    for count, (job, ended) in enumerate(record(missing, root, workers=workers, options=options), 1):
        line = f"{count}/{len(missing)}  {job.command} seed {job.seed}: {ended.metric} {ended.value:.4g}"
        print(line, f"({ended.seconds:.0f} s)", *options, file=sys.stderr, flush=True)


def main() -> int:
    """Record what is missing, always anew under the guard; compare, print. 1 where the guard has changed anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--only", default="", help="programs whose command line contains this")
    parser.add_argument("--fresh", action="store_true", help="also record anew without a guard")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    wanted = jobs([int(seed) for seed in args.seeds.split(",")], args.only)
    if not wanted:
        parser.error(f"no program's command line contains {args.only!r}")
    _recorded(wanted, ROOT, workers=args.workers, fresh=args.fresh)
    _recorded(wanted, GUARDED, workers=args.workers, fresh=True, options=("--guard", GUARD))
    rows = [compare(job) for job in wanted]
    print(report(rows))
    return int(any(not row.is_clean for row in rows))


if __name__ == "__main__":
    sys.exit(main())
