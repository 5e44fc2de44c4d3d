"""`check-labels`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class CheckLabels(Remedy):
    """Look at the labels that reach the loss.

    What it does
        Counts the values of a batch of targets right before the loss.

    When it helps
        One class left, constant targets, or values outside what the loss allows.

    Risks
        None.

    Prediction
        `distinct_values` of the target is the number of classes.

    Sources
        Karpathy 2019, A recipe for training neural networks ("become one with the data").
    """

    treats: ClassVar[tuple[str, ...]] = ("destroyed-labels", "targets-outside-range")
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("distinct_values", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return "values, counts = target.unique(return_counts=True)\nprint(dict(zip(values.tolist(), counts.tolist())))"

    def keras_code(self, history: History) -> str:
        del history
        return "values, counts = np.unique(y, return_counts=True)\nprint(dict(zip(values.tolist(), counts.tolist())))"
