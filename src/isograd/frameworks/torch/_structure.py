"""A model's structure as stages of mean-field theory, read from its module tree: nothing is run on data.

`torch.fx` traces a copy with symbolic values; a module that cannot be traced is one unknown stage of the graph around
it. A model that cannot be traced at all and is no sequence of layers has no structure that could be told.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from isograd._mean_field import Stage
from isograd._theory import Activation, Floats
from isograd.frameworks.torch import _describe as describe

_NORMALIZATIONS = ("batch-norm", "layer-norm", "group-norm", "rms-norm", "instance-norm")
_OPAQUE = ("rnn", "lstm", "gru", "rnn-cell", "lstm-cell", "gru-cell")

_ELEMENTWISE = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "tanh", "sigmoid", "gelu", "silu", "elu", "selu", "celu", "softplus"}
    | {"hardtanh", "hardsigmoid", "hardswish", "softsign", "mish", "tanhshrink", "logsigmoid", "sin", "cos", "exp"}
    | {"abs", "square", "erf", "clamp", "tanh_", "sigmoid_"}
)
"""Names of functions and methods that act on every entry alone."""

_LAYER_KINDS = {name.replace("-", "_"): name for name in describe.ACTIVATIONS} | {"relu6": "hardtanh", "celu": "elu"}

_ELEMENTWISE_MODULES = frozenset({"Mish", "Hardswish", "Hardsigmoid", "Tanhshrink", "LogSigmoid", "Softshrink",
                                  "Hardshrink", "Threshold"})  # fmt: skip

_MOVES = frozenset(
    {"view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "to", "float", "half"}
    | {"double", "bfloat16", "type_as", "chunk", "split", "getitem", "unbind", "clone", "expand", "movedim", "swapaxes"}
    | {"expand_as", "t", "narrow", "select", "roll", "pixel_shuffle", "unflatten", "type", "cuda", "cpu"}
)
"""Names of functions and methods that move values and change none."""

_ADDITIONS, _PRODUCTS = frozenset({"add", "iadd", "sub", "isub", "add_", "sub_"}), frozenset({"mul", "imul", "mul_"})
_DIVISIONS, _JOINS = frozenset({"truediv", "div", "div_", "itruediv"}), frozenset({"cat", "concat", "stack", "hstack"})


@dataclass(frozen=True)
class Structure:
    """`stages`, sources first; `how` they were told: "graph", "sequence" or "nothing"."""

    stages: tuple[Stage, ...] = ()
    how: str = "nothing"


def structure_of(model: nn.Module, inputs: tuple[Any, ...] = ()) -> Structure:
    """The structure of `model`, which is left as it is. `inputs`: positional arguments, of which only shapes are used;
    without them, sizes of images and sequences are unknown.
    """
    with torch.no_grad(), warnings.catch_warnings(), _plain_attention():
        warnings.simplefilter("ignore")
        # What is traced may keep a symbol in an attribute; its parameters need no copy.
        root = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        for module in root.modules():
            if type(module) is nn.TransformerEncoder:
                module.__class__ = _Encoder
        graph = _Tracer().traced(root, num_inputs=len(inputs))
        if graph is not None:
            return Structure(tuple(_Reader(graph, _shapes(graph, inputs)).stages()), "graph")
        if isinstance(root, nn.Sequential):
            return Structure(tuple(_sequence(root)), "sequence")
    return Structure()


# ---- tracing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Transformer layers take their ordinary path, not the fused one that asks for values."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


class _Encoder(nn.TransformerEncoder):
    """The same layers in the same order, without asking how long the sequence is."""

    def forward(self, src: Tensor, *_: Any, **__: Any) -> Tensor:
        """Layer after layer, then the normalization."""
        for layer in self.layers:
            src = layer(src)
        return src if self.norm is None else self.norm(src)


class _Tracer(fx.Tracer):
    """Goes into every module that can be traced; the others, and layers, are leaves."""

    trace_asserts = True

    def __init__(self, tried: dict[int, bool] | None = None) -> None:
        super().__init__()
        self._tried = {} if tried is None else tried

    def is_leaf_module(self, module: nn.Module, _: str) -> bool:
        """Whether to stop at a module: it is a layer of torch's own, or nothing can be told of its inside."""
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        is_torchs = type(module).__module__.startswith("torch.nn")
        if is_torchs and (describe.kind_of(module) != "other" or next(module.children(), None) is None):
            return True
        if id(module) not in self._tried:
            self._tried[id(module)] = _Tracer(self._tried).traced(module) is not None
        return not self._tried[id(module)]

    def to_bool(self, symbol: Any) -> bool:
        """What the code asks of a tensor without values: whether it is of an unusual kind. It is not."""
        node = symbol.node
        if _name(node) in ("getattr", "is_nested", "is_sparse") and str(node.args[-1]).startswith("is_"):
            return False
        return bool(super().to_bool(symbol))

    def traced(self, module: nn.Module, *, num_inputs: int = 1) -> fx.GraphModule | None:
        """The module's graph, None where it cannot be traced. Arguments behind the inputs keep their defaults."""
        try:
            arguments = list(inspect.signature(module.forward).parameters.values())[max(1, num_inputs) :]
            defaults = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
            return fx.GraphModule(module, self.trace(module, concrete_args=defaults or None))
        except Exception:  # whatever the user's code does when it is given no values
            return None


class _Shapes(fx.Interpreter):
    """Runs a graph on tensors that have no values and notes the shapes of its results."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[int, ...]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As always, but for recurrences, which would run step by step: what they return is known."""
        module = self.fetch_attr(target)
        if isinstance(module, nn.RNNBase) and args and isinstance(args[0], Tensor):
            return _recurrent_results(module, args[0])
        return super().call_module(target, args, kwargs)

    def run_node(self, node: fx.Node) -> Any:
        """As always, and its shape."""
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.found[node.name] = tuple(result.shape)
        return result


def _recurrent_results(module: nn.RNNBase, x: Tensor) -> tuple[Any, Any]:
    """Empty tensors in the shapes of a recurrence's output and last state."""
    directions = 2 if module.bidirectional else 1
    batch = () if x.dim() < 3 else (x.shape[0 if module.batch_first else 1],)
    state = x.new_empty((directions * module.num_layers, *batch, module.proj_size or module.hidden_size))
    output = x.new_empty((*x.shape[:-1], directions * state.shape[-1]))
    cell = x.new_empty((*state.shape[:-1], module.hidden_size))
    return output, (state, cell) if isinstance(module, nn.LSTM) else state


def _shapes(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of results by node; of none, or of the first ones, where the graph does not run without values."""
    if not inputs:
        return {}
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in graph.parameters()}
    interpreter = _Shapes(copy.deepcopy(graph, empty).to("meta"))
    with contextlib.suppress(Exception):  # not everything runs without values
        interpreter.run(*(i.to("meta") if isinstance(i, Tensor) else i for i in inputs))
    return interpreter.found


# ---- graph -> stages --------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Turns the nodes of a graph into stages. Nodes that compute no signal (sizes, constants) get none."""

    graph: fx.GraphModule
    shapes: Mapping[str, tuple[int, ...]]
    found: list[Stage] = field(default_factory=list)
    places: dict[fx.Node, int] = field(default_factory=dict)
    constants: dict[fx.Node, Any] = field(default_factory=dict)

    def stages(self) -> list[Stage]:
        """All stages, in the order of the graph."""
        for node in self.graph.graph.nodes:
            if not self._is_constant(node):
                stage = self._told(node)
                if stage is not None:
                    self.places[node] = len(self.found)
                    self.found.append(stage)
        return self.found

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters and numbers only; its value is then known."""
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.graph)
            self.constants[node] = value
            return True
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not all(i in self.constants for i in inputs):
            return False
        if not inputs and node.op == "call_method":
            return False
        try:
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
            self.constants[node] = _call(node, *arguments)
        except Exception:  # it stays unknown
            return False
        return True

    def _signals(self, node: fx.Node) -> tuple[int, ...]:
        """The stages that enter a node, in the order of its arguments; one that enters twice stands twice."""
        found: list[int] = []
        fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(self.places[n]) if n in self.places else None)
        return tuple(found)

    def _told(self, node: fx.Node) -> Stage | None:
        """The node's stage; an unknown one where its arguments are none that we have thought of."""
        try:
            return self._stage(node)
        except Exception:
            return Stage(name=node.name, kind="unknown", sources=self._signals(node))

    def _stage(self, node: fx.Node) -> Stage | None:
        if node.op == "placeholder":
            return Stage(name=node.name, kind="input")
        sources = self._signals(node)
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not (sources or isinstance(module, nn.Embedding)):
            return None
        if node.op == "output":  # the first of several counts
            return Stage(name="output", kind="output", sources=sources[:1])
        stage: Stage | None
        if module is None:
            stage = self._operation(node, _name(node))
        else:
            stage = stage_of(str(node.target), module, self._shape(node), self._input_shape(node))
        if stage is None:
            return None
        if stage.function is not None:
            stage.function.slope(np.zeros(2))  # raises where it is not what it seems
        several = {"mixing": 3, "attention": 3, "multiply": 2, "product": 2}.get(stage.kind, len(sources))
        return replace(stage, sources=sources[:several] if stage.kind in _SEVERAL else sources[:1])

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.shapes.get(node.name, ())

    def _input_shape(self, node: fx.Node) -> tuple[int, ...]:
        inputs = [i for i in node.all_input_nodes if i in self.places]
        return self._shape(inputs[0]) if inputs else ()

    def _operation(self, node: fx.Node, name: str) -> Stage | None:
        if name in ("size", "shape", "dim", "getattr", "numel", "device", "dtype"):
            return None
        where = node.name
        if name in _ELEMENTWISE:
            kind = _LAYER_KINDS.get(name.rstrip("_"), "other")
            return Stage(
                name=where, kind="activation", layer_kind=kind, function=_elementwise(lambda x: self._call_on(node, x))
            )
        if name in _MOVES:
            return Stage(name=where, kind="reshape")
        if name in _ADDITIONS | _PRODUCTS | _DIVISIONS | {"neg"}:
            return self._arithmetic(node, name)
        if name in _JOINS:
            return Stage(name=where, kind="concatenate", shares=self._shares(node))
        if name == "dropout" or name.startswith("dropout"):
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            return Stage(name=where, kind="dropout", rate=_number(rate) if training is not False else 0.0)
        if name in ("mean", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"):
            return Stage(name=where, kind="average", window=_ratio(self._input_shape(node), self._shape(node)))
        if name.startswith(("max_pool", "adaptive_max_pool")):
            return Stage(name=where, kind="max-pool", window=_ratio(self._input_shape(node), self._shape(node)))
        if name in ("linear", "matmul", "mm", "bmm"):
            return self._product(node, name)
        if name in ("softmax", "scaled_dot_product_attention"):
            return self._attention(node, name)
        if name in ("masked_fill", "masked_fill_", "tril", "triu", "where"):
            return Stage(name=where, kind="reshape")
        return Stage(name=where, kind=name)

    def _call_on(self, node: fx.Node, x: Tensor) -> Any:
        """The node's function with `x` in place of the signal."""
        arguments, keywords = fx.node.map_arg((node.args, node.kwargs), lambda n: self.constants.get(n, x))
        return _call(node, arguments, {**keywords, "inplace": False} if "inplace" in keywords else keywords)

    def _arithmetic(self, node: fx.Node, name: str) -> Stage:
        signals = [a for a in node.args if isinstance(a, fx.Node) and a in self.places]
        if len(signals) == 2:
            kind = "add" if name in _ADDITIONS else "multiply" if name in _PRODUCTS else "ratio"
            if kind == "multiply" and signals[0] is signals[1]:
                return Stage(name=node.name, kind="activation", layer_kind="other", function=_elementwise(torch.square))
            return Stage(name=node.name, kind=kind)
        if name == "neg":
            return Stage(name=node.name, kind="scale", gain=1.0, offset=-1.0)
        values = [self._values(a) for a in node.args[:2] if a not in self.places]
        if not values or values[0] is None:
            return Stage(name=node.name, kind=name)
        mean_square, mean = values[0]
        if name in _ADDITIONS:
            sign = -1.0 if name in ("sub", "isub", "sub_") else 1.0
            return Stage(name=node.name, kind="shift", bias_variance=mean_square, offset=sign * mean)
        if name in _PRODUCTS:
            return Stage(name=node.name, kind="scale", gain=mean_square, offset=mean)
        if node.args[0] not in self.places or not mean_square:
            return Stage(name=node.name, kind="ratio")
        return Stage(name=node.name, kind="scale", gain=1 / mean_square, offset=mean)

    def _values(self, argument: Any) -> tuple[float, float] | None:
        """(mean square, mean) of a constant operand."""
        value = self.constants.get(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
            return mean_square(value), float(value.detach().double().mean())
        return (float(value) ** 2, float(value)) if isinstance(value, (int, float)) else None

    def _shares(self, node: fx.Node) -> tuple[float, ...]:
        sizes = [math.prod(self._shape(i)) for i in node.all_input_nodes if self._shape(i)]
        total = sum(sizes)
        complete = len(sizes) == len(self._signals(node))
        return tuple(size / total for size in sizes) if complete and total else ()

    def _attention(self, node: fx.Node, name: str) -> Stage:
        shape = self._shape(node.all_input_nodes[0])
        if name == "softmax":
            axis: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
            window = float(shape[int(axis)]) if shape else math.nan
            return Stage(name=node.name, kind="softmax", window=window)
        tokens, width = shape[-2:] if len(shape) > 1 else (math.nan, math.nan)
        return Stage(name=node.name, kind="mixing", window=float(tokens), width=float(width))

    def _product(self, node: fx.Node, name: str) -> Stage:
        """A product with weights that are no module's."""
        constants = [self.constants.get(a) for a in node.args if isinstance(a, fx.Node)]
        weight = next((c for c in constants if isinstance(c, Tensor)), None)
        if weight is None or weight.dim() != 2 or weight.is_meta:
            inner = self._shape(node.all_input_nodes[0])[-1:] if len(self._signals(node)) == 2 else ()
            return Stage(
                name=node.name, kind="product" if inner else name, window=float(inner[0]) if inner else math.nan
            )
        is_left = node.args[0] not in self.places
        fan_in = weight.shape[1] if name == "linear" or is_left else weight.shape[0]
        owner = next(_owner(a) for a in node.args if isinstance(a, fx.Node) and a in self.constants)
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        shift = self._values(bias) if bias is not None else None
        return Stage(
            name=owner,
            kind="linear",
            weight_variance=fan_in * mean_square(weight),
            bias_variance=shift[0] if shift is not None else 0.0,
        )


_SEVERAL = frozenset({"add", "multiply", "concatenate", "product", "mixing", "attention"})


def _owner(node: fx.Node) -> str:
    """The parameter that a constant was made from."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target)


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _call(node: fx.Node, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
    target: Any = node.target
    return target(*arguments, **keywords)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _ratio(before: tuple[int, ...], after: tuple[int, ...]) -> float:
    """How many entries become one; NaN where shapes are unknown."""
    return math.prod(before) / max(1, math.prod(after)) if before and after else math.nan


# ---- modules -> stages ------------------------------------------------------------------------------------------


def stage_of(name: str, module: nn.Module, shape: tuple[int, ...] = (), before: tuple[int, ...] = ()) -> Stage:
    """The stage that a layer is; `shape` and `before` are those of its output and input, () where unknown."""
    kind = describe.kind_of(module)
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return Stage(name=name, kind="lazy")
    if kind in ("linear", "conv", "embedding"):
        return _weighted(name, kind, module)
    if kind in _NORMALIZATIONS:
        return _normalization(name, kind, module, before)
    if kind in describe.ACTIVATIONS or type(module).__name__ in _ELEMENTWISE_MODULES:
        return Stage(name=name, kind="activation", layer_kind=kind, function=_activation(module))
    if kind == "dropout":
        return Stage(name=name, kind="dropout", rate=float(getattr(module, "p", 0.0)) if module.training else 0.0)
    if kind == "pool":
        return _pool(name, module, shape, before)
    if isinstance(module, nn.Softmax):
        return Stage(name=name, kind="softmax", window=float(shape[module.dim or -1]) if shape else math.nan)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(name, module, before)
    if kind in ("flatten", "identity") or isinstance(module, nn.Unflatten):
        return Stage(name=name, kind="reshape")
    return Stage(name=name, kind=kind if kind in _OPAQUE else type(module).__name__)


def _sequence(root: nn.Sequential) -> Iterator[Stage]:
    """The layers of nested sequences in a chain; any other module in it is unknown, or what it is as a layer."""
    yield Stage(name="input", kind="input")
    for index, (name, module) in enumerate(_flat(root, "")):
        yield replace(stage_of(name, module), sources=(index,))


def _flat(root: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in root.named_children():
        if isinstance(module, nn.Sequential):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _weighted(name: str, kind: str, module: Any) -> Stage:
    weight, bias = module.weight, getattr(module, "bias", None)
    fan_in = describe.fans(module)[0]
    if getattr(module, "transposed", False):  # between the strides, each output sees only some of the weights
        fan_in = fan_in / math.prod(module.stride)
    return Stage(
        name=name,
        kind=kind if not isinstance(module, nn.Bilinear) else "bilinear",
        weight_variance=fan_in * mean_square(weight),
        bias_variance=mean_square(bias) if bias is not None else 0.0,
    )


def mean_square(tensor: Tensor) -> float:
    """The mean of the squared entries, in float64; 0 for an empty tensor."""
    return float(tensor.detach().double().square().mean()) if tensor.numel() else 0.0


def _normalization(name: str, kind: str, module: Any, before: tuple[int, ...]) -> Stage:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    epsilon = getattr(module, "eps", None)
    running, batched = None, kind == "batch-norm"
    if batched and not module.training and module.running_var is not None:
        running = (mean_square(module.running_mean), float(module.running_var.double().mean()))
    return Stage(
        name=name,
        kind=kind,
        gain=mean_square(weight) if isinstance(weight, Tensor) else 1.0,
        bias_variance=mean_square(bias) if bias is not None else 0.0,
        epsilon=float(np.finfo(np.float32).eps) if epsilon is None else float(epsilon),
        running=running,
        positions=math.prod(before[2:]) if len(before) > 2 else 1.0 if before else _positions(module),
    )


def _positions(module: nn.Module) -> float:
    """How many entries of one sample share a channel's statistics, where the shape is unknown: many in an image."""
    return 1.0 if isinstance(module, nn.BatchNorm1d) else 1e3


def _attention(name: str, module: nn.MultiheadAttention, before: tuple[int, ...]) -> Stage:
    joint: Any = module.in_proj_weight
    values: Tensor = module.v_proj_weight if joint is None else joint.chunk(3)[2]
    out = module.out_proj.weight
    bias: Any = module.out_proj.bias
    return Stage(
        name=name,
        kind="attention",
        weight_variance=values.shape[1] * mean_square(values) * out.shape[1] * mean_square(out),
        bias_variance=mean_square(bias) if bias is not None else 0.0,
        window=float(before[1 if module.batch_first else 0]) if len(before) == 3 else math.nan,
    )


def _pool(name: str, module: Any, shape: tuple[int, ...], before: tuple[int, ...]) -> Stage:
    of = type(module).__name__
    kernel = getattr(module, "kernel_size", None)
    if isinstance(kernel, int):
        window = float(kernel ** int(of[-2])) if of[-2:] in ("1d", "2d", "3d") else math.nan
    else:
        window = _ratio(before, shape) if kernel is None else float(math.prod(kernel))
    return Stage(name=name, kind="max-pool" if "Max" in of else "average" if "Avg" in of else of, window=window)


def _activation(module: nn.Module) -> Activation:
    if isinstance(module, nn.PReLU):  # a slope for each channel: their typical one
        slope = math.sqrt(mean_square(module.weight))
        return _elementwise(lambda x: nn.functional.leaky_relu(x, slope))
    twin = copy.deepcopy(module)
    if hasattr(twin, "inplace"):
        twin.inplace = False  # type: ignore[assignment]
    return _elementwise(twin.eval())


def _elementwise(function: Callable[[Tensor], Any]) -> Activation:
    """A function of torch's and its derivative on NumPy arrays."""

    def value(z: Floats) -> Floats:
        with torch.no_grad():
            return np.asarray(function(torch.from_numpy(np.array(z, dtype=np.float64))).numpy())

    def slope(z: Floats) -> Floats:
        with torch.enable_grad():
            x = torch.from_numpy(np.array(z, dtype=np.float64)).requires_grad_()
            (found,) = torch.autograd.grad(function(x).sum(), x)
        return np.asarray(found.numpy())

    return Activation(value, slope)
