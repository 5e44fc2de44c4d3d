"""How alike the rows of each layer's output are, over depth: samples, nodes or tokens that can no longer be told apart.

1 - c, with c the mean cosine between two rows, is what is left to tell them apart. Averaging over rows and layers in
the ordered phase both shrink it by a factor per layer (Dong et al. 2021; Schoenholz et al. 2017), so its logarithm is
what is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isograd._depth import WEIGHTED, chosen, columns_of
from isograd._history import Floats, History
from isograd._robust import median

READS = ("row_similarity",)
"""The statistics that `merging` reads."""

RESOLUTION = 1e-7
"""The least 1 - c that float32 can show."""


@dataclass(frozen=True, kw_only=True)
class Merging:
    """One reading. `columns` index the layers with weights from input to loss; `difference` is 1 - c of each."""

    step: int
    columns: NDArray[np.int64]
    difference: Floats

    @property
    def shallow(self) -> float:
        """What tells rows apart where they are most different in the first third of the layers."""
        return float(np.nanmax(self.difference[: max(2, len(self.difference) // 3)], initial=RESOLUTION))

    @property
    def deep(self) -> float:
        """The same, typically, in the last third without the last layer, whose few outputs may well be alike."""
        inner = self.difference[:-1]
        return median(inner[-max(1, len(inner) // 3) :])

    @property
    def decades(self) -> float:
        """Decades of difference between rows that are lost from the first third of the layers to the last."""
        return float(np.log10(self.shallow / self.deep))


def merging(history: History) -> list[Merging]:
    """What was read at some deep steps, in order; none under four layers with weights."""
    columns, series = columns_of(history, WEIGHTED), history.series.get("row_similarity")
    if series is None or len(columns) < 4:
        return []
    difference = np.clip(1 - series.values[:, columns], RESOLUTION, None)
    rows = chosen(np.flatnonzero(np.sum(np.isfinite(difference[:, :-1]), axis=1) >= 3))
    return [Merging(step=int(series.steps[row]), columns=columns, difference=difference[row]) for row in rows]
