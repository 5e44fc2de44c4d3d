"""frozen-parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class FrozenParameters(Rule):
    """Parameters with `requires_grad=False` that the run needs: what is left to train cannot do the task.

    Detects
        Weights that an optimizer holds and that do not require a gradient, or frozen weights that are `share` of all
        weights or more, in a run whose loss is stuck.

    Why it matters
        A frozen layer stays at its initialization or at what it was trained for. On random features, or on those of
        another task, the few parameters that train may not be enough.

    Decided by
        share: 0.5 of the entries of all weights. An error never: the run may be a fair test of frozen features.

    Stays silent when
        The loss falls: fine-tuning a head, adapters, and probes are meant to leave the rest alone.

    Remedies
        unfreeze-parameters

    References
        Alain & Bengio 2016, Understanding intermediate layers using linear classifier probes, arXiv:1610.01644
        (freezing that is meant); Yosinski et al. 2014, How transferable are features, arXiv:1411.1792.
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("loss", "grad_max")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau",)
    remedies: ClassVar[tuple[str, ...]] = ("unfreeze-parameters",)

    share: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        weights = [p for p in history.parameters if len(p.shape) >= 2]
        frozen = [p for p in weights if not p.trainable]
        total = sum(p.size for p in weights)
        if curve is None or not curve.stuck or not frozen or total <= 0 or not self._rest_learns(history):
            return
        part = sum(p.size for p in frozen) / total
        if part < self.share:
            return
        yield self.finding(
            history,
            level="warning",
            message=f"{len(frozen)} of {len(weights)} weights, {100 * part:.0f} % of their entries (limit "
            f"{100 * self.share:.0f} %), do not require a gradient, and the loss stays at {curve.end:.4g}.",
            first_step=int(history["loss"].steps[0]),
            layers=tuple(p.name for p in frozen),
            evidence=(
                Evidence(statistic="frozen_share", observed=part, limit=self.share, step=int(history["loss"].steps[0])),
            ),
            confidence=0.5,
        )

    def _rest_learns(self, history: History) -> bool:
        """Whether what is not frozen receives a gradient: otherwise something else cuts it off."""
        return bool(np.any(np.nan_to_num(history["grad_max"].values) > 0))
