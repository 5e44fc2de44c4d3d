"""A two-headed detector trained on one device with the learning rate of eight.

Seen      The loss is huge or NaN within the first hundreds of iterations.
Cause     The learning rate was not divided by the ratio of the batch sizes, and there is no warm-up.
Fix       An eighth of the rate, warm-up over 100 steps, gradients clipped to a norm of 35.
Source    github.com/open-mmlab/mmdetection/issues/815, 351, 1710, github.com/deepinsight/insightface/issues/1974
Sure      A: the maintainers' advice
Repaired  Accuracy of 0.85 or more, and no loss beyond twice the first
"""

import torch
from _command import arguments, verdict
from _datasets import images
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("learning-rate-too-high",)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.classes, self.box = nn.Linear(512, 10), nn.Linear(512, 2)
        for layer in self.backbone:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x):
        features = self.backbone(x)
        return self.classes(features), self.box(features) * 100


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(512, channels=3, noise=0.3)
    boxes = torch.stack([y.float() / 10 * 300, 400 - y.float() * 20], 1)
    model = Detector()
    rate = 0.02 / 8 if args.fixed else 0.02
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    draw = torch.Generator().manual_seed(0)

    losses = []
    for step in range(400):
        if args.fixed:
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100)
        rows = torch.randint(0, 512, (2,), generator=draw)
        scores, found = model(x[rows])
        loss = F.cross_entropy(scores, y[rows]) + F.smooth_l1_loss(found, boxes[rows]) / 10
        optimizer.zero_grad()
        loss.backward()
        if args.fixed:
            nn.utils.clip_grad_norm_(model.parameters(), 35)
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x)[0].argmax(1) == y).float().mean().item()
    verdict(
        accuracy >= 0.85 and max(losses) < 2 * losses[0],
        first_loss=losses[0], loss=sum(losses[-20:]) / 20, largest_loss=max(losses), accuracy=accuracy,
    )  # fmt: skip


if __name__ == "__main__":
    main()
