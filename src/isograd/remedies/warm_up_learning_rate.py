"""`warm-up-learning-rate`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import rate_in_words
from isograd._remedy import Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class WarmUpLearningRate(Remedy):
    """Start with a small learning rate and raise it linearly to the program's own.

    What it does
        At step t the rate is min(1, (t + 1) / steps) times what the program sets.

    When it helps
        The first steps break what later steps would not: transformers, Adam before its second moment has settled, large
        batches.

    Risks
        A slower start. A rate that is too high stays too high after the warm-up.

    Prediction
        `update_ratio` of the first steps falls; no spike in the first tenth of the run.

    Sources
        Goyal et al. 2017, arXiv:1706.02677; Gilmer et al. 2021, arXiv:2110.04369; Ma & Yarats 2021, arXiv:1910.04209 (2
        / (1 - beta2) steps for Adam, at most a fifth of the run here).
    """

    treats: ClassVar[tuple[str, ...]] = ("post-norm-transformer", "learning-rate-too-high", "stale-second-moment")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_ratio", "down")

    steps: int = 100

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        yield cls(steps=min(2000, max(10, history.num_steps // 5)))

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.ScheduleLearningRate(shape="warm-up", steps=self.steps),)

    def code(self, history: History) -> str:
        return (
            "warm_up = torch.optim.lr_scheduler.LinearLR(\n"
            f"    optimizer, start_factor={1 / self.steps:g}, total_iters={self.steps}\n"
            ")\n\n"
            "optimizer.step()\n"
            "warm_up.step()  # after every step"
        )

    def keras_code(self, history: History) -> str:
        lr = rate_in_words(history)
        return (
            "warm_up = keras.optimizers.schedules.PolynomialDecay(\n"
            f"    {lr} / {self.steps}, {self.steps}, end_learning_rate={lr}\n"
            ")\n"
            f"{history.subject}.optimizer.learning_rate = warm_up  # after compile, before fit"
        )
