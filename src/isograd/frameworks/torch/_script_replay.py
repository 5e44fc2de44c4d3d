"""A captured step inside the script that made it: the script runs as it is, until the step is due.

With a data loader, it is due at the first batch that the script asks for once model and optimizer exist: state and
generators are put in, and captured batches are handed out in place of the loader's. Without one, the script runs to the
same step number. What the step gives is told when the optimizer has stepped; then the script is of no further use.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.data import dataloader

from isograd._capsule import open_capsule
from isograd._changes import Change
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._apply import Applier
from isograd.frameworks.torch._contributions import RowShares
from isograd.frameworks.torch._effects import OWN, parameters_of
from isograd.frameworks.torch._microscope import Microscope
from isograd.frameworks.torch._named_state import Names, names_of
from isograd.frameworks.torch._replay import Hearing, explained, hints
from isograd.frameworks.torch._restoration import Restoration, settings_of, tensors_in

Tell = Callable[[Mapping[str, Any]], None]


class ScriptReplay:
    """Waits in a process that runs a script for the step of the capsule at `path`, and lets it happen once.

    `looking`: under the microscope; otherwise rows are told apart. `changes` are applied to what the script trains.
    `tell(facts)` is called once: with {"taken", "first_bad", "layers", "rows", "notes", "hints"}, or {"refusal"}.
    """

    def __init__(self, path: str, *, looking: bool, changes: Sequence[Change], tell: Tell) -> None:
        self._state = Restoration(open_capsule(path))
        self._looking, self._changes, self._tell = looking, tuple(changes), tell
        self._program: _Program | None = None
        self._why_not = ""
        self._optimizers: list[Optimizer] = []
        self._steps: dict[Optimizer, int] = {}
        self._losses: list[Tensor] = []
        self._given = 0
        self._step: _Step | None = None
        self._open = ExitStack()

    @property
    def _has_batches(self) -> bool:
        return bool(self._state.facts["batches"])

    def attach(self) -> None:
        """Begin to wait."""
        self._open.enter_context(settings_of(self._state.facts))
        applier = Applier(self._changes, on_event=lambda kind, data: None, on_refusal=self._refuse)
        if self._changes:
            applier.listen()
        taps.subscribe(self)
        if self._changes:
            applier.listen_last()
        if self._has_batches:
            _replace_batches(self._batch)

    def _refuse(self, sentence: str) -> None:
        self._tell({"refusal": sentence})

    def missed(self) -> str:
        """Why the step has not come, in a sentence, for when the script has ended."""
        if self._found() is None and self._why_not:
            return self._why_not
        if not self._optimizers:
            return "The script has ended without making an optimizer."
        taken, step = max(self._steps.values(), default=0), self._state.capsule.step
        if self._has_batches:
            return "The script has ended before it took a step with a batch of a data loader."
        return f"The script has ended after {taken} optimizer steps, before step {step}."

    # ---- which program --------------------------------------------------------------------------------------------

    def _found(self) -> _Program | None:
        """The model and the optimizer of the capsule, once they are there."""
        if self._program is None:
            for optimizer in self._optimizers:
                program = _Program.of(optimizer, self._state.facts["roots"])
                why = self._state.mismatch(program.names)
                if not why or (self._changes and program.resembles(self._state.facts)):
                    self._program = program
                    break
                self._why_not = why
        return self._program

    def _is_ours(self, optimizer: Optimizer) -> bool:
        program = self._found()
        return program is not None and program.optimizer is optimizer

    # ---- batches --------------------------------------------------------------------------------------------------

    def _batch(self, batch: Any) -> Any:
        """What the script gets in place of a batch of its loader's."""
        program = self._found() if torch.is_grad_enabled() else None
        if program is None or threading.current_thread() is not threading.main_thread():
            return batch
        number = len(self._state.facts["batches"])
        if self._step is None or self._given == number:
            # Asked for more without a step: that was no training loop, and the next one may be.
            self._leave()
            self._begin(program)
        index, self._given = self._given % number, self._given % number + 1
        captured = self._state.batches()[index]
        if self._step is not None and self._step.microscope is not None:
            self._step.microscope.give(tensors_in(captured))
        self._state.put_generators(index)
        return captured

    def _begin(self, program: _Program) -> None:
        self._given = 0
        self._losses.clear()
        self._step = _Step(self._state, program, looking=self._looking)

    def _leave(self) -> None:
        if self._step is not None:
            self._step.leave()
            self._step = None

    # ---- what is heard --------------------------------------------------------------------------------------------

    def made_optimizer(self, optimizer: Optimizer) -> None:
        """The model exists by now."""
        if optimizer not in OWN:
            self._optimizers.append(optimizer)
            self._steps[optimizer] = 0
            self._arm(optimizer)

    def _arm(self, optimizer: Optimizer) -> None:
        """Without a loader, the step begins where the one before has ended."""
        if self._has_batches or self._step is not None or self._steps[optimizer] != self._state.capsule.step:
            return
        program = self._found()
        if program is not None and program.optimizer is optimizer:
            self._begin(program)

    def before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """Its losses are kept, to ask where they come from."""
        if self._step is not None and inputs is None and torch._C._current_graph_task_id() == -1:
            self._losses += [tensor for tensor in tensors if tensor.numel() == 1]

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """Gradients are there, unless a closure computes them."""
        if self._step is not None and self._is_ours(optimizer) and not closure:
            self._step.read(self._losses)

    def after_step(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped."""
        if optimizer not in self._steps:
            return
        if self._step is not None and self._is_ours(optimizer):
            self._finish()
        self._steps[optimizer] += 1
        self._arm(optimizer)

    def after_scaled_step(self, optimizer: Optimizer, stepped: bool) -> None:
        """A scaler that has left the step out has left it to us to read the gradients."""
        if not stepped and optimizer in self._steps:
            self.after_step(optimizer)

    def _finish(self) -> None:
        assert self._step is not None
        facts = self._step.finish(self._losses)
        self._step = None
        self._tell(facts)

    def _ignore(self, *_: Any) -> None:
        return None

    after_backward = clipped = before_scaled_step = packs_saved_tensors = _ignore


class _Program:
    """A model, or several, and the optimizer that trains them."""

    def __init__(self, roots: dict[str, nn.Module], optimizer: Optimizer) -> None:
        self.roots, self.optimizer = roots, optimizer
        self.names = names_of(roots, optimizer)

    @classmethod
    def of(cls, optimizer: Optimizer, wanted: Mapping[str, Any]) -> _Program:
        """The modules that the optimizer trains, under the names `wanted` (name: type) of a capsule."""
        found = describe.roots_holding(parameters_of(optimizer))
        roots: dict[str, nn.Module] = {}
        for name, kind in wanted.items():
            of_kind = [root for root in found if type(root).__name__ == kind]
            for root in (of_kind or (found if len(wanted) == 1 else []))[:1]:
                roots[name] = root
                found.remove(root)
        return cls(roots, optimizer)

    def resembles(self, facts: Mapping[str, Any]) -> bool:
        """Whether it has half of the capsule's parameters at least: a treatment may have changed the others."""
        wanted = facts["parameters"]
        return 2 * sum(name in self.names.parameters for name in wanted) >= len(wanted) > 0


class _Step:
    """The captured step, from the moment when its state is in the program."""

    def __init__(self, state: Restoration, program: _Program, *, looking: bool) -> None:
        self._state, self._program = state, program
        self._notes: list[str] = []
        self._open = ExitStack()
        self._put_in(program.names)
        self._hearing = Hearing(program.names, scale=state.loss_scale())
        self.microscope: Microscope | None = None
        self._rows: RowShares | None = None
        num_rows = state.num_rows()
        self._open.enter_context(state.calls_followed(program.roots))
        if looking:
            self.microscope = Microscope(state.prefixed(program.roots), num_rows=num_rows)
            self._open.enter_context(self.microscope)
        elif num_rows:
            self._rows = RowShares(program.roots, num_rows, scale=state.loss_scale())
            self._open.enter_context(self._rows.listening())
        self._bad: Any = None

    def _put_in(self, names: Names) -> None:
        self._state.put_model(names)
        note = self._state.put_optimizer(self._program.optimizer, names)
        self._notes += [note] if note else []
        for parameter in names.parameters.values():
            parameter.grad = None
        _put_scale(self._state.loss_scale())

    def leave(self) -> None:
        """End listening."""
        self._open.close()

    def read(self, losses: Sequence[Tensor]) -> None:
        """Read losses and gradients, as they are before the optimizer steps."""
        self.leave()
        if not self._hearing.has_stepped:
            self._hearing.read(losses)
            gradients = [p.grad for p in self._program.names.parameters.values() if p.grad is not None]
            if self.microscope is not None:
                found = (self.microscope.explain(loss, gradients) for loss in (*losses, None))
                self._bad = next((one for one in found if one is not None), None)

    def finish(self, losses: Sequence[Tensor]) -> dict[str, Any]:
        """What there is to tell, after the optimizer has stepped."""
        self.read(losses)
        taken, facts = self._hearing.taken(), self._state.facts
        told = explained(taken, self.microscope, self._bad, facts)
        told.notes += self._notes
        told.rows = () if self._rows is None else self._rows.shares()
        return {
            "taken": asdict(taken),
            "first_bad": None if told.first_bad is None else told.first_bad.to_dict(),
            "layers": [one.to_dict() for one in told.layers],
            "rows": [one.to_dict() for one in told.rows],
            "notes": told.notes,
            "hints": list(hints(facts)),
        }


def _put_scale(scale: float) -> None:
    """The loss scale of the run, in the script's own scaler."""
    import gc

    if scale == 1 or not math.isfinite(scale):
        return
    for thing in gc.get_objects():
        if issubclass(type(thing), GradScaler) and thing.is_enabled():
            state = thing.state_dict()
            with contextlib.suppress(KeyError, RuntimeError):
                thing.load_state_dict({**state, "scale": scale})


def _replace_batches(batch: Callable[[Any], Any]) -> None:
    """From now on whoever asks a data loader for its next batch gets `batch(it)`. For processes of their own."""
    iterator: Any = dataloader._BaseDataLoaderIter
    original = iterator.__next__

    @functools.wraps(original)
    def deliver(self: Any) -> Any:
        return batch(original(self))

    iterator.__next__ = deliver
