"""The largest eigenvalue of a Hessian by products with vectors: the Hessian itself is never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

Vector = list[Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """`error`: relative, from the residual of the last iteration. `products`: products with the matrix."""

    value: float
    error: float
    products: int


def largest_eigenvalue(
    product: Callable[[Vector], Vector], start: Vector, *, most: int = 24, tolerance: float = 2e-2
) -> Eigenvalue:
    """The largest (most positive) eigenvalue of a symmetric operator, by Lanczos' iteration with three vectors.

    Power iteration in the space of all its iterates (Golub & Van Loan, Matrix Computations, 10.1): it needs no shift
    where the largest absolute eigenvalue is negative. Without reorthogonalization copies of converged eigenvalues
    appear, which leave the largest one as it is. Stops when the residual is below `tolerance`, or after `most`.
    """
    norm = _norm(start)
    before, vector = [torch.zeros_like(v) for v in start], [v / norm for v in start]
    diagonal: list[float] = []
    beside: list[float] = []
    for count in range(1, most + 1):
        image = product(vector)
        diagonal.append(_dot(image, vector))
        last = beside[-1] if beside else 0.0
        image = [i - diagonal[-1] * v - last * b for i, v, b in zip(image, vector, before, strict=True)]
        beside.append(_norm(image))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1))
        error = beside[-1] * abs(float(vectors[-1, -1])) / max(abs(float(values[-1])), 1e-300)
        if error < tolerance or not beside[-1] > 0 or not math.isfinite(beside[-1]) or count == most:
            break
        before, vector = vector, [i / beside[-1] for i in image]
    return Eigenvalue(float(values[-1]), error, count)


def hessian_product(
    loss: Tensor, parameters: Sequence[Tensor], scale: Sequence[Tensor] | None = None
) -> Callable[[Vector], Vector]:
    """v -> S H S v with the Hessian H of `loss` and a diagonal S (the identity by default); keeps the loss's graph."""
    gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    used = [(g, i) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(vector: Vector) -> Vector:
        scaled = vector if scale is None else [s * v for s, v in zip(scale, vector, strict=True)]
        if not used:
            return [torch.zeros_like(v) for v in vector]
        found: Sequence[Tensor | None] = torch.autograd.grad(
            [g for g, _ in used], parameters, [scaled[i] for _, i in used], retain_graph=True, allow_unused=True
        )
        image = [torch.zeros_like(p) if f is None else f.detach() for f, p in zip(found, parameters, strict=True)]
        return image if scale is None else [s * i for s, i in zip(scale, image, strict=True)]

    return product


def adam_scale(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """P^(-1/2) for Adam's preconditioner P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + epsilon) after its last step.

    Of an optimizer that has not stepped, the preconditioner that it would settle at on this batch: |g| + epsilon.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        group, state = groups.get(id(parameter), optimizer.defaults), optimizer.state.get(parameter, {})
        root, correction = gradient.abs(), 1.0
        if "exp_avg_sq" in state:
            beta1, beta2 = (float(beta) for beta in group["betas"])
            step = float(state["step"])
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt()
            correction = 1 - beta1**step
        scales.append((correction * (root + float(group.get("eps", 1e-8)))).rsqrt())
    return scales


def _dot(left: Vector, right: Vector) -> float:
    return float(
        sum(torch.dot(a.flatten().double(), b.flatten().double()).cpu() for a, b in zip(left, right, strict=True))
    )


def _norm(vector: Vector) -> float:
    return math.sqrt(_dot(vector, vector))
