"""One step under the microscope: every operation of it is looked at, forward and backward, and the first one that made
a non-finite value of finite ones is named: what it was, which module and line called it, with what, in which rows.

A step computes many values that are not finite and do no harm: masks of -inf, branches that `where` drops. So it is
not the first such value that counts, but the first on the way to the loss, or to a gradient, that is not finite: each
result is remembered with the operands that it was made of. Looking costs several times the step. It draws no random
number and changes no value.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isograd._replay import BadOperation, Operand
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _invalidity as invalidity
from isograd.frameworks.torch._call_site import CallSites

ROWS = 64
"""Rows that are told one by one."""

_UNREADABLE = (RuntimeError, TypeError, NotImplementedError, IndexError)
"""What torch raises where an operation does not exist for a kind of tensor: quantized, nested, float8."""

_HALF = 1e5
"""Above the largest value of float16, 65504, and below that of every other type of more than 8 bits."""

_NOTABLE = 1e4
"""Values below it are not looked at for having grown."""

_UNWRITTEN = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
"""Operations that give memory as it is: whatever stands there is no result yet."""


@dataclass(eq=False)
class _Result:
    """A result that is not finite, or (`function` is "") a tensor that was not when the step began.

    `is_mask`: nothing but infinities that the program wrote on purpose went into it. `bad`: what is said of it if it is
    where everything began; None for one that has only carried on.
    """

    index: int
    function: str
    has_nan: bool
    is_mask: bool
    parents: tuple[_Result, ...] = ()
    bad: BadOperation | None = None


@dataclass(kw_only=True)
class _Named:
    """A tensor that the step began with: parameter, buffer or batch."""

    name: str
    place: str
    module: str = ""


@dataclass
class _Storages:
    """Something about storages, by their identity; one that has been freed is forgotten."""

    _known: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def put(self, tensor: Tensor, what: Any) -> None:
        # A weak reference keeps the address from being given away, not the memory.
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[reference.cdata] = reference, what

    def get(self, tensor: Tensor) -> Any:
        found = self._known.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]


class Microscope(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every operation is looked at. `roots`: the models by the prefix of their names. `batch`: what the step
    is given; `num_rows`: how many rows it has, to tell rows of activations by.

    `explain(loss, gradients)` says afterwards, or still within, where what is not finite of them comes from.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        *,
        batch: Iterable[Tensor] = (),
        num_rows: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self._num_rows = num_rows
        self._results, self._given = _Storages(), _Storages()
        self._sites = CallSites(roots)
        self._grown: BadOperation | None = None
        self._growth, self._has_huge = 1.0, False
        self._open = ExitStack()
        self.give(batch)
        for prefix, root in roots.items():
            self._learn(prefix, root)

    def _learn(self, prefix: str, root: nn.Module) -> None:
        for path, module in describe.walk(root, prefix):
            for place, tensors in (("weight", module._parameters), ("buffer", module._buffers)):
                for short, tensor in tensors.items():
                    if tensor is not None and _is_plain(tensor):
                        name = f"{path}.{short}" if path else short
                        self._given.put(tensor, _Named(name=name, place=place, module=path))

    def give(self, batch: Iterable[Tensor]) -> None:
        """Take in what the step is given, so that it can be told from what the step makes."""
        for tensor in batch:
            if _is_plain(tensor):
                self._given.put(tensor, _Named(name="input", place="input"))

    # ---- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Microscope:
        with ExitStack() as back:
            back.enter_context(self._sites.kept())
            if "torch._dynamo" in sys.modules:  # without it nothing is compiled, and importing it takes a second
                # Compiled code shows no operations: for this once the model runs as it is written.
                back.enter_context(torch.compiler.set_stance("force_eager"))
            super().__enter__()  # type: ignore[no-untyped-call]
            self._open = back.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._open.close()

    # ---- looking --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = _operands_before(func, args, kwargs)
        result = func(*args, **kwargs)
        self.operations += 1
        with contextlib.suppress(*_UNREADABLE):
            self._look(func, args, kwargs, before, result)
        return result

    def _look(self, func: Any, args: Any, kwargs: Any, before: Mapping[int, Tensor], result: Any) -> None:
        name = invalidity.name_of(func)
        if name in _UNWRITTEN or getattr(func, "is_view", False):
            return
        outputs = [one for one in tree_leaves(result) if _is_plain(one)]
        if func._schema.is_mutable:
            outputs += [one for one in tree_leaves((args, kwargs)) if id(one) in before]
        bad = [(one, mask) for one in outputs if (mask := _nonfinite(one)) is not None]
        if bad:
            self._note(func, name, args, kwargs, before, bad)
        elif not self._has_huge:
            self._note_size(func, name, args, kwargs, before, outputs)

    def _note_size(
        self, func: Any, name: str, args: Any, kwargs: Any, before: Mapping[int, Tensor], outputs: list[Tensor]
    ) -> None:
        """Of finite results, find the one whose exponent grew most: a product adds to it, a square doubles it."""
        largest, result = max(((_size(one), one) for one in outputs), key=lambda pair: pair[0], default=(0.0, None))
        if result is None or largest < _NOTABLE:
            return
        leaves = tree_leaves((args, kwargs))
        numbers = [abs(float(one)) for one in leaves if isinstance(one, (int, float))]
        entering = max([10.0, *numbers, *(_size(before.get(id(one), one)) for one in leaves if _is_plain(one))])
        growth, root = math.log(largest) / math.log(entering), _largest_root(result)
        if growth > self._growth:
            given = {key: before.get(id(value), value) for key, value in _by_name(func, args, kwargs).items()}
            found = self._describe(name, given, result, result.abs() > largest / 10)
            made = f"beyond {largest / 10:.3g}, on the way to values too large to be squared"
            self._growth, self._grown = growth, replace(found, made=made)
        self._has_huge = entering <= root < largest

    def _note(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        before: Mapping[int, Tensor],
        bad: list[tuple[Tensor, Tensor]],
    ) -> None:
        given = _by_name(func, args, kwargs)
        operands = {id(one): one for one in tree_leaves((args, kwargs)) if _is_plain(one)}
        lost = [
            self._origin(one, value, name)
            for key, one in operands.items()
            if _nonfinite(value := before.get(key, one)) is not None and _is_taken(name, given, one, value)
        ]
        has_nan = any(bool(torch.isnan(one).any()) for one, _ in bad)
        written = not lost and any(
            isinstance(one, float) and not math.isfinite(one) for one in tree_leaves((args, kwargs))
        )
        result = _Result(
            index=self.operations,
            function=name,
            has_nan=has_nan,
            is_mask=not has_nan and (written or bool(lost)) and all(one.is_mask for one in lost),
            parents=tuple(lost),
        )
        if not lost or (has_nan and not any(one.has_nan for one in lost)):
            shown = {key: before.get(id(value), value) for key, value in given.items()}
            result.bad = self._describe(name, shown, *_worst(bad))
            if written:
                kinds = " and ".join(invalidity.kinds(bad[0][0]))
                result.bad = replace(result.bad, reason=f"{kinds} written by the program")
        for one, _ in bad:
            self._results.put(one, result)

    def _origin(self, tensor: Tensor, value: Tensor, reader: str) -> _Result:
        """What made a tensor that is not finite; one that stood there before is taken in with the value it had, where
        the operation `reader` reads it first.
        """
        known = self._results.get(tensor)
        if isinstance(known, _Result):
            return known
        named = self._given.get(tensor) or _Named(name="", place="outside")
        has_nan = bool(torch.isnan(value).any())
        # A mask of -inf may be a buffer or a constant of the program's; a batch or a weight is none.
        is_mask = not has_nan and named.place in ("buffer", "outside") and not bool((value == math.inf).any())
        found = _Result(index=self.operations, function="", has_nan=has_nan, is_mask=is_mask)
        found.bad = self._stood_there(named, value, reader)
        self._results.put(tensor, found)
        return found

    # ---- saying ---------------------------------------------------------------------------------------------------

    def explain(self, loss: Tensor | None, gradients: Iterable[Tensor] = ()) -> BadOperation | None:
        """Where a non-finite loss comes from or, with a finite one, the non-finite gradients; None where all is finite,
        or where the value came about in a way that no operation shows.
        """
        for symptoms in ([] if loss is None else [loss], gradients):
            found = [self._results.get(one) for one in symptoms if _is_plain(one) and _nonfinite(one) is not None]
            first = [_first(one) for one in found if isinstance(one, _Result)]
            told = [(one.index, one.bad) for one in first if one is not None and one.bad is not None]
            if told:
                _, bad = min(told, key=lambda pair: pair[0])
                is_dropped = symptoms is gradients and bad.place == "operation" and bad.direction == "forward"
                return replace(bad, dropped=is_dropped)
        return None

    def largest(self) -> BadOperation | None:
        """Where finite values grew so large that a norm over them overflows: the operation that did most for it. None
        where there are no such values.
        """
        return self._grown if self._has_huge else None

    def _describe(self, name: str, given: Mapping[str, Any], tensor: Tensor, mask: Tensor) -> BadOperation:
        return BadOperation(
            operation=invalidity.NAMES.get(name, name),
            reason=invalidity.reason(name, given, tensor, mask),
            **self._sites.here(),
            **self._counts(tensor, mask),
            operands=tuple(_operand(key, value) for key, value in given.items() if _is_shown(value)),
        )

    def _stood_there(self, named: _Named, tensor: Tensor, reader: str) -> BadOperation:
        mask, kinds = ~torch.isfinite(tensor), " and ".join(invalidity.kinds(tensor))
        what = {"input": "the batch", "weight": f"the parameter {named.name}", "buffer": f"the buffer {named.name}"}
        thing = what.get(named.place, "a tensor of the program's")
        facts = self._counts(tensor, mask)
        if named.place in ("weight", "buffer"):
            facts |= row_facts(mask, None)
        where = self._sites.here() | ({"module": named.module} if named.module else {})
        return BadOperation(
            place=named.place,
            operation=invalidity.NAMES.get(reader, reader),
            reason=f"{thing} held {kinds} when the step began",
            **(where | {"derivative_of": ""}),
            **facts,
        )

    def _counts(self, tensor: Tensor, mask: Tensor) -> dict[str, Any]:
        worst = "nan" if bool(torch.isnan(tensor).any()) else "inf" if bool((tensor == math.inf).any()) else "-inf"
        facts = {"made": worst, "count": int(mask.sum()), "size": mask.numel()}
        return {**facts, **row_facts(mask, self._num_rows)}


# ---- the way back ---------------------------------------------------------------------------------------------------


def _first(symptom: _Result) -> _Result | None:
    """The earliest result on the way to `symptom` with which it began."""
    seen, waiting, found = {symptom}, [symptom], list[_Result]()
    while waiting:
        result = waiting.pop()
        following = _followed(result)
        if not following:
            found.append(result)
        for parent in following:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return min(found, key=lambda one: one.index, default=None)


def _followed(result: _Result) -> list[_Result]:
    """The operands that have brought it here. An infinity that was meant has not: what made NaN of it has."""
    if not result.has_nan:
        return [*result.parents]
    nans = [parent for parent in result.parents if parent.has_nan]
    return nans or [parent for parent in result.parents if not parent.is_mask]


def _is_taken(name: str, given: Mapping[str, Any], tensor: Tensor, value: Tensor) -> bool:
    """Whether any bad entry of an operand goes into the result: `where` drops some."""
    condition = given.get("condition") if name == "where" else None
    if not isinstance(condition, Tensor) or tensor is condition:
        return True
    chosen = condition if tensor is given.get("self") else ~condition
    return bool((chosen & ~torch.isfinite(value)).any())


# ---- tensors --------------------------------------------------------------------------------------------------------


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor whose values can be looked at: not sharded, nested, sparse or without memory."""
    return (
        type(value) in (Tensor, nn.Parameter, nn.Buffer)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and (value.is_floating_point() or value.is_complex())
    )


def _nonfinite(tensor: Tensor) -> Tensor | None:
    """Which entries are not finite; None where all are."""
    bad = ~torch.isfinite(tensor)
    return bad if bool(bad.any()) else None


def _largest_root(tensor: Tensor) -> float:
    """The largest number whose square its type holds; infinity for float16, where sound values are beyond it."""
    largest = torch.finfo(tensor.dtype).max
    return math.sqrt(largest) if largest > _HALF else math.inf


def _size(tensor: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return float(tensor.abs().amax()) if tensor.numel() else 0.0


def _operands_before(func: Any, args: Any, kwargs: Any) -> dict[int, Tensor]:
    """Copies of what an operation in place is about to overwrite, by the identity of the tensor."""
    if not func._schema.is_mutable:
        return {}
    written = [
        argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
    ]
    tensors = [
        one for key, value in _by_name(func, args, kwargs).items() if key in written for one in tree_leaves(value)
    ]
    return {id(one): one.clone() for one in tensors if _is_plain(one)}


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by the names that the operation's schema has for them."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _worst(bad: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of several results, the first that holds NaN, or else the first."""
    return next((pair for pair in bad if bool(torch.isnan(pair[0]).any())), bad[0])


def _is_shown(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype != torch.bool


def _operand(name: str, tensor: Tensor) -> Operand:
    """Its finite values' range."""
    facts: dict[str, Any] = {"name": name, "dtype": invalidity.dtype_name(tensor), "shape": tuple(tensor.shape)}
    if tensor.is_complex():
        tensor = tensor.abs()
    finite = tensor[torch.isfinite(tensor)]
    if not finite.numel():
        return Operand(**facts, nonfinite=tensor.numel())
    low, high = (float(end) for end in (finite.min(), finite.max()))
    return Operand(**facts, low=low, high=high, nonfinite=tensor.numel() - finite.numel())


def row_facts(bad: Tensor, num_rows: int | None) -> dict[str, Any]:
    """Which rows of the batch hold a bad entry: of the first axis, or where that is rows times time steps, of its
    parts. Where it is neither, its own indices. Nothing for a single value.
    """
    if bad.dim() == 0 or not bad.numel():
        return {}
    is_aligned = not num_rows or len(bad) % num_rows == 0
    lines = bad.reshape(len(bad), -1).any(1)
    if num_rows and is_aligned:
        lines = lines.reshape(num_rows, -1).any(1)
    found = lines.nonzero().flatten().tolist()
    facts = {"rows": tuple(found[:ROWS]), "num_bad_rows": len(found), "num_rows": len(lines)}
    return facts if is_aligned else {**facts, "aligned": False}
