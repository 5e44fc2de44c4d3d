"""Measure a treatment on a training function, in this process: `isograd.verify`."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from isograd._changes import CannotApply, Change
from isograd._diagnose import diagnose
from isograd._history import History
from isograd._launch import RunEnded
from isograd._remedy import Treatment
from isograd._verify import Arm, Verdict, compare
from isograd._watch import Watch


def verify(
    treatment: Treatment | Change | Sequence[Change],
    train: Callable[..., Any],
    *,
    seeds: Iterable[int] = range(3),
    steps: int = 300,
) -> Verdict:
    """Train with and without `treatment`, once for each of `seeds`, and compare: see `Verdict`.

    `train` makes its data, its model and its optimizer and trains; it is called with the seed if it takes an argument.
    Before each call Python's, NumPy's and torch's generators are seeded with it; afterwards they stand where they
    stood. A call ends after `steps` optimizer steps, with `finally` blocks run, or when it returns. What it raises
    counts as its end. The first model that trains is compared by its own loss.

    An interval needs two seeds; with three or more it is fit to decide by. Which treatment is verified has to have been
    chosen on other seeds.

    Raises ValueError where there is nothing to compare (a treatment that changes nothing, no seeds, no steps), and
    CannotApply where the program has no place for the treatment; what `train` raises before any first step is raised.
    """
    changes = _changes_of(treatment)
    seeds = list(seeds)
    if not changes:
        raise ValueError(f"{treatment} changes nothing by itself: it is advice, which only you can follow")
    if not seeds or steps < 1:
        raise ValueError(f"there is nothing to compare: {len(seeds)} seeds and {steps} steps")
    if not callable(train):
        raise TypeError(f"train must be a function that trains a model, not {type(train).__name__}")
    cause = treatment.cause if isinstance(treatment, Treatment) else None
    untreated, treated = [], []
    for seed in seeds:
        untreated.append(_arm(train, (), seed, steps))
        treated.append(_arm(train, changes, seed, steps))
    return compare(untreated, treated, cause=cause)


def _changes_of(treatment: Treatment | Change | Sequence[Change]) -> tuple[Change, ...]:
    if isinstance(treatment, Treatment):
        return treatment.changes
    return tuple(treatment) if isinstance(treatment, Sequence) else (treatment,)


def _arm(train: Callable[..., Any], changes: tuple[Change, ...], seed: int, steps: int) -> Arm:
    """One call, watched, in a folder that does not stay."""
    from isograd.frameworks.torch import preserved_generators, seed_generators

    with tempfile.TemporaryDirectory(prefix="isograd-verify-") as folder, preserved_generators():
        seed_generators(seed)
        call = _Call(Path(folder), changes, steps)
        error = call.run(train, seed)
        histories = call.histories
        if call.refusal:
            raise CannotApply(call.refusal)
        if not any(history.num_steps for history in histories):
            raise error or ValueError("train took no optimizer step: it is to make a model and train it")
        told = f"{type(error).__name__}: {error}" if error is not None else ""
        return Arm.of(histories[0], diagnose(histories), seed=seed, error=told)


class _Call:
    """A call of the training function under a watch that ends it in time."""

    def __init__(self, folder: Path, changes: tuple[Change, ...], steps: int) -> None:
        self._steps = steps
        self._is_over = False
        self.refusal = ""
        self.histories: tuple[History, ...] = ()
        self._watch = Watch(
            (),
            (),
            out=folder,
            every=100,
            budget=0.01,
            meta={"script": "verify"},
            on_step=self._stepped,
            between=self._end_if_over,
            changes=changes,
            on_refusal=self._refuse,
        )

    def run(self, train: Callable[..., Any], seed: int) -> Exception | None:
        """Call it; returns what it raised. The run is closed afterwards, and what was applied is undone."""
        error: Exception | None = None
        try:
            train(*((seed,) if _takes_an_argument(train) else ()))
        except RunEnded:
            pass
        except Exception as raised:
            error = raised
        finally:
            self._watch.close()
        self.histories = self._watch.histories()
        return error

    def _stepped(self, subject: str, step: int, readings: dict[str, float]) -> None:
        self._is_over = step + 1 >= self._steps

    def _refuse(self, sentence: str) -> None:
        self.refusal = self.refusal or sentence

    def _end_if_over(self) -> None:
        if self.refusal or self._is_over:
            raise RunEnded(0)


def _takes_an_argument(train: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in inspect.signature(train).parameters.values() if p.kind in kinds and p.default is p.empty]
    return bool(needed)
