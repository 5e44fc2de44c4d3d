"""Which layers and which rows of a batch a gradient comes from: shares of its squared norm.

A row's share is exact for the weights of linear layers, whose gradient is a sum over rows of outer products: of a row
with inputs a_t and gradients d_t at times t it is sum_t d_t a_t^T, and its squared norm sum_ts (a_t . a_s)(d_t . d_s)
(Goodfellow 2015, arXiv:1510.01799, for one time). Without linear layers over the batch, rows are compared by the
gradient with respect to what the model returned for them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isograd._replay import Contribution

SHOWN = 16
"""Layers and rows that are told."""

TIMES = 1024
"""Time steps of a row up to which its products are compared pair by pair."""


def layer_shares(grad_norms: Mapping[str, float], usual: Mapping[str, float]) -> tuple[Contribution, ...]:
    """Modules by their share of the squared gradient norm, largest first; `usual`: the median norm by parameter."""
    squares: dict[str, float] = {}
    medians: dict[str, float] = {}
    for name, norm in grad_norms.items():
        layer = name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + norm * norm
        medians[layer] = medians.get(layer, 0.0) + usual.get(name, math.nan) ** 2
    total = sum(squares.values())
    if not 0 < total < math.inf:
        return ()
    found = [
        Contribution(name=layer, share=square / total, norm=math.sqrt(square), usual=math.sqrt(medians[layer]))
        for layer, square in squares.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.share)[:SHOWN])


class RowShares:
    """Listens to one forward and backward pass of `roots` over a batch of `num_rows` rows; of several micro-batches,
    rows with the same number are taken together. `scale`: what the loss is multiplied by.
    """

    def __init__(self, roots: Mapping[str, nn.Module], num_rows: int, *, scale: float = 1.0) -> None:
        self._roots, self._num_rows, self._scale = roots, num_rows, scale
        self._layers: Tensor | None = None
        self._outputs: Tensor | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, the passes are heard. Modules that are compiled or scripted tell nothing."""
        handles = []
        for root in self._roots.values():
            handles.append(root.register_forward_hook(self._heard_output))
            linear = [m for m in root.modules() if type(m) is nn.Linear and m.weight.requires_grad]
            handles += [module.register_forward_hook(self._heard_linear) for module in linear]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shares(self) -> tuple[Contribution, ...]:
        """The rows that contribute most, largest first; empty where nothing was heard, or it is not finite."""
        squares = self._outputs if self._layers is None else self._layers
        total = 0.0 if squares is None else float(squares.sum())
        if squares is None or not 0 < total < math.inf:
            return ()
        order = squares.argsort(descending=True)[:SHOWN].tolist()
        rows = [(index, float(squares[index])) for index in order]
        return tuple(
            Contribution(name=f"row {i}", share=s / total, norm=math.sqrt(s) / self._scale) for i, s in rows if s > 0
        )

    def _heard_linear(self, module: nn.Module, args: Any, output: Any) -> None:
        entering = args[0] if args else None
        if (
            isinstance(entering, Tensor)
            and isinstance(output, Tensor)
            and output.requires_grad
            and self._is_rows(output)
        ):
            a = entering.detach()
            has_bias = module.bias is not None
            _on_gradient(output, lambda d: self._add_layer(a, d, has_bias=has_bias))

    def _heard_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and self._is_rows(output):
            _on_gradient(output, self._add_output)

    def _is_rows(self, tensor: Tensor) -> bool:
        return tensor.dim() > 1 and len(tensor) % self._num_rows == 0 and torch._C._current_graph_task_id() == -1

    def _add_output(self, gradient: Tensor) -> None:
        found = gradient.detach().double().reshape(self._num_rows, -1).square().sum(1)
        self._outputs = found if self._outputs is None else self._outputs + found

    def _add_layer(self, a: Tensor, d: Tensor, *, has_bias: bool) -> None:
        with torch.no_grad():
            inputs = a.double().reshape(self._num_rows, -1, a.shape[-1])
            deltas = d.detach().double().reshape(self._num_rows, -1, d.shape[-1])
            found = torch.stack([_square(x, y, has_bias) for x, y in zip(inputs, deltas, strict=True)])
            self._layers = found if self._layers is None else self._layers + found


def _on_gradient(tensor: Any, hear: Callable[[Tensor], None]) -> None:
    tensor.register_hook(hear)


def _square(inputs: Tensor, deltas: Tensor, has_bias: bool) -> Tensor:
    """Squared norm of one row's gradient in weight [o, i] and bias [o]; `inputs` [T, i], `deltas` [T, o]."""
    if len(inputs) <= TIMES:
        weight = ((inputs @ inputs.T) * (deltas @ deltas.T)).sum()
    else:
        weight = (deltas.T @ inputs).square().sum()
    return weight + deltas.sum(0).square().sum() if has_bias else weight
