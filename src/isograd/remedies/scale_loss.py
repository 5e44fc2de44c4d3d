"""`scale-loss`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class ScaleLoss(Remedy):
    """Multiply the loss before the backward pass and divide the gradients by the same factor after it.

    What it does
        Small gradients are lifted out of float16's underflow; the step is unchanged otherwise.

    When it helps
        float16 gradients below 6e-8 that become 0.

    Risks
        Overflow where gradients are large: GradScaler adapts the factor and skips those steps.

    Prediction
        `grad_zero_fraction` falls.

    Sources
        Micikevicius et al. 2018, arXiv:1710.03740; torch.amp.GradScaler (2^16 at first).
    """

    treats: ClassVar[tuple[str, ...]] = ("precision-underflow",)
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("grad_zero_fraction", "down")

    scale: float = 1024.0

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.ScaleLoss(scale=self.scale),)

    def code(self, history: History) -> str:
        del history
        return (
            "scaler = torch.amp.GradScaler()\n\nscaler.scale(loss).backward()\nscaler.step(optimizer)\nscaler.update()"
        )

    def keras_code(self, history: History) -> str:
        return f"{history.subject}.optimizer.loss_scale_factor = {self.scale:g}  # after compile, before fit"
