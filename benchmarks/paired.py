"""Timing of variants of one program against each other on a machine that is never quiet.

All variants live in one process, each with its own copy of the model. A round runs a block of steps of each, in an
order drawn anew, and what is compared are the times of one round: whatever slows the machine for seconds slows both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from variants import Variant
from workloads import Calls, Program

Floats = NDArray[np.float64]
Statistic = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(kw_only=True)
class Contestant:
    """A variant attached to its own copy of the program. `every`: it takes part in every so many-th round."""

    program: Program
    calls: Calls
    every: int = 1
    steps: int = 0
    seconds: list[float] = field(default_factory=list)

    def run(self, steps: int) -> float:
        """Seconds per step over `steps` steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.program.step(self.steps, self.calls)
            self.steps += 1
        return (time.perf_counter() - start) / steps


def interleave(
    build: Callable[[], Program],
    variants: Mapping[str, Variant],
    *,
    folder: Path,
    seconds: float,
    block: int = 1,
    warm_up: Mapping[str, int] | None = None,
    rare: Mapping[str, int] | None = None,
    min_rounds: int = 8,
) -> dict[str, Floats]:
    """Seconds per step of each variant, [rounds]; NaN in rounds in which a variant did not take part.

    Runs for `seconds`, but at least `min_rounds` rounds, after 3 steps of each variant or as many as `warm_up` says.
    `rare` names variants that are so slow that they take part in every so many-th round only.
    """
    rare, warm_up = rare or {}, warm_up or {}
    with ExitStack() as stack:
        contestants = {}
        for name, variant in variants.items():
            program = build()
            calls = stack.enter_context(variant(program, folder / name.replace(" ", "-")))
            contestants[name] = Contestant(program=program, calls=calls, every=rare.get(name, 1))
        for name, contestant in contestants.items():
            contestant.run(warm_up.get(name, 3))
        _run_rounds(list(contestants.values()), seconds, block, min_rounds)
    return {name: np.array(contestant.seconds) for name, contestant in contestants.items()}


def _run_rounds(contestants: list[Contestant], seconds: float, block: int, min_rounds: int) -> None:
    order = random.Random(0)
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < min_rounds:
        for contestant in order.sample(contestants, len(contestants)):
            takes_part = rounds % contestant.every == 0
            contestant.seconds.append(contestant.run(block) if takes_part else float("nan"))
        rounds += 1


def median_ratio(watched: Floats, base: Floats) -> Floats:
    """Median over rounds of watched / base: what a usual step costs."""
    return np.median(watched / base, axis=-1)


def total_ratio(watched: Floats, base: Floats) -> Floats:
    """All watched time over all base time: rare expensive steps count in full."""
    return watched.sum(-1) / base.sum(-1)


def median_difference(watched: Floats, base: Floats) -> Floats:
    """Median over rounds of watched - base, in seconds per step."""
    return np.median(watched - base, axis=-1)


def bootstrap(statistic: Statistic, watched: Floats, base: Floats, *, resamples: int = 4000) -> Interval:
    """`statistic` over the rounds in which both took part, with its percentile bootstrap interval over rounds."""
    both = ~np.isnan(watched + base)
    watched, base = watched[both], base[both]
    drawn = np.random.default_rng(0).integers(len(base), size=(resamples, len(base)))
    low, high = np.quantile(statistic(watched[drawn], base[drawn]), [0.025, 0.975])
    return Interval(value=float(statistic(watched, base)), low=float(low), high=float(high))
