"""Apply changes to Keras models while they train, and undo them.

A model is changed once, when it is about to make its first train function; what happens at every update is changed
inside the compiled step, by functions over tensors (`_stepping.py`). It decides nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import keras

from isograd import _changes
from isograd._changes import CannotApply, Change, to_dict
from isograd.frameworks.keras import _building as building
from isograd.frameworks.keras import _describe as describe
from isograd.frameworks.keras import _guarding as guarding
from isograd.frameworks.keras import _step_changes as steps
from isograd.frameworks.keras import _taps as taps
from isograd.frameworks.keras._initialization import Reinitialization
from isograd.frameworks.keras._insertion import NormalizationInsertion, ShortcutInsertion
from isograd.frameworks.keras._instrument import replaced
from isograd.frameworks.keras._model_changes import ActivationReplacement, OutputActivationRemoval, PrecisionRaise
from isograd.frameworks.keras._site import Effect, Site
from isograd.frameworks.keras._standardization import InputStandardization, TargetStandardization
from isograd.frameworks.keras._stepping import rebuild

_Make = Callable[[Any, Site, ExitStack], Effect]

_MODEL_EFFECTS: Mapping[type[Any], _Make] = {
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

_STEP_EFFECTS: Mapping[type[Any], _Make] = {
    _changes.ReplaceOptimizer: steps.Replacement,
    _changes.ScaleLoss: steps.LossScaling,
    _changes.PenalizeWeights: steps.WeightPenalty,
    _changes.ClipGradients: steps.Clipping,
    _changes.SetHyperparameter: steps.hyperparameter,
    _changes.ScheduleLearningRate: steps.RateChange,
    _changes.ClampWeights: steps.Clamping,
    _changes.SkipBadSteps: guarding.Skipping,
}
"""Likewise, for each optimizer."""

_NO_PLACE: Mapping[type[Any], str] = {
    _changes.RegisterParameters: "Keras trains every variable of a model's layers, in lists and dicts, too.",
    _changes.ZeroGradients: "Keras computes the gradients of each step afresh: there is nothing to clear.",
    _changes.AverageAccumulation: "Keras averages the gradients that an optimizer accumulates.",
    _changes.ClipUpdates: "Keras computes and makes an update in one: there is nothing between to clip.",
}
"""Why there is no place for a change in any Keras program."""


class Applier:
    """Applies `changes` to one process: to every model that trains from now on and its optimizers (`listen`), also to
    those that train already (`adopt_running`). `models` and `optimizers` say which, where not all are meant.

    `on_event(kind, data)` hears of everything that was done; `on_refusal(sentence)` of a change that this program has
    no place for, before the first step. Nothing is raised into the program.
    """

    def __init__(
        self,
        changes: Sequence[Change],
        *,
        on_event: Callable[[str, dict[str, Any]], None],
        on_refusal: Callable[[str], None],
        models: Sequence[Any] = (),
        optimizers: Sequence[Any] = (),
    ) -> None:
        self._on_event, self._on_refusal = on_event, on_refusal
        self._changes = tuple(_with_rates(changes))
        self._models, self._only = tuple(models), tuple(optimizers)
        self._seen: WeakSet[Any] = WeakSet()
        self._adopted: WeakSet[Any] = WeakSet()
        self._made: list[_Made] = []
        self._applied: set[Change] = set()
        self._refused = {change: _NO_PLACE[type(change)] for change in self._changes if type(change) in _NO_PLACE}

    # ---- life -----------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear of models that are about to train before those who listen already."""
        taps.subscribe(self, first=True)
        if _ordered(self._changes, _MODEL_EFFECTS):
            building.begin(self)

    def listen_last(self) -> None:
        """Nothing acts behind the observer: what is changed of an update is changed inside of it."""

    def adopt_running(self) -> None:
        """Apply to a program that runs already. Raises CannotApply, with everything undone and no event told, where
        there is no place for one of the changes.
        """
        on_event, events = self._on_event, list[tuple[str, dict[str, Any]]]()
        self._on_event = lambda kind, data: events.append((kind, data))
        models = [model for model in self._models or _training_models() if self._is_ours(model)]
        for model in models:
            self._consider(model)
        refusals = [*dict.fromkeys(self._unapplied())]
        if refusals or not models:
            self.undo()
            raise CannotApply(" ".join(refusals) or "No model trains here yet: there is nothing to change.")
        self._on_event = on_event
        for kind, data in events:
            on_event(kind, data)
        for model in models:
            remake(model)

    def undo(self) -> tuple[str, ...]:
        """Put everything back, last first, and stop. Returns a sentence for whatever stays changed."""
        was_applied = bool(self._seen)
        left = self._take_back(lambda made: True)
        self._seen.clear()
        self._adopted.clear()
        self.stop()
        sentences = tuple(dict.fromkeys(sentence for sentence in left if sentence))
        if was_applied:
            self._on_event("treatment-undone", {"left": list(sentences)})
        return sentences

    def stop(self) -> None:
        """Hear of nothing more. What acts at updates ends; what has been done to models stays."""
        taps.unsubscribe(self)
        building.end(self)
        self._take_back(lambda made: type(made.change) in _STEP_EFFECTS and not made.stays)

    def _take_back(self, which: Callable[[_Made], bool]) -> list[str | None]:
        chosen = [made for made in self._made if which(made)]
        self._made = [made for made in self._made if made not in chosen]
        models = {id(model): model for made in chosen if (model := made.model()) is not None}
        for model in models.values():
            _synchronize(model)
        left = [made.take_back() for made in reversed(chosen)]
        for model in models.values():
            _rebuild_optimizers(model)
            remake(model)
        return left

    # ---- models ---------------------------------------------------------------------------------------------------

    def before_training(self, model: Any) -> None:
        """A model is about to make a train function: everything that it trains with has been made."""
        if self._is_ours(model):
            self._consider(model)
            self._report_refusals()

    def made_train_function(self, model: Any) -> None:
        """Nothing of ours: it has not been called yet."""

    def is_waiting_for(self, model: Any) -> bool:
        """Whether the model is to be changed and has not been."""
        return self._is_ours(model) and model not in self._seen

    def _is_ours(self, model: Any) -> bool:
        if self._models and all(model is not one for one in self._models):
            return False
        known = [one for outer in describe.optimizers_of(model) for one in (outer, describe.inner(outer))]
        return not self._only or any(one is mine for one in known for mine in self._only)

    def _consider(self, model: Any) -> None:
        """Change a model that has not been changed, and those of its optimizers that have not: it may be compiled anew
        with another one.
        """
        optimizers = [one for one in describe.optimizers_of(model) if one not in self._adopted]
        is_new = model not in self._seen
        if not is_new and not optimizers:
            return
        self._seen.add(model)
        self._adopted.update(optimizers)
        if _replicas(model) > 1:
            why = "The model trains in several replicas: a change would be made in one of them."
            self._refused |= {change: self._refused.get(change, why) for change in self._changes}
            return
        _synchronize(model)
        if is_new:
            for change in _ordered(self._changes, _MODEL_EFFECTS):
                self._attempt(change, _MODEL_EFFECTS[type(change)], Site(model, getattr(model, "optimizer", None)))
            _rebuild_optimizers(model)
        for change in _ordered(self._changes, _STEP_EFFECTS):
            if not optimizers:
                self._refused.setdefault(change, "The model was compiled without an optimizer.")
            for optimizer in optimizers:
                self._attempt(change, _STEP_EFFECTS[type(change)], Site(model, optimizer))

    def _attempt(self, change: Change, make: _Make, site: Site) -> None:
        with ExitStack() as back:
            try:
                effect = make(change, site, back)
            except CannotApply as error:
                self._refused.setdefault(change, str(error))
            except Exception as error:  # whatever a program's own classes do, it goes on untreated
                self._refused.setdefault(change, f"{type(change).__name__} failed: {type(error).__name__}: {error}")
            else:
                optimizer = None if site.outer is None else site.optimizer
                refs = ref(site.model), (lambda: None) if optimizer is None else ref(optimizer)
                self._made.append(_Made(change, effect, *refs, _updates(optimizer), back.pop_all()))
                self._applied.add(change)
                self._on_event("treatment-applied", {"change": to_dict(change), "detail": effect.detail})

    def _unapplied(self) -> Iterator[str]:
        for change, why in self._refused.items():
            if change not in self._applied:
                yield why

    def _report_refusals(self) -> None:
        for sentence in [*self._unapplied()]:
            self._on_event("treatment-refused", {"why": sentence})
            self._on_refusal(sentence)
        self._refused.clear()


@dataclass(frozen=True, eq=False)
class _Made:
    """A change that was made, its effect, how many updates there had been by then, and how to take it back."""

    change: Change
    effect: Effect
    model: Callable[[], Any]
    optimizer: Callable[[], Any]
    updates: int
    back: ExitStack

    @property
    def stays(self) -> bool:
        """Whether it is left in place when nobody watches any more: what the optimizer is, not what an update does."""
        change = self.change
        is_setting = isinstance(change, _changes.SetHyperparameter) and change.name != "lr"
        return is_setting or isinstance(change, _changes.ReplaceOptimizer)

    def take_back(self) -> str | None:
        """A sentence where something stays changed, also where the program does not allow it."""
        try:
            self.back.close()
        except Exception as error:
            name = type(self.effect).__name__
            return f"{name} could not be taken back: {type(error).__name__}: {error}."
        return self.effect.left if _updates(self.optimizer()) > self.updates else None


def _updates(optimizer: Any) -> int:
    return 0 if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))


def _replicas(model: Any) -> int:
    """The copies of a model among which TensorFlow distributes a step."""
    strategy = getattr(model, "_distribute_strategy", None)
    return 1 if strategy is None else int(strategy.num_replicas_in_sync)


def _rebuild_optimizers(model: Any) -> None:
    """Let the optimizer of a model know the variables that it has now."""
    outer = getattr(model, "optimizer", None)
    if outer is None or not outer.built:
        return
    known = {id(variable) for variable in outer._trainable_variables}
    if known != {id(variable) for variable in model.trainable_variables}:
        rebuild(describe.inner(outer), model.trainable_variables, outer)


def _synchronize(model: Any) -> None:
    """On JAX, what `fit` carries from step to step goes back into the variables, and is read from there again."""
    if getattr(model, "_jax_state", None):
        model.jax_state_sync()


def remake(model: Any) -> None:
    """Let a model that trains make its train function anew: what is compiled knows nothing of changes."""
    if getattr(model, "train_function", None) is None:
        return
    _synchronize(model)
    step = model.train_step

    def train_step(*args: Any) -> Any:
        return step(*args)

    # `jax.jit` knows functions by their identity, and bound methods are equal: it would find what it compiled before.
    with replaced(model, "train_step", train_step):
        model.make_train_function(force=True)


def _training_models() -> list[Any]:
    """The models of this process that have a train function."""
    found = [thing for thing in gc.get_objects() if isinstance(thing, keras.Model)]
    return [model for model in found if getattr(model, "train_function", None) is not None]


def _ordered(changes: Sequence[Change], table: Mapping[type[Any], Any]) -> list[Change]:
    """The changes that a table knows, in its order."""
    order = list(table)
    return sorted((c for c in changes if type(c) in table), key=lambda change: order.index(type(change)))


def _with_rates(changes: Sequence[Change]) -> Iterator[Change]:
    """The changes, with the learning rate of a new optimizer as a change of its own."""
    for change in changes:
        yield change
        if isinstance(change, _changes.ReplaceOptimizer):
            for name, value in change.hyperparameters:
                if name == "lr":
                    yield _changes.SetHyperparameter(name="lr", value=value)
