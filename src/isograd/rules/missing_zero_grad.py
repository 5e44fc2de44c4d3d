"""missing-zero-grad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class MissingZeroGrad(Rule):
    """Gradients are not cleared between steps: each step uses the sum of all gradients so far.

    Detects
        When the first backward pass of a step begins, the parameters hold gradients already, of `part` or more of the
        norm that the step then uses, in a share of `share` of the deep readings after the first step.

    Why it matters
        backward adds to what stands there. The sum of all past gradients is a momentum that never forgets: the loss
        swings further and further, and a lower learning rate only delays it.

    Decided by
        share: 0.9 of at least `readings` (3) readings. part: 0.01 of the norm, above rounding.

    Stays silent when
        Several backward passes make one step (accumulation by design) and gradients are cleared behind it, or what
        another optimizer's backward pass left behind is cleared before its own.

    Remedies
        zero-gradients

    References
        PyTorch, What is torch.nn really; Stack Overflow 60335387; Humbatova et al. 2020, arXiv:1910.11015.
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("carried_grad_norm", "global_grad_norm")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite", "global_grad_norm_unclipped")
    explains: ClassVar[tuple[str, ...]] = (
        "exploding-gradients",
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "nonfinite-values",
        "learning-rate-too-high",
        "dead-units",
    )
    remedies: ClassVar[tuple[str, ...]] = ("zero-gradients",)

    share: float = 0.9
    part: float = 0.01
    readings: int = 3

    def check(self, history: History) -> Iterator[Finding]:
        carried = history["carried_grad_norm"]
        used = history.series.get("global_grad_norm_unclipped") or history["global_grad_norm"]
        if carried.values.ndim != 1 or used.values.ndim != 1 or not len(used):
            return
        seen = [
            (int(step), float(norm), float(size))
            for step, norm in zip(carried.steps, carried.values, strict=True)
            if step > carried.steps[0] and np.isfinite(norm) and (size := _at(used.at(int(step)))) > 0
        ]
        kept = [(step, norm, size) for step, norm, size in seen if norm >= self.part * size]
        if len(seen) < self.readings or len(kept) < self.share * len(seen):
            return
        step, norm, size = kept[0]
        curve = loss_curve(history)
        yield self.finding(
            history,
            level="error" if curve is not None and curve.failed else "warning",
            message=f"Gradients are not cleared: in {len(kept)} of {len(seen)} steps looked at, parameters held some "
            f"before the first backward pass (norm {norm:.3g} at step {step}, where the step used {size:.3g}).",
            # The step before is the first one that left its gradients behind.
            first_step=max(0, step - 1),
            evidence=(
                Evidence(statistic="carried_grad_norm", observed=norm, limit=self.part * size, step=step),
                Evidence(statistic="carried_share", observed=len(kept) / len(seen), limit=self.share, step=kept[-1][0]),
            ),
            confidence=0.95,
        )


def _at(value: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None) -> float:
    """A finite reading, 0 where there is none."""
    return float(value) if value is not None and np.isfinite(value) else 0.0
