"""no-gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class NoGradient(Rule):
    """Trainable parameters in the optimizer whose gradient is exactly zero, or absent, at every step seen.

    Detects
        max |g| is 0 or no gradient exists, at all of `patience` steps or more, for a trainable parameter that an
        optimizer holds. Also a whole model whose gradients have become exactly zero and stay so to the end although
        the loss has not come down.

    Why it matters
        Exactly zero is not small: no learning rate, no optimizer and no number of steps moves such a parameter. A
        detached graph, a layer that is never reached, units that are all off, or a derivative that is constant zero.

    Decided by
        patience: 10 steps before part of a model is called unreached; 3 are enough when all of it is.
        A gradient of exactly 0.0 has no threshold.

    Stays silent when
        The parameter is frozen or in no optimizer, got a gradient at any step (experts idle in a batch; residual
        branches scaled by a zero that moves at the first step), or the loss fell to where its derivative is zero. A
        bias that cancels out of the loss (a difference of two outputs of one network) while its weight learns is
        info, and a layer that was never called is info: the program does not use it.

    Remedies
        reinitialize-layers, remove-output-activation

    References
        Lu et al. 2019, Dying ReLU and initialization, arXiv:1903.06733; Bachlechner et al. 2020, ReZero is all you
        need, arXiv:2003.04887 (zero gradients at step 0 that are meant).
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("grad_max",)
    uses: ClassVar[tuple[str, ...]] = ("grad_nonfinite", "loss", "loss_nonfinite")
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers", "remove-output-activation")

    patience: int = 10

    def check(self, history: History) -> Iterator[Finding]:
        optimized = np.array([p.trainable and p.optimized for p in history.parameters], dtype=bool)
        received = self._received(history)
        if received is None or not optimized.any():
            return
        never = optimized & ~received.any(axis=0)
        everything = bool(never[optimized].all())
        if never.any() and len(received) >= (3 if everything else self.patience):
            yield self._never(history, never, everything=everything)
        elif not never.any() or not everything:
            yield from self._died(history, np.any(received[:, optimized], axis=1))

    def _received(self, history: History) -> NDArray[np.bool_] | None:
        """[S, P]: whether a gradient other than zero arrived; an entry that is NaN or Inf is one."""
        largest, bad = history.series.get("grad_max"), history.series.get("grad_nonfinite")
        if largest is None or not len(largest):
            return None
        received = largest.values > 0
        if bad is not None and bad.values.shape == received.shape:
            received = received | (bad.values > 0)
        return np.asarray(received)

    def _never(self, history: History, never: NDArray[np.bool_], *, everything: bool) -> Finding:
        columns = [int(index) for index in np.flatnonzero(never)]
        reached = [index for index in columns if self._matters(history, index, never)]
        level: Level = "error" if everything else "warning" if reached else "info"
        first = [*reached, *(i for i in columns if i not in reached)]
        names = tuple(history.parameters[i].name for i in first)
        steps = history.series["grad_max"].steps
        what = (
            "No parameter"
            if everything
            else f"{len(names)} of {len(history.parameters)} parameters, {names[0]} first, never"
        )
        unused = "" if reached else " Their layers were never called, or learn by their weights."
        return self.finding(
            history,
            level=level,
            message=f"{what} received a gradient other than exactly zero in {len(steps)} steps.{unused}",
            first_step=int(steps[0]),
            layers=names,
            evidence=(
                Evidence(
                    statistic="grad_max", observed=0.0, limit=0.0, step=int(steps[-1]), layer=names[0], below=True
                ),
            ),
            confidence=0.95 if everything else 0.8,
        )

    def _matters(self, history: History, index: int, never: NDArray[np.bool_]) -> bool:
        """Whether the layer that owns the parameter was called, and nothing else of it learns."""
        owner = history.parameters[index].layer
        called = next((np.isfinite(layer.position) for layer in history.layers if layer.name == owner), True)
        siblings = [i for i, p in enumerate(history.parameters) if owner and p.layer == owner and len(p.shape) >= 2]
        cancels = len(history.parameters[index].shape) < 2 and any(not never[i] for i in siblings)
        return bool(called) and not cancels

    def _died(self, history: History, alive: NDArray[np.bool_]) -> Iterator[Finding]:
        """All gradients zero from some step to the end, with a loss that is not near its best possible."""
        steps = history.series["grad_max"].steps
        last = int(np.flatnonzero(alive)[-1]) if alive.any() else -1
        silent, curve = len(alive) - 1 - last, loss_curve(history)
        if last < 0 or silent < self.patience or curve is None or curve.share >= 0.95:
            return
        died = int(steps[last + 1])
        yield self.finding(
            history,
            level="error",
            message=f"Every gradient is exactly zero from step {died} to the end, {silent} steps, while the "
            f"loss stays at "
            f"{curve.end:.4g}.",
            first_step=died,
            evidence=(Evidence(statistic="grad_max", observed=0.0, limit=0.0, step=died, below=True),),
            confidence=0.9,
        )
