"""What happens inside a model's forward pass: where it stands, what enters and leaves, which functions it calls.

A `Passage` follows one model through hooks; `intercept` stands in for torch's activation functions. Both only tell
others, who decide what to change. Copies of the model share the passage; pickled, its hooks become nothing.
"""

from __future__ import annotations

import contextlib
import functools
import pkgutil
import sys
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd.frameworks.torch import _describe as describe

Entering = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
Leaving = Callable[[Any], Any]


class Passage:
    """One model's forward pass as it goes. `entering`, `leaving` may replace what the outermost call takes and gives;
    `afterwards` is called when it is over.

    `output_layer`: the last layer with weights, by registration until a pass has shown which one is called last. In a
    deep copy of the model, layers are known as those that they were copied from.
    """

    def __init__(self, root: nn.Module) -> None:
        self.entering: list[Entering] = []
        self.leaving: list[Leaving] = []
        self.afterwards: list[Callable[[], None]] = []
        self.output_layer = describe.output_layer(root)
        self.last_layer: nn.Module | None = None
        self._answer: weakref.ref[Tensor] | None = None
        self._node: Any = None  # the answer's place in the graph, until a step has been taken from it
        self.depth = 0
        self.renamed: dict[str, str] = {}  # kinds of activations that have been replaced
        self._modules = [m for _, m in describe.walk(root) if not isinstance(m, torch.jit.ScriptModule)]
        self._handles: list[Any] = []
        self._held: list[_Held] = []
        self._claims: list[Claim] = []
        for module in self._modules:
            self._follow(module)

    def _follow(self, module: nn.Module) -> None:
        enter, leave = _Hook(self._enter), _Hook(functools.partial(self._leave, module))
        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def intercept(self, claim: Claim) -> Callable[[], None]:
        """`intercept`, also for the functions that the model's modules keep in attributes."""
        if not self._held:
            found = [(module, name) for module in self._modules for name, _ in functions_held_by(module)]
            self._held = [hold(module, name) for module, name in found]
        self._claims.append(claim)  # whoever claims lives as long as the model's hooks, and no longer
        return intercept(claim)

    def release(self) -> None:
        """Take the hooks off, and give the modules their functions back."""
        while self._handles:
            self._handles.pop().remove()
        while self._held:
            self._held.pop().give_back()
        self._claims.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        return self

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        self.last_layer, self._answer, self._node = None, None, None
        for change in self.entering:
            args, kwargs = change(args, kwargs)
        return (args, kwargs) if self.entering else None

    def _leave(self, layer: nn.Module, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if describe.kind_of(layer) in ("linear", "conv"):
            self.last_layer = layer
        self.depth = max(0, self.depth - 1)
        if self.depth:
            return None
        for forget in tuple(self.afterwards):
            forget()
        if output is None:
            return None  # the pass has raised
        if self.last_layer is not None and layer is not self.last_layer:
            self.output_layer = self.last_layer
        for change in self.leaving:
            output = change(output)
        answer = first_tensor(output)
        if answer is not None:
            self._answer, self._node = weakref.ref(answer), answer.grad_fn
        return output

    @property
    def at_output(self) -> bool:
        """Whether the last layer with weights has been called."""
        return self.last_layer is not None and self.last_layer is self.output_layer

    def holds(self, x: object) -> bool:
        """Whether a value is this model's: a forward pass is under way, or it is (a view of) what the last one gave."""
        return self.depth > 0 or self.is_answer(x)

    def is_answer(self, x: object) -> bool:
        """Whether `x` is the last pass's result, perhaps reshaped."""
        if self._answer is None or not isinstance(x, Tensor):
            return False
        return x is self._answer() or (self._node is not None and self._node in _below_views(x.grad_fn))

    def forget_graph(self) -> None:
        """The step is over: what is kept of the graph would keep everything alive that listens to it."""
        self._node = None


_VIEWS = (
    "Squeeze", "Unsqueeze", "View", "Reshape", "UnsafeView", "Transpose", "Permute", "T", "Select", "Slice",
    "Alias", "Clone", "Expand", "Stack", "Cat", "ToCopy",
)  # fmt: skip


def _below_views(node: Any) -> Iterator[Any]:
    """A node and those that it only reshapes, or joins: of several the last, which is the latest where time goes on."""
    while node is not None:
        yield node
        name = str(node.name()).split("Backward")[0]
        node = node.next_functions[-1][0] if name in _VIEWS and node.next_functions else None


def first_tensor(value: Any) -> Tensor | None:
    """A tensor itself, or the first one in a tuple or list."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return value if isinstance(value, Tensor) else None


class _Hook:
    """A hook that a deep copy shares and a pickle drops."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def hook(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` as a hook that deep copies share and pickles drop."""
    return _Hook(call)


# ---- activation functions -------------------------------------------------------------------------------------------

_T, _F, _M = torch, functional, torch.Tensor  # functions of torch, of `nn.functional`, and methods

FUNCTIONS: dict[str, tuple[tuple[Any, str], ...]] = {
    "sigmoid": (
        (_T, "sigmoid"), (_M, "sigmoid"), (_F, "sigmoid"), (torch.special, "expit"), (_T, "sigmoid_"), (_M, "sigmoid_"),
    ),
    "tanh": ((_T, "tanh"), (_M, "tanh"), (_F, "tanh"), (_T, "tanh_"), (_M, "tanh_")),
    "relu": ((_F, "relu"), (_T, "relu"), (_M, "relu"), (_F, "relu_"), (_T, "relu_"), (_M, "relu_")),
    "leaky-relu": ((_F, "leaky_relu"), (_F, "leaky_relu_")),
    "elu": ((_F, "elu"), (_F, "elu_")),
    "selu": ((_F, "selu"), (_T, "selu"), (_F, "selu_"), (_T, "selu_")),
    "gelu": ((_F, "gelu"),),
    "silu": ((_F, "silu"),),
    "softplus": ((_F, "softplus"),),
    "softsign": ((_F, "softsign"),),
    "hardtanh": ((_F, "hardtanh"), (_F, "relu6"), (_F, "hardtanh_")),
    "softmax": ((_F, "softmax"), (_T, "softmax"), (_M, "softmax")),
    "log-softmax": ((_F, "log_softmax"), (_T, "log_softmax"), (_M, "log_softmax")),
}  # fmt: skip
"""Where torch keeps each activation as a function."""

ORIGINALS: dict[int, str] = {
    id(getattr(owner, name)): kind for kind, places in FUNCTIONS.items() for owner, name in places
}
"""Kind of each function, by id."""

PATHS: dict[int, str] = {
    id(getattr(owner, name)): f"{owner.__module__}:{owner.__name__}.{name}"
    if isinstance(owner, type)
    else f"{owner.__name__}:{name}"
    for places in FUNCTIONS.values()
    for owner, name in places
}
"""Where `pkgutil.resolve_name` finds each function, by id."""

Call = Callable[[Any], Any]
Claim = Callable[[str, Any, Call], Call]
"""(kind, argument, what would be called with it) -> what to call with it instead."""

_claims: list[weakref.WeakMethod[Claim]] = []
_undo: list[Callable[[], None]] = []

# Modules of torch decide by themselves (`ReLU.forward` calls `relu`), and isograd reads with these functions.
_TORCHS_OWN = ("torch.nn.functional", "torch.nn.modules.activation", "torch.nn.modules.rnn", "isograd.")


def intercept(claim: Claim) -> Callable[[], None]:
    """Let `claim`, a bound method that someone else keeps alive, decide about every call of an activation function from
    now on; returns how to end that.
    """
    ref = weakref.WeakMethod(claim, _forget)
    _claims.append(ref)
    if not _undo:
        _install()
    return functools.partial(_forget, ref)


def _forget(ref: weakref.WeakMethod[Claim]) -> None:
    if ref in _claims:
        _claims.remove(ref)
    while _undo and not _claims:
        _undo.pop()()


def _install() -> None:
    stand_ins: dict[int, Any] = {}
    for kind, places in FUNCTIONS.items():
        for owner, name in places:
            original = getattr(owner, name)
            stand_ins[id(original)] = stand_in = _stand_in(kind, original)
            _put(owner, name, original, stand_in)
    for namespace, name, value in imported(stand_ins):
        _put(namespace, name, value, stand_ins[id(value)])


def imported(functions: Container[int]) -> Iterator[tuple[Any, str, Any]]:
    """(module, name, function) where `from torch.nn.functional import relu` has left one of the functions with these
    ids in the program's own modules.
    """
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "torch").startswith(("torch", "isograd")):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in functions and callable(value):
                    yield module, name, value


def _put(owner: Any, name: str, original: Any, stand_in: Any) -> None:
    inherited = name not in vars(owner)
    setattr(owner, name, stand_in)

    def restore() -> None:
        if vars(owner).get(name) is stand_in:
            delattr(owner, name) if inherited else setattr(owner, name, original)

    _undo.append(restore)


def _stand_in(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def activation(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_TORCHS_OWN):
            return original(*args, **kwargs)
        return _decided(kind, original, args, kwargs)

    return activation


def _decided(kind: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call comes to when those who claim it have decided."""
    rest = {name: value for name, value in kwargs.items() if name != "input"} if not args else kwargs
    x: Any = args[0] if args else kwargs.get("input")
    own = call = functools.partial(_call, original, args[1:], rest)
    for ref in tuple(_claims):
        claim = ref()
        call = call if claim is None else claim(kind, x, call)  # type: ignore[assignment]
    if call is own:
        return original(*args, **kwargs)
    if _is_in_place(original, args, kwargs):
        return x.copy_(call(x.clone()))  # the program may go on with its argument instead of the result
    return call(x)


def _call(original: Callable[..., Any], rest: tuple[Any, ...], options: dict[str, Any], x: Any) -> Any:
    return original(x, *rest, **options)


def _is_in_place(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the argument becomes the result: `relu_(x)`, `F.relu(x, inplace=True)`."""
    code = getattr(original, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    given = dict(zip(names, args, strict=False)) | kwargs
    return original.__name__.endswith("_") or bool(given.get("inplace"))


class _Held:
    """An activation function that a module keeps in an attribute (`self.activation = F.relu`), while calls are
    intercepted. A deep copy shares it, a pickle holds the function itself.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name, self._original = module, name, vars(module)[name]
        self.kind, self.holders = ORIGINALS[id(self._original)], 0
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _decided(self.kind, self._original, args, kwargs)

    def give_back(self) -> None:
        """Put the function where it was, once nobody holds it any more."""
        self.holders -= 1
        if not self.holders and vars(self._module).get(self._name) is self:
            vars(self._module)[self._name] = self._original

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return pkgutil.resolve_name, (PATHS[id(self._original)],)


def hold(module: nn.Module, name: str) -> _Held:
    """Stand between a module and a function in one of its attributes, until `give_back`."""
    if not isinstance(vars(module)[name], _Held):
        vars(module)[name] = _Held(module, name)
    held: _Held = vars(module)[name]
    held.holders += 1
    return held


def functions_held_by(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(attribute, kind) of each activation function that a module keeps in an attribute."""
    for name, value in list(vars(module).items()):
        if isinstance(value, _Held):
            yield name, value.kind
        elif id(value) in ORIGINALS and callable(value):
            yield name, ORIGINALS[id(value)]


def kinds_called_by(modules: Sequence[nn.Module]) -> list[str]:
    """Kinds of the activation functions named in the `forward` of the program's own classes."""
    names = {name: kind for kind, places in FUNCTIONS.items() for _, name in places}
    classes = {type(module) for module in modules if not type(module).__module__.startswith("torch.")}
    codes = [getattr(cls.forward, "__code__", None) for cls in classes]
    found = [names[name] for code in codes if code is not None for name in code.co_names if name in names]
    held = [kind for module in modules for _, kind in functions_held_by(module)]
    return found + held
