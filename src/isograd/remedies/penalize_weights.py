"""`penalize-weights`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class PenalizeWeights(Remedy):
    """Add an L1 or L2 penalty on the weights to the loss.

    What it does
        g <- g + l1 sign(w) + l2 w for every weight with two axes or more; biases and normalization are left alone.

    When it helps
        Weights that grow without bound over a long run; sparsity (L1).

    Risks
        It works slowly and indirectly, and shrinks weights that were right. It does not cure vanishing or exploding
        gradients.

    Prediction
        `weight_norm` falls.

    Sources
        Krogh & Hertz 1992; Loshchilov & Hutter 2019, arXiv:1711.05101 (under Adam, L2 is not weight decay).
    """

    treats: ClassVar[tuple[str, ...]] = ("recurrent-explosion",)
    applicability: ClassVar[Applicability] = "opt-in"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("weight_norm", "down")

    l1: float = 0.0
    l2: float = 1e-4

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.PenalizeWeights(l1=self.l1, l2=self.l2),)

    def code(self, history: History) -> str:
        terms = [f"{self.l1:g} * w.abs().sum()"] if self.l1 else []
        terms += [f"{self.l2:g} / 2 * w.square().sum()"] if self.l2 else []
        return (
            f"weights = [p for p in {history.subject}.parameters() if p.dim() > 1]\n"
            f"penalty = sum({' + '.join(terms) or '0.0'} for w in weights)\n"
            "(loss + penalty).backward()"
        )

    def keras_code(self, history: History) -> str:
        return (
            f"for variable in {history.subject}.trainable_variables:\n"
            "    if len(variable.shape) > 1:  # once the model is built\n"
            f"        variable.regularizer = keras.regularizers.L1L2({self.l1:g}, {self.l2 / 2:g})"
        )
