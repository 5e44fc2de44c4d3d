"""Why an operation gave a value that is not finite, in a few words: "log of 0", "exp of 712", "0 divided by 0".

What is looked at is the call as the dispatcher saw it: its name, its operands, and which entries of its result are not
finite. The same words do for a forward pass and, operation by operation, for a derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_FUNCTIONS = frozenset(
    {"log", "log2", "log10", "log1p", "sqrt", "rsqrt", "exp", "exp2", "expm1", "acos", "asin", "acosh", "atanh",
     "cosh", "sinh", "tan", "logit", "erfinv", "lgamma", "digamma", "special_ndtri", "special_entr", "polygamma"}
)  # fmt: skip
"""Functions of one operand that are not defined everywhere, or overflow."""

_SOFTMAX = frozenset(
    {"_softmax", "_log_softmax", "logsumexp", "_scaled_dot_product_flash_attention_for_cpu",
     "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
     "_scaled_dot_product_cudnn_attention", "_softmax_backward_data", "_log_softmax_backward_data"}
)  # fmt: skip

NAMES = {
    "_softmax": "softmax", "_log_softmax": "log_softmax", "_to_copy": "conversion", "native_layer_norm": "layer_norm",
    "native_batch_norm": "batch_norm", "_native_batch_norm_legit": "batch_norm", "native_group_norm": "group_norm",
    "nll_loss_forward": "nll_loss", "nll_loss2d_forward": "nll_loss", "linalg_vector_norm": "vector_norm",
    "true_divide": "div", "_euclidean_dist": "cdist", "_cdist_forward": "cdist", "cudnn_batch_norm": "batch_norm",
    "_batch_norm_with_update": "batch_norm", "_batch_norm_no_update": "batch_norm", "_fused_rms_norm": "rms_norm",
    "_scaled_dot_product_flash_attention_for_cpu": "scaled_dot_product_attention",
}  # fmt: skip
"""What users know operations as, where torch's dispatcher has another name for them."""


def name_of(function: Any) -> str:
    """`aten::log_.default` is "log"."""
    bare = str(function._schema.name).rsplit("::", 1)[-1]
    return bare.rstrip("_") or bare


def is_softmax(name: str) -> bool:
    """Whether the operation makes NaN of a row that is masked altogether."""
    return name in _SOFTMAX


def reason(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str:
    """In a few words why entries `bad` of `result` are not finite. `given`: the arguments by their names."""
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    for words in (_SPECIAL.get(name), _of_function if name in _FUNCTIONS else None):
        said = None if words is None else words(name, given, result, bad)
        if said:
            return said
    shown = NAMES.get(name, name)
    if any(_is_bad(tensor) for tensor in tensors):
        return f"{shown} of operands that hold {_kinds(tensors)}"
    if is_softmax(name):
        return f"{shown} over nothing"
    if not _is_bad(result):
        return shown
    made_inf = bool(torch.isinf(result).any())
    largest = torch.finfo(result.dtype).max if result.dtype.is_floating_point else math.inf
    if made_inf or name in _SUMMING:
        return f"{shown} beyond {largest:.3g}, the largest value of {dtype_name(result)}"
    return f"{shown} of finite values"


def dtype_name(tensor: Tensor) -> str:
    """`float32`, without the module's name."""
    return str(tensor.dtype).removeprefix("torch.")


def _kinds(tensors: list[Tensor]) -> str:
    found = {kind for tensor in tensors for kind in kinds(tensor)}
    return " and ".join(kind for kind in ("NaN", "inf", "-inf") if kind in found)


def kinds(tensor: Tensor) -> list[str]:
    """Which of NaN, inf and -inf a tensor holds."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return []
    if tensor.is_complex():
        return [*kinds(tensor.real), *(kind for kind in kinds(tensor.imag) if kind not in kinds(tensor.real))]
    tests = {"NaN": torch.isnan(tensor), "inf": tensor == math.inf, "-inf": tensor == -math.inf}
    return [kind for kind, found in tests.items() if bool(found.any())]


_SUMMING = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "sum", "mul", "add", "cumsum", "matmul", "dot"})
"""Operations that are NaN of finite operands only by overflowing on the way."""


def _is_bad(value: Any) -> bool:
    return bool(kinds(value)) if isinstance(value, Tensor) else False


# ---- operations with words of their own ------------------------------------------------------------------------------


def _at(value: Any, bad: Tensor) -> float | None:
    """An operand at the first bad entry of the result."""
    if not isinstance(value, Tensor):
        return float(value) if isinstance(value, (int, float)) else None
    if value.is_complex() or not bad.any():
        return None
    try:
        return float(value.expand(bad.shape)[bad][0]) + 0.0  # -0 is 0
    except RuntimeError:
        return None


def _of_function(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    value = _at(next(iter(given.values()), None), bad)
    if value is None:
        return None
    if name == "logit" and given.get("eps") is None and value not in (0.0, 1.0):
        return f"logit of {value:.9g}, outside 0 to 1"
    return f"{name} of {_shown(value)}"


def _shown(value: float) -> str:
    """Enough digits to tell 1 from what is just beyond it."""
    return f"{value:.4g}" if abs(abs(value) - 1) > 1e-3 or abs(value) == 1 else f"{value:.9g}"


def _of_division(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    over, under = _at(given.get("self"), bad), _at(given.get("other"), bad)
    if name == "reciprocal":
        over, under = 1.0, over
    if over is None or under is None:
        return None
    if under == 0:
        return "0 divided by 0" if over == 0 else "division by 0"
    return f"{over:.4g} divided by {under:.4g}"


def _of_power(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    base, exponent = _at(given.get("self"), bad), _at(given.get("exponent"), bad)
    if base is None or exponent is None:
        return None
    return f"{_shown(base)} to the power of {exponent:.4g}"


def _of_pair(sign: str) -> Callable[[str, Mapping[str, Any], Tensor, Tensor], str | None]:
    def words(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
        first, second = _at(given.get("self"), bad), _at(given.get("other"), bad)
        if first is None or second is None or bool(torch.isinf(result[bad][:1]).any()):
            return None
        return f"{first:.4g} {sign} {second:.4g}"

    return words


def _of_conversion(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    value = _at(given.get("src", given.get("self")), bad)
    if value is None or not result.dtype.is_floating_point:
        return None
    return f"{value:.4g} in {dtype_name(result)}, which holds at most {torch.finfo(result.dtype).max:.4g}"


def _of_softmax(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    entering = next((value for value in given.values() if isinstance(value, Tensor)), None)
    if entering is None or "backward" in name:
        return None
    if "inf" in kinds(entering):
        return f"{NAMES.get(name, name)} of an infinite entry"
    return f"{NAMES.get(name, name)} over a row that is all -inf (fully masked)" if _is_bad(entering) else None


def _of_spread(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    entering, what = given.get("self"), "standard deviation" if name.startswith("std") else "variance"
    if not isinstance(entering, Tensor) or not entering.numel():
        return f"{what} of no value"
    num_each = entering.numel() // max(1, result.numel())
    return f"{what} of {num_each} value" if num_each <= 1 else None


def _of_mean(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    entering = given.get("self")
    return "mean over 0 values" if isinstance(entering, Tensor) and not entering.numel() else None


def _of_likelihood(name: str, given: Mapping[str, Any], result: Tensor, bad: Tensor) -> str | None:
    target, ignored = given.get("target"), given.get("ignore_index")
    if not isinstance(target, Tensor) or ignored is None or bool(torch.ne(target, ignored).any()):
        return None
    return "mean over 0 targets, all others ignored"


_SPECIAL: Mapping[str, Callable[[str, Mapping[str, Any], Tensor, Tensor], str | None]] = {
    **dict.fromkeys(("div", "true_divide", "reciprocal"), _of_division),
    "pow": _of_power,
    "mul": _of_pair("times"),
    "sub": _of_pair("minus"),
    "add": _of_pair("plus"),
    **dict.fromkeys(("_to_copy", "copy"), _of_conversion),
    **dict.fromkeys(_SOFTMAX, _of_softmax),
    **dict.fromkeys(("std", "var", "std_mean", "var_mean"), _of_spread),
    "mean": _of_mean,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _of_likelihood),
}
