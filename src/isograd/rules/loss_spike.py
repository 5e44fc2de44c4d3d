"""loss-spike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._robust import Floats, excess, log10_positive, longest_run, median_mad
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LossSpike(Rule):
    """The loss leaves its own recent range upwards and comes back.

    Detects
        z = (log10 loss - median) / (1.48 MAD), of the loss itself where it is not always positive, over the `width`
        steps before, the tested step and flagged steps left out, above `sigmas`, with a height above the median of at
        least `height` of the median's own size. Consecutive flagged steps are one spike; one that does not end is
        loss-divergence.

    Why it matters
        A spike is a step that the model did not survive unharmed. One is a curiosity; many announce divergence.

    Decided by
        width 128 and sigmas 6: the skip-step optimizer of OLMo-core. height 0.5: half as much again, so that a
        loss of tiny noise is not accused of tiny steps. A spike is info: what it costs is said by its cause.

    Stays silent when
        Fewer than 8 steps are known, the loss is still in its first steep fall, or noise alone explains the height.

    Remedies
        skip-bad-steps, clip-gradient-by-history, lower-learning-rate, stabilize-optimizer

    References
        Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5.1; Molybog et al. 2023, A theory on Adam instability
        in large-scale machine learning, arXiv:2304.09871; Wortsman et al. 2023, Small-scale proxies,
        arXiv:2309.14322.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    remedies: ClassVar[tuple[str, ...]] = (
        "skip-bad-steps",
        "clip-gradient-by-history",
        "lower-learning-rate",
        "stabilize-optimizer",
    )

    width: int = 128
    sigmas: float = 6.0
    height: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        series = history["loss"]
        values = series.values
        if values.ndim != 1 or np.isfinite(values).sum() < 16:
            return
        # Losses of one sign are judged by ratio, others by difference.
        judged = excess(
            log10_positive(values) if self._is_positive(values) else values, width=self.width, limit=self.sigmas
        )
        center = 10**judged.center if self._is_positive(values) else judged.center
        high = judged.flagged & (values - center >= self.height * np.abs(center))
        _, longest = longest_run(high)
        if not high.any() or high[-1] or longest > self.width // 2:
            return
        starts = np.flatnonzero(np.diff(np.concatenate([[0], high.astype(np.int8)])) == 1)
        worst = int(np.argmax(np.where(high, np.nan_to_num(judged.z, nan=-np.inf), -np.inf)))
        usual, spread = median_mad(values)
        yield self.finding(
            history,
            level="info",
            message=f"{len(starts)} loss {'spike' if len(starts) == 1 else 'spikes'}, the largest at step "
            f"{int(series.steps[worst])}: {values[worst]:.4g} against a usual {center[worst]:.4g} "
            f"({judged.z[worst]:.3g} sigma, limit {self.sigmas:g}). Over the run: {usual:.4g} +- {spread:.2g}.",
            first_step=int(series.steps[starts[0]]),
            last_step=int(series.steps[np.flatnonzero(high)[-1]]),
            evidence=(
                Evidence(
                    statistic="loss_sigmas",
                    observed=float(judged.z[worst]),
                    limit=self.sigmas,
                    step=int(series.steps[worst]),
                ),
            ),
            confidence=0.6,
        )

    def _is_positive(self, values: Floats) -> bool:
        return bool(np.all(values[np.isfinite(values)] > 0))
