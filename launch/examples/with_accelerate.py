"""Accelerate: predicts the next byte of Python's documentation from the last eight.

python with_accelerate.py
accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 with_accelerate.py    # two GPUs, sharded by FSDP2
"""

from pydoc_data.topics import topics

import amos_dist
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

set_seed(0)
accelerator = Accelerator()
text = torch.tensor(list("".join(topics.values()).encode()))
loader = DataLoader(TensorDataset(text.unfold(0, 9, 9)), batch_size=256, shuffle=True, drop_last=True)
model = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), nn.Linear(8 * 32, 256), nn.ReLU(), nn.Linear(256, 256))
# Before prepare: Accelerate shards the model, and Amos follows. sigma="paper" does not look at the weights, which
# Accelerate may give to the first rank alone until then.
optimizer = amos_dist.Amos(amos_dist.param_groups(model, sigma="paper"), lr=0.05, beta=0.99)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for (windows,) in loader:  # each rank has its own part of the text
    loss = nn.functional.cross_entropy(model(windows[:, :8]), windows[:, 8])
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if len(losses) % 20 == 0:
        accelerator.print(f"step {len(losses)}: {losses[-1]:.3f} nats per byte")
