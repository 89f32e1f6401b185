"""Pretrain a GPT with DeepSpeed and the optimizer that its JSON names.

`deepspeed --num_gpus 2 launch/pretrain.py --compare AdamW`: with Amos, then with AdamW, side by side.
`python launch/pretrain.py`: one process. The batches are the same for any number of ranks.
"""

import argparse
import json
import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# Read when torch is imported: the profiler, which measures memory, talks across the bar.
os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
import amos_dist  # noqa: F401  "type": "Amos" in a DeepSpeed JSON
import deepspeed
import deepspeed.comm as dist
import torch
from amos_dist.bench import state_bytes
from tqdm import tqdm

import checkpoints
import data
import report
from measure import StepMemory, StepTimes
from model import GPT, SIZES
from ranks import AgreedError, agree, largest, mean, start

HERE = Path(__file__).resolve().parent
WARM_UP = 0.05  # share of the steps
UNTYPICAL_STEPS = 3  # the first steps allocate state and fill caches: their times are not kept


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--deepspeed_config", type=Path, default=HERE / "zero2.json", help="JSON (launch/zero2.json)")
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
    add("--local_rank", type=int, default=-1, help="given by launchers")
    args = parser.parse_args()
    if args.steps < 1 or args.eval_every < 1 or args.eval_windows < 1 or args.save_every < 0:
        parser.error("--steps, --eval-every and --eval-windows count from 1, --save-every from 0")
    if args.compare and args.resume:
        parser.error("--resume continues one job. Leave --compare out; --optimizer continues the second")
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
    config.setdefault("steps_per_print", 1 << 30)  # the bar shows progress
    return config


@torch.no_grad()
def evaluate(engine: Any, tokens: data.Tokens, windows: int) -> float:
    """Mean loss over about `windows` windows, in nats for each token. Ranks share them in equal numbers."""
    ranks, rank, micro = dist.get_world_size(), dist.get_rank(), engine.train_micro_batch_size_per_gpu()
    count = max(1, windows // (ranks * micro)) * ranks * micro
    mine = tokens.spread(count, slice(rank, None, ranks))
    engine.eval()
    losses = [engine(batch.to(engine.device)).double() for batch in mine.split(micro)]
    engine.train()
    return mean(torch.stack(losses).mean(), engine.device)


def train(
    args: argparse.Namespace, config: dict[str, Any], train_tokens: data.Tokens, held_out: data.Tokens
) -> report.Run:
    """One job, from the first or the resumed step to the last. Every rank returns the same report."""
    name = config["optimizer"]["type"]
    torch.manual_seed(args.seed)
    model = GPT(SIZES[args.size])
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    engine.train()
    ranks, rank, device = dist.get_world_size(), dist.get_rank(), engine.device
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    batch = engine.train_batch_size()

    # What must agree for a resumed job to continue exactly.
    folder = args.out / "checkpoints" / name.lower()
    settings = {"optimizer": name, "size": args.size, "seed": args.seed, "steps": args.steps}
    settings |= {"batch": batch, "ranks": ranks, "ZeRO stage": engine.zero_optimization_stage()}
    run = report.Run(name=name, memory_of=device.type)
    done = 0
    if args.resume:
        client = checkpoints.load(engine, folder, settings)
        done, run.losses, run.validation = client["step"], client["losses"], client["validation"]

    times, memory = StepTimes(engine.basic_optimizer, device), StepMemory()
    profiled = min(done + UNTYPICAL_STEPS, args.steps)
    begun = time.perf_counter()
    steps = range(done + 1, args.steps + 1)
    bar = tqdm(steps, desc=name, initial=done, total=args.steps, unit="step", ncols=100, disable=rank != 0)
    for step in bar:
        losses = []
        for part in range(accumulation):
            first = (part * ranks + rank) * micro
            loss = engine(train_tokens.batch(args.seed, step, batch, slice(first, first + micro)).to(device))
            losses.append(loss.detach())
            engine.backward(loss)
            if part < accumulation - 1:
                engine.step()
        if step == profiled:
            with memory.watch(device):
                engine.step()
        else:
            with times.step(keep=step > done + UNTYPICAL_STEPS or args.steps - done <= UNTYPICAL_STEPS):
                engine.step()

        run.losses.append(mean(torch.stack(losses).mean(), device))
        if not math.isfinite(run.losses[-1]):
            raise AgreedError(f"the training loss is {run.losses[-1]} at step {step}. Lower the lr in the JSON.")
        if step % args.eval_every == 0 or step == args.steps:
            run.validation.append((step, evaluate(engine, held_out, args.eval_windows)))
        if args.save_every and step % args.save_every == 0:
            client = {"step": step, "losses": run.losses, "validation": run.validation}
            checkpoints.save(engine, folder, step, settings, client)
        bar.set_postfix_str(run.progress(), refresh=False)

    run.seconds = time.perf_counter() - begun
    run.state_bytes = int(largest(state_bytes(engine.basic_optimizer), device))
    run.step_bytes = int(largest(memory.peak, device))
    run.step_ms, run.optimizer_ms = (
        largest(1e3 * report.median(seconds), device) for seconds in (times.whole, times.optimizer)
    )
    engine.destroy()
    return run


def main() -> None:
    args = arguments()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings about defaults would drown the bar
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    start(args.local_rank)
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
            report.write(runs, args.out, f"{args.size} GPT, {dist.get_world_size()} ranks")
    except AgreedError as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        dist.barrier()  # the launcher ends all ranks when the first is gone: let each say it
        sys.exit(1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
