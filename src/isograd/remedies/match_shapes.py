"""`match-shapes`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class MatchShapes(Remedy):
    """Give prediction and target the same shape.

    What it does
        The axis of size 1 is dropped (or added) on one side before the loss.

    When it helps
        A prediction [N, 1] against a target [N]: the loss compares all N x N pairs.

    Risks
        None.

    Prediction
        `loss` falls below the variance of the targets.

    Sources
        torch.nn.MSELoss documentation and its warning on differing sizes.
    """

    treats: ClassVar[tuple[str, ...]] = ("broadcast-loss",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("loss", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return (
            "loss = loss_fn(prediction.squeeze(-1), target)  # or target.unsqueeze(-1)\n"
            "assert prediction.shape == target.shape"
        )

    def keras_code(self, history: History) -> str:
        del history
        return (
            "y = y.reshape(-1, 1)  # for a model that returns (batch, 1)\n"
            "assert model.predict(x[:1]).shape == y[:1].shape"
        )
