"""precision-underflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import WEIGHTED, columns_of
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._number_types import NARROW, narrow_columns
from isograd._robust import median
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class PrecisionUnderflow(Rule):
    """Gradients are smaller than what a number type of few bits holds: most of them become exactly zero.

    Detects
        In layers with weights whose outputs are float16 or float8: the gradient with respect to the output has no
        entry beyond the smallest normal number of the type, and a share of `zeros` or more of its entries are exactly
        zero, in half of the deep readings of the layer or more. Or nothing arrives at all: every such gradient is zero
        in every reading, and the loss started so small that it had to be: at most the smallest number of the type
        times the rows of the output of the last of these layers.

    Why it matters
        float16 ends at 6e-8. A loss that is a mean over many entries, or a deep network, sends gradients below that:
        they are rounded to zero, weights before them stay where they are, and those just above keep one or two of
        their eleven bits.

    Decided by
        The smallest normal number is the type's own (6.1e-5 in float16): below it, bits are lost one by one. A loss
        that is a mean over B rows sends each of them about 1/B of itself, or less.
        zeros: 0.9. Rectifiers and pooling by the maximum make zeros too, three quarters of them at most.

    Stays silent when
        A loss scale lifts the gradients into the type's range, weights and gradients are float32 or bfloat16 (which
        has the range of float32), or nothing is left to learn: the loss had fallen by 95 %. A warning only where the
        loss is stuck, otherwise info.

    Remedies
        scale-loss, raise-precision

    References
        Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740, section 3.2 (half of the activation
        gradients of a detector are lost without scaling); IEEE 754-2019; PyTorch, Automatic mixed precision
        (`torch.amp.GradScaler`).
    """

    stage: ClassVar[Stage] = "numerics"
    needs: ClassVar[tuple[str, ...]] = ("signal_zero_fraction", "signal_max")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite", "output_size", "loss_scale")
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "vanishing-gradients", "loss-plateau")
    remedies: ClassVar[tuple[str, ...]] = ("scale-loss", "raise-precision")

    zeros: float = 0.9

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is not None and curve.share >= 0.95:
            return
        columns = narrow_columns(history, columns_of(history, WEIGHTED))
        hit = self._underflown(history, columns)
        if hit:
            yield self._lost_on_the_way(history, hit, curve)
        elif curve is not None and len(columns):
            yield from self._never_sent(history, columns, curve)

    def _lost_on_the_way(self, history: History, hit: list[int], curve: LossCurve | None) -> Finding:
        # The layer nearest to the loss is where it begins.
        column = hit[-1]
        name, kind = history.layers[column].name, NARROW[history.layers[column].dtype]
        row = int(np.flatnonzero(self._is_lost(history, np.array([column]))[:, 0])[0])
        step = int(history["signal_max"].steps[row])
        share, largest = (float(history[s].values[row, column]) for s in ("signal_zero_fraction", "signal_max"))
        return self.finding(
            history,
            level="warning" if curve is not None and curve.failed else "info",
            message=f"{100 * share:.0f} % of the gradient at {name} are exactly zero at step {step} (limit "
            f"{100 * self.zeros:.0f} %), and its largest entry is {largest:.2g}: {history.layers[column].dtype} rounds "
            f"below {kind.smallest_normal:.2g} and holds nothing below {kind.smallest:.2g}.",
            first_step=step,
            layers=tuple(history.layers[index].name for index in reversed(hit)),
            evidence=(
                Evidence(statistic="signal_zero_fraction", observed=share, limit=self.zeros, step=step, layer=name),
                Evidence(
                    statistic="signal_max",
                    observed=largest,
                    limit=kind.smallest_normal,
                    step=step,
                    layer=name,
                    below=True,
                ),
            ),
            confidence=0.85,
        )

    def _never_sent(self, history: History, columns: NDArray[np.int64], curve: LossCurve) -> Iterator[Finding]:
        largest, sizes = history["signal_max"], history.series.get("output_size")
        read = largest.values[:, columns]
        if not np.isfinite(read).any() or np.nanmax(read) > 0 or sizes is None or curve.share >= 0.1:
            return
        layer = history.layers[columns[-1]]
        rows = median(sizes.values[:, columns[-1]]) / max(1, layer.units)
        scales = history.series.get("loss_scale")
        scale = median(scales.values) if scales is not None else 1.0
        each, smallest = abs(curve.start) * scale / rows, NARROW[layer.dtype].smallest
        if not 0 < each <= smallest:
            return
        step = int(largest.steps[0])
        yield self.finding(
            history,
            level="error",
            message=f"Every gradient at {layer.name} and before it is exactly zero: a loss of {curve.start:.2g} over "
            f"{rows:.0f} rows sends each about {each:.1g}, and {layer.dtype} holds nothing below {smallest:.1g}.",
            first_step=step,
            layers=tuple(history.layers[index].name for index in columns[::-1]),
            evidence=(
                Evidence(
                    statistic="loss_per_row", observed=each, limit=smallest, step=step, layer=layer.name, below=True
                ),
            ),
            confidence=0.8,
        )

    def _underflown(self, history: History, columns: NDArray[np.int64]) -> list[int]:
        """Columns that are lost in half of their readings or more, from the input to the loss."""
        largest = history["signal_max"].values
        # Zero everywhere and at all times is the business of no-gradient: nothing was ever sent.
        if largest.shape != history["signal_zero_fraction"].values.shape or not np.any(largest > 0):
            return []
        lost, known = self._is_lost(history, columns), np.isfinite(largest[:, columns])
        often = lost.any(axis=0) & (2 * lost.sum(axis=0) >= known.sum(axis=0))
        return [int(column) for column in columns[often]]

    def _is_lost(self, history: History, columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        normal = np.array([NARROW[history.layers[index].dtype].smallest_normal for index in columns])
        largest, zero = history["signal_max"].values[:, columns], history["signal_zero_fraction"].values[:, columns]
        return np.asarray((largest <= normal) & (zero >= self.zeros))
