"""batch-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import columns_of
from isograd._history import Floats, History, Layer
from isograd._loss_curve import loss_curve
from isograd._robust import median
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class BatchStatistics(Rule):
    """Batch normalization over too few values, or over batches that are too unlike each other.

    Detects
        Batch normalization in training mode whose statistics come from at most `values` values per channel (batch
        times positions: output_size / (calls x channels)) in half of the deep readings or more. Or, over more values
        than that, batch means that lie `gap` / sqrt(B) standard deviations away from the running means
        (batch_statistics_gap, B samples in the batch), 0.5 at least, in the typical reading of the second half of the
        run.

    Why it matters
        Two values per channel become +1 and -1 whatever they were, and the gradient through them is zero up to
        epsilon: layers before learn nothing. With three, of three degrees of freedom one is left. Batches unlike each
        other (sorted by class, from different sources) let the normalization give the answer away in training, and
        the running statistics fit none of them in evaluation.

    Decided by
        values: 3; the gradient's growth through batch normalization diverges there (Yang et al. 2019, theorem 8 has
        B - 3 in its denominator). Batches of 8 are usable, and a convolution at batch 2 over 16 x 16 positions has
        512 values.
        gap: 3. Means over B independent samples lie 1 / sqrt(B) away, positions within a sample make it less; what
        is three times as far in the typical batch is no chance.

    Stays silent when
        The layer uses its running statistics (evaluation mode, as in fine-tuning with small batches), or one batch of
        many is small. Unlike batches are info, never an alarm, while the loss falls.

    Remedies
        insert-normalization, raise-batch-size, shuffle-data

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167; Wu & He 2018, Group normalization, arXiv:1803.08494 (error over batch
        size); Yang et al. 2019, A mean field theory of batch normalization, arXiv:1902.08129; Wu & Johnson 2021,
        Rethinking "batch" in BatchNorm, arXiv:2105.07576.
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("batch_statistics_gap", "output_size", "calls")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "vanishing-gradients",
        "exploding-gradients",
        "loss-plateau",
        "loss-oscillation",
        "no-gradient",
    )
    remedies: ClassVar[tuple[str, ...]] = ("insert-normalization", "raise-batch-size", "shuffle-data")

    values: float = 3.0
    gap: float = 3.0

    def check(self, history: History) -> Iterator[Finding]:
        columns = columns_of(history, frozenset({"batch-norm"}))
        gaps, sizes = history["batch_statistics_gap"], history["output_size"]
        if not len(columns) or len({s.values.shape for s in (gaps, sizes, history["calls"])}) > 1:
            return
        training = np.isfinite(gaps.values[:, columns])
        counts = np.where(training, self._counts(history, columns), np.nan)
        yield from self._too_few(history, columns, counts)
        yield from self._too_unlike(history, columns, np.where(counts > self.values, gaps.values[:, columns], np.nan))

    def _counts(self, history: History, columns: NDArray[np.int64]) -> Floats:
        """[S, N]: over how many values each layer's statistics go."""
        units = np.array([max(1, history.layers[index].units) for index in columns], dtype=float)
        calls = np.maximum(history["calls"].values[:, columns], 1)
        return np.asarray(history["output_size"].values[:, columns] / (calls * units))

    def _expected(self, layer: Layer) -> float:
        batch = layer.shape[0] if layer.shape else 1
        return max(0.5, self.gap / float(np.sqrt(max(1, batch))))

    def _too_few(self, history: History, columns: NDArray[np.int64], counts: Floats) -> Iterator[Finding]:
        few = counts <= self.values
        most = 2 * few.sum(axis=0) >= np.maximum(1, np.isfinite(counts).sum(axis=0))
        hit = np.flatnonzero(most & few.any(axis=0))
        if not len(hit):
            return
        smallest = min((int(index) for index in hit), key=lambda index: median(counts[:, index]))
        row = int(np.flatnonzero(few[:, smallest])[0])
        step, name = int(history["output_size"].steps[row]), history.layers[columns[smallest]].name
        others = f", as {'does' if len(hit) == 2 else 'do'} {len(hit) - 1} more" if len(hit) > 1 else ""
        curve = loss_curve(history)
        yield self.finding(
            history,
            level="error" if curve is not None and curve.failed and curve.share < 0.1 else "warning",
            message=f"{name} normalizes over {counts[row, smallest]:.0f} values per channel at step {step} (limit "
            f"{self.values:g}){others}: so few say little about the data, and two of them nothing.",
            first_step=step,
            layers=tuple(history.layers[columns[i]].name for i in (smallest, *(int(j) for j in hit if j != smallest))),
            evidence=(
                Evidence(
                    statistic="values_per_channel",
                    observed=float(counts[row, smallest]),
                    limit=self.values,
                    step=step,
                    layer=name,
                    below=True,
                ),
            ),
            confidence=0.85,
        )

    def _too_unlike(self, history: History, columns: NDArray[np.int64], gaps: Floats) -> Iterator[Finding]:
        late = gaps[len(gaps) // 2 :]
        typical = np.array([median(column) for column in late.T])
        limits = np.array([self._expected(history.layers[index]) for index in columns])
        hit = np.flatnonzero((typical >= limits) & (np.isfinite(late).sum(axis=0) >= 4))
        if not len(hit):
            return
        worst = int(hit[np.argmax((typical / limits)[hit])])
        name, curve = history.layers[columns[worst]].name, loss_curve(history)
        step = int(history["batch_statistics_gap"].steps[len(gaps) // 2])
        yield self.finding(
            history,
            level="warning" if curve is not None and curve.failed else "info",
            message=f"The batches that {name} sees lie {typical[worst]:.2g} standard deviations from its running means "
            f"(limit {limits[worst]:.2g}), still in the second half of the run, from step {step}.",
            first_step=step,
            layers=tuple(history.layers[columns[index]].name for index in hit),
            evidence=(
                Evidence(
                    statistic="batch_statistics_gap",
                    observed=float(typical[worst]),
                    limit=float(limits[worst]),
                    step=step,
                    layer=name,
                ),
            ),
            confidence=0.6,
        )
