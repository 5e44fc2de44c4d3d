"""Changes of what a model computes: activations, normalization, shortcuts, the output activation.

Nothing is wrapped or renamed. A module that becomes another activation stays the same object under the same name; what
is inserted stands behind a layer, as a child or a parameter of it with a name of its own. The program's `state_dict`
keeps its keys and gains those of inserted parameters, which the optimizer trains in the group of the layer's weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _passage as passages
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._passage import Call, Passage


@dataclass(frozen=True)
class Site:
    """Where a change to a model takes place: the model, its forward pass, and the optimizer that was made for it."""

    root: nn.Module
    optimizer: Optimizer
    passage: Passage

    def layers(self, kinds: Sequence[str], names: Sequence[str] = ()) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the layers of these kinds, or of those among them with these names."""
        for name, module in describe.walk(self.root):
            if describe.kind_of(module) in kinds and (not names or name in names):
                yield name, module


class ModelEffect:
    """One change in effect on one model. Its constructor applies it, or raises CannotApply."""

    detail = ""
    """What was done, in words."""

    def unmet(self) -> str | None:
        """After a forward and a backward pass: why nothing came of it, if nothing did."""

    def undo(self) -> str | None:
        """Put the model back; a sentence where something stays changed."""


# ---- activations ----------------------------------------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "leaky-relu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "hardtanh": nn.Hardtanh, "softplus": nn.Softplus, "softsign": nn.Softsign,
    "identity": nn.Identity,
}  # fmt: skip

TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu, "leaky-relu": functional.leaky_relu, "elu": functional.elu, "selu": functional.selu,
    "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "hardtanh": functional.hardtanh, "softplus": functional.softplus, "softsign": functional.softsign,
}  # fmt: skip


class _Placed:
    """Mixed into the class of an activation that `forward` may call anywhere; copied with the model, not pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.")), ()


class _Hidden(_Placed):
    """Behind the last layer with weights it stays what it was."""

    def forward(self, x: Tensor) -> Tensor:
        passage, original, state = self.__dict__["_isograd_before"]
        if not passage.at_output:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        before = original.__new__(original)
        before.__dict__.update(state)
        return original.forward(before, x)  # type: ignore[no-any-return]


class _Transparent(_Placed):
    """Behind the last layer with weights it passes its input through."""

    def forward(self, x: Tensor) -> Tensor:
        passage, _, _ = self.__dict__["_isograd_before"]
        return x if passage.at_output else super().forward(x)  # type: ignore[misc]


class _ClassChange:
    """An activation module that has become another one in place: every reference to it, and its hooks, stay good."""

    def __init__(self, module: nn.Module, cls: type[nn.Module], state: dict[str, Any]) -> None:
        self._module, self._before = module, (type(module), dict(module.__dict__))
        module.__class__ = cls
        module.__dict__.update(_options(state))

    def remember(self, passage: Passage) -> None:
        """Leave with the module what it was, for the calls in which it is still that."""
        cls, state = self._before
        self._module.__dict__["_isograd_before"] = passage, cls, state

    def restore(self) -> None:
        cls, state = self._before
        self._module.__class__ = cls
        for key in ("_isograd_before", *_options(self._module.__dict__)):
            self._module.__dict__.pop(key, None)
        self._module.__dict__.update(_options(state))


def _options(state: dict[str, Any]) -> dict[str, Any]:
    """What an activation was constructed with."""
    return {key: value for key, value in state.items() if not key.startswith("_") and key != "training"}


class ActivationReplacement(ModelEffect):
    """`ReplaceActivations`: modules become another activation in place, function calls in `forward` are intercepted.

    The output's activation, called behind the last layer with weights, stays. Where a module's place does not tell
    (it is an attribute that `forward` may call anywhere), it is looked at call by call.
    """

    def __init__(self, change: _changes.ReplaceActivations, site: Site) -> None:
        if change.target not in TARGETS:
            raise CannotApply(f"There is no activation {change.target!r}; there are {', '.join(TARGETS)}.")
        self._change, self._site = change, site
        self._changes: list[_ClassChange] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._recurrent: list[tuple[nn.Module, dict[str, Any]]] = []
        self._calls = 0
        hidden = _activations_before_output(site)
        modules = [module for _, module in site.layers(change.sources, change.layers)]
        modules = [module for module in modules if change.layers or module not in hidden.output]
        for module in modules:
            self._replace(module, certain=module in hidden.certain)
        for module in site.root.modules():
            self._replace_attributes(module)
            self._replace_recurrence(module)
        self._end = passages.intercept(self._claim)
        site.passage.renamed.update(dict.fromkeys(change.sources, change.target))
        self.detail = f"{len(modules)} modules" if modules else "function calls"

    def _replace(self, module: nn.Module, *, certain: bool) -> None:
        new = MODULES[self._change.target]()
        if certain or self._change.layers:
            self._changes.append(_ClassChange(module, type(new), new.__dict__))
            return
        cls = type(type(new).__name__, (_Hidden, type(new)), {})
        self._changes.append(_ClassChange(module, cls, new.__dict__))
        self._changes[-1].remember(self._site.passage)

    def _replace_attributes(self, module: nn.Module) -> None:
        """A function in an attribute, as `TransformerEncoderLayer` keeps it."""
        held = [name for name, kind in passages.functions_held_by(module) if kind in self._change.sources]
        if self._change.layers or not held:
            return
        replaced = dict.fromkeys(held, TARGETS[self._change.target])
        if "activation_relu_or_gelu" in vars(module):  # or inference would go on with the old one
            replaced["activation_relu_or_gelu"] = 0  # type: ignore[assignment]
        self._attributes += [(module, name, vars(module)[name]) for name in replaced]
        vars(module).update(replaced)

    def _replace_recurrence(self, module: nn.Module) -> None:
        """Plain recurrent networks know two activations."""
        target, now = self._change.target, getattr(module, "nonlinearity", None)
        if now in self._change.sources and target in ("relu", "tanh") and not self._change.layers:
            self._recurrent.append(
                (module, {key: vars(module)[key] for key in ("nonlinearity", "mode") if key in vars(module)})
            )
            vars(module)["nonlinearity"] = target
            if isinstance(module, nn.RNN):
                module.mode = f"RNN_{target.upper()}"

    def _claim(self, kind: str, x: Any, call: Call) -> Call:
        passage = self._site.passage
        if kind not in self._change.sources or not passage.holds(x) or passage.at_output or not self._is_named():
            return call
        self._calls += 1
        return lambda: TARGETS[self._change.target](x)

    def _is_named(self) -> bool:
        """Whether calls behind the layer called last are meant: a function call is known by the layer before it."""
        names = [name for name, module in describe.walk(self._site.root) if module is self._site.passage.last_layer]
        layers = self._change.layers
        return not layers or any(layer == name or layer.startswith(f"{name}.") for name in names for layer in layers)

    def unmet(self) -> str | None:
        if self._changes or self._attributes or self._recurrent or self._calls:
            return None
        return f"No hidden activation of the kind {' or '.join(self._change.sources)} was called in the model."

    def undo(self) -> str | None:
        self._end()
        self._site.passage.renamed.clear()
        for change in reversed(self._changes):
            change.restore()
        for module, name, value in reversed(self._attributes):
            vars(module)[name] = value
        for module, before in self._recurrent:
            vars(module).update(before)
        return None


@dataclass(frozen=True)
class _Places:
    """Activation modules whose place in the model is known: before the output layer, or behind it."""

    certain: set[nn.Module]
    output: set[nn.Module]


def _activations_before_output(site: Site) -> _Places:
    """Within `Sequential`, order is place; anything else may be called anywhere."""
    order = {module: index for index, (_, module) in enumerate(describe.walk(site.root))}
    last = order.get(site.passage.output_layer, -1) if site.passage.output_layer is not None else -1
    loose = {child for m in order if not isinstance(m, nn.Sequential) for child in m.children()}
    placed = {m for m in order if m not in loose}
    return _Places({m for m in placed if order[m] < last}, {m for m in placed if order[m] > last >= 0})


class OutputActivationRemoval(ModelEffect):
    """`RemoveOutputActivation`: what is called behind the last layer with weights passes its input through, be it a
    module, a function in `forward`, or a function that the loop calls on the model's result.
    """

    def __init__(self, change: _changes.RemoveOutputActivation, site: Site) -> None:
        self._kind, self._passage = change.kind, site.passage
        self._changes: list[_ClassChange] = []
        self._handles: list[Any] = []
        self._seen = False
        placed = _activations_before_output(site)
        for _, module in site.layers((change.kind,)):
            if module not in placed.certain:
                self._remove(module, certain=module in placed.output)
        self._end = passages.intercept(self._claim)

    def _remove(self, module: nn.Module, *, certain: bool) -> None:
        if certain:
            self._seen = True
            self._changes.append(_ClassChange(module, nn.Identity, {}))
            return
        cls = type(type(module).__name__, (_Transparent, type(module)), {})
        self._changes.append(_ClassChange(module, cls, {}))
        self._changes[-1].remember(self._passage)
        self._handles.append(module.register_forward_hook(passages.hook(self._note)))

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._seen |= bool(args) and output is args[0]

    def _claim(self, kind: str, x: Any, call: Call) -> Call:
        passage = self._passage
        behind = passage.at_output and (passage.depth > 0 or passage.is_answer(x))
        if kind != self._kind or not behind:
            return call
        self._seen = True
        return lambda: x

    def unmet(self) -> str | None:
        return None if self._seen else f"No {self._kind} is called behind the model's last layer with weights."

    def undo(self) -> str | None:
        self._end()
        for handle in self._handles:
            handle.remove()
        for change in reversed(self._changes):
            change.restore()
        return "the weights have been trained without the output activation"


# ---- inserted parameters ------------------------------------------------------------------------------------------


def join_optimizer(optimizer: Optimizer, weight: Tensor, fresh: Iterable[nn.Parameter]) -> None:
    """Let the optimizer train new parameters in the group that holds `weight`, so that schedules stay per group."""
    group = next(
        (g for g in optimizer.param_groups if any(p is weight for p in g["params"])), optimizer.param_groups[0]
    )
    for parameter in fresh:
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(f"inserted.{len(group['params'])}")
        if optimizer.state:  # some optimizers make a parameter's state when they are constructed
            with taps.silenced():
                twin = type(optimizer)([{**group, "params": [parameter]}])  # type: ignore[call-arg]
            if parameter in twin.state:
                optimizer.state[parameter] = twin.state[parameter]


def leave_optimizer(optimizer: Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Take parameters out of an optimizer again, with their state."""
    ids = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        kept = [index for index, parameter in enumerate(group["params"]) if id(parameter) not in ids]
        if "param_names" in group:
            group["param_names"][:] = [group["param_names"][index] for index in kept]
        group["params"][:] = [group["params"][index] for index in kept]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in ids]:
        del optimizer.state[parameter]


def refuse_wrapped(root: nn.Module) -> None:
    """Data parallelism has already decided which gradients it shares between ranks."""
    if any(describe.is_wrapper(module) for module in root.modules()):
        raise CannotApply("The model is wrapped for data parallelism already: new parameters would not be shared.")


_NORMS = ("batch-norm", "layer-norm", "group-norm", "rms-norm", "instance-norm")


class NormalizationInsertion(ModelEffect):
    """`InsertNormalization`: a child `normalization` of each layer takes what the layer returns.

    Features are the last axis of a linear layer's result and axis 1 of a convolution's. For convolutions "layer" is
    one group over channels and positions; "group" has up to 32 groups (Wu & He 2018), as many as divide the channels.
    """

    def __init__(self, change: _changes.InsertNormalization, site: Site) -> None:
        refuse_wrapped(site.root)
        self._optimizer = site.optimizer
        self._layers = list(_layers_to_normalize(change, site))
        if not self._layers:
            raise CannotApply("Every hidden linear or convolution is followed by a normalization already.")
        self._handles = []
        for layer in self._layers:
            norm = _normalization(change.kind, layer)
            layer.add_module("normalization", norm.to(layer.weight.device, layer.weight.dtype))  # type: ignore[arg-type]
            self._handles.append(layer.register_forward_hook(_normalize))
            join_optimizer(site.optimizer, layer.weight, norm.parameters())  # type: ignore[arg-type]
        self.detail = f"behind {len(self._layers)} layers"

    def undo(self) -> str | None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            leave_optimizer(self._optimizer, layer.normalization.parameters())  # type: ignore[union-attr]
            del layer.normalization
        return "the layers' weights have been trained with normalization behind them"


def _layers_to_normalize(change: _changes.InsertNormalization, site: Site) -> Iterator[nn.Module]:
    order = [module for _, module in describe.walk(site.root)]
    named = [module for _, module in site.layers(("linear", "conv"), change.layers)]
    attention = {m for parent in order if isinstance(parent, nn.MultiheadAttention) for m in parent.modules()}
    for module in named:
        following = order[order.index(module) + 1] if module is not order[-1] else module
        is_hidden = bool(change.layers) or module is not site.passage.output_layer
        is_bilinear = isinstance(module, nn.Bilinear)
        if is_hidden and not is_bilinear and module not in attention and describe.kind_of(following) not in _NORMS:
            yield module


def _normalization(kind: str, layer: nn.Module) -> nn.Module:
    size = int(getattr(layer, "out_features", 0) or getattr(layer, "out_channels", 0))
    is_conv = describe.kind_of(layer) == "conv"
    if kind == "batch":
        axes = next((n for n in (1, 2, 3) if f"{n}d" in type(layer).__name__), 1)
        return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes](size)
    if kind == "group":
        return nn.GroupNorm(math.gcd(32, size), size)
    if kind == "rms":
        return nn.RMSNorm(size)
    return nn.GroupNorm(1, size) if is_conv else nn.LayerNorm(size)


def _normalize(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook; it finds the normalization in the layer, so that a copy of the model uses its own."""
    norm = layer.normalization
    if describe.kind_of(layer) == "conv":
        if isinstance(norm, nn.RMSNorm):
            return norm(output.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
        return norm(output)  # type: ignore[no-any-return, operator]
    rows = output.reshape(-1, output.shape[-1])
    return norm(rows).reshape(output.shape)  # type: ignore[no-any-return, operator]


class ShortcutInsertion(ModelEffect):
    """`InsertShortcuts`: x + f(x) around every layer that keeps its input's shape, up to its activation.

    f is the layer, what normalizes or drops its result, and the activation applied to that, a module or a function;
    a layer without an activation behind it gets no shortcut. "residual": He et al. 2016, arXiv:1512.03385. "rezero":
    x + a f(x) with a trained a of 0, a parameter `shortcut_scale` of the layer (Bachlechner et al. 2021,
    arXiv:2003.04887).
    """

    def __init__(self, change: _changes.InsertShortcuts, site: Site) -> None:
        if change.kind == "dense":
            raise CannotApply("Dense connections widen every following layer: they need another model, not a change.")
        refuse_wrapped(site.root)
        self._passage, self._optimizer = site.passage, site.optimizer
        self._scaled = change.kind == "rezero"
        self._open: dict[int, tuple[Tensor, Tensor, nn.Module]] = {}
        self._handles: list[Any] = []
        self._seen = 0
        self._layers = [
            m for _, m in site.layers(("linear", "conv")) if m is not site.passage.output_layer and _keeps(m)
        ]
        if not self._layers:
            raise CannotApply("No layer returns the shape that it takes: there is no place for a shortcut.")
        for layer in self._layers:
            self._handles.append(layer.register_forward_hook(passages.hook(self._begin)))
            if self._scaled:
                self._add_scale(layer)
        for _, module in describe.walk(site.root):
            if describe.kind_of(module) in (*_NORMS, "dropout"):
                self._handles.append(module.register_forward_hook(passages.hook(self._go_on)))
            elif describe.kind_of(module) in describe.ACTIVATIONS:
                self._handles.append(module.register_forward_hook(passages.hook(self._close)))
        self._end = passages.intercept(self._claim)
        self._passage.afterwards.append(self._open.clear)
        self.detail = f"around {len(self._layers)} layers"

    def _add_scale(self, layer: nn.Module) -> None:
        scale = nn.Parameter(torch.zeros((), dtype=layer.weight.dtype, device=layer.weight.device))  # type: ignore[arg-type]
        layer.register_parameter("shortcut_scale", scale)
        join_optimizer(self._optimizer, layer.weight, [scale])  # type: ignore[arg-type]

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape == output.shape:
            self._open[id(output)] = output, x, layer

    def _go_on(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        block = self._open.pop(id(args[0]), None) if args else None
        if block is not None and block[0] is args[0]:
            self._open[id(output)] = output, block[1], block[2]

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._join(args[0] if args else None, output)

    def _claim(self, kind: str, x: Any, call: Call) -> Call:
        if id(x) not in self._open or kind not in describe.ACTIVATIONS:
            return call
        return lambda: self._join(x, call())

    def _join(self, entered: Any, output: Any) -> Any:
        block = self._open.pop(id(entered), None)
        if block is None or block[0] is not entered:
            return output
        _, x, layer = block
        self._seen += 1
        return x + layer.shortcut_scale * output if self._scaled else x + output

    def unmet(self) -> str | None:
        return None if self._seen else "No activation was called on the result of a layer that keeps its input's shape."

    def undo(self) -> str | None:
        self._end()
        self._passage.afterwards.remove(self._open.clear)
        for handle in self._handles:
            handle.remove()
        if self._scaled:
            for layer in self._layers:
                leave_optimizer(self._optimizer, [layer.shortcut_scale])  # type: ignore[list-item]
                del layer.shortcut_scale
        return "the layers' weights have been trained with shortcuts around them"


def _keeps(layer: nn.Module) -> bool:
    """Whether a layer can return the shape that it takes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    channels = getattr(layer, "in_channels", 0), getattr(layer, "out_channels", -1)
    return channels[0] == channels[1] and set(getattr(layer, "stride", (2,))) == {1}
