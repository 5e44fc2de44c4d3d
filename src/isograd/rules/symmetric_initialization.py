"""symmetric-initialization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import WEIGHTED, weight_parameters
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._robust import Floats
from isograd._rule import Evidence, Finding, Level, Rule, Stage

ROUNDING = 1e-6
"""Ten times float32's: the mean that is subtracted from equal rows is itself rounded."""


@dataclass(frozen=True, kw_only=True)
class SymmetricInitialization(Rule):
    """The units of a layer start identical, get identical gradients, and stay identical.

    Detects
        A trainable weight of two or more output units that receives a gradient and moves, and whose units differ by
        at most `spread` of what it has moved (unit_spread against the sum of its update/weight ratios, at most 1) at
        every reading. Or two weights or more whose units started identical (within rounding), in a run whose loss is
        stuck: gates and dropout tell units apart, slowly.

    Why it matters
        Units with the same weights compute the same output and receive the same gradient, so no step can make them
        differ: a layer of 512 does the work of one.

    Decided by
        spread: 0.01. Gradients of units that differ move them apart by about as much as they move; rounding moves
        them by less than a hundredth of it. moved: 1e-4, the least movement that can be told from rounding, which
        is 1e-6 of the weight.

    Stays silent when
        One weight alone starts constant and its units part at once (a classifier or adapter that starts at zero, a
        table of positions, a gain per channel): their gradients differ. Vectors (biases, gains of normalizations)
        have no units. Or the weight is frozen, or a single unit, or no layer's own (a table whose rows are averaged) in
        a run that learns.

    Remedies
        reinitialize-layers

    References
        Rumelhart, Hinton & Williams 1986, Learning internal representations by error propagation (symmetry breaking);
        Goodfellow, Bengio & Courville 2016, Deep learning, section 8.4.
    """

    stage: ClassVar[Stage] = "initialization"
    needs: ClassVar[tuple[str, ...]] = ("unit_spread", "update_ratio")
    uses: ClassVar[tuple[str, ...]] = ("grad_max", "loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "vanishing-gradients", "no-gradient")
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers",)

    spread: float = 0.01
    moved: float = 1e-4

    def check(self, history: History) -> Iterator[Finding]:
        columns = [i for i in weight_parameters(history) if history.parameters[i].optimized]
        curve = loss_curve(history)
        # Rows that a user's own formula averages are alike for good and may be meant so: harm must show.
        certain = [i for i in columns if _makes_units(history, i) or (curve is not None and curve.stuck)]
        same = [(i, found) for i in certain if (found := self._same_units(history, i)) is not None]
        begun = [i for i in columns if self._began_alike(history, i)]
        if same:
            evidence = min((found for _, found in same), key=lambda found: found.step)
            names = tuple(history.parameters[i].name for i, _ in same)
            level: Level = "error" if curve is not None and curve.failed else "warning"
            yield self._symmetric(history, names, evidence, level, "started identical and still are", 0.95)
        elif len(begun) >= 2 and curve is not None and curve.stuck:
            names = tuple(history.parameters[i].name for i in begun)
            evidence = _reading(history, begun[0], 0, limit=ROUNDING)
            words = f"started identical, and the loss stays at {curve.end:.4g}"
            yield self._symmetric(history, names, evidence, "error", words, 0.8)

    def _symmetric(
        self, history: History, names: tuple[str, ...], evidence: Evidence, level: Level, words: str, confidence: float
    ) -> Finding:
        units = next(history.units_of(p) for p in history.parameters if p.name == names[0])
        others = f", and those of {len(names) - 1} more," if len(names) > 1 else ""
        return self.finding(
            history,
            level=level,
            message=f"The {units} units of {names[0]}{others} {words}: they differ by {evidence.observed:.2g} of their "
            f"size (limit {evidence.limit:.2g}). Such a layer does the work of one unit.",
            first_step=evidence.step,
            layers=names,
            evidence=(evidence,),
            confidence=confidence,
        )

    def _same_units(self, history: History, column: int) -> Evidence | None:
        """The largest spread of a weight that moved with a gradient, if all its units moved as one."""
        values, moved = history["unit_spread"].values[:, column], self._moved(history, column)
        known = np.flatnonzero(np.isfinite(values))
        if len(known) < 2 or not moved >= self.moved or not _has_gradient(history, column):
            return None
        limit = self.spread * min(moved, 1.0)
        if not values[known].max() <= limit:
            return None
        return _reading(history, column, int(known[np.argmax(values[known])]), limit=limit, since=int(known[0]))

    def _moved(self, history: History, column: int) -> float:
        """How far the weight went until its last reading of the spread, in units of its size, as far as was read."""
        spread, ratios = history["unit_spread"], history["update_ratio"]
        last = spread.steps[np.isfinite(spread.values[:, column])]
        before: Floats = ratios.values[ratios.steps < (last[-1] if len(last) else 0), column]
        return float(np.sum(before[np.isfinite(before)]))

    def _began_alike(self, history: History, column: int) -> bool:
        values = history["unit_spread"].values[:, column]
        return bool(len(values)) and bool(values[0] <= ROUNDING) and _has_gradient(history, column)


def _reading(history: History, column: int, row: int, *, limit: float, since: int | None = None) -> Evidence:
    series = history["unit_spread"]
    return Evidence(
        statistic="unit_spread",
        observed=float(series.values[row, column]),
        limit=limit,
        step=int(series.steps[row if since is None else since]),
        layer=history.parameters[column].name,
        below=True,
    )


def _makes_units(history: History, column: int) -> bool:
    """Whether the weight is one that a layer multiplies its input with, one row for each unit."""
    owner = history.parameters[column].layer
    return any(layer.name == owner and layer.kind in WEIGHTED - {"embedding"} for layer in history.layers)


def _has_gradient(history: History, column: int) -> bool:
    largest = history.series.get("grad_max")
    return largest is None or bool(np.any(largest.values[:, column] > 0))
