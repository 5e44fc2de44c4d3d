"""`shuffle-data`: a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from isograd._changes import Change
from isograd._history import History
from isograd._remedy import Applicability, Remedy


@dataclass(frozen=True, kw_only=True)
class ShuffleData(Remedy):
    """Draw batches at random instead of in the order of the file.

    What it does
        Every batch becomes a sample of the whole training set.

    When it helps
        Batches of one class or one source each: their statistics are not those of the data.

    Risks
        Series whose order matters are shuffled by whole windows.

    Prediction
        `batch_statistics_gap` falls to about 1 / sqrt(batch size).

    Sources
        Bengio 2012, arXiv:1206.5533, section 2; Ioffe 2017, arXiv:1702.03275 (unlike batches).
    """

    treats: ClassVar[tuple[str, ...]] = ("batch-statistics",)
    applicability: ClassVar[Applicability] = "advice"
    predicts: ClassVar[tuple[str, Literal["up", "down", "finite"]]] = ("batch_statistics_gap", "down")

    def changes(self, history: History) -> tuple[Change, ...]:
        del history
        return ()

    def code(self, history: History) -> str:
        del history
        return "loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True)"

    def keras_code(self, history: History) -> str:
        return f"{history.subject}.fit(x, y, shuffle=True)  # a tf.data.Dataset: dataset.shuffle(10_000)"
