"""`remove-layers`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class RemoveLayers(Remedy):
    """Use fewer message-passing layers.

    What it does
        Each layer averages over neighbors; two to four are usual.

    When it helps
        Representations of all nodes or tokens are equal before the last layer.

    Risks
        A node no longer sees what is farther away than the number of layers: shortcuts or jumping knowledge keep that.

    Prediction
        `row_similarity` of the last layers falls.

    Sources
        Li et al. 2018, arXiv:1801.07606; Xu et al. 2018, arXiv:1806.03536; Chen et al. 2020, arXiv:2007.02133.
    """

    treats: ClassVar[tuple[str, ...]] = ("oversmoothing",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("row_similarity", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return "layers = layers[:2]\n# or the initial residual of GCNII: h = layer(h) + alpha * h0"

    def keras_code(self, history: History) -> str:
        del history
        return "# drop layers from the end of the stack, but for the output:\nx = blocks[1](blocks[0](x))"
