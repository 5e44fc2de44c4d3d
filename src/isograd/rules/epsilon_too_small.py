"""epsilon-too-small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import weight_parameters
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._nonfinite import damaged, first_place
from isograd._parameter_groups import decay_rates, hyperparameter
from isograd._robust import median, row_median
from isograd._rule import Evidence, Finding, Rule, Stage

SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float8_e5m2": 2.0**-16, "float8_e4m3fn": 2.0**-9}
"""The smallest positive number of each type; half of it or less rounds to zero."""


@dataclass(frozen=True, kw_only=True)
class EpsilonTooSmall(Rule):
    """The optimizer's epsilon does not fit the gradients: it rounds to zero and guards nothing, or it outweighs them.

    Detects
        A parameter in a type whose smallest number exceeds `rounding` times the epsilon of its optimizer, whose
        weights or optimizer state then became non-finite while the gradients before were finite. Or the gradient lives
        below epsilon: in half of the steps or more, the typical weight tensor of Adam or its kin has a gradient whose
        root mean square is at most `near` times epsilon, though not zero, and the loss is stuck.

    Why it matters
        Adam divides by sqrt(v) + epsilon. In float16, v is zero for every gradient below 2.4e-4 and an epsilon of
        1e-8 is zero too: 0 / 0, in the first step. Where epsilon is the larger of the two, Adam no longer divides the
        gradient's scale out: an update is g / (g + epsilon) learning rates, and goes to zero with the gradient.

    Decided by
        rounding: 2; half of the smallest number rounds to even, which is zero. float16 holds 6.0e-8 and up.
        near: 1, where updates are half as long as meant (Wortsman et al. 2023 see the loss suffer there).

    Stays silent when
        The optimizer keeps its state in float32, which shows in weights that stay finite. Gradients become small as
        the loss does, or a large epsilon was chosen on purpose and the run learns.

    Remedies
        stabilize-optimizer, raise-precision

    References
        Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740 (a master copy in float32); PyTorch issues
        8860 and 26218; Keras issue 11860; IEEE 754-2019; Wortsman et al. 2023, Small-scale proxies for large-scale
        transformer training instabilities, arXiv:2309.14322, section 3.4 (gradients at the size of epsilon).
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("weight_nonfinite",)
    uses: ClassVar[tuple[str, ...]] = (
        "grad_nonfinite",
        "loss_nonfinite",
        "output_nonfinite",
        "input_nonfinite",
        "signal_nonfinite",
        "state_nonfinite",
        "skipped",
        "grad_norm",
        "loss",
    )
    explains: ClassVar[tuple[str, ...]] = (
        "nonfinite-values",
        "loss-divergence",
        "exploding-gradients",
        "loss-plateau",
        "no-gradient",
    )
    remedies: ClassVar[tuple[str, ...]] = ("stabilize-optimizer", "raise-precision")

    rounding: float = 2.0
    near: float = 1.0

    def check(self, history: History) -> Iterator[Finding]:
        yield from self._rounds_away(history)
        yield from self._outweighs(history)

    def _rounds_away(self, history: History) -> Iterator[Finding]:
        place = first_place(history)
        if place is None or place.kind not in ("weight", "state") or not damaged(history):
            return
        lost = history["weight_nonfinite"].values
        broken = [i for i in self._rounded(history) if i < lost.shape[1] and np.nanmax(lost[:, i], initial=0.0) > 0]
        if not broken:
            return
        first = history.parameters[broken[0]]
        epsilon, smallest = self._epsilon(history, broken[0]), SMALLEST[first.dtype]
        # The update that broke the weight was made at the step before the weight was read so.
        step = max(0, place.step - 1) if place.kind == "weight" else place.step
        yield self.finding(
            history,
            level="error",
            message=f"The optimizer's epsilon of {epsilon:.1g} rounds to 0 in {first.dtype}, which holds "
            f"{smallest:.1g} and up: {len(broken)} tensors became non-finite at step {step} though their "
            "gradients were finite.",
            first_step=step,
            layers=tuple(history.parameters[i].name for i in broken),
            evidence=(
                Evidence(
                    statistic="epsilon",
                    observed=epsilon,
                    limit=smallest / self.rounding,
                    step=step,
                    layer=first.name,
                    below=True,
                ),
            ),
            confidence=0.95,
        )

    def _outweighs(self, history: History) -> Iterator[Finding]:
        curve, norms = loss_curve(history), history.series.get("grad_norm")
        columns = [i for i in weight_parameters(history) if self._divides_scale_out(history, i)]
        if curve is None or not curve.stuck or curve.lost or norms is None or not columns:
            return
        sizes = np.sqrt([max(1, history.parameters[i].size) for i in columns])
        epsilons = np.array([self._epsilon(history, i) for i in columns])
        ratios = norms.values[:, columns] / (sizes * epsilons)
        # Exact zeros have other names; what is left is typical of the tensors that receive anything.
        typical = row_median(np.where(ratios > 0, ratios, np.nan))
        low = typical <= self.near
        if not low.any() or 2 * np.sum(low) < np.sum(np.isfinite(typical)):
            return
        first, ratio = int(norms.steps[low][0]), median(typical[low])
        worst = [columns[i] for i in np.argsort(np.nan_to_num(ratios[low][0], nan=np.inf), kind="stable")]
        yield self.finding(
            history,
            level="error" if curve.share < 0.1 else "warning",
            message=f"Gradients have a root mean square of {ratio:.2g} times the optimizer's epsilon of "
            f"{epsilons[0]:.1g} (limit {self.near:g}) from step {first} on: updates are {ratio / (1 + ratio):.1g} of "
            "what the learning rate says, and the loss stays.",
            first_step=first,
            layers=tuple(history.parameters[i].name for i in worst),
            evidence=(
                Evidence(statistic="grad_over_epsilon", observed=ratio, limit=self.near, step=first, below=True),
            ),
            confidence=0.7,
        )

    def _divides_scale_out(self, history: History, index: int) -> bool:
        parameter = history.parameters[index]
        is_held = parameter.optimized and decay_rates(history, parameter.group) is not None
        return is_held and self._epsilon(history, index) > 0

    def _rounded(self, history: History) -> list[int]:
        """Parameters whose optimizer's epsilon is zero in their own type."""
        return [
            index
            for index, parameter in enumerate(history.parameters)
            if parameter.dtype in SMALLEST
            and 0 < self._epsilon(history, index) <= SMALLEST[parameter.dtype] / self.rounding
        ]

    def _epsilon(self, history: History, index: int) -> float:
        value = hyperparameter(history, history.parameters[index].group, "eps")
        return value if np.isfinite(value) else 0.0
