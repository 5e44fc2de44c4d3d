"""`decay-weights`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import hyperparameter, is_seen
from isograd._remedy import Inapplicable, Remedy


@dataclass(frozen=True, kw_only=True)
class DecayWeights(Remedy):
    """Set the optimizer's weight decay.

    What it does
        Every step multiplies the weights with 1 - learning rate x weight decay (SGD: through the gradient).

    When it helps
        A decay that outweighs the gradient is lowered to a usual value. A run without any whose weights grow gets one.

    Risks
        Too strong, it shrinks the weights away; on biases and normalization it does no good.

    Prediction
        `weight_norm` stops shrinking (or growing).

    Sources
        Krogh & Hertz 1992; Loshchilov & Hutter 2019, arXiv:1711.05101; 5e-4 is He et al. 2016's order (1e-4), x5.
    """

    treats: ClassVar[tuple[str, ...]] = ("weight-decay-too-strong",)
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("weight_norm", "up")

    weight_decay: float = 5e-4

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and hyperparameter(history, "weight_decay") is None:
            raise Inapplicable("The optimizer has no weight decay to set.")
        return (_changes.SetHyperparameter(name="weight_decay", value=self.weight_decay),)

    def code(self, history: History) -> str:
        return f"for group in optimizer.param_groups:\n    group['weight_decay'] = {self.weight_decay:g}"

    def keras_code(self, history: History) -> str:
        return f"{history.subject}.optimizer.weight_decay = {self.weight_decay:g}  # after compile, before fit"
