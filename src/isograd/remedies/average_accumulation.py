"""`average-accumulation`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import keras_optimizer, rate_in_words
from isograd._remedy import Inapplicable, Remedy


@dataclass(frozen=True, kw_only=True)
class AverageAccumulation(Remedy):
    """Divide accumulated gradients by the number of micro-batches.

    What it does
        Before the step, gradients are divided by the number of backward passes since the last one.

    When it helps
        Accumulation over k micro-batches that sums: the gradient, and with SGD the step, is k times too large.

    Risks
        Where the rate was tuned for the sum, it has to be raised.

    Prediction
        `global_grad_norm` falls by the number of micro-batches.

    Sources
        Goyal et al. 2017, arXiv:1706.02677, section 3; huggingface/transformers#34191.
    """

    treats: ClassVar[tuple[str, ...]] = ("accumulation-not-averaged",)
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("global_grad_norm", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        if "micro_batches" in history and not (history["micro_batches"].values > 1).any():
            raise Inapplicable("Every step has one backward pass: nothing is accumulated.")
        return (_changes.AverageAccumulation(),)

    def code(self, history: History) -> str:
        del history
        return "(loss / num_micro_batches).backward()"

    def keras_code(self, history: History) -> str:
        return (
            "# Keras averages over the steps itself, where the optimizer accumulates:\n"
            f"optimizer = keras.optimizers.{keras_optimizer(history)}(\n"
            f"    learning_rate={rate_in_words(history)}, gradient_accumulation_steps=4\n"
            ")\n"
            f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)"
        )
