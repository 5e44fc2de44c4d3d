"""A captured step in the script that made it: reached, reproduced, explained, and treated; and the command line."""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from isograd._capsule import open_capsule
from isograd._cli import main
from isograd._replay import BadOperation, Contribution, Operand, Replay, operation_of, shares_of

CAPTURE = Path(__file__).parent / "capture_script.py"


def write(folder, text, name="train.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text).lstrip())
    return path


def captured(folder, script, which, *arguments):
    """The capsule of one step of a script."""
    command = [sys.executable, str(CAPTURE), "runs", str(which), script.name, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    found = [*folder.glob("runs/*/capsules/*")]
    assert len(found) == 1, done.stderr
    return found[0]


class Done:
    """How a command ended."""

    def __init__(self, returncode, stdout, stderr):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


@pytest.fixture
def isograd(monkeypatch, capsys):
    """The command line in this process, run in a folder; the server that forks its processes is started once."""

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        status = main([str(argument) for argument in arguments])
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def replayed(isograd):
    def run(folder, capsule, *program):
        done = isograd(folder, "replay", capsule, "--json", *program)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout)

    return run


LOADER = """
    import sys
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.body(x))

    x, y = torch.randn(256, 8), torch.randint(0, 3, (256,))
    x[100] = 0
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    total = sum(part.sum() for part, _ in loader)  # a pass that trains nothing
    with torch.no_grad():
        model(next(iter(loader))[0])
    for step, (part, labels) in enumerate(loader):
        part = part + 0.1 * torch.randn_like(part) * (part != 0)
        size = part.norm(dim=1, keepdim=True)
        loss = F.cross_entropy(model(part / size), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    open("finished", "w").close()
"""


@pytest.fixture(scope="module")
def loader_capsule(tmp_path_factory):
    """Of a program that seeds nothing: only the capsule knows its weights, its batch and its noise."""
    folder = tmp_path_factory.mktemp("loader")
    script = write(folder, LOADER)
    capsule = captured(folder, script, "bad")
    (folder / "finished").unlink()
    return folder, script, capsule


def test_a_script_with_a_loader_takes_the_captured_step_first(loader_capsule, replayed):
    folder, script, capsule = loader_capsule
    status, told = replayed(folder, capsule, script.name)
    assert (status, told["grade"], told["reproduced"]) == (0, "exact", True)
    bad = told["first_bad"]
    assert (bad["operation"], bad["reason"], bad["num_bad_rows"]) == ("div", "0 divided by 0", 1)
    assert (bad["file"], bad["code"]) == ("train.py", "loss = F.cross_entropy(model(part / size), labels)")
    assert told["loss"] == "nan" and not (folder / "finished").exists()


def test_what_is_said_of_it_is_sentences(loader_capsule, isograd):
    folder, script, capsule = loader_capsule
    done = isograd(folder, "replay", capsule, script.name)
    assert done.returncode == 0 and not done.stderr
    said = " ".join(done.stdout.split())
    assert "was reproduced exactly" in said and "0 divided by 0" in said and "train.py:" in said


def test_a_finite_step_of_it_tells_layers_and_rows(loader_capsule, tmp_path, replayed):
    _, script, _ = loader_capsule
    script = write(tmp_path, script.read_text().replace("x[100] = 0", "x[100] = 1"))
    status, told = replayed(tmp_path, captured(tmp_path, script, 0), script.name)
    assert (status, told["grade"], told["first_bad"]) == (0, "exact", None), told["why"]
    assert told["layers"] and told["rows"] and told["update_norm"] > 0


SEEDED = """
    import sys
    import torch
    from torch import nn

    torch.manual_seed(0)
    data = torch.randn(128, 4)
    twin = data[7].clone()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for step in range(30):
        rows = torch.randint(0, 128, (8,))
        left, right = data[rows], data[rows.flip(0)]
        if step == 11:
            left, right = twin[None], twin[None]
        distance = (model(left) - model(right)).square().sum(1).sqrt()
        loss = distance.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            sys.exit("lost")
"""


@pytest.fixture(scope="module")
def seeded_capsule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeded")
    script = write(folder, SEEDED)
    return folder, script, captured(folder, script, "bad")


def test_a_script_without_a_loader_runs_to_the_same_step(seeded_capsule, replayed):
    folder, script, capsule = seeded_capsule
    assert open_capsule(capsule).step == 11
    status, told = replayed(folder, capsule, script.name)
    assert (status, told["grade"]) == (0, "exact")
    bad = told["first_bad"]
    assert (bad["direction"], bad["derivative_of"], bad["code"]) == (
        "backward", "sqrt", "distance = (model(left) - model(right)).square().sum(1).sqrt()",
    )  # fmt: skip


def test_treatments_are_tried_on_the_step(seeded_capsule, isograd):
    folder, script, capsule = seeded_capsule
    done = isograd(folder, "fix", "--capsule", capsule, "--json", script.name)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    assert told["baseline"]["grade"] == "exact"
    outcomes = {trial["treatment"]: trial["outcome"] for trial in told["trials"]}
    assert outcomes.get("skip-bad-steps") == "contained"
    best = told["trials"][told["best"]]
    assert done.returncode == 0 and best["outcome"] in ("resolved", "contained")
    assert best["replay"]["update_norm"] == 0 and best["replay"]["finite_after"]


def test_treatments_are_shown_as_a_table(seeded_capsule, isograd):
    folder, script, capsule = seeded_capsule
    done = isograd(folder, "fix", "--capsule", capsule, script.name)
    assert done.returncode == 0, done.stderr
    assert "skip-bad-steps" in done.stdout and "On this one step" in done.stdout and "contained" in done.stdout


GAN = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, z):
            return self.net(z)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 1))

        def forward(self, x):
            return self.net(x)

    torch.manual_seed(0)
    real = torch.randn(96, 2) * 3
    critic, generator = Critic(), Generator()
    steps = torch.optim.Adam(critic.parameters(), 1e-3), torch.optim.Adam(generator.parameters(), 1e-3)
    for (x,) in DataLoader(TensorDataset(real), 16, shuffle=True):
        fake = generator(torch.randn(16, 2))
        loss = F.softplus(-critic(x)).mean() + F.softplus(critic(fake.detach())).mean()
        steps[0].zero_grad()
        loss.backward()
        steps[0].step()
        loss = F.softplus(-critic(fake)).mean()
        steps[1].zero_grad()
        loss.backward()
        steps[1].step()
"""


def test_of_two_models_the_captured_one_is_found(tmp_path, replayed):
    script = write(tmp_path, GAN)
    capsule = captured(tmp_path, script, 0)
    assert open_capsule(capsule).facts["roots"] == {"model": "Critic"}
    _, told = replayed(tmp_path, capsule, script.name)
    assert set(told["grad_norms"]) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert told["first_bad"] is None


ACCUMULATED = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    for index, (x, y) in enumerate(DataLoader(data, 8, shuffle=True, num_workers=1)):
        loss = F.mse_loss(model(x), y) / 2
        scaler.scale(loss).backward()
        if index % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
"""


def test_micro_batches_a_loss_scale_clipping_and_a_worker_process(tmp_path, replayed):
    script = write(tmp_path, ACCUMULATED)
    capsule = captured(tmp_path, script, 2)
    assert len(open_capsule(capsule).facts["batches"]) == 2
    status, told = replayed(tmp_path, capsule, script.name)
    assert (status, told["grade"]) == (0, "exact")
    assert told["grad_norm"] == pytest.approx(0.1, rel=1e-3)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_without_a_program_it_is_said_what_there_is(loader_capsule, capsys):
    _, _, capsule = loader_capsule
    assert main(["replay", str(capsule)]) == 2
    said = capsys.readouterr().out
    assert "(Net)" in said and "batches of a data loader" in said and "Name the program" in said


def test_another_program_is_refused_in_one_sentence(loader_capsule, tmp_path, isograd):
    _, _, capsule = loader_capsule
    other = write(tmp_path, """
        import torch
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    """)  # fmt: skip
    nothing = write(tmp_path, "import torch\n", "nothing.py")
    broken = write(tmp_path, "import torch\nraise KeyError('mine')\n", "broken.py")
    for script, words in ((other, "has no parameter"), (nothing, "without making an optimizer"), (broken, "KeyError")):
        done = isograd(tmp_path, "replay", capsule, script.name)
        assert done.returncode == 2 and not done.stdout
        assert words in done.stderr and done.stderr.startswith("isograd: ") and done.stderr.count("\n") == 1


def test_what_is_no_capsule_or_no_script_is_said(loader_capsule, tmp_path, capsys):
    _, _, capsule = loader_capsule
    assert main(["replay", str(tmp_path)]) == 2
    assert main(["replay", str(capsule), "nowhere.py"]) == 2
    assert main(["replay", str(capsule), "nowhere.py:build"]) == 2
    assert capsys.readouterr().err.count("isograd: ") == 3


def test_a_capsule_from_anywhere_runs_nothing_and_steers_no_terminal(loader_capsule, tmp_path, capsys):
    _, _, capsule = loader_capsule
    evil = tmp_path / "evil"
    evil.mkdir()
    for file in capsule.iterdir():
        (evil / file.name).write_bytes(file.read_bytes())
    mine = write(tmp_path, "open('ran', 'w').close()\n", "mine.py")
    facts = json.loads((evil / "capsule.json").read_text())
    facts["command"] = [str(mine), "\x1b[2J"]
    facts["roots"] = {"../../x": "\x1b]0;Net\x07"}
    (evil / "capsule.json").write_text(json.dumps(facts))
    assert main(["replay", str(evil)]) == 2
    assert "\x1b" not in capsys.readouterr().out and not (tmp_path / "ran").exists()


# ---- a callable ---------------------------------------------------------------------------------------------------


def test_a_callable_that_returns_model_and_step_is_enough(loader_capsule, tmp_path, monkeypatch, capsys):
    _, _, capsule = loader_capsule
    source = textwrap.dedent(LOADER).split("x, y = ")[0]
    source += textwrap.dedent("""
        def build():
            model = Net()

            def step(batch):
                part, labels = batch
                part = part + 0.1 * torch.randn_like(part) * (part != 0)
                return F.cross_entropy(model(part / part.norm(dim=1, keepdim=True)), labels)

            return model, step

        def nothing():
            return 1

        def wrong():
            return nn.Linear(2, 2), lambda batch: None
    """)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, source, "rebuilt.py")
    assert main(["replay", str(capsule), "--json", "rebuilt.py:build"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["grade"] == "exact" and told["first_bad"]["reason"] == "0 divided by 0"
    assert main(["replay", str(capsule), "rebuilt.py:nothing"]) == 2
    assert main(["replay", str(capsule), "rebuilt.py:wrong"]) == 2
    said = capsys.readouterr().err
    assert "has to return (model, step_fn)" in said and "has no parameter" in said


# ---- values -------------------------------------------------------------------------------------------------------

OPERATION = BadOperation(
    operation="log", reason="log of 0", module="head", file="train.py", line=3, function="f", code="y = p.log()",
    made="-inf", count=2, size=10, rows=(1, 4), num_bad_rows=2, num_rows=5,
    operands=(Operand(name="self", dtype="float32", shape=(5, 2), low=0.0, high=1.0),),
)  # fmt: skip


def test_sentences_of_an_operation():
    assert str(OPERATION) == (
        "Forward pass: log of 0 in head, train.py:3 `y = p.log()`: 2 of 10 values are -inf. "
        "It was given self (float32 [5, 2], 0 to 1). Rows 1 and 4 of 5."
    )


def test_a_replay_survives_json():
    shares = (
        Contribution(name="row 1", share=0.5, norm=2.0),
        Contribution(name="row 2", share=0.25, norm=1.0, usual=0.1),
    )
    replay = Replay(
        step=3, subject="model", grade="exact", why="all is the same.", loss=math.nan, captured_loss=math.nan,
        grad_norms={"w": math.inf}, first_bad=OPERATION, rows=shares,
    )  # fmt: skip
    told = json.loads(json.dumps(replay.to_dict(), allow_nan=False))
    assert operation_of(told["first_bad"]) == OPERATION
    assert list(map(str, shares_of(told["rows"]))) == list(map(str, shares))
    assert told["loss"] == "nan" and told["grad_norm"] == "inf"
    assert "10 times its usual" in str(replay) and not replay.finite
