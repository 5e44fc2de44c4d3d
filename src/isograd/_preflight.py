"""Diagnose a model before its first step: predict from its structure, rehearse one step on a copy, apply the rules.

What is rehearsed is recorded in memory as a run is, so that the same rules read the same statistics. Of a structure
alone, the predictions stand where readings would.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from isograd._diagnose import Diagnosis
from isograd._diagnose import diagnose as diagnose_histories
from isograd._errors import ScriptError
from isograd._forecast import Preflight, Weight, measured_layers, start_of
from isograd._history import History, Layer, Series
from isograd._mean_field import LARGE, LayerPrediction, Moments, Prediction, walk
from isograd._record import RunFile
from isograd._rule import Options
from isograd._watch import Shield

_ARTIFICIAL = (
    "loss",
    "loss_nonfinite",
    "learning_rate",
    "update_norm",
    "update_ratio",
    "step_seconds",
    "watch_seconds",
)
"""Statistics of a rehearsed step that say nothing of the user's program, where it has no loss or no optimizer."""


def preflight(
    model: Any,
    loss_fn: Callable[..., Any] | None = None,
    batch: Any = None,
    optimizer: Any = None,
    *,
    sharpness: bool = True,
) -> Diagnosis:
    """Diagnose a model before its first step. Weights, buffers, gradients and random generators stay as they are.

    Of the model alone, signals are predicted from its structure and weights. With a `batch`, one step is rehearsed on a
    copy: `batch` is the input, or (input, target), or (input, input, ..., target), or a mapping of keyword inputs, as a
    loader yields it. `loss_fn(output, target)` returns the loss; models that return their own `.loss` need none.
    `optimizer` is copied, too, and steps on the copy. `sharpness` measures the curvature of the loss with up to 24
    Hessian-vector products, each of about one training step.

    The facts are in `Diagnosis.preflight`. Raises ValueError, in one sentence, for what does not fit together.
    """
    from isograd._settings import load_settings

    settings = load_settings()
    if not settings.enabled:
        return diagnose_histories(())
    from isograd.frameworks.torch import Rehearsal, preserved_generators, rehearsing, require_model, structure_of

    require_model(model, optimizer)
    with preserved_generators(), rehearsing():
        rehearsal = Rehearsal.of(model, optimizer, loss_fn, batch)
        structure = structure_of(rehearsal.model, rehearsal.inputs)
        moments = rehearsal.input_moments()
        start = None if moments is None else Moments(*moments)
        prediction = walk(structure.stages, start=start, batch=rehearsal.samples or LARGE, how=structure.how)
        facts = Preflight(prediction=prediction, recurrences=tuple(rehearsal.recurrences()))
        if batch is None:
            predicted = predicted_history(prediction, rehearsal.weights())
            facts = replace(facts, notes=("Nothing was run: there was no batch.",))
            return _diagnosed([] if predicted is None else [predicted], facts, settings.rules)
        histories, facts = _rehearsed(rehearsal, facts, sharpness=sharpness)
    return _diagnosed(histories, facts, settings.rules)


def _diagnosed(histories: list[History], facts: Preflight, options: Options) -> Diagnosis:
    return replace(diagnose_histories(histories, options=options), preflight=facts)


# ---- one batch --------------------------------------------------------------------------------------------------


def _rehearsed(rehearsal: Any, facts: Preflight, *, sharpness: bool) -> tuple[list[History], Preflight]:
    """The history that rules are to read, and the facts with what was measured."""
    notes: list[str] = []
    # Curvature first: the step that is watched with the optimizer moves the copy's weights.
    curvature = rehearsal.bend() if sharpness and rehearsal.has_loss else None
    if isinstance(curvature, str):
        notes.append(curvature)
        curvature = None
    signal = _recorded(rehearsal.watch_signal, notes)
    loss = _recorded(rehearsal.watch_loss, notes) if rehearsal.has_loss else None
    facts = replace(
        facts,
        layers=measured_layers(signal, loss),
        curvature=curvature,
        start=start_of(loss) if loss is not None else None,
        notes=tuple(notes),
    )
    if loss is None:
        return [_without(signal, _ARTIFICIAL, "there was no loss function")] if signal is not None else [], facts
    if rehearsal.optimizer is None:
        loss = _without(loss, _ARTIFICIAL[2:], "there was no optimizer")
    return [loss], facts


def _recorded(step: Callable[[RunFile, Shield], None], notes: list[str]) -> History | None:
    """What one watched step recorded, in memory."""
    file = RunFile.create(Path(), meta={}, on_failure=notes.append, in_memory=True)
    try:
        step(file, Shield(notes.append))
        histories = file.read().histories
    finally:
        file.close()
    return histories[0] if histories else None


def _without(history: History, statistics: tuple[str, ...], why: str) -> History:
    """The history as if these statistics could not be read, and no parameter group were known."""
    return replace(
        history,
        series={name: series for name, series in history.series.items() if name not in statistics},
        unmeasured={**history.unmeasured, **dict.fromkeys(statistics, why)},
        groups=(),
    )


# ---- structure alone --------------------------------------------------------------------------------------------


def predicted_history(prediction: Prediction, weights: Sequence[Weight]) -> History | None:
    """Predictions where readings at step 0 would stand; None where the structure is not understood to the input.

    The gradient of a weight matrix is that of one sample, the norm at its layer's output times that of its input.
    """
    if prediction.unknown or not prediction.reaches_input:
        return None
    owners = {weight.layer.name: weight.layer for weight in weights}
    layers = tuple(
        replace(owners.get(found.name, Layer(name=found.name)), kind=found.kind, position=float(position))
        for position, found in enumerate(prediction.layers)
    )
    by_name = {found.name: found for found in prediction.layers}
    rows = {
        "weight_norm": [weight.norm for weight in weights],
        "grad_norm": [_gradient_norm(weight, by_name.get(weight.layer.name)) for weight in weights],
        "output_rms": [found.output_rms for found in prediction.layers],
        "signal_norm": [found.signal for found in prediction.layers],
        "activation_slope": [found.slope for found in prediction.layers],
    }
    return History(
        layers=layers,
        parameters=tuple(weight.parameter for weight in weights),
        series={name: Series([0], np.array([values], dtype=np.float64)) for name, values in rows.items()},
        unmeasured=dict.fromkeys(("loss", "update_ratio", "grad_max"), "nothing was run"),
    )


def _gradient_norm(weight: Weight, found: LayerPrediction | None) -> float:
    if found is None:
        return math.nan
    is_matrix = len(weight.parameter.shape) > 1
    return found.signal * (found.input_rms * math.sqrt(weight.layer.fan_in) if is_matrix else 1.0)


# ---- what `isograd preflight` is pointed at ---------------------------------------------------------------------


def preflight_target(target: str, *, shape: str | None = None, sharpness: bool = True) -> Diagnosis:
    """The preflight of what the callable `target` returns: model, or (model, batch, loss_fn, optimizer) or a beginning.

    `target`: `module:callable`, or `path/to/file.py:callable`. `shape` of a random batch, as `64x1x28x28`. Raises
    ScriptError or ValueError, in one sentence.
    """
    from isograd.frameworks.torch import random_batch

    model, batch, loss_fn, optimizer = _returned(target)
    if shape is not None:
        if batch is not None:
            raise ValueError(f"{target} returns a batch of its own: leave out the shape of a random one")
        batch = random_batch(model, sizes_of(shape))
    return preflight(model, loss_fn, batch, optimizer, sharpness=sharpness)


def sizes_of(shape: str) -> tuple[int, ...]:
    """`64x1x28x28` or `64,1,28,28` as numbers. Raises ValueError for anything else."""
    parts = re.split(r"[x,]", shape.strip().strip("()[] "))
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{shape!r} is no shape: write sizes above 0 as in 64x1x28x28, the batch first")
    return tuple(int(part) for part in parts)


def _returned(target: str) -> tuple[Any, Any, Any, Any]:
    """(model, batch, loss function, optimizer) from the callable, None for what it does not return."""
    from isograd.frameworks.torch import require_model

    try:
        value = named_callable(target)()
    except ScriptError:
        raise
    except (Exception, SystemExit) as error:
        raise ScriptError(f"{target} raised {_said(error)}; it is called without arguments.") from error
    several = value if isinstance(value, tuple) else (value,)
    if len(several) > 4:
        raise ScriptError(
            f"{target} returned {len(several)} things: return (model, batch, loss_fn, optimizer) or fewer."
        )
    model, batch, loss_fn, optimizer = (*several, None, None, None)[:4]
    try:
        require_model(model, optimizer)
    except ValueError:
        raise ScriptError(f"{target} returned {type(model).__name__} where a model was expected.") from None
    return model, batch, loss_fn, optimizer


def named_callable(target: str) -> Callable[[], Any]:
    """What `module:callable` or `file.py:callable` names. Raises ScriptError, in one sentence."""
    source, colon, name = target.rpartition(":")
    if not (colon and source and name):
        raise ScriptError(f"{target!r} names no callable: write module:callable, or file.py:callable.")
    found = _imported(source)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ScriptError(
            f"{source} has {'no' if found is None else 'a'} {name}{'' if found is None else ' that cannot be called'}."
        )
    return found  # type: ignore[no-any-return]


def _imported(source: str) -> Any:
    """The module, by name from the current folder as `python -m` finds it, or by the path of its file."""
    path = Path(source)
    is_file = source.endswith(".py")
    if is_file and not path.is_file():
        raise ScriptError(f"There is no file {source}.")
    sys.path.insert(0, str(path.parent.resolve() if is_file else Path.cwd()))
    try:
        return importlib.import_module(path.stem if is_file else source)
    except ModuleNotFoundError as error:
        if error.name is not None and source.startswith(error.name):
            raise ScriptError(f"There is no module {source}.") from None
        raise ScriptError(f"Importing {source} raised {_said(error)}.") from error
    except (Exception, SystemExit) as error:
        raise ScriptError(f"Importing {source} raised {_said(error)}.") from error


def _said(error: BaseException) -> str:
    """`ValueError: what it says`, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".: ")
