"""`skip-bad-steps`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class SkipBadSteps(Remedy):
    """Leave out steps whose gradients hold NaN or Inf.

    What it does
        Weights, optimizer state and step counters stay as if that batch had not existed. `isograd run --guard skip`
        also leaves out finite spikes, and puts batch statistics, schedules and loss scale back.

    When it helps
        Rare batches that break: one bad sample, an empty mask, an overflow.

    Risks
        A fault that is there at every step leaves a run that never moves: nothing is cured. Fix the operation or the
        data.

    Prediction
        `weight_nonfinite` stays 0.

    Sources
        Micikevicius et al. 2018, arXiv:1710.03740 (skipping on overflow); Chowdhery et al. 2022, arXiv:2204.02311.
    """

    treats: ClassVar[tuple[str, ...]] = ("invalid-operation", "singular-derivative", "nonfinite-inputs")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("weight_nonfinite", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return (_changes.SkipBadSteps(),)

    def code(self, history: History) -> str:
        return (
            "loss.backward()\n"
            f"grads = [p.grad for p in {history.subject}.parameters() if p.grad is not None]\n"
            "norm = torch.nn.utils.get_total_norm(grads)\n"
            "if torch.isfinite(norm):\n"
            "    optimizer.step()\n"
            "optimizer.zero_grad()"
        )

    def keras_code(self, history: History) -> str:
        return (
            "# leaves out steps whose gradients are not finite; the scale stays 1:\n"
            "optimizer = keras.optimizers.LossScaleOptimizer(\n"
            f"    {history.subject}.optimizer, initial_scale=1.0, dynamic_growth_steps=10**9\n"
            ")\n"
            f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)"
        )
