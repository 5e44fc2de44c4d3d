"""parameters-unreached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class ParametersUnreached(Rule):
    """Parameters in the optimizer that no gradient reaches, though their layer takes part in the forward pass.

    Detects
        Trainable parameters that an optimizer holds and for which no gradient exists at any of `patience` steps or
        more, while others get one, in layers that were called; or an embedding of which whole samples, `padding` of
        them or more, hold nothing but the padding index, in a run whose loss stays flat above its floor.

    Why it matters
        detach, .item(), a detour over NumPy, argmax or no_grad cut the graph: everything before the cut stays as it
        was initialized, and no error says so. The row of an embedding's padding index gets no gradient either; if a
        real entity has that number, it is never learned.

    Decided by
        patience: 10 steps. An absent gradient has no threshold. padding: 0.01 of the samples. solved:
        a loss that ends flat below a fall of 0.95 of its start has something left that it does not learn.

    Stays silent when
        A gradient arrived once, the layer was never called (a branch that the program does not use), the parameter is
        frozen, or padding fills the rest of sequences that hold something else.

    Remedies
        reconnect-graph

    References
        PyTorch documentation of Tensor.detach and of Embedding (padding_idx); ibalazevic/TuckER, issue 17.
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("grad_max",)
    uses: ClassVar[tuple[str, ...]] = ("grad_nonfinite", "loss", "loss_nonfinite", "padding_fraction")
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "loss-plateau", "vanishing-gradients")
    remedies: ClassVar[tuple[str, ...]] = ("reconnect-graph",)

    patience: int = 10
    padding: float = 0.01
    solved: float = 0.95

    def check(self, history: History) -> Iterator[Finding]:
        absent = self._absent(history)
        if absent is not None and len(history["grad_max"]) >= self.patience:
            columns = [int(i) for i in np.flatnonzero(absent) if self._was_called(history, int(i))]
            if columns:
                yield self._cut_off(history, columns)
        yield from self._padded(history)

    def _absent(self, history: History) -> NDArray[np.bool_] | None:
        """[P]: optimized parameters without any gradient; None where no parameter has one, or all have."""
        largest, bad = history["grad_max"].values, history.series.get("grad_nonfinite")
        there = ~np.isnan(largest)
        if bad is not None and bad.values.shape == there.shape:
            there |= bad.values > 0
        held = np.array([p.trainable and p.optimized for p in history.parameters], dtype=bool)
        absent = held & ~there.any(axis=0)
        return absent if absent.any() and (held & ~absent).any() else None

    def _was_called(self, history: History, index: int) -> bool:
        owner = history.parameters[index].layer
        return any(layer.name == owner and np.isfinite(layer.position) for layer in history.layers)

    def _cut_off(self, history: History, columns: list[int]) -> Finding:
        names = tuple(history.parameters[i].name for i in columns)
        steps = history["grad_max"].steps
        return self.finding(
            history,
            level="warning",
            message=f"No gradient exists for {len(names)} of {len(history.parameters)} parameters, {names[0]} first, "
            f"in {len(steps)} steps, though their layers are called: the graph is cut behind them.",
            first_step=int(steps[0]),
            layers=names,
            evidence=(
                Evidence(
                    statistic="steps_with_gradient",
                    observed=0.0,
                    limit=0.0,
                    step=int(steps[-1]),
                    layer=names[0],
                    below=True,
                ),
            ),
            confidence=0.85,
        )

    def _padded(self, history: History) -> Iterator[Finding]:
        series, curve = history.series.get("padding_fraction"), loss_curve(history)
        if series is None or not len(series) or curve is None or not (curve.flat and curve.share < self.solved):
            return
        known = np.where(np.isfinite(series.values), series.values, 0.0)
        # The typical share among the readings that had one: padding may be rare.
        shares = np.mean(known, axis=0)
        if not shares.size or float(shares.max()) < self.padding:
            return
        column = int(np.argmax(shares))
        name, share, step = history.layers[column].name, float(shares[column]), int(series.steps[0])
        yield self.finding(
            history,
            level="warning",
            message=f"{100 * share:.2g} % of the samples that enter {name} hold nothing but its padding index (limit "
            f"{100 * self.padding:g} %): that row of the embedding gets no gradient, and the loss stays at "
            f"{curve.end:.4g}.",
            first_step=step,
            layers=(name,),
            evidence=(
                Evidence(statistic="padding_fraction", observed=share, limit=self.padding, step=step, layer=name),
            ),
            confidence=0.7,
        )
