"""precision-overflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import NORMALIZATIONS, WEIGHTED, columns_of
from isograd._history import Floats, History
from isograd._loss_curve import loss_curve
from isograd._nonfinite import damaged, first_place, skipped_steps
from isograd._number_types import NARROW, narrow_columns
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class PrecisionOverflow(Rule):
    """Values exceed what a number type of few bits holds: they become infinite, and with them the step.

    Detects
        Forward: a layer with weights (or a normalization) whose outputs are float16 or float8 puts out non-finite
        values, its inputs and weights being finite. Products and sums of finite numbers become infinite in one way
        only. Or the first non-finite value of the run stands in the loss or behind such a layer, whose outputs had
        reached the root of the largest number: their squares exceed it. Backward: the same type's gradient overflows
        again and again: a gradient scaler leaves out `share` or more of the steps behind the first `settling`, or its
        scale has fallen below 1.

    Why it matters
        float16 ends at 65504. An activation of 300 squared is beyond. The infinite value becomes NaN in the next
        difference, and the weights with it; a scaler that goes on halving its scale saves the weights and trains
        nothing.

    Decided by
        settling: 40 steps. A scaler starts at 65536 and halves at every overflow: 16 halvings lead to 1.
        share: 0.5 of the steps behind them; a scaler that works leaves out one step in 2000.

    Stays silent when
        A scaler left out its first steps on its way down, the type is float32 or bfloat16, or inputs or weights were
        not finite before.

    Remedies
        raise-precision, scale-loss, standardize-inputs, insert-normalization, clip-gradient-norm

    References
        Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740; PyTorch, Automatic mixed precision
        (`torch.amp.GradScaler`: growth every 2000 steps); IEEE 754-2019.
    """

    stage: ClassVar[Stage] = "numerics"
    needs: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    uses: ClassVar[tuple[str, ...]] = (
        "output_nonfinite",
        "input_nonfinite",
        "weight_nonfinite",
        "grad_nonfinite",
        "signal_nonfinite",
        "state_nonfinite",
        "output_min",
        "output_max",
        "skipped",
        "loss_scale",
        "loss",
    )
    explains: ClassVar[tuple[str, ...]] = (
        "nonfinite-values",
        "loss-divergence",
        "loss-plateau",
        "exploding-gradients",
        "no-gradient",
        "invalid-operation",
        "singular-derivative",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "raise-precision",
        "scale-loss",
        "standardize-inputs",
        "insert-normalization",
        "clip-gradient-norm",
    )

    settling: int = 40
    share: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        forward = self._forward(history) or self._behind(history)
        if forward is not None:
            yield forward
        else:
            yield from self._backward(history)

    def _forward(self, history: History) -> Finding | None:
        outputs, inputs = history.series.get("output_nonfinite"), history.series.get("input_nonfinite")
        columns = narrow_columns(history, columns_of(history, WEIGHTED | NORMALIZATIONS))
        if outputs is None or not len(columns):
            return None
        fed = None if inputs is None or inputs.values.shape != outputs.values.shape else inputs.values[:, columns]
        born = (outputs.values[:, columns] > 0) & (True if fed is None else ~(fed > 0))
        rows = [row for row in np.flatnonzero(born.any(axis=1)) if self._weights_hold(history, int(outputs.steps[row]))]
        if not rows:
            return None
        hit, step = columns[born[rows[0]]], int(outputs.steps[rows[0]])
        first, count = history.layers[hit[0]], float(outputs.values[rows[0], hit[0]])
        return self.finding(
            history,
            level=self._level(history),
            message=f"{first.name} puts out {count:.0f} infinite {'value' if count == 1 else 'values'} at step {step} "
            f"from finite inputs and weights: they exceed {NARROW[first.dtype].largest:g}, the largest number of "
            f"{first.dtype}.",
            first_step=step,
            layers=tuple(history.layers[index].name for index in hit),
            evidence=(Evidence(statistic="output_nonfinite", observed=count, limit=1.0, step=step, layer=first.name),),
            confidence=0.95,
        )

    def _behind(self, history: History) -> Finding | None:
        """An operation that is no layer overflows: what entered it is known, and that its square leaves the type."""
        place, columns = first_place(history), narrow_columns(history, columns_of(history, WEIGHTED | NORMALIZATIONS))
        if place is None or place.kind not in ("output", "loss") or not len(columns):
            return None
        sizes = self._sizes(history, columns, place.step)
        roots = np.sqrt([NARROW[history.layers[index].dtype].largest for index in columns])
        over = np.flatnonzero(sizes >= roots)
        if not len(over) or not self._weights_hold(history, place.step):
            return None
        last = int(over[-1])
        layer, size = history.layers[columns[last]], float(sizes[last])
        return self.finding(
            history,
            level=self._level(history),
            message=f"The {place.kind} is not finite at step {place.step}, behind {layer.name}, which puts out values "
            f"up to {size:.3g} in {layer.dtype} (limit {roots[last]:.3g}): their squares exceed "
            f"{NARROW[layer.dtype].largest:g}, its largest number.",
            first_step=place.step,
            layers=tuple(history.layers[columns[index]].name for index in over[::-1]),
            evidence=(
                Evidence(
                    statistic="output_max",
                    observed=size,
                    limit=float(roots[last]),
                    step=place.step,
                    layer=layer.name,
                ),
            ),
            confidence=0.7,
        )

    def _sizes(self, history: History, columns: NDArray[np.int64], step: int) -> Floats:
        """[N]: the largest finite output in size of each layer up to `step`, 0 where none was read."""
        found = np.zeros(len(columns))
        for name in ("output_min", "output_max"):
            series = history.series.get(name)
            if series is not None:
                values = np.abs(series.values[series.steps <= step][:, columns])
                found = np.maximum(found, np.max(np.where(np.isfinite(values), values, 0.0), axis=0, initial=0.0))
        return found

    def _level(self, history: History) -> Level:
        """An error where the weights were lost, or a scaler goes on leaving steps out to save them."""
        return "error" if damaged(history) or self._left_out(history)[0] >= self.share else "warning"

    def _weights_hold(self, history: History, step: int) -> bool:
        """Whether all weights were finite at `step`."""
        series = history.series.get("weight_nonfinite")
        row = None if series is None else series.at(step)
        return row is None or not np.any(row > 0)

    def _backward(self, history: History) -> Iterator[Finding]:
        share, first = self._left_out(history)
        scale = history.series.get("loss_scale")
        low = scale.values[scale.values > 0].min(initial=1.0) if scale is not None and scale.values.ndim == 1 else 1.0
        if share < self.share and not (low < 1 and skipped_steps(history)):
            return
        evidence = (
            Evidence(statistic="skipped_share", observed=share, limit=self.share, step=history.num_steps - 1)
            if share >= self.share
            else Evidence(
                statistic="loss_scale", observed=float(low), limit=1.0, step=history.num_steps - 1, below=True
            )
        )
        curve = loss_curve(history)
        yield self.finding(
            history,
            level="error" if share >= 0.95 or (curve is not None and curve.failed) else "warning",
            message=f"The gradient scaler left out {100 * share:.0f} % of the steps behind the first {self.settling} "
            f"(limit {100 * self.share:.0f} %), and its scale fell to {low:.3g}: gradients exceed the range of their "
            "type at any scale.",
            first_step=first,
            evidence=(evidence,),
            confidence=0.8,
        )

    def _left_out(self, history: History) -> tuple[float, int]:
        """(share of the steps behind the settling that a scaler left out, the first that it left out at all)."""
        steps = sorted(skipped_steps(history))
        late = [step for step in steps if step >= self.settling]
        return len(late) / max(1, history.num_steps - self.settling), steps[0] if steps else 0
