"""`unfreeze-parameters`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class UnfreezeParameters(Remedy):
    """Train the frozen parameters.

    What it does
        `requires_grad_(True)` on what the run needs, and a parameter group for it, often at a tenth of the rate.

    When it helps
        Nothing that can move fits the data.

    Risks
        Pretrained features may be lost: use a small rate.

    Prediction
        `update_norm` of the layers is above 0.

    Sources
        Howard & Ruder 2018, arXiv:1801.06146 (gradual unfreezing, discriminative rates).
    """

    treats: ClassVar[tuple[str, ...]] = ("frozen-parameters",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("update_norm", "up")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return (
            "backbone.requires_grad_(True)\n"
            'optimizer.add_param_group({"params": backbone.parameters(), "lr": 0.1 * lr})'
        )

    def keras_code(self, history: History) -> str:
        return (
            "backbone.trainable = True\n"
            "# Keras takes notice of it in compile:\n"
            "optimizer = keras.optimizers.Adam(learning_rate=0.1 * lr)\n"
            f"{history.subject}.compile(optimizer=optimizer, loss={history.subject}.loss)"
        )
