"""The plain dense tensors that a tensor consists of: shards of a `DTensor`, quantized codes and their scales, sparse
indices and their values, an expanded tensor without its repetitions; and how to make it of them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def pieces(tensor: Tensor) -> list[Tensor]:
    """The plain dense tensors that hold a tensor's entries; none where it has no memory yet."""
    if is_lazy(tensor) or tensor.device.type == "meta":
        return []
    if consists(tensor):
        return [piece for _, part in _parts(tensor) if isinstance(part, Tensor) for piece in pieces(part)]
    plain = tensor.detach()
    if plain.layout == torch.sparse_coo:
        return [plain._indices(), plain._values()]
    if plain.layout in _COMPRESSED:
        return [*(getattr(plain, name)() for name in _COMPRESSED[plain.layout]), plain.values()]
    return [plain if is_whole(plain) else _core(plain)]


def _core(tensor: Tensor) -> Tensor:
    """An expanded tensor without its repetitions, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def is_whole(tensor: Tensor) -> bool:
    """Whether each entry has a place of its own."""
    return tensor.is_contiguous() or all(
        stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    )


def address(piece: Tensor) -> tuple[Any, ...]:
    """What tensors that share all of their memory have in common."""
    pointer = piece.data_ptr() if piece.numel() else 0
    if not pointer:
        return (id(piece),)
    return (pointer, piece.shape, piece.stride(), piece.dtype, piece.device, piece.is_conj(), piece.is_neg())


def consists(tensor: Tensor) -> bool:
    """Whether it consists of other tensors, by torch's own protocol."""
    return type(tensor) not in _PLAIN and bool(_python_dispatch.is_traceable_wrapper_subclass(tensor))


_PLAIN = (Tensor, nn.Parameter)


def _parts(tensor: Any) -> list[tuple[str, Any]]:
    """What it consists of, by name: tensors, and in a `DTensor` its mesh."""
    return [(name, getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]


Maker = Callable[[list[Tensor]], Tensor]
"""How to make a tensor of its pieces."""


def maker(tensor: Tensor) -> Maker:
    """How to make such a tensor of its pieces. Holds nothing of the tensor itself."""
    shape, layout = tensor.shape, tensor.layout
    if consists(tensor):
        return _wrapper_maker(tensor)
    if layout == torch.sparse_coo:
        is_coalesced = tensor.is_coalesced()
        return lambda made: torch.sparse_coo_tensor(made[0], made[1], shape, is_coalesced=is_coalesced)
    if layout in _COMPRESSED:
        return lambda made: torch.sparse_compressed_tensor(made[0], made[1], made[2], shape, layout=layout)
    if isinstance(tensor, nn.Parameter):
        return trainable if tensor.requires_grad else frozen
    return itself if is_whole(tensor) else lambda made: made[0].expand(shape)


# Most tensors are made in one of these ways: a function for each would be thousands of objects for every snapshot.


def itself(made: list[Tensor]) -> Tensor:
    """A plain tensor is its only piece."""
    return made[0]


def trainable(made: list[Tensor]) -> Tensor:
    """A parameter."""
    return nn.Parameter(made[0])


def frozen(made: list[Tensor]) -> Tensor:
    """A parameter that is not trained."""
    return nn.Parameter(made[0], requires_grad=False)


def _wrapper_maker(tensor: Any) -> Maker:
    cls, size, stride = type(tensor), tensor.size(), tensor.stride()
    _, context = tensor.__tensor_flatten__()
    parts = _parts(tensor)
    others = {name: part for name, part in parts if not isinstance(part, Tensor)}
    inner = [(name, len(pieces(part)), maker(part)) for name, part in parts if isinstance(part, Tensor)]

    def make(made: list[Tensor]) -> Tensor:
        rest = iter(made)
        tensors = {name: remake([next(rest) for _ in range(count)]) for name, count, remake in inner}
        remade: Tensor = cls.__tensor_unflatten__(others | tensors, context, size, stride)
        return remade

    return make
