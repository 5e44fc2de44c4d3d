"""One convolutional network on digits under the learning-rate schedules that people use."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, lr_scheduler

STEPS = 300


def warm_up(optimizer):
    return lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=60)


def cyclic(optimizer):
    return lr_scheduler.CyclicLR(optimizer, base_lr=0.005, max_lr=0.1, step_size_up=30)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS)


def step_decay(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=90, gamma=0.1)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def warm_restarts(optimizer):
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=40, T_mult=2)


def warm_up_cosine(optimizer):
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.001, total_iters=40)
    return lr_scheduler.SequentialLR(
        optimizer, [first, lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 40)], milestones=[40]
    )


def polynomial(optimizer):
    return lr_scheduler.PolynomialLR(optimizer, total_iters=STEPS, power=2)


SCHEDULES = (warm_up, cyclic, one_cycle, step_decay, cosine, warm_restarts, warm_up_cosine, polynomial)


def main():
    by_name = {schedule.__name__.replace("_", "-"): schedule for schedule in SCHEDULES}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schedule", choices=by_name)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = by_name[args.schedule](optimizer)
    for step in range(STEPS):
        chosen = torch.randint(1400, (50,))
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 60 == 0:
            print(f"step {step}  lr {scheduler.get_last_lr()[0]:.4f}  loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        print("accuracy:", (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item())


if __name__ == "__main__":
    main()
