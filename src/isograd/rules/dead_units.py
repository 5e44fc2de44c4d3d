"""dead-units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import columns_of
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Level, Rule, Stage

RECTIFIERS = frozenset({"relu", "gelu", "silu", "elu"})


@dataclass(frozen=True, kw_only=True)
class DeadUnits(Rule):
    """Units that output zero, with zero slope, for every input of the step, and go on doing so.

    Detects
        dead_fraction, the share of a rectifier's units whose slope is zero for all inputs, at or above `most` in
        each of the last `readings` deep readings.

    Why it matters
        A dead unit receives no gradient and cannot come back by itself. A layer in which all are dead cuts the
        network in
        two: what is before it stops learning, what is behind it sees a constant.

    Decided by
        most: 0.9 of a layer. Healthy runs on real tasks end with up to 0.4, some with 0.6 of a layer dead.
        readings: 3 in a row, so that a batch that happens to miss a unit does not count.
        cut: 0.99, all but none alive, is an error where the loss stays, or all before the layer gets exactly no
        gradient.

    Stays silent when
        Most activations are zero but few units are dead (a wide layer with a negative bias), or dead units are
        many but the loss falls: that is info.

    Remedies
        reinitialize-layers, replace-activations, lower-learning-rate

    References
        Lu et al. 2019, Dying ReLU and initialization, arXiv:1903.06733; Sokar et al. 2023, The dormant neuron
        phenomenon in deep reinforcement learning, arXiv:2302.12902; He et al. 2015, Delving deep into rectifiers,
        arXiv:1502.01852.
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("dead_fraction",)
    uses: ClassVar[tuple[str, ...]] = ("grad_max", "loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "vanishing-gradients", "loss-plateau")
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers", "replace-activations", "lower-learning-rate")

    most: float = 0.9
    cut: float = 0.99
    readings: int = 3

    def check(self, history: History) -> Iterator[Finding]:
        series, columns = history["dead_fraction"], columns_of(history, RECTIFIERS)
        if not len(columns):
            return
        rows = np.flatnonzero(np.isfinite(series.values[:, columns]).any(axis=1))
        if len(rows) < self.readings:
            return
        values = np.nan_to_num(series.values[np.ix_(rows, columns)])
        lasting = values[-self.readings :].min(axis=0)
        dead = np.flatnonzero(lasting >= self.most)
        if not len(dead):
            return
        begun = min(self._since(series.steps[rows], values[:, index]) for index in dead)
        worst = int(dead[np.argmax(lasting[dead])])
        others = [int(index) for index in dead if index != worst]
        names = [history.layers[columns[index]].name for index in (worst, *others)]
        share = float(lasting[worst])
        many = f" and {len(dead) - 1} more {'layer' if len(dead) == 2 else 'layers'}" if len(dead) > 1 else ""
        yield self.finding(
            history,
            level=self._level(history, share, self._is_cut(history, names)),
            message=f"{100 * share:.0f} % of the units of {names[0]}{many} are dead since step {begun} "
            f"(limit {100 * self.most:.0f} %): zero output and zero slope for every input.",
            first_step=begun,
            layers=tuple(names),
            evidence=(
                Evidence(
                    statistic="dead_fraction",
                    observed=share,
                    limit=self.most,
                    step=int(series.steps[rows[-1]]),
                    layer=names[0],
                ),
            ),
            confidence=0.9 if share >= self.cut else 0.7,
        )

    def _since(self, steps: NDArray[np.int64], values: NDArray[np.float64]) -> int:
        """The step since which the fraction has been beyond the limit without a break."""
        alive = np.flatnonzero(values < self.most)
        return int(steps[alive[-1] + 1] if len(alive) else steps[0])

    def _is_cut(self, history: History, names: list[str]) -> bool:
        """Whether all that stands before the first of the layers receives exactly nothing at the end of the run."""
        positions = {layer.name: layer.position for layer in history.layers}
        first = min(positions[name] for name in names)
        before = [i for i, p in enumerate(history.parameters) if positions.get(p.layer, np.inf) < first]
        largest = history.series.get("grad_max")
        return bool(before) and largest is not None and not np.any(largest.values[-self.readings :, before] > 0)

    def _level(self, history: History, share: float, is_cut: bool) -> Level:
        curve = loss_curve(history)
        solved = curve is not None and curve.share >= 0.95
        if share >= self.cut and is_cut and not solved:
            return "error"
        if curve is None or not curve.failed:
            return "info"
        return "error" if share >= self.cut else "warning"
