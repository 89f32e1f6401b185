"""Pretrain a GPT with the optimizer that a DeepSpeed JSON names, under DeepSpeed or FSDP2.

`deepspeed --num_gpus 2 launch/pretrain.py --compare AdamW`: with Amos, then with AdamW, side by side.
`torchrun --nproc_per_node 2 launch/pretrain.py --engine fsdp2`: the same job without DeepSpeed.
`python launch/pretrain.py`: one process. The batches are the same for any number of ranks.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

# Read when torch is imported: the profiler, which measures memory, talks across the bar.
os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
import torch
import torch.distributed as dist
from amos_dist import heartbeat, roll_call
from amos_dist.bench import state_bytes
from tqdm import tqdm

import checkpoints
import data
import report
import watching
from engines import MODULES, Engine, engine_of
from measure import StepMemory, StepTimes
from model import GPT, SIZES
from ranks import AgreedError, agree, environment, largest, look_at_hosts, mean

HERE = Path(__file__).resolve().parent
WARM_UP = 0.05  # share of the steps
UNTYPICAL_STEPS = 3  # the first steps allocate state and fill caches: their times are not kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--deepspeed_config", type=Path, default=HERE / "zero2.json", help="of either engine (launch/zero2.json)")
    add("--engine", choices=MODULES, default="deepspeed", help="what shards the model (%(default)s)")
    add("--optimizer", metavar="NAME", help="optimizer and scheduler from launch/NAME.json, or from a path")
    add("--compare", metavar="NAME", help="then train with this one, from the same start on the same batches")
    add("--size", choices=SIZES, default="small", help="size of the model (%(default)s)")
    add("--steps", type=int, default=600, help="optimizer steps (%(default)s)")
    add("--data", type=Path, help="folder with train.npy and validation.npy (made from Python's sources)")
    add("--out", type=Path, default=Path("out/pretrain"), help="folder for what is written (%(default)s)")
    add("--seed", type=int, default=0, help="of the first weights and of the order of batches (%(default)s)")
    add("--eval-every", type=int, default=100, metavar="STEPS", help="between evaluations (%(default)s)")
    add("--eval-windows", type=int, default=512, metavar="N", help="sequences in an evaluation (%(default)s)")
    add("--save-every", type=int, default=0, metavar="STEPS", help="between checkpoints in OUT (none)")
    add("--resume", action="store_true", help="continue from the newest checkpoint in OUT")
    add("--restart", action="store_true", help="the same from the newest whole one, if there is one; on any ranks")
    add("--monitor", choices=watching.KINDS, action="append", default=[], help="show what Amos does, in OUT (nothing)")
    add("--monitor-every", type=int, default=20, metavar="STEPS", help="between two looks (%(default)s)")
    add(
        "--patience", type=float, default=heartbeat.PATIENCE, metavar="SECONDS", help="with a silent host (%(default)s)"
    )
    add("--preflight", type=float, default=45, metavar="SECONDS", help="to wait for all ranks at first (%(default)s)")
    add("--hostfile", type=Path, help="the launcher's, so that a host that does not answer is named")
    add("--local_rank", type=int, default=-1, help="given by launchers")
    args = parser.parse_args()
    if args.steps < 1 or args.monitor_every < 1 or args.eval_every < 1 or args.eval_windows < 1 or args.save_every < 0:
        parser.error("--steps, --monitor-every, --eval-every and --eval-windows count from 1, --save-every from 0")
    if args.compare and (args.resume or args.restart):
        parser.error("--resume and --restart continue one job. Leave --compare out; --optimizer continues the second")
    if args.resume and args.restart:
        parser.error("--restart is --resume and more. Leave one of them out")
    if not args.patience > 0:
        parser.error("--patience is a number of seconds above 0")
    return args


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}). Give the path of a DeepSpeed JSON.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object. Give the path of a DeepSpeed JSON.")
    return content


def configure(path: Path, optimizer: str | None, steps: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one job; "auto" in its scheduler becomes what the steps ask for."""
    config = read_json(path)
    if optimizer and optimizer.lower() != str(config.get("optimizer", {}).get("type")).lower():
        other = Path(optimizer) if optimizer.endswith(".json") else HERE / f"{optimizer.lower()}.json"
        config.pop("scheduler", None)
        config |= {name: block for name, block in read_json(other).items() if name in ("optimizer", "scheduler")}
    if "type" not in config.get("optimizer", {}):
        raise ValueError(f'{path}: names no optimizer. Add "optimizer": {{"type": "Amos", "params": {{"lr": 0.018}}}}.')
    params = config.get("scheduler", {}).get("params", {})
    values = {"warmup_num_steps": max(1, round(WARM_UP * steps)), "total_num_steps": steps}
    params |= {name: value for name, value in values.items() if params.get(name) == "auto"}
    return config


@torch.no_grad()
def evaluate(engine: Engine, tokens: data.Tokens, windows: int) -> float:
    """Mean loss over about `windows` windows, in nats for each token. Ranks share them in equal numbers."""
    ranks, rank, micro = dist.get_world_size(), dist.get_rank(), engine.micro
    count = max(1, windows // (ranks * micro)) * ranks * micro
    mine = tokens.spread(count, slice(rank, None, ranks))
    engine.train(False)
    losses = [engine(batch.to(engine.device)).double() for batch in mine.split(micro)]
    engine.train(True)
    return mean(torch.stack(losses).mean(), engine.device)


def train(
    args: argparse.Namespace, config: dict[str, Any], train_tokens: data.Tokens, held_out: data.Tokens
) -> report.Run:
    """One job, from the first or the resumed step to the last. Every rank returns the same report."""
    name = config["optimizer"]["type"]
    torch.manual_seed(args.seed)
    folder = args.out / "checkpoints" / name.lower()
    found = checkpoints.newest_whole(folder) if args.restart else None
    config = agree(lambda: found.fit(config)) if found else config
    engine = engine_of(args.engine)(GPT(SIZES[args.size]), config)
    engine.train(True)
    monitor = agree(
        lambda: watching.watch(engine, args.monitor, args.monitor_every, args.out / "monitor" / name.lower())
    )
    ranks, rank, device = dist.get_world_size(), dist.get_rank(), engine.device

    # What must agree for a resumed job to continue exactly.
    settings = {"optimizer": name, "size": args.size, "seed": args.seed, "steps": args.steps}
    settings |= {"batch": engine.batch, "ranks": ranks, **engine.settings}
    run = report.Run(name=name, engine=args.engine, memory_of=device.type)
    done = 0
    if args.resume:
        done, progress = checkpoints.load(engine, folder, settings)
    elif found:
        found.load(engine, settings)
        done, progress = found.step, found.progress
    if done:
        run.losses, run.validation = progress["losses"], progress["validation"]

    times, memory = StepTimes(engine.optimizer, device), StepMemory()
    profiled = min(done + UNTYPICAL_STEPS, args.steps)
    begun = time.perf_counter()
    steps = range(done + 1, args.steps + 1)
    bar = tqdm(steps, desc=name, initial=done, total=args.steps, unit="step", ncols=100, disable=rank != 0)
    for step in bar:
        losses = []
        short = args.steps - done <= UNTYPICAL_STEPS
        with times.iteration(keep=(step > done + UNTYPICAL_STEPS or short) and step != profiled):
            for part in range(engine.accumulation):
                first = (part * ranks + rank) * engine.micro
                mine = slice(first, first + engine.micro)
                loss = engine(train_tokens.batch(args.seed, step, engine.batch, mine).to(device))
                losses.append(loss.detach())
                engine.backward(loss, last=part == engine.accumulation - 1)
            with memory.watch(device) if step == profiled else times.step():
                engine.step()

        run.losses.append(mean(torch.stack(losses).mean(), device))
        if not math.isfinite(run.losses[-1]):
            raise AgreedError(f"the training loss is {run.losses[-1]} at step {step}. Lower the lr in the JSON.")
        if step % args.eval_every == 0 or step == args.steps:
            run.validation.append((step, evaluate(engine, held_out, args.eval_windows)))
        if args.save_every and step % args.save_every == 0:
            progress = {"losses": run.losses, "validation": run.validation, "micro": engine.micro}
            checkpoints.save(engine, folder, step, settings, progress)
        bar.set_postfix_str(f"{run.progress()}, lr {engine.lr:.2g}", refresh=False)

    run.seconds = time.perf_counter() - begun
    run.state_bytes = int(largest(state_bytes(engine.optimizer), device))
    run.step_bytes = int(largest(memory.peak, device))
    run.step_ms, run.optimizer_ms, run.training_ms = (
        largest(1e3 * report.median(seconds), device) for seconds in (times.whole, times.optimizer, times.training)
    )
    if monitor:
        monitor.close()
    engine.close()
    return run


def complain(args: argparse.Namespace, error: Exception) -> None:
    """Say why this rank ends, and write it down: where the network is gone, nobody sees what a rank says."""
    rank = os.environ["RANK"]
    sys.stderr.write(f"rank {rank}: {error}\n")  # print would write the end of the line by itself
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        (args.out / "errors").mkdir(parents=True, exist_ok=True)
        (args.out / "errors" / f"rank{rank}.txt").write_text(f"{socket.gethostname()}: {error}\n")


def work(args: argparse.Namespace) -> None:
    """All jobs, and their report; then every rank waits for the others."""
    (args.out / "errors" / f"rank{dist.get_rank()}.txt").unlink(missing_ok=True)  # of an earlier run
    try:
        names = [args.optimizer] + ([args.compare] if args.compare else [])
        configs = agree(lambda: [configure(args.deepspeed_config, name, args.steps) for name in names])
        size = SIZES[args.size]
        folder = args.data or HERE.parent / "out" / "python{}.{}".format(*sys.version_info)
        builds = args.data is None and os.environ["LOCAL_RANK"] == "0" and not folder.is_dir()
        agree((lambda: data.build(folder)) if builds else None)  # on each node; two at once do no harm
        files = [folder / "train.npy", folder / "validation.npy"]
        train_tokens, held_out = agree(lambda: [data.Tokens(file, size.sequence, size.vocabulary) for file in files])
        runs = [train(args, config, train_tokens, held_out) for config in configs]
        if dist.get_rank() == 0:
            report.write(runs, args.out, f"{args.size} GPT, {args.engine}, {dist.get_world_size()} ranks")
    except AgreedError as error:
        complain(args, error)
        dist.barrier()  # the launcher ends all ranks when the first is gone: let each say it
        sys.exit(1)
    dist.barrier()


def main() -> None:
    args = arguments()
    environment(args.local_rank)
    known = "RANK" in os.environ  # else MPI says who they are, once they have joined
    if known:
        look_at_hosts(args.preflight, args.hostfile)
    engine_of(args.engine).join()
    if not known:
        look_at_hosts(args.preflight, args.hostfile)
    consequence = "training cannot go on"
    try:
        with roll_call.guard(consequence), heartbeat.watch(args.patience, consequence):
            work(args)
    except roll_call.CollectiveError as error:
        complain(args, error)
        sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
