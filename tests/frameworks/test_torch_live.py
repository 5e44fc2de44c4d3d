"""Changes to a program that runs already: what they do, that they can be taken back, and what stays."""

import copy
import gc
import math
import typing
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd import _changes as changes
from isograd._changes import CannotApply
from isograd.frameworks.torch import _taps as taps

GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(9, 16, 5, generator=GENERATOR), torch.rand(9, 16, 1, generator=GENERATOR)


class Program:
    """A training loop over fixed batches that can be set back to an earlier step: weights, gradients, optimizer.

    `scaled`: by what the loss of some batches is multiplied. `under`: the batches of the treated steps.
    """

    def __init__(self, *, dtype=torch.float32, clears=True, scaled=None, under=(3, 4, 5), optimizer=torch.optim.Adam):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid()
        ).to(dtype)
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        self.dtype, self.clears, self.scaled, self.under = dtype, clears, scaled or {}, under

    def step(self, index):
        if self.clears:
            self.optimizer.zero_grad()
        for half in (slice(8), slice(8, 16)):
            x = X[index, half].to(self.dtype)
            loss = F.mse_loss(self.model(x), Y[index, half].to(self.dtype))
            (loss * self.scaled.get(index, 1.0)).backward()
        self.optimizer.step()

    def steps(self, *indices):
        for index in indices:
            self.step(index)

    def state(self):
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict())), gradients

    def set_back(self, state):
        (model, optimizer), gradients = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient


def flat(thing):
    """Everything in nested containers; tensors by their bits."""
    if isinstance(thing, torch.Tensor):
        return (
            str(thing.dtype),
            thing.shape,
            thing.detach().contiguous().view(torch.uint8).flatten().tolist() if (thing.dim()) else repr(thing.item()),
        )
    if isinstance(thing, dict):
        return {key: flat(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [flat(value) for value in thing]
    return repr(thing)


def shape_of(program):
    """What a program consists of, its values apart: classes, attributes, hooks, groups, and torch's own functions."""
    return (
        [
            (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), [*m._parameters, *m._modules])
            for m in program.model.modules()
        ],
        [id(p) for p in program.model.parameters()],
        [{**group, "params": [id(p) for p in group["params"]]} for group in program.optimizer.param_groups],
        sorted(vars(program.optimizer).keys() - {"_opt_called"}),  # that it has stepped, for schedulers
        (torch.sigmoid, torch.tanh, F.relu, F.mse_loss, torch.Tensor.__sub__, torch.Tensor.tanh),
    )


C = changes
CASES = [
    # (change, the program on which it acts, what undo() says)
    *[
        (C.ClipGradients(method=method, limit=1e-3), {}, None)
        for method in ("value", "norm", "tensor-norm", "adaptive")
    ],
    (C.ClipGradients(method="percentile", limit=10.0), {}, None),
    # Its warm-up are 25 steps; then one of them leaps.
    (C.ClipGradients(method="z-score", limit=2.0), {"under": (3, 4, 5) * 9 + (6,), "scaled": {6: 1e4}}, None),
    (C.ClampWeights(limit=0.1), {}, "clamped stay in [-0.1, 0.1]"),
    (C.PenalizeWeights(l1=0.1, l2=0.1), {}, None),
    (C.SetHyperparameter(name="lr", factor=10.0), {}, None),
    (C.SetHyperparameter(name="lr", value=0.5), {}, None),
    (C.SetHyperparameter(name="beta1", value=0.1), {}, None),
    (C.SetHyperparameter(name="eps", value=0.1), {}, None),
    (C.SetHyperparameter(name="weight_decay", value=0.1), {}, None),
    (C.SetHyperparameter(name="momentum", value=0.9), {"optimizer": torch.optim.SGD}, None),
    (C.SetHyperparameter(name="momentum", value=0.9), {"optimizer": torch.optim.RMSprop}, None),
    *[
        (C.ScheduleLearningRate(shape=shape, steps=2, end=0.1), {}, None)
        for shape in ("warm-up", "linear", "step", "exponential", "inverse-sqrt", "cosine")
    ],
    (C.ReplaceOptimizer(optimizer="SGD"), {}, "Adam goes on with the state that it had before SGD took over"),
    (C.ReplaceOptimizer(optimizer="RMSprop", hyperparameters=(("lr", 0.1),)), {}, "before RMSprop took over"),
    (C.ClipUpdates(limit=0.1), {}, None),
    *[
        (C.ReinitializeLayers(method=method), {}, "the old ones are gone")
        for method in ("xavier", "kaiming", "orthogonal", "lsuv", "critical")
    ],
    (C.ReplaceActivations(sources=("tanh",), target="gelu"), {}, None),
    *[
        (C.InsertNormalization(kind=kind), {}, "trained with normalization")
        for kind in ("batch", "layer", "group", "rms")
    ],
    *[(C.InsertShortcuts(kind=kind), {}, "trained with shortcuts") for kind in ("residual", "rezero")],
    (C.StandardizeInputs(batches=2), {}, "trained on standardized inputs"),
    (C.StandardizeTargets(batches=2), {}, "trained on standardized targets"),
    (C.RemoveOutputActivation(kind="sigmoid"), {}, "trained without the output activation"),
    (C.ZeroGradients(), {"clears": False}, None),
    (
        C.RegisterParameters(),
        {"optimizer": lambda p, lr: torch.optim.Adam(list(p)[:-2], lr=lr)},
        "left out have been trained",
    ),
    (C.AverageAccumulation(), {}, None),
    (C.RaisePrecision(), {"dtype": torch.bfloat16}, "rounded back"),
    (C.ScaleLoss(scale=3.0), {}, None),
    (C.SkipBadSteps(), {"scaled": {4: math.nan}}, None),
]
IDS = [
    "-".join(str(part) for part in (type(change).__name__, *list(vars(change).values())[:2]) if part)
    for change, _, _ in CASES
]


def test_every_kind_of_change_is_tried():
    """The table below leaves out none of the union."""
    assert {type(change) for change, _, _ in CASES} == set(typing.get_args(changes.Change))


@pytest.mark.parametrize("change, kind, said", CASES, ids=IDS)
def test_a_change_acts_until_it_is_undone_and_then_training_goes_on_in_the_same_bits(change, kind, said, tmp_path):
    """Three plain steps, three under the change, undo; set back to the third step, the program takes the steps that
    one which was never treated takes. What stays is said.
    """
    plain, untreated, program = Program(**kind), Program(**kind), Program(**kind)
    plain.steps(0, 1, 2, 3, 4, 5)
    untreated.steps(0, 1, 2, *untreated.under)
    unwatched = shape_of(program)
    # Every step is deep, whatever reading it costs: the watch's own hooks stay where they are.
    with isograd.watch(program.model, program.optimizer, out=tmp_path, every=1, budget=math.inf) as run:
        program.steps(0, 1, 2)
        start, consists = program.state(), shape_of(program)
        undo = run.apply(change)
        program.steps(*program.under)
        treated = flat(program.model.state_dict())
        left = undo()
        assert shape_of(program) == consists
        program.set_back(start)
        program.steps(3, 4, 5)
    assert shape_of(program) == unwatched
    assert flat(plain.state()) == flat(program.state())
    assert treated != flat(untreated.model.state_dict())
    assert "watch-detached" not in [event.kind for event in run.histories()[0].events]
    assert torch.equal(torch.get_rng_state(), plain_random_state(kind))
    if said is None:
        assert left == ()
    else:
        (sentence,) = left
        assert said in sentence
        assert sentence.endswith(".")
    assert taps._listeners == []


def plain_random_state(kind):
    """The state of the generator after a program that was not treated."""
    Program(**kind).steps(0)
    return torch.get_rng_state()


@pytest.mark.parametrize("change, kind, said", CASES, ids=IDS)
def test_undone_before_a_step_nothing_stays(change, kind, said, tmp_path):
    """Applied and undone in the same breath, there is nothing to say and every bit is as it was."""
    program = Program(**kind)
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.steps(0, 1)
        before, consists = flat(program.state()), shape_of(program)
        assert run.apply(change)() == ()
        assert flat(program.state()) == before
        assert shape_of(program) == consists


# ---- no place ---------------------------------------------------------------------------------------------------


class Unusual(torch.optim.Adam):
    """An optimizer that cannot be constructed as torch's are."""

    def __init__(self, parameters, rate, *, lr):
        super().__init__(parameters, lr=rate * lr)


PLACELESS = [
    ([C.SetHyperparameter(name="momentum", value=0.9)], {}, "no hyperparameter momentum"),
    ([C.ReplaceOptimizer(optimizer="Sgdd")], {}, "no Sgdd"),
    ([C.ReplaceOptimizer(optimizer="Muon")], {}, "Muon cannot take over"),
    ([C.ClipUpdates()], {"optimizer": torch.optim.SGD}, "not normalized"),
    ([C.ReinitializeLayers(method="chrono")], {}, "recurrent"),
    ([C.ReinitializeLayers(method="fixup")], {}, "residual"),
    ([C.ReplaceActivations(sources=("tanh",), target="swish")], {}, "no activation 'swish'"),
    ([C.InsertShortcuts(kind="dense")], {}, "another model"),
    ([C.ScheduleLearningRate(shape="plateau", steps=9, end=2.0)], {}, "schedule does not exist"),
    # Where others have one, they are taken back as well.
    ([C.InsertNormalization(kind="layer"), C.ReplaceOptimizer(optimizer="Sgdd")], {}, "no Sgdd"),
    ([C.StandardizeTargets(), C.InsertShortcuts(kind="rezero"), C.InsertShortcuts(kind="dense")], {}, "another model"),
    ([C.ScaleLoss(scale=2.0), C.SetHyperparameter(name="momentum", value=0.9)], {}, "momentum"),
    # It comes to light when the first of two layers has its normalization already.
    ([C.InsertNormalization(kind="batch")], {"optimizer": lambda p, lr: Unusual(p, 1.0, lr=lr)}, "Unusual cannot take"),
]


@pytest.mark.parametrize("wanted, kind, word", PLACELESS)
def test_a_treatment_without_a_place_is_refused_in_a_sentence_and_nothing_is_changed(wanted, kind, word, tmp_path):
    """No bit, no hook, no attribute, no event; training goes on as it would have."""
    plain, program = Program(**kind), Program(**kind)
    plain.steps(0, 1, 2)
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.steps(0, 1)
        before, consists = flat(program.state()), shape_of(program)
        with pytest.raises(CannotApply, match=word) as refusal:
            run.apply(wanted)
        assert flat(program.state()) == before
        assert shape_of(program) == consists
        program.step(2)
    assert flat(plain.state()) == flat(program.state())
    assert str(refusal.value).count(". ") == 0
    assert str(refusal.value).endswith(".")
    assert not [event for event in run.histories()[0].events if event.kind.startswith("treatment")]


def test_a_group_that_lacks_a_hyperparameter_leaves_the_others_as_they_were(tmp_path):
    """Where only one of two groups has what is to be set, neither is set."""
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.Adam([{"params": first.parameters()}, {"params": second.parameters()}])
    del optimizer.param_groups[1]["eps"]
    with isograd.watch(optimizer, out=tmp_path) as run, pytest.raises(CannotApply, match="no hyperparameter eps"):
        run.apply(C.SetHyperparameter(name="eps", value=0.5))
    assert optimizer.param_groups[0]["eps"] == 1e-8


def test_before_anything_trains_there_is_nothing_to_change(tmp_path):
    """A model without an optimizer."""
    with isograd.watch(nn.Linear(2, 1), out=tmp_path) as run, pytest.raises(CannotApply, match="No optimizer trains"):
        run.apply(C.ScaleLoss(scale=2.0))
    assert taps._listeners == []


def test_what_only_the_forward_pass_shows_to_have_no_place_is_taken_back_and_said(tmp_path, capsys):
    """The model never calls a ReLU: the first treated step is the plain one, and stderr and the run file say why."""
    plain, program = Program(), Program()
    plain.steps(0, 1, 2)
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.step(0)
        run.apply(C.ReplaceActivations(sources=("relu",), target="gelu"))
        program.steps(1, 2)
    assert flat(plain.state()) == flat(program.state())
    assert "No hidden activation of the kind relu was called" in capsys.readouterr().err
    assert "treatment-refused" in [event.kind for event in run.histories()[0].events]


# ---- several, and the end of the watch ----------------------------------------------------------------------------


@pytest.mark.parametrize("first_back", [0, 1])
def test_two_treatments_are_taken_back_in_any_order(first_back, tmp_path):
    """tanh to GELU, GELU to SiLU: with the first taken back the second one's stays, and the other way round."""
    program = Program()
    pairs = [("tanh", "gelu"), ("gelu", "silu")]
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.step(0)
        consists = shape_of(program)
        undo = [run.apply(C.ReplaceActivations(sources=(a,), target=b)) for a, b in pairs]
        assert type(program.model[1]) is nn.SiLU
        undo[first_back]()
        assert type(program.model[1]) is (nn.GELU if first_back else nn.SiLU)
        undo[1 - first_back]()
        assert shape_of(program) == consists


def test_what_has_joined_since_stays_in_the_optimizer(tmp_path):
    """Undone, registered parameters leave the optimizer; those of a normalization that came later are trained on."""
    program = Program(optimizer=lambda p, lr: torch.optim.Adam(list(p)[:-2], lr=lr))
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        undo = run.apply(C.RegisterParameters())
        program.step(0)
        undo_normalization = run.apply(C.InsertNormalization(kind="layer"))
        (group,) = program.optimizer.param_groups
        first, registered, inserted = group["params"][:4], group["params"][4:6], group["params"][6:]
        undo()
        assert list(map(id, first + inserted)) == list(map(id, group["params"]))
        undo_normalization()
        assert list(map(id, first)) == list(map(id, group["params"]))
    assert list(map(id, registered)) == list(map(id, [*program.model.parameters()][4:]))
    assert inserted


def test_what_a_replaced_layer_left_in_the_optimizer_is_given_back(tmp_path):
    """A layer that was replaced leaves the optimizer while its successor is trained; undone, it stands where it stood,
    with its state.
    """
    program = Program()
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.step(0)
        held = list(program.optimizer.param_groups[0]["params"])
        undo = run.apply(C.RegisterParameters())
        program.model[0] = nn.Linear(5, 8)
        program.step(1)
        now = list(map(id, program.optimizer.param_groups[0]["params"]))
        assert [*map(id, held[2:]), *map(id, program.model[0].parameters())] == now
        undo()
        assert list(map(id, held)) == list(map(id, program.optimizer.param_groups[0]["params"]))
        assert all(program.optimizer.state[p]["step"] for p in held)


def test_a_function_in_an_attribute_stays_replaced_until_the_last_treatment_is_taken_back(tmp_path):
    """`self.activation = torch.tanh` is given back when nobody asks for its calls any more."""

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.activation = nn.Linear(5, 5), nn.Linear(5, 1), torch.tanh

        def forward(self, x):
            return self.last(self.activation(self.first(x)))

    model = Holding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = X[0]
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        undo_gelu = run.apply(C.ReplaceActivations(sources=("tanh",), target="gelu"))
        undo_shortcuts = run.apply(C.InsertShortcuts(kind="residual"))
        both = model(x)
        undo_gelu()
        one = model(x)
        undo_shortcuts()
    assert model.activation is torch.tanh
    torch.testing.assert_close(model.last(x + F.gelu(model.first(x))), both)
    torch.testing.assert_close(model.last(x + torch.tanh(model.first(x))), one)


def leave_changed(out):
    """A watched program that ends with its model changed; whether functions of torch had stand-ins until then."""
    original, program = torch.tanh, Program()
    with isograd.watch(program.model, program.optimizer, out=out) as run:
        program.step(0)
        run.apply(C.ReplaceActivations(sources=("tanh",), target="relu"))
        program.step(1)
    return torch.tanh is not original


def test_with_the_last_changed_model_gone_torch_is_itself_again(tmp_path):
    """A watch that ended without undo keeps its model changed; nothing is left of it once the model is."""
    originals = torch.tanh, F.relu
    assert leave_changed(tmp_path)
    for _ in range(3):  # tensors that C++ knows take more than one round
        gc.collect()
    assert (torch.tanh, F.relu) == originals


def test_an_optimizer_made_under_a_treatment_is_treated_and_let_go(tmp_path):
    """A loop that makes a new one every epoch: it trains what was inserted, at the changed rate, until undo."""
    program = Program()
    own = [id(parameter) for parameter in program.model.parameters()]
    with isograd.watch(program.model, out=tmp_path) as run:
        program.step(0)
        undo = run.apply([C.InsertNormalization(kind="layer"), C.SetHyperparameter(name="eps", value=0.5)])
        program.optimizer = torch.optim.Adam(program.model.parameters(), lr=0.01)
        program.steps(1, 2)
        assert program.optimizer.param_groups[0]["eps"] == 0.5
        assert len(program.optimizer.state) > len(own)
        undo()
    assert program.optimizer.param_groups[0]["eps"] == 1e-8
    assert [id(parameter) for parameter in program.optimizer.param_groups[0]["params"]] == own
    assert len(program.optimizer.state) == len(own)


def test_bad_steps_of_other_optimizers_are_not_skipped(tmp_path):
    """Only what is watched is treated."""
    program, other = Program(scaled={1: math.nan}), Program(scaled={1: math.nan})
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.step(0)
        run.apply(C.SkipBadSteps())
        program.step(1)
        other.step(1)
    assert all(torch.isfinite(p).all() for p in program.model.parameters())
    assert not all(torch.isfinite(p).all() for p in other.model.parameters())


def test_a_closed_watch_ends_changes_of_steps_and_leaves_the_model_until_it_is_undone(tmp_path):
    """After the `with` block rates are the program's own, the model is still normalized, and undo() still works."""
    program = Program()
    consists = shape_of(program)
    with isograd.watch(program.model, program.optimizer, out=tmp_path) as run:
        program.step(0)
        undo = run.apply([C.InsertNormalization(kind="layer"), C.SetHyperparameter(name="lr", factor=0.0)])
        before = flat([*program.model.parameters()])
        program.step(1)
        assert flat([*program.model.parameters()]) == before
    normalized = program.model(X[0])
    program.step(2)
    assert not torch.equal(normalized, program.model(X[0]))  # at the program's own rate again
    assert hasattr(program.model[0], "normalization")
    (sentence,) = undo()
    assert "normalization" in sentence
    assert shape_of(program) == consists
    with pytest.raises(CannotApply, match="over"):
        run.apply(C.ScaleLoss(scale=2.0))


# ---- other models -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions in blocks, batch normalization, ReLU as a function in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)) for _ in range(2)
        )
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM and a plain recurrence; the last time step is classified."""

    def __init__(self):
        super().__init__()
        self.lstm, self.rnn = nn.LSTM(5, 6, batch_first=True), nn.RNN(6, 6, batch_first=True)
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.rnn(self.lstm(x)[0])[0][:, -1]).sigmoid()


class Attention(nn.Module):
    """Transformer layers, which keep their activation as a function, over padded sequences."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 1)

    def forward(self, x):
        padding = torch.arange(x.shape[1]).expand(len(x), -1) >= 3
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, 0])


class Coder(nn.Module):
    """The loop calls methods, never the model itself; decoding shares the encoder's weights."""

    def __init__(self):
        super().__init__()
        self.inner, self.mean, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.activation = torch.tanh

    def encode(self, x):
        return self.mean(self.activation(self.inner(x)))

    def forward(self, x):
        return self.out(F.relu(F.linear(self.encode(x), self.inner.weight)))


MODELS = {
    "residual": (Residual, (6, 3, 8, 8), lambda model, x: model(x)),
    "recurrent": (Recurrent, (6, 4, 5), lambda model, x: model(x)),
    "attention": (Attention, (6, 4, 5), lambda model, x: model(x)),
    "methods": (Coder, (6, 5), lambda model, x: model.out(torch.tanh(model.encode(x)))),
}
MODEL_CHANGES = [
    C.ReplaceActivations(sources=("relu", "tanh"), target="gelu"),
    C.ReplaceActivations(sources=("tanh",), target="relu"),
    C.InsertNormalization(kind="batch"),
    C.InsertNormalization(kind="rms"),
    C.InsertShortcuts(kind="residual"),
    C.InsertShortcuts(kind="rezero"),
    C.ReinitializeLayers(method="lsuv"),
    C.ReinitializeLayers(method="orthogonal"),
    C.ReinitializeLayers(method="forget-bias"),
    C.ReinitializeLayers(method="chrono"),
    C.ReinitializeLayers(method="identity-recurrence"),
    C.RemoveOutputActivation(kind="sigmoid"),
    C.StandardizeInputs(batches=1),
    C.StandardizeTargets(batches=1),
    C.RaisePrecision(),
]


def applied_or_refused(run, change):
    """How to undo it, also where there is no place for it: then there is nothing to undo."""
    try:
        return run.apply(change)
    except CannotApply:
        return tuple


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "change", MODEL_CHANGES, ids=lambda c: "-".join(map(str, [type(c).__name__, *vars(c).values()]))
)
def test_a_changed_model_trains_evaluates_and_is_copied_until_it_is_itself_again(name, change, tmp_path):
    """Steps, evaluation without gradients and a deep copy work under the change; undone, results are the old bits."""
    torch.manual_seed(0)
    make, shape, call = MODELS[name]
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(shape), torch.rand(shape[0], 1)

    def step():
        optimizer.zero_grad()
        loss = F.mse_loss(call(model, x), y)
        loss.backward()
        optimizer.step()
        return loss

    program = SimpleNamespace(model=model, optimizer=optimizer)
    consists, state = shape_of(program), copy.deepcopy(model.state_dict())
    expected = [flat(call(model.train(mode), x)) for mode in (False, True)]
    with isograd.watch(model, optimizer, out=tmp_path) as run:
        model.load_state_dict(state)
        undo = applied_or_refused(run, change)
        assert all(torch.isfinite(step()) for _ in range(3))
        with torch.no_grad():
            answer = call(model.eval(), x)
            assert torch.isfinite(answer).all()
            torch.testing.assert_close(call(copy.deepcopy(model), x), answer)
        undo()
    assert shape_of(program) == consists
    assert "watch-detached" not in [event.kind for event in run.histories()[0].events]
    model.load_state_dict(state)
    assert [flat(call(model.train(mode), x)) for mode in (False, True)] == expected
