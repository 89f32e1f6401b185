"""`deepspeed --module amos_dist.run train.py`: "type": "Amos" in a script that knows nothing of amos_dist."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.harness import launch

MODULE = ("--module", "amos_dist.run")

SCRIPT = """
import argparse, atexit, sys
import deepspeed, torch
atexit.register(lambda: sys.stdout.write(f"in a group at the end: {torch.distributed.is_initialized()}\\n"))
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--word")
arguments = parser.parse_args()
import beside
torch.manual_seed(0)
model = torch.nn.Linear(7, 5)
config = {"train_batch_size": 4, "zero_optimization": {"stage": 2}}
config["optimizer"] = {"type": "Amos", "params": {"lr": 0.01}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
engine.backward(engine(torch.randn(2, 7)).square().mean())
engine.step()
print(f"trained with {type(engine.basic_optimizer).__name__} {arguments.word} {beside.ANSWER} {__name__}")  # one write
sys.exit(0)
"""


def test_trains_without_an_import(tmp_path: Path) -> None:
    tmp_path.joinpath("train.py").write_text(SCRIPT)
    tmp_path.joinpath("beside.py").write_text("ANSWER = 42\n")
    result = launch(*MODULE, "train.py", "--word", "hello", ranks=2, folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("trained with Amos hello 42 __main__") == 2
    assert result.stdout.count("in a group at the end: False") == 2


def test_the_same_script_alone_is_refused(tmp_path: Path) -> None:
    """So that the test above tests something: without amos_dist, DeepSpeed does not know the name."""
    tmp_path.joinpath("train.py").write_text(SCRIPT)
    tmp_path.joinpath("beside.py").write_text("ANSWER = 42\n")
    result = launch("train.py", ranks=2, folder=tmp_path)
    assert result.returncode != 0
    assert "trained with" not in result.stdout


def test_the_script_s_own_exit_code(tmp_path: Path) -> None:
    tmp_path.joinpath("train.py").write_text("raise SystemExit(3)\n")
    assert launch("-m", "amos_dist.run", "train.py", ranks=1, folder=tmp_path).returncode == 3


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    result = launch(*MODULE, "nowhere.py", ranks=2, folder=tmp_path)
    assert result.returncode != 0
    assert "there is no script nowhere.py" in result.stdout
