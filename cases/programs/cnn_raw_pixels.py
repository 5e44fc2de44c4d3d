"""A convolutional network on pixels of 0 to 255, with He initialization and Adam: it looks bad and is not.

Seen      Low accuracy after five epochs.
Cause     The first loss is 271 in place of 2.3, but training recovers from it; the run was merely short.
Fix       More epochs; pixels in [0, 1] help.
Source    stackoverflow.com/questions/48594888
Sure      A: the accepted answer
Repaired  Accuracy of 0.98 or more. So does the unscaled program: a hint is welcome, an alarm is wrong
"""

import torch
from _command import arguments, verdict
from _datasets import images, minibatches, unit_range
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("unscaled-inputs",)
HARMLESS = True


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(512, channels=3, noise=0.3)
    x = unit_range(x) * (1 if args.fixed else 255)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for inputs, labels in minibatches(x, y, steps=250):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(accuracy >= 0.98, first_loss=losses[0], loss=sum(losses[-20:]) / 20, accuracy=accuracy)


if __name__ == "__main__":
    main()
