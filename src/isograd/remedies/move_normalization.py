"""`move-normalization`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class MoveNormalization(Remedy):
    """Normalize before each block instead of after it (pre-norm).

    What it does
        x + f(norm(x)) leaves the residual path free from the input to the loss; one normalization stands at the end.

    When it helps
        Post-norm blocks without warm-up.

    Risks
        A slightly worse optimum has been reported where post-norm trains (with warm-up).

    Prediction
        `signal_norm` of the last block no longer dominates at the start.

    Sources
        Xiong et al. 2020, arXiv:2002.04745; Liu et al. 2020, arXiv:2004.08249.
    """

    treats: ClassVar[tuple[str, ...]] = ("post-norm-transformer",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("signal_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return (
            "layer = torch.nn.TransformerEncoderLayer(width, num_heads, norm_first=True)\n"
            "x = x + self.attention(self.norm1(x))  # in a block of your own\n"
            "x = x + self.feedforward(self.norm2(x))"
        )

    def keras_code(self, history: History) -> str:
        del history
        return (
            "y = keras.layers.LayerNormalization()(x)\n"
            "x = x + keras.layers.MultiHeadAttention(num_heads, key_dim)(y, y)\n"
            "y = keras.layers.LayerNormalization()(x)\n"
            "x = x + feedforward(y)"
        )
