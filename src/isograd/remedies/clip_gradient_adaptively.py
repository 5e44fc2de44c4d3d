"""`clip-gradient-adaptively`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import keras_optimizer, rate_in_words
from isograd._remedy import Remedy


@dataclass(frozen=True, kw_only=True)
class ClipGradientAdaptively(Remedy):
    """Clip each unit's gradient to a share of the norm of its weights (adaptive gradient clipping).

    What it does
        For each output unit i: g_i <- g_i ratio max(|W_i|, 1e-3) / |g_i| where that is shorter. The last layer is left
        out.

    When it helps
        Large rates and batches in networks without normalization; layers whose gradients are of very different scale.

    Risks
        Another hyperparameter, and a slower start where weights are small.

    Prediction
        `update_ratio` falls where it was largest.

    Sources
        Brock et al. 2021, arXiv:2102.06171 (ratio 0.01, epsilon 1e-3).
    """

    treats: ClassVar[tuple[str, ...]] = ("learning-rate-too-high", "initialization-too-large")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_ratio", "down")

    ratio: float = 0.01

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.ClipGradients(method="adaptive", limit=self.ratio),)

    def code(self, history: History) -> str:
        return (
            "loss.backward()\n"
            f"weights = [p for p in {history.subject}.parameters() if p.dim() > 1][:-1]\n"
            "for w in [w for w in weights if w.grad is not None]:\n"
            "    axes = tuple(range(1, w.dim()))\n"
            f"    limit = {self.ratio:g} * w.detach().norm(dim=axes, keepdim=True)\n"
            "    norm = w.grad.norm(dim=axes, keepdim=True).clamp_min(1e-12)\n"
            f"    w.grad.mul_((limit.clamp_min({self.ratio * 1e-3:g}) / norm).clamp_max(1.0))\n"
            "optimizer.step()"
        )

    def keras_code(self, history: History) -> str:
        return (
            f"class Clipped(keras.optimizers.{keras_optimizer(history)}):\n"
            "    def apply(self, grads, variables=None):\n"
            "        pairs = zip(grads, variables or self._trainable_variables)\n"
            "        super().apply([clipped(g, w) for g, w in pairs], variables)\n\n\n"
            "def clipped(grad, weights):\n"
            "    if len(weights.shape) < 2:\n"
            "        return grad\n"
            "    axes = tuple(range(len(weights.shape) - 1))\n"
            "    size = keras.ops.norm(weights, axis=axes, keepdims=True)\n"
            "    norm = keras.ops.norm(grad, axis=axes, keepdims=True)\n"
            f"    limit = {self.ratio:g} * keras.ops.maximum(size, 1e-3)\n"
            "    return grad * keras.ops.minimum(1.0, limit / (norm + 1e-12))\n\n\n"
            f"optimizer = Clipped(learning_rate={rate_in_words(history)})\n"
            f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)"
        )
