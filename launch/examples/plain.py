"""Plain torch, ten lines: predicts the next byte of Python's documentation from the last eight. Seconds on a CPU.

python plain.py
"""

from pydoc_data.topics import topics

import amos_dist
import torch
from torch import nn

text = torch.tensor(list("".join(topics.values()).encode()))
model = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), nn.Linear(8 * 32, 256), nn.ReLU(), nn.Linear(256, 256))
optimizer = amos_dist.Amos(amos_dist.param_groups(model, sigma="paper"), lr=0.05, beta=0.99)
for _ in range(300):
    windows = text[torch.randint(len(text) - 8, (256, 1)) + torch.arange(9)]
    loss = nn.functional.cross_entropy(model(windows[:, :8]), windows[:, 8])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"{loss:.3f} nats per byte")
