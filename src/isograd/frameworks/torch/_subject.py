"""One subject: the optimizers that step together, the parameters they hold, and the modules those belong to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from isograd._history import Layer, Parameter
from isograd.frameworks import Recorder
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch._delegation import acting
from isograd.frameworks.torch._parameters import Columns


@dataclass
class LayerEntry:
    """A column of the layer statistics. `module` is None for operations and boundaries."""

    layer: Layer
    module: weakref.ref[nn.Module] | None = None


class Subject:
    """Tables of one subject, kept in step with the run file. Holds no strong reference to the user's objects."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name = name
        self.step = 0
        self.is_deep = True
        self._recorder = recorder
        self.optimizers: list[weakref.ref[Optimizer]] = []
        self.roots: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # root -> prefix of names
        self.layers: list[LayerEntry] = []
        self.parameters: list[Parameter] = []
        self._layer_columns: dict[str, int] = {}
        self._module_columns: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._parameter_columns: dict[int, int] = {}
        self._parameter_refs: dict[int, weakref.ref[Tensor]] = {}
        self._plans: weakref.WeakKeyDictionary[Optimizer, tuple[int, Columns]] = weakref.WeakKeyDictionary()
        self._offsets: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._trainable: dict[int, bool] = {}
        self._frozen_in_name: set[str] = set()
        self._uses = 0
        self._groups: list[dict[str, Any]] = []

    # ---- parameters -------------------------------------------------------------------------------------------

    def columns(self, optimizer: Optimizer) -> Columns:
        """The column of each of the optimizer's parameters, in its own order; new ones are added."""
        stamp = hash(tuple(id(p) for group in optimizer.param_groups for p in group["params"]))
        plan = self._plans.get(optimizer)
        if plan is None or plan[0] != stamp:
            self._adopt(optimizer)
            plan = (stamp, [self._column_of(p) for group in optimizer.param_groups for p in group["params"]])
            self._plans[optimizer] = plan
        return plan[1]

    def _column_of(self, parameter: Tensor) -> int:
        return -1 if describe.is_sharded(parameter) else self._parameter_columns[id(parameter)]

    def holds(self, parameter: Tensor) -> bool:
        """Whether this very tensor has a column here (ids are reused after a tensor is gone)."""
        ref = self._parameter_refs.get(id(parameter))
        return ref is not None and ref() is parameter

    def _adopt(self, optimizer: Optimizer) -> None:
        if all(ref() is not optimizer for ref in self.optimizers):
            self.optimizers.append(weakref.ref(optimizer))
        offset = self._offset_of(optimizer)
        named = {id(p): name for group in optimizer.param_groups for p, name in _named(group)}
        loose = ((named.get(id(p), f"parameter.{i}"), p) for i, p in enumerate(_held(optimizer)))
        self.add_parameters(((name, "", p) for name, p in loose if not self.holds(p)))
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                self._set_group(parameter, offset + index)
        self._groups[offset : offset + len(optimizer.param_groups)] = [
            _hyperparameters(optimizer, group) for group in optimizer.param_groups
        ]
        self._recorder.set_groups(self.name, self._groups)

    def _offset_of(self, optimizer: Optimizer) -> int:
        """Where the optimizer's groups begin; one that succeeds a dead optimizer takes over its groups."""
        if optimizer not in self._offsets:
            alive = [ref() for ref in self.optimizers]
            others = [o for o in alive if o is not None and o is not optimizer]
            self._offsets[optimizer] = len(self._groups) if others else 0
        return self._offsets[optimizer]

    def _set_group(self, parameter: Tensor, group: int) -> None:
        column = self._parameter_columns[id(parameter)]
        self._update_parameter(column, optimized=True, group=group)

    def _update_parameter(self, column: int, **facts: Any) -> bool:
        """Whether anything has changed."""
        now = replace(self.parameters[column], **facts)
        if now == self.parameters[column]:
            return False
        self.parameters[column] = now
        self._recorder.update_parameter(self.name, column, now)
        return True

    def note_trainable(self, columns: Sequence[int], flags: Sequence[bool]) -> list[Parameter]:
        """Keep `trainable` current; the parameters for which it has changed since it was noted first.

        `columns` may be longer: a group may have been added since `flags` were read.
        """
        changed = []
        for column, flag in zip(columns, flags, strict=False):
            if column < 0 or self._trainable.get(column) is flag:
                continue
            if self._update_parameter(column, trainable=flag) and column in self._trainable:
                changed.append(self.parameters[column])
            self._trainable[column] = flag
        return changed

    def note_others_trainable(self, noted: set[int]) -> list[Parameter]:
        """As `note_trainable`, as they are now, of the parameters that still exist and have not been noted."""
        columns, flags = [], []
        for key, ref in self._parameter_refs.items():
            parameter, column = ref(), self._parameter_columns[key]
            if parameter is not None and column not in noted:
                columns.append(column)
                flags.append(parameter.requires_grad)
        return self.note_trainable(columns, flags)

    def modules_frozen_in_name(self) -> list[str]:
        """Modules with an attribute `requires_grad` that is False while their parameters need gradients; each once."""
        found = [
            path or self.name
            for root, prefix in self.roots.items()
            for path, module in describe.walk(root, prefix)
            if module.__dict__.get("requires_grad") is False and any(p.requires_grad for p in module.parameters())
        ]
        fresh = [name for name in found if name not in self._frozen_in_name]
        self._frozen_in_name.update(fresh)
        return fresh

    def add_parameters(self, named: Iterable[tuple[str, str, Tensor]]) -> None:
        """Give (name, layer, tensor)s a column each, unless they have one; names are made unique."""
        taken = {parameter.name for parameter in self.parameters}
        fresh: list[Parameter] = []
        for name, layer, tensor in named:
            if self.holds(tensor):
                continue
            unique = _unique(name, taken)
            self._parameter_columns[id(tensor)] = len(self.parameters) + len(fresh)
            self._parameter_refs[id(tensor)] = weakref.ref(tensor)
            fresh.append(describe.parameter_of(unique, layer, tensor, -1))
        self.parameters.extend(fresh)
        if fresh:
            self._recorder.add_parameters(self.name, fresh)

    def parameter_named(self, identity: int) -> Parameter | None:
        """The parameter whose tensor has this `id`, if it is one of ours."""
        column = self._parameter_columns.get(identity)
        return None if column is None else self.parameters[column]

    # ---- layers ---------------------------------------------------------------------------------------------------

    def add_modules(self, named: Iterable[tuple[str, nn.Module]]) -> None:
        """Give every layer among the modules a column and every parameter of any of them one, too."""
        entries: list[LayerEntry] = []
        parameters: list[tuple[str, str, Tensor]] = []
        for path, module in named:
            name = path or self.name
            if describe.is_layer(module) and module not in self._module_columns:
                self._module_columns[module] = len(self.layers) + len(entries)
                entries.append(LayerEntry(describe.layer_of(name, module), weakref.ref(module)))
            for short, tensor in module.named_parameters(recurse=False):
                parameters.append((f"{path}.{short}" if path else short, name, tensor))
        self._add_entries(entries)
        self.add_parameters(parameters)

    def _add_entries(self, entries: list[LayerEntry]) -> None:
        for entry in entries:
            self._layer_columns.setdefault(entry.layer.name, len(self.layers))
            self.layers.append(entry)
        if entries:
            self._recorder.add_layers(self.name, [entry.layer for entry in entries])

    def layer_column(self, name: str, **facts: Any) -> int:
        """The column of an operation or boundary, added on first sight with `facts` for its `Layer`."""
        if name not in self._layer_columns:
            self._add_entries([LayerEntry(Layer(name=name, **facts))])
        return self._layer_columns[name]

    def used(self, column: int, shape: tuple[int, ...], units: int, dtype: str) -> None:
        """Note the first use of a layer: its place in the order, what it returned, its number of units."""
        entry = self.layers[column]
        if entry.layer.position == float("inf"):
            entry.layer = replace(entry.layer, position=float(self._uses), shape=shape, units=units, dtype=dtype)
            self._uses += 1
            self._recorder.update_layer(self.name, column, entry.layer)

    def position_after(self, owner: str, fraction: float) -> float:
        """A position right behind a layer; behind everything seen so far when the layer is unknown."""
        column = self._layer_columns.get(owner)
        position = float("inf") if column is None else self.layers[column].layer.position
        return fraction + (position if position != float("inf") else float(self._uses))

    def live_layers(self) -> Iterator[tuple[int, nn.Module]]:
        """(column, module) of every module that still exists."""
        for column, entry in enumerate(self.layers):
            module = entry.module() if entry.module is not None else None
            if module is not None:
                yield column, module

    def redescribe(self) -> None:
        """Bring kinds up to date: a module may have become another one in place."""
        for column, module in self.live_layers():
            entry = self.layers[column]
            now = replace(entry.layer, kind=describe.kind_of(module), type=type(module).__name__)
            if now != entry.layer:
                entry.layer = now
                self._recorder.update_layer(self.name, column, now)

    def column_of(self, module: nn.Module) -> int | None:
        """The column of a module, if it is a layer of this subject."""
        return self._module_columns.get(module)

    def held(self) -> list[Tensor]:
        """Every parameter that one of the subject's living optimizers holds."""
        return [p for ref in self.optimizers if (optimizer := ref()) is not None for p in _held(optimizer)]

    def learning_rates(self, used: Sequence[tuple[Optimizer, list[float]]]) -> list[float]:
        """Learning rates by group over all optimizers, from what each optimizer that stepped had used."""
        rates = [float("nan")] * len(self._groups)
        for optimizer, found in used:
            offset = self._offsets.get(optimizer, 0)
            rates[offset : offset + len(found)] = found
        return rates


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named(group: dict[str, Any]) -> Iterator[tuple[Tensor, str]]:
    return zip(group["params"], group.get("param_names", ()), strict=False)


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}-{number}", number + 1
    taken.add(unique)
    return unique


def _hyperparameters(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Those of the optimizer that steps; a group may still hold what only the one that it replaced has used."""
    stepping = acting(optimizer)
    if stepping is not optimizer:
        group = {key: value for key, value in group.items() if key in stepping.defaults or key == "params"}
    plain = {k: v for k, v in group.items() if isinstance(v, (bool, int, float, str, type(None)))}
    pairs = {k: [*v] for k, v in group.items() if isinstance(v, tuple) and all(isinstance(x, float) for x in v)}
    return {"optimizer": type(stepping).__name__, "size": len(group["params"]), **plain, **pairs}
