"""Act at bad steps: hears of every step behind all other listeners, lets `_judge.py` decide, and carries it out."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isograd._errors import BadStep
from isograd._guard import Guard
from isograd._judge import Bounds, Decision, Reading
from isograd.frameworks import Shield
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._buffers import Buffers
from isograd.frameworks.torch._device_gate import can_gate
from isograd.frameworks.torch._effects import OWN, gradients_of, parameters_of
from isograd.frameworks.torch._flight import FlightRecorder
from isograd.frameworks.torch._followers import Followers
from isograd.frameworks.torch._guarded import Guarded, Roots, named
from isograd.frameworks.torch._parameters import ParameterReading
from isograd.frameworks.torch._rewinding import Rewinding, Tell
from isograd.frameworks.torch._step_changes import Skipping
from isograd.frameworks.torch._step_reading import read_step


class _Early:
    """Hears of steps that a scaler leaves out before the observer does, which then waits for other ranks: those that
    step have not come to it yet, they wait for this guard's reading.
    """

    def __init__(self, overflowed: Callable[[Optimizer], Any]) -> None:
        self._overflowed = overflowed

    def after_scaled_step(self, optimizer: Optimizer, stepped: bool) -> None:
        if not stepped:
            self._overflowed(optimizer)

    def _ignore(self, *_: Any) -> None:
        return None

    made_optimizer = before_backward = after_backward = before_step = after_step = _ignore
    clipped = before_scaled_step = packs_saved_tensors = _ignore


def _is_within_step(optimizer: Optimizer) -> bool:
    """Whether the step is one that its class has inherited, made within its own: torch announces both."""
    if type(optimizer).__module__.startswith("torch.optim."):
        return False
    frame: FrameType | None = sys._getframe(1)
    announced = 0
    while frame is not None and announced < 2:
        if frame.f_code is _ANNOUNCING and frame.f_locals.get("self") is optimizer:
            announced += 1
        frame = frame.f_back
    return announced == 2


_ANNOUNCING = Optimizer.profile_hook_step(lambda: None).__code__
"""What torch puts around the `step` of each class of optimizers."""


def _has_overflowed(optimizer: Optimizer) -> bool:
    """Whether a scaler has told a fused step to do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)


class Guarding:
    """Guards the optimizers of one process, those in `only` where any are given.

    `on_event(kind, data, place)` hears of all that is done, `on_warning(sentence)` of what users must know.
    `reading_of`: what has been read of a step before; `place_of`: the subject and the number of the step under way;
    `clips`: norms that the program clipped in it. `flight` writes bad steps down, with the facts of `later()`;
    `lower(factor)` multiplies the learning rate for the rest of the run. Nothing but `BadStep` is raised into the
    program, and that only where the guard was asked to stop. `waits`: whether the host decides, waiting for the device
    ("always"), or the device where the optimizer allows it ("never", or "cpu": only where it trains on the CPU, where
    nothing waits).
    """

    def __init__(
        self,
        guard: Guard,
        shield: Shield,
        *,
        models: Sequence[nn.Module] = (),
        only: Sequence[Optimizer] = (),
        on_event: Tell,
        on_warning: Callable[[str], None],
        reading_of: Callable[[Optimizer], ParameterReading | None] = lambda _: None,
        place_of: Callable[[Optimizer], tuple[str, int]] = lambda _: ("model", 0),
        clips: Callable[[], list[dict[str, float]]] = list,
        flight: FlightRecorder | None = None,
        later: Callable[[], Mapping[str, Any]] | None = None,
        lower: Callable[[float], Any] | None = None,
        others: Sequence[object] = (),
        waits: Literal["always", "never", "cpu"] = "cpu",
    ) -> None:
        self._guard, self._shield, self._waits = guard, shield, waits
        self._models, self._only = tuple(models), [weakref.ref(one) for one in only]
        self._on_event, self._on_warning = on_event, on_warning
        self._reading_of, self._place_of, self._lower = reading_of, place_of, lower
        self._clips, self._flight, self._later = clips, flight, later
        self._guarded: WeakKeyDictionary[Optimizer, Guarded] = WeakKeyDictionary()
        self._refused: WeakSet[Optimizer] = WeakSet()
        self._said: set[str] = set()
        self._leaves_out = guard.skip or guard.rewind or guard.stop
        self._roots_at_first, self._roots = Roots(), Roots()  # between the two a model may have been wrapped
        self._skipping, self._buffers, self._followers = Skipping(lambda _: None), Buffers(), Followers()
        self._rewinding = Rewinding(guard, self._guarded, others, on_event=on_event, on_warning=on_warning)
        self._early = _Early(lambda optimizer: shield.call(self._overflowed, optimizer))
        self._losses: list[Tensor] = []
        self._is_over = False
        self._depth = 0
        self._scaler: Any = None
        self._decided: tuple[Optimizer, Decision | None] | None = None
        self._stop: BadStep | None = None
        self._place = "model", 0
        self._pending_state: Mapping[str, Any] | None = None
        self.step = 0

    # ---- life -------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Hear of steps after those who listen already."""
        for optimizer in describe.all_optimizers():
            self.made_optimizer(optimizer)
        self._followers.listen()
        if self._flight is not None:
            self._flight.listen()
        taps.subscribe(self)
        taps.subscribe(self._early, first=True)

    def stop(self) -> None:
        """Act no more; what is hidden is given back."""
        taps.unsubscribe(self._early)
        taps.unsubscribe(self)
        self._followers.stop()
        if self._flight is not None:
            self._flight.stop()
        for guarded in self._guarded.values():
            if guarded.agreement is not None:
                guarded.agreement.leave()
        with torch.no_grad():
            for optimizer, guarded in list(self._guarded.items()):
                self._skipping.forget(optimizer)
                guarded.gate.let_go(optimizer)
                guarded.gate.drain()

    # ---- what is heard ----------------------------------------------------------------------------------------------

    def made_optimizer(self, optimizer: Optimizer) -> None:
        """A new optimizer: its models have not run yet."""
        self._shield.call(self._keep_buffers, optimizer)

    def _keep_buffers(self, optimizer: Optimizer) -> None:
        roots = self._roots_at_first.of(optimizer) if self._is_ours(optimizer) else []
        if self._flight is not None:
            self._flight.follow(named(roots))
        for root in roots if self._leaves_out else ():
            self._buffers.keep(root)

    def before_backward(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> None:
        """A backward pass begins; one for given inputs fills no gradients of the optimizer's."""
        self._depth += 1
        if self._depth == 1 and inputs is None:
            self._shield.call(self._take_loss, tensors)

    def _take_loss(self, tensors: Sequence[Tensor]) -> None:
        if self._decided is not None:
            self._is_over = True
            self._forget_step(gradients=False)
        if self._is_over:
            self._losses, self._is_over = [], False
        self._losses += [tensor.detach().sum() for tensor in tensors if tensor.numel()]

    def after_backward(self) -> None:
        """It has ended."""
        self._depth = max(0, self._depth - 1)

    def before_scaled_step(self, scaler: Any) -> None:
        """`GradScaler.step` begins."""
        self._scaler = scaler if scaler.is_enabled() else None

    def after_scaled_step(self, optimizer: Optimizer, stepped: bool) -> None:
        """`GradScaler.step` has ended; without a step it found a gradient that is not finite, and left it out."""
        self._scaler = None
        self._raise()

    def before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """An optimizer is about to step."""
        self._shield.call(self._before_step, optimizer, closure)
        self._raise()

    def after_step(self, optimizer: Optimizer) -> None:
        """It has stepped."""
        self._shield.call(self._after_step, optimizer)

    def _ignore(self, *_: Any) -> None:
        return None

    clipped = packs_saved_tensors = _ignore

    def _raise(self) -> None:
        if self._stop is not None:
            stop, self._stop, self._scaler = self._stop, None, None
            raise stop

    # ---- deciding ---------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, closure: bool) -> None:
        if self._decided is not None and self._decided[0] is optimizer and not _is_within_step(optimizer):
            self._forget_step()
        if self._decided is not None or not self._is_ours(optimizer):
            return  # an optimizer that steps inside another one's step is part of that step
        why = "it computes its gradients inside its step" if closure else ""
        why = why or ("it steps inside the backward pass" if self._depth else "")
        guarded = self._known(optimizer)
        self._place = self._place_of(optimizer)  # once it has stepped, the observer is a step further
        if why or guarded.refusal:
            self._refuse(optimizer, why or guarded.refusal)
            return
        with torch.no_grad():
            if self._is_gated(optimizer, guarded):
                guarded.gate.before_step(optimizer, self._losses)
                self._decided = optimizer, None
            else:
                guarded.gate.drain()
                self._decide(optimizer, guarded)

    def _is_gated(self, optimizer: Optimizer, guarded: Guarded) -> bool:
        """Whether the device decides. A scaler that is in between, other ranks and snapshots of before the first step
        need the host.
        """
        if self._waits == "always" or self._scaler is not None or guarded.agreement is not None:
            return False
        if self._rewinding.needs_beginning or not can_gate(optimizer):
            return False
        return self._waits == "never" or not all(p.is_cpu for p in parameters_of(optimizer))

    def _forget_step(self, *, gradients: bool = True) -> None:
        """A step that was decided on has raised in the program: nothing of it is under way any more. `gradients`:
        those that are hidden may be wanted for another attempt.
        """
        if self._decided is not None:
            self._skipping.forget(self._decided[0], gradients=gradients)
            self._guarded[self._decided[0]].gate.let_go(self._decided[0])
            self._decided = None

    def _decide(self, optimizer: Optimizer, guarded: Guarded, *, overflowed: bool = False) -> None:
        reading = read_step(
            optimizer,
            self._losses,
            known=self._reading_of(optimizer),
            loss_scale=self._scale(),
            agreement=guarded.agreement,
            overflowed=overflowed or (self._scaler is not None and _has_overflowed(optimizer)),
        )
        if self._is_overflow(reading, guarded):
            self._end_overflow(optimizer, guarded)  # a fused step leaves it out inside its kernel
            return
        if self._rewinding.needs_beginning:
            if not reading.is_finite:
                self._put_buffers_back(guarded)  # the step will not be taken, and what its batch left there is no state
            self._rewinding.begin(guarded, self.step)
        decision = guarded.judge.judge(
            reading,
            self.step,
            state_is_bad=lambda: guarded.state_is_bad(optimizer),
            can_rewind=self._rewinding.can_go_back,
        )
        self._decided = optimizer, decision
        if decision.is_bad:
            self._carry_out(optimizer, guarded, decision, reading.loss, reading.norm)

    def _scale(self) -> float:
        scale = self._scaler._get_scale_async() if self._scaler is not None else None
        return 1.0 if scale is None else float(scale)

    def _known(self, optimizer: Optimizer) -> Guarded:
        guarded = self._guarded.get(optimizer)
        if guarded is None:
            guarded = self._guarded[optimizer] = Guarded(optimizer, self._guard, self._roots.of(optimizer))
            self._rewinding.forget()
            self._take_up(guarded)
        return guarded

    def _refuse(self, optimizer: Optimizer, why: str) -> None:
        if optimizer in self._refused:
            return
        self._refused.add(optimizer)
        sentence = f"the guard leaves {type(optimizer).__name__} alone: {why}"
        if sentence not in self._said:  # programs with an optimizer for each parameter
            self._said.add(sentence)
            self._on_event("guard-refused", {"optimizer": type(optimizer).__name__, "why": why}, self._place)
            self._on_warning(sentence)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        if optimizer in OWN:
            return False
        if self._only:
            return any(ref() is optimizer for ref in self._only)
        wanted = {id(parameter) for model in self._models for parameter in model.parameters()}
        return not wanted or any(id(parameter) in wanted for parameter in parameters_of(optimizer))

    # ---- acting -----------------------------------------------------------------------------------------------------

    def _carry_out(self, optimizer: Optimizer, guarded: Guarded, decision: Decision, loss: float, norm: float) -> None:
        if guarded.judge.in_a_row <= 1 and not decision.again:
            self._write_down(optimizer, guarded, decision, loss)
        if not decision.again:
            self._tell(optimizer, decision, loss)
        if decision.action == "clip":
            for gradient in gradients_of(optimizer):
                gradient.mul_(decision.clip_to / norm)
        elif decision.action in ("skip", "rewind"):
            self._leave_out(optimizer, guarded)
        elif decision.action == "stop":
            self._put_buffers_back(guarded)
            self._decided = None
            self._stop = _stopped(self.step, decision)
        if decision.lower and self._lower is not None:
            self._lower(self._guard.factor)

    def _write_down(self, optimizer: Optimizer, guarded: Guarded, decision: Decision, loss: float) -> None:
        """A capsule of the first step of a trouble."""
        if self._flight is None:
            return
        subject, step = self._place
        several = len(guarded.named_roots) > 1
        values = [(name, self._buffers.values(root)) for name, root in guarded.named_roots.items()]
        self._flight.capture(
            subject=subject,
            step=step,
            why=decision.reasons,
            action=_TOLD[decision.action],
            roots=guarded.named_roots,
            optimizer=optimizer,
            buffers={f"{root}.{name}" if several else name: v for root, held in values for name, v in held.items()},
            loss=loss,
            facts={"clips": self._clips()},
            scaler=self._scaler,
            several=len(self._guarded) > 1,
            later=self._later,
        )

    def _leave_out(self, optimizer: Optimizer, guarded: Guarded) -> None:
        self._skipping.leave_out(optimizer)
        self._put_buffers_back(guarded)
        if self._scaler is not None:
            self._followers.keep_scale()

    def _put_buffers_back(self, guarded: Guarded) -> None:
        for root in guarded.roots:
            self._buffers.put_back(root)

    def _tell(self, optimizer: Optimizer, decision: Decision, loss: float) -> None:
        reasons = [reason.to_dict() for reason in decision.reasons]
        data = {
            "optimizer": type(optimizer).__name__,
            "loss": loss,
            "reasons": reasons,
            "why": str(decision.reasons[0]),
        }
        self._on_event(_EVENTS[decision.action], data, self._place)
        if decision.action == "give-up":
            self._on_warning(
                f"the guard lets bad steps pass from step {self.step} on: {decision.reasons[0]}, {self._why(decision)}"
            )

    def _why(self, decision: Decision) -> str:
        """Why nothing more is done."""
        if decision.reasons[0].channel == "state":
            return f"also after {self._guard.rewinds} rewinds: rewinding ends here"
        if decision.damaged:
            return "and so are weights or optimizer state: no batch that is left out brings them back, rewinding does"
        return f"for more than {self._guard.patience} steps in a row: what repeats is not the batch"

    def _overflowed(self, optimizer: Optimizer) -> None:
        """A scaler left the step out, or this guard has stopped the run inside it."""
        if self._scaler is None or not self._is_ours(optimizer):
            return
        guarded = self._known(optimizer)
        if guarded.refusal:
            return
        self._place = self._place_of(optimizer)
        with torch.no_grad():
            self._decide(optimizer, guarded, overflowed=True)
            self._after_step(optimizer)

    def _is_overflow(self, reading: Reading, guarded: Guarded) -> bool:
        """Whether the scale was too large: the loss is as ever, and a gradient is not finite. Else it is the batch."""
        if self._scaler is None or reading.is_finite or not reading.loss_is_finite:
            return False
        return guarded.all_overflowed and not reading.loss > guarded.judge.bounds(len(reading.norms)).loss

    def _end_overflow(self, optimizer: Optimizer, guarded: Guarded) -> None:
        """The scaler leaves the step out and lowers the scale, as it does in every run in half precision from time to
        time: its batch was seen, and all else goes on as without a guard.
        """
        if self._leaves_out:
            self._keep_seen(guarded)
        self._end_step(optimizer, left_out=False)

    def _keep_seen(self, guarded: Guarded) -> None:
        for root in guarded.roots:
            self._buffers.keep(root)

    # ---- behind the step --------------------------------------------------------------------------------------------

    def _after_step(self, optimizer: Optimizer) -> None:
        if self._decided is None or self._decided[0] is not optimizer or _is_within_step(optimizer):
            return
        (_, decision), self._decided = self._decided, None
        guarded = self._guarded[optimizer]
        if decision is None:
            self._after_gated_step(optimizer, guarded)
            return
        with torch.no_grad():
            self._skipping.give_back(optimizer)
            left_out = decision.action == "skip"
            if decision.action == "rewind":
                # A snapshot is of the end of a step, and what follows that step goes on from there; but for the first.
                left_out = self._go_back(guarded, decision) in (None, self._rewinding.began)
            elif not decision.is_bad and self._leaves_out:
                self._keep_seen(guarded)
        self._end_step(optimizer, left_out=left_out)
        if not decision.is_bad:
            self._take_snapshot(optimizer, guarded)

    def _after_gated_step(self, optimizer: Optimizer, guarded: Guarded) -> None:
        gate, step = guarded.gate, self.step
        with torch.no_grad():
            for root in guarded.roots:
                self._buffers.choose(root, gate.left_out)
        self._end_step(optimizer, left_out=gate.left_out)
        gate.after_step(optimizer, lambda *told: self._hear(optimizer, guarded, step, *told))
        if not guarded.judge.in_a_row:
            self._take_snapshot(optimizer, guarded)

    def _hear(self, optimizer: Optimizer, guarded: Guarded, step: int, reading: Reading, bounds: Bounds) -> None:
        """What the device decided at a step is known: tell it, and do what the device cannot."""
        decision = guarded.judge.judge(
            reading,
            step,
            bounds=bounds,
            state_is_bad=lambda: guarded.state_is_bad(optimizer),
            can_rewind=self._rewinding.can_go_back,
        )
        guarded.gate.is_open = decision.action == "give-up"
        if not decision.is_bad:
            return
        if not decision.again:
            self._tell(optimizer, decision, reading.loss)
        if decision.action == "rewind":
            self._go_back(guarded, decision)
        elif decision.action == "stop":
            self._stop = _stopped(step, decision)
        if decision.lower and self._lower is not None:
            self._lower(self._guard.factor)

    def _end_step(self, optimizer: Optimizer, *, left_out: bool | Tensor) -> None:
        self._followers.stepped(optimizer, left_out=left_out)
        if self._flight is not None:
            subject, step = self._place
            self._flight.end_step(step, subject)
        self._is_over = True
        self.step += 1

    # ---- going back -------------------------------------------------------------------------------------------------

    def _take_snapshot(self, optimizer: Optimizer, guarded: Guarded) -> None:
        decision = self._rewinding.end_step(guarded, self.step)
        if decision is None:
            return
        if decision.action == "rewind":
            with torch.no_grad():
                self._go_back(guarded, decision)
        elif decision.action == "stop":
            self._stop = _stopped(self.step, decision)
        else:
            self._rewinding.end()
            self._tell(optimizer, decision, math.nan)

    def _go_back(self, guarded: Guarded, decision: Decision) -> int | None:
        """The step of the snapshot that is now the program's state; None where none fits."""
        taken = self._rewinding.go_back(guarded, decision)
        if taken is None:
            self._on_warning("the guard could not rewind: no snapshot fits the program any more")
            return None
        for one in self._guarded.values():
            for root in one.roots:
                self._buffers.keep(root)
        reasons = [reason.to_dict() for reason in decision.reasons]
        self._on_event("rewound", {"steps": self.step - taken, "reasons": reasons}, self._place)
        return taken

    # ---- between runs -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the guard knows, of each optimizer in the order in which they first stepped."""
        return {"step": self.step, "judges": [one.judge.state_dict() for one in self._guarded.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; optimizers take up what is theirs when they first step."""
        self.step = int(state["step"])
        self._pending_state = {"judges": list(state["judges"])}
        for guarded in self._guarded.values():
            self._take_up(guarded)

    def _take_up(self, guarded: Guarded) -> None:
        waiting = self._pending_state["judges"] if self._pending_state is not None else []
        if waiting:
            guarded.judge.load_state_dict(waiting.pop(0))


def _stopped(step: int, decision: Decision) -> BadStep:
    what = "; ".join(map(str, decision.reasons))
    return BadStep(f"The guard stopped the run before step {step} was taken: {what}.")


_EVENTS = {
    "observe": "bad-step",
    "skip": "bad-step-skipped",
    "clip": "bad-step-clipped",
    "rewind": "bad-step-skipped",
    "stop": "bad-step-stopped",
    "give-up": "guard-gave-up",
    "relearn": "guard-relearned",
}

_TOLD = {
    "observe": "observed",
    "skip": "skipped",
    "clip": "clipped",
    "rewind": "rewound",
    "stop": "stopped",
    "give-up": "observed",
    "relearn": "observed",
}
"""The words of a capsule."""
