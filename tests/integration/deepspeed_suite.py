"""DeepSpeed's own unit tests, with Amos in the place of Adam, on the CPU: docs/deepspeed_suite.md is what came of it.

    python tests/integration/deepspeed_suite.py PATH --json results.jsonl --table docs/deepspeed_suite.md

PATH is the folder `tests` of a checkout of DeepSpeed. What fails with Amos is run again with the optimizer that the
test itself asks for. Results are written as they come, one JSON object a line; the same command goes on after them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
MARK = "<!-- what follows was written by tests/integration/deepspeed_suite.py --table -->\n"

# Below tests/unit: what builds an engine with Adam and can do so on a CPU, the most telling first.
FILES = {
    "checkpoint": "universal_checkpoint zero_optimizer latest_checkpoint lr_scheduler moe_checkpoint other_optimizer "
    "pipeline shared_weights convert_checkpoint tag_validation mics_optimizer",
    "runtime/zero": "zero_tensor_fragment ignore_unused_parameters zero_grad_clip zero_leaf_module zero_context "
    "zero_context_ancestry zero_context_return unwrap_model zero_offloadpp zeropp zero_hook_attribute_delegation "
    "zero_linear_direct_init zero_autocast_mixed_dtype",
    "runtime/half_precision": "fp16 dynamic_loss_scale zero_optim_overflow",
    "v1/half_precision": "bf16 gradient_clipping_default mixed_precision_dtype with_autocast",
    "v1/moe": "moe moe_tp",
    "runtime/pipe": "pipe",
    "v1/zero": "zero zero_cpu_offload_grad_accum zero2_offload_multi_backward stage2_flatten_on_gpu zero_autocast "
    "zero_coalesce_grad_reduction offload_states",
    "runtime": "ds_initialize lr_schedulers multi_output_model no_sync_ctxt multiple_models",
}
ALL = [f"{folder}/test_{name}.py" for folder, names in FILES.items() for name in names.split()]

# Why tests fail with Amos alone: what is found in "test: error", and the reason. Where nothing fits, the error stands.
REASONS = [
    ("does not work with zero_optimization.elastic_checkpoint", "refused at initialize: elastic_checkpoint"),
    ("does not work with zero_optimization.offload_optimizer.ratio", "refused at initialize: offload_optimizer.ratio"),
    ("does not work with bf16_master_weights_and_grads", "refused at initialize: bf16_master_weights_and_grads"),
    ("does not work with fp16_master_weights_and_grads", "refused at initialize: fp16_master_weights_and_grads"),
    ("TestOneCycle::test_mom", "cycles Adam's betas, which Amos does not have"),
    ("TestParamPartitioningSkipInit.*NaN or infinite", "the test trains weights that nothing has initialised"),
    ("TestClientOptimizer|TestConfigOptimizer", "asks whether the engine's optimizer is an Adam"),
    ("has sigma=.*measured for .* where this rank", "refused: ranks whose weights, and so sigma, differ at first"),
    ("test_zero_autocast.*not close on all ranks", "compares with a model that AdamW trains"),
    ("test_user_cpu_adam_must_enable_bf16_states", "asks for what DeepSpeed says about its own CPU Adam"),
    ("Apex AMP integration has been removed", "configures Apex AMP, which DeepSpeed has removed"),
    ("test_fused_gradnorm.*unscale_and_clip_grads", "is of the wrapper that DeepSpeed has for its own FusedAdam only"),
]

Result = dict[str, Any]
Results = dict[tuple[str, str], Result]  # by optimizer (or "collected") and test


def results_in(path: Path) -> Results:
    """The last line about each test."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(line["optimizer"], line["id"]): line for line in lines}


def file_of(result: Result) -> str:
    return str(result["id"]).split("::")[0].removeprefix("unit/")


# ---- running ---------------------------------------------------------------------------------------------------------


def cover(options: argparse.Namespace, file: str) -> None:
    """Runs a file with Amos, and what fails with the test's own optimizer."""
    run(options, file, options.optimizer)
    if options.optimizer == "amos" and (failed := outcomes(options, file, "amos", "failed")):
        run(options, file, "original", [each["id"] for each in failed])


def outcomes(options: argparse.Namespace, file: str, optimizer: str, outcome: str) -> list[Result]:
    its = (each for key, each in results_in(options.json).items() if key[0] == optimizer and file_of(each) == file)
    return [each for each in its if each["outcome"] == outcome]


def run(options: argparse.Namespace, file: str, optimizer: str, only: Iterable[str] | None = None) -> None:
    """Runs a file, or `only` some tests of it. A test that hangs or dies ends pytest: it goes on after that test."""
    unfinished: list[Result] = [{}]
    while unfinished:
        orders = {
            "optimizer": optimizer,
            "done": [test for its, test in results_in(options.json) if its == optimizer],
            "only": None if only is None else list(only),
            "limit": options.limit,
            "results": str(options.json),
        }
        with tempfile.TemporaryDirectory() as folder:
            orders["engines"] = str(Path(folder, "engines"))
            Path(folder, "orders").write_text(json.dumps(orders))
            ended = run_pytest(options, file, Path(folder, "orders"))
        if not any(file_of(each) == file for each in results_in(options.json).values()):
            raise RuntimeError(f"pytest ended with {ended} before it collected {file}. It says why in {options.log}.")
        unfinished = outcomes(options, file, optimizer, "started")
        with options.json.open("a") as out:
            for each in unfinished:
                reason = f"no end after {options.limit} s, or an end of the process"
                out.write(json.dumps({**each, "outcome": "failed", "reason": reason}) + "\n")


def run_pytest(options: argparse.Namespace, file: str, orders: Path) -> int:
    """Returns what pytest ended with."""
    environment = {
        **os.environ,
        "DEEPSPEED_SUITE": str(orders),
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": "4",  # so many ranks may a test ask for
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "deepspeed_suite_plugin", "-p", "no:cacheprovider"]
    command += [f"--timeout={options.limit}", "--timeout-method=thread", f"unit/{file}"]
    command += ["-m", "not nightly"]  # which fetch models; those that must run alone do so, within their file
    command += ["-k", options.k] if options.k else []
    with options.log.open("a") as log:
        process = subprocess.Popen(
            command, cwd=options.path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # the ranks of a test that hung
                os.killpg(process.pid, signal.SIGKILL)


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = {
    "passed": "passed with Amos",
    "none": "no optimizer replaced",
    "skipped": "skipped",
    "both": "fails with the original too",
    "left": "not run",
    "alone": "fails with Amos alone",
}


def verdict(result: Result, original: Result | None) -> str:
    """The column of a test that was run with Amos."""
    if result["outcome"] == "failed":
        return "both" if original and original["outcome"] != "passed" else "alone"
    return "none" if result["outcome"] == "passed" and not result["engines"] else result["outcome"]


def reason_of(result: Result) -> str:
    said = result["reason"].strip()
    known = (reason for pattern, reason in REASONS if re.search(pattern, f"{result['id']}: {said}"))
    return next(known, f"`{said.splitlines()[0][:160]}`")


def table(results: Results) -> Iterator[str]:
    """In Markdown, a line for each file."""
    yield f"| test file | {' | '.join(COLUMNS.values())} |"
    yield f"|---|{'--:|' * (len(COLUMNS) - 1)}---|"
    totals: Counter[str] = Counter()
    tests = sorted((each for (its, _), each in results.items() if its == "amos"), key=lambda each: str(each["id"]))
    for file, some in itertools.groupby(tests, key=file_of):
        verdicts = [(verdict(each, results.get(("original", each["id"]))), each) for each in some]
        counts = Counter(column for column, _ in verdicts)
        collected = results.get(("collected", file), {"count": 0})["count"]
        counts["left"] = max(0, collected - counts.total())
        totals += counts
        failed = [each for column, each in verdicts if column == "alone"]
        unsure = {each["id"] for each in failed if ("original", each["id"]) not in results}
        reasons = Counter(reason_of(each) + " (alone?)" * (each["id"] in unsure) for each in failed).most_common()
        said = "; ".join(f"{count}: {reason}" for reason, count in reasons).replace("|", "\\|")
        cells = [str(counts[column]) for column in COLUMNS if column != "alone"]
        yield f"| {file} | {' | '.join(cells)} | {said or 0} |"
    yield f"| all | {' | '.join(str(totals[column]) for column in COLUMNS)} |"


def write_table(options: argparse.Namespace) -> None:
    """Puts the results after MARK, in place of what is there."""
    versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "torch", "pytest")}
    tests = (options.path.parent / "version.txt").read_text().strip()
    about = f"Tests of DeepSpeed {tests}; " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".\n"
    head = options.table.read_text().partition(MARK)[0] if options.table.exists() else ""
    options.table.write_text(head + MARK + "\n" + about + "\n" + "\n".join(table(results_in(options.json))) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the folder `tests` of DeepSpeed's repository")
    parser.add_argument("--files", nargs="*", default=ALL, help="below tests/unit")
    parser.add_argument("-k", help="as pytest has it")
    parser.add_argument("--optimizer", choices=["amos", "original"], default="amos")
    parser.add_argument("--json", type=Path, default=Path("deepspeed_suite.jsonl"), help="where results are kept")
    parser.add_argument("--log", type=Path, default=Path("deepspeed_suite.log"), help="pytest's output")
    parser.add_argument("--table", type=Path, help="a Markdown file to put the results of --json into")
    parser.add_argument("--limit", type=int, default=300, help="seconds for a test; for a rank that waits, a sixth")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    options = parser.parse_args()
    for name in ("path", "json", "log"):
        setattr(options, name, getattr(options, name).resolve())
    if not (options.path / "unit" / "common.py").exists():
        parser.error(f"{options.path} has no unit/common.py. Give the folder `tests` of DeepSpeed's repository.")
    if absent := [file for file in options.files if not (options.path / "unit" / file).exists()]:
        parser.error(f"{', '.join(absent)}: not in {options.path / 'unit'}. Give files as runtime/zero/test_zero.py.")
    if tuple(map(int, pytest.__version__.split(".")[:2])) >= (8, 4):
        parser.error(f'pytest {pytest.__version__} does not find these tests\' fixtures. pip install "pytest<8.4"')
    with ThreadPoolExecutor(options.jobs) as pool:
        list(tqdm(pool.map(lambda file: cover(options, file), options.files), total=len(options.files), unit="file"))
    if options.table:
        write_table(options)


if __name__ == "__main__":
    main()
