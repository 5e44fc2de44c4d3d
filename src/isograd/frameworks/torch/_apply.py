"""Apply changes to a training program while it runs, and undo them.

Changes to a model happen once, when the first optimizer over it is made (or at once, in a program that runs already);
changes to steps act around every backward pass and step of every optimizer. The applier hears of both from `_taps.py`,
before the observer: what is recorded is what the optimizer sees. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isograd import _changes
from isograd._changes import CannotApply, Change, to_dict
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _step_changes as steps
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._delegation import Delegation
from isograd.frameworks.torch._effects import OWN, StepEffect, parameters_of, unscale
from isograd.frameworks.torch._initialization import Reinitialization
from isograd.frameworks.torch._passage import Passage
from isograd.frameworks.torch._precision import PrecisionRaise
from isograd.frameworks.torch._registration import Registration
from isograd.frameworks.torch._standardization import InputStandardization, TargetStandardization
from isograd.frameworks.torch._surgery import (
    ActivationReplacement,
    ModelEffect,
    NormalizationInsertion,
    OutputActivationRemoval,
    ShortcutInsertion,
    Site,
    leave_optimizer,
)

_MODEL_EFFECTS: Mapping[type[Any], Callable[[Any, Site, ExitStack], ModelEffect]] = {
    _changes.RaisePrecision: PrecisionRaise,
    _changes.RemoveOutputActivation: OutputActivationRemoval,
    _changes.ReplaceActivations: ActivationReplacement,
    _changes.InsertNormalization: NormalizationInsertion,
    _changes.InsertShortcuts: ShortcutInsertion,
    _changes.ReinitializeLayers: Reinitialization,
    _changes.StandardizeInputs: InputStandardization,
    _changes.StandardizeTargets: TargetStandardization,
}
"""In the order in which they are made: weights are drawn for the activations that there are then."""

_STEP_EFFECTS: Mapping[type[Any], Callable[[Any], StepEffect]] = {
    _changes.RegisterParameters: Registration,
    _changes.ReplaceOptimizer: Delegation,
    _changes.ScaleLoss: steps.LossScaling,
    _changes.ZeroGradients: steps.Zeroing,
    _changes.AverageAccumulation: steps.Averaging,
    _changes.PenalizeWeights: steps.WeightPenalty,
    _changes.ClipGradients: steps.Clipping,
    _changes.SetHyperparameter: steps.set_hyperparameter,
    _changes.ScheduleLearningRate: steps.schedule_learning_rate,
    _changes.ClampWeights: steps.Clamping,
    _changes.ClipUpdates: steps.UpdateClipping,
}
"""In the order in which they act before a step; after it, the other way round."""


class Applier:
    """Applies `changes` to one process: to every optimizer made from now on and its models (`listen`), also to those
    that there are (`adopt_running`). `models` and `optimizers` say which, where not all are meant.

    `on_event(kind, data)` hears of everything that was done; `on_refusal(sentence)` of a change that this program has
    no place for anywhere, before the first step. Nothing is raised into the program.
    """

    def __init__(
        self,
        changes: Sequence[Change],
        *,
        on_event: Callable[[str, dict[str, Any]], None],
        on_refusal: Callable[[str], None],
        models: Sequence[nn.Module] = (),
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        self._on_event, self._on_refusal = on_event, on_refusal
        self._changes = tuple(changes)
        self._models, self._only = tuple(models), tuple(optimizers)
        self._effects: list[tuple[Change, StepEffect]] = []
        self._model_changes = _ordered(self._changes, _MODEL_EFFECTS)
        self._adopted: WeakKeyDictionary[Optimizer, list[StepEffect]] = WeakKeyDictionary()
        self._models_changed: list[_ChangedModel] = []
        self._applied: dict[Change, int] = {}
        self._refused: dict[Change, str] = {}
        self._depth = 0
        self._stepping: tuple[Optimizer, bool] | None = None
        skips = any(isinstance(change, _changes.SkipBadSteps) for change in changes)
        self._gate = _Gate(self._adopted, self._skipped) if skips else None
        self._make_effects()

    def _make_effects(self) -> None:
        for change in _ordered([*_with_rates(self._changes)], _STEP_EFFECTS):
            self._make_effect(change)

    def _make_effect(self, change: Change) -> None:
        try:
            self._effects.append((change, _STEP_EFFECTS[type(change)](change)))
        except CannotApply as error:
            self._refused[change] = str(error)

    # ---- life -----------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear of optimizers, backward passes and steps before those who listen already."""
        taps.subscribe(self, first=True)

    def listen_last(self) -> None:
        """What hides gradients from the optimizer hears of steps after the observer, which is to see them."""
        if self._gate is not None:
            taps.subscribe(self._gate)

    def adopt_running(self) -> None:
        """Apply to a program that runs already. Raises CannotApply, with everything undone and no event told, where
        there is no place for one of the changes.
        """
        on_event, events = self._on_event, list[tuple[str, dict[str, Any]]]()
        self._on_event = lambda kind, data: events.append((kind, data))
        for optimizer in self._only or [one for one in describe.all_optimizers() if one not in OWN]:
            self._consider(optimizer)
        refusals = [*dict.fromkeys(self._unapplied())]
        if refusals or not self._adopted:
            self.undo()
            raise CannotApply(" ".join(refusals) or "No optimizer trains here yet: there is nothing to change.")
        self._on_event = on_event
        for kind, data in events:
            on_event(kind, data)

    def undo(self) -> tuple[str, ...]:
        """Put everything back, last first, and stop. Returns a sentence for whatever stays changed."""
        self.stop()
        left: list[str | None] = []
        with torch.no_grad():
            for optimizer, effects in list(self._adopted.items()):
                left += [_taken_back(effect, partial(effect.undo, optimizer)) for effect in reversed(effects)]
            for model in reversed(self._models_changed):
                left += model.undo()
                for optimizer in list(self._adopted):  # also those that the program has made since
                    leave_optimizer(optimizer, model.site.inserted)
        was_applied = bool(self._adopted)
        self._adopted.clear()
        self._models_changed.clear()
        sentences = tuple(dict.fromkeys(sentence for sentence in left if sentence))
        if was_applied:
            self._on_event("treatment-undone", {"left": list(sentences)})
        return sentences

    def stop(self) -> None:
        """Hear of nothing more; what has been done stays."""
        taps.unsubscribe(self)
        if self._gate is not None:
            taps.unsubscribe(self._gate)

    # ---- optimizers -----------------------------------------------------------------------------------------------

    def made_optimizer(self, optimizer: Optimizer) -> None:
        """A new optimizer: its models exist by now, and have not trained yet."""
        if not self._only:
            self._consider(optimizer)

    def _consider(self, optimizer: Optimizer) -> None:
        if optimizer in self._adopted or not self._is_ours(optimizer):
            return
        roots = describe.roots_holding(parameters_of(optimizer))
        taken: list[StepEffect] = []
        self._adopted[optimizer] = taken
        with torch.no_grad():
            self._change_models(roots, optimizer)
            for change, effect in self._effects:
                if self._attempt(change, partial(effect.adopt, optimizer, roots)) is None:
                    _taken_back(effect, partial(effect.undo, optimizer))
                else:
                    taken.append(effect)
        if self._gate is not None:
            self._note_applied(_changes.SkipBadSteps(), "")

    def _change_models(self, roots: Sequence[nn.Module], optimizer: Optimizer) -> None:
        if not self._model_changes:
            return
        held = {id(parameter) for root in roots for parameter in root.parameters()}
        loose = [parameter for parameter in parameters_of(optimizer) if id(parameter) not in held]
        for index, root in enumerate(roots or [nn.Module()]):
            if all(known.site.root is not root for known in self._models_changed):
                model = _ChangedModel(Site(root, optimizer, Passage(root), () if index else loose))
                self._models_changed.append(model)
                for change in self._model_changes:
                    if roots or isinstance(change, _changes.ReinitializeLayers):
                        self._attempt(change, partial(model.apply, change))
                    else:
                        why = "The program trains loose tensors: there is no module to change."
                        self._refused.setdefault(change, why)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        wanted = {id(parameter) for model in self._models for parameter in model.parameters()}
        return not self._models or any(id(parameter) in wanted for parameter in parameters_of(optimizer))

    def _attempt(self, change: Change, apply: Callable[[], str]) -> str | None:
        """What was done in words, or None where it was refused."""
        try:
            detail = apply()
        except CannotApply as error:
            self._refused.setdefault(change, str(error))
            return None
        except Exception as error:  # whatever a program's own classes do, it goes on untreated
            self._refused.setdefault(change, f"{type(change).__name__} failed: {type(error).__name__}: {error}")
            return None
        self._note_applied(change, detail)
        return detail

    def _note_applied(self, change: Change, detail: str) -> None:
        self._applied[change] = self._applied.get(change, 0) + 1
        self._on_event("treatment-applied", {"change": to_dict(change), "detail": detail})

    def _unapplied(self) -> Iterator[str]:
        for change, why in self._refused.items():
            if not self._applied.get(change):
                yield why

    def _skipped(self, optimizer: Optimizer) -> None:
        self._on_event("bad-step-skipped", {"optimizer": type(optimizer).__name__})

    # ---- around backward passes and steps ----------------------------------------------------------------------

    def before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """A backward pass begins; one for given inputs fills no gradients of the optimizer's."""
        self._depth += 1
        if self._depth == 1 and self._stepping is not None and not self._stepping[1]:
            self._stepping = None  # that step has raised: only one with a closure runs a backward pass
        if self._depth == 1 and inputs is None:
            self._each(lambda effect: effect.before_backward(tensors, list(self._adopted)))

    def after_backward(self) -> None:
        """It has ended; with a closure, the step goes on with these gradients."""
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._each(lambda effect: effect.after_backward(list(self._adopted)))
            if self._stepping is not None and self._stepping[1]:
                self._change_gradients(self._stepping[0])

    def _each(self, tell: Callable[[StepEffect], None]) -> None:
        for change, effect in self._effects:
            self._act(change, tell, effect)

    def _act(self, change: Change, tell: Callable[[StepEffect], None], effect: StepEffect) -> None:
        try:
            with torch.no_grad():
                tell(effect)
        except Exception as error:
            self._effects = [pair for pair in self._effects if pair[1] is not effect]
            for optimizer, effects in self._adopted.items():
                if effect in effects:
                    effects.remove(effect)
                    _taken_back(effect, partial(effect.undo, optimizer))
            told = f"{type(change).__name__} failed: {type(error).__name__}: {error}"
            self._on_refusal(str(error) if isinstance(error, CannotApply) else told)

    def _of(self, optimizer: Optimizer) -> list[tuple[Change, StepEffect]]:
        taken = self._adopted.get(optimizer, [])
        return [pair for pair in self._effects if pair[1] in taken]

    def _change_gradients(self, optimizer: Optimizer) -> None:
        if self._of(optimizer):
            unscale(optimizer)
        for change, effect in self._of(optimizer):
            self._act(change, lambda effect: effect.change_gradients(optimizer), effect)

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to step; one inside another one's step is that one's business."""
        if self._stepping is not None and self._stepping[0] in self._adopted and self._stepping[0] is not optimizer:
            return
        self._settle_models(optimizer)
        self._report_refusals()
        if optimizer not in self._adopted:
            return
        self._stepping = optimizer, closure
        if not closure:
            self._change_gradients(optimizer)
        for change, effect in self._of(optimizer):
            self._act(change, lambda effect: effect.before_step(optimizer), effect)

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""
        if self._stepping is None or self._stepping[0] is not optimizer:
            return
        self._stepping = None
        for model in self._models_changed:
            if model.site.optimizer is optimizer:
                model.site.passage.forget_graph()
        for change, effect in reversed(self._of(optimizer)):
            self._act(change, lambda effect: effect.after_step(optimizer), effect)

    def _settle_models(self, optimizer: Optimizer) -> None:
        """The model has run by now: a change of which nothing came is taken back."""
        for model in self._models_changed:
            if model.site.optimizer is optimizer and not model.is_settled:
                for change, why in model.settle():
                    self._applied[change] -= 1
                    self._refused.setdefault(change, why)

    def _report_refusals(self) -> None:
        for sentence in [*self._unapplied()]:
            self._on_event("treatment-refused", {"why": sentence})
            self._on_refusal(sentence)
        self._refused.clear()

    def clipped(self, norm: Tensor, limit: float) -> None:
        """Nothing of ours."""

    def before_scaled_step(self, scaler: Any) -> None:
        """Likewise: gradients are unscaled where the step begins."""

    def after_scaled_step(self, optimizer: Optimizer, stepped: bool) -> None:
        """Likewise."""

    def packs_saved_tensors(self) -> None:
        """Likewise."""


class _ChangedModel:
    """A model and what has been changed of it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.is_settled = False
        self._made: list[_Made] = []

    def apply(self, change: Change) -> str:
        """What was done, in words. Raises CannotApply, with nothing done."""
        with ExitStack() as back:
            effect = _MODEL_EFFECTS[type(change)](change, self.site, back)
            self._made.append(_Made(change, effect, back.pop_all()))
        return effect.detail

    def settle(self) -> list[tuple[Change, str]]:
        """Take back the changes of which nothing came; which, and why."""
        self.is_settled = True
        unmet = [(made, why) for made in self._made if (why := made.effect.unmet()) is not None]
        for made, _ in unmet:
            made.back.close()
            self._made.remove(made)
        return [(made.change, why) for made, why in unmet]

    def undo(self) -> list[str | None]:
        """Take everything back; what stays changed, in sentences."""
        left: list[str | None] = []
        for made in reversed(self._made):
            left += [_taken_back(made.effect, made.back.close), made.effect.left if self.is_settled else None]
        self._made.clear()
        self.site.passage.release()
        return left


@dataclass(frozen=True)
class _Made:
    """A change that was made of a model, its effect, and how to take it back."""

    change: Change
    effect: ModelEffect
    back: ExitStack


def _taken_back(effect: StepEffect | ModelEffect, take_back: Callable[[], str | None]) -> str | None:
    """Take a change back; a sentence where something stays changed, also where the program does not allow it."""
    try:
        return take_back()
    except Exception as error:
        return f"{type(effect).__name__} could not be taken back: {type(error).__name__}: {error}."


def _ordered(changes: Sequence[Change], table: Mapping[type[Any], Any]) -> list[Change]:
    """The changes that a table knows, in its order."""
    order = list(table)
    return sorted((c for c in changes if type(c) in table), key=lambda change: order.index(type(change)))


class _Gate:
    """Tells `Skipping` of the steps of its optimizers, behind all other listeners."""

    def __init__(self, optimizers: Container[Optimizer], on_skip: Callable[[Optimizer], None]) -> None:
        self._optimizers, self._skipping = optimizers, steps.Skipping(on_skip)
        self._closure: Optimizer | None = None

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """Gradients are there, unless a closure computes them inside the step."""
        if optimizer not in self._optimizers:
            return
        self._closure = optimizer if closure else None
        if not closure:
            with torch.no_grad():
                self._skipping.hide(optimizer)

    def after_backward(self) -> None:
        """Inside a step with a closure the gradients are complete now."""
        if self._closure is not None:
            with torch.no_grad():
                self._skipping.hide(self._closure)

    def after_step(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped, with what it saw."""
        self._closure = None
        with torch.no_grad():
            self._skipping.give_back(optimizer)

    def _ignore(self, *_: Any) -> None:
        return None

    made_optimizer = before_backward = clipped = before_scaled_step = after_scaled_step = packs_saved_tensors = _ignore


def _with_rates(changes: Sequence[Change]) -> Iterator[Change]:
    """The changes, with the learning rate of a new optimizer as a change of its own."""
    for change in changes:
        yield change
        if isinstance(change, _changes.ReplaceOptimizer):
            for name, value in change.hyperparameters:
                if name == "lr":
                    yield _changes.SetHyperparameter(name="lr", value=value)
