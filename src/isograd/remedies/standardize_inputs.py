"""`standardize-inputs`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd import _changes
from isograd._changes import Change
from isograd._history import History
from isograd._program import is_seen
from isograd._remedy import Inapplicable, Remedy


@dataclass(frozen=True, kw_only=True)
class StandardizeInputs(Remedy):
    """Bring the inputs to mean 0 and standard deviation 1.

    What it does
        x <- (x - mean) / std per feature, with statistics of the first batches.

    When it helps
        Inputs far from unit scale (pixels 0-255, prices, coordinates), columns of very different scale.

    Risks
        The same statistics have to be used when the model is applied.

    Prediction
        `output_rms` of the first layers is about 1.

    Sources
        LeCun et al. 1998, Efficient BackProp, section 4.3.
    """

    treats: ClassVar[tuple[str, ...]] = ("unscaled-inputs", "saturating-activations", "invalid-operation")
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("output_rms", "down")

    batches: int = 8

    def changes(self, history: History) -> tuple[Change, ...]:
        if is_seen(history) and not any(layer.role == "input" and "float" in layer.type for layer in history.layers):
            raise Inapplicable("No floating-point input was seen to standardize.")
        return (_changes.StandardizeInputs(batches=self.batches),)

    def code(self, history: History) -> str:
        return (
            "# of the training set, and kept with the model:\n"
            "mean, std = inputs.mean(0), inputs.std(0).clamp_min(1e-8)\n"
            "inputs = (inputs - mean) / std"
        )

    def keras_code(self, history: History) -> str:
        return (
            "normalization = keras.layers.Normalization()\n"
            "normalization.adapt(x)  # of the training set; it is saved with the model\n"
            f"{history.subject} = keras.Sequential([normalization, {history.subject}])  # before compile"
        )
