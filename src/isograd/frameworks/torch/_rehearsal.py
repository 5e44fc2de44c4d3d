"""A training step rehearsed on a copy: model, optimizer and generators of the user's stay as they are.

The copy is watched as a training program is (`_observe.py`), once with a random cotangent of the output and once with
the loss, so that what is measured is what a run would have recorded at its first step.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from isograd._forecast import Curvature, RecurrentLayer, Weight
from isograd._schedule import Schedule
from isograd.frameworks import Recorder, Shield
from isograd.frameworks.torch import _calls as calls
from isograd.frameworks.torch import _curvature as curvature
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._curvature import Eigenvalue
from isograd.frameworks.torch._observe import Observer

_ADAPTIVE = frozenset({"Adam", "AdamW", "NAdam", "RAdam", "AdamaxW"})


@dataclass(frozen=True)
class Batch:
    """What a model is given, and what its output is compared with."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[Any, ...] = ()


def require_model(model: object, optimizer: object) -> None:
    """Raises ValueError for what is no module, or no optimizer."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"preflight() takes a torch module, not {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ValueError(f"the optimizer must be a torch optimizer, not {type(optimizer).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, without data parallelism or compilation around it."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if describe.is_wrapper(inner) else inner


def batch_of(value: Any) -> Batch:
    """A batch as loaders yield it: inputs; (inputs, target); (input, input, ..., target); a mapping of inputs."""
    if isinstance(value, Mapping):
        return Batch(keywords=value)
    if not isinstance(value, (tuple, list)):
        return Batch((value,))
    if not value:
        raise ValueError("the batch is empty")
    *inputs, target = value if len(value) > 1 else (*value, None)
    first = inputs[0]
    if len(inputs) == 1 and isinstance(first, Mapping):
        return Batch((), first, (target,))
    arguments = tuple(first) if len(inputs) == 1 and isinstance(first, (tuple, list)) else tuple(inputs)
    return Batch(arguments, {}, (target,) if len(value) > 1 else ())


@dataclass
class Rehearsal:
    """A copy of model, optimizer and loss. Raises ValueError where they cannot be copied."""

    model: nn.Module
    optimizer: Optimizer | None
    loss_fn: Callable[..., Any] | None
    batch: Batch | None

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: Optimizer | None, loss_fn: Callable[..., Any] | None, batch: Any
    ) -> Rehearsal:
        """Copies that share nothing with the originals, but belong together as these do."""
        with _without_gradients(model):
            try:
                twins = copy.deepcopy(
                    (unwrapped(model), optimizer, loss_fn if isinstance(loss_fn, nn.Module) else None)
                )
            except Exception as error:
                raise ValueError(f"the model cannot be copied, so nothing can be tried: {_line(error)}") from error
        given = None if batch is None else batch_of(batch)
        return cls(twins[0], twins[1], twins[2] if isinstance(loss_fn, nn.Module) else loss_fn, given)

    @property
    def trainable(self) -> list[Tensor]:
        """The copies of everything that is to be trained."""
        held = [p for group in (self.optimizer.param_groups if self.optimizer else ()) for p in group["params"]]
        learned = self.loss_fn.parameters() if isinstance(self.loss_fn, nn.Module) else ()
        found = {id(p): p for p in (*self.model.parameters(), *learned, *held) if p.requires_grad}
        return list(found.values())

    @property
    def samples(self) -> int | None:
        """How many samples the batch holds, as its first tensor says."""
        tensors = [t for t in (*self.inputs, *self._keyword_tensors()) if isinstance(t, Tensor) and t.dim()]
        return len(tensors[0]) if tensors else None

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The model's positional arguments; none without a batch."""
        return () if self.batch is None else self.batch.arguments

    def _keyword_tensors(self) -> Sequence[Any]:
        return () if self.batch is None else tuple(self.batch.keywords.values())

    @property
    def has_loss(self) -> bool:
        """Whether a loss can be tried for: the model may have its own."""
        return self.batch is not None and (self.loss_fn is not None or bool(self.batch.keywords))

    def input_moments(self) -> tuple[float, float] | None:
        """(E[x^2], E[x x'] over different samples) of the first input; None where it is no floating-point batch."""
        x = self.inputs[0] if self.inputs else None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
            return None
        values, count = x.detach().double().flatten(1), len(x)
        mean_square = float(values.square().mean())
        if count < 2 or not math.isfinite(mean_square):
            return (mean_square, 0.0) if math.isfinite(mean_square) else None
        # The square of a sum over samples has every pair, and every sample with itself.
        return mean_square, (count * float(values.mean(0).square().mean()) - mean_square) / (count - 1)

    def weights(self) -> list[Weight]:
        """Every parameter of the copy as it stands."""
        found = []
        for path, module in describe.walk(self.model):
            layer = describe.layer_of(path or "model", module)
            for short, tensor in module.named_parameters(recurse=False):
                parameter = describe.parameter_of(f"{path}.{short}" if path else short, layer.name, tensor, 0)
                found.append(Weight(parameter=parameter, layer=layer, norm=float(tensor.detach().double().norm())))
        return found

    # ---- forward passes -----------------------------------------------------------------------------------------

    def output(self) -> Any:
        """What the copy makes of the batch. Raises ValueError where it does not take it."""
        assert self.batch is not None
        try:
            # Clones: some models change their input in place.
            return self.model(*_cloned(self.batch.arguments), **_cloned(dict(self.batch.keywords)))
        except Exception as error:
            raise ValueError(f"the model does not take this batch: {_line(error)}") from error

    def loss(self) -> Tensor | None:
        """The loss of a forward pass: by the loss function, or what the model calls its loss. None without one."""
        output = self.output()
        found = _own_loss(output) if self.loss_fn is None else self._compared(output)
        if found is None:
            return None
        if not isinstance(found, Tensor) or found.numel() != 1:
            kind = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"the loss function must return one number as a tensor, not {kind}")
        if not found.requires_grad:
            raise ValueError("the loss does not depend on any parameter that requires a gradient")
        return found

    def _compared(self, output: Any) -> Any:
        assert self.loss_fn is not None
        assert self.batch is not None
        targets = self.batch.targets
        if not targets and _takes_two(self.loss_fn):  # an autoencoder: the input is the target
            targets = (self.batch.keywords or self.batch.arguments[0],)
        try:
            return self.loss_fn(output, *targets)
        except Exception as error:
            raise ValueError(f"the loss function does not take this output and target: {_line(error)}") from error

    # ---- watched steps ------------------------------------------------------------------------------------------

    def watch_signal(self, recorder: Recorder, shield: Shield) -> None:
        """One step with a random cotangent of the output: sum(v * output), v ~ N(0, 1). No weight changes."""
        optimizer = self._still()
        with self._watched(recorder, shield, optimizer):
            out = _main_output(self.output())
            if out is None or not out.requires_grad:
                raise ValueError("the model's output does not depend on any parameter that requires a gradient")
            self._backward((out * _cotangent(out)).sum())
            optimizer.step()

    def watch_loss(self, recorder: Recorder, shield: Shield) -> bool:
        """One step with the loss and the optimizer, or without changes where there is none; False without a loss."""
        optimizer = self.optimizer or self._still()
        optimizer.zero_grad()
        with self._watched(recorder, shield, optimizer):
            loss = self.loss()
            if loss is None:
                return False
            self._backward(loss)
            _step(optimizer)
        return True

    def _still(self) -> Optimizer:
        """An optimizer that changes nothing: the end of a step. Raises ValueError where there is nothing to train."""
        if not self.trainable:
            raise ValueError("no parameter of the model requires a gradient")
        return torch.optim.SGD(self.trainable, lr=0.0)

    def _backward(self, loss: Tensor) -> None:
        # Leaves that are named get a gradient, others do not: a loss function may hold on to the original.
        torch.autograd.backward(loss, inputs=self.trainable)

    @contextlib.contextmanager
    def _watched(self, recorder: Recorder, shield: Shield, optimizer: Optimizer) -> Iterator[None]:
        observer = Observer(
            recorder, shield, models=(self.model,), optimizers=(optimizer,), make_schedule=lambda: Schedule(every=1)
        )
        shield.call(observer.attach, (self.model,), (optimizer,), None)
        try:
            yield
        finally:
            observer.detach()

    # ---- recurrent layers ---------------------------------------------------------------------------------------

    def recurrences(self) -> Iterator[RecurrentLayer]:
        """Every recurrent layer, with its decay through time where the batch reaches it."""
        found = {name: m for name, m in describe.walk(self.model) if isinstance(m, _RECURRENT)}
        entered = self._entered(found) if self.batch is not None and found else {}
        for name, module in found.items():
            yield recurrence_of(name or "model", module, entered.get(name))

    def _entered(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The sequence that entered each module first, [time, batch, features] or as the module has it."""
        entered: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
                if arguments and isinstance(arguments[0], Tensor):
                    entered.setdefault(name, arguments[0].detach())

            return hook

        handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
        try:
            with torch.no_grad():
                self.output()
        finally:
            for handle in handles:
                handle.remove()
        return entered

    # ---- curvature ----------------------------------------------------------------------------------------------

    def bend(self) -> Curvature | str:
        """The sharpness of the loss on the batch, or a sentence that says why there is none."""
        parameters = self.trainable
        try:
            with _twice_differentiable():
                loss = self.loss()
                if loss is None:
                    return "Sharpness: there is no loss to bend."
                found, facts = self._largest(loss, parameters)
        except RuntimeError as error:
            return f"Sharpness could not be measured: {_line(error)}."
        if not math.isfinite(found.value):
            return "Sharpness could not be measured: the curvature is not finite."
        return Curvature(sharpness=found.value, products=found.products, error=found.error, **facts)

    def _largest(self, loss: Tensor, parameters: list[Tensor]) -> tuple[Eigenvalue, dict[str, Any]]:
        facts = _facts_of(self.optimizer)
        scale = None
        if facts["optimizer"] == "adam" and self.optimizer is not None:
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True
            )
            dense = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
            scale = curvature.adam_scale(self.optimizer, parameters, dense)
        product = curvature.hessian_product(loss, parameters, scale)
        start = [_normal(p.shape, seed).to(p) for seed, p in enumerate(parameters)]
        return curvature.largest_eigenvalue(product, start), facts


def _facts_of(optimizer: Optimizer | None) -> dict[str, Any]:
    """What the stability limit depends on."""
    if optimizer is None:
        return {"optimizer": "sgd"}
    group = optimizer.param_groups[0]
    rate = max(float(group.get("lr", math.nan)) for group in optimizer.param_groups)
    if type(optimizer).__name__ in _ADAPTIVE:
        return {"optimizer": "adam", "momentum": float(group["betas"][0]), "learning_rate": rate}
    facts = {"optimizer": "sgd", "momentum": float(group.get("momentum", 0.0)), "nesterov": bool(group.get("nesterov"))}
    return facts | {"learning_rate": rate if isinstance(optimizer, torch.optim.SGD) else math.nan}


# ---- recurrent layers -------------------------------------------------------------------------------------------

_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def recurrence_of(name: str, module: nn.Module, sequence: Tensor | None) -> RecurrentLayer:
    """What a recurrent layer does to gradients through time; `sequence` is an input of it, None where none was seen."""
    radius, singular = _spectrum(module)
    steps, decay = (0, math.nan) if sequence is None else _decay(module, sequence)
    passed = steps - max(1, round(steps / 10))
    return RecurrentLayer(
        layer=name,
        kind=describe.kind_of(module),
        spectral_radius=radius,
        largest_singular_value=singular,
        time_steps=steps,
        decay=decay,
        per_step=decay ** (1 / passed) if decay > 0 and passed > 0 else math.nan,
    )


def _spectrum(module: nn.Module) -> tuple[float, float]:
    """(spectral radius, largest singular value) of the recurrent weights, the largest over layers and gates."""
    radii, values = [0.0], [0.0]
    for name, weight in module.named_parameters():
        if name.startswith("weight_hh") and weight.dim() == 2 and bool(torch.isfinite(weight).all()):
            gates = torch.split(weight.detach().float().cpu(), module.hidden_size)  # type: ignore[arg-type]
            if weight.shape[1] == module.hidden_size:  # where a projection comes back, they have no eigenvalues
                matrices = torch.stack(gates)
                radii.append(spectral_radius(matrices))
                values.append(math.sqrt(spectral_radius(matrices.mT @ matrices)))
    return max(radii), max(values)


def spectral_radius(matrices: Tensor) -> float:
    """The largest absolute eigenvalue of any of the `matrices` [count, n, n], of float32.

    Up to n = 128 from the eigenvalues; those of larger ones take seconds where Gelfand's formula takes products:
    ||A^k||^(1/k) for k = 4096 by squaring, which is above the radius by a factor of (n cond(V))^(1/k) at most, where
    V has the eigenvectors as columns. Powers that vanish (V singular) say nothing.
    """
    if matrices.shape[-1] > 128:
        powers, logarithm = matrices, torch.zeros(len(matrices), dtype=torch.float64)
        for doubling in range(12):
            norm = torch.linalg.matrix_norm(powers)
            logarithm += norm.double().log() / 2**doubling
            powers = powers / norm[:, None, None]
            powers = powers @ powers
        logarithm += torch.linalg.matrix_norm(powers).double().log() / 2**12
        if bool(torch.isfinite(logarithm).all()):
            return float(logarithm.exp().max())
    return float(torch.linalg.eigvals(matrices.double()).abs().max())


def _decay(module: nn.Module, sequence: Tensor) -> tuple[int, float]:
    """(time steps, gradient norm at the input of step T/10 over that of step T) for a cotangent of the last output."""
    if isinstance(module, (nn.RNNCell, nn.LSTMCell, nn.GRUCell)) or sequence.dim() != 3:
        return 0, math.nan
    axis = 1 if getattr(module, "batch_first", False) else 0
    with torch.enable_grad():
        x = sequence.detach().float().requires_grad_()
        out = module(x.to(sequence.dtype))[0].select(axis, -1)
        (found,) = torch.autograd.grad((out * _cotangent(out)).sum(), x)
    norms = found.double().transpose(0, axis).flatten(1).norm(dim=1)
    steps = len(norms)
    last, early = float(norms[-1]), float(norms[max(1, round(steps / 10)) - 1])
    return steps, early / last if last > 0 else math.nan


# ---- a batch of random numbers ----------------------------------------------------------------------------------


def random_batch(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """N(0, 1) of this shape; where the model begins with an embedding, numbers below its size."""
    first = next((module for _, module in describe.walk(model) if describe.is_layer(module)), None)
    if isinstance(first, (nn.Embedding, nn.EmbeddingBag)):
        generator = torch.Generator().manual_seed(0)
        return torch.empty(tuple(shape), dtype=torch.int64).random_(0, first.num_embeddings, generator=generator)
    weight = next(model.parameters(), None)
    values = _normal(shape, 0)
    return values if weight is None else values.to(weight)


# ---- small things -----------------------------------------------------------------------------------------------


def _normal(shape: Sequence[int], seed: int) -> Tensor:
    """N(0, 1) from a generator of our own: the user's are not asked."""
    return torch.empty(tuple(shape)).normal_(generator=torch.Generator().manual_seed(seed))


def _cotangent(out: Tensor) -> Tensor:
    return _normal(out.shape, 0).to(out)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) in (tuple, list):
        return type(value)(map(_cloned, value))
    return {key: _cloned(entry) for key, entry in value.items()} if type(value) is dict else value


def _main_output(output: Any) -> Tensor | None:
    """The first tensor of what a model returns, its own loss left out; complex numbers as pairs."""
    others = {key: value for key, value in output.items() if key != "loss"} if isinstance(output, Mapping) else output
    out = calls.first_tensor(others)
    return torch.view_as_real(out) if out is not None and out.is_complex() else out


def _own_loss(output: Any) -> Any:
    """What models that compute their loss themselves return under that name."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _takes_two(function: Callable[..., Any]) -> bool:
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        required = [
            parameter
            for parameter in inspect.signature(called).parameters.values()
            if parameter.default is parameter.empty and parameter.kind in (0, 1)
        ]
    except (TypeError, ValueError):
        return False
    return len(required) == 2


def _step(optimizer: Optimizer) -> None:
    with contextlib.suppress(TypeError):  # one that insists on a closure makes no step here
        optimizer.step()


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients are no part of the copy: half of its memory, and not ours to look at."""
    held = [(p, p.grad) for p in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient


@contextlib.contextmanager
def rehearsing() -> Iterator[None]:
    """Gradients are on, and a run that is watched hears nothing of what happens inside."""
    with torch.enable_grad(), torch.inference_mode(mode=False), taps.silenced():
        yield


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Kernels that have second derivatives: fused attention and fused recurrences have none."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _line(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
