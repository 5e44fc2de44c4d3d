"""Digit images with raw pixels, sigmoid class scores and plain SGD at 1e-4: three faults in one program.

Seen      Accuracy between 0.1 and 0.2.
Cause     Pixels up to 255, a sigmoid in place of a softmax (85 % of its outputs at 0 or 1), a tiny learning rate.
Fix       Pixels in [0, 1], a softmax, Adam.
Source    stackoverflow.com/questions/55328966
Sure      A: the accepted answer
Repaired  Accuracy of 0.98 or more
"""

import torch
from _command import arguments, verdict
from _datasets import images, minibatches, unit_range
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("unscaled-inputs", "learning-rate-too-low", "bounded-output", "saturated-output")


def cross_entropy_of_sigmoids(scores, labels):
    """Categorical cross-entropy as Keras has it for outputs that are taken for probabilities."""
    shares = torch.sigmoid(scores)
    probabilities = (shares / shares.sum(1, keepdim=True)).clamp_min(1e-7)
    return -probabilities.log().gather(1, labels[:, None]).mean()


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(512, size=28, noise=0.3)
    x = unit_range(x.flatten(1)) * (1 if args.fixed else 255)
    model = nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))
    criterion = F.cross_entropy if args.fixed else cross_entropy_of_sigmoids
    if args.fixed:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    losses = []
    for inputs, labels in minibatches(x, y, size=32, steps=300):
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(accuracy >= 0.98, first_loss=losses[0], loss=sum(losses[-20:]) / 20, accuracy=accuracy)


if __name__ == "__main__":
    main()
