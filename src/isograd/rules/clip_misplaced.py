"""clip-misplaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class ClipMisplaced(Rule):
    """Gradients are clipped where it has no effect: after the step, or before a gradient scaler unscales them.

    Detects
        `clip_grad_norm_` is called between an optimizer's step and the next backward pass, in a share of `share` of
        the steps or more, and at least one gradient that the optimizer used was longer than the limit. Or, with a
        loss scale of 2 or more, the norm that the optimizer receives is below half of what the clip factor left of
        the norm before it: the limit was applied to scaled gradients.

    Why it matters
        The optimizer has already used the whole gradient; the clipped one is thrown away by zero_grad. Under a loss
        scale of 65,536 a limit of 1 leaves a gradient of 1.5e-5.

    Decided by
        share: 0.5 of the steps; the calls are seen, no threshold tells them apart.

    Stays silent when
        The call measures the norm with a limit that no gradient exceeds, or gradients are clipped before the step
        as well.

    Remedies
        clip-gradient-norm

    References
        Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063; PyTorch, Automatic mixed precision examples (unscale before
        clipping); awslabs graphstorm, pull request 1366.
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("global_grad_norm", "clip_factor")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite", "loss_scale", "global_grad_norm_unclipped")
    explains: ClassVar[tuple[str, ...]] = (
        "exploding-gradients",
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "nonfinite-values",
        "learning-rate-too-high",
        "recurrent-explosion",
        "dead-units",
    )
    remedies: ClassVar[tuple[str, ...]] = ("clip-gradient-norm",)

    share: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        evidence = self._after_step(history) or self._before_unscaling(history)
        if evidence is None:
            return
        curve = loss_curve(history)
        what = (
            f"Gradients are clipped to {evidence.limit:.3g} after the step has used them: at step {evidence.step} it "
            f"used a norm of {evidence.observed:.3g}."
            if not evidence.below
            else f"Gradients are clipped before they are unscaled: at step {evidence.step} the optimizer receives a "
            f"norm of {evidence.observed:.3g} where {2 * evidence.limit:.3g} was left by clipping."
        )
        yield self.finding(
            history,
            level="error" if curve is not None and curve.failed else "warning",
            message=what,
            first_step=evidence.step,
            evidence=(evidence,),
            confidence=0.9,
        )

    def _after_step(self, history: History) -> Evidence | None:
        """The first step whose gradient exceeded the limit that was applied behind it."""
        norms, factors = history["global_grad_norm"], history["clip_factor"]
        calls = [(event.step, event.data.get("limit")) for event in history.events_of("clip-after-step")]
        limits = [limit for _, limit in calls if isinstance(limit, (int, float)) and limit > 0]
        if not limits or len({step for step, _ in calls}) < self.share * (history.num_steps - 1):
            return None
        if np.any(factors.values < 1) or norms.values.ndim != 1:
            return None
        limit = float(min(limits))
        over = np.flatnonzero(np.nan_to_num(norms.values) > limit)
        if not len(over):
            return None
        first = int(over[0])
        return Evidence(
            statistic="global_grad_norm",
            observed=float(norms.values[first]),
            limit=limit,
            step=int(norms.steps[first]),
        )

    def _before_unscaling(self, history: History) -> Evidence | None:
        """A step whose gradient is far below what its own clip factor says."""
        names = ("global_grad_norm", "clip_factor", "loss_scale", "global_grad_norm_unclipped")
        read = [history.series.get(name) for name in names]
        if any(s is None or s.values.shape != history["clip_factor"].values.shape for s in read):
            return None
        norm, factor, scale, before = (s.values for s in read if s is not None)
        clipped = (factor < 1) & (scale >= 2) & np.isfinite(before) & (norm > 0)
        wrong = np.flatnonzero(clipped & (norm <= factor * before / 2))
        if len(wrong) == 0 or len(wrong) < self.share * np.sum(clipped):
            return None
        first = int(wrong[0])
        return Evidence(
            statistic="global_grad_norm",
            observed=float(norm[first]),
            limit=float(factor[first] * before[first] / 2),
            step=int(history["clip_factor"].steps[first]),
            below=True,
        )
