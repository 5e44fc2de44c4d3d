"""`standardize-targets`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import is_seen
from isograd._remedy import Inapplicable, Remedy


@dataclass(frozen=True, kw_only=True)
class StandardizeTargets(Remedy):
    """Train on targets of mean 0 and standard deviation 1.

    What it does
        The model's answer is multiplied by the targets' standard deviation and shifted by their mean, from the
        statistics of the first batches: the loss stays in the units of the program.

    When it helps
        Regression targets far from unit scale: the first steps are spent on, or broken by, their offset and scale.

    Risks
        The same transformation has to be undone when the model is applied.

    Prediction
        `loss` falls from the first step on.

    Sources
        Bishop 1995, Neural Networks for Pattern Recognition, section 8.2.
    """

    treats: ClassVar[tuple[str, ...]] = ("unscaled-targets", "bounded-output", "flat-loss")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("loss", "down")

    batches: int = 8

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and not any(layer.role == "target" and "float" in layer.type for layer in history.layers):
            raise Inapplicable("No floating-point target was seen to standardize.")
        return (_changes.StandardizeTargets(batches=self.batches),)

    def code(self, history: History) -> str:
        return (
            "# of the training set, and kept with the model:\n"
            "mean, std = targets.mean(0), targets.std(0)\n"
            f"loss = loss_fn({history.subject}(inputs), (targets - mean) / std)\n"
            f"prediction = {history.subject}(inputs) * std + mean  # when the model is applied"
        )

    def keras_code(self, history: History) -> str:
        return (
            "# of the training set, and kept with the model:\n"
            "mean, std = y.mean(0), y.std(0)\n"
            f"{history.subject}.fit(x, (y - mean) / std)\n"
            f"prediction = {history.subject}.predict(x) * std + mean"
        )
