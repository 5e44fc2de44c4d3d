"""One optimizer under a guard: its models, their names, the judge of its steps, and who decides about them with it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from isograd._guard import Guard
from isograd._judge import Judge
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch._device_gate import DeviceGate
from isograd.frameworks.torch._effects import parameters_of
from isograd.frameworks.torch._state_parts import OptimizerPart
from isograd.frameworks.torch._step_reading import Agreement, CannotAgree, needs_agreement
from isograd.frameworks.torch._tensor_copies import Inventory
from isograd.frameworks.torch._training_state import with_inner


class Guarded:
    """What is known of one optimizer: its models, their names, and the judge of its steps."""

    def __init__(self, optimizer: Optimizer, guard: Guard, roots: list[nn.Module]) -> None:
        self.roots = roots
        self.named_roots = named(self.roots)
        self._names = {id(p): name for root in self.roots for name, p in _named_parameters(root)}
        self._parameters = [weakref.ref(parameter) for parameter in parameters_of(optimizer)]
        self.judge = Judge(guard, self._name)
        self.gate = DeviceGate(guard, self.judge)
        self.agreement: Agreement | None = None
        self.refusal = self._objection(optimizer)

    def _objection(self, optimizer: Optimizer) -> str:
        if isinstance(optimizer, LBFGS):
            return "it evaluates its loss several times within a step"
        parameters = parameters_of(optimizer)
        why = needs_agreement(self.roots, parameters)
        if why not in ("replicated", "sharded"):
            return why
        try:
            self.agreement = Agreement(sharded=why == "sharded", width=len(parameters))
        except CannotAgree as refusal:
            return str(refusal)
        return ""

    def _name(self, index: int) -> str:
        parameter = self._parameters[index]() if index < len(self._parameters) else None
        return self._names.get(id(parameter), f"parameter {index}")

    @property
    def all_overflowed(self) -> bool:
        """Whether every rank's scaler leaves the step under way out, so that all of them lower their scales."""
        return self.agreement is None or self.agreement.overflows == self.agreement.size

    def state_is_bad(self, optimizer: Optimizer) -> bool:
        """Whether a weight or the optimizer's state is not finite, on any rank."""
        bad = not _is_finite(optimizer)  # buffers are put back with the batch
        return self.agreement.any(bad) if self.agreement is not None else bad


class Roots:
    """Models by what optimizers hold of them: looked for among all that is alive once, not for each optimizer of a
    program that has one for each parameter.
    """

    def __init__(self) -> None:
        self._known: list[weakref.ref[nn.Module]] = []

    def of(self, optimizer: Optimizer) -> list[nn.Module]:
        """The topmost modules that hold its parameters."""
        parameters = parameters_of(optimizer)
        alive = [root for ref in self._known if (root := ref()) is not None]
        owner = {id(parameter): root for root in alive for parameter in root.parameters()}
        if any(id(parameter) not in owner for parameter in parameters):
            roots = describe.roots_holding(parameters)
            self._known += [weakref.ref(root) for root in roots]
            return roots
        return list({id(owner[id(p)]): owner[id(p)] for p in parameters}.values())


def _named_parameters(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the user's names: what wraps the model is left out."""
    for path, module in describe.walk(root):
        yield from module.named_parameters(path, recurse=False)


def named(roots: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The roots by their classes' names, numbered where two have the same."""
    found: dict[str, nn.Module] = {}
    for root in roots:
        name = type(root).__name__.lower()
        found[name if name not in found else f"{name}-{len(found) + 1}"] = root
    return found


def _is_finite(optimizer: Optimizer) -> bool:
    """Whether weights and state are, looked at without a search for what else belongs to them: that takes long."""
    inventory = Inventory()
    for one in with_inner([optimizer]):
        OptimizerPart(one, inventory)
    return inventory.is_finite()
