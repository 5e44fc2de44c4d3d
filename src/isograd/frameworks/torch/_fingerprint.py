"""What a capsule knows of a gradient, and a replay compares with its own: its norm and a hash of its bytes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from isograd.frameworks.torch._notes import storable


def fingerprint(gradient: Tensor) -> tuple[float, str]:
    """(L2 norm, summed in float64; blake2b of 16 bytes, in hex) of a gradient; of a sparse one in its dense form."""
    dense = gradient.detach()
    held = storable(dense if dense.layout == torch.strided else dense.to_dense())
    real = held if held.is_floating_point() else held.double()
    norm = float(torch.linalg.vector_norm(real.to(torch.float64))) if held.numel() else 0.0
    raw: Any = held.reshape(-1).view(torch.uint8).numpy()
    return norm, hashlib.blake2b(raw, digest_size=16).hexdigest()
