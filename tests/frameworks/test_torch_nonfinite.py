"""Where NaN and Inf come from in real programs: the operation, its source line, the rows and the value."""

import functools
import inspect
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import isograd
from isograd._history import Event
from isograd.frameworks.torch import _domains as domains
from isograd.frameworks.torch import _source as source
from isograd.frameworks.torch._nonfinite import Graph

LATE = 137
"""A step that the deep schedule leaves out."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def watch(tmp_path):
    return lambda *things, **options: isograd.watch(*things, out=tmp_path / "runs", **options)


def line_in(program):
    """The number of the line of a test program that ends in `# here`."""
    lines, first = inspect.getsourcelines(program)
    (line,) = (first + index for index, text in enumerate(lines) if text.rstrip().endswith("# here"))
    return line


def step(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def nonfinite(run):
    """What was told, but for weights that were lost by it."""
    events = [event for history in run.histories() for event in history.events_of("nonfinite")]
    return [event for event in events if event.data["place"] != "weight"]


def linear(size=1):
    model = nn.Linear(5, size)
    return model, torch.optim.SGD(model.parameters(), 1e-3)


# ---- programs: each has one faulty line -------------------------------------------------------------------------


def log_of_zero(watch):
    model, optimizer = linear(3)
    with watch(model, optimizer) as run:
        p = torch.softmax(model(torch.randn(64, 5)), 1)
        p = torch.where(torch.arange(64)[:, None] < 3, 0 * p, p)
        step(-torch.log(p).mean(), optimizer)  # here
    return run


def log_late(watch):
    model, optimizer = linear(3)
    with watch(model, optimizer) as run:
        for index in range(LATE + 5):
            p = torch.softmax(model(torch.randn(8, 5)), 1)
            if index == LATE:
                p = p.masked_fill(torch.arange(8)[:, None] == 6, 0.0)
            picked = p[:, 0]
            loss = -picked.log().mean()  # here
            step(loss, optimizer)
    return run


def square_root_late(watch):
    model, optimizer = linear(4)
    with watch(model, optimizer) as run:
        for index in range(LATE + 5):
            x = torch.randn(8, 5)
            y = x.clone() if index == LATE else torch.randn(8, 5)
            distance = (model(x) - model(y)).square().sum(1)
            distance = distance.sqrt()  # here
            step((distance + 1).mean(), optimizer)
    return run


def in_a_closure(watch):
    model, _ = linear()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = torch.randn(16, 5)

    def evaluate():
        optimizer.zero_grad()
        score = model(x).clamp(-2, 2) * 0 + 1
        loss = torch.acos(score).mean()  # here
        loss.backward()
        return loss

    with watch(model, optimizer) as run:
        optimizer.step(evaluate)
    return run


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        h = self.layer(x)
        low, high = h.amin(1, keepdim=True), h.amin(1, keepdim=True)
        return (h - low) / (high - low)  # here


def in_a_module(watch):
    model = nn.Sequential(Normalized(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, optimizer) as run:
        step(model(torch.randn(6, 5)).mean(), optimizer)
    return run


def in_a_second_micro_batch(watch):
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        for scale in (1.0, 300.0):
            hidden = model(torch.randn(4, 5)) * scale + scale
            rate = torch.exp(hidden)  # here
            rate.mean().backward()
        optimizer.step()
    return run


def in_a_loop_of_varying_length(watch):
    model, optimizer = linear(5)
    with watch(model, optimizer) as run:
        for length in (3, 5, 2, 4):
            h = torch.randn(2, 5)
            for index in range(length):
                h = torch.tanh(model(h))
                if length == 2 and index == 1:
                    h = h - h
                h = h / h.norm()  # here
            step(h.mean(), optimizer)
    return run


def in_one_of_two_models(watch):
    maker, judge = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    first, second = (torch.optim.SGD(model.parameters(), 1e-3) for model in (maker, judge))
    with watch(maker, judge, first, second) as run:
        for index in range(3):
            real = torch.randn(8, 2)
            if index == 1:
                judge[0].bias.data.fill_(-100)
            between = real.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
            length = slope.square().sum(1).pow(0.5)  # here
            step(judge(real).mean() + (length - 1).square().mean(), second)
            step(-judge(maker(torch.randn(8, 3))).mean(), first)
    return run


def masked_attention(watch):
    model, optimizer = linear(5)
    with watch(model, optimizer) as run:
        x = torch.randn(2, 4, 5)
        scores = model(x) @ x.transpose(1, 2)
        scores = scores.masked_fill(torch.tensor([False, True])[:, None, None], -math.inf)
        weights = scores.softmax(-1)  # here
        step((weights @ x).mean(), optimizer)
    return run


def spread_of_one(watch):
    model, optimizer = linear(3)
    with watch(model, optimizer) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own: fewer than two values
        for size in (8, 1):
            h = model(torch.randn(size, 5))
            h = h - h.mean(0)
            h = h / (h.std(0) + 1e-5)  # here
            step(h.mean(), optimizer)
    return run


def mean_over_nothing(watch):
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        error = model(torch.randn(8, 5)).square()
        loss = error[error < 0].mean()  # here
        step(loss, optimizer)
    return run


def ignored_targets(watch):
    model, optimizer = linear(3)
    with watch(model, optimizer) as run:
        loss = F.cross_entropy(model(torch.randn(4, 5)), torch.full((4,), -100))  # here
        step(loss, optimizer)
    return run


def chosen_away(watch):
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        x = model(torch.randn(16, 5)) - model.bias
        h = torch.where(x > 0, x.sqrt(), x)  # here
        step(h.mean(), optimizer)
    return run


def called_by_the_standard_library(watch):
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        outs = [model(torch.randn(4, 5)), torch.zeros(4, 1)]
        ratio = functools.reduce(torch.div, outs)  # here
        step(ratio.mean(), optimizer)
    return run


# program -> place, operation, words of the reason, (rows, of how many, first row) or None, step
PROGRAMS = {
    log_of_zero: ("operation", "Log", "log of 0", (3, 64, 0), 0),
    log_late: ("operation", "Log", "log of 0", (1, 8, 6), LATE),
    square_root_late: ("gradient", "Sqrt", "no finite derivative of sqrt(0)", (8, 8, 0), LATE),
    in_a_closure: ("gradient", "Acos", "no finite derivative of acos(1)", (16, 16, 0), 0),
    in_a_module: ("operation", "Div", "division by 0", (6, 6, 0), 0),
    in_a_second_micro_batch: ("operation", "Exp", "exp of more than 88.7", None, 0),
    in_a_loop_of_varying_length: ("operation", "Div", "division by 0", (2, 2, 0), 2),
    in_one_of_two_models: ("gradient", "Pow", "no finite derivative of 0 ** 0.5", (8, 8, 0), 1),
    masked_attention: ("operation", "Softmax", "softmax over a fully masked row", (1, 2, 1), 0),
    spread_of_one: ("operation", "Std", "standard deviation of fewer than two values", None, 1),
    mean_over_nothing: ("operation", "Mean", "mean over 0 entries", None, 0),
    ignored_targets: ("operation", "NllLoss", "mean over 0 targets, all others ignored", None, 0),
    chosen_away: ("gradient", "Sqrt", "no finite derivative of sqrt(a negative number)", None, 0),
    called_by_the_standard_library: ("operation", "Div", "division by 0", (4, 4, 0), 0),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_operation_and_its_line(program, watch):
    """The first bad operation is told with the line that called it, the reason, the rows and the step."""
    place, operation, reason, rows, at = PROGRAMS[program]
    (event,) = nonfinite(program(watch))
    told = event.data
    called_in = Normalized.forward if program is in_a_module else program

    assert (place, operation, reason, at) == (told["place"], told["operation"], told["reason"], event.step)
    assert told["file"].endswith("test_torch_nonfinite.py")
    assert line_in(called_in) == told["line"]
    assert told["code"].endswith("# here")
    if rows is not None:
        assert rows == (told["rows"], told["num_rows"], told["row_index"])


def test_the_message_names_the_line(watch):
    """What the user reads has operation, file, line, source text and rows."""
    (cause,) = log_of_zero(watch).diagnose().causes
    message = cause.finding.message

    assert "invalid-operation" == cause.finding.name
    assert f"test_torch_nonfinite.py:{line_in(log_of_zero)} (`step(-torch.log(p).mean()" in message
    assert message.count("log of 0 at ") == 1
    assert "3 of 64 rows" in message


def test_the_message_of_a_broken_backward_pass(watch):
    """A singular derivative is named with its operand and its line, one step before the loss shows it."""
    (cause,) = square_root_late(watch).diagnose().at_least("warning")
    message = cause.finding.message

    assert ("singular-derivative", LATE) == (cause.finding.name, cause.finding.first_step)
    assert f"no finite derivative of sqrt(0) at {_shown()}:{line_in(square_root_late)}" in message


def _shown():
    return source._short(__file__)


# ---- data, weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, LATE])
def test_the_row_of_a_bad_batch(at, watch):
    """NaN in the data is told with the row of the batch, also at a step that nothing else is read at."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, optimizer) as run:
        for index in range(at + 2):
            x = torch.randn(32, 5)
            if index == at:
                x[19, 2] = math.nan
            step(model(x).square().mean(), optimizer)
    (event,) = nonfinite(run)
    cause = run.diagnose().causes[0].finding

    assert ("input", at, 1, 32, 19) == (
        event.data["place"],
        event.step,
        *(event.data[key] for key in ("rows", "num_rows", "row_index")),
    )
    assert "nonfinite-inputs" == cause.name
    assert "row 19 of the batch (1 of 32 rows)" in cause.message


def test_a_bad_target(watch):
    """NaN in the targets is the data's fault, not the loss function's."""
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        target = torch.zeros(8, 1)
        target[3] = math.nan
        step(F.mse_loss(model(torch.randn(8, 5)), target), optimizer)
    (event,) = nonfinite(run)
    cause = run.diagnose().causes[0].finding

    assert ("input", "target", 3) == tuple(event.data[key] for key in ("place", "name", "row_index"))
    assert "nonfinite-inputs" == cause.name
    assert "The target was not finite at step 0" in cause.message


def test_lost_weights_are_told_once(watch):
    """A weight that is not finite is the place, whatever it makes of the forward pass, and is told once."""
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        step(model(torch.randn(8, 5)).mean(), optimizer)
        model.weight.data[0, 3] = math.nan
        for _ in range(3):
            step(torch.log(model(torch.randn(8, 5)) - 1e9).mean(), optimizer)
    (history,) = run.histories()
    (event,) = history.events_of("nonfinite")

    assert ("weight", 1, 1) == (event.data["place"], event.step, event.data["count"])


# ---- what is not the fault --------------------------------------------------------------------------------------


def test_infinities_that_are_dropped_are_not_blamed(watch):
    """A logarithm of 0 in the branch that `where` leaves out is passed over for the operation that broke the loss."""
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        h = model(torch.randn(8, 5))
        safe = torch.where(h > 1e9, -h * torch.log(h * 0), h)
        bad = torch.log(safe.detach() * 0 + safe * 0)
        step(bad.mean(), optimizer)
    (event,) = nonfinite(run)

    assert (
        inspect.getsource(test_infinities_that_are_dropped_are_not_blamed).splitlines()[6].strip()
        == (event.data["code"])
    )


def test_masked_logits_are_not_blamed(watch):
    """Logits masked with -inf are meant: the division that follows is what broke the loss."""
    model, optimizer = linear(4)
    with watch(model, optimizer) as run:
        scores = model(torch.randn(8, 5)).masked_fill(torch.tensor([True, False, False, False]), -math.inf)
        picked = F.log_softmax(scores, 1)[:, 1]
        step((picked / (picked.detach() * 0)).mean(), optimizer)
    (event,) = nonfinite(run)

    assert "Div" == event.data["operation"]


def test_a_gradient_that_does_not_pass_is_no_fault(watch):
    """A square root of 0 whose gradient goes to no parameter breaks nothing, and nothing is told."""
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        for _ in range(3):
            out = model(torch.randn(8, 5))
            offset = torch.zeros(8, 1, requires_grad=True)
            step(out.mean() + offset.abs().detach().sqrt().mean(), optimizer)

    assert [] == nonfinite(run)


def test_healthy_roots_powers_and_quotients_are_told_of_nothing(watch):
    """Operations that are singular elsewhere, at every step, deep or not, are no fault where they are finite."""
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        for _ in range(60):
            out = model(torch.randn(8, 5))
            x = out.square() + 1
            loss = (x.sqrt() + x.log() + x**0.3 + 1 / x + out / x + torch.acos(1 / (x + 1)) + x.norm()).mean()
            step(loss, optimizer)

    assert [] == nonfinite(run)


def test_no_line_rather_than_a_wrong_one(watch):
    """A branch that runs only at a step at which nothing is kept has no line: that of its twin would be wrong."""
    model, optimizer = linear()
    with watch(model, optimizer) as run:
        for index in range(LATE + 1):
            out = model(torch.randn(8, 5)).square() + 1
            loss = torch.log(out).mean()
            if index == LATE:
                loss = loss + torch.log(out * 0).mean()
            step(loss, optimizer)
    (event,) = nonfinite(run)

    assert (LATE, "Log") == (event.step, event.data["operation"])
    assert "line" not in event.data


# ---- the run is not changed -------------------------------------------------------------------------------------


def anomaly():
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def test_anomaly_mode_is_the_users_own(watch):
    """The user sees anomaly mode as it was, sets it, and finds it as set: before, during and after the run."""
    model, optimizer = linear()
    functions = torch.is_anomaly_enabled, torch.set_anomaly_enabled, source.fx_traceback.format_stack
    with watch(model, optimizer):
        assert (False, True) == anomaly()
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            assert (True, False) == anomaly()
            step(model(torch.randn(4, 5)).mean(), optimizer)
            assert (True, False) == anomaly()
        assert (False, True) == anomaly()
        step(model(torch.randn(4, 5)).mean(), optimizer)
        torch.autograd.set_detect_anomaly(True)
        step(model(torch.randn(4, 5)).mean(), optimizer)
        assert (True, True) == anomaly()
    try:
        assert (True, True) == anomaly()
        assert functions == (torch.is_anomaly_enabled, torch.set_anomaly_enabled, source.fx_traceback.format_stack)
    finally:
        torch.set_anomaly_enabled(False)


def test_lines_come_from_the_users_anomaly_mode_too(watch):
    """Where the user has switched anomaly mode on, its stacks tell the line, and it still raises as it does."""
    model, optimizer = linear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anomaly mode's own
        with watch(model, optimizer) as run, torch.autograd.detect_anomaly():
            loss = torch.log(model(torch.randn(4, 5)) * 0).mean()
            with pytest.raises(RuntimeError, match="nan values"):
                step(loss, optimizer)
            optimizer.step()
    (event,) = nonfinite(run)

    assert "loss = torch.log(model(torch.randn(4, 5)) * 0).mean()" == event.data["code"]


def test_nothing_is_kept_once_graphs_are_known(watch):
    """Anomaly mode is on in forward passes that bring unknown graphs only, never in a backward pass."""
    enabled = torch._C.is_anomaly_enabled
    model, optimizer = linear()
    seen = {"forward": [], "backward": []}
    with watch(model, optimizer, every=1, budget=math.inf):
        for _ in range(4):
            out = model(torch.randn(4, 5))
            seen["forward"].append(enabled())
            out.register_hook(lambda gradient: seen["backward"].append(enabled()))
            step(out.mean(), optimizer)
    after = enabled()

    assert [False] * 4 == seen["backward"]
    assert [True, True, False, False] == seen["forward"]
    assert not after


def test_an_error_in_a_backward_pass_prints_nothing_more(watch, capfd):
    """An exception in the user's own backward pass arrives as without isograd: anomaly mode's report is not printed."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("the user's own")

    model, optimizer = linear()
    with watch(model, optimizer), pytest.raises(ValueError, match="the user's own"):
        step(Broken.apply(model(torch.randn(4, 5))).mean(), optimizer)

    assert ("", "") == tuple(capfd.readouterr())


def test_checkpointed_models_are_left_alone(watch):
    """Saved tensors that would be computed again are not read, and no line is kept from then on."""
    model, optimizer = linear()
    inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    optimizer.add_param_group({"params": inner.parameters()})
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(torch._C.is_anomaly_enabled()))
    with watch(optimizer) as run:
        for _ in range(3):
            h = checkpoint(inner, torch.randn(4, 5), use_reentrant=False)
            step(torch.log(model(h) * 0).mean(), optimizer)

    assert calls
    assert not any(calls)
    assert [] == nonfinite(run)
    assert run.diagnose().at_least("error")


def test_compiled_models_are_left_alone(watch):
    """A compiled model computes as ever, nothing is kept in it, and a fault behind it is found with its operation."""
    model, optimizer = linear()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with watch(model, optimizer) as run:
        for _ in range(3):
            step(torch.log(compiled(torch.randn(4, 5)) * 0).mean(), optimizer)
            assert not torch._C.is_anomaly_enabled()
    (event,) = nonfinite(run)

    assert "Log" == event.data["operation"]
    assert torch._dynamo.utils.counters["graph_break"] == {}


# ---- oracles ----------------------------------------------------------------------------------------------------

POINTS = [-1e9, -2.0, -1.0, -0.5, -1e-30, 0.0, 1e-45, 1e-30, 1e-8, 0.5, 1.0, 1.5, 89.0, 1e9, 3e38]
FUNCTIONS = {
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "log": torch.log, "log2": torch.log2,
    "log10": torch.log10, "log1p": torch.log1p, "acos": torch.acos, "asin": torch.asin, "acosh": torch.acosh,
    "atanh": torch.atanh, "exp": torch.exp, "expm1": torch.expm1, "cosh": torch.cosh, "sinh": torch.sinh,
    "logit": torch.logit, "erfinv": torch.erfinv, "lgamma": torch.lgamma, "square root": lambda x: x**0.5,
    "inverse power": lambda x: x**-1.5, "powers": lambda x: x ** torch.full_like(x, 0.3),
    "quotient": lambda x: x / torch.full_like(x, 3.0), "dividend": lambda x: torch.full_like(x, 2.0) / (x + 0.0),
    "ratio": lambda x: x / x, "hypot": lambda x: torch.hypot(x, torch.zeros_like(x)), "by zero": lambda x: x / 0.0,
}  # fmt: skip


def gradient(function, x, factor):
    """What torch's own backward pass makes of an incoming gradient of 1 or 0."""
    x = x.clone().requires_grad_(True)
    y = function(x)
    return torch.autograd.grad(y, x, torch.full_like(y, factor))[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_are_finite_where_torchs_gradients_are(name):
    """An operation is called singular at exactly those entries at which an incoming 1 or 0 comes back non-finite."""
    x = torch.tensor(POINTS)
    node = FUNCTIONS[name](x.clone().requires_grad_(True)).grad_fn
    operation = Graph(node).name(node)
    slope = domains.slope(node, operation)
    expected = ~(torch.isfinite(gradient(FUNCTIONS[name], x, 1.0)) & torch.isfinite(gradient(FUNCTIONS[name], x, 0.0)))

    assert domains.may_be_singular(node, operation)
    assert expected.tolist() == (~torch.isfinite(slope)).tolist()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_torchs_own(name):
    """What a node computed is taken from its saved tensors as the forward pass had it."""
    x = torch.tensor(POINTS, requires_grad=True)
    y = FUNCTIONS[name](x)
    operation = Graph(y.grad_fn).name(y.grad_fn)
    found = domains.result_of(y.grad_fn, operation, domains.operands(y.grad_fn, operation))

    if found is not None:
        assert torch.isfinite(y).tolist() == torch.isfinite(found).tolist()


@pytest.mark.parametrize(
    "file, expected",
    [
        (__file__, True),
        (torch.__file__, False),
        (functools.__file__, False),
        (source.__file__, False),
        (str(source._PACKAGE) + "/demo/deep_relu.py", True),
        ("<stdin>", True),
        ("<frozen importlib._bootstrap>", False),
        ("<eval_with_key>.0", False),
    ],
)
def test_whose_file_it_is(file, expected):
    """Only the user's own files count: no library's, not Python's, not isograd's, but its demo programs."""
    assert expected is source.is_users(file)


def test_events_are_plain_values(watch):
    """What is recorded of a place survives the run file: numbers and strings."""
    (event,) = nonfinite(log_of_zero(watch))

    assert isinstance(event, Event)
    assert {"place", "operation", "reason", "count", "size", "value", "rows", "num_rows", "row_index"} <= set(
        event.data
    )
    assert {"file", "line", "code", "function"} <= set(event.data)
    assert 0.0 == event.data["value"]
    assert all(isinstance(value, str | int | float) for value in event.data.values())
