"""A multilayer perceptron on handwritten digits: scikit-learn's 8x8 ones, or MNIST where `--data` has its files."""

import argparse

import idx
import torch
from sklearn.datasets import load_digits
from torch import nn


def digits(folder):
    if folder is None:
        images, labels = load_digits(return_X_y=True)
    else:
        images, labels = idx.read_mnist(folder, "train")
    x = torch.tensor(images.reshape(len(images), -1), dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(labels, dtype=torch.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="folder with train-images-idx3-ubyte and train-labels-idx1-ubyte, gzip or not")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    try:
        x, y = digits(args.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for step in range(args.steps):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
