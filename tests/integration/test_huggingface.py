"""Hugging Face's Trainer with a DeepSpeed JSON that names Amos: the script only imports amos_dist."""

import json
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, launch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SCRIPT = """
import argparse
import json
from pathlib import Path

import amos_dist  # this is all it takes
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--out", type=Path)
parser.add_argument("--local_rank", type=int)
args = parser.parse_args()

# 64 sequences that count upwards from different starts: the next token is always the last one plus one.
data = [{"input_ids": (torch.arange(16) + i) % 32, "labels": (torch.arange(16) + i) % 32} for i in range(64)]
torch.manual_seed(0)
config = GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1)
arguments = TrainingArguments(
    output_dir=str(args.out), deepspeed=args.config, seed=0, use_cpu=not torch.cuda.is_available(),
    learning_rate=0.04, warmup_steps=2, max_steps=40, max_grad_norm=1.0, per_device_train_batch_size=4,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
)
trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=data)
trainer.train()
engine = trainer.model_wrapped
if engine.global_rank == 0:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    optimizer = engine.basic_optimizer
    (args.out / "result.json").write_text(json.dumps({
        "ranks": engine.dp_world_size, "stage": engine.zero_optimization_stage(), "losses": losses,
        "class": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
    }))
torch.distributed.destroy_process_group()
"""


def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.py").write_text(SCRIPT)
    done = launch(tmp_path / "train.py", "--config", ROOT / "launch" / "huggingface.json", "--out", tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["ranks"], result["stage"]) == (2, 2)
    assert result["class"].startswith("amos_dist.") and result["class"].endswith(".Amos")
    losses = [float(loss) for loss in result["losses"]]
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0], losses
