"""A captured step once more, in this process: is it the same, what broke first in it, who contributed.

The step runs twice, to see how far the machine repeats itself, then under the microscope, and where everything is
finite once more to tell rows apart. Afterwards the program stands as it stood before, generators included.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isograd._capsule import Capsule, open_capsule
from isograd._grade import Taken, graded
from isograd._replay import Replay
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._capture import versions
from isograd.frameworks.torch._contributions import RowShares, layer_shares
from isograd.frameworks.torch._fingerprint import fingerprint
from isograd.frameworks.torch._microscope import Microscope
from isograd.frameworks.torch._named_state import Names, names_of
from isograd.frameworks.torch._restoration import DoesNotMatch, Restoration, settings_of, tensors_in
from isograd.frameworks.torch._training_state import TrainingState

StepFunction = Callable[[Any], Any]


def replay(
    capsule: Capsule,
    step_fn: StepFunction,
    *,
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: Optimizer | None = None,
) -> Replay:
    """Run a captured step again: `loss = step_fn(batch)` with the model, the batch and the generators as they were.

    `batch`: what the data loader gave, and for several micro-batches one call each; in a program without a loader a
    dict of its own data by the names of its variables. `step_fn` computes the loss and may run the backward pass
    and the optimizer's step; where it has not run the backward pass, that is done here, with the loss scale and the
    clipping of the run. `model`: the one that made the capsule, in any state; several by name in a mapping.

    Model, optimizer, gradients, modes, settings and generators are afterwards as they were. Raises CapsuleUnreadable,
    DoesNotMatch for another model, ValueError where `step_fn` returns no loss, and whatever it raises.
    """
    began = time.perf_counter()
    capsule = open_capsule(capsule.path)
    step = _Step(Restoration(capsule), model, optimizer)
    with step.kept(), taps.silenced(), settings_of(capsule.facts):
        first, second = step.take(step_fn), step.take(step_fn)
        told = step.explain(step_fn, first)
    return graded(
        capsule,
        first,
        second,
        hints(capsule.facts),
        first_bad=told.first_bad,
        layers=told.layers,
        rows=told.rows,
        notes=tuple(told.notes),
        seconds=time.perf_counter() - began,
    )


@dataclass(kw_only=True)
class Explanation:
    """What the microscope and the shares have told of a step."""

    first_bad: Any = None
    layers: tuple[Any, ...] = ()
    rows: tuple[Any, ...] = ()
    notes: list[str] = field(default_factory=list)


def explained(taken: Taken, microscope: Microscope | None, bad: Any, facts: Mapping[str, Any]) -> Explanation:
    """What is said of a step from what was looked at; `bad`: what the microscope found, if there was one."""
    told = Explanation(notes=remarks(facts), first_bad=bad)
    is_finite = all(map(math.isfinite, [*taken.losses, *taken.grad_norms.values()]))
    if microscope is not None and bad is None and is_finite:
        told.first_bad = microscope.largest()
    elif microscope is not None and bad is None:
        told.notes.append(
            f"No operation was seen to make a non-finite value, of {microscope.operations} that were looked at: "
            "compiled regions and operations of other libraries are not measured."
        )
    if is_finite:
        told.layers = layer_shares(taken.grad_norms, usual_norms(facts))
    return told


class _Step:
    """A program and the captured step that it is to take."""

    def __init__(
        self, restoration: Restoration, model: nn.Module | Mapping[str, nn.Module], optimizer: Optimizer | None
    ) -> None:
        self.state, self._optimizer = restoration, optimizer
        self._roots = restoration.roots_of(model)
        self._names = names_of(self._roots, optimizer)
        why = restoration.mismatch(self._names)
        if why:
            raise DoesNotMatch(why)
        self._notes: list[str] = []

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within it the program may change; afterwards it is as it was."""
        parameters = list(self._names.parameters.values())
        modes = [(m, m.training) for root in self._roots.values() for m in root.modules()]
        gradients = [(p, p.grad, p.requires_grad) for p in parameters]
        program = TrainingState([*self._roots.values()], [] if self._optimizer is None else [self._optimizer])
        before = program.capture()
        try:
            yield
        finally:
            program.restore(before, generators=True)
            for module, training in modes:
                module.training = training
            for parameter, gradient, requires_grad in gradients:
                parameter.grad = gradient
                if parameter.is_leaf:
                    parameter.requires_grad_(requires_grad)

    def take(self, step_fn: StepFunction, within: contextlib.AbstractContextManager[Any] | None = None) -> Taken:
        """The captured step, from the captured state."""
        self.state.put_model(self._names)
        if self._optimizer is not None:
            note = self.state.put_optimizer(self._optimizer, self._names)
            self._notes += [note] if note and note not in self._notes else []
        for parameter in self._names.parameters.values():
            parameter.grad = None
        heard = Hearing(self._names, scale=self.state.loss_scale())
        batches = self.state.batches() or [None]
        with heard.listening(), self.state.calls_followed(self._roots), within or contextlib.nullcontext():
            for index, batch in enumerate(batches):
                self.state.put_generators(index)
                heard.ran(step_fn(batch))
            if not heard.has_stepped:
                heard.finish_gradients(self.state.facts)
        return heard.taken()

    def explain(self, step_fn: StepFunction, first: Taken) -> Explanation:
        num_rows = self.state.num_rows()
        batches = self.state.batches()
        microscope = Microscope(self.state.prefixed(self._roots), num_rows=num_rows)
        looked = _Looking(microscope, self._names)
        self.take(_given_to(microscope, step_fn), looked)
        told = explained(first, microscope, looked.found, self.state.facts)
        told.notes += self._notes
        if told.layers and num_rows and batches:
            shares = RowShares(self._roots, num_rows, scale=self.state.loss_scale())
            self.take(step_fn, shares.listening())
            told.rows = shares.shares()
        return told


def _given_to(microscope: Microscope, step_fn: StepFunction) -> StepFunction:
    """`step_fn`, with the microscope told first what the batch is."""

    def step(batch: Any) -> Any:
        microscope.give(tensors_in(batch))
        return step_fn(batch)

    return step


class _Looking(contextlib.AbstractContextManager["_Looking"]):
    """A microscope over a step; at the end, or when an optimizer steps, it is asked what broke."""

    def __init__(self, microscope: Microscope, names: Names) -> None:
        self._microscope, self._names = microscope, names
        self._losses = LossesHeard(self._ask)
        self.found: Any = None

    def __enter__(self) -> _Looking:
        taps.subscribe(self._losses)
        self._microscope.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._microscope.__exit__(*error)
        taps.unsubscribe(self._losses)
        self._ask()

    def _ask(self) -> None:
        gradients = [p.grad for p in self._names.parameters.values() if p.grad is not None]
        for loss in [*self._losses.tensors, None]:
            self.found = self.found or self._microscope.explain(loss, gradients)


# ---- what a step gives ----------------------------------------------------------------------------------------------


class LossesHeard:
    """Hears of backward passes that fill gradients, and of the step that follows. `before_step` is called there."""

    def __init__(self, before_step: Callable[[], None]) -> None:
        self.tensors: list[Tensor] = []
        self._before = before_step

    def before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """A backward pass for given inputs fills no gradients of parameters."""
        if inputs is None and torch._C._current_graph_task_id() == -1:
            self.tensors += [tensor for tensor in tensors if tensor.numel() == 1]

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """Gradients are there, unless a closure computes them inside the step."""
        if not closure:
            self._before()

    def _ignore(self, *_: Any) -> None:
        return None

    made_optimizer = after_backward = after_step = clipped = before_scaled_step = after_scaled_step = _ignore
    packs_saved_tensors = _ignore


class Hearing:
    """What a step gives: losses of its backward passes, gradients as the optimizer's step finds them, the update.

    `scale`: that of the captured run's loss, 1 where it had none.
    """

    def __init__(self, names: Names, *, scale: float = 1.0) -> None:
        self.has_stepped = False
        self._names, self._scale = names, scale
        self._heard = LossesHeard(self._read)
        self._returned: list[Tensor] = []
        self._losses: tuple[float, ...] = ()
        self._prints: dict[str, tuple[float, str]] | None = None
        self._before: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, everything is heard."""
        taps.subscribe(self._heard)
        try:
            yield
        finally:
            taps.unsubscribe(self._heard)

    def ran(self, returned: Any) -> None:
        """`step_fn` has run: it has returned the loss. Without gradients by now, the backward pass is run."""
        loss = _loss_in(returned)
        if self._heard.tensors or self.has_stepped:
            return
        if loss is None:
            raise ValueError(
                f"step_fn has to return the loss, a tensor with one value, or run the backward pass; it returned "
                f"{type(returned).__name__}."
            )
        self._returned.append(loss)
        if loss.requires_grad:
            torch.autograd.backward(loss * self._scale if self._scale != 1 else loss)
        self._heard.tensors.clear()  # that was ours: the next call is asked again

    def finish_gradients(self, facts: Mapping[str, Any]) -> None:
        """What the program did with its gradients, where the backward pass was ours: unscaling, clipping."""
        if self._returned:
            parameters = [p for p in self._names.parameters.values() if p.grad is not None]
            if self._scale != 1:
                inverse = torch.tensor(self._scale, dtype=torch.float64).reciprocal().float()
                for parameter in parameters:
                    parameter.grad.mul_(inverse)  # type: ignore[union-attr]
            for clip in facts["clips"][:1]:
                _clip(parameters, clip)
        self._read()

    def _read(self) -> None:
        if not self.has_stepped:
            self.read(self._returned or self._heard.tensors)

    def read(self, losses: Sequence[Tensor]) -> None:
        """Note losses, gradients and parameters as they are now."""
        self.has_stepped = True
        with torch.no_grad():
            self._losses = tuple(float(loss.detach()) for loss in losses)
            self._prints = {n: fingerprint(p.grad) for n, p in self._names.parameters.items() if p.grad is not None}
            self._before = {n: p.detach().clone() for n, p in self._names.parameters.items()}

    def taken(self) -> Taken:
        """All of it. The update is that since the gradients were read."""
        prints = self._prints or {}
        scaled = self._losses if self._returned else tuple(loss / self._scale for loss in self._losses)
        moved = [
            (p.detach() - self._before[n]).double() for n, p in self._names.parameters.items() if n in self._before
        ]
        update = math.sqrt(sum(float(one.square().sum()) for one in moved)) if moved else math.nan
        return Taken(
            losses=scaled,
            grad_norms={name: norm for name, (norm, _) in prints.items()},
            grad_hashes={name: digest for name, (_, digest) in prints.items()},
            update_norm=update,
            finite_after=all(bool(torch.isfinite(p).all()) for p in self._names.parameters.values()),
        )


def _loss_in(returned: Any) -> Tensor | None:
    """The loss, alone or first among several."""
    if isinstance(returned, (tuple, list)) and returned:
        returned = returned[0]
    elif isinstance(returned, Mapping):
        returned = returned.get("loss")
    elif not isinstance(returned, Tensor):
        returned = getattr(returned, "loss", None)
    return returned if isinstance(returned, Tensor) and returned.numel() == 1 else None


def _clip(parameters: list[Tensor], clip: Any) -> None:
    with contextlib.suppress(KeyError, TypeError, ValueError):
        torch.nn.utils.clip_grad_norm_(parameters, float(clip["limit"]))


# ---- words ----------------------------------------------------------------------------------------------------------


def hints(facts: Mapping[str, Any]) -> Iterator[str]:
    """Why a replay may be another step than the captured one, the likeliest first."""
    if facts["modified"]:
        yield "The program changed the batch in place after it was noted: the model saw other values."
    if facts["left_out"]:
        yield f"The capsule lacks {facts['left_out'][0]}."
    was, now = facts["versions"], versions()
    for name in ("torch", "cuda", "numpy"):
        if was.get(name) != now.get(name):
            yield f"The run had {name} {was.get(name)}, this is {now.get(name)}."
    autocast = next((call.get("autocast") for call in facts["calls"] if call.get("autocast")), None)
    if autocast:
        kinds = ", ".join(f"{device}: {dtype}" for device, dtype in autocast.items())
        yield f"The run computed under autocast ({kinds}): so must the step."
    unsure = [name for name, one in facts["buffers"].items() if not one.get("before", True)]
    if unsure and not all(module.get("training", True) for module in facts["modules"].values()):
        yield f"The buffer {unsure[0]} is as it was after the forward pass, not before."
    if not facts["batches"] and not facts["calls"]:
        yield "The capsule holds no batch: no data loader or call of the model was seen."
    yield "The program that was named computes something else, or draws data of its own."


def remarks(facts: Mapping[str, Any]) -> list[str]:
    """What a reader should know whatever came out."""
    return [f"Not in the capsule: {what}." for what in facts["left_out"]]


def usual_norms(facts: Mapping[str, Any]) -> dict[str, float]:
    """The median gradient norm by parameter in the steps before, as far as the capsule's statistics tell."""
    table = facts["statistics"].get("grad_norm") if isinstance(facts["statistics"], dict) else None
    if not isinstance(table, dict):
        return {}
    return {name: _median(values) for name, values in table.items() if isinstance(values, list)}


def _median(values: Sequence[Any]) -> float:
    finite = sorted(float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v))
    return finite[len(finite) // 2] if finite else math.nan
