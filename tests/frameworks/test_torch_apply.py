"""What applied changes do to real training steps, against the same steps written out by hand."""

import copy
import gc
import math
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd import _changes as changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import Applier
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._apply import to_dict


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Told:
    """What an applier has said."""

    def __init__(self):
        self.events, self.refusals = [], []

    def event(self, kind, data):
        self.events.append((kind, data))

    def kinds(self):
        return [kind for kind, _ in self.events]


@contextmanager
def treated(*wanted):
    """A program in which these changes are applied to whatever it trains."""
    told = Told()
    applier = Applier(wanted, on_event=told.event, on_refusal=told.refusals.append)
    applier.listen()
    applier.listen_last()
    told.undo = applier.undo
    try:
        yield told
    finally:
        applier.stop()


def mlp(width=8, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(5, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 3))


X, Y = torch.randn(16, 5, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def step(model, optimizer, x=X, y=Y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same_bits(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def assert_close(first, second, **tolerance):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def gradients(model, x=X, y=Y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, clip",
    [
        ("norm", lambda ps: nn.utils.clip_grad_norm_(ps, 0.01)),
        ("value", lambda ps: nn.utils.clip_grad_value_(ps, 0.01)),
        ("tensor-norm", lambda ps: [nn.utils.clip_grad_norm_([p], 0.01) for p in ps]),
    ],
)
def test_clipped_steps_are_those_of_torchs_own_functions(method, clip):
    """A clipped program takes the same steps as one that calls torch's function between backward and step."""
    model = mlp()
    twin = copy.deepcopy(model)
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.5, momentum=0.9)
    with treated(changes.ClipGradients(method=method, limit=0.01)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(3):
            step(model, optimizer)
            gradients(twin)
            clip(list(twin.parameters()))
            by_hand.step()
    assert_same_bits(weights(twin), weights(model))


def test_adaptive_clipping_leaves_the_output_layer_alone():
    """Brock et al. do not clip the last linear layer."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ClipGradients(method="adaptive", limit=1e-6)):
        step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = weights(twin)
    step(twin, torch.optim.SGD(twin.parameters(), lr=1.0))
    moved = [float((a - b).norm()) for a, b in zip(weights(model), before, strict=True)]
    assert_same_bits(weights(twin)[-2:], weights(model)[-2:])
    assert max(moved[:-2]) < 1e-4 < min(moved[-2:])


@pytest.mark.parametrize("method", ["norm", "value", "tensor-norm", "adaptive", "percentile", "z-score"])
def test_a_bad_gradient_passes_the_gate_unclipped(method):
    """One Inf among the gradients stays the only entry that is not finite; torch's clipping would spread it."""
    model = mlp()
    with treated(changes.ClipGradients(method=method, limit=1.0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients(model)
        model[0].weight.grad[0, 0] = math.inf
        expected = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    assert_same_bits(expected, [p.grad for p in model.parameters()])


def test_clipping_by_history_sees_the_norms_of_the_run():
    """With the least percentile every step has the smallest gradient norm so far."""
    model = mlp()
    with treated(changes.ClipGradients(method="percentile", limit=1e-9)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        least, applied = math.inf, []
        for scale in (1.0, 3.0, 0.5, 4.0):
            gradients(model)
            for p in model.parameters():
                p.grad.mul_(scale)
            least = min(least, float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            applied.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) / least)
    assert pytest.approx([1.0] * 4, rel=1e-4) == applied


def test_a_closure_is_clipped_between_its_backward_pass_and_the_update():
    """An optimizer that computes gradients inside its step sees them clipped."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ClipGradients(method="norm", limit=1e-3)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            return loss

        optimizer.step(closure)
    gradients(twin)
    nn.utils.clip_grad_norm_(twin.parameters(), 1e-3)
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert_same_bits(weights(twin), weights(model))


def test_a_penalty_adds_its_gradient_to_matrices_only():
    """g + l1 sign(w) + l2 w for weights with two axes; biases keep g."""
    model = mlp()
    gradients(model)
    plain = [p.grad.clone() for p in model.parameters()]
    with treated(changes.PenalizeWeights(l1=0.25, l2=0.5)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        gradients(model)
        optimizer.step()
    for p, g in zip(model.parameters(), plain, strict=True):
        expected = g + (0.25 * p.sign() + 0.5 * p).detach() if p.dim() > 1 else g
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_accumulated_gradients_are_averaged_over_their_passes(to_none):
    """Four micro-batches give the gradient of their mean, step after step."""
    model = mlp()
    gradients(model)
    expected = [p.grad.clone() for p in model.parameters()]
    with treated(changes.AverageAccumulation()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=to_none)
            for part in range(4):
                F.cross_entropy(model(X[4 * part : 4 * part + 4]), Y[4 * part : 4 * part + 4]).backward()
            optimizer.step()
            assert_close(expected, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-7)


def test_a_discriminators_gradients_count_only_passes_that_reach_them():
    """The generator's passes between two discriminator steps are no micro-batches of it, once it clears them."""
    generator, discriminator = nn.Linear(2, 2), nn.Linear(2, 1)
    with treated(changes.AverageAccumulation()):
        for_g = torch.optim.SGD(generator.parameters(), lr=0.0)
        for_d = torch.optim.SGD(discriminator.parameters(), lr=0.0)
        for _ in range(2):
            for_d.zero_grad()
            loss = discriminator(generator(torch.ones(4, 2)).detach()).mean()
            loss.backward()
            expected = discriminator.weight.grad.clone()
            for_d.step()
            assert torch.equal(expected, discriminator.weight.grad)
            for_g.zero_grad()
            discriminator(generator(torch.ones(4, 2))).mean().backward()
            for_g.step()


def test_gradients_are_cleared_for_a_loop_that_forgets_to():
    """A loop without `zero_grad` takes the steps of one with it."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ZeroGradients()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
    other = torch.optim.SGD(twin.parameters(), lr=0.5)
    for _ in range(3):
        step(twin, other)
    assert_same_bits(weights(twin), weights(model))


def test_cleared_gradients_still_accumulate_over_micro_batches():
    """Only what a step has used is cleared: micro-batches before the step add up."""
    model = mlp()
    gradients(model)
    expected = [2 * p.grad for p in model.parameters()]
    model.zero_grad()
    with treated(changes.ZeroGradients()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            for _ in range(2):
                F.cross_entropy(model(X), Y).backward()
            optimizer.step()
            assert_close(expected, [p.grad for p in model.parameters()])


def test_a_scaled_loss_gives_the_same_gradients_and_the_same_recorded_loss():
    """A power of two rounds nothing: gradients end in the same bits, the loss is not touched, passes add up."""
    model = mlp()
    gradients(model)
    F.cross_entropy(model(X), Y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    seen = []
    with treated(changes.ScaleLoss(scale=1024.0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.zero_grad()
        for _ in range(2):
            logits = model(X)
            logits.register_hook(lambda g: seen.append(float(g.abs().max())))
            loss = F.cross_entropy(logits, Y)
            loss.backward()
        optimizer.step()
    assert_same_bits(expected, [p.grad for p in model.parameters()])
    assert loss.item() == F.cross_entropy(model(X), Y).item()
    assert max(seen) > 10  # of a softmax minus a label over 16 rows: at most 1/16 unscaled


def test_a_scaled_loss_reaches_an_activation_in_half_precision():
    """A gradient below half precision's smallest number arrives, as with `GradScaler`."""
    w = nn.Parameter(torch.ones(4))
    tiny = 2.0**-26
    with treated(changes.ScaleLoss(scale=2.0**12)):
        optimizer = torch.optim.SGD([w], lr=0.0)
        ((w.half() * 1.0).float() * tiny).sum().backward()
        optimizer.step()
    assert torch.equal(w.grad, torch.full((4,), tiny))


def test_gradients_asked_for_by_name_are_not_scaled():
    """`torch.autograd.grad` returns what the program asked for."""
    w = nn.Parameter(torch.ones(2))
    with treated(changes.ScaleLoss(scale=8.0)):
        torch.optim.SGD([w], lr=0.0)
        (found,) = torch.autograd.grad((w * 3).sum(), w)
    assert torch.equal(torch.full((2,), 3.0), found)


# ---- bad steps --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
}


class Hyperball(torch.optim.Optimizer):
    """A user's own: it decays weights and counts steps, gradient or not."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p.mul_(0.9)
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


def stepped(cls, bad):
    """Weights and state before and after a step whose loss is `bad` times itself, three good steps behind it."""
    weight = nn.Parameter(torch.randn(4, 3))
    options = {"weight_decay": 0.1} if "weight_decay" in cls.__init__.__code__.co_varnames else {}
    optimizer = cls([weight], **options, **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    x, target = torch.randn(6, 4), torch.randn(6, 3)

    def advance(factor):
        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(x @ weight, target) * factor
            loss.backward()
            if cls is torch.optim.SparseAdam:
                weight.grad = weight.grad.to_sparse()
            return loss

        if cls is torch.optim.LBFGS:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    for _ in range(3):
        advance(1.0)
    before = copy.deepcopy((weight.detach(), optimizer.state_dict()))
    advance(bad)
    return before, (weight.detach(), optimizer.state_dict())


def flat(thing):
    if isinstance(thing, dict):
        return [leaf for key in sorted(thing, key=str) for leaf in flat(thing[key])]
    if isinstance(thing, (list, tuple)):
        return [leaf for one in thing for leaf in flat(one)]
    return [thing.to_dense().tolist() if isinstance(thing, torch.Tensor) else thing]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("cls", [*OPTIMIZERS.values(), Hyperball], ids=lambda c: c.__name__)
def test_a_skipped_step_leaves_weights_and_state_in_the_same_bits(cls, bad):
    """Whatever optimizer torch has, and a user's own: weights, moments, momentum and counters are as before."""
    with treated(changes.SkipBadSteps()) as told:
        before, after = stepped(cls, bad)
    assert flat(before) == flat(after)
    assert "bad-step-skipped" in told.kinds()


def test_the_program_finds_its_bad_gradients_after_the_skipped_step():
    """Gradients are only hidden from the optimizer: a loop that logs them sees what they were."""
    model = mlp()
    with treated(changes.SkipBadSteps()):
        optimizer = torch.optim.Adam(model.parameters())
        gradients(model)
        model[0].bias.grad[0] = math.nan
        optimizer.step()
    assert math.isnan(model[0].bias.grad[0])


# ---- hyperparameters --------------------------------------------------------------------------------------------


def used_rates(optimizer, steps):
    """The learning rates of the steps themselves, from how far a constant gradient of 1 moves a weight under SGD."""
    (p,) = optimizer.param_groups[0]["params"]
    found = []
    for _ in range(steps):
        before = float(p.detach())
        p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(before - float(p.detach()))
    return found


def loose(value=0.0):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def test_a_factor_multiplies_the_rate_of_the_steps_only():
    """The program reads its own learning rate between steps, and its scheduler goes on from that."""
    with treated(changes.SetHyperparameter(name="lr", factor=0.1)):
        optimizer = torch.optim.SGD([loose()], lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        rates = []
        for expected in (1.0, 0.5, 0.25):
            assert expected == optimizer.param_groups[0]["lr"]
            rates += used_rates(optimizer, 1)
            scheduler.step()
    assert pytest.approx([0.1, 0.05, 0.025]) == rates


def test_a_value_takes_the_place_of_the_first_rate_and_keeps_the_programs_schedule():
    """lr = 0.3 under a schedule that halves is 0.3, 0.15; one cycle up to the program's rate goes up to the value."""
    with treated(changes.SetHyperparameter(name="lr", value=0.3)):
        optimizer = torch.optim.SGD([loose()], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
        rates = []
        for _ in range(3):
            rates += used_rates(optimizer, 1)
            scheduler.step()
        other = torch.optim.SGD([loose()], lr=0.0)
        rates += used_rates(other, 1)
    assert pytest.approx([0.15, 0.225, 0.3, 0.3]) == rates


SHAPES = {
    "warm-up": lambda t: min(1.0, 0.25 + 0.75 * t / 4),
    "linear": lambda t: 1 + (0.5 - 1) * min(t, 4) / 4,
    "step": lambda t: 0.5 ** (t // 4),
    "exponential": lambda t: 0.5 ** (min(t, 4) / 4),
    "inverse-sqrt": lambda t: math.sqrt(4 / max(4, t + 1)),
    "cosine": lambda t: 0.5 + 0.5 * (1 + math.cos(math.pi * min(t, 4) / 4)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_follow_their_formula(shape):
    """Over 4 steps to a factor of 0.5, and on from there, on a program's own rate of 2."""
    with treated(changes.ScheduleLearningRate(shape=shape, steps=4, end=0.5)):
        rates = used_rates(torch.optim.SGD([loose()], lr=2.0), 10)
    assert pytest.approx([2 * SHAPES[shape](t) for t in range(10)]) == rates


def test_a_plateau_lowers_the_rate_when_the_loss_stands_still():
    """A loss that falls keeps the rate; one that stands lowers it by the factor."""
    with treated(changes.ScheduleLearningRate(shape="plateau", steps=10, end=0.5)):
        w = loose()
        optimizer = torch.optim.SGD([w], lr=1.0)
        used = []
        for t in range(12):
            optimizer.zero_grad()
            (w * 0 + (10.0 - t if t < 5 else 5.0)).backward()
            used += used_rates(optimizer, 1)
    assert used[:7] == pytest.approx([1.0] * 7)
    assert used[-1] < 0.6


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_constant_schedule_holds_the_largest_rate_so_far(tensor):
    """A warm-up goes on; what takes the rate down again, to 0 even, is held off; the program's own rate stays."""
    rates, seen = [0.1, 0.2, 0.4, 0.04, 0.0, 0.0], []
    weight = torch.zeros(3, requires_grad=True)
    with treated(changes.ScheduleLearningRate(shape="constant", steps=1)):
        optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.1) if tensor else 0.1)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = torch.tensor(rate) if tensor else rate
            before = weight.detach().clone()
            weight.grad = torch.ones(3)
            optimizer.step()
            seen.append(float((before - weight.detach())[0]))
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(rate)
    assert pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4, 0.4], rel=1e-5) == seen


def test_an_optimizer_made_anew_goes_on_in_the_schedule():
    """A loop that constructs its optimizer every epoch does not warm up every epoch."""
    p = loose()
    with treated(changes.ScheduleLearningRate(shape="warm-up", steps=4)):
        first = used_rates(torch.optim.SGD([p], lr=1.0), 2)
        second = used_rates(torch.optim.SGD([p], lr=1.0), 2)
    assert pytest.approx([0.25, 0.4375, 0.625, 0.8125]) == first + second


@pytest.mark.parametrize(
    "name, key, value", [("eps", "eps", 1e-3), ("beta2", "betas", (0.9, 0.5)), ("weight_decay",) * 2 + (0.7,)]
)
def test_hyperparameters_are_set_in_every_group_and_put_back(name, key, value):
    """Also in groups that are added later; undoing gives each its own back."""
    before = torch.optim.Adam([loose()]).param_groups[0][key]
    with treated(changes.SetHyperparameter(name=name, value=value[-1] if key == "betas" else value)) as told:
        optimizer = torch.optim.Adam([loose()])
        optimizer.add_param_group({"params": [loose()]})
        for p in (group["params"][0] for group in optimizer.param_groups):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [value, value] == [group[key] for group in optimizer.param_groups]
        told.undo()
        assert [before, before] == [group[key] for group in optimizer.param_groups]


def test_momentum_can_be_given_to_an_rmsprop_that_has_already_stepped(tmp_path):
    """RMSprop looks for a buffer that it makes only where it started with momentum."""
    p = loose(1.0)
    optimizer = torch.optim.RMSprop([p])
    with isograd.watch(optimizer, out=tmp_path) as run:
        used_rates(optimizer, 1)
        run.apply(changes.SetHyperparameter(name="momentum", value=0.9))
        used_rates(optimizer, 2)
    assert float(optimizer.state[p]["momentum_buffer"]) > 0


# ---- updates and weights ----------------------------------------------------------------------------------------


def test_weights_are_within_the_limit_after_every_step():
    """`torch.clamp` after the step."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ClampWeights(limit=0.1)):
        step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    step(twin, torch.optim.SGD(twin.parameters(), lr=1.0))
    assert_same_bits([w.clamp(-0.1, 0.1) for w in weights(twin)], weights(model))


def test_an_update_is_shortened_to_the_limit_times_the_rate():
    """After 1000 small gradients one that is 1000 times larger makes Adam jump 31 learning rates; clipped, one."""
    limits = {}
    for limited in (False, True):
        p = nn.Parameter(torch.zeros(3))
        with treated(*([changes.ClipUpdates(limit=1.0)] if limited else [])):
            optimizer = torch.optim.Adam([p], lr=0.01, betas=(0.0, 0.999))
            for t in range(1001):
                p.grad = torch.full((3,), 1000.0 if t == 1000 else 1.0)
                before = p.detach().clone()
                optimizer.step()
        limits[limited] = float((p.detach() - before).norm()) / math.sqrt(3) / 0.01
    assert limits[False] > 25
    assert limits[True] == pytest.approx(1.0, rel=1e-3)


def test_updates_within_the_limit_keep_every_bit():
    """An inactive limit changes nothing."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ClipUpdates(limit=100.0)):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            step(model, optimizer)
    other = torch.optim.AdamW(twin.parameters())
    for _ in range(3):
        step(twin, other)
    assert_same_bits(weights(twin), weights(model))


# ---- another optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "NAdam", "RAdam", "Adadelta", "Adamax"])
def test_a_replaced_optimizer_takes_the_other_ones_steps(name):
    """The program's object steps as the other optimizer would, at the program's own scheduled rate."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ReplaceOptimizer(optimizer=name)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        for _ in range(5):
            step(model, optimizer)
            scheduler.step()
    other = getattr(torch.optim, name)(twin.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(other, step_size=2)
    for _ in range(5):
        step(twin, other)
        scheduler.step()
    assert_same_bits(weights(twin), weights(model))


def test_a_replaced_optimizer_is_the_programs_own_object():
    """Its class, its groups, its hooks and its checkpoint are the program's; a restored one goes on alike."""
    model = mlp()
    calls = []
    with treated(changes.ReplaceOptimizer(optimizer="Adam", hyperparameters=(("beta1", 0.8),))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        step(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        step(model, optimizer)
        expected = weights(model)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        step(model, optimizer)
    assert type(optimizer) is torch.optim.SGD
    assert calls == [1, 1, 1]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    assert_same_bits(expected, weights(model))


def test_undoing_a_replacement_gives_the_program_its_own_steps_back():
    """Groups, state and step are again what they were."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    step(twin, other)
    told = Told()
    applier = Applier([changes.ReplaceOptimizer(optimizer="Adam")], on_event=told.event, on_refusal=print)
    applier._only = (optimizer,)
    applier.adopt_running()
    applier.undo()
    step(model, optimizer)
    step(twin, other)
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert_same_bits(weights(twin), weights(model))


def test_the_rate_given_with_an_optimizer_is_used():
    """`lr` among the hyperparameters is a change of the rate, which schedules follow."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(changes.ReplaceOptimizer(optimizer="Adam", hyperparameters=(("lr", 0.003),))):
        step(model, torch.optim.SGD(model.parameters(), lr=0.5))
    step(twin, torch.optim.Adam(twin.parameters(), lr=0.003))
    assert_close(weights(twin), weights(model))


# ---- what has no place ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, word",
    [
        (changes.SetHyperparameter(name="momentum", value=0.9), "no hyperparameter momentum"),
        (changes.ReplaceOptimizer(optimizer="Sgdd"), "Sgdd"),
        (changes.ReplaceOptimizer(optimizer="Muon"), "Muon"),
        (changes.InsertShortcuts(kind="dense"), "another model"),
        (changes.ReinitializeLayers(method="chrono"), "recurrent"),
        (changes.ReinitializeLayers(method="fixup"), "residual"),
        (changes.ReplaceActivations(sources=("relu",), target="gelu"), "relu"),
        (changes.RemoveOutputActivation(kind="sigmoid"), "sigmoid"),
        (changes.StandardizeTargets(), "target"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_change_without_a_place_says_so_in_a_sentence_and_changes_nothing(change, word):
    """Training goes on in the same bits, and what could not be done is said before the first step."""
    model = mlp()
    twin = copy.deepcopy(model)
    with treated(change) as told:
        optimizer = torch.optim.Adam(model.parameters())
        step(model, optimizer)
    step(twin, torch.optim.Adam(twin.parameters()))
    (sentence,) = told.refusals
    assert word in sentence
    assert sentence.endswith(".")
    assert "treatment-refused" in told.kinds()
    assert_same_bits(weights(twin), weights(model))


def test_a_change_of_updates_is_refused_where_updates_are_not_normalized():
    """The size of an SGD step in learning rates is the gradient's own."""
    with treated(changes.ClipUpdates()) as told:
        step(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert "SGD" in told.refusals[0]


def test_a_change_that_fits_one_of_two_models_is_not_refused():
    """A critic without activations beside a generator with them: the generator's are replaced."""
    generator, critic = mlp(), nn.Linear(3, 1)
    with treated(changes.ReplaceActivations(sources=("tanh",), target="gelu")) as told:
        for_g, for_c = torch.optim.SGD(generator.parameters(), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.1)
        critic(generator(X)).mean().backward()
        for_c.step()
        for_g.step()
    assert told.refusals == []
    assert isinstance(generator[1], nn.GELU)


def test_a_program_of_loose_tensors_has_no_module_to_change():
    """There is no module in it."""
    w = nn.Parameter(torch.ones(2))
    with treated(changes.InsertNormalization(kind="batch")) as told:
        optimizer = torch.optim.SGD([w], lr=0.1)
        w.sum().backward()
        optimizer.step()
    assert "loose" in told.refusals[0]


# ---- live -------------------------------------------------------------------------------------------------------

HOOKS = [
    changes.ClipGradients(method="norm", limit=0.01),
    changes.ClipGradients(method="adaptive", limit=0.01),
    changes.SetHyperparameter(name="lr", factor=0.1),
    changes.SetHyperparameter(name="beta2", value=0.9),
    changes.ScheduleLearningRate(shape="warm-up", steps=5),
    changes.PenalizeWeights(l1=0.1),
    changes.ScaleLoss(scale=4.0),
    changes.ClipUpdates(limit=0.1),
    changes.ReplaceOptimizer(optimizer="RMSprop"),
    changes.ReplaceActivations(sources=("tanh",), target="gelu"),
    changes.InsertNormalization(kind="layer"),
    changes.InsertShortcuts(kind="rezero"),
    changes.StandardizeInputs(),
    changes.ReinitializeLayers(method="orthogonal"),
    changes.SkipBadSteps(),
]


@pytest.mark.parametrize(
    "change", HOOKS, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'method', getattr(c, 'name', ''))}"
)
def test_applied_and_undone_at_once_training_goes_on_in_the_same_bits(change, tmp_path):
    """Weights, optimizer state, groups and random numbers are as if nothing had happened."""
    ends = []
    for live in (True, False):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with isograd.watch(model, optimizer, out=tmp_path) as run:
            step(model, optimizer)
            if live:
                undo = run.apply(change)
                undo()
            step(model, optimizer)
            step(model, optimizer)
        ends.append((model.state_dict(), optimizer.state_dict(), torch.rand(3)))
    assert flat(ends[0]) == flat(ends[1])


@pytest.mark.parametrize(
    "change", HOOKS[:3] + HOOKS[4:9], ids=lambda c: f"{type(c).__name__}-{getattr(c, 'method', '')}"
)
def test_what_was_applied_acts_until_it_is_undone(change, tmp_path):
    """The step under the change differs from the plain one; after undoing, the same gradient gives the plain step."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        step(model, optimizer)
        start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        step(model, optimizer)
        plain = weights(model)
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        undo = run.apply(change)
        step(model, optimizer)
        changed = weights(model)
        undo()
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        step(model, optimizer)
    if not isinstance(change, changes.ScaleLoss):
        assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))
    assert_same_bits(plain, weights(model))


def test_every_application_is_an_event_of_the_run_file(tmp_path):
    """The change with its fields, and its end."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    change = changes.ClipGradients(method="norm", limit=0.05)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        step(model, optimizer)
        step(model, optimizer)
        undo = run.apply(change)
        step(model, optimizer)
        undo()
        step(model, optimizer)
    (history,) = run.histories()
    events = {event.kind: event for event in history.events if event.kind.startswith("treatment")}
    assert events["treatment-applied"].data["change"] == to_dict(change)
    assert events["treatment-applied"].step == 2
    assert events["treatment-undone"].step == 3
    assert [False, False, True, False] == (history["clip_factor"].values < 1.0).tolist()
    assert history["global_grad_norm"].values[2] == pytest.approx(0.05, rel=1e-3)


def test_a_live_change_without_a_place_raises_and_changes_nothing(tmp_path):
    """One of two changes fits: neither stays."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        step(model, optimizer)
        wanted = [
            changes.SetHyperparameter(name="eps", value=0.1),
            changes.SetHyperparameter(name="momentum", value=0.1),
        ]
        with pytest.raises(CannotApply, match="no hyperparameter momentum"):
            run.apply(wanted)
        step(model, optimizer)
    assert optimizer.param_groups[0]["eps"] == 1e-8


def test_the_observer_sees_what_the_optimizer_sees(tmp_path):
    """Recorded learning rates and gradient norms are those of the treated step; the skipped step's NaN is recorded."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        run.apply([changes.SetHyperparameter(name="lr", factor=0.125), changes.SkipBadSteps()])
        step(model, optimizer)
        optimizer.zero_grad()
        (F.cross_entropy(model(X), Y) * math.nan).backward()
        optimizer.step()
    (history,) = run.histories()
    assert history["learning_rate"].values[:, 0].tolist() == [0.125, 0.125]
    assert np.nansum(history["grad_nonfinite"].values[1]) > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "bad-step-skipped" in [event.kind for event in history.events]


def test_nothing_of_ours_stays_in_torch_afterwards():
    """Functions and hooks of torch are the original ones once the last listener has left."""
    originals = torch.sigmoid, F.relu, F.mse_loss, torch.Tensor.__sub__, torch.autograd.backward
    with treated(*HOOKS, changes.StandardizeTargets(), changes.RemoveOutputActivation(kind="sigmoid")) as told:
        step(model := mlp(), torch.optim.Adam(model.parameters()))
        told.undo()
    assert originals == (torch.sigmoid, F.relu, F.mse_loss, torch.Tensor.__sub__, torch.autograd.backward)
    assert taps._listeners == []


# ---- parameters that no optimizer holds ---------------------------------------------------------------------------


class Listed(nn.Module):
    """Layers in a list, a tuple and a dict; a list of what is registered already, one of numbers, an empty one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.hidden = [nn.Linear(3, 3) for _ in range(2)]
        self.pair = (nn.Linear(3, 3), nn.Tanh())
        self.heads = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
        self.known, self.sizes, self.empty, self.by_number = [self.first], [1, 2], [], {1: nn.Tanh()}

    def forward(self, x):
        x = self.first(x)
        for layer in (*self.hidden, *self.pair):
            x = layer(x)
        return self.heads["a"](x) + self.heads["b"](x)


def test_layers_in_containers_are_registered_and_trained():
    """The model computes the same, every layer of it moves, and undo gives the containers and the groups back."""
    model, x = Listed(), torch.randn(8, 3)
    containers, expected = [model.hidden, model.pair, model.heads], model(x)
    applier = Applier([changes.RegisterParameters()], on_event=lambda *_: None, on_refusal=pytest.fail)
    applier.listen()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    assert torch.equal(expected, model(x))
    assert all(a is b for a, b in zip(containers, [model.hidden, model.pair, model.heads], strict=True))
    assert model.heads.get("c") is None
    weights = [p.detach().clone() for p in model.parameters()]
    assert 2 * 6 == len(weights)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert ("Layers that were left out have been trained.",) == applier.undo()
    assert [] == [name for name, _ in model.named_parameters() if name.startswith("registered")]
    assert [id(p) for p in model.first.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
    assert 2 == len(optimizer.state)


def test_layers_that_replaced_others_are_trained():
    """A head that was put in after the optimizer was made joins it before the first step, and the old one leaves."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    applier = Applier([changes.RegisterParameters()], on_event=lambda *_: None, on_refusal=pytest.fail)
    applier.listen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced, model[1] = model[1], nn.Linear(4, 5)
    before = model[1].weight.detach().clone()
    for _ in range(2):  # what was there at the first step is not of that step alone
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
    assert [id(p) for p in model.parameters()] == [id(p) for p in optimizer.param_groups[0]["params"]]
    applier.undo()
    assert not torch.equal(before, model[1].weight)
    held = [*model[0].parameters(), *replaced.parameters()]
    assert [id(p) for p in held] == [id(p) for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("complete_first", [True, False])
def test_one_of_two_models_is_complete(complete_first):
    """A generator with layers in a list beside a complete discriminator: whoever steps first, they are trained."""
    generator, discriminator = Listed(), nn.Linear(2, 1)
    applier = Applier([changes.RegisterParameters()], on_event=lambda *_: None, on_refusal=pytest.fail)
    applier.listen()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (generator, discriminator)]
    before = generator.hidden[0].weight.detach().clone()
    for _ in range(2):
        for optimizer in reversed(optimizers) if complete_first else optimizers:
            optimizer.zero_grad()
            discriminator(generator(torch.randn(6, 3))).square().sum().backward()
            optimizer.step()
    applier.undo()
    assert not torch.equal(before, generator.hidden[0].weight)


def test_a_registered_model_does_not_outlive_the_program_s_use():
    """Nothing that is kept for undoing keeps a model or an optimizer alive."""
    applier = Applier([changes.RegisterParameters()], on_event=lambda *_: None, on_refusal=pytest.fail)
    applier.listen()
    model = Listed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(6, 3)).square().sum().backward()
    optimizer.step()
    refs = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [None, None] == [one() for one in refs]
    applier.undo()


def test_what_another_optimizer_holds_stays_there():
    """Two optimizers share a model: there is nothing to register, and the refusal says so."""
    model, refusals = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), []
    applier = Applier([changes.RegisterParameters()], on_event=lambda *_: None, on_refusal=refusals.append)
    applier.listen()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    model(torch.randn(6, 3)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    applier.undo()
    assert [2, 2] == [len(optimizer.param_groups[0]["params"]) for optimizer in optimizers]
    assert "Every trainable parameter of the model is held by an optimizer already." in refusals[0]
