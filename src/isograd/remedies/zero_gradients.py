"""`zero-gradients`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class ZeroGradients(Remedy):
    """Clear the gradients between steps.

    What it does
        Gradients are cleared after every optimizer step.

    When it helps
        The loop never calls `zero_grad`: each step follows the sum of all gradients so far, a momentum of 1. A lower
        rate only delays the divergence.

    Risks
        None where steps are meant to be independent. Deliberate accumulation clears after the step as well.

    Prediction
        `carried_grad_norm` is 0.

    Sources
        torch.optim documentation, "Taking an optimization step".
    """

    treats: ClassVar[tuple[str, ...]] = ("missing-zero-grad",)
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("carried_grad_norm", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return (_changes.ZeroGradients(),)

    def code(self, history: History) -> str:
        del history
        return "optimizer.zero_grad()  # at the beginning of each step\nloss.backward()\noptimizer.step()"

    def keras_code(self, history: History) -> str:
        del history
        return "# fit computes gradients afresh; in a loop of your own on torch:\nmodel.zero_grad()\nloss.backward()"
