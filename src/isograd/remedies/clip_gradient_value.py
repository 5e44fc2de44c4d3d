"""`clip-gradient-value`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class ClipGradientValue(Remedy):
    """Clip every gradient entry to [-limit, limit].

    What it does
        g <- min(limit, max(-limit, g)) for each entry, between the backward pass and the step.

    When it helps
        Rare huge entries in few weights (embeddings, heavy-tailed losses).

    Risks
        It changes the direction of the gradient, and does not help against NaN or Inf: those steps are left alone.

    Prediction
        `grad_max` stays at or below the limit.

    Sources
        Mikolov 2012, PhD thesis, section 3.2.2; torch.nn.utils.clip_grad_value_.
    """

    treats: ClassVar[tuple[str, ...]] = ("recurrent-explosion", "stale-second-moment")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("grad_max", "down")

    limit: float = 1.0

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.ClipGradients(method="value", limit=self.limit),)

    def code(self, history: History) -> str:
        return (
            "loss.backward()\n"
            f"torch.nn.utils.clip_grad_value_({history.subject}.parameters(), {self.limit:g})  # before the step\n"
            "optimizer.step()"
        )

    def keras_code(self, history: History) -> str:
        return f"{history.subject}.optimizer.clipvalue = {self.limit:g}  # after compile, before fit"
