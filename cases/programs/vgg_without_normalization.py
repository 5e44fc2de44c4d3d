"""Thirteen convolutions without batch normalization, as VGG-16 has them, trained like a network that has it.

Seen      Loss 2.303 and accuracy 0.1 for ever.
Cause     PyTorch's default initialization shrinks the features, and a learning rate of 0.1 then kills the ReLUs.
Fix       He initialization and a learning rate of 0.01 (or batch normalization).
Source    github.com/kuangliu/pytorch-cifar/issues/28, github.com/apache/mxnet/issues/1968,
          github.com/pytorch/vision/issues/1998
Sure      B: several users agree
Repaired  Accuracy above 0.5 after 150 steps, and a gradient that is not zero
"""

import torch
from _command import arguments, verdict
from _datasets import images, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("initialization-too-small", "deep-without-shortcuts", "learning-rate-too-high")
POOL = 0
CHANNELS = (16, 16, POOL, 32, 32, POOL, 48, 48, 48, POOL, 48, 48, 48, POOL, 48, 48, 48, POOL)


def vgg():
    layers, channels = [], 3
    for width in CHANNELS:
        if width == POOL:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = images(512, channels=3, size=32, noise=0.3)
    model = vgg()
    if args.fixed:
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
    rate = 0.01 if args.fixed else 0.1
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)

    losses = []
    for inputs, labels in minibatches(x, y, size=32, steps=150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x[:256]).argmax(1) == y[:256]).float().mean().item()
    grad_norm = model[0].weight.grad.norm().item()
    verdict(accuracy > 0.5 and grad_norm > 0, loss=sum(losses[-20:]) / 20, accuracy=accuracy, first_grad_norm=grad_norm)


if __name__ == "__main__":
    main()
