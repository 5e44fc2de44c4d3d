"""How far an optimizer is about to move the weights, from samples of its state: known before it does so.

Update norms rise before losses and gradient norms do where the second moment lags behind (Molybog et al. 2023,
arXiv:2304.09871; Wortsman et al. 2023, arXiv:2304.13013).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SAMPLE = 256
"""Entries of a tensor that are looked at, evenly spaced: of N tensors the norm of all is then known to about
1/sqrt(512 N) of itself for entries of one size, and to the factor by which a window's steps differ for others."""

_Group = Mapping[str, Any]
_Samples = dict[str, Tensor]


def predicted_update(optimizer: Optimizer) -> Tensor | None:
    """L2 norm [] of the update that `step` would make now, decoupled weight decay left out; None for optimizers whose
    formula is not known here (SGD, Adam, AdamW, NAdam, RMSprop and Adagrad are) and where there is no state yet. NaN
    where state that was looked at is not finite: an infinite second moment makes an update of 0, for ever.

    What the optimizer keeps on the device stays there: nothing waits for it.
    """
    if type(optimizer) not in _FORMULAS:
        return None
    squares = [square for group in optimizer.param_groups if (square := _squared(optimizer, group)) is not None]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt().float() if squares else None


def _squared(optimizer: Optimizer, group: dict[str, Any]) -> Tensor | None:
    """The squared norm of a group's update."""
    needed, update = _FORMULAS[type(optimizer)]
    held = [p for p in group["params"] if _is_plain(p) and all(key in optimizer.state.get(p, {}) for key in needed)]
    if not held:
        return None
    states = [optimizer.state.get(p, {}) for p in held]
    keys = [key for key in _SAMPLED if all(isinstance(state.get(key), Tensor) for state in states)]
    some = {key: _sampled([state[key] for state in states]) for key in keys}
    gradient = _sampled([p.grad for p in held])
    scale = getattr(optimizer, "grad_scale", None)
    if isinstance(scale, Tensor):
        gradient = gradient / scale
    if group.get("weight_decay") and not _is_decoupled(optimizer, group):
        gradient = gradient + float(group["weight_decay"]) * _sampled([p.detach() for p in held])
    way = update(gradient, some, group, states[0]) * group["lr"]
    for values in some.values():
        way = way + 0 * values
    return _whole_square(way, held)


def _whole_square(way: Tensor, parameters: list[Tensor]) -> Tensor:
    """The squared norm of what `way` holds `SAMPLE` entries a tensor of."""
    lengths = [min(SAMPLE, parameter.numel()) for parameter in parameters]
    # Squares of what is finite must not overflow; some accelerators know no float64.
    precise = torch.float32 if way.device.type == "mps" else torch.float64
    parts = torch.stack(torch._foreach_norm(list(torch.split(way, lengths)), 2, dtype=precise))
    shares = [parameter.numel() / length for parameter, length in zip(parameters, lengths, strict=True)]
    return torch.stack(torch._foreach_mul(list(parts.square().unbind()), shares)).sum()


def _is_plain(parameter: Tensor) -> bool:
    gradient = parameter.grad
    return (
        gradient is not None
        and parameter.numel() > 0
        and gradient.layout == torch.strided
        and not parameter.is_complex()
        and not hasattr(parameter, "_local_tensor")
    )


def _sampled(tensors: list[Any]) -> Tensor:
    return torch.cat([_some(tensor.detach().reshape(-1)) for tensor in tensors]).float()


def _some(flat: Tensor) -> Tensor:
    if flat.numel() <= SAMPLE:
        return flat
    stride = flat.numel() // SAMPLE
    return flat[: stride * SAMPLE : stride]


def _is_decoupled(optimizer: Optimizer, group: _Group) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))


# ---- what one step of each adds up to, in units of the learning rate ------------------------------------------------


def _sgd(g: Tensor, some: _Samples, group: _Group, state: Mapping[str, Any]) -> Tensor:
    buffer, momentum = some.get("momentum_buffer"), float(group["momentum"])
    if buffer is None or not momentum:
        return g * (1 + momentum) if group["nesterov"] else g  # the first step fills the buffer with the gradient
    moved = momentum * buffer + (1 - float(group["dampening"])) * g
    return g + momentum * moved if group["nesterov"] else moved


def _adam(g: Tensor, some: _Samples, group: _Group, state: Mapping[str, Any]) -> Any:
    first, second, steps = _moments(g, some, group, state)
    return first / (1 - float(group["betas"][0]) ** steps) / second


def _nadam(g: Tensor, some: _Samples, group: _Group, state: Mapping[str, Any]) -> Any:
    first, second, steps = _moments(g, some, group, state)
    beta, decay = float(group["betas"][0]), float(group["momentum_decay"])
    now, following = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (steps, steps + 1))
    product = state["mu_product"] * now
    return (g * (1 - now) / (1 - product) + first * following / (1 - product * following)) / second


def _moments(g: Tensor, some: _Samples, group: _Group, state: Mapping[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """(first moment, denominator, number of the step) after this gradient (Kingma & Ba 2015)."""
    (first, second), steps = (float(beta) for beta in group["betas"]), state["step"] + 1
    mean = some["exp_avg"].lerp(g, 1 - first)
    square = some["exp_avg_sq"] * second + (1 - second) * g * g
    if group.get("amsgrad"):
        square = torch.maximum(square, some["max_exp_avg_sq"])
    return mean, (square / (1 - second**steps)).sqrt() + float(group["eps"]), steps


def _rmsprop(g: Tensor, some: _Samples, group: _Group, state: Mapping[str, Any]) -> Tensor:
    alpha = float(group["alpha"])
    square = some["square_avg"] * alpha + (1 - alpha) * g * g
    if group["centered"]:
        square = square - some["grad_avg"].lerp(g, 1 - alpha).square()
    way = g / (square.sqrt() + float(group["eps"]))
    return float(group["momentum"]) * some["momentum_buffer"] + way if group["momentum"] else way


def _adagrad(g: Tensor, some: _Samples, group: _Group, state: Mapping[str, Any]) -> Any:
    return g / (1 + state["step"] * float(group["lr_decay"])) / ((some["sum"] + g * g).sqrt() + float(group["eps"]))


_SAMPLED = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum")

_FORMULAS: dict[type[Optimizer], tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    torch.optim.SGD: ((), _sgd),
    torch.optim.Adam: (("exp_avg", "exp_avg_sq"), _adam),
    torch.optim.AdamW: (("exp_avg", "exp_avg_sq"), _adam),
    torch.optim.NAdam: (("exp_avg", "exp_avg_sq"), _nadam),
    torch.optim.RMSprop: (("square_avg",), _rmsprop),
    torch.optim.Adagrad: (("sum",), _adagrad),
}
"""What must be there for a formula to hold, and the formula."""
