"""Insert normalizations and shortcuts into functional and sequential models, made of layers that Keras has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import keras
from keras import activations, layers

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras._graph import graphs_of, run_through, set_layers
from isograd.frameworks.keras._model_changes import activation_kind, set_activation
from isograd.frameworks.keras._site import WEIGHTED, Effect, Site, graph_of, output_of

_NORMS = ("batch-norm", "layer-norm", "group-norm", "rms-norm")


class NormalizationInsertion(Effect):
    """`InsertNormalization`: behind each hidden layer with weights, in front of its activation, which becomes a layer
    of its own. Features are the layer's last axis, or the first behind the batch where channels come first.

    For convolutions "layer" is one group over channels and positions; "group" has up to 32 groups (Wu & He 2018), as
    many as divide the features.
    """

    left = "The layers' weights have been trained with normalization behind them."

    def __init__(self, change: _changes.InsertNormalization, site: Site, back: ExitStack) -> None:
        output, names = output_of(site.model), describe.names_of(site.model)
        self._kind, self._back = change.kind, back
        self._wanted = {
            id(layer)
            for layer in describe.layers_of(site.model)
            if describe.kind_of(layer) in WEIGHTED
            and (names[id(layer)] in change.layers if change.layers else not output.holds(layer))
        }
        self._inserted = 0
        for model in graphs_of(site.model):
            if isinstance(model, keras.Sequential):
                self._insert_in_list(model)
            elif wanted := self._wanted & _ids(_unfollowed(model)):
                run_through(model, back, self._call(wanted))
        if not self._inserted:
            raise CannotApply("Every hidden linear or convolution is followed by a normalization already.")
        self.detail = f"behind {self._inserted} layers"

    def _insert_in_list(self, model: Any) -> None:
        unfollowed = _ids(_unfollowed(model))
        found: list[Any] = []
        for layer in model._layers:
            found.append(layer)
            if id(layer) in self._wanted & unfollowed:
                found += self._behind(layer)
        if len(found) > len(model._layers):
            set_layers(model, found, self._back)

    def _call(self, wanted: set[int]) -> Any:
        made: dict[int, list[Any]] = {}  # a layer that is called several times has one normalization

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            result = operation(*args, **kwargs)
            if id(operation) in wanted and id(operation) not in made:
                made[id(operation)] = self._behind(operation)
            for layer in made.get(id(operation), ()):
                result = layer(result)
            return result

        return call

    def _behind(self, layer: Any) -> list[Any]:
        """The normalization of a layer, and the activation that the layer applied itself."""
        self._inserted += 1
        found = [_normalization(self._kind, layer)]
        function = describe.fused_activation(layer)
        if function is not None:
            set_activation(layer, activations.linear, self._back)
            name = f"{layer.name}_activation"
            found.append(layers.Activation(function, name=name, dtype=layer.dtype_policy))
        return found


def _ids(things: Sequence[Any]) -> set[int]:
    return {id(thing) for thing in things}


def _unfollowed(model: Any) -> list[Any]:
    """The layers of a graph with weights behind which no normalization comes first."""
    found: list[Any] = []
    for layer in model.layers:
        if describe.kind_of(layer) not in WEIGHTED:
            continue
        results = [tensor for node in layer._inbound_nodes for tensor in node.outputs]
        readers = [node.operation for tensor in results for node in readers_of(tensor, model)]
        if not any(describe.kind_of(one) in _NORMS for one in readers):
            found.append(layer)
    return found


def readers_of(tensor: Any, model: Any) -> list[Any]:
    """The calls in a model's graph that take a symbolic tensor."""
    nodes = [node for depth in graph_of(model)._nodes_by_depth.values() for node in depth]
    return [node for node in nodes if any(one is tensor for one in node.input_tensors)]


def _normalization(kind: str, layer: Any) -> Any:
    shape = layer.output.shape
    axis = describe.feature_axis(layer, len(shape))
    named: dict[str, Any] = {"name": f"{layer.name}_normalization", "dtype": layer.dtype_policy, "axis": axis}
    if kind == "batch":
        return layers.BatchNormalization(**named)
    if kind == "group" or (kind == "layer" and describe.kind_of(layer) == "conv"):
        return layers.GroupNormalization(1 if kind == "layer" else math.gcd(32, int(shape[axis])), **named)
    return layers.RMSNormalization(**named) if kind == "rms" else layers.LayerNormalization(**named)


class ShortcutInsertion(Effect):
    """`InsertShortcuts`: x + f(x) around every layer that keeps its input's shape, up to its activation.

    f is the layer, what normalizes or drops its result, and the activation applied to that; a layer without one gets no
    shortcut. "residual": He et al. 2016, arXiv:1512.03385. "rezero": x + a f(x) with trained a of 0, one for each
    feature (Bachlechner et al. 2021, arXiv:2003.04887, has one for each block). In a `Sequential` such a block becomes
    a model of its own.
    """

    left = "The layers' weights have been trained with shortcuts around them."

    def __init__(self, change: _changes.InsertShortcuts, site: Site, back: ExitStack) -> None:
        if change.kind == "dense":
            raise CannotApply("Dense connections widen every following layer: they need another model, not a change.")
        self._is_scaled = change.kind == "rezero"
        self._output = output_of(site.model)
        self._inserted = 0
        for model in graphs_of(site.model):
            if isinstance(model, keras.Sequential):
                self._insert_in_list(model, back)
            elif any(self._begins(layer) for layer in model.layers):
                run_through(model, back, _Shortcuts(self).call)
        if not self._inserted:
            raise CannotApply("No hidden layer keeps the shape of its input and has an activation behind it.")
        self.detail = f"around {self._inserted} layers"

    def _begins(self, layer: Any) -> bool:
        is_hidden = describe.kind_of(layer) in WEIGHTED and not self._output.holds(layer)
        return is_hidden and layer.input.shape == layer.output.shape

    def join(self, x: Any, result: Any, layer: Any) -> Any:
        """x + f(x), or x + a f(x)."""
        self._inserted += 1
        if self._is_scaled:
            result = _scale(layer, len(result.shape))(result)
        return layers.Add(name=f"{layer.name}_shortcut", dtype=layer.dtype_policy)([x, result])

    def _insert_in_list(self, model: Any, back: ExitStack) -> None:
        found: list[Any] = []
        waiting = list(model._layers)
        while waiting:
            block = self._block(waiting)
            if block:
                found.append(self._wrapped(block))
            else:
                found.append(waiting[0])
            del waiting[: max(1, len(block))]
        if len(found) < len(model._layers) or found != list(model._layers):
            set_layers(model, found, back)

    def _block(self, following: Sequence[Any]) -> list[Any]:
        """The layers from the first of these on that a shortcut goes around; none where there is no place."""
        if isinstance(following[0], layers.InputLayer) or not self._begins(following[0]):
            return []
        for end, layer in enumerate(following):
            if activation_kind(layer):
                return list(following[: end + 1])
            if end and describe.kind_of(layer) not in (*_NORMS, "dropout"):
                return []
        return []

    def _wrapped(self, block: Sequence[Any]) -> Any:
        first = block[0]
        x = result = keras.Input(batch_shape=first.input.shape, dtype=first.input.dtype)
        for layer in block:
            result = layer(result)
        return keras.Model(x, self.join(x, result, first), name=f"{first.name}_block")


class _Shortcuts:
    """Follows one pass through a graph: which results are still on their way to an activation."""

    def __init__(self, insertion: ShortcutInsertion) -> None:
        self._insertion = insertion
        self._open: dict[int, tuple[Any, Any, Any]] = {}

    def call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        """What stands in the place of the operation's result."""
        result = operation(*args, **kwargs)
        x = args[0] if args else None
        if isinstance(operation, keras.Layer) and self._insertion._begins(operation):
            if describe.fused_activation(operation) is not None:
                return self._insertion.join(x, result, operation)
            self._open[id(result)] = result, x, operation
            return result
        block = self._open.pop(id(x), None)
        if block is None:
            return result
        if activation_kind(operation):
            return self._insertion.join(block[1], result, block[2])
        if describe.kind_of(operation) in (*_NORMS, "dropout"):
            self._open[id(result)] = result, *block[1:]
        return result


def _scale(layer: Any, rank: int) -> Any:
    """A layer that multiplies every feature with a trained number, 0 at first."""
    axis = describe.feature_axis(layer, rank)
    letters = "abcdefgh"[:rank]
    feature = letters[axis]
    shape = tuple(None if n is None else int(n) for n in layer.output.shape[1:])
    named = {"name": f"{layer.name}_scale", "dtype": layer.dtype_policy, "kernel_initializer": "zeros"}
    return layers.EinsumDense(f"{letters},{feature}->{letters}", output_shape=shape, **named)
