"""Twenty layers of ReLU, initialized for ReLU: the same loop learns."""

import torch
from sklearn.datasets import load_digits
from torch import nn

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.5
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(labels)).split([1500, 297])

layers = [nn.Linear(64, 64), nn.ReLU()]
for _ in range(18):
    layers += [nn.Linear(64, 64), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(64, 10))
for layer in model[::2]:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
loss_fn = nn.CrossEntropyLoss()

for step in range(1, 601):
    batch = train[torch.randint(0, len(train), (64,))]
    loss = loss_fn(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with torch.no_grad():
    right = model(images[test]).argmax(dim=1) == labels[test]
print(f"accuracy on digits it has not seen: {right.float().mean():.0%}")
