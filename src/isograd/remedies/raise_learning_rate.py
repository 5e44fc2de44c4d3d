"""`raise-learning-rate`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import first_learning_rate, is_seen, short
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class RaiseLearningRate(Remedy):
    """Multiply the learning rate with a factor above 1.

    What it does
        Every group's rate is `factor` times what the program sets, schedules included.

    When it helps
        Updates that are orders of magnitude too small to matter in the run's length.

    Risks
        Divergence. It does not cure vanishing gradients: all layers' updates grow alike, and the layers near the loss
        become unstable before those far from it begin to move.

    Prediction
        `update_ratio` grows by the factor.

    Sources
        Smith 2017, arXiv:1506.01186; Karpathy 2022 (update/weight ratio about 1e-3).
    """

    treats: ClassVar[tuple[str, ...]] = ("learning-rate-too-low", "undertrained", "update-below-precision")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_ratio", "up")

    factor: float = 10.0

    @property
    def hastens(self) -> bool:
        return True

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        yield cls()
        yield cls(factor=100.0)

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and first_learning_rate(history) is None:
            raise Inapplicable("The optimizer has no learning rate to raise.")
        return (_changes.SetHyperparameter(name="lr", factor=self.factor),)

    def code(self, history: History) -> str:
        rate = first_learning_rate(history)
        new = f"{short(rate * self.factor):g}" if rate is not None else f"{self.factor:g} * lr"
        was = f"  # was {rate:g}" if rate is not None else ""
        return f"for group in optimizer.param_groups:\n    group['lr'] = {new}{was}"

    def keras_code(self, history: History) -> str:
        rate = first_learning_rate(history)
        new = f"{short(rate * self.factor):g}" if rate is not None else f"{self.factor:g} * lr"
        was = f"  # was {rate:g}" if rate is not None else ""
        return f"{history.subject}.optimizer.learning_rate = {new}{was}"
