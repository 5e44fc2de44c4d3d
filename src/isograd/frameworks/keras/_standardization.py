"""Standardize what enters a model, and what it is asked for, by the statistics of the first batches, which are gathered
inside the compiled step.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import keras
from keras import layers, ops

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras import _loss as loss
from isograd.frameworks.keras._graph import run_through, set_layers
from isograd.frameworks.keras._insertion import readers_of
from isograd.frameworks.keras._site import Effect, Site, graph_of


class InputStandardization(Effect):
    """`StandardizeInputs`: a `keras.layers.Normalization` behind each input of numbers, over its last axis, which
    learns its moments from the first batches of training and saves as what it is.
    """

    left = "The weights have been trained on standardized inputs."

    def __init__(self, change: _changes.StandardizeInputs, site: Site, back: ExitStack) -> None:
        model = site.model
        graph = graph_of(model)
        if graph is None:
            name = type(model).__name__
            raise CannotApply(f"{name} computes what its own `call` says: standardize the data before `fit`.")
        inputs = [tensor for tensor in graph.inputs if _is_of_numbers(tensor, graph)]
        if not inputs:
            raise CannotApply("No input of the model holds floating-point numbers to standardize.")
        if isinstance(model, keras.Sequential):
            first, *others = model._layers
            set_layers(model, [first, Moments(inputs[0], change.batches).layer, *others], back)
        else:
            made = {id(tensor): Moments(tensor, change.batches).layer for tensor in inputs}
            run_through(model, back, _plainly, lambda x: made[id(x)](x) if id(x) in made else x)
        self.detail = f"{len(inputs)} inputs"


def _plainly(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return operation(*args, **kwargs)


def _is_of_numbers(tensor: Any, graph: Any) -> bool:
    """Whether an input is no index of an embedding, which Keras takes as floating-point numbers, too."""
    kinds = {describe.kind_of(node.operation) for node in readers_of(tensor, graph)}
    names = {type(node.operation).__name__ for node in readers_of(tensor, graph)}
    is_float = keras.backend.standardize_dtype(tensor.dtype).startswith(("float", "bfloat"))
    return is_float and "embedding" not in kinds and not names & {"Normalization", "CategoryEncoding", "Hashing"}


class Moments:
    """A `keras.layers.Normalization` for a symbolic tensor, whose moments are those of the first batches.

    They are averaged as those of one sample (Chan et al. 1979), batches counting alike; entries that are not finite
    are left out. Before the first batch nothing is changed. `is_inverse`: the layer multiplies with the deviation and
    adds the mean, and learns nothing by itself.
    """

    def __init__(self, tensor: Any, batches: int, *, is_inverse: bool = False) -> None:
        layer: Any = layers.Normalization(
            axis=-1 if len(tensor.shape) == 2 or not is_inverse else None, invert=is_inverse
        )
        layer.build(tensor.shape)
        self.layer, self._batches, self._is_inverse = layer, batches, is_inverse
        self.entered: Any = None

        def call(inputs: Any, training: bool | None = None) -> Any:
            return self._call(inputs, bool(training))

        # Keras decides by the signature whether a layer is told that it is training.
        vars(layer).update(
            call=call,
            _call_signature=inspect.signature(call),
            _call_has_training_arg=True,
            _call_has_context_arg={"training": True},
        )

    def _call(self, inputs: Any, training: bool) -> Any:
        if training and not self._is_inverse:
            self.learn(inputs)
        self.entered = inputs if training else None
        mean, deviation = (ops.cast(one, inputs.dtype) for one in self.current())
        return inputs * deviation + mean if self._is_inverse else (inputs - mean) / deviation

    def current(self) -> tuple[Any, Any]:
        """(mean, standard deviation) shaped to broadcast. A feature that does not vary has deviation 1."""
        mean = ops.reshape(ops.convert_to_tensor(self.layer.adapt_mean), self.layer._broadcast_shape)
        variance = ops.reshape(ops.convert_to_tensor(self.layer.adapt_variance), self.layer._broadcast_shape)
        deviation = ops.sqrt(variance)
        return mean, ops.where(deviation > 1e-12 * ops.abs(mean), deviation, 1.0)

    def learn(self, values: Any) -> None:
        """One more batch, where it is among the first."""
        layer, axes = self.layer, self.layer._reduce_axis
        x = ops.stop_gradient(ops.cast(values, "float32"))
        is_finite = ops.isfinite(x)
        finite, x = ops.cast(is_finite, "float32"), ops.where(is_finite, x, 0.0)
        count = ops.maximum(ops.sum(finite, axis=axes), 1.0)
        mean = ops.sum(x, axis=axes) / count
        variance = ops.sum(ops.square((x - ops.reshape(mean, layer._broadcast_shape)) * finite), axis=axes) / count
        seen = ops.cast(layer.count, "float32")
        share = ops.where(seen < self._batches, 1 / (seen + 1), 0.0)
        known, spread = ops.convert_to_tensor(layer.adapt_mean), ops.convert_to_tensor(layer.adapt_variance)
        gap = mean - known
        layer.adapt_mean.assign(known + share * gap)
        layer.adapt_variance.assign(spread + share * (variance - spread + (1 - share) * ops.square(gap)))
        layer.count.assign(layer.count + ops.cast(share > 0, layer.count.dtype))


_SQUARED = ("mean_squared_error", "mse", "huber", "log_cosh")
_ABSOLUTE = ("mean_absolute_error", "mae")


class TargetStandardization(Effect):
    """`StandardizeTargets`: the model's result r becomes r * std + mean, by a `keras.layers.Normalization` that is put
    behind it, so that the network works on targets of mean 0 and deviation 1 while the loss stays in its own units.

    The backward pass is that of the loss on standardized targets: for a squared error dL/dr is divided by std (its
    gradient with respect to r * std + mean is std times that of the standardized loss, and r * std brings another std),
    for an absolute error it passes unchanged. The targets of a batch are learned before its loss is taken.
    """

    left = "The weights have been trained on standardized targets."

    def __init__(self, change: _changes.StandardizeTargets, site: Site, back: ExitStack) -> None:
        model, graph = site.model, graph_of(site.model)
        name, _ = loss._loss_of(model)
        if graph is None or len(graph.outputs) != 1:
            raise CannotApply("Targets are standardized behind the one output of a functional or sequential model.")
        if name not in (*_SQUARED, *_ABSOLUTE):
            raise CannotApply("The model was compiled with no regression loss whose targets could be standardized.")
        self._is_linear = name in _ABSOLUTE
        self._moments = moments = Moments(graph.outputs[0], change.batches, is_inverse=True)
        if isinstance(model, keras.Sequential):
            set_layers(model, [*model._layers, moments.layer], back)
        else:
            run_through(model, back, _plainly, leave=moments.layer)
        original = model.compute_loss

        def compute_loss(
            x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
        ) -> Any:
            y_pred = self._in_units(y, y_pred) if training else y_pred
            return original(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

        back.callback(vars(model).pop, "compute_loss", None)
        vars(model)["compute_loss"] = compute_loss
        self.detail = "behind the output"

    def _in_units(self, y: Any, y_pred: Any) -> Any:
        """The result by the moments that hold now, with the gradient of the standardized loss."""
        raw, self._moments.entered = self._moments.entered, None
        targets = keras.tree.flatten(y)
        if raw is None or len(targets) != 1 or targets[0] is None:
            return y_pred
        target = ops.convert_to_tensor(targets[0])
        if len(target.shape) < len(raw.shape):
            target = ops.expand_dims(target, -1)
        self._moments.learn(target)
        mean, deviation = (ops.cast(one, raw.dtype) for one in self._moments.current())
        passing = raw if self._is_linear else raw / deviation
        return ops.stop_gradient(raw * deviation + mean - passing) + passing
