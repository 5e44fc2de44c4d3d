"""`schedule-learning-rate`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

from isograd import _changes
from isograd._changes import Change, ScheduleShape
from isograd._history import History
from isograd._program import first_learning_rate, largest_learning_rate
from isograd._remedy import Remedy
from isograd._rule import Finding


@dataclass(frozen=True, kw_only=True)
class ScheduleLearningRate(Remedy):
    """Follow another learning-rate schedule.

    What it does
        `shape`: constant (the largest rate that the program has set so far), or one of linear, step, exponential,
        inverse-sqrt, cosine, plateau: a factor on the program's own rate, from 1 to `end` over `steps`.

    When it helps
        A schedule that took the rate to nothing too early (constant, cosine); noise at the end that a falling rate
        averages.

    Risks
        A schedule fits one length of run.

    Prediction
        `learning_rate` follows the shape; `loss` falls further.

    Sources
        Robbins & Monro 1951; Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Vaswani et al. 2017 (inverse square
        root).
    """

    treats: ClassVar[tuple[str, ...]] = ("learning-rate-decayed", "learning-rate-too-high")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("loss", "down")

    shape: str = "cosine"
    steps: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        known = get_args(ScheduleShape)
        if self.shape not in known:
            raise ValueError(f"schedule-learning-rate: shape is one of {', '.join(known)}, not {self.shape!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        decayed = cause is not None and cause.name == "learning-rate-decayed"
        yield cls(shape="constant" if decayed else "cosine")

    def changes(self, history: History) -> tuple[Change, ...]:
        steps = self.steps or max(1, history.num_steps)
        return (_changes.ScheduleLearningRate(shape=cast("ScheduleShape", self.shape), steps=steps, end=self.end),)

    def code(self, history: History) -> str:
        if self.shape == "constant":
            rate = largest_learning_rate(history) or 0.0
            return f"# without the scheduler\nfor group in optimizer.param_groups:\n    group['lr'] = {rate:g}"
        steps = self.steps or max(1, history.num_steps)
        decay = max(self.end, 1e-3) ** (1 / steps)
        made = {
            "warm-up": f"LinearLR(optimizer, start_factor={1 / steps:g}, total_iters={steps})",
            "linear": f"LinearLR(optimizer, start_factor=1.0, end_factor={self.end:g}, total_iters={steps})",
            "step": f"StepLR(optimizer, step_size={steps}, gamma={self.end or 0.1:g})",
            "exponential": f"ExponentialLR(optimizer, gamma={decay:.6g})",
            "inverse-sqrt": f"LambdaLR(optimizer, lambda t: ({steps} / max({steps}, t + 1)) ** 0.5)",
            "cosine": f"CosineAnnealingLR(optimizer, T_max={steps})",
            "plateau": f"ReduceLROnPlateau(optimizer, factor={self.end or 0.1:g})",
        }[self.shape]
        step = "scheduler.step(loss)" if self.shape == "plateau" else "scheduler.step()"
        return f"scheduler = torch.optim.lr_scheduler.{made}\n\noptimizer.step()\n{step}  # after every step"

    def keras_code(self, history: History) -> str:
        steps = self.steps or max(1, history.num_steps)
        rate = first_learning_rate(history)
        lr = "lr" if rate is None else f"{rate:g}"
        if self.shape == "constant":
            return f"# without a schedule or callback\n{history.subject}.optimizer.learning_rate = {lr}"
        if self.shape == "plateau":
            made = f'keras.callbacks.ReduceLROnPlateau(\n    monitor="loss", factor={self.end or 0.1:g}\n)'
            return f"plateau = {made}\n{history.subject}.fit(x, y, callbacks=[plateau])"
        if self.shape == "inverse-sqrt":
            return (
                "class InverseSqrt(keras.optimizers.schedules.LearningRateSchedule):\n"
                "    def __call__(self, step):\n"
                f'        later = keras.ops.maximum({steps}.0, keras.ops.cast(step, "float32") + 1)\n'
                f"        return {lr} * keras.ops.sqrt({steps} / later)\n\n\n"
                f"{history.subject}.optimizer.learning_rate = InverseSqrt()  # before fit"
            )
        made = {
            "warm-up": f"PolynomialDecay(\n    {lr} / {steps}, {steps}, end_learning_rate={lr}\n)",
            "linear": f"PolynomialDecay(\n    {lr}, {steps}, end_learning_rate={self.end:g} * {lr}\n)",
            "step": f"ExponentialDecay(\n    {lr}, {steps}, {self.end or 0.1:g}, staircase=True\n)",
            "exponential": f"ExponentialDecay(\n    {lr}, {steps}, {max(self.end, 1e-3):g}\n)",
            "cosine": f"CosineDecay(\n    {lr}, {steps}, alpha={self.end:g}\n)",
        }[self.shape]
        return (
            f"schedule = keras.optimizers.schedules.{made}\n"
            f"{history.subject}.optimizer.learning_rate = schedule  # before fit"
        )
