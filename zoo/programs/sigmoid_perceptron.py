"""The classic: one hidden layer of sigmoids, a softmax and plain stochastic gradient descent."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, x):
        return self.output(torch.sigmoid(self.hidden(x)))


model = Perceptron()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for epoch in range(20):
    for chosen in torch.randperm(1400).split(32):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
    if epoch % 4 == 3:
        print(f"epoch {epoch + 1}  loss {loss.item():.3f}")
with torch.no_grad():
    print("accuracy:", (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item())
