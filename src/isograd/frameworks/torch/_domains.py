"""Where an operation of the autograd graph has no finite value or no finite derivative, and how to say so.

What a node computed is taken from its saved tensors, or computed again from them. Nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from isograd.frameworks.torch._trace import LOSS_NODES, saved

Unary = Callable[[Tensor], Tensor]

_OF_OPERAND: dict[str, tuple[str, Unary, Unary]] = {
    "Log": ("log", torch.log, torch.reciprocal),
    "Log2": ("log2", torch.log2, torch.reciprocal),
    "Log10": ("log10", torch.log10, torch.reciprocal),
    "Log1P": ("log1p", torch.log1p, lambda x: 1 / (1 + x)),
    "Acos": ("acos", torch.acos, lambda x: (1 - x * x).rsqrt()),
    "Asin": ("asin", torch.asin, lambda x: (1 - x * x).rsqrt()),
    "Acosh": ("acosh", torch.acosh, lambda x: (x * x - 1).rsqrt()),
    "Atanh": ("atanh", torch.atanh, lambda x: 1 / (1 - x * x)),
    "Cosh": ("cosh", torch.cosh, torch.sinh),
    "Sinh": ("sinh", torch.sinh, torch.cosh),
    "Logit": ("logit", torch.logit, lambda x: 1 / (x * (1 - x)).clamp_min(0)),
    "Erfinv": ("erfinv", torch.erfinv, torch.erfinv),
    "Lgamma": ("lgamma", torch.lgamma, torch.digamma),
}
"""Operations that save their operand x: the function's name, f(x), and what is finite exactly where f'(x) is."""

_OF_RESULT: dict[str, tuple[str, Unary, Unary]] = {
    "Sqrt": ("sqrt", torch.square, torch.reciprocal),
    "Rsqrt": ("rsqrt", lambda y: y.square().reciprocal(), lambda y: y * y * y),
    "Reciprocal": ("division by", torch.reciprocal, torch.square),
    "Exp": ("exp", torch.log, lambda y: y),
    "Expm1": ("expm1", torch.log1p, lambda y: y),
}
"""Operations that save their result y only: the function's name, x from y, and what is finite exactly where f' is."""

_MASKED = frozenset({"Softmax", "LogSoftmax", "SafeSoftmax"})
_SPREADS = frozenset({"Std", "Var", "StdMean", "VarMean"})

_BATCH = {
    "Addmm": "mat1", "Mm": "self", "Bmm": "self", "Baddbmm": "batch1", "Convolution": "input",
    "NativeLayerNorm": "input", "NativeBatchNorm": "input", "NativeGroupNorm": "input",
}  # fmt: skip
"""Operations of layers and the operand that a batch enters by."""

CARRIERS = frozenset(
    {"Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Sigmoid", "Tanh", "Softplus", "Hardtanh", "Threshold", "Neg", "Abs",
     "View", "UnsafeView", "Reshape", "ReshapeAlias", "Permute", "Transpose", "T", "Squeeze", "Unsqueeze", "Expand",
     "Clone", "Alias", "Slice", "Select", "Split", "Unbind", "Unfold", "ToCopy", "NativeDropout", "Repeat", "Flip",
     "MaxPool2DWithIndices", "Clamp", "ClampMin", "ClampMax", "Roll", "ConstantPadNd", "Cat", "Stack", "Index",
     "Gather"}
)  # fmt: skip
"""Operations that make nothing non-finite of finite operands."""


# ---- values -------------------------------------------------------------------------------------------------------


def operands(node: Any, name: str) -> dict[int, Tensor]:
    """The operands of a node that can be read, by the edge of the graph that they came along."""
    names = _OPERANDS.get(name, ("self", "other"))
    found = {edge: saved(node, attribute) for edge, attribute in enumerate(names) if attribute}
    return {edge: tensor for edge, tensor in found.items() if tensor is not None and _is_real(tensor)}


_OPERANDS: dict[str, tuple[str, ...]] = {
    "Addmm": ("", "mat1", "mat2"), "Mm": ("self", "mat2"), "Bmm": ("self", "mat2"), "Mv": ("self", "vec"),
    "Baddbmm": ("", "batch1", "batch2"), "Convolution": ("input", "weight"), "MseLoss": ("self", "target"),
    "SmoothL1Loss": ("self", "target"), "HuberLoss": ("self", "target"), "L1Loss": ("self", "target"),
    "BinaryCrossEntropy": ("self", "target"), "BinaryCrossEntropyWithLogits": ("self", "target"),
    "KlDiv": ("self", "target"), "NativeLayerNorm": ("input", "weight"), "NativeBatchNorm": ("input", "weight"),
    "NativeGroupNorm": ("input", "weight"), "Lerp": ("self", "end"), "Addcmul": ("", "tensor1", "tensor2"),
    "Addcdiv": ("", "tensor1", "tensor2"),
    "ScaledDotProductFlashAttentionForCpu": ("query", "key", "value"),
}  # fmt: skip


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided


def result_of(node: Any, name: str, known: dict[int, Tensor]) -> Tensor | None:
    """What the node computed, where it was saved or follows from the operands `known`."""
    result = saved(node, "result", "output", "result0")
    if result is not None and _is_real(result):
        return result
    x, other = known.get(0), known.get(1)
    if name in _OF_OPERAND and x is not None:
        return _OF_OPERAND[name][1](x)
    if name == "Pow" and x is not None:
        return x.pow(node._saved_exponent)
    if name in ("Div", "Mul") and x is not None and other is not None:
        return x / other if name == "Div" else x * other
    if name == "Div" and other is not None:
        # Whatever the dividend, it is not finite where this is not.
        return other.reciprocal().expand(shape_of(node))
    if name == "NanToNum" and x is not None:
        return torch.zeros_like(x)
    if name.startswith("Clamp") and x is not None:
        return _clamped(node, x)
    return _of_too_few(node, name, x)


def _clamped(node: Any, x: Tensor) -> Tensor | None:
    low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    if low is None and high is None:
        return None
    return x.clamp(low, high)


def _of_too_few(node: Any, name: str, x: Tensor | None) -> Tensor | None:
    """NaN from a spread of one value or a mean over nothing, which save no result."""
    nothing = (
        (name in _SPREADS and x is not None and _num_reduced(node, x) <= _correction(node))
        or (name == "Mean" and node._saved_self_sym_numel == 0)
        or (name in ("NllLoss", "NllLoss2D") and _reduces_nothing(node))
    )
    return torch.full(shape_of(node), math.nan) if nothing else None


def shape_of(node: Any) -> list[int]:
    """The shape of what a node made."""
    return [int(size) for size in node._input_metadata[0].shape]


def _num_reduced(node: Any, x: Tensor) -> int:
    return math.prod(x.shape[dim if dim < x.dim() else dim - 2**64] for dim in node._saved_dim or range(x.dim()))


def _correction(node: Any) -> float:
    correction = node._saved_correction
    return 1.0 if correction is None else float(correction)


def _reduces_nothing(node: Any) -> bool:
    mean_over_targets = 1  # the reduction's number in torch
    total = saved(node, "total_weight")
    return node._saved_reduction == mean_over_targets and total is not None and not float(total)


def bad_entries(name: str, result: Tensor) -> Tensor:
    """Which entries of a result should not be. The logarithm of a masked softmax is -inf and meant to be."""
    return torch.isnan(result) if name in _MASKED or name.startswith("ScaledDot") else ~torch.isfinite(result)


def batch_edge(name: str) -> int | None:
    """The edge by which a batch enters a layer's operation; None for all others."""
    attribute = _BATCH.get(name)
    return None if attribute is None else _OPERANDS[name].index(attribute)


def is_target(name: str, edge: int) -> bool:
    """Whether the operand is what a loss compares with."""
    return name in LOSS_NODES and edge == 1


# ---- derivatives ------------------------------------------------------------------------------------------------


def slope(node: Any, name: str) -> Tensor | None:
    """Finite exactly where the operation's derivative is; None for operations that have one everywhere."""
    known = operands(node, name)
    x, other = known.get(0), known.get(1)
    if name in _OF_OPERAND:
        return None if x is None else _OF_OPERAND[name][2](x)
    if name in _OF_RESULT:
        y = saved(node, "result")
        return None if y is None else _OF_RESULT[name][2](y)
    if name == "Pow":
        return None if x is None else _power_slope(x, node._saved_exponent)
    if name == "Div" and other is not None:
        # d(x / y) is dx / y - x dy / y^2, the latter only where y is differentiated, and then x is saved as well.
        return (1 / other if x is None else (1 / other).abs() + (x / other / other).abs()).expand(shape_of(node))
    if name == "Hypot":
        y = saved(node, "result")
        return None if x is None or y is None else x / y
    return None


def _power_slope(x: Tensor, exponent: Any) -> Tensor | None:
    if isinstance(exponent, Tensor):
        steep = exponent * x.pow(exponent - 1)
        return torch.where(exponent == 0, torch.zeros_like(steep), steep)
    return exponent * x.pow(exponent - 1) if exponent < 1 and exponent else None


_SINGULAR = frozenset({*_OF_OPERAND, *_OF_RESULT, "Pow", "Div", "Hypot"})


def may_be_singular(node: Any, name: str) -> bool:
    """Whether the operation's derivative is infinite somewhere, told without reading a tensor."""
    if name == "Pow":
        exponent = node._saved_exponent
        return isinstance(exponent, Tensor) or bool(exponent < 1 and exponent)
    return name in _SINGULAR


# ---- words --------------------------------------------------------------------------------------------------------


def offending_value(node: Any, name: str, bad: Tensor) -> float | None:
    """The operand at the first entry of `bad`: the value that did it."""
    known = operands(node, name)
    source = known.get(1 if name == "Div" else 0)
    if name in _OF_RESULT:
        y = saved(node, "result")
        source = None if y is None else _OF_RESULT[name][1](y)
    if source is None or name not in _SINGULAR or not bad.any():
        return None
    value = float(source.expand(bad.shape)[bad][0])
    return value + 0.0 if math.isfinite(value) else None  # -0 is 0


def reason(node: Any, name: str, value: float | None) -> str:
    """What was computed that has no finite value, in a few words: "log of 0"."""
    if name in ("Div", "Reciprocal"):
        return "division by a value too small" if value else "division by 0"
    if name in ("Exp", "Expm1"):
        return f"{name.lower()} of more than {math.log(torch.finfo(_dtype(node)).max):.3g}"
    if name in ("Sqrt", "Rsqrt"):
        return f"{name.lower()} of {'a negative number' if value is None else f'{value:.3g}'}"
    if name == "Pow" and value is not None:
        return f"{value:.3g} to the power of {_exponent(node)}"
    if name in _OF_OPERAND:
        return f"{_OF_OPERAND[name][0]} of {'a value out of range' if value is None else f'{value:.3g}'}"
    if name in _SPREADS:
        return f"{'standard deviation' if name.startswith('Std') else 'variance'} of fewer than two values"
    if name == "Mean":
        return "mean over 0 entries"
    if name.startswith("NllLoss"):
        return "mean over 0 targets, all others ignored"
    if name in _MASKED or name.startswith("ScaledDot"):
        return "softmax of an infinite entry" if not _is_masked(node) else "softmax over a fully masked row"
    return "overflow"


def slope_reason(node: Any, name: str, value: float | None) -> str:
    """Where there is no finite derivative, in a few words: "no finite derivative of sqrt(0)"."""
    function = (_OF_OPERAND.get(name) or _OF_RESULT.get(name) or (name.lower(),))[0]
    at = "" if value is None else f"{value:.3g}"
    if name in ("Div", "Reciprocal"):
        what = f"a division by {at or 0}"
    elif name == "Pow":
        what = f"{at or 'a value'} ** {_exponent(node)}"
    elif name in ("Sqrt", "Rsqrt"):
        what = f"{function}({at or 'a negative number'})"
    else:
        what = f"{function}({at})" if at else function
    return f"no finite derivative of {what}"


def _exponent(node: Any) -> str:
    exponent = node._saved_exponent
    return "a tensor" if isinstance(exponent, Tensor) else f"{exponent:.3g}"


def _dtype(node: Any) -> torch.dtype:
    result = saved(node, "result")
    return torch.float32 if result is None else result.dtype


def _is_masked(node: Any) -> bool:
    """Whether a mask was applied shortly before a softmax."""
    if str(node.name()).startswith("ScaledDot"):
        return saved(node, "attn_mask", "attn_bias") is not None
    return any(name in ("MaskedFill", "Where", "Baddbmm", "Add") for name in _names_below(node))


def _names_below(node: Any) -> Iterator[str]:
    for _ in range(6):
        node = next((below for below, _ in node.next_functions if below is not None), None)
        if node is None:
            return
        yield str(node.name()).split("Backward")[0]
