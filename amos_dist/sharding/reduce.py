"""The one all-reduce."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Pending:
    """A sum over a process group that is under way; `wait` puts it into the tensor it came from."""

    def __init__(self, tensor: torch.Tensor, group: Any) -> None:
        self.tensor = tensor
        self.sent = tensor
        if tensor.device.type == "cpu" and "gloo" not in dist.get_backend(group) and torch.cuda.is_available():
            # Offloaded state under NCCL, which cannot read CPU memory.
            self.sent = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        self.work = dist.all_reduce(self.sent, group=group, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        if self.sent is not self.tensor:
            self.tensor.copy_(self.sent)
