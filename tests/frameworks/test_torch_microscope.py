"""The first operation of a step that made a non-finite value: which, where, of what, in which rows."""

import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from isograd.frameworks.torch._microscope import Microscope

ROWS = 16


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def batch():
    """Row 3 is all zeros."""
    x = torch.randn(ROWS, 4)
    x[3] = 0
    return x


def look(model, step, *tensors, num_rows=ROWS):
    """What the microscope says of one forward and backward pass."""
    microscope = Microscope({"": model}, batch=tensors, num_rows=num_rows)
    with microscope:
        loss = step(model, *tensors)
        if loss.requires_grad:
            loss.backward()
    return microscope.explain(loss, [p.grad for p in model.parameters() if p.grad is not None])


def line_in(program):
    lines, first = inspect.getsourcelines(program)
    (line,) = (first + index for index, text in enumerate(lines) if text.rstrip().endswith("# here"))
    return line


class Layers(nn.Module):
    """A linear layer under a name, and whatever stands behind it."""

    def __init__(self, behind, size=4):
        super().__init__()
        self.inner = nn.ModuleDict({"linear": nn.Linear(4, size, bias=False)})
        self.behind = behind

    def forward(self, x):
        return self.behind(self.inner["linear"](x))


# ---- operations of the forward pass -------------------------------------------------------------------------------


def log_of_zero(model, x):
    y = F.relu(model(x))
    return y.log().mean()  # here


def zero_by_zero(model, x):
    size = x.abs().sum(1, keepdim=True)
    return (x * model(x) / size).mean()  # here


def exp_overflow(model, x):
    y = model(x) * 1e4
    return y.exp().mean()  # here


def masked_softmax(model, x):
    scores = model(x).masked_fill((x == 0).all(1, keepdim=True), -math.inf)
    return scores.softmax(1).square().mean()  # here


def masked_by_a_constant(model, x):
    mask = torch.zeros(ROWS, 1)
    mask[3] = -math.inf
    scores = model(x) + mask
    return F.log_softmax(scores, 1).exp().mean()  # here


def spread_of_one(model, x):
    y = model(x)[:1]
    return y.std(0).mean()  # here


def mean_of_nothing(model, x):
    y = model(x)
    return y[y > 1e9].mean()  # here


def square_root_of_less(model, x):
    y = model(x).abs()
    return (y - 1e-3).sqrt().sum()  # here


def acos_beyond_one(model, x):
    y = model(x) * 0
    return (y + 1.0000002).acos().mean()  # here


def entropy(model, x):
    p = F.relu(model(x))
    logs = p.log()  # here
    return (p * logs).sum()


def in_place(model, x):
    y = model(x) - 1e-3
    y.mul_(0).log_()  # here
    return y.mean()


def half_precision(model, x):
    y = model(x) * 1e6
    return y.half().float().mean()  # here


def power(model, x):
    y = model(x) - 100
    return y.pow(0.3).mean()  # here


def infinity_minus_infinity(model, x):
    y = model(x) + torch.tensor(-math.inf)
    return (y - y).mean()  # here


def ignored_labels(model, x):
    y = torch.full((ROWS,), -100)
    return F.cross_entropy(model(x), y)  # here


def written(model, x):
    y = model(x)
    y = y + torch.full_like(y, math.nan)  # here
    return y.mean()


@pytest.mark.parametrize(
    "program, operation, reason, made",
    [
        (log_of_zero, "log", "log of 0", "-inf"),
        (zero_by_zero, "div", "0 divided by 0", "nan"),
        (exp_overflow, "exp", "exp of ", "inf"),
        (masked_softmax, "softmax", "fully masked", "nan"),
        (masked_by_a_constant, "log_softmax", "fully masked", "nan"),
        (spread_of_one, "std", "standard deviation of 1 value", "nan"),
        (mean_of_nothing, "mean", "mean over 0 values", "nan"),
        (square_root_of_less, "sqrt", "sqrt of -0.001", "nan"),
        (acos_beyond_one, "acos", "acos of 1.0000002", "nan"),
        (entropy, "log", "log of 0", "-inf"),
        (in_place, "log", "log of 0", "-inf"),
        (half_precision, "conversion", "in float16, which holds at most 6.55e+04", "inf"),
        (power, "pow", "to the power of 0.3", "nan"),
        (infinity_minus_infinity, "sub", "-inf minus -inf", "nan"),
        (ignored_labels, "nll_loss", "mean over 0 targets, all others ignored", "nan"),
    ],
)
@pytest.mark.filterwarnings("ignore:std\\(\\)")
def test_invalid_forward_values_are_named(program, operation, reason, made):
    found = look(nn.Linear(4, 4, bias=False), program, batch())
    assert (found.operation, found.made, found.direction) == (operation, made, "forward")
    assert reason in found.reason
    assert found.line == line_in(program) and found.file.endswith("test_torch_microscope.py")
    assert found.function == program.__name__ and found.code.endswith("# here")


def test_the_row_of_the_batch_is_told():
    for program in (zero_by_zero, masked_softmax, masked_by_a_constant):
        found = look(nn.Linear(4, 4, bias=False), program, batch())
        assert (found.rows, found.num_bad_rows, found.num_rows) == ((3,), 1, ROWS)
        assert "Row 3 of 16." in str(found)


def test_rows_of_sequences_are_rows_of_the_batch():
    x = torch.rand(8, 5, 4) + 0.5
    x[6, 2] = 0

    def step(model, x):
        flat = x.reshape(-1, 4)
        return (model(flat) / flat.sum(1, keepdim=True)).mean()

    assert look(nn.Linear(4, 1), step, x, num_rows=8).rows == (6,)


def test_operands_are_shown_as_they_were_before_an_operation_in_place():
    found = look(nn.Linear(4, 4), in_place, batch())
    (operand,) = found.operands
    assert (operand.low, operand.high, operand.nonfinite, operand.shape) == (0, 0, 0, (ROWS, 4))


def test_a_value_that_was_written_is_told_as_it_is():
    found = look(nn.Linear(4, 4), written, batch())
    assert (found.operation, found.made, found.reason) == ("full_like", "nan", "NaN written by the program")
    assert found.line == line_in(written)


def test_pairs_of_rows_are_told_as_what_they_are():
    x = batch()
    x[11] = x[10]

    def step(model, x):
        y = model(x)
        return (y[0::2] - y[1::2]).square().sum(1).log().mean()

    found = look(nn.Linear(4, 4), step, x)
    assert (found.rows, found.num_rows, found.aligned) == ((5,), 8, False)
    assert "Row 5 of 8 (first axis of the result)." in str(found)


# ---- derivatives --------------------------------------------------------------------------------------------------


def sqrt_at_zero(y):
    return y.square().sum(1).sqrt()  # here


def power_at_zero(y):
    return y.abs().pow(0.5)  # here


def where_after_sqrt(y):
    return torch.where(y != 0, y.square().sqrt(), 0.0)  # here


def acos_at_one(y):
    return (y * 0 + 1).acos()  # here


def asin_at_one(y):
    return (y * 0 + 1).asin()  # here


def reciprocal_power(y):
    return ((y.square().sum(1) + 1e-44).pow(-0.25)).clamp(max=1e3) * 0  # here


def hypot_of_nothing(y):
    return torch.hypot(y, y)  # here


@pytest.mark.parametrize(
    "behind, derivative_of",
    [
        (sqrt_at_zero, "sqrt"),
        (power_at_zero, "pow"),
        (where_after_sqrt, "sqrt"),
        (acos_at_one, "acos"),
        (asin_at_one, "asin"),
        (reciprocal_power, "pow"),
        (hypot_of_nothing, "hypot"),
    ],
)
def test_singular_derivatives_are_named(behind, derivative_of):
    found = look(Layers(behind), lambda model, x: model(x).mean(), batch())
    assert (found.direction, found.derivative_of) == ("backward", derivative_of)
    assert found.line == line_in(behind) and found.function == behind.__name__
    assert found.module == "Layers"
    assert f"in the derivative of {derivative_of}" in str(found)


def test_the_module_is_the_innermost_one():
    class Distance(nn.Module):
        def forward(self, y):
            return sqrt_at_zero(y)

    for wrap, path in ((nn.Sequential, "0.behind"), (lambda model: model, "behind")):
        found = look(wrap(Layers(Distance())), lambda model, x: model(x).mean(), batch())
        assert found.module == path


def test_what_a_branch_drops_is_told_of_where_the_backward_pass_meets_it():
    def step(model, x):
        y = model(x)
        return torch.where(y > 0, y.sqrt(), 0.1 * y).mean()  # here

    found = look(nn.Linear(4, 4), step, batch())
    assert found.reason.startswith("sqrt of -") and found.dropped
    assert "the backward pass does not" in str(found)


def test_a_gradient_of_a_gradient_is_followed_too():
    def step(model, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x * 0).sum() * 0, x, create_graph=True)
        return (slope.square().sum(1).sqrt() - 1).square().mean()  # here

    found = look(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), step, batch())
    assert (found.direction, found.derivative_of, found.line) == ("backward", "sqrt", line_in(step))


def test_a_derivative_of_the_users_own():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 0  # here

    found = look(nn.Linear(4, 4), lambda model, x: Identity.apply(model(x)).mean(), batch())
    assert (found.direction, found.reason, found.line) == ("backward", "division by 0", line_in(Identity.backward))


# ---- what was there before ----------------------------------------------------------------------------------------


def test_a_weight_a_buffer_and_a_batch_are_named_as_they_are():
    embedding = nn.Embedding(10, 4)
    embedding.weight.data[7] = math.nan
    table = nn.Sequential(embedding)
    found = look(table, lambda model, x: model(torch.tensor([1, 7])).mean(), batch())
    assert (found.place, found.rows, found.num_rows, found.module) == ("weight", (7,), 10, "0")
    assert "the parameter 0.weight held NaN" in found.reason and found.operation == "embedding"

    norm = nn.BatchNorm1d(4).eval()
    norm.running_var[2] = math.nan
    found = look(nn.Sequential(norm), lambda model, x: model(x).mean(), batch())
    assert found.place == "buffer" and "0.running_var" in found.reason and found.rows == (2,)

    x = batch()
    x[5, 1] = math.inf
    found = look(nn.Linear(4, 4), lambda model, x: model(x).mean(), x)
    assert (found.place, found.rows) == ("input", (5,)) and "the batch held inf" in found.reason


def test_a_tensor_of_the_program_is_told_with_the_line_that_reads_it():
    constant = torch.tensor([1.0, math.nan, 1.0, 1.0])

    def step(model, x):
        return (model(x) * constant).mean()  # here

    found = look(nn.Linear(4, 4), step, batch())
    assert (found.place, found.line) == ("outside", line_in(step))


# ---- what is none -------------------------------------------------------------------------------------------------


def test_a_sound_step_shows_nothing_however_many_masks_it_has():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True

    def step(model, x):
        y, _ = model(x, x, x, key_padding_mask=padding)
        return torch.where(y > 9, math.inf, y).mean()

    assert look(attention, step, torch.randn(4, 5, 8), num_rows=4) is None


def test_an_empty_row_of_attention_is_found_behind_its_masks():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[:, 3:] = True
    padding[2] = True
    found = look(
        attention, lambda model, x: model(x, x, x, key_padding_mask=padding)[0].mean(), torch.randn(4, 5, 8), num_rows=4
    )
    assert "fully masked" in found.reason and found.rows == (2,)


def test_memory_that_was_never_written_is_no_result():
    def step(model, x):
        y = torch.empty(ROWS, 4)
        y.copy_(x)
        return model(y).mean()

    assert look(nn.Linear(4, 4), step, batch()) is None


# ---- programs of other kinds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    block = Layers(sqrt_at_zero)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x.requires_grad_(), use_reentrant=reentrant)

    found = look(Model(), lambda model, x: model(x).mean(), batch())
    assert (found.direction, found.derivative_of, found.line) == ("backward", "sqrt", line_in(sqrt_at_zero))
    assert found.module == "block"


def test_a_compiled_model_runs_as_it_is_written():
    model = Layers(sqrt_at_zero)
    compiled = torch.compile(model, backend="eager")
    found = look(model, lambda _, x: compiled(x).mean(), batch())
    assert (found.derivative_of, found.line) == ("sqrt", line_in(sqrt_at_zero))


def test_mixed_precision_overflows_by_name():
    def step(model, x):
        with torch.autocast("cpu", torch.float16):
            return model(x * 1e4).float().square().mean()

    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3)
    found = look(model, step, batch().abs())
    assert "float16" in found.reason and found.made == "inf"


def test_values_too_large_for_a_norm_are_told_while_everything_is_finite():
    model = nn.Linear(4, 4)
    microscope = Microscope({"": model}, num_rows=ROWS)
    with microscope:
        grown = (model(batch()) * 0 + 30).exp()
        loss = (grown * 2).square().sum()
        loss.backward()
    found = microscope.largest()
    assert found.reason == "exp of 30" and "too large to be squared" in str(found)
    assert microscope.explain(loss, [p.grad for p in model.parameters()]) is None


def test_a_spread_of_equal_values_is_harmless_since_torch_masks_it():
    found = look(nn.Linear(4, 4), lambda model, x: model(x[3:4].expand(4, 4)).std(0).mean(), batch())
    assert found is None


# ---- neutrality ---------------------------------------------------------------------------------------------------


def test_loss_gradients_and_generators_are_the_same_with_and_without():
    def train(under):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
        x = batch()
        scope = Microscope({"": model}, batch=[x], num_rows=ROWS) if under else torch.enable_grad()
        with scope:
            loss = model(x).square().mean()
            loss.backward()
        return [loss.detach(), torch.get_rng_state(), *(p.grad for p in model.parameters()), *model.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))


def test_nothing_of_it_stays_behind():
    before = torch.is_anomaly_enabled(), torch.fx.traceback.format_stack
    look(nn.Linear(4, 4), log_of_zero, batch())
    with pytest.raises(ZeroDivisionError), Microscope({}):
        1 / 0  # noqa: B018
    assert (torch.is_anomaly_enabled(), torch.fx.traceback.format_stack) == before
    node = (nn.Linear(4, 4)(batch()).sum()).grad_fn
    assert not node.metadata


# ---- an oracle ----------------------------------------------------------------------------------------------------

UNARY = {
    "log": (torch.log, lambda v: v <= 0),
    "sqrt": (torch.sqrt, lambda v: v < 0),
    "reciprocal": (torch.reciprocal, lambda v: v == 0),
    "exp": (lambda y: torch.exp(100 * y), lambda v: 100 * v > 88.8),
    "acosh": (torch.acosh, lambda v: v < 1),
}


@given(
    values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=6),
    chain=st.lists(st.sampled_from(["neg", "tanh", "view", "clone", "relu", "abs"]), max_size=4),
    name=st.sampled_from(sorted(UNARY)),
    after=st.sampled_from(["mul", "cat", "index", "sum"]),
)
def test_whatever_surrounds_it_the_operation_that_breaks_is_the_one_named(values, chain, name, after):
    """An operation with a known domain, among others that keep finite values finite and may lead away from it."""
    function, is_outside = UNARY[name]
    steps = {"neg": torch.neg, "tanh": torch.tanh, "view": lambda y: y.view(-1, 1).view(-1), "clone": torch.clone,
             "relu": torch.relu, "abs": torch.abs}  # fmt: skip
    ends = {"mul": lambda y: y * 2, "cat": lambda y: torch.cat([y, y]), "index": lambda y: y[: len(values)],
            "sum": lambda y: y.sum(0, keepdim=True)}  # fmt: skip
    x = torch.tensor(values)
    entering = x
    for step in chain:
        entering = steps[step](entering)
    microscope = Microscope({})
    with microscope:
        y = x.clone()
        for step in chain:
            y = steps[step](y)
        loss = ends[after](function(y)).sum()
    found = microscope.explain(loss)
    expected = [i for i, value in enumerate(entering.tolist()) if is_outside(value)]
    if not expected:
        assert found is None
    else:
        assert found.operation == name and found.count == len(expected) and found.size == len(values)
        assert found.rows == tuple(expected)


def test_warnings_of_the_program_are_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(nn.Linear(4, 4), log_of_zero, batch())
