"""What the initialization does to the signal: each layer's weight scale at the start against the critical one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isograd._depth import ACTIVATIONS, NORMALIZATIONS, columns_of, weight_parameters
from isograd._history import Floats, History, Series
from isograd._loss_graph import loss_graphs
from isograd._robust import log10_positive, median
from isograd._theory import KINDS, critical_std

READS = ("weight_norm", "output_rms", "signal_norm")
"""The statistics that `initial_gain` reads."""

CALIBRATED = KINDS - {"sigmoid", "softplus"}
"""Activations whose critical weight scale is of order 1. A sigmoid would need sigma_w^2 >= 16 and saturates: there the
activation is to blame and not the scale of the weights."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A chain of layers as initialized, from the input to the loss. `columns` index `History.layers`.

    `ratios`: standard deviation of each layer's weights over the critical one for the activation before it (NaN for
    the first). `signal`: log10 norm of the gradient with respect to each output; `output`: log10 RMS of each output.
    """

    step: int
    columns: NDArray[np.int64]
    ratios: Floats
    signal: Floats
    output: Floats

    @property
    def ratio(self) -> float:
        """The typical layer's weight scale over the critical one."""
        return median(self.ratios)

    @property
    def predicted(self) -> float:
        """Decades that the weights' scale adds to the signal over the chain, in theory: sum of log10 ratios."""
        return float(np.nansum(np.log10(self.ratios)))

    @property
    def backward(self) -> float:
        """Decades that the gradient signal gains from the loss to the input; negative where it is lost."""
        return _span(self.signal[::-1])

    @property
    def forward(self) -> float:
        """Decades that the outputs gain from the input to the loss."""
        return _span(self.output)


def _span(values: Floats) -> float:
    known = values[np.isfinite(values)]
    edge = max(1, len(known) // 5)
    return float(np.median(known[-edge:]) - np.median(known[:edge])) if len(known) >= 3 else float("nan")


def initial_gain(history: History) -> Gain | None:
    """The chain at the first deep reading, or None: under three layers, a normalization between, or nothing read.

    None, too, where every other layer or more averages over rows (graph networks): the theory is one of rows that never
    meet, and what is lost there is not the weights' doing.
    """
    columns = columns_of(history, frozenset({"linear", "conv"}))
    if any(2 * graph.mixings >= len(columns) for graph in loss_graphs(history) if graph.mixings):
        return None
    norms, outputs = history.series.get("weight_norm"), history.series.get("output_rms")
    if len(columns) < 3 or norms is None or outputs is None or len(columns_of(history, NORMALIZATIONS)):
        return None
    row = _first_row(norms)
    if row is None:
        return None
    step = int(norms.steps[row])
    output = outputs.at(step)
    if output is None:
        return None
    signal = history.series["signal_norm"].at(step) if "signal_norm" in history.series else None
    return Gain(
        step=step,
        columns=columns,
        ratios=_ratios(history, columns, norms.values[row], output),
        signal=log10_positive(signal[columns]) if signal is not None else np.full(len(columns), np.nan),
        output=log10_positive(output[columns]),
    )


def _first_row(series: Series) -> int | None:
    """The first reading, if it was made while the weights were still near their initialization."""
    rows = np.flatnonzero(np.isfinite(series.values).any(axis=1))
    return int(rows[0]) if len(rows) and series.steps[rows[0]] <= series.steps[0] + 1 else None


def _ratios(history: History, columns: NDArray[np.int64], norms: Floats, output: Floats) -> Floats:
    owner = {history.parameters[index].layer: index for index in reversed(weight_parameters(history))}
    activations = columns_of(history, ACTIVATIONS)
    ratios = np.full(len(columns), np.nan)
    for place in range(1, len(columns)):
        before, here = history.layers[columns[place - 1]], history.layers[columns[place]]
        index = owner.get(here.name)
        kind = _between(history, activations, before.position, here.position)
        q = float(np.square(output[columns[place - 1]]))
        if index is None or kind not in CALIBRATED or not np.isfinite(q):
            continue
        parameter = history.parameters[index]
        fan_in = here.fan_in or parameter.size // max(1, history.units_of(parameter))
        std = float(norms[index]) / max(1, parameter.size) ** 0.5
        if std > 0 and fan_in > 0:
            ratios[place] = std / critical_std(kind, fan_in, _rounded(q))
    return ratios


def _between(history: History, activations: NDArray[np.int64], low: float, high: float) -> str:
    """The kind of the last activation between two positions, "identity" when there is none."""
    kinds = [history.layers[index].kind for index in activations if low < history.layers[index].position < high]
    return kinds[-1] if kinds else "identity"


def _rounded(q: float) -> float:
    # Two digits are enough for the theory and let its cache work; zero variance is the limit q -> 0.
    return float(f"{min(max(q, 1e-12), 1e12):.1e}")
