"""A tanh recurrent network that has to recall the first of 120 symbols.

Seen      The loss stays at ln 4.
Cause     The gradient with respect to the first hidden state underflows to 0.
Fix       An orthogonal recurrent matrix (an LSTM with a forget bias of 1 also learns, but needs more steps).
Source    github.com/batzner/indrnn/issues/9, github.com/chentuochao/Sound_Bubble/issues/4
Sure      C: cause and fix are a reading of the threads
Repaired  Accuracy of 0.7 or more, and an initial gradient at the first input above 1e-4 of that at the last
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("recurrent-vanishing",)
LENGTH, CLASSES = 120, 4


class Recall(nn.Module):
    def __init__(self, orthogonal):
        super().__init__()
        self.rnn = nn.RNN(2 * CLASSES, 64, batch_first=True)
        self.head = nn.Linear(64, CLASSES)
        if orthogonal:
            nn.init.orthogonal_(self.rnn.weight_hh_l0)
            nn.init.normal_(self.rnn.weight_ih_l0, 0, 0.1)
            nn.init.zeros_(self.rnn.bias_hh_l0)
            nn.init.zeros_(self.rnn.bias_ih_l0)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def first_symbols(rows=512):
    """One-hot sequences: the label in front, and symbols without meaning behind it."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (rows,), generator=draw)
    symbols = torch.randint(CLASSES, 2 * CLASSES, (rows, LENGTH), generator=draw)
    symbols[:, 0] = labels
    return F.one_hot(symbols, 2 * CLASSES).float(), labels


def initial_ratio(model, x, y):
    """The gradient's norm at the first input over that at the last."""
    inputs = x[:64].clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(inputs), y[:64]), inputs)
    norms = grad.norm(dim=(0, 2))
    return (norms[0] / norms[-1]).item()


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = first_symbols()
    model = Recall(orthogonal=args.fixed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    ratio, losses = initial_ratio(model, x, y), []
    for inputs, labels in minibatches(x, y, steps=250):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(accuracy >= 0.7 and ratio > 1e-4, loss=sum(losses[-20:]) / 20, accuracy=accuracy, initial_ratio=ratio)


if __name__ == "__main__":
    main()
