"""Changes of what happens at every update: hyperparameters, rates, gradients, weights, the optimizer itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import keras
from keras import ops

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.keras import _clipping as clipping
from isograd.frameworks.keras import _rates as rates
from isograd.frameworks.keras._site import Effect, Site, output_of
from isograd.frameworks.keras._stepping import Rate, Stepping, rebuild, slots_of, stepping_of

_ATTRIBUTES: Mapping[str, str] = {
    "lr": "learning_rate", "eps": "epsilon", "beta1": "beta_1", "beta2": "beta_2", "alpha": "rho",
}  # fmt: skip
"""Keras's names of hyperparameters where they are others than those of changes."""

_OPTIMIZERS: Mapping[str, str] = {"NAdam": "Nadam"}
"""Likewise of optimizers."""


# ---- learning rate ------------------------------------------------------------------------------------------------


class RateChange(Effect):
    """`SetHyperparameter` of the learning rate, and `ScheduleLearningRate`: the program's own rate stands where it
    stood, and its callbacks see it; an update is made with what becomes of it.
    """

    def __init__(
        self, change: _changes.SetHyperparameter | _changes.ScheduleLearningRate, site: Site, back: ExitStack
    ) -> None:
        optimizer = site.optimizer
        start = int(optimizer.iterations)
        if isinstance(change, _changes.SetHyperparameter):
            rate = rates.rescaled(first_rate(optimizer), value=change.value, factor=change.factor)
        elif change.shape != "constant":
            rate = rates.scheduled(change)
        elif _has_schedule(optimizer):
            rate = _largest_of_schedule(optimizer, start, change.steps)
        else:
            _hold(optimizer._learning_rate, back)
            return
        _join(site, stepping_of(optimizer).rates, (rate, start), back)


def first_rate(optimizer: Any) -> float:
    """The program's own learning rate now."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _has_schedule(optimizer: Any) -> bool:
    return not isinstance(optimizer._learning_rate, keras.Variable)


def _largest_of_schedule(optimizer: Any, start: int, steps: int) -> Rate:
    """A schedule's rates are known beforehand: 256 of them are looked up, spread over the steps."""
    schedule = optimizer._learning_rate
    if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        raise CannotApply("The learning rate is a function of the program's own: nothing tells what it will be.")
    spacing = max(1, math.ceil(steps / 256))
    known = [float(ops.convert_to_numpy(schedule(start + t))) for t in range(0, steps, spacing)]
    return rates.largest_so_far(known, spacing)


def _hold(variable: Any, back: ExitStack) -> None:
    """Let a variable rise and never fall, whoever assigns to it; what has been assigned last comes back at the end."""
    original = variable.assign
    numbers = [float(ops.convert_to_numpy(variable))] * 2  # the largest, and the last

    def assign(value: Any) -> Any:
        try:
            number = float(ops.convert_to_numpy(value))
        except Exception:  # inside a trace there are no numbers
            return original(value)
        if number != numbers[0]:  # that is what stands there: somebody writes back what was read
            numbers[1] = number
        numbers[0] = max(numbers[0], number)
        return original(numbers[0])

    vars(variable)["assign"] = assign

    def let_go() -> None:
        if vars(variable).get("assign") is assign:
            del vars(variable)["assign"]
        original(numbers[1])

    back.callback(let_go)


def _join(site: Site, place: list[Any], entry: Any, back: ExitStack) -> None:
    """Put something into one of the lists of the optimizer's `Stepping`."""
    stepping = stepping_of(site.optimizer)
    place.append(entry)
    stepping.install(site.optimizer)
    back.callback(_leave, stepping, site.optimizer, place, entry)


def _leave(stepping: Stepping, optimizer: Any, place: list[Any], entry: Any) -> None:
    place[:] = [one for one in place if one is not entry]
    stepping.release(optimizer)


# ---- other hyperparameters ----------------------------------------------------------------------------------------


class Setting(Effect):
    """`SetHyperparameter` for anything but the learning rate: an attribute of the optimizer."""

    def __init__(self, change: _changes.SetHyperparameter, site: Site, back: ExitStack) -> None:
        optimizer = site.optimizer
        name = _ATTRIBUTES.get(change.name, change.name)
        before = vars(optimizer).get(name)
        if name not in vars(optimizer):
            raise CannotApply(f"{type(optimizer).__name__} has no hyperparameter {change.name}.")
        if change.factor is not None and before is None:
            raise CannotApply(f"{type(optimizer).__name__} has no {change.name} to multiply.")
        now = change.value if change.factor is None else before * change.factor
        set_attribute(site, name, now, back)


def set_attribute(site: Site, name: str, now: Any, back: ExitStack) -> None:
    """Give an attribute of the optimizer another value; a momentum that begins gets its variables."""
    optimizer, before = site.optimizer, vars(site.optimizer).get(name)
    vars(optimizer)[name] = now
    begins_or_ends = name == "momentum" and bool(before) != bool(now)

    def put_back() -> None:
        if vars(optimizer).get(name) == now:
            vars(optimizer)[name] = before
            if begins_or_ends:
                rebuild(optimizer, optimizer._trainable_variables, site.outer)

    back.callback(put_back)
    if begins_or_ends:
        rebuild(optimizer, optimizer._trainable_variables, site.outer)


class LossScaling(Effect):
    """`ScaleLoss`: Keras's own `loss_scale_factor`; gradients are divided by it before anything is made of them."""

    def __init__(self, change: _changes.ScaleLoss, site: Site, back: ExitStack) -> None:
        if site.outer is not site.optimizer:
            raise CannotApply("The optimizer scales the loss already, and finds the scale by itself.")
        own = site.optimizer.loss_scale_factor
        set_attribute(site, "loss_scale_factor", change.scale * (1.0 if own is None else own), back)


def hyperparameter(change: _changes.SetHyperparameter, site: Site, back: ExitStack) -> Effect:
    """The effect of a `SetHyperparameter`: learning rates are changed in the update, the rest is set."""
    return (RateChange if change.name == "lr" else Setting)(change, site, back)


# ---- gradients and weights ----------------------------------------------------------------------------------------


class Clipping(Effect):
    """`ClipGradients`, as in `_clipping.py`. Brock et al. leave the output layer out of adaptive clipping; so do we."""

    def __init__(self, change: _changes.ClipGradients, site: Site, back: ExitStack) -> None:
        exempt = frozenset[str]()
        if change.method == "adaptive":
            layers = output_of(site.model).weighted
            exempt = frozenset(variable.path for layer in layers for variable in layer.trainable_variables)
            self.detail = "but for the output layer" if exempt else ""
        _join(site, stepping_of(site.optimizer).clips, clipping.clip_of(change, exempt), back)


class WeightPenalty(Effect):
    """`PenalizeWeights`: adds l1 sign(w) + l2 w to the gradients of weights with two axes or more. The loss that the
    program reports stays its own.
    """

    def __init__(self, change: _changes.PenalizeWeights, site: Site, back: ExitStack) -> None:
        def penalize(grads: list[Any], variables: Sequence[Any]) -> list[Any]:
            return [self._penalized(g, v) for g, v in zip(grads, variables, strict=True)]

        self._change = change
        _join(site, stepping_of(site.optimizer).penalties, penalize, back)

    def _penalized(self, grad: Any, variable: Any) -> Any:
        if len(variable.shape) < 2 or clipping.is_sparse(grad):
            return grad
        weights = ops.cast(ops.convert_to_tensor(variable), grad.dtype)
        return grad + self._change.l1 * ops.sign(weights) + self._change.l2 * weights


class Clamping(Effect):
    """`ClampWeights`: after each update every trained weight is in [-limit, limit]."""

    def __init__(self, change: _changes.ClampWeights, site: Site, back: ExitStack) -> None:
        def clamp(variables: Sequence[Any]) -> None:
            for variable in variables:
                variable.assign(ops.clip(ops.convert_to_tensor(variable), -change.limit, change.limit))

        limit = f"[-{change.limit:g}, {change.limit:g}]"
        self.left = f"Weights that were clamped stay in {limit} until they are trained further."
        _join(site, stepping_of(site.optimizer).after, clamp, back)


# ---- another optimizer ----------------------------------------------------------------------------------------------

_KEPT = frozenset(
    {"name", "clipnorm", "global_clipnorm", "clipvalue", "use_ema", "ema_momentum", "ema_overwrite_frequency",
     "loss_scale_factor", "gradient_accumulation_steps", "built", "_lock", "_learning_rate", "_iterations",
     "_variables", "_trainable_variables", "_trainable_variables_indices", "_tracker", "_distribution_strategy"}
)  # fmt: skip
"""What the program's optimizer keeps when it becomes one of another class."""


class Replacement(Effect):
    """`ReplaceOptimizer`: the program's own object becomes one of the other class, with its hyperparameters and empty
    state. It keeps its learning rate, its counter, and what it does to gradients.
    """

    def __init__(self, change: _changes.ReplaceOptimizer, site: Site, back: ExitStack) -> None:
        optimizer = site.optimizer
        before, cls = dict(vars(optimizer)), type(optimizer)
        fresh = _made(change, optimizer.name)
        slots = slots_of(optimizer)
        put_back = partial(_restore, site, cls, before, slots, fresh)
        _wear(optimizer, type(fresh), _options(fresh), slots)
        back.callback(put_back)
        rebuild(optimizer, optimizer._trainable_variables, site.outer)
        self.detail = f"{type(fresh).__name__} in place of {cls.__name__}"
        self.left = f"{cls.__name__} goes on with the state that it had before {type(fresh).__name__} took over."


def _made(change: _changes.ReplaceOptimizer, name: str) -> Any:
    cls: Any = getattr(keras.optimizers, _OPTIMIZERS.get(change.optimizer, change.optimizer), None)
    if not (isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer)) or cls.__name__ in _NO_PLACE:
        raise CannotApply(f"keras.optimizers has no {change.optimizer} that could step in its place.")
    constructor: Callable[..., Any] = cls
    given = {_ATTRIBUTES.get(key, key): value for key, value in change.hyperparameters if key != "lr"}
    try:
        return constructor(learning_rate=1.0, name=name, **given)
    except (TypeError, ValueError) as error:
        raise CannotApply(f"{cls.__name__} cannot take over: {error}.") from None


_NO_PLACE = ("Optimizer", "LossScaleOptimizer")


def _options(optimizer: Any) -> dict[str, Any]:
    return {key: v for key, v in vars(optimizer).items() if key not in _KEPT and not key.startswith("_self_")}


def _wear(optimizer: Any, cls: type, options: Mapping[str, Any], gone: Sequence[Any]) -> None:
    """Become one of a class, without the variables in `gone`."""
    for slot in gone:
        optimizer._untrack_variable(slot)
    optimizer.__class__ = cls
    vars(optimizer).update(options)


def _restore(site: Site, cls: type, before: Mapping[str, Any], slots: Sequence[Any], fresh: Any) -> None:
    optimizer = site.optimizer
    own = {key: v for key, v in before.items() if key not in _KEPT and not _is_override(key)}
    for key in _options(fresh).keys() - own.keys():
        vars(optimizer).pop(key, None)
    _wear(optimizer, cls, own, slots_of(optimizer))
    for slot in slots:
        optimizer._track_variable(slot)
    if not before["built"] and optimizer.built:
        optimizer.built = True
        rebuild(optimizer, optimizer._trainable_variables, site.outer)


def _is_override(key: str) -> bool:
    return key in ("_backend_apply_gradients", "_clip_gradients", "_get_current_learning_rate")
