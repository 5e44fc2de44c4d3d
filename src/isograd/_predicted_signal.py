"""What mean-field theory says of a recorded run's gradient signal over depth, from the weights as they stood first.

Only where a run's own facts say all that the theory asks for: one chain of fully connected layers with activations
between them whose form the run knows. Convolutions (their borders), normalizations, shortcuts, shared layers, dropout
(its rate is no reading) and activations with constants of their own (leaky ReLU, ELU, hardtanh, softplus) are left
alone: `isograd.preflight` has the model itself and covers them.
"""

from __future__ import annotations

import numpy as np

from isograd._depth import ACTIVATIONS, NORMALIZATIONS, columns_of, weight_parameters
from isograd._history import Floats, History, Integers
from isograd._loss_graph import loss_graphs
from isograd._mean_field import Moments, Stage, walk
from isograd._theory import KINDS, function_of

READS = ("weight_norm", "output_rms", "signal_norm", "calls")
"""The statistics that `predicted_signal` reads."""

_FORMS = KINDS - {"leaky-relu", "elu", "hardtanh", "softplus"}
_IDLE = frozenset({"identity", "flatten"})


def predicted_signal(history: History, columns: Integers) -> tuple[int, Floats] | None:
    """(step, gradient norm at the outputs of the layers `columns` in theory) at the first deep reading; None where the
    theory cannot tell. The level is that of the last layer's reading: theory tells ratios.

    Error: the ratio of neighbors is that of infinite width, off by about 1 / sqrt(width) in a layer as it was drawn.
    """
    chain = columns_of(history, frozenset({"linear"}))
    row = _first(history)
    if row is None or not _is_chain(history, chain, row):
        return None
    stages, start = _stages(history, chain, row)
    signal = history["signal_norm"].at(row)
    last = float("nan") if signal is None else float(signal[chain[-1]])
    if start is None or not stages or not 0 < last < np.inf:
        return None
    found = walk(stages, start=Moments(start**2, 0.0), how="sequence")
    theory = {layer.name: layer.signal * last for layer in found.weighted}
    names = [history.layers[index].name for index in columns]
    values = np.array([theory.get(name, np.nan) for name in names], dtype=np.float64)
    return (row, values) if np.isfinite(values).all() else None


def _first(history: History) -> int | None:
    """The step of the first deep reading, if it was made before anything was learned."""
    if any(name not in history for name in READS):
        return None
    step = int(history["weight_norm"].steps[0])
    return step if step == 0 and all(history[name].at(step) is not None for name in READS) else None


def _is_chain(history: History, chain: Integers, step: int) -> bool:
    """Whether the loss is computed through these layers one after the other, and nothing else in between."""
    graph = next(iter(loss_graphs(history)), None)
    if len(chain) < 3 or graph is None or graph.products != len(chain):
        return False
    if graph.shortcuts or graph.norms or graph.mixings:
        return False
    last = history.layers[chain[-1]].position
    between = [
        layer.kind
        for layer in history.layers
        if layer.role in ("module", "operation") and layer.position < last and layer.kind not in _IDLE
    ]
    calls = history["calls"].at(step)
    if calls is None or len({float(calls[index]) for index in chain}) != 1:
        return False
    return all(kind == "linear" or kind in _FORMS for kind in between) and not len(columns_of(history, NORMALIZATIONS))


def _stages(history: History, chain: Integers, step: int) -> tuple[list[Stage], float | None]:
    """The chain as the theory takes it, and the root mean square of what enters it; none where a weight is unknown."""
    norms, outputs = history["weight_norm"].at(step), history["output_rms"].at(step)
    inputs = [i for i, layer in enumerate(history.layers) if layer.role == "input"]
    if norms is None or outputs is None or len(inputs) != 1 or not np.isfinite(outputs[inputs[0]]):
        return [], None
    weights = {history.parameters[index].layer: index for index in weight_parameters(history)}
    stages = [Stage(name="input", kind="input")]
    between = {*chain.tolist(), *columns_of(history, ACTIVATIONS).tolist()}
    for index in sorted(between, key=lambda i: history.layers[i].position):
        layer, source = history.layers[index], (len(stages) - 1,)
        if layer.kind != "linear":
            stages.append(Stage(name=layer.name, kind="activation", sources=source, layer_kind=layer.kind,
                                function=function_of(layer.kind)))  # fmt: skip
            continue
        weight = weights.get(layer.name)
        if weight is None or len(history.parameters[weight].shape) != 2 or not np.isfinite(norms[weight]):
            return [], None
        biases = [
            float(norms[i]) ** 2 / max(1, p.size)
            for i, p in enumerate(history.parameters)
            if p.layer == layer.name and len(p.shape) == 1
        ]
        size, fan_in = history.parameters[weight].size, layer.fan_in or history.parameters[weight].shape[1]
        variance = float(norms[weight]) ** 2 / max(1, size) * fan_in
        bias = sum(biases) if np.isfinite(sum(biases)) else 0.0
        stages.append(
            Stage(name=layer.name, kind="linear", sources=source, weight_variance=variance, bias_variance=bias)
        )
        if index == chain[-1]:
            break
    return stages, float(outputs[inputs[0]])
