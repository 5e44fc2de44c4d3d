"""Take readings out of a step while it is traced, or run where nothing is compiled.

Within `instrumented`, four things of Keras are replaced: what calls layers and operations, the activation inside layers
with weights, the model's `compute_loss`, and `apply` or `stateless_apply` of its optimizers. Everything is put back
afterwards: what is compiled keeps the readings, the model keeps nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from keras.src.ops.operation import Operation

from isograd.frameworks import Shield
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras import _kernels as kernels
from isograd.frameworks.keras import _loss as loss
from isograd.frameworks.keras._reading import Boundary, Call, Reading, Role

_LINEAR = ("Add", "Subtract", "Average", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
"""Layers without weights that a backend joins with those before and behind them into one operation."""

_SIMILAR = frozenset({"linear", "conv", "softmax", "attention", "layer-norm"}) | describe.ACTIVATIONS
"""Kinds of layers whose rows are compared."""


@contextlib.contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """`thing.name` is `value` within it, without the notice of Keras, which tracks what is assigned to its objects."""
    namespace, missing = vars(thing), object()
    before = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        if before is missing:
            namespace.pop(name, None)
        else:
            namespace[name] = before


class Instrument:
    """Reads one step of `model` into `reading`. `backend`: what differs between backends (`_steps.py`)."""

    def __init__(self, model: Any, reading: Reading, backend: Any, shield: Shield) -> None:
        self._model, self._reading, self._backend, self._shield = model, reading, backend, shield
        self._names = describe.names_of(model)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Everything that is read goes into the reading within it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(self._model, "compute_loss", self._compute_loss(self._model.compute_loss)))
            for optimizer in describe.optimizers_of(self._model):
                stack.enter_context(self._backend.tapped_optimizer(optimizer, self))
            if self._reading.is_deep:
                stack.enter_context(self._calling())
            yield
            self._reading.variables = tuple(describe.variables_of(self._model))

    # ---- layers ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        original = Operation.__call__

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            return self._called(original, operation, args, kwargs)

        Operation.__call__ = call
        try:
            yield
        finally:
            Operation.__call__ = original

    def _called(self, original: Callable[..., Any], operation: Any, args: Any, kwargs: Any) -> Any:
        reading = self._reading
        if operation is self._model and not reading.boundaries:
            self._shield.call(self._read_data, "input", args[:1], "")
        if reading.opaque or not self._is_ours(operation):
            return original(operation, *args, **kwargs)
        before = self._shield.call(self._before, operation, args) or {}
        apart = self._shield.call(self._apart, operation, args, kwargs)
        with contextlib.ExitStack() as stack:
            function = describe.fused_activation(operation)
            if function is not None and not isinstance(function, keras.Layer) and "activation" in vars(operation):
                tapped = self._fused(operation, function, before, apart)
                stack.enter_context(replaced(operation, "activation", tapped))
            if isinstance(operation, layers.RNN) and args:
                in_time = self._shield.call(self._tap_times, operation, args[0])
                args = args if in_time is None else (in_time, *args[1:])
            if _is_opaque(operation):
                reading.opaque += 1
                stack.callback(self._leave)
            out = original(operation, *args, **kwargs)
        if function is not None and not isinstance(function, keras.Layer):
            return out
        tapped_out = self._shield.call(self._tap_output, operation, before, args, out, apart)
        return out if tapped_out is None else tapped_out

    def _leave(self) -> None:
        self._reading.opaque -= 1

    def _is_ours(self, operation: Any) -> bool:
        return not isinstance(operation, keras.Layer) or (id(operation) in self._names and describe.is_leaf(operation))

    def _before(self, operation: Any, args: Any) -> dict[str, Any]:
        """What has to be read before the layer is called."""
        x = _on_device(first_tensor(args))
        if x is None or not self._can_read(x):
            return {}
        found: dict[str, Any] = {}
        if kernels._is_float(x):
            known = self._reading.bad_inputs.get(id(x))
            found["inputs"] = kernels.nonfinite(kernels.wide(x)) if known is None else known[1]
        is_norm = isinstance(operation, layers.BatchNormalization)
        if is_norm and operation.trainable and operation.built and len(x.shape) > 1:
            moments = ops.convert_to_tensor(operation.moving_mean), ops.convert_to_tensor(operation.moving_variance)
            found["batch_gap"] = kernels.batch_gap(x, *moments, int(operation.axis), float(operation.epsilon))
        return found

    def _apart(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """What the layer returns without its activation, computed beside the step where reading the step's own value
        would change how that is computed; None where it would not.
        """
        if describe.kind_of(operation) not in ("linear", "conv") and type(operation).__name__ not in _LINEAR:
            return None
        self._reading.opaque += 1
        try:
            return self._backend.apart(operation, args, kwargs, self._reading)
        finally:
            self._leave()

    def _fused(
        self, layer: Any, function: Callable[..., Any], before: dict[str, Any], apart: Any
    ) -> Callable[..., Any]:
        """The activation of a layer with weights, with a tap before and one behind it."""

        def activation(x: Any, *args: Any, **kwargs: Any) -> Any:
            read = x if apart is None else apart
            tapped = self._shield.call(self._tap, self._call_of(layer, x), x, before, apart)
            x = x if tapped is None else tapped
            out = function(x, *args, **kwargs)
            again = self._shield.call(self._tap_activation, layer, function, x, read, out)
            return out if again is None else again

        return activation

    def _tap_activation(self, layer: Any, function: Any, entered: Any, x: Any, out: Any) -> Any:
        if not self._can_read(out):
            return None
        kind, name = describe.kind_of_function(function), getattr(function, "__name__", type(function).__name__)
        owner = self._name_of(layer)
        axis = describe.feature_axis(layer, len(out.shape))
        call = Call(name=f"{owner}.{name}", kind=kind, type=name, role="operation", layer=layer, axis=axis)
        found = kernels.activation(kind, out, x, axis, describe.constants_of(function))
        known = self._reading.bad_inputs.get(id(entered))
        return self._tap(call, out, found if known is None else {"inputs": known[1], **found})

    def _tap_output(self, operation: Any, before: dict[str, Any], args: Any, out: Any, apart: Any) -> Any:
        tensor = first_tensor(out)
        if tensor is None or not self._can_read(tensor):
            return None
        found = dict(before)
        kind = describe.kind_of(operation)
        x = first_tensor(args)
        if kind in describe.ACTIVATIONS and x is not None and tuple(x.shape) == tuple(tensor.shape):
            axis = describe.feature_axis(operation, len(tensor.shape))
            entered = self._reading.apart.get(id(x), x)
            found |= kernels.activation(kind, tensor, entered, axis, describe.constants_of(operation))
        tapped = self._tap(self._call_of(operation, tensor), tensor, found, apart)
        return None if tapped is None else _with_first(out, tensor, tapped)

    def _call_of(self, operation: Any, out: Any) -> Call:
        return Call(
            name=self._name_of(operation),
            kind=describe.kind_of(operation),
            type=type(operation).__name__,
            role="module" if isinstance(operation, keras.Layer) else "operation",
            layer=operation,
            axis=describe.feature_axis(operation, len(out.shape)),
        )

    def _name_of(self, operation: Any) -> str:
        return self._names.get(id(operation), str(getattr(operation, "name", type(operation).__name__)))

    def _tap(self, call: Call, out: Any, found: dict[str, Any], apart: Any = None) -> Any:
        """Read a value, from `apart` if that is the same; what stands in its place from now on, so that its gradient is
        read, too.
        """
        if not self._can_read(out):
            return None
        if not kernels._is_float(out) or not out.shape:
            return None
        call.shape = tuple(-1 if n is None else int(n) for n in out.shape)
        call.dtype = str(keras.backend.standardize_dtype(out.dtype))
        value = out if apart is None else apart
        read = kernels.values(value)
        if call.kind in _SIMILAR and len(out.shape) >= 2:
            found = {**found, **kernels.similarity(value, call.axis)}
        index = self._reading.put_call(call, {**read, **found})
        tapped = self._backend.tapped(out, index, self._reading)
        for tensor in (out, tapped):
            self._reading.bad_inputs[id(tensor)] = tensor, read["nonfinite"]
            if apart is not None:
                self._reading.apart[id(tensor)] = apart
        return tapped

    def _tap_times(self, layer: Any, x: Any) -> Any:
        """The input of a recurrent layer, so that the gradient that arrives at each time step is read.

        Step t of the input enters at time t alone, through the same weights at every step: its gradient is what came
        back through time to t.
        """
        steps = x.shape[1] if len(getattr(x, "shape", ())) == 3 else None
        if not self._can_read(x) or not kernels._is_float(x) or not steps or steps < 2 or layer.unroll:
            return None
        call = self._call_of(layer.cell, x)
        call.name, call.layer, call.times = f"{self._name_of(layer)}.{layer.cell.name}", layer, int(steps)
        call.shape, call.dtype = tuple(-1 if n is None else int(n) for n in x.shape), str(x.dtype)
        call.backwards, call.role = bool(getattr(layer, "go_backwards", False)), "operation"
        index = self._reading.put_call(call, {})
        return self._backend.tapped_in_time(x, index, self._reading)

    def _can_read(self, tensor: Any) -> bool:
        """Whether a tensor may be kept: it has values, and belongs to the step itself, not to a loop inside it."""
        if isinstance(tensor, keras.KerasTensor) or not hasattr(tensor, "shape"):
            return False
        return bool(self._backend.is_here(tensor, self._reading))

    # ---- the loss -------------------------------------------------------------------------------------------------

    def _compute_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(x: Any = None, y: Any = None, y_pred: Any = None, *args: Any, **kwargs: Any) -> Any:
            if self._reading.is_deep:
                self._shield.call(self._read_boundaries, x, y, y_pred)
            found = original(x, y, y_pred, *args, **kwargs)
            self._shield.call(self._reading.put_loss, found)
            return found

        return compute_loss

    def _read_boundaries(self, x: Any, y: Any, y_pred: Any) -> None:
        if not any(boundary.role == "input" for boundary in self._reading.boundaries):
            self._read_data("input", x, "")
        self._read_data("prediction", y_pred, loss.operation_of(self._model))
        self._read_data("target", y, "")
        if self._reading.facts is None:
            uses_logits = self._backend.uses_logits(first_tensor(y_pred))
            facts = loss.facts(self._model, self._reading.calls, y, y_pred, uses_logits=uses_logits)
            self._reading.facts = facts

    def _read_data(self, role: Role, data: Any, operation: str) -> None:
        """Read what enters the model or its loss; `operation`: of the loss, where a prediction enters one."""
        tensors = [_on_device(t) for t in keras.tree.flatten(data) if t is not None and hasattr(t, "shape")]
        for index, tensor in enumerate(tensors[:_DATA]):
            if self._can_read(tensor):
                number = "" if not index else f"-{index + 1}"
                name = f"input{number}" if role == "input" else f"loss{number}.{role}"
                kind = operation or str(keras.backend.standardize_dtype(tensor.dtype))
                shape = tuple(-1 if n is None else int(n) for n in tensor.shape)
                self._reading.put_boundary(Boundary(name=name, role=role, type=kind, shape=shape), _data(tensor))


_DATA = 8
"""Inputs, predictions and targets that are read of a model that has several."""


def _data(tensor: Any) -> dict[str, Any]:
    """What is read of data: the statistics of a value, its spread, and some rows as they are."""
    found = kernels.values(tensor)
    if kernels._is_float(tensor):
        found["std"] = ops.std(kernels.wide(tensor))
    else:
        del found["zeros"]  # of classes and words 0 is one like the others
    if len(tensor.shape) and all(n is not None for n in tensor.shape[1:]):
        found["rows_themselves"] = kernels.sample(tensor)
        if len(tensor.shape) == 2 and kernels._is_float(tensor):
            found["is_table"] = ops.ones(())
    return found


def _is_opaque(operation: Any) -> bool:
    """Whether a layer runs its parts inside a loop of the backend, out of which nothing can be taken."""
    return isinstance(operation, (layers.RNN, layers.TimeDistributed))


def _on_device(data: Any) -> Any:
    """Data that `train_on_batch` hands on as it was given, as a tensor."""
    return ops.convert_to_tensor(data) if isinstance(data, np.ndarray) else data


def first_tensor(value: Any) -> Any:
    """The first tensor in what a layer took or returned, None where there is none."""
    found: Sequence[Any] = keras.tree.flatten(value)
    return next((thing for thing in found if hasattr(thing, "shape") and hasattr(thing, "dtype")), None)


def _with_first(out: Any, tensor: Any, tapped: Any) -> Any:
    """What a layer returned, with `tapped` in the place of `tensor`."""
    if out is tensor:
        return tapped
    return keras.tree.map_structure(lambda thing: tapped if thing is tensor else thing, out)
