"""`change-optimizer`: a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import optimizer_name
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding

_KNOWN = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta")


@dataclass(frozen=True, kw_only=True)
class ChangeOptimizer(Remedy):
    """Step with another optimizer.

    What it does
        The program's optimizer object stays; its step is taken by torch's `optimizer` with learning rate `lr` (0: the
        program's own rate).

    When it helps
        Layers whose gradients differ by orders of magnitude (Adam, RMSprop, Adagrad normalize each entry); noise and
        ravines (momentum); generalization (SGD with momentum).

    Risks
        Rates do not carry over between optimizers. An adaptive optimizer hides vanishing gradients until they reach its
        epsilon.

    Prediction
        `update_ratio` becomes alike over layers.

    Sources
        Kingma & Ba 2015, arXiv:1412.6980 (1e-3); Duchi et al. 2011; Tieleman & Hinton 2012; Loshchilov & Hutter 2019.
    """

    treats: ClassVar[tuple[str, ...]] = ("learning-rate-too-low", "saturating-activations", "initialization-too-small")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_ratio", "up")

    optimizer: str = "Adam"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.optimizer not in _KNOWN:
            raise ValueError(f"change-optimizer: optimizer is one of {', '.join(_KNOWN)}, not {self.optimizer!r}")

    @classmethod
    def candidates(cls, history: History, cause: Finding | None = None) -> Iterator[Remedy]:
        if optimizer_name(history) != "Adam":
            yield cls()
        else:
            yield cls(optimizer="SGD", lr=0.01)

    def changes(self, history: History) -> tuple[Change, ...]:
        if self.optimizer == optimizer_name(history):
            raise Inapplicable(f"The program steps with {self.optimizer} already.")
        rate = (("lr", self.lr),) if self.lr else ()
        momentum = (("momentum", 0.9),) if self.optimizer == "SGD" else ()
        return (_changes.ReplaceOptimizer(optimizer=self.optimizer, hyperparameters=(*rate, *momentum)),)

    def code(self, history: History) -> str:
        momentum = ", momentum=0.9" if self.optimizer == "SGD" else ""
        rate = f", lr={self.lr:g}" if self.lr else ""
        return f"optimizer = torch.optim.{self.optimizer}({history.subject}.parameters(){rate}{momentum})"

    def keras_code(self, history: History) -> str:
        name = "Nadam" if self.optimizer == "NAdam" else self.optimizer
        if name == "RAdam":
            return "# Keras has no RAdam; Adam with a warm-up does the same (arXiv:1910.04209)"
        momentum = ", momentum=0.9" if name == "SGD" else ""
        rate = f"learning_rate={self.lr:g}" if self.lr else "learning_rate=lr"
        return (
            f"optimizer = keras.optimizers.{name}({rate}{momentum})\n"
            f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)"
        )
