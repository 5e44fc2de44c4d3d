"""`lower-learning-rate`: a remedy."""

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
class LowerLearningRate(Remedy):
    """Multiply the learning rate with a factor below 1.

    What it does
        Every group's rate is `factor` times what the program sets, schedules included.

    When it helps
        Steps beyond what the curvature allows: eta > 2 / lambda_max for gradient descent.

    Risks
        Slower training. It does not make gradients smaller, does not cure a missing `zero_grad`, a NaN in the data or a
        wrong loss, and only hides badly scaled inputs.

    Prediction
        `update_ratio` falls by the factor.

    Sources
        LeCun et al. 1998, Efficient BackProp; Cohen et al. 2021, arXiv:2103.00065.
    """

    treats: ClassVar[tuple[str, ...]] = (
        "learning-rate-too-high",
        "dead-units",
        "unscaled-inputs",
        "unscaled-targets",
        "recurrent-explosion",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_ratio", "down")

    factor: float = 0.1

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        yield cls()
        yield cls(factor=0.01)

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and first_learning_rate(history) is None:
            raise Inapplicable("The optimizer has no learning rate to lower.")
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
