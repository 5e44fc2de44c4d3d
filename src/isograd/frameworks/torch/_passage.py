"""What happens inside a model's forward pass: where it stands, what enters and leaves, which functions it calls.

A `Passage` follows one model through hooks; `intercept` stands in for torch's activation functions. Both only tell
others, who decide what to change. Copies of the model share the passage; pickled, its hooks become nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
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

    `output_layer`: the last layer with weights, by registration until a pass has shown which one is called last.
    """

    def __init__(self, root: nn.Module) -> None:
        self.entering: list[Entering] = []
        self.leaving: list[Leaving] = []
        self.afterwards: list[Callable[[], None]] = []
        self.output_layer = describe.output_layer(root)
        self.last_layer: nn.Module | None = None
        self.answer: Tensor | None = None
        self.depth = 0
        self.renamed: dict[str, str] = {}  # kinds of activations that have been replaced
        self._handles: list[Any] = []
        for _, module in describe.walk(root):
            if not isinstance(module, torch.jit.ScriptModule):
                self._follow(module)

    def _follow(self, module: nn.Module) -> None:
        enter, leave = _Hook(self._enter), _Hook(self._leave)
        self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def release(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        return self

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        self.last_layer, self.answer = None, None
        for change in self.entering:
            args, kwargs = change(args, kwargs)
        return (args, kwargs) if self.entering else None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if describe.kind_of(module) in ("linear", "conv"):
            self.last_layer = module
        self.depth = max(0, self.depth - 1)
        if self.depth:
            return None
        for forget in tuple(self.afterwards):
            forget()
        if output is None:
            return None  # the pass has raised
        if self.last_layer is not None and module is not self.last_layer:
            self.output_layer = self.last_layer
        for change in self.leaving:
            output = change(output)
        self.answer = first_tensor(output)
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
        if self.answer is None or not isinstance(x, Tensor):
            return False
        return x is self.answer or (x.grad_fn is not None and self.answer.grad_fn in _below_views(x.grad_fn))


_VIEWS = ("Squeeze", "Unsqueeze", "View", "Reshape", "UnsafeView", "Transpose", "Permute", "T", "Select", "Slice")


def _below_views(node: Any) -> Iterator[Any]:
    """A node and those that it only reshapes."""
    while node is not None:
        yield node
        name = str(node.name()).split("Backward")[0]
        node = node.next_functions[0][0] if name in _VIEWS and node.next_functions else None


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

FUNCTIONS: dict[str, tuple[tuple[Any, str], ...]] = {
    "sigmoid": ((torch, "sigmoid"), (torch.Tensor, "sigmoid"), (functional, "sigmoid"), (torch.special, "expit")),
    "tanh": ((torch, "tanh"), (torch.Tensor, "tanh"), (functional, "tanh")),
    "relu": ((functional, "relu"), (torch, "relu"), (torch.Tensor, "relu"), (functional, "relu_"), (torch, "relu_")),
    "leaky-relu": ((functional, "leaky_relu"),),
    "elu": ((functional, "elu"),),
    "selu": ((functional, "selu"), (torch, "selu")),
    "gelu": ((functional, "gelu"),),
    "silu": ((functional, "silu"),),
    "softplus": ((functional, "softplus"),),
    "softsign": ((functional, "softsign"),),
    "hardtanh": ((functional, "hardtanh"), (functional, "relu6")),
    "softmax": ((functional, "softmax"), (torch, "softmax"), (torch.Tensor, "softmax")),
    "log-softmax": ((functional, "log_softmax"), (torch, "log_softmax"), (torch.Tensor, "log_softmax")),
}
"""Where torch keeps each activation as a function."""

ORIGINALS: dict[int, str] = {
    id(getattr(owner, name)): kind for kind, places in FUNCTIONS.items() for owner, name in places
}
"""Kind of each function, by id."""

Call = Callable[[], Any]
Claim = Callable[[str, Any, Call], Call]
"""(kind, argument, what would be called) -> what to call instead."""

_claims: list[Claim] = []
_undo: list[Callable[[], None]] = []

# Modules of torch decide by themselves (`ReLU.forward` calls `relu`), and isograd reads with these functions.
_TORCHS_OWN = ("torch.nn.functional", "torch.nn.modules.activation", "torch.nn.modules.rnn", "isograd.")


def intercept(claim: Claim) -> Callable[[], None]:
    """Let `claim` decide about every call of an activation function from now on; returns how to end that."""
    _claims.append(claim)
    if not _undo:
        _install()

    def end() -> None:
        if claim in _claims:
            _claims.remove(claim)
        while _undo and not _claims:
            _undo.pop()()

    return end


def _install() -> None:
    stand_ins: dict[int, Any] = {}
    for kind, places in FUNCTIONS.items():
        for owner, name in places:
            original = getattr(owner, name)
            stand_ins[id(original)] = stand_in = _stand_in(kind, original)
            _put(owner, name, original, stand_in)
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "torch").startswith(("torch", "isograd")):
            _put_imported(module, stand_ins)


def _put_imported(module: Any, stand_ins: dict[int, Any]) -> None:
    """`from torch.nn.functional import relu` has left the function itself in the program's own module."""
    for name, value in list(getattr(module, "__dict__", {}).items()):
        if id(value) in stand_ins and callable(value):
            _put(module, name, value, stand_ins[id(value)])


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
        call = functools.partial(original, *args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_TORCHS_OWN):
            return call()
        x = args[0] if args else kwargs.get("input")
        for claim in tuple(_claims):
            call = claim(kind, x, call)  # type: ignore[assignment]
        return call()

    return activation


def functions_held_by(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(attribute, kind) of each activation function that a module keeps in an attribute."""
    for name, value in vars(module).items():
        if id(value) in ORIGINALS and callable(value):
            yield name, ORIGINALS[id(value)]


def kinds_called_by(modules: Sequence[nn.Module]) -> list[str]:
    """Kinds of the activation functions named in the `forward` of the program's own classes."""
    names = {name: kind for kind, places in FUNCTIONS.items() for _, name in places}
    classes = {type(module) for module in modules if not type(module).__module__.startswith("torch.")}
    codes = [getattr(cls.forward, "__code__", None) for cls in classes]
    found = [names[name] for code in codes if code is not None for name in code.co_names if name in names]
    held = [kind for module in modules for _, kind in functions_held_by(module)]
    return found + held
