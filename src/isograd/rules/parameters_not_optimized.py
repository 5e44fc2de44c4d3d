"""parameters-not-optimized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import weight_parameters
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import loss_graphs
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class ParametersNotOptimized(Rule):
    """The loss depends on trainable parameters that no optimizer holds: gradients arrive, and nobody steps.

    Detects
        In the last reading of the loss's graph, `tensors` or more parameters that require a gradient and that no
        optimizer of the process holds, together with a sign that this is no choice: a module keeps them in a plain
        list or dict, where no optimizer over its parameters finds them; optimizers hold parameters that never receive
        a gradient instead, those of layers that were replaced; or the loss is stuck.

    Why it matters
        Layers in a Python list instead of a ModuleList are not in parameters(); layers replaced after the optimizer
        was made leave it with the old ones. Everything runs, and what should learn never moves.

    Decided by
        tensors: 1. That a parameter is held by none is a fact. A warning where it cannot be meant; an error where the
        loss is stuck below a tenth of its start, or where nothing that an optimizer holds receives a gradient.

    Stays silent when
        The loss falls and nothing else is wrong: a head trained on registered features that are left out of the
        optimizer is common, and info, as is a second network that only measures a distance. The parameters of a
        second model belong to its own optimizer.

    Remedies
        register-parameters

    References
        PyTorch documentation of ModuleList; PyTorch issue 715; microsoft/nni, issue 4521 (layers replaced after the
        optimizer was made).
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "grad_max", "grad_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "no-gradient",
        "loss-plateau",
        "vanishing-gradients",
        "parameters-unreached",
        "undertrained",
    )
    remedies: ClassVar[tuple[str, ...]] = ("register-parameters",)

    tensors: int = 1

    def check(self, history: History) -> Iterator[Finding]:
        graphs, curve = loss_graphs(history), loss_curve(history)
        if not graphs or curve is None or len(graphs[-1].unoptimized) < self.tensors:
            return
        names, step = graphs[-1].unoptimized, graphs[0].step
        if step >= history.num_steps:
            return
        orphaned, stale, unregistered = self._is_orphaned(history), self._stale(history), graphs[-1].unregistered
        why = _reason(orphaned, unregistered, stale)
        yield self.finding(
            history,
            level=self._level(curve, orphaned=orphaned, is_meant=not (unregistered or stale)),
            message=f"The loss depends on {len(names)} trainable {'parameter' if len(names) == 1 else 'parameters'} "
            f"that no optimizer holds ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}).{why} The loss went "
            f"from {curve.start:.4g} to {curve.end:.4g}.",
            first_step=step,
            evidence=(
                Evidence(
                    statistic="unoptimized_parameters",
                    observed=float(len(names)),
                    limit=float(self.tensors),
                    step=step,
                ),
            ),
            confidence=0.95 if orphaned or unregistered else 0.8,
        )

    def _is_orphaned(self, history: History) -> bool:
        """Whether no parameter in an optimizer ever received a gradient other than zero."""
        largest, bad = history.series.get("grad_max"), history.series.get("grad_nonfinite")
        if largest is None or not len(largest) or not history.parameters:
            return False
        lost = bad is not None and bool(np.any(bad.values > 0))
        return not lost and not np.any(largest.values > 0)

    def _stale(self, history: History) -> list[str]:
        """Weights of two axes or more that an optimizer holds, that train, and that never received a gradient."""
        largest, bad = history.series.get("grad_max"), history.series.get("grad_nonfinite")
        if largest is None or not len(largest):
            return []
        counted = np.zeros(len(history.parameters)) if bad is None else np.nansum(bad.values, axis=0)
        return [
            history.parameters[i].name
            for i in weight_parameters(history)
            if history.parameters[i].optimized and np.isnan(largest.values[:, i]).all() and not counted[i]
        ]

    def _level(self, curve: LossCurve, *, orphaned: bool, is_meant: bool) -> Level:
        if orphaned:
            return "error" if curve.share < 0.95 else "info"
        if not curve.stuck:
            return "info" if is_meant else "warning"
        return "error" if curve.share < 0.1 else "warning"


def _reason(orphaned: bool, unregistered: Sequence[str], stale: Sequence[str]) -> str:
    """What says that the parameters were not left out on purpose, as a sentence, or nothing."""
    if orphaned:
        return " The optimizer holds nothing that receives a gradient."
    if unregistered:
        return f" {len(unregistered)} of them are kept in a list or dict, which registers nothing."
    return f" It holds {len(stale)} instead that receive no gradient ({', '.join(stale[:2])})." if stale else ""
