"""The rate falls when the held-out loss stops falling: ReduceLROnPlateau, with early stopping after it."""

import argparse
import copy

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

x, y = load_breast_cancer(return_X_y=True)
x = torch.tensor(StandardScaler().fit_transform(x), dtype=torch.float32)
y = torch.tensor(y, dtype=torch.float32)
order = torch.randperm(len(x))
(x_train, x_valid, x_test), (y_train, y_valid, y_test) = (part[order].split([340, 115, 114]) for part in (x, y))

model = nn.Sequential(nn.Linear(30, 24), nn.ELU(), nn.Dropout(0.2), nn.Linear(24, 1), nn.Flatten(0))
criterion = nn.BCEWithLogitsLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=2)
best, best_loss, waited = None, float("inf"), 0
for epoch in range(60):
    model.train()
    for chosen in torch.randperm(len(x_train)).split(20):
        optimizer.zero_grad()
        criterion(model(x_train[chosen]), y_train[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        valid_loss = criterion(model(x_valid), y_valid).item()
    scheduler.step(valid_loss)
    waited += 1
    if valid_loss < best_loss:
        best, best_loss, waited = copy.deepcopy(model.state_dict()), valid_loss, 0
    if waited == 12:
        print(f"stopped early at epoch {epoch}")
        break
model.load_state_dict(best)
model.eval()
with torch.no_grad():
    print("accuracy:", ((model(x_test) > 0) == (y_test > 0.5)).float().mean().item())
