"""attention-saturation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._history import Floats, History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._robust import median
from isograd._rule import Evidence, Finding, Level, Rule, Stage

SINGLE = 24 * math.log(2)
"""16.6: a logit that stands so far above the others gives them less than 2^-24, which float32 rounds away next to 1."""


@dataclass(frozen=True, kw_only=True)
class AttentionSaturation(Rule):
    """Attention logits grow until each query sees a single key, and no gradient passes through the softmax.

    Detects
        In the last quarter of the deep readings of an attention: largest logit |q k / sqrt(d)| at or above `logits`
        and entropy of the weights, as a share of that of uniform weights, at or below `entropy`. And the run failed,
        or the logits are beyond `broken`.

    Why it matters
        The derivative of a softmax is A (1 - A): at weights of 0 and 1 it is zero. Queries and keys stop learning
        where they are, which key is seen hangs on rounding, and a small step swaps it: the loss stalls or jumps.

    Decided by
        logits: 16.6 = 24 ln 2, the lead of one logit that leaves the others below the rounding of float32.
        entropy: 0.1 of log(keys).
        broken: 10000; every run of Wortsman et al. (2023) whose logits passed it diverged, and none did below 1000.

    Stays silent when
        Attention is sharp and the run learns: a head that looks up one position is meant to be sharp.

    Remedies
        normalize-queries-and-keys, lower-learning-rate, warm-up-learning-rate, decay-weights

    References
        Zhai et al. 2023, Stabilizing transformer training by preventing attention entropy collapse, arXiv:2303.06296;
        Wortsman et al. 2023, Small-scale proxies for large-scale transformer training instabilities,
        arXiv:2309.14322; Dehghani et al. 2023, Scaling vision transformers to 22 billion parameters,
        arXiv:2302.05442; Vaswani et al. 2017, arXiv:1706.03762 (division by sqrt(d)).
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("attention_entropy", "attention_logit_max")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "vanishing-gradients",
        "exploding-gradients",
        "loss-plateau",
        "loss-spike",
        "loss-oscillation",
        "loss-divergence",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "normalize-queries-and-keys",
        "lower-learning-rate",
        "warm-up-learning-rate",
        "decay-weights",
    )

    logits: float = 16.6
    entropy: float = 0.1
    broken: float = 10000.0

    def check(self, history: History) -> Iterator[Finding]:
        entropies, logits = history["attention_entropy"], history["attention_logit_max"]
        if entropies.values.shape != logits.values.shape:
            return
        curve = loss_curve(history)
        saturated = (entropies.values <= self.entropy) & (logits.values >= self.logits)
        ends = {column: self._end(logits.values[:, column]) for column in np.flatnonzero(saturated.any(axis=0))}
        hit = [c for c, end in ends.items() if self._is_lasting(saturated[:, c], entropies.values[:, c])]
        hit = [c for c in hit if (curve is not None and curve.failed) or ends[c] >= self.broken]
        if not hit:
            return
        worst = max(hit, key=lambda column: ends[column])
        first = int(entropies.steps[np.flatnonzero(saturated[:, hit].any(axis=1))[0]])
        row = int(np.flatnonzero(saturated[:, worst])[-1])
        step, name = int(entropies.steps[row]), history.layers[worst].name
        yield self.finding(
            history,
            level=self._level(curve),
            message=f"The attention of {name} is saturated since step {first}: logits up to "
            f"{logits.values[row, worst]:.3g} (limit {self.logits:g}; {self._start(logits.values[:, worst]):.2g} at "
            f"first), entropy {entropies.values[row, worst]:.2g} of uniform (limit {self.entropy:g}).",
            first_step=first,
            layers=tuple(history.layers[c].name for c in (worst, *(c for c in hit if c != worst))),
            evidence=(
                Evidence(
                    statistic="attention_entropy",
                    observed=float(entropies.values[row, worst]),
                    limit=self.entropy,
                    step=step,
                    layer=name,
                    below=True,
                ),
                Evidence(
                    statistic="attention_logit_max",
                    observed=float(logits.values[row, worst]),
                    limit=self.logits,
                    step=step,
                    layer=name,
                ),
            ),
            confidence=0.75,
        )

    def _is_lasting(self, saturated: NDArray[np.bool_], entropy: Floats) -> bool:
        """Whether most of the last quarter of the readings, two at least, are saturated."""
        late = saturated[np.isfinite(entropy)]
        late = late[-max(2, len(late) // 4) :]
        return len(late) >= 2 and 2 * int(np.sum(late)) > len(late)

    def _start(self, values: Floats) -> float:
        known = values[np.isfinite(values)]
        return float(known[0]) if len(known) else float("nan")

    def _end(self, values: Floats) -> float:
        known = values[np.isfinite(values)]
        return median(known[-max(2, len(known) // 4) :])

    def _level(self, curve: LossCurve | None) -> Level:
        if curve is None or not curve.failed:
            return "warning"
        return "error" if curve.lost or curve.share < 0.1 else "warning"
