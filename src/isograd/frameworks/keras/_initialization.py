"""Draw a model's weights afresh with the initializers of Keras, from a seed of their own: the generators of the program
stand where they stood. Which gain a layer needs is decided by the activation behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import keras
import numpy as np
from keras import initializers, layers

from isograd import _changes
from isograd._changes import CannotApply
from isograd._theory import critical_variances
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras._model_changes import activation_kind
from isograd.frameworks.keras._site import WEIGHTED, Effect, Site, output_of

_RECTIFIERS = ("relu", "leaky-relu", "elu", "gelu", "silu")  # selu keeps variances with gain 1 (Klambauer et al. 2017)
_CELLS = (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell)


class Reinitialization(Effect):
    """`ReinitializeLayers`, of linear and convolutional layers and of recurrent cells."""

    left = "Reinitialized weights have been trained since: the old ones are gone."

    def __init__(self, change: _changes.ReinitializeLayers, site: Site, back: ExitStack) -> None:
        names, every = describe.names_of(site.model), list(describe.layers_of(site.model))
        found = [layer for layer in every if not change.layers or names[id(layer)] in change.layers]
        found += [layer.cell for layer in found if isinstance(layer, layers.RNN) and layer.cell not in found]
        before = [(v, keras.ops.convert_to_numpy(v)) for layer in found for v in describe.own_weights(layer)]
        drawn = draw(site.model, found, change.method, _seed())
        self._before = before
        self._updates = _counter(site)
        back.callback(self._put_back, site)
        self.detail = f"{drawn} layers"

    def _put_back(self, site: Site) -> None:
        """Until the first update; then the weights have moved on from there."""
        if _counter(site) == self._updates:
            for variable, value in self._before:
                variable.assign(value)


def _counter(site: Site) -> int:
    return 0 if site.outer is None else int(keras.ops.convert_to_numpy(site.optimizer.iterations))


def _seed() -> int:
    """A seed that follows from the program's: `keras.utils.set_random_seed` seeds NumPy's generator as well."""
    state: Any = np.random.get_state()  # noqa: NPY002 (a generator of one's own tells nothing of the program's seed)
    return int(state[1][0] ^ 0x9E3779B9) % 2**31


def initialize(model: Any, method: _changes.InitializationMethod) -> None:
    """Draw a built model's weights afresh: xavier, kaiming, orthogonal, critical, forget-bias, chrono or
    identity-recurrence. Raises CannotApply where nothing fits.
    """
    draw(model, list(describe.layers_of(model)), method, _seed())


def draw(model: Any, chosen: Sequence[Any], method: str, seed: int) -> int:
    """Draw the weights of layers; returns of how many. "orthogonal" is for recurrent matrices where there are some."""
    cells = [layer for layer in chosen if isinstance(layer, _CELLS) and layer.built]
    if method in _RECURRENT or (method == "orthogonal" and cells):
        suited = [cell for cell in cells if isinstance(cell, _RECURRENT.get(method, (_CELLS, None))[0])]
        if not suited:
            raise CannotApply(f"No recurrent layer of this model has what {method} sets.")
        length = _sequence_length(model) if method == "chrono" else 0
        for number, cell in enumerate(suited):
            (_RECURRENT[method][1] if method in _RECURRENT else _set_orthogonal)(cell, seed + number, length)
        return len(suited)
    if method not in _DRAWS:
        raise CannotApply(f"There is no {method} for a Keras model yet: draw with {', '.join(_DRAWS)}.")
    weighted = [layer for layer in chosen if describe.kind_of(layer) in WEIGHTED and _kernel(layer) is not None]
    if not weighted:
        raise CannotApply("There is no layer with weights to draw.")
    kinds = following_kinds(model)
    for number, layer in enumerate(weighted):
        _DRAWS[method](layer, kinds.get(id(layer), "identity"), seed + 2 * number)
    return len(weighted)


def _kernel(layer: Any) -> Any:
    kernel = getattr(layer, "kernel", None)
    return kernel if getattr(layer, "built", False) and len(getattr(kernel, "shape", ())) > 1 else None


def following_kinds(model: Any) -> dict[int, str]:
    """id of each layer with weights -> the kind of the activation behind it, "identity" behind the output layer."""
    output = output_of(model)
    found: dict[int, str] = {}
    waiting: Any = None
    for layer in describe.layers_of(model):
        kind = activation_kind(layer)
        if describe.kind_of(layer) in WEIGHTED:
            waiting = layer
            found[id(layer)] = kind or "identity"
        elif kind and waiting is not None:
            if found[id(waiting)] == "identity":
                found[id(waiting)] = kind
            waiting = None
    return {**found, **dict.fromkeys(map(id, output.weighted), "identity")}


# ---- layers with weights ------------------------------------------------------------------------------------------


def _fill(variable: Any, initializer: Any) -> None:
    variable.assign(initializer(tuple(variable.shape), dtype=variable.dtype))


def _zero_bias(layer: Any) -> None:
    if getattr(layer, "bias", None) is not None:
        _fill(layer.bias, initializers.Zeros())


def _fan_in(layer: Any) -> int:
    return max(1, describe.fans(layer)[0])


def _xavier(layer: Any, kind: str, seed: int) -> None:
    limit = math.sqrt(6 / max(1, sum(describe.fans(layer))))
    _fill(layer.kernel, initializers.RandomUniform(-limit, limit, seed=seed))
    _zero_bias(layer)


def _kaiming(layer: Any, kind: str, seed: int) -> None:
    """He et al. 2015: gain sqrt(2) in front of rectifiers, 1 elsewhere."""
    variance = 2.0 if kind in _RECTIFIERS else 1.0
    _fill(layer.kernel, initializers.RandomNormal(stddev=math.sqrt(variance / _fan_in(layer)), seed=seed))
    _zero_bias(layer)


def _orthogonal(layer: Any, kind: str, seed: int) -> None:
    """Saxe et al. 2014, with the same gains."""
    gain = math.sqrt(2) if kind in _RECTIFIERS else 1.0
    _fill(layer.kernel, initializers.Orthogonal(gain=gain, seed=seed))
    _zero_bias(layer)


def _critical(layer: Any, kind: str, seed: int) -> None:
    """Weights of variance C_W / fan_in and biases of variance C_b, at the activation's critical point."""
    weights, biases = critical_variances(kind)
    _fill(layer.kernel, initializers.RandomNormal(stddev=math.sqrt(weights / _fan_in(layer)), seed=seed))
    if getattr(layer, "bias", None) is not None:
        _fill(layer.bias, initializers.RandomNormal(stddev=math.sqrt(biases), seed=seed + 1))


_DRAWS: Mapping[str, Callable[[Any, str, int], None]] = {
    "xavier": _xavier, "kaiming": _kaiming, "orthogonal": _orthogonal, "critical": _critical,
}  # fmt: skip


# ---- recurrent cells ------------------------------------------------------------------------------------------------


def _gates(cell: Any) -> int:
    return int(cell.recurrent_kernel.shape[-1]) // int(cell.units)


def _set_orthogonal(cell: Any, seed: int, length: int) -> None:
    """Each gate's recurrent matrix of its own (Saxe et al. 2014); a plain cell gets no bias."""
    draws = [initializers.Orthogonal(seed=seed + 1000 * gate) for gate in range(_gates(cell))]
    blocks = [keras.ops.convert_to_numpy(draw((cell.units, cell.units))) for draw in draws]
    cell.recurrent_kernel.assign(np.concatenate(blocks, axis=1))
    if isinstance(cell, layers.SimpleRNNCell):
        _zero_bias(cell)


def _set_forget_bias(cell: Any, seed: int, length: int) -> None:
    """Gers et al. 2000: 1. Gates are input, forget, candidate, output."""
    _set_bias(cell, {1: np.ones(cell.units)})


def _set_identity(cell: Any, seed: int, length: int) -> None:
    """Le et al. 2015, arXiv:1504.00941: the identity and no bias. What enters keeps its weights."""
    cell.recurrent_kernel.assign(np.eye(cell.units))
    _zero_bias(cell)


def _set_chrono(cell: Any, seed: int, length: int) -> None:
    """Tallec & Ollivier 2018, arXiv:1804.11188: b_forget = log U[1, T - 1] = -b_input; for a GRU, whose gates are
    update, reset, candidate, and whose update gate keeps the state in Keras, b_update.
    """
    memory = np.log(np.random.default_rng(seed).uniform(1.0, max(2.0, length - 1.0), cell.units))
    _set_bias(cell, {1: memory, 0: -memory} if isinstance(cell, layers.LSTMCell) else {0: memory})


def _set_bias(cell: Any, gates: Mapping[int, Any]) -> None:
    """Set the biases of gates; where a GRU has two of each, the first holds the sum."""
    if cell.bias is None:
        raise CannotApply(f"The recurrent layer {cell.name} has no bias to set.")
    values = np.array(keras.ops.convert_to_numpy(cell.bias))
    for gate, bias in gates.items():
        columns = slice(gate * cell.units, (gate + 1) * cell.units)
        values[..., columns] = 0.0
        values.reshape(-1, values.shape[-1])[0, columns] = bias
    cell.bias.assign(values)


def _sequence_length(model: Any) -> int:
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) < 3 or shape[1] is None:
        raise CannotApply("The length of the sequences is not fixed in the model's input: give chrono a model with it.")
    return int(shape[1])


_RECURRENT: Mapping[str, tuple[Any, Callable[[Any, int, int], None]]] = {
    "forget-bias": (layers.LSTMCell, _set_forget_bias),
    "chrono": ((layers.LSTMCell, layers.GRUCell), _set_chrono),
    "identity-recurrence": (layers.SimpleRNNCell, _set_identity),
}
