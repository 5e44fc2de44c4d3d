"""`raise-batch-size`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class RaiseBatchSize(Remedy):
    """Use larger batches, or a normalization that does not look at the batch.

    What it does
        More samples enter each mean and variance; group or layer normalization needs none.

    When it helps
        Batch normalization over one or a few values per channel.

    Risks
        Memory. Accumulating micro-batches does not help: each is normalized alone.

    Prediction
        `batch_statistics_gap` falls.

    Sources
        Wu & He 2018, arXiv:1803.08494 (figure 1: the error of batch normalization rises below 16 samples).
    """

    treats: ClassVar[tuple[str, ...]] = ("batch-statistics",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("batch_statistics_gap", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return "loader = torch.utils.data.DataLoader(\n    dataset, batch_size=32, shuffle=True, drop_last=True\n)"

    def keras_code(self, history: History) -> str:
        return f"{history.subject}.fit(x, y, batch_size=32)"
