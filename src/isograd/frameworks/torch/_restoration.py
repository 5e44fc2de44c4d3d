"""Putting what a capsule holds into a program: model, optimizer, generators, settings. In place: storage is kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from isograd._capsule import Capsule
from isograd._errors import CapsuleUnreadable, IsogradError
from isograd._tree import TreeError
from isograd.frameworks.torch import _generators as generators
from isograd.frameworks.torch import _trees as trees
from isograd.frameworks.torch._delegation import acting
from isograd.frameworks.torch._named_state import Names, local

States = list[dict[str, Any] | None]


class DoesNotMatch(IsogradError):
    """The program is not the one that made the capsule: it has other parameters."""


class Restoration:
    """What a capsule holds, read once. Raises CapsuleUnreadable."""

    def __init__(self, capsule: Capsule) -> None:
        self.capsule, self.facts = capsule, capsule.facts
        self._model, self._optimizer = _read(capsule, "model"), _read(capsule, "optimizer")
        self._batch, self._generators = _read(capsule, "batch"), _read(capsule, "generators")
        states = self.facts["generators"]
        self._delivered = _filled(states.get("batches"), len(self.facts["batches"]))
        self._called = _filled(states.get("calls"), len(self.facts["calls"]), self._delivered[-1:])

    # ---- what the step is given -----------------------------------------------------------------------------------

    def batches(self) -> list[Any]:
        """What is handed to the step, a new copy: the batches of data loaders, one after the other, or one mapping of
        the program's own data by name, or what the model was called with.
        """
        with _damage(self.capsule):
            if self.facts["batches"]:
                return [trees.decode(tree, self._batch) for tree in self.facts["batches"]]
            if self.facts["locals"]:
                return [{name: trees.decode(tree, self._batch) for name, tree in self.facts["locals"].items()}]
            args = [trees.decode(call["args"], self._batch) for call in self.facts["calls"][:1]]
            return [one[0] if len(one) == 1 else one for one in args]

    def loss_scale(self) -> float:
        """What the run's loss was multiplied by before its backward passes; 1 where it was not."""
        tree = self.facts["scaler"]
        state = trees.decode(tree, {}) if isinstance(tree, dict) else {}
        scale = state.get("scale", 1.0) if isinstance(state, dict) else 1.0
        return float(scale) if isinstance(scale, (int, float)) and 0 < scale < float("inf") else 1.0

    def num_rows(self) -> int | None:
        """Of the first tensor that the model was called with, or of the first batch; None where there is neither."""
        given = [tree for call in self.facts["calls"][:1] for tree in (call["args"], call["kwargs"])]
        for tree in given or self.facts["batches"][:1]:
            for tensor in tensors_in(trees.decode(tree, self._batch)):
                if tensor.dim():
                    return len(tensor)
        return None

    # ---- generators -----------------------------------------------------------------------------------------------

    def put_generators(self, index: int, *, of: str = "batches") -> None:
        """As they stood when batch `index` was delivered, or when call `index` began."""
        states = self._delivered if of == "batches" else self._called
        state = states[index] if index < len(states) else None
        if of == "batches" and not states:
            state = next(iter(self._called), None)
        if state is not None:
            try:
                generators.put_back(state, self._generators)
            except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
                raise CapsuleUnreadable(f"{self.capsule.path} holds a state of generators that is none.") from error

    @contextlib.contextmanager
    def calls_followed(self, roots: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within it, generators are put back at every call of a root, as they stood at the same call of the run."""
        if not self._called:
            yield
            return
        count = 0

        def before(module: nn.Module, args: Any) -> None:
            nonlocal count
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self.put_generators(count, of="calls")
                count += 1

        handles = [root.register_forward_pre_hook(before) for root in roots.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- model and optimizer --------------------------------------------------------------------------------------

    def roots_of(self, model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The program's modules by the names that the capsule has for them."""
        if not isinstance(model, nn.Module):
            return dict(model)
        return {next(iter(self.facts["roots"]), ""): model}

    def prefixed(self, roots: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The roots by what their paths begin with: nothing where there is one."""
        return {name if len(roots) > 1 else "": root for name, root in roots.items()}

    def mismatch(self, names: Names) -> str:
        """Why the state has no place in a program with these parameters and buffers, in a sentence; "" where it has."""
        for kind, present in (("parameter", names.parameters), ("buffer", names.buffers)):
            for name, facts in self.facts[f"{kind}s"].items():
                if facts.get("sharded"):
                    return (
                        f"The {kind} {name} was sharded over several processes: such a step cannot be replayed in one."
                    )
                if name not in present:
                    return f"This program has no {kind} {name}, which the capsule holds: name the one that made it."
                have, want = list(local(present[name]).shape), facts.get("shape")
                if have != want:
                    shapes = f"{have} here and {want} in the capsule"
                    return f"The {kind} {name} has shape {shapes}: name the program that made it."
        return ""

    def put_model(self, names: Names) -> None:
        """Parameters, buffers, and which modules train. What a treatment has added stays as it is."""
        with torch.no_grad():
            for kind, present in (("parameters", names.parameters), ("buffers", names.buffers)):
                for name, facts in self.facts[kind].items():
                    if name in present and name in self._model:
                        _copy(present[name], self._model[name])
                    if kind == "parameters" and name in present and present[name].is_leaf:
                        present[name].requires_grad_(bool(facts.get("requires_grad", True)))
            for path, facts in self.facts["modules"].items():
                if path in names.modules:
                    names.modules[path].training = bool(facts.get("training", True))

    def put_optimizer(self, optimizer: Optimizer, names: Names) -> str:
        """Its state and options; a sentence where it is another optimizer, which stays as it is."""
        facts, steps = self.facts["optimizer"], acting(optimizer)
        if facts is None:
            return ""
        if facts.get("type") != type(steps).__name__:
            return f"The optimizer is {type(steps).__name__} here and was {facts.get('type')}: its state is left out."
        with _damage(self.capsule), torch.no_grad():
            steps.state.clear()
            for name, state in facts.get("state", {}).items():
                if name in names.parameters:
                    made = {key: trees.decode(tree, self._optimizer) for key, tree in state.items()}
                    steps.state[names.parameters[name]] = made
            for group, options in zip(steps.param_groups, facts.get("param_groups", []), strict=False):
                for key in group.keys() & options.keys() - {"params", "param_names"}:
                    group[key] = trees.decode(options[key], self._optimizer)
        return ""


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested data, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _copy(tensor: Tensor, stored: Tensor) -> None:
    held = local(tensor)
    if held.is_complex():
        stored = torch.view_as_complex(stored)
    if held.shape == stored.shape:
        held.copy_(stored)


def _read(capsule: Capsule, name: str) -> dict[str, Tensor]:
    try:
        return load_file(capsule.file(name))
    except (SafetensorError, OSError, ValueError) as error:
        raise CapsuleUnreadable(f"{capsule.path}: {name}.safetensors is damaged.") from error


@contextlib.contextmanager
def _damage(capsule: Capsule) -> Iterator[None]:
    try:
        yield
    except (TreeError, KeyError, TypeError, AttributeError) as error:
        raise CapsuleUnreadable(f"{capsule.path} holds data that isograd did not write: {error}.") from error


def _filled(states: Any, count: int, before: Sequence[Any] = ()) -> States:
    """One state for each; where nothing was drawn since the one before, that one."""
    filled: States = []
    last = before[0] if before else None
    for state in states if isinstance(states, list) else []:
        last = state if isinstance(state, dict) else last
        filled.append(last)
    return filled[:count] if count else filled


# ---- settings -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def settings_of(facts: Mapping[str, Any]) -> Iterator[None]:
    """Within it, threads, determinism and precision are those of the captured run, as far as they can be set here."""
    with contextlib.ExitStack() as back:
        for change in (_threads, _determinism, _precision, _cudnn):
            # What a capsule says of settings is taken for what it is worth.
            with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError):
                change(facts["settings"], back)
        yield


def _threads(wanted: Mapping[str, Any], back: contextlib.ExitStack) -> None:
    back.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(min(int(wanted["threads"]), 4 * (os.cpu_count() or 1)))


def _determinism(wanted: Mapping[str, Any], back: contextlib.ExitStack) -> None:
    now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    back.callback(torch.use_deterministic_algorithms, now[0], warn_only=now[1])
    torch.use_deterministic_algorithms(bool(wanted["deterministic"]), warn_only=bool(wanted["deterministic_warn_only"]))


def _precision(wanted: Mapping[str, Any], back: contextlib.ExitStack) -> None:
    before = torch.get_float32_matmul_precision()
    if wanted["matmul_precision"] != before:
        torch.set_float32_matmul_precision(wanted["matmul_precision"])
        back.callback(torch.set_float32_matmul_precision, before)


def _cudnn(wanted: Mapping[str, Any], back: contextlib.ExitStack) -> None:
    if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        back.enter_context(torch.backends.cudnn.flags(**{key: bool(value) for key, value in wanted["cudnn"].items()}))
