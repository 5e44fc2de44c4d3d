"""One perceptron on handwritten digits under torch's optimizers, each with a rate that suits it."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn, optim

OPTIMIZERS = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.2),
    "sgd-weight-decay": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.02),
    "adadelta": lambda parameters: optim.Adadelta(parameters, lr=1.0),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
    "adam": lambda parameters: optim.Adam(parameters, lr=2e-3),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, amsgrad=True),
    "nadam": lambda parameters: optim.NAdam(parameters, lr=2e-3),
    "radam": lambda parameters: optim.RAdam(parameters, lr=3e-3),
    "adamax": lambda parameters: optim.Adamax(parameters, lr=4e-3),
    # Its steps grow as long as signs agree, up to 50 by default: enough to throw a converged network out again.
    "rprop": lambda parameters: optim.Rprop(parameters, lr=1e-3, step_sizes=(1e-6, 0.1)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("optimizer", choices=OPTIMIZERS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = OPTIMIZERS[args.optimizer](model.parameters())
    # Rprop compares the signs of successive gradients and needs all of the data at every step.
    whole = torch.arange(1400)
    for step in range(400):
        chosen = whole if args.optimizer == "rprop" else torch.randint(1400, (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        if step % 80 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    with torch.no_grad():
        print("accuracy:", (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item())


if __name__ == "__main__":
    main()
