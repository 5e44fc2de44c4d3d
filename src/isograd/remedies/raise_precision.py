"""`raise-precision`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import is_seen
from isograd._remedy import Inapplicable, Remedy


@dataclass(frozen=True, kw_only=True)
class RaisePrecision(Remedy):
    """Hold weights and compute in float32.

    What it does
        Weights and buffers in half precision become float32, and so do the inputs.

    When it helps
        Values beyond float16's range (6e-8 to 65504), updates rounded away in bfloat16 (|update| < 2^-9 |w|), epsilon =
        0.

    Risks
        Twice the memory, and slower on accelerators. Mixed precision (float32 weights, autocast) keeps most of the
        speed.

    Prediction
        `output_nonfinite` and `grad_nonfinite` are 0; all weights move.

    Sources
        Micikevicius et al. 2018, arXiv:1710.03740; pytorch/ao#1124.
    """

    treats: ClassVar[tuple[str, ...]] = (
        "precision-overflow",
        "precision-underflow",
        "update-below-precision",
        "epsilon-too-small",
    )
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("grad_nonfinite", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        types = {parameter.dtype for parameter in history.parameters} | {layer.dtype for layer in history.layers}
        if is_seen(history) and not types & {"float16", "bfloat16"}:
            raise Inapplicable("Weights and outputs are in float32 or wider already.")
        return (_changes.RaisePrecision(),)

    def code(self, history: History) -> str:
        return (
            f"# and remove .half() and .bfloat16() from the inputs; autocast keeps the speed\n{history.subject}.float()"
        )

    def keras_code(self, history: History) -> str:
        del history
        return 'keras.config.set_dtype_policy("float32")  # before the model is made'
