"""The autograd graph of a loss, read as the trace of the user's program before `backward` consumes it.

Nodes are visited from the loss towards the inputs. Saved tensors are read and never kept. Where saved tensors are
packed (activation checkpointing, offloading) reading one would run the user's code again, so the caller asks not to.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch._calls import (
    CALLS,
    Call,
    dtype_name,
    feature_axis,
    read_activation,
    read_distinct,
    read_similarity,
    read_values,
    unit_axis,
)

NODES = 20000
"""Nodes that are visited; a longer graph is read from the loss up to there."""

ACTIVATION_NODES = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Gelu": "gelu", "Silu": "silu", "LeakyRelu": "leaky-relu",
    "Elu": "elu", "Hardtanh": "hardtanh", "Softplus": "softplus",
}  # fmt: skip

LOSS_NODES = frozenset(
    {"NllLoss", "NllLoss2D", "NllLossNd", "MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy",
     "BinaryCrossEntropyWithLogits", "SoftMarginLoss", "MultiMarginLoss", "MultilabelMarginLoss"}
)  # fmt: skip

COMPOSITE = frozenset({"rnn", "lstm", "gru", "attention", "rnn-cell", "lstm-cell", "gru-cell"})
"""Kinds of layers that contain operations of their own: an operation inside one is named after it."""


@dataclass(eq=False)
class Place:
    """A layer as the graph knows it: the node of its output carries it in its metadata, so nobody keeps the graph."""

    name: str
    kind: str
    module: weakref.ref[nn.Module]
    root: weakref.ref[nn.Module] | None = None


PLACE = "isograd.place"
"""Key of a `Place` in a node's metadata."""


def place_of(node: Any) -> Place | None:
    """The layer whose output this node made, if a hook marked it."""
    return node.metadata.get(PLACE)  # type: ignore[no-any-return]


@dataclass
class Operation:
    """A functional activation or attention: `owner` is the layer it follows or is part of, None where there is none."""

    owner: Place | None
    name: str
    kind: str
    nodes: list[Any] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        """The name of its column: `<owner>.<operation>`."""
        return f"{self.owner.name}.{self.name}" if self.owner is not None and self.owner.name else self.name


@dataclass
class Trace:
    """What one walk found. `head`: operations from the loss down to the first layer. `compiled`: a compiled
    region hides what is behind it. `reached`: the leaf tensors that the loss depends on, by id. `edges`: the nodes
    below each node, None where no gradient goes; `names`: each node's operation.
    """

    head: list[Any] = field(default_factory=list)
    operations: dict[tuple[int, str], Operation] = field(default_factory=dict)
    losses: list[Any] = field(default_factory=list)
    reached: dict[int, Tensor] = field(default_factory=dict)
    compiled: bool = False
    edges: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """Nodes that were visited."""
        return len(self.edges)


def operation_name(node: Any) -> str:
    """`SigmoidBackward0` is `Sigmoid`."""
    return str(node.name()).rsplit("::", 1)[-1].split("Backward")[0]


def order(node: Any) -> int:
    """When the forward pass made the node: a counter of the thread. Leaves stand last."""
    return int(node._sequence_nr())


def walk(root: Any) -> Iterator[tuple[Any, Any]]:
    """Every node below `root` once with the node it was reached from, breadth first, at most `NODES`."""
    seen, waiting = {root}, deque([(root, None)])
    while waiting and len(seen) <= NODES:
        node, parent = waiting.popleft()
        yield node, parent
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append((following, node))


def read_graph(loss: Tensor) -> Trace:
    """Walk the graph of `loss`, whose layers' output nodes carry their `Place`."""
    trace = Trace()
    if loss.grad_fn is None:
        return trace
    inside: dict[Any, Place | None] = {}
    for node, parent in walk(loss.grad_fn):
        place = place_of(node)
        inside[node] = (place if place.kind in COMPOSITE else None) if place else inside.get(parent)
        name = trace.names[node] = operation_name(node)
        trace.edges[node] = tuple([below for below, _ in node.next_functions])
        if name == "AccumulateGrad":
            trace.reached[id(node.variable)] = node.variable
        elif name == "CompiledFunction":
            trace.compiled = True
        elif name in LOSS_NODES:
            trace.losses.append(node)
        elif place is None or place.kind in COMPOSITE:
            _note_operation(trace, node, name, inside[node])
    trace.head = _head(loss.grad_fn)
    return trace


def _note_operation(trace: Trace, node: Any, name: str, inside: Place | None) -> None:
    kind = ACTIVATION_NODES.get(name) or _attention_kind(node, name)
    if kind is None:
        return
    owner = inside or _upstream(node)
    short = "attention" if kind == "attention" else name.lower()
    key = (id(owner), short)
    trace.operations.setdefault(key, Operation(owner=owner, name=short, kind=kind)).nodes.append(node)


def _attention_kind(node: Any, name: str) -> str | None:
    if name.startswith("ScaledDotProduct"):
        return "attention"
    if name in ("Softmax", "SafeSoftmax") and _is_over_last_axis(node) and _matrix_product_below(node) is not None:
        return "attention"
    return None


def _is_over_last_axis(node: Any) -> bool:
    axes = len(node._input_metadata[0].shape)
    return node._saved_dim in (axes - 1, 2**64 - 1)  # -1, saved unsigned


def _below(node: Any) -> Any:
    """The node that made the first input; None at the boundary of the graph."""
    return next((following for following, _ in node.next_functions if following is not None), None)


_BETWEEN_PRODUCT_AND_SOFTMAX = frozenset(
    {"Div", "Mul", "MaskedFill", "Add", "Where", "Sub", "Clone", "ToCopy"}
    | {"View", "UnsafeView", "Reshape", "Permute", "Transpose", "Squeeze", "Unsqueeze"}
)


def _matrix_product_below(node: Any) -> Any:
    """The batched product of two activations that a softmax normalizes, past scaling and masking; None otherwise."""
    for _ in range(8):
        node = _below(node)
        if node is None:
            return None
        name = operation_name(node)
        if name in ("Bmm", "Baddbmm"):
            return node
        if name not in _BETWEEN_PRODUCT_AND_SOFTMAX:
            return None
    return None


def _upstream(node: Any) -> Place | None:
    """The nearest layer that the node's input comes from, along first inputs."""
    for _ in range(50):
        node = _below(node)
        if node is None:
            return None
        place = place_of(node)
        if place is not None:
            return place
    return None


def _head(node: Any) -> list[Any]:
    nodes: list[Any] = []
    while node is not None and len(nodes) < 16:
        nodes.append(node)
        place = place_of(node)
        if operation_name(node) == "AccumulateGrad" or (
            place is not None and place.kind in ("linear", "conv", "other")
        ):
            break
        node = _below(node)
    return nodes


def head_facts(trace: Trace) -> dict[str, Any]:
    """The head in plain values: names, shapes of the results, and over how many entries each softmax goes."""
    names, shapes = [operation_name(node) for node in trace.head], [result_shape(node) for node in trace.head]
    rows = zip(trace.head, names, shapes, strict=True)
    sizes = [shape[node._saved_dim - _WRAP * (node._saved_dim >= _WRAP // 2)] for node, name, shape in rows
             if name in ("Softmax", "LogSoftmax") and shape]  # fmt: skip
    return {"operations": names, "shapes": shapes, "softmax_sizes": sizes}


def flat_share(trace: Trace) -> dict[str, float]:
    """Of the clamp nearest the loss, which entries lie beyond its ends, where its derivative is zero: their share."""
    for node in trace.head:
        name = operation_name(node)
        values = saved(node, "self") if name in ("Clamp", "ClampMin", "ClampMax") else None
        if values is not None and values.numel():
            low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
            inside = torch.ones_like(values, dtype=torch.bool)
            if low is not None:
                inside &= values >= low
            if high is not None:
                inside &= values <= high
            return {"flat_share": 1 - float(inside.float().mean())}
    return {}


_WRAP = 2**64
"""A negative dimension is saved as an unsigned number."""


def result_shape(node: Any) -> list[int]:
    """The shape of the tensor that a node made."""
    if operation_name(node) == "AccumulateGrad":
        return list(node.variable.shape)
    metadata = getattr(node, "_input_metadata", ())
    return [int(size) for size in metadata[0].shape] if metadata else []


# ---- reading saved tensors -----------------------------------------------------------------------------------


def saved(node: Any, *names: str) -> Tensor | None:
    """The first of the node's saved tensors that exists and can still be read."""
    for name in names:
        try:
            value = getattr(node, f"_saved_{name}", None)
        except RuntimeError:  # modified in place since, or already freed: torch refuses to hand it out
            continue
        if isinstance(value, Tensor) and has_memory(value):
            return value
    return None


def has_memory(tensor: Tensor) -> bool:
    """Whether there is something to read: `fully_shard` frees gathered weights behind autograd's back until the
    backward pass, and reading them would end the process.
    """
    try:
        return not tensor.numel() or tensor.untyped_storage().nbytes() > 0
    except (NotImplementedError, RuntimeError):  # layouts without a storage of their own
        return True


def batch_moments(node: Any, epsilon: float) -> tuple[Tensor, Tensor] | None:
    """(mean, biased variance) of each channel that a batch normalization's node has kept; None for other nodes."""
    if node is None or not operation_name(node).endswith("BatchNorm"):
        return None
    mean, inverse = saved(node, "result1"), saved(node, "result2")  # the second one is 1 / sqrt(variance + epsilon)
    if mean is None or inverse is None or not mean.numel() or not inverse.numel():
        return None
    return mean, inverse.double().pow(-2) - epsilon


def read_operation(operation: Operation, after: str) -> list[tuple[Any, Call]]:
    """(node, readings) of each call of a functional activation or attention, first call first."""
    nodes = sorted(operation.nodes, key=order)
    if len(nodes) > CALLS:
        nodes = [nodes[round(i * (len(nodes) - 1) / (CALLS - 1))] for i in range(CALLS)]
    read = _read_attention if operation.kind == "attention" else _read_activation
    found = [(node, call) for node in nodes if (call := read(node, operation.kind, after)) is not None]
    if found and operation.kind != "attention":
        _read_similarity(*found[-1], operation.kind, after)
    return found


def _read_similarity(node: Any, call: Call, kind: str, after: str) -> None:
    """How much alike the rows of an activation's output are; where only its input was saved, it is applied to some."""
    result, x = saved(node, "result"), saved(node, "self")
    values = x if result is None else result
    if values is None or values.dim() < 2 or not values.numel():
        return
    rows = kernels.some_rows(values, feature_axis(after, values.dim()))
    read_similarity(call, rows if result is not None else _apply(kind, rows, _constants(node, kind)), -1)


def _read_activation(node: Any, kind: str, after: str) -> Call | None:
    result, x = saved(node, "result"), saved(node, "self")
    parameters = _constants(node, kind)
    if result is not None:
        call = read_values(result)
        read_activation(call, kind, result, x, unit_axis(result, after), parameters)
        return call
    if x is None:
        return None
    # Only the input was saved: applying the activation to a sample of it tells as much. Dead units need whole rows.
    some = x.detach() if kind == "hardtanh" else kernels.activation_sample(x)
    result = _apply(kind, some, parameters)
    call = read_values(result)
    call.stand_for(x.numel())
    read_activation(call, kind, result, some, unit_axis(result, after), parameters)
    return call


def _constants(node: Any, kind: str) -> dict[str, float]:
    if kind == "leaky-relu":
        return {"negative_slope": float(node._saved_negative_slope)}
    if kind == "hardtanh":
        return {"low": float(node._saved_min_val), "high": float(node._saved_max_val)}
    if kind == "elu":
        return {"alpha": float(node._saved_alpha), "scale": float(node._saved_scale)}
    if kind == "softplus":
        return {"beta": float(node._saved_beta)}
    return {}


def _apply(kind: str, x: Tensor, constants: dict[str, float]) -> Tensor:
    functional = torch.nn.functional
    if kind == "leaky-relu":
        return functional.leaky_relu(x, constants["negative_slope"])
    if kind == "hardtanh":
        return x.clamp(constants["low"], constants["high"])
    if kind == "elu":
        return constants["scale"] * functional.elu(x, constants["alpha"])
    if kind == "softplus":
        return functional.softplus(x, constants["beta"])
    return functional.gelu(x) if kind == "gelu" else functional.silu(x)


def _read_attention(node: Any, kind: str, after: str) -> Call | None:
    del kind, after
    weights = saved(node, "result")
    if weights is not None:
        return _read_softmax(node, weights) if weights.numel() else None
    query, key = saved(node, "query"), saved(node, "key")
    if query is None or key is None or not query.numel() or not key.numel():
        return None
    scale = getattr(node, "_saved_scale", None)
    call = Call(size=query.numel(), dtype=dtype_name(query))
    call.readings["entropy"], call.readings["logit"] = kernels.attention_from_operands(
        query,
        key,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        saved(node, "attn_mask", "attn_bias"),
        bool(getattr(node, "_saved_is_causal", False)),
    )
    return call


def _read_softmax(node: Any, weights: Tensor) -> Call:
    call = Call(size=weights.numel(), dtype=dtype_name(weights))
    call.readings["entropy"] = kernels.attention_from_weights(weights)
    # The largest weight of a row against its smallest visible one bounds the logits only from below; the product's
    # operands give them exactly, and the factor between product and softmax shows in the weights themselves.
    product = _matrix_product_below(node)
    left = None if product is None else saved(product, "self", "batch1")
    right = None if product is None else saved(product, "mat2", "batch2")
    if left is not None and right is not None and left.numel():
        scale = _scale_between(node, product)
        keys = right.transpose(-2, -1)
        shape = (*left.shape[:-1], keys.shape[-2])
        aligned = weights.shape[-2:] == shape[-2:] and weights.numel() == math.prod(shape)
        visible = weights.reshape(shape) > 0 if aligned else None
        _, call.readings["logit"] = kernels.attention_from_operands(left, keys, scale, visible)
    return call


def _scale_between(node: Any, product: Any) -> float:
    scale = float(getattr(product, "_saved_alpha", 1.0) or 1.0)
    node = _below(node)
    while node is not None and node is not product:
        other = getattr(node, "_saved_other", None) if operation_name(node) in ("Div", "Mul") else None
        if isinstance(other, Tensor):
            other = other.detach() if other.numel() == 1 else None
        number = None if other is None else float(other)
        if number:
            scale = scale / number if operation_name(node) == "Div" else scale * number
        node = _below(node)
    return scale


@dataclass(frozen=True)
class LossInputs:
    """What entered one loss function: readings of both sides, their shapes, and whether a side was broadcast."""

    operation: str
    prediction: Call | None
    target: Call | None
    prediction_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    broadcast: bool
    target_dtype: str


def read_loss(node: Any) -> LossInputs | None:
    """Prediction and target of one of torch's own losses, or None when they cannot be read."""
    prediction, target = saved(node, "self"), saved(node, "target")
    if prediction is None or target is None:
        return None
    expanded = next((f for f, _ in node.next_functions if f is not None and operation_name(f) == "Expand"), None)
    before = tuple(prediction.shape) if expanded is None else tuple(int(n) for n in expanded._saved_self_sym_sizes)
    return LossInputs(
        operation=operation_name(node),
        prediction=read_values(prediction, boundary=True, rows=True),
        target=_read_target(target),
        prediction_shape=before,
        target_shape=tuple(target.shape),
        broadcast=expanded is not None,
        target_dtype=dtype_name(target),
    )


def _read_target(target: Tensor) -> Call:
    call = read_values(target, boundary=True, rows=True)
    read_distinct(call, target)
    return call
