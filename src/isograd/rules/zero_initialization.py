"""zero-initialization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import weight_parameters
from isograd._history import History
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class ZeroInitialization(Rule):
    """Weights in series start at zero: each waits for the other to move, and none ever does.

    Detects
        `tensors` or more trainable weights whose norm is exactly 0 at every deep reading and whose gradient is
        exactly 0 at every step, `patience` steps or more.

    Why it matters
        The gradient of A in B A x is B' g x', and that of B is g (A x)'. With both at zero each is exactly zero, for
        ever: a saddle that no optimizer leaves.

    Decided by
        tensors: 2, since one zero factor in a product is common practice and moves at the first step. patience: 3
        steps. A norm and a gradient of exactly 0.0 have no threshold.

    Stays silent when
        One factor is zero and the other is not (low-rank adapters, residual branches that start at zero, a
        classifier that starts at zero): the zero one gets a gradient at once. Or zero weights are frozen.

    Remedies
        reinitialize-layers

    References
        Hu et al. 2022, LoRA, arXiv:2106.09685 (one factor zero, the other random); Zhang, Dauphin & Ma 2019, Fixup
        initialization, arXiv:1901.09321 (zeros that are meant); Goodfellow, Bengio & Courville 2016, section 8.4.
    """

    stage: ClassVar[Stage] = "initialization"
    needs: ClassVar[tuple[str, ...]] = ("weight_norm", "grad_max")
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "loss-plateau", "vanishing-gradients", "dead-units")
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers",)

    tensors: int = 2
    patience: int = 3

    def check(self, history: History) -> Iterator[Finding]:
        norms, largest = history["weight_norm"], history["grad_max"]
        columns = [i for i in weight_parameters(history) if history.parameters[i].optimized]
        still = [i for i in columns if _always_zero(norms.values[:, i]) and _always_zero(largest.values[:, i])]
        if len(still) < self.tensors or len(largest) < self.patience:
            return
        names = tuple(history.parameters[i].name for i in still)
        step = int(norms.steps[0])
        yield self.finding(
            history,
            level="error",
            message=f"{len(names)} weights in series started at exactly 0, {names[0]} first, and in {len(largest)} "
            "steps none of them got a gradient other than 0: each waits for the other.",
            first_step=step,
            layers=names,
            evidence=(
                Evidence(statistic="weight_norm", observed=0.0, limit=0.0, step=step, layer=names[0], below=True),
                Evidence(statistic="grad_max", observed=0.0, limit=0.0, step=step, layer=names[0], below=True),
            ),
            confidence=0.95,
        )


def _always_zero(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bool:
    """Whether every reading is 0 and there was one."""
    known = values[~np.isnan(values)]
    return bool(len(known)) and not np.any(known)
