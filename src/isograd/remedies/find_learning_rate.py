"""`find-learning-rate`: a remedy."""

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
class FindLearningRate(Remedy):
    """Search the learning rate over decades around the program's own.

    What it does
        Tries one rate per decade, from a hundredth to a hundred times the program's, side by side on the program
        itself.

    When it helps
        It is not known whether the rate is too high or too low, or by how much.

    Risks
        Short trials favor large rates.

    Prediction
        `loss` falls fastest at the rate that is found.

    Sources
        Smith 2017, arXiv:1506.01186 (range test); Bengio 2012, arXiv:1206.5533 (a logarithmic grid).
    """

    treats: ClassVar[tuple[str, ...]] = ("learning-rate-too-high", "learning-rate-too-low", "undertrained")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("loss", "down")

    factor: float = 1.0

    @property
    def hastens(self) -> bool:
        return self.factor > 1

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        for factor in (0.1, 10.0, 0.01, 100.0):
            yield cls(factor=factor)

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and first_learning_rate(history) is None:
            raise Inapplicable("The optimizer has no learning rate to search.")
        return (_changes.SetHyperparameter(name="lr", factor=self.factor),)

    def code(self, history: History) -> str:
        rate = first_learning_rate(history)
        new = f"{short(rate * self.factor):g}" if rate is not None else f"{self.factor:g} * lr"
        return f"for group in optimizer.param_groups:\n    group['lr'] = {new}"

    def keras_code(self, history: History) -> str:
        rate = first_learning_rate(history)
        new = f"{short(rate * self.factor):g}" if rate is not None else f"{self.factor:g} * lr"
        was = f"  # was {rate:g}" if rate is not None else ""
        return f"{history.subject}.optimizer.learning_rate = {new}{was}"
