"""Follow a training program step by step: whose step it is, what is read when, and where it goes.

The observer hears of backward passes and optimizer steps (`_taps.py`), puts output hooks on layers before deep steps
(`_calls.py`), reads the loss's autograd graph at deep steps (`_trace.py`) and parameters around each step
(`_parameters.py`). It draws no conclusions, and changes nothing.

A *step* ends when an optimizer has stepped. Optimizers that step without a backward pass between them belong to one
subject; which ones do is known when the next backward pass begins.
"""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from isograd._history import Event
from isograd._schedule import Schedule
from isograd._statistics import STATISTICS
from isograd.frameworks import Recorder, Shield
from isograd.frameworks.torch import _calls as calls
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch import _ranks as ranks
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch import _trace as trace
from isograd.frameworks.torch._calls import Call
from isograd.frameworks.torch._parameters import ParameterReading
from isograd.frameworks.torch._row import Queue, Row
from isograd.frameworks.torch._subject import Subject

_LAYER_STATISTICS = tuple(s.name for s in STATISTICS.values() if s.axis == "layer")
_MODULE_STATISTICS = tuple(
    name for name in _LAYER_STATISTICS if not name.startswith(("attention", "row_sum", "column", "output_std"))
)
_COMPILED = "the model is compiled: no values can be read inside"


@dataclass
class Boundary:
    """Readings of something that is no module: an operation, an input, a prediction or a target."""

    owner: nn.Module | None
    name: str
    kind: str
    role: str
    type: str
    shape: tuple[int, ...]
    call: Call
    source: Call | None = None
    """The call that an input entered."""


@dataclass
class Window:
    """What was read since the previous step ended. Holds scalars only, no batch and no activation."""

    losses: list[Tensor] = field(default_factory=list)
    clips: list[tuple[Tensor, float]] = field(default_factory=list)
    modules: weakref.WeakKeyDictionary[nn.Module, list[Call]] = field(default_factory=weakref.WeakKeyDictionary)
    boundaries: list[Boundary] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    loss_scale: Tensor | None = None
    compiled: bool = False
    graph_read: bool = False
    constant_outputs: set[int] = field(default_factory=set)
    forwarded: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    handles: list[RemovableHandle] = field(default_factory=list)
    last_kind: str = ""
    carried: dict[int, list[Tensor]] = field(default_factory=dict)
    """Per optimizer (by id) the norm of the gradients that stood there when each of the first passes began."""

    def absorb(self, later: Window) -> None:
        """Add what was read in a window that belongs to the same step."""
        self.losses += later.losses
        self.clips += later.clips
        self.boundaries += later.boundaries
        self.events += later.events
        self.carried |= {key: norms for key, norms in later.carried.items() if key not in self.carried}
        for module, found in later.modules.items():
            self.modules.setdefault(module, []).extend(found)
        self.loss_scale = later.loss_scale if self.loss_scale is None else self.loss_scale
        self.compiled |= later.compiled

    def release(self) -> None:
        """Take hooks off tensors that outlive the step."""
        for handle in self.handles:
            handle.remove()


@dataclass
class Pending:
    """One optimizer's finished step that has not been written yet."""

    optimizer: Optimizer
    reading: ParameterReading
    window: Window
    deep: bool
    skipped: bool
    seconds: float
    watch_seconds: float


class Observer:
    """Watches one process. `models`, `optimizers`: only these; both empty: everything that trains.

    `make_schedule` gives each subject its own deep schedule. `on_step(subject, step, readings)` is called after each
    step with loss and gradient norm; `between` outside of the shield, where it may end the program. Nothing else raises
    into the user's program: every entry runs inside `shield`.
    """

    def __init__(
        self,
        recorder: Recorder,
        shield: Shield,
        *,
        models: Sequence[nn.Module] = (),
        optimizers: Sequence[Optimizer] = (),
        make_schedule: Callable[[], Schedule] = Schedule,
        on_step: Callable[[str, int, dict[str, float]], None] | None = None,
        between: Callable[[], None] | None = None,
    ) -> None:
        self._recorder, self._shield, self._make_schedule, self._on_step = recorder, shield, make_schedule, on_step
        self._between = between
        self.deep_step: int | None = None
        self._seen_optimizers: weakref.WeakKeyDictionary[Optimizer, None] = weakref.WeakKeyDictionary()
        self._only = [weakref.ref(optimizer) for optimizer in optimizers]
        self._models = [weakref.ref(model) for model in models]
        self._subjects: list[Subject] = []
        self._schedules: dict[str, Schedule] = {}
        self._roots: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._places: weakref.WeakKeyDictionary[nn.Module, trace.Place] = weakref.WeakKeyDictionary()
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._loose: dict[int, str] = {}
        self._hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
        self._window, self._queue = Window(), Queue()
        self._ranks: ranks.Ranks | None = None
        self._pending: list[Pending] = []
        self._stepping: tuple[Optimizer, ParameterReading] | None = None
        self._backward_depth = 0
        self._foreign_backward = False
        self._backwards = 0
        self._packs_saved = False
        self._trained: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._heads: dict[str, Any] = {}
        self._unheld: tuple[frozenset[int], list[str]] = frozenset(), []
        self._marks = (time.perf_counter(), shield.seconds)
        self._unmeasured: set[tuple[str, str]] = set()
        self._read: set[str] = set()  # subjects of which a module was read

    # ---- life ---------------------------------------------------------------------------------------------------

    def attach(
        self, models: Sequence[nn.Module] = (), optimizers: Sequence[Optimizer] = (), frame: FrameType | None = None
    ) -> None:
        """Begin to listen. `frame`: where the models' names are looked up."""
        for model in models:
            self._adopt_root(model, describe.variable_name(model, frame) or type(model).__name__.lower())
        for optimizer in optimizers:
            self._seen_optimizers[optimizer] = None
            self._discover(optimizer, frame)
        taps.subscribe(self)

    def detach(self, error: BaseException | None = None) -> None:
        """Write what is pending, put everything back and stop listening; idempotent.

        `error`: what ended the program in the middle of a step, of which what was read is kept.
        """
        taps.unsubscribe(self)
        if error is not None:
            self._shield.call(self._keep_unfinished, error)
        self._shield.call(self._finish)
        self._unhook_layers()

    def _keep_unfinished(self, error: BaseException) -> None:
        """The step that an exception cut short: what had been read of it, before any weight changed."""
        self._settle()
        if not self._window.losses and not self._packs_saved:
            self._find_bad_loss(error)
        optimizer = next((o for o in self._seen_optimizers if self._is_ours(o)), None)
        if optimizer is None or not (self._window.losses or self._window.modules):
            return
        with torch.no_grad():
            reading = ParameterReading(optimizer)
            deep = self._is_deep(optimizer)
            if self._backwards:
                reading.read_gradients(deep)
            if deep:
                reading.read_weights()
            self._window.events.append(("unfinished-step", {}))
            self._end_step(optimizer, reading, skipped=False)

    def _find_bad_loss(self, error: BaseException) -> None:
        """A program that checks its loss itself never calls `backward` on it: it is still in the frame that raised."""
        for tensor in describe.locals_of(error):
            value = tensor.detach()
            if tensor.grad_fn is not None and value.numel() == 1 and not torch.isfinite(value):
                self._window.losses.append(value.reshape(()).float())
                self._locate([tensor])
                return

    def release(self) -> None:
        """Stop listening at once without writing, after a failure."""
        taps.unsubscribe(self)
        self._unhook_layers()
        self._window.release()
        self._window, self._pending = Window(), []

    def drain(self) -> None:
        """Write what has been read so far, waiting for what is under way."""
        self._queue.drain(everything=True)

    def _finish(self) -> None:
        self._settle()
        self._queue.drain(everything=True)

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects seen so far."""
        return [subject.name for subject in self._subjects]

    # ---- discovery ------------------------------------------------------------------------------------------------

    def made_optimizer(self, optimizer: Optimizer) -> None:
        """A new optimizer: find the models that it trains, so that their first forward pass is seen."""
        self._shield.call(self._note_optimizer, optimizer, _caller())

    def _note_optimizer(self, optimizer: Optimizer, frame: FrameType) -> None:
        self._seen_optimizers[optimizer] = None
        if not self._only and not self._models:
            self._discover(optimizer, frame)

    def _discover(self, optimizer: Optimizer, frame: FrameType | None = None) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor)]
        unknown = [p for p in parameters if not self._is_known(p)]
        if not unknown:
            return
        for root in describe.roots_holding(unknown):
            self._adopt_root(root, describe.variable_name(root, frame) or type(root).__name__.lower())
        for parameter in unknown:
            if not self._is_known(parameter):
                self._loose[id(parameter)] = describe.variable_name(parameter, frame) or ""
                self._known[id(parameter)] = weakref.ref(parameter)

    def _is_known(self, parameter: Tensor) -> bool:
        ref = self._known.get(id(parameter))
        return ref is not None and ref() is parameter

    def _adopt_root(self, root: nn.Module, name: str) -> None:
        self._roots[root] = name
        fresh = []
        for path, module in describe.walk(root):
            for parameter in module.parameters(recurse=False):
                self._known[id(parameter)] = weakref.ref(parameter)
            if module not in self._places:
                self._places[module] = trace.Place(
                    path or name, describe.kind_of(module), weakref.ref(module), weakref.ref(root)
                )
                fresh.append(module)
        self._hook_layers(fresh)

    # ---- layers ---------------------------------------------------------------------------------------------------

    def _hook_layers(self, modules: Iterable[nn.Module]) -> None:
        compiled = {id(m) for root in self._roots for m in _compiled_regions(root)}
        for module in list(modules):
            if module not in self._hooks and id(module) not in compiled and calls.hookable(module):
                hook = calls.OutputHook(self._shield, self._read_output, self._places[module])
                self._hooks[module] = module.register_forward_hook(hook)

    def _unhook_layers(self) -> None:
        for handle in list(self._hooks.values()):
            handle.remove()
        self._hooks.clear()

    def _read_output(self, place: trace.Place, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled() or self._is_evaluation(place):
            return
        out = calls.first_tensor(output)
        seen = self._window.modules.get(module)
        if out is None or (seen is not None and len(seen) >= calls.CALLS):
            return
        if not self._backward_depth:
            self._window.forwarded.add(module)
        elif module in self._window.forwarded:
            return  # checkpointing runs it again: it has been read
        with torch.no_grad():
            call = self._measure(place, module, args, out)
        self._window.modules.setdefault(module, []).append(call)
        if out.requires_grad:
            node: Any = out.grad_fn
            if node is not None:
                node.metadata[trace.PLACE] = place
            hooks: Any = out
            handle = hooks.register_hook(partial(self._shield.call, self._take_signal, call))
            if node is None:  # a tensor of the user's that outlives the step
                self._window.handles.append(handle)
        else:
            self._window.constant_outputs.add(_memory(out))

    def _take_signal(self, call: Call, gradient: Any) -> None:
        """A gradient of the loss has come back to a call; one of a gradient penalty or an attack is none."""
        if not self._foreign_backward:
            with torch.no_grad():
                call.take_signal(gradient[0] if isinstance(gradient, tuple) else gradient)

    def _is_evaluation(self, place: trace.Place) -> bool:
        """A pass in evaluation mode of a model that was seen in training mode is not part of a step."""
        root = place.root() if place.root is not None else None
        if root is None:
            return False
        if root.training:
            self._trained.add(root)
        return not root.training and root in self._trained

    def _measure(self, place: trace.Place, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Call:
        call = calls.read_values(out, rows=place.kind in ("linear", "softmax", "log-softmax"))
        inputs = calls.tensors_in(args)
        if place.kind == "embedding" and inputs:
            calls.read_padding(call, inputs[0], getattr(module, "padding_idx", None))
        if "nonfinite" in call.readings:
            call.readings["inputs"] = _nonfinite_inputs(inputs)
        if place.kind in describe.ACTIVATIONS:
            x = inputs[0] if inputs and inputs[0] is not out and inputs[0].shape == out.shape else None
            axis, constants = calls.unit_axis(out, self._window.last_kind), describe.activation_parameters(module)
            calls.read_activation(call, place.kind, out, x, axis, constants)
        elif place.kind in ("linear", "conv"):
            self._window.last_kind = place.kind
        for index, tensor in enumerate(inputs):
            if calls.is_data(tensor) and tensor.dim() and not self._is_own_output(tensor):
                self._note_input(module, index, tensor, call)
        call.shape = tuple(out.shape)
        return call

    def _note_input(self, module: nn.Module, index: int, tensor: Tensor, call: Call) -> None:
        name = f"input.{index}" if index else "input"
        dtype = str(tensor.dtype).removeprefix("torch.")
        reading = calls.read_values(tensor, boundary=True)
        shape = tuple(tensor.shape)
        self._window.boundaries.append(Boundary(module, name, "input", "input", dtype, shape, reading, source=call))

    def _is_own_output(self, tensor: Tensor) -> bool:
        """Whether the data is what a frozen layer of this step returned, not what came from outside."""
        return _memory(tensor) in self._window.constant_outputs

    # ---- backward -------------------------------------------------------------------------------------------------

    def before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """A backward pass is about to consume the graph."""
        self._shield.call(self._before_backward, tensors, inputs)
        if self._between is not None:
            self._between()

    def _before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        self._backward_depth += 1
        if self._backward_depth > 1:
            return
        self._foreign_backward = inputs is not None and not any(self._is_known(i) for i in inputs)
        if self._foreign_backward:
            return
        if self._stepping is not None and self._stepping[1].has_gradients:
            self._stepping = None  # that step has raised: only one with a closure runs a backward pass
        if self._stepping is None:
            self._settle()
        self._backwards += 1
        with torch.no_grad():
            self._note_carried()
            self._take_loss(tensors)

    def _note_carried(self) -> None:
        """What the gradients hold before this pass adds to them. Two passes are looked at: some loops clear an
        optimizer's gradients only after another one's pass.
        """
        if self._backwards > 2:
            return
        for optimizer in list(self._seen_optimizers):
            if self._is_ours(optimizer) and self._is_deep(optimizer):
                self._window.carried.setdefault(id(optimizer), []).append(carried_norm(optimizer))

    def _take_loss(self, tensors: Sequence[Tensor]) -> None:
        values = [t.detach() for t in tensors if t.numel()]
        if not values:
            return
        loss = torch.stack([(v if v.numel() == 1 else v.sum()).reshape(()).float() for v in values]).sum()
        self._window.losses.append(loss)
        wants_graph = not self._window.graph_read and self._wants_deep()
        if wants_graph:
            self._read_graph(max(tensors, key=lambda t: t.grad_fn is not None))
        if loss.device.type == "cpu" and not math.isfinite(loss) and not self._packs_saved:
            self._locate(tensors)

    def _wants_deep(self) -> bool:
        return bool(self._hooks) or any(subject.is_deep for subject in self._subjects) or not self._subjects

    def _read_graph(self, loss: Tensor) -> None:
        self._window.graph_read = True
        found = trace.read_graph(loss)
        self._window.compiled |= found.compiled
        facts: dict[str, Any] = {**trace.head_facts(found), "nodes": found.num_nodes}
        unoptimized = self._unoptimized(list(found.reached.values()))
        if unoptimized:
            facts["unoptimized"] = unoptimized
        if not self._packs_saved:
            facts |= trace.flat_share(found)
            for operation in found.operations.values():
                self._read_operation(operation)
            for index, node in enumerate(found.losses[:4]):
                self._read_loss(node, index, facts)
        self._window.events.append(("loss-graph", facts))

    def _unoptimized(self, leaves: list[Tensor]) -> list[str]:
        """Names of the parameters among the leaves of the loss that no optimizer alive holds."""
        held = {id(p) for optimizer in self._seen_optimizers for p in _all_parameters(optimizer)}
        loose = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in held]
        known = frozenset(map(id, loose))
        if known != self._unheld[0]:  # looking through the process is worth it once
            held |= {id(p) for optimizer in describe.all_optimizers() for p in _all_parameters(optimizer)}
            self._unheld = known, describe.names_of([leaf for leaf in loose if id(leaf) not in held])
        return self._unheld[1]

    def _read_operation(self, operation: trace.Operation) -> None:
        after = operation.owner.kind if operation.owner is not None else ""
        owner = operation.owner.module() if operation.owner is not None else None
        for node, call in trace.read_operation(operation, after):
            node.register_prehook(partial(self._shield.call, self._take_signal, call))
            self._window.boundaries.append(
                Boundary(owner, operation.name, operation.kind, "operation", trace.operation_name(node), (), call)
            )

    def _read_loss(self, node: Any, index: int, facts: dict[str, Any]) -> None:
        entered = trace.read_loss(node)
        if entered is None:
            return
        prefix = "loss" if index == 0 else f"loss-{index + 1}"
        facts[prefix] = {
            "operation": entered.operation,
            "prediction_shape": list(entered.prediction_shape),
            "target_shape": list(entered.target_shape),
            "broadcast": entered.broadcast,
        }
        for role, call, dtype, shape in (
            ("prediction", entered.prediction, entered.operation, entered.prediction_shape),
            ("target", entered.target, entered.target_dtype, entered.target_shape),
        ):
            if call is not None:
                self._window.boundaries.append(Boundary(None, f"{prefix}.{role}", role, role, dtype, shape, call))

    def _locate(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            bad = trace.first_bad_operation(tensor)
            if bad is not None:
                facts: dict[str, Any] = {"place": bad.place, "operation": bad.operation, "reason": bad.reason}
                facts |= {"count": bad.count, "size": bad.size, "leaf": bad.owner}
                self._window.events.append(("nonfinite", facts))
                return

    def after_backward(self) -> None:
        """A backward pass has ended; optimizers that stepped inside it form one step."""
        self._shield.call(self._after_backward)

    def _after_backward(self) -> None:
        self._backward_depth = max(0, self._backward_depth - 1)
        if not self._backward_depth and self._pending and self._stepping is None:
            self._settle()

    def packs_saved_tensors(self) -> None:
        """Saved tensors are packed somewhere: reading one, in this step or a later one, could run user code."""
        self._packs_saved = True

    def clipped(self, norm: Tensor, limit: float) -> None:
        """`clip_grad_norm_` found `norm` and will scale gradients so that it is at most `limit`."""
        self._shield.call(self._note_clip, norm, limit)

    def _note_clip(self, norm: Tensor, limit: float) -> None:
        if self._backwards:
            self._window.clips.append((norm.detach().reshape(()).clone(), float(limit)))
        else:
            self._window.events.append(("clip-after-step", {"limit": float(limit)}))

    # ---- steps ----------------------------------------------------------------------------------------------------

    def before_scaled_step(self, scaler: Any) -> None:
        """`GradScaler.step` begins: the losses of this window were scaled."""
        self._shield.call(self._note_scale, scaler)

    def _note_scale(self, scaler: Any) -> None:
        scale = scaler._get_scale_async() if scaler.is_enabled() else None
        self._window.loss_scale = None if scale is None else scale.detach().reshape(()).clone()

    def after_scaled_step(self, optimizer: Optimizer, stepped: bool) -> None:
        """`GradScaler.step` has ended; without a step it found a non-finite gradient."""
        if not stepped:
            self._shield.call(self._skipped_step, optimizer)

    def _skipped_step(self, optimizer: Optimizer) -> None:
        if self._is_ours(optimizer):
            with torch.no_grad():
                reading = ParameterReading(optimizer)
                reading.read_gradients(self._is_deep(optimizer))
                self._end_step(optimizer, reading, skipped=True)

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to step."""
        self._shield.call(self._before_step, optimizer, closure)

    def _before_step(self, optimizer: Optimizer, closure: bool) -> None:
        if not self._is_ours(optimizer) or (self._stepping is not None and self._stepping[0] is not optimizer):
            return  # an optimizer that steps inside another one's step is part of that step
        self._seen_optimizers[optimizer] = None
        if any(pending.optimizer is optimizer for pending in self._pending):
            self._settle()
        with torch.no_grad():
            deep = self._is_deep(optimizer)
            reading = ParameterReading(optimizer)
            if not closure:
                reading.read_gradients(deep)
            if deep:
                reading.read_weights()
            self._stepping = optimizer, reading

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped."""
        self._shield.call(self._after_step, optimizer)
        if self._between is not None:
            self._between()

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._stepping is None or self._stepping[0] is not optimizer:
            return
        (_, reading), self._stepping = self._stepping, None
        with torch.no_grad():
            if not reading.has_gradients:
                reading.read_gradients(self._is_deep(optimizer))  # a closure computed them inside the step
            if self._is_deep(optimizer):
                reading.read_update()
            if reading.is_suspicious:
                reading.read_state(optimizer)
            self._end_step(optimizer, reading, skipped=False)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        if self._only:
            return any(ref() is optimizer for ref in self._only)
        if self._models:
            return any(self._is_known(p) for group in optimizer.param_groups for p in group["params"])
        return True

    def _is_deep(self, optimizer: Optimizer) -> bool:
        subject = self._subject_of(optimizer)
        return subject is None or subject.is_deep

    def _end_step(self, optimizer: Optimizer, reading: ParameterReading, *, skipped: bool) -> None:
        now, spent = time.perf_counter(), self._shield.seconds
        seconds, watched = now - self._marks[0], spent - self._marks[1]
        self._marks = (now, spent)
        window, self._window = self._window, Window()
        deep = self._is_deep(optimizer)
        self._pending.append(Pending(optimizer, reading, window, deep, skipped, seconds, watched))
        self._backwards = 0
        window.release()
        subject = self._subject_of(optimizer)
        if subject is not None and not self._backward_depth and self._is_complete(subject):
            self._settle()

    def _is_complete(self, subject: Subject) -> bool:
        stepped = {id(pending.optimizer) for pending in self._pending}
        return all(ref() is None or id(ref()) in stepped for ref in subject.optimizers)

    # ---- subjects ---------------------------------------------------------------------------------------------------

    def _subject_of(self, optimizer: Optimizer) -> Subject | None:
        return next((s for s in self._subjects if any(ref() is optimizer for ref in s.optimizers)), None)

    def _settle(self) -> None:
        """Write the steps that have ended, each for its subject."""
        pending, self._pending = self._pending, []
        groups: dict[str, list[Pending]] = {}
        for one in pending:
            groups.setdefault(self._assign(one, pending).name, []).append(one)
        for subject in self._subjects:
            if subject.name in groups:
                with torch.no_grad():
                    self._commit(subject, groups[subject.name])

    def _assign(self, one: Pending, together: list[Pending]) -> Subject:
        subject = self._subject_of(one.optimizer)
        if subject is None:
            mates = self._mates(one, together)
            known = (self._subject_of(optimizer) for optimizer in mates)
            subject = self._subject_sharing(one.optimizer) or next((s for s in known if s is not None), None)
            subject = subject or self._new_subject(one.optimizer)
            self._include(subject, mates)
        subject.columns(one.optimizer)
        return subject

    def _subject_sharing(self, optimizer: Optimizer) -> Subject | None:
        """The subject of an earlier optimizer over the same parameters (a loop that makes a new one every epoch)."""
        held = _all_parameters(optimizer)
        return next((s for s in self._subjects if any(s.holds(p) for p in held)), None)

    def _mates(self, one: Pending, together: list[Pending]) -> list[Optimizer]:
        """The optimizers of the same step: all that stepped together, unless each had a loss of its own."""
        losses = sum(len(pending.window.losses) for pending in together)
        separate = len(together) > 1 and losses == len(together)
        return [one.optimizer] if separate else [pending.optimizer for pending in together]

    def _new_subject(self, optimizer: Optimizer) -> Subject:
        self._discover(optimizer)
        roots = self._roots_of(_all_parameters(optimizer))
        name = self._roots[roots[0]] if len(roots) == 1 else "model"
        subject = Subject(_unique(name, {s.name for s in self._subjects}), self._recorder)
        self._subjects.append(subject)
        self._schedules[subject.name] = schedule = self._make_schedule()
        schedule.is_deep(0)
        if self._ranks is None and ranks.world_size() > 1 and any(map(describe.is_wrapper, self._roots)):
            self._ranks, self._queue.lag = ranks.Ranks(), 0 if _is_on_cpu(optimizer) else 2
        return subject

    def _include(self, subject: Subject, optimizers: Sequence[Optimizer]) -> None:
        """Give a subject the models of more optimizers."""
        held = [*subject.held(), *(p for optimizer in optimizers for p in _all_parameters(optimizer))]
        roots = self._roots_of(held)
        several = len({*roots, *subject.roots}) > 1
        for root in roots:
            prefix = subject.roots.setdefault(root, self._roots[root] if several else "")
            subject.add_modules(self._own_modules(root, prefix, held))
        subject.add_parameters((self._loose.get(id(p)) or "parameter", "", p) for p in held)
        self._note_unreadable(subject, roots, held)

    def _roots_of(self, held: list[Tensor]) -> list[nn.Module]:
        wanted = {id(parameter) for parameter in held}
        return [root for root in self._roots if any(id(p) in wanted for p in root.parameters())]

    def _own_modules(self, root: nn.Module, prefix: str, held: list[Tensor]) -> list[tuple[str, nn.Module]]:
        """The root's modules without the parts that only other optimizers train."""
        mine = {id(parameter) for parameter in held}
        theirs = {id(p) for optimizer in self._seen_optimizers for p in _all_parameters(optimizer)} - mine
        found: list[tuple[str, nn.Module]] = []
        left_out: list[str] = []
        for path, module in describe.walk(root, prefix):
            parameters = {id(parameter) for parameter in module.parameters()}
            if path.startswith(tuple(left_out)):
                continue
            if not parameters & mine and parameters & theirs:
                left_out.append(f"{path}.")
                continue
            if module in self._places:
                self._places[module].name = path or self._roots[root]
                found.append((path, module))
        return found

    def _note_unreadable(self, subject: Subject, roots: list[nn.Module], held: list[Tensor]) -> None:
        if not subject.roots:
            self._cannot(subject, _MODULE_STATISTICS, "the program trains loose tensors, no module")
        if any(True for root in roots for _ in _compiled_regions(root)):
            self._cannot(subject, _MODULE_STATISTICS, _COMPILED)
        if any(map(describe.is_sharded, held)):
            names = [s.name for s in STATISTICS.values() if s.axis == "parameter"]
            why = "parameters are sharded over ranks, which is not supported yet"
            self._cannot(subject, (*names, "global_grad_norm"), why)

    def _cannot(self, subject: Subject, statistics: Iterable[str], why: str) -> None:
        for statistic in statistics:
            if (subject.name, statistic) not in self._unmeasured:
                self._unmeasured.add((subject.name, statistic))
                self._recorder.set_unmeasured(subject.name, statistic, why)

    # ---- writing a step -------------------------------------------------------------------------------------------

    def _commit(self, subject: Subject, group: list[Pending]) -> None:
        window = group[0].window
        for later in group[1:]:
            window.absorb(later.window)
        step, subject.step = subject.step, subject.step + 1
        row = Row()
        columns = [subject.columns(pending.optimizer) for pending in group]
        for pending in group:
            pending.reading.put_into(row)
        entries = self._columns_of_calls(subject, window)
        for _, found in entries:
            for call in found:
                call.put_into(row)
        done = _Step(
            subject=subject,
            step=step,
            group=group,
            columns=columns,
            losses=row.put(window.losses),
            clips=row.put(norm for norm, _ in window.clips),
            limits=[limit for _, limit in window.clips],
            scale=row.put([] if window.loss_scale is None else [window.loss_scale]),
            calls=entries,
            compiled=window.compiled,
            carried=[row.put(window.carried.get(id(p.optimizer), ())) for p in group],
        )
        self._write_events(subject, step, window)
        if window.graph_read and self._packs_saved:
            why = "saved tensors are packed (checkpointing, offloading): reading them could run the program again"
            self._cannot(subject, ("attention_entropy", "attention_logit_max"), why)
        self._queue.push(row, lambda arrived: self._write(done, arrived))
        self._queue.drain()
        subject.is_deep = self._schedules[subject.name].is_deep(subject.step)
        self._prepare(subject)

    def _columns_of_calls(self, subject: Subject, window: Window) -> list[tuple[int, list[Call]]]:
        """The step's calls by column. Calls of other subjects' layers wait for their own step, unless this
        subject's backward pass has already been through them.
        """
        entries: dict[int, list[Call]] = {}
        left_out: set[int] = set()
        for module, found in window.modules.items():
            column = subject.column_of(module)
            if column is not None:
                if any(call.has_signal for call in found):  # other outputs were made for another subject's step
                    left_out |= {id(call) for call in found if call.carried and not call.has_signal}
                shape = found[0].shape
                subject.used(column, shape, _units(self._places[module].kind, shape))
                entries.setdefault(column, []).extend(call for call in found if id(call) not in left_out)
            elif not any(call.has_signal for call in found):
                for call in found:
                    call.carried = True
                self._window.modules.setdefault(module, [])[:0] = found
        for boundary in window.boundaries:
            if id(boundary.source) in left_out:
                continue
            if boundary.owner is None or subject.column_of(boundary.owner) is not None:
                entries.setdefault(self._column_of_boundary(subject, boundary), []).append(boundary.call)
            elif not boundary.call.has_signal and boundary.owner in self._window.modules:
                self._window.boundaries.append(boundary)
        return list(entries.items())

    def _column_of_boundary(self, subject: Subject, boundary: Boundary) -> int:
        owner = self._places[boundary.owner].name if boundary.owner is not None else ""
        offset = {"input": -0.5, "operation": 0.25, "prediction": 0.5, "target": 0.75}[boundary.role]
        return subject.layer_column(
            f"{owner}.{boundary.name}" if owner else boundary.name,
            kind=boundary.kind,
            type=boundary.type,
            role=boundary.role,
            shape=boundary.shape,
            units=boundary.shape[-1] if boundary.shape else 0,
            position=subject.position_after(owner, offset),
        )

    def _write_events(self, subject: Subject, step: int, window: Window) -> None:
        for kind, facts in window.events:
            if kind == "loss-graph":
                graph = {key: value for key, value in facts.items() if key not in ("nodes", "flat_share")}
                if self._heads.get(subject.name) == graph:
                    continue
                self._heads[subject.name] = graph
            layer = None
            if "leaf" in facts:
                parameter = subject.parameter_named(facts.pop("leaf") or 0)
                layer = parameter.layer or parameter.name if parameter is not None else None
            self._recorder.write_event(subject.name, Event(step=step, kind=kind, layer=layer, data=facts))

    def _prepare(self, subject: Subject) -> None:
        """Hook or unhook the subject's layers for its next step."""
        if subject.is_deep:
            for root, prefix in list(subject.roots.items()):
                self._adopt_root(root, self._roots[root])  # layers may have been replaced since
                subject.add_modules(self._own_modules(root, prefix, subject.held()))
            self._hook_layers(module for _, module in subject.live_layers())
        else:
            for _, module in subject.live_layers():
                handle = self._hooks.pop(module, None)
                if handle is not None:
                    handle.remove()

    def _write(self, done: _Step, row: Row) -> None:
        """A step's readings have arrived on the host."""
        cheap, deep = done.parameter_arrays(row)
        cheap |= self._step_numbers(done, row, cheap)
        watch, total = float(cheap["watch_seconds"]), float(cheap["step_seconds"])
        self._recorder.write_row(done.subject.name, done.step, "cheap", cheap)
        if done.is_deep:
            deep |= self._layer_arrays(done, row)
            if self._ranks is not None:
                weights, bad = deep["weight_norm"], deep["weight_nonfinite"]
                deep["replica_difference"] = ranks.replica_difference(self._ranks, weights, bad)
            self._write_profiles(done, row)
            deep["carried_grad_norm"] = done.carried_norm(row)
        if deep:
            self.deep_step = done.step
            self._recorder.write_row(done.subject.name, done.step, "deep", deep)
        readings = {"loss": _or_inf(cheap["loss"], cheap["loss_nonfinite"])} if done.losses else {}
        if not math.isnan(cheap["global_grad_norm"]) or np.nansum(cheap["grad_nonfinite"]):
            readings["global_grad_norm"] = _or_inf(cheap["global_grad_norm"], math.isnan(cheap["global_grad_norm"]))
        shown = {name: float(cheap[name]) for name in ("loss", "global_grad_norm")}
        self._schedules[done.subject.name].observe(
            done.step, deep=done.is_deep, seconds=total, watch_seconds=watch, readings=readings
        )
        if self._on_step is not None:
            self._on_step(done.subject.name, done.step, shown)

    def _step_numbers(self, done: _Step, row: Row, cheap: dict[str, Any]) -> dict[str, Any]:
        values = row[done.losses]
        scale = row[done.scale][0] if done.scale else 1.0
        finite = [value / scale for value in values if math.isfinite(value)]
        skipped = float(any(done.skipped(row)))
        if skipped:
            event = Event(step=done.step, kind="step-skipped", data={"loss_scale": scale})
            self._recorder.write_event(done.subject.name, event)
        numbers = [sum(finite), len(finite), len(values) - len(finite), done.seconds, done.watch_seconds]
        if self._ranks is not None:
            numbers = self._ranks.total(numbers)
            numbers[3:] = [value / self._ranks.size for value in numbers[3:]]
        total, count, bad, seconds, watched = numbers
        norms = cheap["grad_norm"]
        norm = math.sqrt(np.dot(norms, norms)) if len(norms) else math.nan
        if math.isnan(norm):  # some tensors have no gradient, or one that is not finite
            present = norms[~np.isnan(norms)]
            lost = np.nansum(cheap["grad_nonfinite"]) > 0
            norm = math.nan if lost or not len(present) else math.sqrt(np.dot(present, present))
        clips = [(n, limit) for n, limit in zip(row[done.clips], done.limits, strict=True) if not math.isnan(n)]
        factors = [min(1.0, limit / (n + 1e-6)) for n, limit in clips]
        return {
            "loss": total / count if count and not bad else math.nan,
            "loss_nonfinite": bad,
            "global_grad_norm": norm,
            "global_grad_norm_unclipped": _unclipped(norm, [n for n, _ in clips], factors),
            "clip_factor": min(factors, default=1.0),
            "micro_batches": float(len(values)),
            "loss_scale": scale,
            "skipped": skipped,
            "step_seconds": seconds,
            "watch_seconds": watched,
            "learning_rate": done.subject.learning_rates([(p.optimizer, p.reading.learning_rates) for p in done.group]),
        }

    def _layer_arrays(self, done: _Step, row: Row) -> dict[str, Any]:
        width = len(done.subject.layers)
        arrays = {name: np.full(width, np.nan) for name in _LAYER_STATISTICS}
        for column, found in done.calls:
            for name, value in calls.aggregate(found, row).items():
                arrays[name][column] = value
        if self._ranks is not None:
            if not self._ranks.agree(width):
                self._cannot(done.subject, _LAYER_STATISTICS, "the ranks do not run the same layers")
                return {}
            arrays = ranks.combine(self._ranks, arrays)
        if any(done.subject.layers[column].module is not None for column, _ in done.calls):
            self._read.add(done.subject.name)
        elif done.losses and done.subject.name not in self._read:
            self._cannot(
                done.subject, _MODULE_STATISTICS, _COMPILED if done.compiled else "no layer was called as a module"
            )
        return arrays

    def _write_profiles(self, done: _Step, row: Row) -> None:
        for column, found in done.calls:
            signals = [call.value("signal_norm", row) for call in found]
            if len(found) > 1 and not all(map(math.isnan, signals)):
                name = done.subject.layers[column].layer.name
                self._recorder.write_profile(done.subject.name, done.step, "call_signal_norm", name, signals)


@dataclass
class _Step:
    """A step whose readings are on their way to the host."""

    subject: Subject
    step: int
    group: list[Pending]
    columns: list[list[int]]
    losses: range
    clips: range
    limits: list[float]
    scale: range
    calls: list[tuple[int, list[Call]]]
    compiled: bool
    carried: list[range]

    def __post_init__(self) -> None:
        self.is_deep = any(pending.deep for pending in self.group)
        self.seconds = sum(pending.seconds for pending in self.group)
        self.watch_seconds = sum(pending.watch_seconds for pending in self.group)
        for pending in self.group:
            pending.window = Window()  # its readings have moved into the row

    def carried_norm(self, row: Row) -> float:
        """The least that each optimizer's gradients held when a pass began, all optimizers together."""
        least = [min(row[places]) for places in self.carried if places]
        return math.sqrt(sum(value * value for value in least)) if least else math.nan

    def skipped(self, row: Row) -> list[bool]:
        """Per optimizer whether it left its weights alone."""
        flags = [pending.reading.read(row).get("found_inf") for pending in self.group]
        return [p.skipped or (flag is not None and flag[1][0] > 0) for p, flag in zip(self.group, flags, strict=True)]

    def parameter_arrays(self, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        """(cheap, deep) arrays over the subject's parameters."""
        width = len(self.subject.parameters)
        names = (*_CHEAP_READINGS, *(_DEEP_READINGS if self.is_deep else ("state_nonfinite",)))
        arrays = dict(zip(names, np.full((len(names), width), np.nan), strict=True))
        for pending, columns in zip(self.group, self.columns, strict=True):
            found = pending.reading.read(row)
            scale = found.pop("grad_scale", ([0], [1.0]))[1][0]
            found.pop("found_inf", None)
            for name, (present, values) in found.items():
                places = columns if len(present) == len(columns) else [columns[index] for index in present]
                arrays[name][places] = values if name not in _SCALED else np.divide(values, scale)
        if self.is_deep:
            return _cheap_arrays(arrays), _deep_arrays(arrays)
        state = arrays["state_nonfinite"]  # read at once where a gradient is not finite, whatever the schedule says
        return _cheap_arrays(arrays), {} if np.isnan(state).all() else {"state_nonfinite": state}


_CHEAP_READINGS = ("grad_norm", "grad_max", "grad_nonfinite")
_DEEP_READINGS = (
    "grad_zero_fraction", "weight_norm", "weight_nonfinite", "state_nonfinite", "update_norm", "sampled_change",
    "sampled_norm",
)  # fmt: skip
_SCALED = ("grad_norm", "grad_max")


def _cheap_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    """NaN readings become counts: a largest entry that is not finite means at least one entry that is not."""
    norms, peaks, counts = (arrays[name] for name in _CHEAP_READINGS)
    if not np.isfinite(peaks).all():
        read = ~(np.isnan(norms) & np.isnan(peaks) & np.isnan(counts))
        lost = read & ~np.isfinite(peaks)
        counts = np.where(np.isnan(counts) & read, lost.astype(float), counts)
        norms, peaks = np.where(lost, np.nan, norms), np.where(lost, np.nan, peaks)
    elif np.isnan(counts).any():
        counts = np.zeros_like(counts)
    return {"grad_norm": norms, "grad_max": peaks, "grad_nonfinite": counts}


def _deep_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    seen = ~np.isnan(arrays["sampled_norm"]) | ~np.isnan(arrays["weight_norm"]) | ~np.isnan(arrays["weight_nonfinite"])
    bad = np.where(np.isnan(arrays["weight_nonfinite"]), np.where(seen, 0.0, np.nan), arrays["weight_nonfinite"])
    lost = bad > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = arrays["sampled_change"] / arrays["sampled_norm"]
    return {
        "grad_zero_fraction": arrays["grad_zero_fraction"],
        "weight_norm": np.where(lost, np.nan, arrays["weight_norm"]),
        "weight_nonfinite": bad,
        "state_nonfinite": np.where(seen & np.isnan(arrays["state_nonfinite"]), 0.0, arrays["state_nonfinite"]),
        "update_norm": np.where(np.isfinite(arrays["update_norm"]), arrays["update_norm"], np.nan),
        "update_ratio": np.where(np.isfinite(ratio), ratio, np.nan),
    }


def carried_norm(optimizer: Optimizer) -> Tensor:
    """L2 norm of the gradients that the optimizer's parameters hold now."""
    found = [p.grad for p in _all_parameters(optimizer) if p.grad is not None and not describe.is_sharded(p.grad)]
    dense = [kernels.real(gradient) for gradient in found if gradient.numel()]
    norms = kernels.norms(dense)
    # A model may be spread over devices.
    return torch.stack([norm.float().to(norms[0].device) for norm in norms]).norm() if norms else torch.zeros(())


def _compiled_regions(root: nn.Module) -> Iterable[nn.Module]:
    """Modules that run inside a compiled graph, where hooks are either skipped or would break it."""
    for _, module in root.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield from module.modules()
        elif type(module).__name__ == "OptimizedModule":
            yield from module._orig_mod.modules()


def _nonfinite_inputs(inputs: Sequence[Tensor]) -> Tensor:
    counts = [kernels.num_nonfinite(kernels.real(t)) for t in inputs if t.is_floating_point() and t.numel()]
    return torch.stack(counts).sum() if counts else torch.zeros(())


def _all_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_on_cpu(optimizer: Optimizer) -> bool:
    return all(parameter.device.type == "cpu" for parameter in _all_parameters(optimizer))


def _unique(name: str, taken: set[str]) -> str:
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in names if candidate not in taken)


def _units(kind: str, shape: tuple[int, ...]) -> int:
    if not shape:
        return 1
    has_channels = len(shape) >= 4 or (kind in ("conv", "batch-norm", "instance-norm") and len(shape) > 1)
    return shape[1] if has_channels else shape[-1]


def _memory(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 for layouts without a single block of it."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _unclipped(norm: float, clipped: Sequence[float], factors: Sequence[float]) -> float:
    """The norm before clipping: each part of the gradients that was clipped had a norm n, and has n times a factor."""
    lost = [n * n * (1 - factor * factor) for n, factor in zip(clipped, factors, strict=True)]
    return math.sqrt(norm * norm + sum(lost))


def _or_inf(value: Any, nonfinite: float) -> float:
    return math.inf if nonfinite else float(value)


def _caller() -> FrameType | None:
    return sys._getframe(2)
