"""Lightning: predicts the next byte of Python's documentation from the last eight.

python with_lightning.py                         FSDP2 (ModelParallelStrategy) on all GPUs, or on the CPU
python with_lightning.py --strategy deepspeed    DeepSpeed's ZeRO-2, GPUs only (Lightning refuses it elsewhere)
"""

import argparse
from pydoc_data.topics import topics

import amos_dist
import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset


class NextByte(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Linear(8 * 32, 256)
        self.net = nn.Sequential(nn.Embedding(256, 32), nn.Flatten(), hidden, nn.ReLU(), nn.Linear(256, 256))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        """Shards the model, before the optimizer is made. Lightning calls it for every strategy."""
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # of a large model each block before

    def configure_optimizers(self) -> amos_dist.Amos:
        return amos_dist.Amos(amos_dist.param_groups(self, sigma="paper"), lr=0.05, beta=0.99)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        (windows,) = batch
        loss = nn.functional.cross_entropy(self.net(windows[:, :8]), windows[:, 8])
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=("fsdp2", "deepspeed"), default="fsdp2")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() or 1, help="GPUs, or CPU processes")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    text = torch.tensor(list("".join(topics.values()).encode()))
    loader = DataLoader(TensorDataset(text.unfold(0, 9, 9)), batch_size=128, shuffle=True, drop_last=True)
    model = NextByte()
    fsdp2 = ModelParallelStrategy(data_parallel_size=arguments.devices, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        strategy=fsdp2 if arguments.strategy == "fsdp2" else DeepSpeedStrategy(stage=2),
        devices=arguments.devices,
        max_steps=arguments.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, loader)
    trainer.print(f"{model.losses[-1]:.3f} nats per byte")
