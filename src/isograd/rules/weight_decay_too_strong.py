"""weight-decay-too-strong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import weight_parameters
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._robust import median
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class WeightDecayTooStrong(Rule):
    """Weight decay outweighs the gradient and takes the weights away.

    Detects
        The norm of most weights that an optimizer decays ends at or below `shrunk` of its start, decay alone would
        have shrunk them by a factor e or more (sum of learning rate times decay over the run at least `span`), and
        the loss is stuck.

    Why it matters
        Decay pulls every weight to zero by the same factor at every step. Where the gradient cannot hold against it,
        outputs become the same for every input, and the loss stays near that of a constant answer.

    Decided by
        shrunk: 0.5 of the initial norm. span: 1. Usual values are 1e-4 to 1e-2 for SGD, 0.01 to 0.1 for AdamW, with
        which weights grow from a usual initialization while a task is learned.

    Stays silent when
        The loss falls (weights that shrink are no harm by themselves, behind normalization they only raise the
        effective rate), or nothing decays.

    Remedies
        decay-weights

    References
        Krogh & Hertz 1991, A simple weight decay can improve generalization; Loshchilov & Hutter 2019, Decoupled
        weight decay regularization, arXiv:1711.05101; BVLC/caffe, issue 1396.
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("loss", "weight_norm")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "learning_rate")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "vanishing-gradients", "no-gradient")
    remedies: ClassVar[tuple[str, ...]] = ("decay-weights",)

    shrunk: float = 0.5
    span: float = 1.0

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        columns = [i for i in weight_parameters(history) if self._span(history, i) >= self.span]
        if curve is None or not curve.stuck or not columns:
            return
        left = self._left(history, columns)
        gone = np.flatnonzero(left <= self.shrunk)
        if 2 * len(gone) <= len(columns):
            return
        order = [columns[i] for i in gone[np.argsort(left[gone], kind="stable")]]
        ratio, decay = median(left[gone]), self._decay(history, order[0])
        first = int(history["weight_norm"].steps[0])
        yield self.finding(
            history,
            level="error" if curve.share < 0.5 else "warning",
            message=f"{len(order)} of {len(columns)} weights shrank to {ratio:.2f} of their start (limit "
            f"{self.shrunk:g}) under a weight decay of {decay:g}, and the loss stays at {curve.end:.4g}.",
            first_step=first,
            layers=tuple(history.parameters[i].name for i in order),
            evidence=(
                Evidence(
                    statistic="weight_norm_left",
                    observed=ratio,
                    limit=self.shrunk,
                    step=int(history["weight_norm"].steps[-1]),
                    below=True,
                ),
                Evidence(statistic="decay_span", observed=self._span(history, order[0]), limit=self.span, step=first),
            ),
            confidence=0.85,
        )

    def _left(self, history: History, columns: list[int]) -> NDArray[np.float64]:
        """Per column the last finite norm over the first."""
        values = history["weight_norm"].values[:, columns]
        known = [column[np.isfinite(column) & (column > 0)] for column in values.T]
        return np.array([column[-1] / column[0] if len(column) >= 2 else np.inf for column in known])

    def _decay(self, history: History, index: int) -> float:
        group = history.parameters[index].group
        value = history.groups[group].get("weight_decay", 0.0) if 0 <= group < len(history.groups) else 0.0
        return float(value) if isinstance(value, (int, float)) else 0.0

    def _span(self, history: History, index: int) -> float:
        """How many times decay alone would have divided the parameter by e: sum of rate x decay over the steps."""
        decay, rates, group = self._decay(history, index), history.series.get("learning_rate"), 0
        if decay <= 0 or rates is None or rates.values.ndim != 2:
            return 0.0
        group = history.parameters[index].group
        if group >= rates.values.shape[1]:
            return 0.0
        momentum = history.groups[group].get("momentum", 0.0)
        # With momentum a constant pull acts 1 / (1 - momentum) times.
        held = momentum if isinstance(momentum, (int, float)) and 0 <= momentum < 1 else 0.0
        return decay * float(np.nansum(rates.values[:, group])) / (1 - held)
