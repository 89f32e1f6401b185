"""Whether an installed amos_dist works: `python tests/integration/smoke.py`, with a Python that has it, in seconds.

Only of what a wheel brings along: it refuses the sources that lie beside it. --cuda asks for CUDA kernels in it too;
they run where torch sees a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import amos_dist

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--cuda", action="store_true")
wanted = parser.parse_args()

package, sources = Path(amos_dist.__file__).resolve().parent, Path(__file__).resolve().parents[2]
if package.parent == sources:
    sys.exit(f"smoke: {package} are the sources. Install the wheel, and leave PYTHONPATH empty.")
built = amos_dist.build_info()
if not built["extension"]:
    sys.exit(f"smoke: {package} has no extension: {built['reason']}. Build the wheel again.")
if wanted.cuda and not built["cuda_archs"]:
    sys.exit(f"smoke: {package} has no CUDA kernels: {built['cuda_reason']}. Build the wheel with AMOS_CUDA=1.")


def trained(device: str, fused: bool) -> list[torch.Tensor]:
    """The parameters of a small model after five steps on one batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(11, 6), torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 11)
    )
    model, tokens = model.to(device), torch.arange(11, device=device)
    groups = amos_dist.param_groups(model, sigma="paper")
    optimizer = amos_dist.Amos(groups, lr=0.02, beta=0.9, momentum=0.9, fused=fused)
    for _ in range(5):
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in model.parameters()]


devices = ["cpu", *(["cuda"] if built["cuda_archs"] and torch.cuda.is_available() else [])]
for device in devices:
    for got, expected in zip(trained(device, fused=True), trained(device, fused=False), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)

with tempfile.TemporaryDirectory() as elsewhere:
    done = subprocess.run(
        [sys.executable, "-m", "amos_dist", "info"], cwd=elsewhere, capture_output=True, text=True, check=True
    )
if f"amos_dist {amos_dist.__version__}" not in done.stdout or "extension     built" not in done.stdout:
    sys.exit(f"smoke: `python -m amos_dist info` says something else:\n{done.stdout}")
print(f"amos_dist {amos_dist.__version__}, torch {torch.__version__}, kernels on {', '.join(devices)}: works")
