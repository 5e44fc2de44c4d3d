"""epsilon-too-small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._nonfinite import damaged, first_place
from isograd._rule import Evidence, Finding, Rule, Stage

SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float8_e5m2": 2.0**-16, "float8_e4m3fn": 2.0**-9}
"""The smallest positive number of each type; half of it or less rounds to zero."""


@dataclass(frozen=True, kw_only=True)
class EpsilonTooSmall(Rule):
    """The optimizer's epsilon is below what the parameters' number type holds: it rounds to zero and guards nothing.

    Detects
        A parameter in a type whose smallest number exceeds `rounding` times the epsilon of its optimizer, whose
        weights or optimizer state then became non-finite while the gradients before were finite.

    Why it matters
        Adam divides by sqrt(v) + epsilon. In float16, v is zero for every gradient below 2.4e-4 and an epsilon of
        1e-8 is zero too: 0 / 0, in the first step.

    Decided by
        rounding: 2; half of the smallest number rounds to even, which is zero. float16 holds 6.0e-8 and up.

    Stays silent when
        The optimizer keeps its state in float32, which shows in weights that stay finite.

    Remedies
        stabilize-optimizer, raise-precision

    References
        Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740 (a master copy in float32); PyTorch issues
        8860 and 26218; Keras issue 11860; IEEE 754-2019.
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

    def check(self, history: History) -> Iterator[Finding]:
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

    def _rounded(self, history: History) -> list[int]:
        """Parameters whose optimizer's epsilon is zero in their own type."""
        return [
            index
            for index, parameter in enumerate(history.parameters)
            if parameter.dtype in SMALLEST
            and 0 < self._epsilon(history, index) <= SMALLEST[parameter.dtype] / self.rounding
        ]

    def _epsilon(self, history: History, index: int) -> float:
        group = history.parameters[index].group
        value = history.groups[group].get("eps", 0.0) if 0 <= group < len(history.groups) else 0.0
        return float(value) if isinstance(value, (int, float)) else 0.0
