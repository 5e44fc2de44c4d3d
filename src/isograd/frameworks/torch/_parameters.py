"""What is read from the parameters of one optimizer around its step: gradients, weights and the update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch._calls import is_suspicious
from isograd.frameworks.torch._describe import is_sharded
from isograd.frameworks.torch._row import Row

Columns = list[int]
Readings = dict[str, tuple[list[int], list[float]]]
"""Name -> (which of the optimizer's parameters, the values)."""


class ParameterReading:
    """One optimizer's part of one step, by the position of its parameters among all that it holds."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.trainable = [p.requires_grad for p in self.parameters]
        self.learning_rates = [learning_rate(group.get("lr", math.nan)) for group in optimizer.param_groups]
        self._tensors: dict[str, tuple[list[int], list[Tensor]]] = {}
        self._known: Readings = {}
        self._places: dict[str, tuple[list[int], range]] = {}
        self._before: list[Tensor] = []
        self._versions: list[int] = []
        # A fused optimizer unscales and skips inside its kernel: what it will use is read here, not waited for.
        for name in ("grad_scale", "found_inf"):
            value = getattr(optimizer, name, None)
            if isinstance(value, Tensor):
                self._tensors[name] = [0], [value.detach().reshape(()).clone()]

    # ---- gradients ------------------------------------------------------------------------------------------

    def read_gradients(self, deep: bool) -> None:
        """L2 norm, largest entry and non-finite count of every gradient; zero fractions when `deep`."""
        present, gradients = self._gradients()
        if not gradients:
            return
        if all(gradient.is_cpu for gradient in gradients):
            self._know_gradients(present, gradients)
        else:
            self._tensors["grad_norm"] = present, kernels.norms(gradients)
            self._tensors["grad_max"] = present, kernels.largest(gradients)
            if deep:
                self._tensors["grad_nonfinite"] = present, [kernels.num_nonfinite(g) for g in gradients]
        if deep:
            pairs = zip(present, gradients, strict=True)
            self._tensors["grad_zero_fraction"] = present, [_zero_fraction(g, self.parameters[i]) for i, g in pairs]

    def _gradients(self) -> tuple[list[int], list[Tensor]]:
        present, gradients = [], []
        for index, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is None or is_sharded(gradient):
                continue
            if gradient.layout != torch.strided or gradient.is_complex():
                gradient = _values(gradient)
            if gradient.numel():
                present.append(index)
                gradients.append(gradient)
        return present, gradients

    def _know_gradients(self, present: list[int], gradients: Sequence[Tensor]) -> None:
        """On CPU a suspicious gradient can be looked at again at once, while it is still there."""
        lengths = torch.stack(kernels.norms(gradients)).tolist()
        some = [g if g.numel() <= kernels.PARAMETER_SAMPLE else kernels.parameter_sample(g) for g in gradients]
        peaks = kernels.extremes(some)
        bad = [0.0] * len(present)
        for i, length in enumerate(lengths):
            if not length or not math.isfinite(length):
                bad[i] = float(kernels.num_nonfinite(gradients[i]))
                peaks[i] = kernels.extremes([gradients[i]])[0]
        self._known["grad_norm"] = present, lengths
        self._known["grad_max"] = present, peaks
        self._known["grad_nonfinite"] = present, bad

    # ---- weights ----------------------------------------------------------------------------------------------

    def read_weights(self) -> None:
        """Weight norms and a copy of the sampled entries, before the step changes them."""
        present, weights = self._weights()
        lengths = kernels.norms(weights)
        self._tensors["weight_norm"] = present, lengths
        suspects = [i for i, length in enumerate(lengths) if is_suspicious(length)]
        counts = [kernels.num_nonfinite(weights[i]) for i in suspects]
        self._tensors["weight_nonfinite"] = [present[i] for i in suspects], counts
        self._before = [kernels.parameter_sample(weight).clone() for weight in weights]
        layered = [(i, w) for i, w in zip(present, weights, strict=True) if w.dim() >= 2 and len(w) > 1]
        spreads = [kernels.unit_spread(weight) for _, weight in layered]
        self._tensors["unit_spread"] = [i for i, _ in layered], spreads

    def _weights(self) -> tuple[list[int], list[Tensor]]:
        readable = [(i, p) for i, p in enumerate(self.parameters) if not is_sharded(p) and _is_ready(p)]
        return [i for i, _ in readable], [kernels.real(p) for _, p in readable]

    def read_update(self) -> None:
        """How far the step moved the sampled entries that `read_weights` copied."""
        present, weights = self._weights()
        if not self._before or len(weights) != len(self._before):
            return
        pairs = zip(weights, self._before, strict=True)
        change = kernels.norms([kernels.parameter_sample(now).sub(before).reshape(-1) for now, before in pairs])
        whole = [math.sqrt(w.numel() / b.numel()) for w, b in zip(weights, self._before, strict=True)]
        self._tensors["update_norm"] = present, [length * scale for length, scale in zip(change, whole, strict=True)]
        self._tensors["sampled_change"] = present, change
        self._tensors["sampled_norm"] = present, kernels.norms([before.reshape(-1) for before in self._before])
        self._before = []

    def note_versions(self) -> None:
        """Remember which writes the weights have seen, for `has_moved`."""
        self._versions = [p._version for p in self.parameters]

    @property
    def has_moved(self) -> bool:
        """Whether a weight was written to since `note_versions`; False without it."""
        return any(p._version != version for p, version in zip(self.parameters, self._versions, strict=False))

    def read_state(self, optimizer: Optimizer) -> None:
        """Non-finite entries in the optimizer's own tensors; worth the reading only where something is not finite."""
        present, counts = [], []
        for index, parameter in enumerate(self.parameters):
            state = optimizer.state.get(parameter, {})
            held = state.values() if isinstance(state, Mapping) else ()
            # Counters may live on the CPU while the parameter does not.
            tensors = [t for t in held if isinstance(t, Tensor) and t.numel() and t.device == parameter.device]
            if tensors and not is_sharded(parameter):
                present.append(index)
                counts.append(torch.stack([kernels.num_nonfinite(kernels.real(t)) for t in tensors]).sum())
        self._tensors["state_nonfinite"] = present, counts

    # ---- results ------------------------------------------------------------------------------------------------

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were read."""
        return "grad_norm" in self._known or "grad_norm" in self._tensors

    @property
    def gradients(self) -> tuple[list[int], list[float], list[float]] | None:
        """(which, L2 norms, entries that are not finite) of the gradients, where they are on the host already."""
        if "grad_norm" not in self._known:
            return None
        (present, norms), (_, bad) = self._known["grad_norm"], self._known["grad_nonfinite"]
        return present, norms, bad

    @property
    def is_suspicious(self) -> bool:
        """Whether a gradient or a weight may not be finite; on an accelerator, at every deep step."""
        suspects, _ = self._tensors.get("weight_nonfinite", ([], []))
        return bool(suspects) or any(self._known.get("grad_nonfinite", ([], []))[1])

    def put_into(self, row: Row) -> None:
        """Move what is still on the device into `row`."""
        self._places = {name: (present, row.put(tensors)) for name, (present, tensors) in self._tensors.items()}
        self._tensors = {}
        self.parameters = []

    def read(self, row: Row) -> Readings:
        """Everything of this step, once the row has arrived."""
        return self._known | {name: (present, row[places]) for name, (present, places) in self._places.items()}


def _values(gradient: Tensor) -> Tensor:
    """A gradient's entries; one 0 for a sparse gradient that stores none, which is exactly zero."""
    values = kernels.real(gradient)
    return values if values.numel() or not gradient.numel() else values.new_zeros(1)


def _zero_fraction(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Share of zeros among the parameter's entries: those that a sparse gradient does not store are zero as well."""
    stored = kernels.zero_fraction(kernels.parameter_sample(gradient))
    return 1 - (1 - stored) * min(1.0, gradient.numel() / parameter.numel())


def _is_ready(parameter: Tensor) -> bool:
    return not is_lazy(parameter) and parameter.numel() > 0


def learning_rate(value: Any) -> float:
    """A learning rate as a float; NaN for one that lives on an accelerator, where reading it would wait."""
    if isinstance(value, Tensor):
        return float(value.detach()) if value.device.type == "cpu" else math.nan
    return float(value)
