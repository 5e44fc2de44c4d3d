"""Changes of what a model computes: activations, normalization, shortcuts, the output activation.

Nothing is wrapped or renamed. A module that becomes another activation stays the same object under the same name; what
is inserted stands behind a layer, as a child or a parameter of it with a name of its own. The program's `state_dict`
keeps its keys and gains those of inserted parameters, which the optimizer trains in the group of the layer's weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import LBFGS, Optimizer

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _passage as passages
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._passage import Call, Passage


@dataclass(frozen=True)
class Site:
    """Where a change to a model takes place: the model, its forward pass, and the optimizer that was made for it.

    `loose`: what the optimizer trains and no module holds. `inserted`: the parameters that changes have given it.
    """

    root: nn.Module
    optimizer: Optimizer
    passage: Passage
    loose: Sequence[Tensor] = ()
    inserted: list[nn.Parameter] = field(default_factory=list)

    def layers(self, kinds: Sequence[str], names: Sequence[str] = ()) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the layers of these kinds, or of those among them with these names."""
        for name, module in describe.walk(self.root):
            if describe.kind_of(module) in kinds and (not names or name in names):
                yield name, module


class ModelEffect:
    """One change in effect on one model. Its constructor takes (change, site, back) and applies it, or raises
    CannotApply; how to put back each thing that it changes goes onto `back` as it is changed.
    """

    detail = ""
    """What was done, in words."""
    left: str | None = None
    """What stays changed after undoing it once a step has been taken under it, in a sentence."""

    def unmet(self) -> str | None:
        """After a forward and a backward pass: why nothing came of it, if nothing did."""


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


@dataclass(frozen=True)
class _Face:
    """What an activation module is: its class, what it was constructed with, and whose forward pass decides when (held
    weakly, since that knows the module: the model's hooks keep it).
    """

    cls: type[nn.Module]
    options: dict[str, Any]
    passage: ref[Passage] | None = None

    @property
    def at_output(self) -> bool:
        """Whether the last layer with weights has been called."""
        passage = None if self.passage is None else self.passage()
        return passage is not None and passage.at_output


_faces: WeakKeyDictionary[nn.Module, list[_Face]] = WeakKeyDictionary()
"""The program's own face of every module that has another one now, and those put on since; the last is worn."""


class _Placed:
    """Mixed into the class of an activation that `forward` may call anywhere: what it is there is decided call by call.
    A deep copy is decided likewise; a pickle holds torch's class.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        _faces[twin] = list(_faces[self])  # type: ignore[index]
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (_torchs_class(type(self)),), self.__dict__


def _torchs_class(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch."))


class _Hidden(_Placed):
    """Behind the last layer with weights it is what it was before."""

    def forward(self, x: Tensor) -> Tensor:
        *below, now = _faces[self]  # type: ignore[index]
        if not now.at_output:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        before = below[-1].cls.__new__(below[-1].cls)
        before.__dict__.update(self.__dict__ | below[-1].options)
        _faces[before] = below
        return before.forward(x)  # type: ignore[no-any-return]


class _Answering(_Placed):
    """Behind the last layer with weights it is `answer`, elsewhere what it was before."""

    answer: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return type(self).answer(x) if _faces[self][-1].at_output else super().forward(x)  # type: ignore[index, misc]


_softmax = torch.softmax  # as torch has it, whatever is intercepted later


class _ClassSoftmax(nn.Module):
    """Over classes: the second axis of maps (four axes or more), the last one of everything else."""

    def forward(self, x: Tensor) -> Tensor:
        return _over_classes(x)


def _over_classes(x: Tensor) -> Tensor:
    return _softmax(x, dim=1 if x.dim() >= 4 else -1)


ANSWERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "identity": (nn.Identity, lambda x: x),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "softmax": (_ClassSoftmax, _over_classes),
}
"""What an output activation can be replaced with, as a module and as a function."""


def _put_on(module: nn.Module, new: nn.Module, back: ExitStack, *, placed: type | None, passage: Passage) -> None:
    """Let a module become another one in place: every reference to it, and its hooks, stay good.

    `placed`: what decides call by call whether it is; None where it always is.
    """
    cls = type(new) if placed is None else type(_torchs_class(type(new)).__name__, (placed, type(new)), {})
    face = _Face(cls, _options(new), ref(passage))
    faces = _faces.setdefault(module, [_Face(type(module), _options(module))])
    faces.append(face)
    _wear(module, face)
    back.callback(_take_off, module, face)


def _take_off(module: nn.Module, face: _Face) -> None:
    """Take one face away, be it worn or below others."""
    faces = _faces[module]
    faces[:] = [one for one in faces if one is not face]
    _wear(module, faces[-1])
    if len(faces) == 1:
        del _faces[module]


def _wear(module: nn.Module, face: _Face) -> None:
    for key in _options(module):
        del module.__dict__[key]
    module.__class__ = face.cls
    module.__dict__.update(face.options)


def _options(module: nn.Module) -> dict[str, Any]:
    """What an activation was constructed with."""
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}


class ActivationReplacement(ModelEffect):
    """`ReplaceActivations`: modules become another activation in place, function calls in `forward` are intercepted.

    The output's activation, called behind the last layer with weights, stays. Where a module's place does not tell
    (it is an attribute that `forward` may call anywhere), it is looked at call by call.
    """

    def __init__(self, change: _changes.ReplaceActivations, site: Site, back: ExitStack) -> None:
        if change.target not in TARGETS:
            raise CannotApply(f"There is no activation {change.target!r}; there are {', '.join(TARGETS)}.")
        self._change, self._site, self._back = change, site, back
        self._replaced = 0  # modules for certain, and calls of what is decided call by call
        hidden = _activations_before_output(site)
        modules = [module for _, module in site.layers(change.sources, change.layers)]
        modules = [module for module in modules if change.layers or module not in hidden.output]
        for module in modules:
            self._replace(module, is_certain=bool(change.layers) or module in hidden.certain)
        for module in site.root.modules():
            self._replace_recurrence(module)
        back.callback(site.passage.intercept(self._claim))
        self._rename()
        self.detail = f"{len(modules)} modules" if modules else ""

    def _replace(self, module: nn.Module, *, is_certain: bool) -> None:
        new, passage = MODULES[self._change.target](), self._site.passage
        _put_on(module, new, self._back, placed=None if is_certain else _Hidden, passage=passage)
        if is_certain:
            self._replaced += 1
        else:
            self._back.callback(module.register_forward_hook(passages.hook(self._note)).remove)

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._replaced += not self._site.passage.at_output

    def _rename(self) -> None:
        passage = self._site.passage
        self._back.callback(setattr, passage, "renamed", passage.renamed)
        passage.renamed = passage.renamed | dict.fromkeys(self._change.sources, self._change.target)

    def _replace_recurrence(self, module: nn.Module) -> None:
        """Plain recurrent networks know two activations."""
        target, now = self._change.target, getattr(module, "nonlinearity", None)
        if now in self._change.sources and target in ("relu", "tanh") and not self._change.layers:
            for key in {"nonlinearity", "mode"} & vars(module).keys():
                self._back.callback(setattr, module, key, vars(module)[key])
            self._replaced += 1
            vars(module)["nonlinearity"] = target
            if isinstance(module, nn.RNN):
                module.mode = f"RNN_{target.upper()}"

    def _claim(self, kind: str, x: Any, call: Call) -> Call:
        passage = self._site.passage
        if kind not in self._change.sources or not passage.holds(x) or passage.at_output or not self._is_named():
            return call
        self._replaced += 1
        return TARGETS[self._change.target]

    def _is_named(self) -> bool:
        """Whether calls behind the layer called last are meant: a function call is known by the layer before it."""
        names = [name for name, module in describe.walk(self._site.root) if module is self._site.passage.last_layer]
        layers = self._change.layers
        return not layers or any(layer == name or layer.startswith(f"{name}.") for name in names for layer in layers)

    def unmet(self) -> str | None:
        if self._replaced:
            return None
        return f"No hidden activation of the kind {' or '.join(self._change.sources)} was called in the model."


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
    """`RemoveOutputActivation`: what is called behind the last layer with weights passes its input through, or is the
    target, be it a module, a function in `forward`, or a function that the loop calls on the model's result.
    """

    left = "The weights have been trained without the output activation."

    def __init__(self, change: _changes.RemoveOutputActivation, site: Site, back: ExitStack) -> None:
        self._kind, self._passage = change.kind, site.passage
        make, self._answer = ANSWERS[change.target]
        self._seen = False
        placed = _activations_before_output(site)
        answering = type("_Answering", (_Answering,), {"answer": staticmethod(self._answer)})
        for _, module in site.layers((change.kind,)):
            if module in placed.output:
                self._seen = True
                _put_on(module, make(), back, placed=None, passage=site.passage)
            elif module not in placed.certain:
                _put_on(module, module, back, placed=answering, passage=site.passage)
                back.callback(module.register_forward_hook(passages.hook(self._note)).remove)
        back.callback(site.passage.intercept(self._claim))

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._seen |= self._passage.at_output

    def _claim(self, kind: str, x: Any, call: Call) -> Call:
        passage = self._passage
        behind = passage.at_output and (passage.depth > 0 or passage.is_answer(x))
        if kind != self._kind or not behind:
            return call
        self._seen = True
        return self._answer

    def unmet(self) -> str | None:
        return None if self._seen else f"No {self._kind} is called behind the model's last layer with weights."


# ---- inserted parameters ------------------------------------------------------------------------------------------


def _insert(site: Site, weight: Tensor, fresh: Iterable[tuple[str, nn.Parameter]], back: ExitStack) -> None:
    """Let the site's optimizer train new (name, parameter) pairs, in the group of `weight`: schedules are per group."""
    optimizer = site.optimizer
    group = next(
        (g for g in optimizer.param_groups if any(p is weight for p in g["params"])), optimizer.param_groups[0]
    )
    for name, parameter in fresh:
        join_optimizer(optimizer, group, name, parameter)
        back.callback(leave_optimizer, optimizer, [parameter])
        site.inserted.append(parameter)


def join_optimizer(optimizer: Optimizer, group: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
    """Let an optimizer train one more parameter in one of its groups.

    Raises CannotApply where the optimizer has state already and nothing tells what that of a new parameter is.
    """
    state = _first_state(optimizer, group, parameter)
    group["params"].append(parameter)
    if "param_names" in group:
        group["param_names"].append(name)
    if state:
        optimizer.state[parameter] = state


def _first_state(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer makes of a parameter when it is constructed, as Adagrad does."""
    if not optimizer.state:
        return {}
    if isinstance(optimizer, LBFGS):
        raise CannotApply("LBFGS remembers steps of all parameters together: it takes none in the middle of the run.")
    try:
        with taps.silenced():
            twin = type(optimizer)([{**group, "params": [parameter]}])  # type: ignore[call-arg]
    except Exception as error:
        why = f"{type(optimizer).__name__} cannot take parameters in the middle of the run"
        raise CannotApply(f"{why}: {type(error).__name__}: {error}.") from None
    return dict(twin.state.get(parameter, {}))


def leave_optimizer(optimizer: Optimizer, gone: Iterable[Tensor]) -> None:
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

    left = "The layers' weights have been trained with normalization behind them."

    def __init__(self, change: _changes.InsertNormalization, site: Site, back: ExitStack) -> None:
        refuse_wrapped(site.root)
        layers = list(_layers_to_normalize(change, site))
        if not layers:
            raise CannotApply("Every hidden linear or convolution is followed by a normalization already.")
        for name, layer in layers:
            weight: Any = layer.weight
            norm = _normalization(change.kind, layer).to(weight.device, weight.dtype)
            norm.train(layer.training)
            layer.add_module("normalization", norm)
            back.callback(delattr, layer, "normalization")
            back.callback(layer.register_forward_hook(_normalize).remove)
            names = ((f"{name}.normalization.{key}", parameter) for key, parameter in norm.named_parameters())
            _insert(site, weight, names, back)
        self.detail = f"behind {len(layers)} layers"


def _layers_to_normalize(change: _changes.InsertNormalization, site: Site) -> Iterator[tuple[str, nn.Module]]:
    order = [module for _, module in describe.walk(site.root)]
    attention = {m for parent in order if isinstance(parent, nn.MultiheadAttention) for m in parent.modules()}
    for name, module in site.layers(("linear", "conv"), change.layers):
        following = order[order.index(module) + 1] if module is not order[-1] else module
        is_hidden = bool(change.layers) or module is not site.passage.output_layer
        is_bilinear = isinstance(module, nn.Bilinear)
        if is_hidden and not is_bilinear and module not in attention and describe.kind_of(following) not in _NORMS:
            yield name, module


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
    if output.is_nested:  # `TransformerEncoder` leaves padding out in evaluation, where rows do not depend on others
        return torch.nested.as_nested_tensor([norm(rows) for rows in output.unbind()])  # type: ignore[operator]
    rows = output.reshape(-1, output.shape[-1])
    return norm(rows).reshape(output.shape)  # type: ignore[no-any-return, operator]


class ShortcutInsertion(ModelEffect):
    """`InsertShortcuts`: x + f(x) around every layer that keeps its input's shape, up to its activation.

    f is the layer, what normalizes or drops its result, and the activation applied to that, a module or a function;
    a layer without an activation behind it gets no shortcut. "residual": He et al. 2016, arXiv:1512.03385. "rezero":
    x + a f(x) with a trained a of 0, a parameter `shortcut_scale` of the layer (Bachlechner et al. 2021,
    arXiv:2003.04887).
    """

    left = "The layers' weights have been trained with shortcuts around them."

    def __init__(self, change: _changes.InsertShortcuts, site: Site, back: ExitStack) -> None:
        if change.kind == "dense":
            raise CannotApply("Dense connections widen every following layer: they need another model, not a change.")
        refuse_wrapped(site.root)
        self._is_scaled = change.kind == "rezero"
        self._open: dict[int, tuple[Tensor, Tensor, nn.Module]] = {}
        self._seen = 0
        hidden = site.layers(("linear", "conv"))
        layers = [(name, m) for name, m in hidden if m is not site.passage.output_layer and _keeps(m)]
        if not layers:
            raise CannotApply("No layer returns the shape that it takes: there is no place for a shortcut.")
        for name, layer in layers:
            back.callback(layer.register_forward_hook(passages.hook(self._begin)).remove)
            if self._is_scaled:
                _add_scale(site, name, layer, back)
        for _, module in describe.walk(site.root):
            if describe.kind_of(module) in (*_NORMS, "dropout"):
                back.callback(module.register_forward_hook(passages.hook(self._go_on)).remove)
            elif describe.kind_of(module) in describe.ACTIVATIONS:
                back.callback(module.register_forward_hook(passages.hook(self._close)).remove)
        back.callback(site.passage.intercept(self._claim))
        site.passage.afterwards.append(self._open.clear)
        back.callback(site.passage.afterwards.remove, self._open.clear)
        self.detail = f"around {len(layers)} layers"

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and isinstance(output, Tensor) and _shape(x) == _shape(output):
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
        return lambda value: self._join(x, call(value))

    def _join(self, entered: Any, output: Any) -> Any:
        block = self._open.pop(id(entered), None)
        if block is None or block[0] is not entered:
            return output
        _, x, layer = block
        self._seen += 1
        return x + layer.shortcut_scale * output if self._is_scaled else x + output

    def unmet(self) -> str | None:
        return None if self._seen else "No activation was called on the result of a layer that keeps its input's shape."


def _add_scale(site: Site, name: str, layer: Any, back: ExitStack) -> None:
    scale = nn.Parameter(torch.zeros((), dtype=layer.weight.dtype, device=layer.weight.device))
    layer.register_parameter("shortcut_scale", scale)
    back.callback(delattr, layer, "shortcut_scale")
    _insert(site, layer.weight, [(f"{name}.shortcut_scale", scale)], back)


def _shape(x: Tensor) -> object:
    return [one.shape for one in x.unbind()] if x.is_nested else x.shape


def _keeps(layer: nn.Module) -> bool:
    """Whether a layer can return the shape that it takes."""
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    channels = getattr(layer, "in_channels", 0), getattr(layer, "out_channels", -1)
    return channels[0] == channels[1] and set(getattr(layer, "stride", (2,))) == {1}
