"""The state of a model and its optimizer under the names that a capsule uses, described and copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from isograd import _tree as tree_format
from isograd._tree import Tree
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch._delegation import acting
from isograd.frameworks.torch._notes import is_storable

Roots = Mapping[str, nn.Module]


@dataclass(kw_only=True)
class Names:
    """What the modules and the optimizer of a step hold, by name; tensors that several names have come repeatedly.

    `loose`: tensors that only the optimizer holds, which are among `parameters` too.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)

    @property
    def of(self) -> dict[int, str]:
        """id of a parameter -> the first of its names."""
        return {id(tensor): name for name, tensor in reversed(self.parameters.items())}


def names_of(roots: Roots, optimizer: Optimizer | None = None) -> Names:
    """The names, as `_capsule.py` describes them: below the root, behind "<root>." where there are several roots.

    What wrappers (`DistributedDataParallel`, `torch.compile`) add to a path is left out.
    """
    names = Names()
    for root, module in roots.items():
        for path, child in describe.walk(module, root if len(roots) > 1 else ""):
            names.modules.setdefault(path, child)
            names.parameters |= _under(path, child._parameters)
            names.buffers |= _under(path, child._buffers)
    known = {id(tensor) for tensor in names.parameters.values()}
    for index, parameter in enumerate(_held(optimizer)):
        if id(parameter) not in known:
            names.loose[f"parameter.{index}"] = parameter
    names.parameters |= names.loose
    return names


def _under(path: str, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {f"{path}.{name}" if path else name: t for name, t in tensors.items() if t is not None}


def _held(optimizer: Optimizer | None) -> list[Tensor]:
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or what this process holds of one that is sharded."""
    held = getattr(tensor, "_local_tensor", tensor)
    return held.detach() if isinstance(held, Tensor) else tensor.detach()


class Copies:
    """Copies of tensors under their names; the same tensor twice is copied once, and described as tied."""

    def __init__(self, copy: Callable[[Tensor], Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._copy = copy
        self._names: dict[int, str] = {}

    def add(self, name: str, tensor: Tensor, instead: Tensor | None = None) -> dict[str, Any]:
        """Copy `tensor`, or `instead` in its place, and say what it is."""
        held = local(tensor if instead is None else instead)
        facts: dict[str, Any] = {"shape": list(held.shape), "dtype": str(held.dtype).removeprefix("torch.")}
        if describe.is_sharded(tensor):
            facts["sharded"] = True
        if id(tensor) in self._names:
            return {**facts, "tied_to": self._names[id(tensor)]}
        if is_storable(held):
            self._names[id(tensor)] = name
            self.tensors[name] = self._copy(held)
        return facts


def describe_model(names: Names, copies: Copies, before: Mapping[str, Tensor]) -> dict[str, Any]:
    """The facts `modules`, `parameters` and `buffers`; `before`: buffers as they were before the forward pass."""
    parameters = {
        name: {**copies.add(name, tensor), "requires_grad": tensor.requires_grad}
        for name, tensor in names.parameters.items()
    }
    buffers = {
        name: {**copies.add(name, tensor, before.get(name)), "before": name in before}
        for name, tensor in names.buffers.items()
    }
    types = {path: {"type": type(m).__name__, "training": m.training} for path, m in names.modules.items()}
    return {"modules": types, "parameters": parameters, "buffers": buffers}


def describe_optimizer(optimizer: Optimizer, names: Names, copies: Copies) -> dict[str, Any]:
    """The fact `optimizer`: that which steps, with its groups, and its state by the parameters' names."""
    steps, of = acting(optimizer), names.of
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(steps.param_groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        options = _trees(f"param_groups/{index}", options, copies)
        groups.append({"params": [of.get(id(p), "") for p in group["params"]], **options})
    return {"type": type(steps).__name__, "param_groups": groups, "state": dict(_states(steps, of, copies))}


def _states(optimizer: Optimizer, of: Mapping[int, str], copies: Copies) -> Iterator[tuple[str, dict[str, Tree]]]:
    for parameter, state in list(optimizer.state.items()):
        name = of.get(id(parameter))
        if name is not None and isinstance(state, dict):
            yield name, _trees(name, state, copies)


def _trees(prefix: str, values: Mapping[Any, Any], copies: Copies) -> dict[str, Tree]:
    return {str(k): tree_format.encode(value, _leaf(f"{prefix}/{k}", copies)) for k, value in values.items()}


def _leaf(key: str, copies: Copies) -> Callable[[Any], Tree | None]:
    """Keeps a tensor as `key`, further ones (LBFGS has lists) as "<key>/1", "<key>/2" …"""

    def keep(value: Any) -> Tree | None:
        if not isinstance(value, Tensor) or not is_storable(local(value)):
            return None
        name, number = key, 0
        while name in copies.tensors:
            number += 1
            name = f"{key}/{number}"
        tied = copies.add(name, value).get("tied_to", name)
        held = local(value)
        return {"tensor": tied, "device": str(held.device), **({"complex": True} if held.is_complex() else {})}

    return keep
