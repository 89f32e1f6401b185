"""Trains, saves or loads with real ranks, one of which meets a fault; what every rank says is on its output.

A case: {"do": "step" | "save" | "load" | "call", "stage": of ZeRO, or "fsdp2", "fault": "kill" | "full", "victim": the
rank that meets it, "folder", "sealed": by amos_dist.manifest.save, "loads", "then", "late"}.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

import amos_dist
from amos_dist import kernel_calls, manifest, roll_call
from tests.distributed.harness import full_disk, received
from tests.distributed.model import Model, batch

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
PARAMS = {"lr": 0.02, "sigma": 0.5, "momentum": 0.9}


class Trainer:
    """The same for ZeRO and for FSDP2."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.zero = case["stage"] != "fsdp2"
        if self.zero:
            from tests.distributed.zero_worker import engine_for

            self.size = 4 * dist.get_world_size()
            self.engine = engine_for({"dtype": "fp32", "params": PARAMS, **case}, self.size)
        else:
            from torch.distributed.fsdp import fully_shard

            torch.manual_seed(1)
            self.model = fully_shard(Model())
            self.optimizer = amos_dist.Amos(self.model.named_parameters(), **PARAMS)

    def steps(self, count: int) -> None:
        for step in range(count):
            if self.zero:
                for part in batch(step, self.size).chunk(self.size // 2)[dist.get_rank() :: dist.get_world_size()]:
                    self.engine.backward(self.engine(part))
                    self.engine.step()
            else:
                self.model(batch(step, 4)).backward()
                self.optimizer.step()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_saving(fault: str, word: str) -> None:
    """From now on torch.save of files with `word` in their names writes a half: "kill": then this rank is killed;
    "full": then there is no room on the disk. Also where torch.distributed.checkpoint writes them.
    """
    real, real_stream = torch.save, FileSystem.create_stream

    def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        broken(str(file), lambda place: real(content, place or file, *args, **kwargs))

    def broken(name: str, write: Callable[[Any], None]) -> None:
        if word not in name:
            return write(None)
        time.sleep(3)  # the other rank is through with its own
        whole = io.BytesIO()
        write(whole)
        if fault == "kill":
            Path(name).write_bytes(whole.getvalue()[: whole.tell() // 2])
            die()
        with full_disk(whole.tell() // 2):
            write(None)

    @contextlib.contextmanager
    def create_stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        if word not in str(path) or "w" not in mode:
            with real_stream(self, path, mode) as stream:
                yield stream
            return
        with full_disk(4096) if fault == "full" else contextlib.nullcontext(), real_stream(self, path, mode) as stream:
            yield stream
            if fault == "kill":
                stream.closed or stream.flush()
                os.truncate(path, Path(path).stat().st_size // 2)
                die()

    torch.save, FileSystem.create_stream = save, create_stream  # type: ignore[method-assign]


def step(case: dict[str, Any]) -> None:
    trainer = Trainer(case)
    trainer.steps(2)
    if dist.get_rank() == case["victim"]:
        kernel_calls.Call.sums = lambda *_: die()  # type: ignore[method-assign]
    trainer.steps(1)


def save(case: dict[str, Any]) -> None:
    """A good checkpoint, "one"; and then "two", in which the fault comes."""
    from tests.distributed.zero_worker import full_parameters

    trainer, folder = Trainer(case), Path(case["folder"])

    def write(tag: str) -> None:
        if case.get("sealed"):
            manifest.save(trainer.engine, folder, tag)
        else:
            trainer.engine.save_checkpoint(str(folder), tag)

    trainer.steps(2)
    write("one")
    weights = full_parameters(trainer.engine)
    if dist.get_rank() == 0:
        torch.save(weights, folder / "expected.pt")
    trainer.steps(1)
    if dist.get_rank() == case.get("victim"):
        break_saving(case["fault"], "optim_states")
    with roll_call.guard("nothing could be saved"):
        write("two")


def load(case: dict[str, Any]) -> None:
    """Each of "loads", [folder, tag or null], beside the weights that were there when "one" was saved."""
    from deepspeed.utils import safe_get_full_fp32_param

    for folder, tag in case["loads"]:
        trainer = Trainer(case)
        with roll_call.guard("nothing could be loaded"):
            trainer.engine.load_checkpoint(folder, tag)
            expected = torch.load(Path(folder, "expected.pt"))
            masters = {n: safe_get_full_fp32_param(p) for n, p in trainer.engine.module.named_parameters()}
            got = {name: master for name, master in masters.items() if master is not None}  # None: it is frozen
            different = [name for name, master in got.items() if not torch.equal(master, expected[name])]
            assert len(got) == len(expected) - 1
            trainer.steps(case.get("then", 0))
            trainer.engine.destroy()
        print(f"loaded {Path(folder).name}: {len(different)} parameters differ", flush=True)
    dist.barrier()


def call(case: dict[str, Any]) -> None:
    """A collective alone, on enough ranks that some are no neighbours of the one that dies; and one that comes late."""
    dist.all_reduce(torch.ones(4))
    if dist.get_rank() == case["victim"]:
        die()
    time.sleep(case.get("late", 0) * (dist.get_rank() == dist.get_world_size() - 1))
    with roll_call.guard():
        for _ in range(5):
            dist.all_reduce(torch.ones(4))


def main() -> None:
    case = received()
    if case["do"] == "call" or case["stage"] == "fsdp2":
        dist.init_process_group("gloo")
    else:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
    {"step": step, "save": save, "load": load, "call": call}[case["do"]](case)
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
