"""What is read at one call of a layer at a deep step: its output, and the gradient that comes back to it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isograd.frameworks import Shield
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _kernels as kernels
from isograd.frameworks.torch._row import Row

CALLS = 256
"""Calls of one layer that are read in one step; a longer unrolling is read up to there."""


SOMETIMES = 16
"""Of a layer that is called more often than this in a step, every so many calls are compared row by row."""


@dataclass(slots=True)
class Call:
    """Readings of one call, still on the device. `size`: entries of the output. `has_signal`: a gradient arrived.
    `carried`: it was read in an earlier step, of another subject. `signal_looked_at`: entries of the gradient among
    which those that are not zero were counted.
    """

    size: int
    shape: tuple[int, ...] = ()
    readings: dict[str, Tensor] = field(default_factory=dict)
    has_signal: bool = False
    carried: bool = False
    dtype: str = ""
    signal_looked_at: int = 1
    places: dict[str, int] = field(default_factory=dict)

    def put_into(self, row: Row) -> None:
        """Move the readings into `row`, remembering where each one stands."""
        places = row.put(self.readings.values())
        self.places = dict(zip(self.readings, places, strict=True))
        self.readings = {}

    def value(self, name: str, row: Row) -> float:
        """A reading, once the row has arrived; NaN when it was not taken."""
        place = self.places.get(name)
        return math.nan if place is None else row[range(place, place + 1)][0]

    def stand_for(self, size: int) -> None:
        """Let readings of a sample stand for `size` entries."""
        if "norm" in self.readings:
            self.readings["norm"] = self.readings["norm"] * math.sqrt(size / self.size)
        self.size = size

    def take_signal(self, gradient: Tensor | None) -> None:
        """Read the gradient with respect to the output; a second one adds to it (weight sharing, retained graphs).

        One that arrives after the readings have gone into a row belongs to a later step, whose graph reaches back.
        """
        if gradient is None or not gradient.numel() or self.places:
            return
        plain = kernels.real(gradient)
        norm = kernels.norm(plain)
        suspicious = is_suspicious(norm)
        # Where the norm is neither 0 nor overflown, a sample tells the order of magnitude of the largest entry.
        looked_at = plain if suspicious or not float(norm) else kernels.activation_sample(plain)
        peak = kernels.largest([looked_at])[0]
        nonzero = torch.count_nonzero(looked_at)
        if suspicious:
            earlier = self.readings.get("signal_nonfinite", 0.0)
            self.readings["signal_nonfinite"] = kernels.num_nonfinite(plain) + earlier
        if self.has_signal:
            norm = torch.hypot(norm, self.readings["signal_norm"])
            peak = torch.maximum(peak, self.readings["signal_max"])
            nonzero = torch.maximum(nonzero, self.readings["signal_nonzero"])
        self.readings["signal_norm"], self.readings["signal_max"] = norm, peak
        self.readings["signal_nonzero"], self.signal_looked_at = nonzero, looked_at.numel()
        self.has_signal = True


def is_suspicious(reading: Tensor) -> bool:
    """On CPU whether a reading is not finite; True on an accelerator, where looking would wait."""
    return reading.device.type != "cpu" or not math.isfinite(reading)


def read_values(values: Tensor, *, boundary: bool = False, rows: bool = False) -> Call:
    """The statistics of a value as such. `boundary`: every entry counts (up to `kernels.UNIT_ENTRIES`), also spread and
    column scales. `rows`: also sums over rows.
    """
    plain = kernels.real(values)
    call = Call(size=plain.numel(), dtype=dtype_name(values))
    if not call.size:
        return call
    norm = kernels.norm(plain)
    whole = not plain.dim() or (boundary and call.size <= kernels.UNIT_ENTRIES)
    sample = plain if whole else kernels.activation_sample(plain)
    mean, low, high = kernels.spread(sample)
    call.readings.update({"norm": norm, "mean": mean, "low": low, "high": high})
    if is_suspicious(norm):
        call.readings["nonfinite"] = kernels.num_nonfinite(plain)
    if not plain.is_floating_point() or not plain.dim():
        return call
    call.readings["zero"] = kernels.zero_fraction(sample)
    if boundary and plain.numel() > 1:
        call.readings["std"] = sample.to(kernels.wide(plain.dtype)).std(correction=0).float()
    if boundary and plain.dim() == 2 and plain.shape[1] > 1:
        call.readings["columns"] = kernels.column_scale_ratio(plain)
    if rows and plain.dim() >= 2:
        call.readings["row_low"], call.readings["row_high"] = kernels.row_sums(plain)
    return call


def read_activation(
    call: Call, kind: str, out: Tensor, x: Tensor | None, axis: int, parameters: dict[str, float]
) -> None:
    """Add how an activation works: dead units, saturation, slope."""
    if not out.numel() or not out.is_floating_point():
        return
    rows = out.detach().unsqueeze(0) if out.dim() == 1 else out.detach()
    names = ("dead", "saturation", "slope")
    found = kernels.activation(kind, rows, None if x is None else x.detach().reshape(rows.shape), axis, parameters)
    call.readings.update({name: reading for name, reading in zip(names, found, strict=True) if reading is not None})


def read_similarity(call: Call, out: Tensor, axis: int) -> None:
    """Add how much alike the rows of an output are, `axis` being its feature axis."""
    if out.dim() >= 2 and out.numel() and out.is_floating_point() and out.layout == torch.strided:
        call.readings["rows_squared"], call.readings["rows"] = kernels.directions(kernels.some_rows(out, axis))


def read_distinct(call: Call, values: Tensor) -> None:
    """Add how many different entries inputs or targets have along their first axis."""
    plain = kernels.real(values)
    if plain.dim() and plain.numel():
        call.readings["distinct"] = kernels.num_distinct(plain)


def read_batch_statistics(call: Call, norm: nn.Module, x: Tensor, moments: tuple[Tensor, Tensor] | None) -> None:
    """Add how far a batch is from the running statistics of a batch normalization that has just taken it in.

    `moments`: mean and biased variance of each channel, where the graph has them; otherwise estimated from rows of `x`.
    """
    running = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not norm.training or running[0] is None or running[1] is None or x.dim() < 2 or not x.numel():
        return
    momentum: Any = getattr(norm, "momentum", None)
    if momentum is None:
        momentum = 1 / norm.num_batches_tracked.double()  # type: ignore[operator]
    elif not 0 <= momentum < 1:
        return
    mean, variance = moments or kernels.channel_moments(x)
    epsilon = float(getattr(norm, "eps", 0.0))
    count = x.numel() // x.shape[1]
    gap = kernels.running_gap(mean, variance, count, (running[0], running[1]), momentum, epsilon)
    call.readings["batch_gap"] = gap


def read_padding(call: Call, ids: Tensor, padding: int | None) -> None:
    """Add the share of samples whose ids are all the padding index, where an embedding has one."""
    if padding is not None and ids.dim() and ids.numel():
        call.readings["padding"] = (ids.detach().reshape(ids.shape[0], -1) == padding).all(dim=1).float().mean()


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in what a module returned: itself, in a tuple, list or mapping, or packed."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() or value.is_complex() else None
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value.data
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((t for t in map(first_tensor, value) if t is not None), None)
    return None


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The plain tensors among a module's positional arguments, packed sequences included."""
    unpacked = (v.data if isinstance(v, nn.utils.rnn.PackedSequence) else v for v in values)
    return [value for value in unpacked if isinstance(value, Tensor)]


class OutputHook:
    """A forward hook that tells a reader what a module returned, and nothing else.

    It never stays in a copy: deep-copied or pickled it becomes a bound method of the standard library that ignores its
    arguments and returns None, so that a copy or a checkpoint of a watched model neither watches nor needs isograd.
    """

    def __init__(self, shield: Shield, read: Any, layer: object) -> None:
        self._shield, self._read, self._layer = shield, read, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or _is_transformed():
            return
        self._shield.call(self._read, self._layer, module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


def _is_transformed() -> bool:
    """Whether values cannot be read, or reading is noticed: in `torch.func`, while tracing, under dispatch modes."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def dtype_name(tensor: Tensor) -> str:
    """`torch.float16` is float16."""
    return str(tensor.dtype).removeprefix("torch.")


def feature_axis(kind: str, dims: int) -> int:
    """Where a layer's features are: channels (axis 1) behind convolutions and in images, else the last axis."""
    return 1 if dims >= 4 or (dims > 1 and kind in ("conv", "batch-norm", "instance-norm")) else -1


def unit_axis(out: Tensor, after: str) -> int:
    """Where the units of an activation are: channels (axis 1) behind a convolution or in images, else the last axis."""
    return 1 if out.dim() >= 4 or (out.dim() == 3 and after == "conv") else -1


def aggregate(calls: Sequence[Call], row: Row) -> dict[str, float]:
    """The layer statistics of a step from its calls, as `_statistics.py` defines them."""

    def of(name: str) -> list[float]:
        return [call.value(name, row) for call in calls]

    size = sum(call.size for call in calls)
    bad, read_inputs = _total(of("nonfinite")), any("inputs" in call.places for call in calls)
    found = {
        "calls": float(len(calls)),
        "output_size": float(size),
        "output_nonfinite": bad,
        "output_rms": math.nan if bad else math.sqrt(_total(_squares(of("norm"))) / size) if size else math.nan,
        "output_mean": math.nan if bad else _weighted(of("mean"), calls),
        "output_min": math.nan if bad else _extreme(min, of("low")),
        "output_max": math.nan if bad else _extreme(max, of("high")),
        "output_std": math.nan if bad else _weighted(of("std"), calls),
        "output_zero_fraction": _weighted(of("zero"), calls),
        "input_nonfinite": _total(of("inputs")) if read_inputs or not bad else math.nan,
        "dead_fraction": _extreme(min, of("dead")),
        "saturation": _weighted(of("saturation"), calls),
        "activation_slope": math.sqrt(_weighted(_squares(of("slope")), calls)),
        "column_scale_ratio": _extreme(max, of("columns")),
        "row_similarity": _similarity(calls, row),
        "batch_statistics_gap": _finite(_weighted(of("batch_gap"), calls)),
        "distinct_values": _extreme(max, of("distinct")),
        "padding_fraction": _weighted(of("padding"), calls),
        "row_sum_min": _extreme(min, of("row_low")),
        "row_sum_max": _extreme(max, of("row_high")),
        "attention_entropy": _weighted(of("entropy"), calls),
        "attention_logit_max": _extreme(max, of("logit")),
    }
    if any(call.has_signal for call in calls):
        lost = _total(of("signal_nonfinite"))
        found["signal_nonfinite"] = lost
        found["signal_norm"] = math.nan if lost else math.sqrt(_total(_squares(of("signal_norm"))))
        found["signal_max"] = math.nan if lost else _extreme(max, of("signal_max"))
        nonzero = [call.value("signal_nonzero", row) / call.signal_looked_at for call in calls]
        found["signal_zero_fraction"] = 1 - _weighted(nonzero, calls)
    return found


def _similarity(calls: Sequence[Call], row: Row) -> float:
    """Mean cosine between two rows of the last call of which any were read."""
    last = next((call for call in reversed(calls) if "rows" in call.places), None)
    if last is None:
        return math.nan
    return mean_cosine(last.value("rows_squared", row), last.value("rows", row))


def mean_cosine(squared: float, count: float) -> float:
    """Mean cosine between two different ones of `count` directions whose sum has the squared length `squared`."""
    return (squared - count) / (count * (count - 1)) if count > 1 else math.nan


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _squares(values: list[float]) -> list[float]:
    return [value * value if abs(value) < 1e154 else math.inf if value == value else value for value in values]


def _present(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _total(values: list[float]) -> float:
    return sum(_present(values))


def _extreme(pick: Any, values: list[float]) -> float:
    return float(pick(_present(values), default=math.nan))


def _weighted(values: list[float], calls: Sequence[Call]) -> float:
    pairs = [(value, call.size) for value, call in zip(values, calls, strict=True) if not math.isnan(value)]
    weight = sum(size for _, size in pairs)
    return sum(value * size for value, size in pairs) / weight if weight else math.nan


def is_data(tensor: Tensor) -> bool:
    """Whether a tensor looks like it came from outside the model: it carries no gradient history."""
    return not tensor.requires_grad and tensor.grad_fn is None


def hookable(module: nn.Module) -> bool:
    """Whether a forward hook can be put on a module: scripted and compiled modules run outside Python."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return getattr(module, "_compiled_call_impl", None) is None and describe.is_layer(module)
