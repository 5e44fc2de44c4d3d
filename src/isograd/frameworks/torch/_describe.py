"""What a PyTorch program consists of: layers, parameters, and where models and their names come from. Reads only."""

from __future__ import annotations

import gc
import math
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from isograd._history import Layer, Parameter

_KINDS: tuple[tuple[str, str], ...] = (
    ("Linear", "linear"), ("Bilinear", "linear"), ("Conv", "conv"), ("Embedding", "embedding"),
    ("BatchNorm", "batch-norm"), ("LayerNorm", "layer-norm"), ("GroupNorm", "group-norm"), ("RMSNorm", "rms-norm"),
    ("InstanceNorm", "instance-norm"), ("Dropout", "dropout"), ("LeakyReLU", "leaky-relu"), ("PReLU", "leaky-relu"),
    ("RReLU", "leaky-relu"), ("ReLU6", "hardtanh"), ("ReLU", "relu"), ("SELU", "selu"), ("CELU", "elu"),
    ("GELU", "gelu"), ("ELU", "elu"), ("SiLU", "silu"), ("LogSoftmax", "log-softmax"), ("Softmax", "softmax"),
    ("LogSigmoid", "other"), ("Hardsigmoid", "other"), ("Sigmoid", "sigmoid"), ("Tanhshrink", "other"),
    ("Hardtanh", "hardtanh"), ("Tanh", "tanh"),
    ("Softplus", "softplus"), ("Softsign", "softsign"), ("Pool", "pool"), ("MultiheadAttention", "attention"),
    ("RNNCell", "rnn-cell"), ("LSTMCell", "lstm-cell"), ("GRUCell", "gru-cell"), ("RNN", "rnn"), ("LSTM", "lstm"),
    ("GRU", "gru"), ("Flatten", "flatten"), ("Identity", "identity"),
)  # fmt: skip
"""First match of a torch class name, longest names first where one contains another."""

ACTIVATIONS = frozenset(
    {"relu", "leaky-relu", "elu", "selu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "softplus", "softsign"}
)

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def kind_of(module: nn.Module) -> str:
    """The framework-neutral kind of a module, by the torch class that it is or derives from."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.") and cls is not nn.Module:
            return next((kind for part, kind in _KINDS if part in cls.__name__), "other")
    return "other"


def activation_parameters(module: nn.Module) -> dict[str, float]:
    """The constants that an activation's slope depends on."""
    if isinstance(module, nn.Hardtanh):
        return {"low": float(module.min_val), "high": float(module.max_val)}
    if isinstance(module, nn.LeakyReLU):
        return {"negative_slope": float(module.negative_slope)}
    if isinstance(module, nn.SELU):
        return {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}
    if isinstance(module, nn.ELU):
        return {"alpha": float(module.alpha)}
    if isinstance(module, nn.CELU):  # alpha * (exp(x / alpha) - 1)
        return {"alpha": float(module.alpha), "input_scale": 1 / float(module.alpha)}
    if isinstance(module, nn.Softplus):
        return {"beta": float(module.beta)}
    return {}


def is_layer(module: nn.Module) -> bool:
    """Whether values are read at this module: it has no children, or holds parameters itself."""
    return next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None


def is_wrapper(module: nn.Module) -> TypeGuard[nn.parallel.DistributedDataParallel | nn.DataParallel[nn.Module]]:
    """Whether the module only wraps another one under the name `module` (data parallelism)."""
    return isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def walk(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root` once, in registration order, under the user's name (wrapper segments left out)."""
    yield from _walk(root, prefix, set())


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    if is_wrapper(module):
        yield from _walk(module.module, name, seen)
        return
    if not isinstance(module, torch._dynamo.OptimizedModule if "torch._dynamo" in sys.modules else ()):
        yield name, module
    for child_name, child in module.named_children():
        segment = "" if child_name in _WRAPPER_SEGMENTS else child_name
        yield from _walk(child, ".".join(part for part in (name, segment) if part), seen)


def layer_of(name: str, module: nn.Module) -> Layer:
    """The description of a module before it was ever called."""
    fan_in, fan_out = fans(module)
    return Layer(name=name, kind=kind_of(module), type=type(module).__name__, fan_in=fan_in, fan_out=fan_out)


def fans(module: nn.Module) -> tuple[int, int]:
    """(fan-in, fan-out) of one unit, counted as in Glorot & Bengio 2010: for convolutions times the receptive field."""
    if isinstance(module, nn.modules.rnn.RNNBase):
        return module.input_size, module.hidden_size
    if isinstance(module, nn.modules.rnn.RNNCellBase):
        return module.input_size, module.hidden_size
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.dim() < 2:
        return 0, 0
    if isinstance(module, nn.Embedding):
        return 1, weight.shape[1]
    field = math.prod(weight.shape[2:])
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):
        return weight.shape[0] * field // groups, weight.shape[1] * field
    return weight.shape[1] * field, weight.shape[0] * field // groups


def parameter_of(name: str, layer: str, tensor: Tensor, group: int) -> Parameter:
    """The description of a parameter tensor; `group` is -1 when no optimizer holds it."""
    return Parameter(
        name=name,
        layer=layer,
        shape=() if is_lazy(tensor) else tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        trainable=tensor.requires_grad,
        optimized=group >= 0,
        group=group,
    )


def all_modules() -> list[nn.Module]:
    """Every module alive in the process. `type()` instead of `isinstance`, which would wake lazy proxies."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]


def all_optimizers() -> list[torch.optim.Optimizer]:
    """Every optimizer alive in the process."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]


def names_of(parameters: list[Tensor]) -> list[str]:
    """A name for each tensor: the path below the topmost module that holds it, behind that module's class.

    What a module keeps in a plain list, tuple or dict is named with its place there, `Model.hidden[0].weight`: it is
    no part of the module, and its parameters are not among the module's.
    """
    names: dict[int, str] = {}
    modules = all_modules() if parameters else []
    for module, attribute, key, thing in kept_in_containers(modules):
        place = f"{type(module).__name__}.{attribute}[{key!r}]"
        if isinstance(thing, nn.Module):
            names |= {id(tensor): f"{place}.{path}" for path, tensor in thing.named_parameters()}
        else:
            names[id(thing)] = place
    for root in _roots_among(modules, [p for p in parameters if id(p) not in names]):
        for path, tensor in root.named_parameters():
            names.setdefault(id(tensor), f"{type(root).__name__}.{path}")
    return [names.get(id(p), f"a tensor of shape {list(p.shape)}") for p in parameters]


def kept_in_containers(
    modules: Iterable[nn.Module],
) -> Iterator[tuple[nn.Module, str, object, nn.Module | nn.Parameter]]:
    """Modules and parameters in the lists, tuples and dicts among the attributes of `modules`: (module, attribute,
    index or key, what is there).

    A list of one whole network is left out: that is how a network is kept out of another one's parameters on purpose.
    """
    for module in list(modules):
        registered = {id(thing) for thing in (*module.children(), *module.parameters())}
        for name, value in list(vars(module).items()):
            if name not in vars(_PLAIN_MODULE):  # torch's own tables: of children, parameters, hooks
                kept = [(key, thing) for key, thing in _entries(value) if id(thing) not in registered]
                if len(kept) > 1 or not any(
                    isinstance(thing, nn.Module) and list(thing.children()) for _, thing in kept
                ):
                    yield from ((module, name, key, thing) for key, thing in kept)


def _entries(container: object) -> list[tuple[object, nn.Module | nn.Parameter]]:
    """The modules and parameters in a list, tuple or dict, with their index or key."""
    if not isinstance(container, (list, tuple, dict)):
        return []
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return [(key, thing) for key, thing in list(items) if issubclass(type(thing), (nn.Module, nn.Parameter))]


_PLAIN_MODULE = nn.Module()


def roots_holding(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The topmost modules alive that hold any of `parameters`, in the order of the parameters."""
    return _roots_among(all_modules(), parameters)


def _roots_among(modules: list[nn.Module], parameters: Iterable[Tensor]) -> list[nn.Module]:
    children = {id(child) for module in modules for child in module.children()}
    tops = [module for module in modules if id(module) not in children]
    owner = {id(parameter): top for top in tops for parameter in top.parameters()}
    found = {id(owner[id(p)]): owner[id(p)] for p in parameters if id(p) in owner}
    return list(found.values())


def locals_of(error: BaseException) -> Iterator[Tensor]:
    """The tensors among the local variables where `error` was raised and of the callers, innermost frame first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        yield from (value for value in frame.f_locals.values() if isinstance(value, Tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is only a shard of the user's parameter, so that a local norm would be wrong."""
    return type(tensor).__name__ in ("DTensor", "FlatParameter") or hasattr(tensor, "_sharding_spec")


def output_layer(root: nn.Module) -> nn.Module | None:
    """The last linear or convolution that was registered below `root`: what the model answers with, as a rule."""
    found = [module for _, module in walk(root) if kind_of(module) in ("linear", "conv")]
    return found[-1] if found else None
