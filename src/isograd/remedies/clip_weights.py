"""`clip-weights`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class ClipWeights(Remedy):
    """Clamp every weight to [-limit, limit] after each step.

    What it does
        w <- min(limit, max(-limit, w)) for all trained weights.

    When it helps
        The critic of a Wasserstein GAN, for which it was made.

    Risks
        It limits weights, not gradients, and can itself make gradients vanish (small limit) or explode (Gulrajani et
        al. 2017, figure 1). Tried only where it is asked for.

    Prediction
        `weight_norm` stays bounded.

    Sources
        Arjovsky et al. 2017, arXiv:1701.07875 (0.01); Gulrajani et al. 2017, arXiv:1704.00028.
    """

    treats: ClassVar[tuple[str, ...]] = ("recurrent-explosion",)
    applicability: ClassVar[Applicability] = "opt-in"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("weight_norm", "down")

    limit: float = 1.0

    def changes(self, history: History) -> tuple[Change, ...]:
        return (_changes.ClampWeights(limit=self.limit),)

    def code(self, history: History) -> str:
        return (
            "optimizer.step()\n"
            "with torch.no_grad():\n"
            f"    for parameter in {history.subject}.parameters():\n"
            f"        parameter.clamp_(-{self.limit:g}, {self.limit:g})"
        )

    def keras_code(self, history: History) -> str:
        return (
            "def clamp(weights):\n"
            f"    return keras.ops.clip(weights, -{self.limit:g}, {self.limit:g})\n\n\n"
            f"for variable in {history.subject}.trainable_variables:\n"
            "    variable.constraint = clamp  # once the model is built"
        )
