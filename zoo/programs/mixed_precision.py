"""Automatic mixed precision: bfloat16 under autocast, or a script for GPUs whose scaler is switched off on a CPU."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("kind", choices=["bf16", "scaler"])
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

device = "cuda" if torch.cuda.is_available() else "cpu"
use_amp = args.kind == "bf16" or device == "cuda"
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
y = torch.tensor(digits.target, device=device)
model = nn.Sequential(
    nn.Linear(64, 128),
    nn.LayerNorm(128),
    nn.GELU(),
    nn.Linear(128, 128),
    nn.LayerNorm(128),
    nn.GELU(),
    nn.Linear(128, 10),
).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler(device, enabled=args.kind == "scaler" and device == "cuda")
dtype = torch.bfloat16 if args.kind == "bf16" else torch.float16

for epoch in range(12):
    for chosen in torch.randperm(1400, device=device).split(64):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type=device, dtype=dtype, enabled=use_amp):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    print(f"epoch {epoch}  loss {loss.item():.3f}")

with torch.no_grad():
    print("accuracy:", (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item())
