"""A captured step in the same process: the same bits, an honest grade, and who contributed."""

import json
import math
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from isograd import CapsuleUnreadable
from isograd._capsule import open_capsule
from isograd._grade import CANCELLED, TOLERANCE, Taken, judge
from isograd._watch import Shield
from isograd.frameworks.torch._contributions import RowShares
from isograd.frameworks.torch._flight import FlightRecorder
from isograd.frameworks.torch._restoration import DoesNotMatch

ROWS = 8


class Net(nn.Module):
    """What makes a replay hard: dropout, batch statistics, noise from NumPy's side of things."""

    def __init__(self, size=16):
        super().__init__()
        self.first = nn.Linear(8, size)
        self.norm = nn.BatchNorm1d(size)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(size, 3)

    def forward(self, x):
        return self.last(self.drop(F.relu(self.norm(self.first(x)))))


def fail(sentence):
    raise AssertionError(sentence)


@pytest.fixture
def train(tmp_path):
    """Train for some steps, capture the last one before it is taken, and return its capsule."""

    def run(model, optimizer, step, batches, *, follow=True, loss_of=float, scaler=None, before=lambda: None):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        recorder = FlightRecorder(folder, on_warning=fail, shield=Shield(fail))
        recorder.listen()
        if follow:
            recorder.follow({"model": model})
        batches = list(enumerate(batches)) if isinstance(batches, (list, range)) else enumerate(batches)
        path = None
        for index, batch in batches:
            if optimizer is not None:
                optimizer.zero_grad()
            loss = step(batch)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            before()
            if index == 3:
                path = recorder.capture(
                    subject="model",
                    step=index,
                    why=[SimpleNamespace(channel="loss", layer=None, observed=loss.item(), limit=1.0)],
                    action="observed",
                    roots={"model": model},
                    optimizer=optimizer,
                    loss=loss_of(loss.detach()),
                    scaler=scaler,
                )
                break
            if optimizer is not None:
                optimizer.step()
            recorder.end_step(index)
        recorder.close()
        return open_capsule(path)

    return run


def loader(n=64):
    torch.manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(n, 8), torch.randint(0, 3, (n,))), ROWS, shuffle=True)


def state_of(model, optimizer):
    tensors = [*model.state_dict().values()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [tensor.clone() for tensor in tensors]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_come_out_whatever_was_trained_since(train, name):
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())

    def step(batch):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x)
        return F.cross_entropy(model(x), y)

    capsule = train(model, optimizer, step, loader())
    for _ in range(3):
        F.cross_entropy(model(torch.randn(ROWS, 8)), torch.zeros(ROWS, dtype=torch.long)).backward()
        optimizer.step()
    replay = capsule.replay(step, model=model, optimizer=optimizer)
    assert replay.grade == "exact" and replay.reproduced and replay.noise == 0
    assert replay.loss == capsule.loss and replay.first_bad is None


def test_the_program_stands_afterwards_as_it_stood_before(train):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def step(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    capsule = train(model, optimizer, step, loader())
    model.eval()
    model.first.requires_grad_(False)
    gradients = [p.grad.clone() for p in model.parameters()]
    before, rng = state_of(model, optimizer), torch.get_rng_state()
    assert capsule.replay(step, model=model, optimizer=optimizer).grade == "exact"
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))
    assert torch.equal(rng, torch.get_rng_state()) and not model.training
    assert not model.first.weight.requires_grad and model.last.weight.requires_grad
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))


def test_a_step_function_that_raises_leaves_the_program_as_it_was(train):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def step(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    capsule = train(model, optimizer, step, loader())
    with torch.no_grad():
        model.last.weight.fill_(7)
    before = state_of(model, optimizer)

    def broken(batch):
        step(batch).backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        capsule.replay(broken, model=model, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))


def test_a_step_function_may_run_backward_and_step_itself(train):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def loss_of(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    capsule = train(model, optimizer, loss_of, loader())

    def step(batch):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    replay = capsule.replay(step, model=model, optimizer=optimizer)
    assert replay.grade == "exact" and replay.update_norm > 0 and replay.finite_after


def test_clipping_of_the_run_is_done_again(train):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(batch):
        return F.cross_entropy(model(batch[0]), batch[1]) * 100

    capsule = train(model, optimizer, step, loader(), before=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    facts = {**capsule.facts, "clips": [{"norm": 50.0, "limit": 1.0}]}
    (capsule.path / "capsule.json").write_text(json.dumps(facts))
    replay = capsule.replay(step, model=model)
    assert replay.grade == "exact" and replay.grad_norm == pytest.approx(1.0, rel=1e-4)


def test_a_loss_scale_is_applied_and_taken_out_again(train):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def drop_overflow():
        scaler._per_optimizer_states.clear()

    capsule = train(model, optimizer, step, loader(), scaler=scaler, before=drop_overflow)
    assert capsule.replay(step, model=model).grade == "exact"


def test_a_program_without_a_loader_gets_its_own_data_by_name(train):
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data, targets = torch.randn(64, 8), torch.randint(0, 3, (64,))

    def step(rows):
        x, y = data[rows], targets[rows]
        return F.cross_entropy(model(x), y)

    rows = [torch.randint(0, 64, (ROWS,)) for _ in range(5)]
    capsule = train(model, optimizer, step, rows)
    assert "batch" in capsule.facts["locals"]
    replay = capsule.replay(lambda held: step(held["batch"]), model=model)
    assert replay.grade == "exact"


def test_batches_of_any_shape_arrive_as_they_were(train):
    Pair = namedtuple("Pair", "x y")  # noqa: PYI024
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = [{"pair": (torch.randn(8), torch.tensor(1)), "weight": 2.0, "name": "a"} for _ in range(64)]

    def collate(items):
        x, y = (torch.stack(part) for part in zip(*(item["pair"] for item in items), strict=True))
        return {"pair": Pair(x, y), "weight": items[0]["weight"], "names": [item["name"] for item in items]}

    def step(batch):
        assert batch["names"] == ["a"] * ROWS
        return batch["weight"] * F.cross_entropy(model(batch["pair"].x), batch["pair"].y)

    capsule = train(model, optimizer, step, DataLoader(rows, ROWS, collate_fn=collate))
    assert capsule.replay(step, model=model).grade == "exact"


# ---- grades -------------------------------------------------------------------------------------------------------


def capsule_of(train, model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return train(model, optimizer, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), loader())


def test_a_difference_in_the_last_digits_is_within_tolerance(train):
    torch.manual_seed(0)
    model = Net()
    capsule = capsule_of(train, model)

    def step(batch):  # the same sum in another order
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses.flip(0).double().sum().float() / ROWS * (1 + 1e-6)

    replay = capsule.replay(step, model=model)
    assert replay.grade == "within-tolerance" and 0 < replay.difference < TOLERANCE
    assert "differ by at most" in replay.why


def test_another_computation_is_said_to_be_one(train):
    model = Net()
    capsule = capsule_of(train, model)
    replay = capsule.replay(lambda batch: F.cross_entropy(model(batch[0]), batch[1]) * 1.5, model=model)
    assert replay.grade == "not-reproducible" and not replay.reproduced
    assert "in the run it was" in replay.why and "computes something else" in replay.why


def test_what_varies_from_replay_to_replay_is_measured(train):
    model = Net()
    capsule = capsule_of(train, model)
    count = iter(range(100))

    def step(batch):
        return F.cross_entropy(model(batch[0]), batch[1]) * (1 + 0.05 * next(count))

    replay = capsule.replay(step, model=model)
    assert replay.noise == pytest.approx(0.05, rel=0.1)


def test_a_missing_gradient_is_named(train):
    model = Net()
    capsule = capsule_of(train, model)

    def step(batch):
        return F.cross_entropy(model.last(F.relu(model.norm(model.first(batch[0]))).detach()), batch[1])

    why = capsule.replay(step, model=model).why
    assert "has no gradient, in the run it had one" in why


def test_another_model_is_refused_in_a_sentence(train):
    capsule = capsule_of(train, Net())
    for other, words in ((Net(17), "has shape"), (nn.Linear(8, 3), "has no parameter")):
        with pytest.raises(DoesNotMatch, match=words):
            capsule.replay(lambda batch: None, model=other)


def test_a_step_without_a_loss_is_refused_in_a_sentence(train):
    model = Net()
    capsule = capsule_of(train, model)
    with pytest.raises(ValueError, match="has to return the loss"):
        capsule.replay(lambda batch: "nothing", model=model)


def test_a_damaged_capsule_is_refused(train):
    model = Net()
    capsule = capsule_of(train, model)
    for name in ("model", "batch"):
        path = capsule.path / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CapsuleUnreadable):
            capsule.replay(lambda batch: None, model=model)
        path.write_bytes(whole)


@given(
    norms=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    change=st.floats(0, 0.5),
    which=st.integers(0, 4),
    noise=st.sampled_from([0.0, 1e-6, 0.02]),
)
def test_the_grade_follows_from_the_largest_difference(norms, change, which, noise):
    which %= len(norms)
    names = [f"p{index}" for index in range(len(norms))]
    facts = {"loss": 1.0, "grad_norms": dict(zip(names, norms, strict=True)), "grad_hashes": dict.fromkeys(names, "x"),
             "parameters": {}, "calls": []}  # fmt: skip

    def taken(scale):
        now = {
            name: norm * (scale if index == which else 1)
            for index, (name, norm) in enumerate(zip(names, norms, strict=True))
        }
        hashes = {**dict.fromkeys(names, "x"), **({names[which]: "y"} if scale != 1 else {})}
        return Taken(losses=(1.0,), grad_norms=now, grad_hashes=hashes)

    judged = judge(facts, taken(1 + change), taken((1 + change) * (1 + noise)), [])
    allowed = max(TOLERANCE, 3 * noise / (1 + noise))
    expected = change / (1 + change)
    if 1 + change == 1:
        assert judged.grade == "exact"
    elif abs(expected - allowed) > 1e-9 and norms[which] > CANCELLED * max(norms):
        assert judged.grade == ("within-tolerance" if expected <= allowed else "not-reproducible")
        assert judged.difference == pytest.approx(expected, rel=1e-6)


def test_nan_in_the_same_places_is_the_same():
    facts = {"loss": "nan", "grad_norms": {"a": "nan", "b": 1.0}, "grad_hashes": {}, "parameters": {}, "calls": []}
    same = Taken(losses=(math.nan,), grad_norms={"a": math.nan, "b": 1.0})
    assert judge(facts, same, same).grade == "within-tolerance"
    other = Taken(losses=(math.nan,), grad_norms={"a": math.inf, "b": 1.0})
    assert judge(facts, other, other).grade == "not-reproducible"


# ---- what broke, and who contributed ------------------------------------------------------------------------------


def test_the_first_bad_operation_comes_with_its_rows(train):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    count = iter(range(1000))

    def step(batch):
        x, y = batch
        p = F.softmax(model(x), 1)
        if next(count) >= 3:
            p = p * (torch.arange(len(x)) != 2)[:, None]
        return F.nll_loss(p.log(), y)

    capsule = train(model, optimizer, step, loader())
    replay = capsule.replay(step, model=model)
    assert replay.grade == "exact" and math.isinf(replay.loss)
    bad = replay.first_bad
    assert (bad.operation, bad.reason, bad.rows, bad.num_rows) == ("log", "log of 0", (2,), ROWS)
    assert bad.function == "step" and "p.log()" in bad.code
    assert not replay.layers and "log of 0" in str(replay)


def test_a_finite_spike_is_traced_to_layer_and_row(train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    count = iter(range(1000))

    def step(batch):
        x, y = batch
        y = y.float()
        if next(count) >= 3:
            y = y.index_fill(0, torch.tensor([5]), 1e4)
        return F.mse_loss(model(x).squeeze(1), y)

    capsule = train(model, optimizer, step, loader())
    replay = capsule.replay(step, model=model)
    assert replay.grade == "exact" and replay.finite and replay.first_bad is None
    assert replay.rows[0].name == "row 5" and replay.rows[0].share > 0.99
    assert {one.name for one in replay.layers} == {"0", "2"}
    assert sum(one.share for one in replay.layers) == pytest.approx(1)


@pytest.mark.parametrize("times", [None, 5])
def test_shares_of_rows_agree_with_gradients_row_by_row(times):
    """Oracle: the gradient of each row's loss alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))
    x = torch.randn(7, 4) if times is None else torch.randn(7, times, 4)
    shares = RowShares({"": model}, 7)
    with shares.listening():
        model(x).square().sum().backward()
    squares = []
    for row in x:
        gradients = torch.autograd.grad(model(row[None]).square().sum(), list(model.parameters()))
        squares.append(sum(float(g.double().square().sum()) for g in gradients))
    expected = {f"row {i}": square / sum(squares) for i, square in enumerate(squares)}
    assert {one.name: one.share for one in shares.shares()} == pytest.approx(expected, rel=1e-4)


def test_without_linear_layers_rows_are_told_by_the_output():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(6, 2, 8)
    x[4] *= 100
    shares = RowShares({"": model}, 6)
    with shares.listening():
        model(x).square().sum().backward()
    assert shares.shares()[0].name == "row 4"


def test_a_replay_is_told_in_full_as_json(train):
    model = Net()
    capsule = capsule_of(train, model)
    told = json.loads(
        json.dumps(capsule.replay(lambda b: F.cross_entropy(model(b[0]), b[1]), model=model).to_dict(), allow_nan=False)
    )
    assert told["schema"] == 1 and told["grade"] == "exact" and told["reproduced"] is True
    assert set(told["grad_norms"]) == {name for name, _ in model.named_parameters()}
