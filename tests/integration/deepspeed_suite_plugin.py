"""A pytest plugin: DeepSpeed's own tests get Amos wherever they configure Adam, and say how many engines had it.

deepspeed_suite.py starts it. The ranks of a test are children of multiprocessing's forkserver, which imports this
module first: what is replaced here is replaced in them too, and what takes long to import is imported once.
"""

from __future__ import annotations

import copy
import datetime
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import unit.common
import unit.util

from amos_dist import Amos
from amos_dist.checkpoint import ENTRY, SETTINGS, SHARD
from tests.distributed.harness import free_port

# What the script wants: which optimizer, where results and engines are noted, which tests.
ORDERS = json.loads(Path(os.environ["DEEPSPEED_SUITE"]).read_text())
ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")
ADAM_LR = 1e-3  # Adam's own, where a test names none
MOMENTUM = 0.9  # Adam's own, too
ADAM_STATE = ("exp_avg", "exp_avg_sq")
# What cannot pass here with any optimizer, and takes long to fail: what is found in the test's id, and the reason.
CANNOT = {
    r"test_offload_states.*\[(False|True-.*-(lp_params|contiguous_grad_buffer|None)\])": "wants a GPU's memory freed",
}
ADAM_KEYWORDS = ("betas", "eps", "weight_decay", "amsgrad")


# ---- in every process ------------------------------------------------------------------------------------------------


def note(file: str, line: dict[str, Any]) -> None:
    """Appends a line in one write, so that ranks can share the file."""
    with Path(ORDERS[file]).open("a") as out:
        out.write(json.dumps(line) + "\n")


def config_with_amos(config: Any) -> Any:
    """DeepSpeed's JSON (a dict or a file), with Amos in the place of Adam; any other as it is."""
    if isinstance(config, (str, os.PathLike)):
        config = json.loads(Path(config).read_text())
    optimizer = config.get("optimizer") or {} if isinstance(config, dict) else {}
    if str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        return config
    lr = optimizer.get("params", {}).get("lr", ADAM_LR)
    return {
        **copy.deepcopy(config),
        "optimizer": {**optimizer, "type": "Amos", "params": {"lr": lr, "momentum": MOMENTUM}},
    }


def amos_for(optimizer: Any) -> Any:
    """An Amos with the groups of an Adam; a function that makes one becomes a function that makes the other."""
    if inspect.isfunction(optimizer):
        return lambda params: amos_for(optimizer(params))
    if type(optimizer).__name__ not in ADAMS:
        return optimizer
    foreign = optimizer.defaults.keys() - {"lr"}
    groups = [{k: v for k, v in group.items() if k not in foreign} for group in optimizer.param_groups]
    return Amos(groups, lr=optimizer.defaults["lr"], momentum=MOMENTUM)


def asked_by_test() -> bool:
    """Whether it is a test, not DeepSpeed, that has called the function which asks."""
    return "/unit/" in sys._getframe(2).f_code.co_filename


def without_adam(groups: Any) -> Any:
    """Parameter groups without Adam's keywords; what is no list of groups as it is."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return groups
    return [{k: v for k, v in group.items() if k not in ADAM_KEYWORDS} for group in groups]


def replace(given: dict[str, Any]) -> None:
    """Changes the arguments of deepspeed.initialize."""
    for keyword in ("config", "config_params"):
        given[keyword] = config_with_amos(given.get(keyword))
    chosen = getattr(given.get("args"), "deepspeed_config", None)
    if chosen and given["config"] is None:
        given["config"], given["args"] = config_with_amos(chosen), None
    configs = [given[keyword] for keyword in ("config", "config_params") if isinstance(given[keyword], dict)]
    if any((config.get("optimizer") or {}).get("type") == "Amos" for config in configs):
        given["model_parameters"] = without_adam(given.get("model_parameters"))
    old = given.get("optimizer")
    given["optimizer"] = amos_for(old)
    if given["optimizer"] is not old:
        # Asked of every optimizer that is handed in as an object, but for DeepSpeed's own, with offload.
        if isinstance(given["config"], dict):
            given["config"] = {"zero_force_ds_cpu_optimizer": False, **given["config"]}
        if getattr(given.get("lr_scheduler"), "optimizer", None) is old:
            given["lr_scheduler"].optimizer = given["optimizer"]


def of_momentum(function: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed's function of a parameter's state: Adam's keys are those of Amos's one plane. The key is its last."""

    @functools.wraps(function)
    def asked(*args: Any) -> Any:
        return function(*args[:-1], "momentum" if args[-1] in ADAM_STATE else args[-1])

    return asked


def state_with_adams_keys(zero: Any) -> Any:
    """Stages 1 and 2: the optimizer's state, where a test reads Adam's two planes, gives it Amos's one."""
    state = zero.optimizer.state
    if ORDERS["optimizer"] != "amos" or not asked_by_test():
        return state
    return {
        held: {**its, **(dict.fromkeys(ADAM_STATE, its["momentum"]) if "momentum" in its else {})}
        for held, its in state.items()
    }


def one_key(test: dict[str, Any]) -> None:
    """A test module that writes both of Adam's keys and reads them again writes and reads one."""
    test.update(dict.fromkeys(("FIRST_ORDER_KEY", "SECOND_ORDER_KEY") & test.keys(), "momentum"))


def alike_on_all_ranks(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What a test may compare and gather, tensor by tensor: settings, steps, momentum and what has a partition's shape.

    A saved Amos also has the whole state on rank 0 alone, and each rank's own rows and columns.
    """
    groups = [{k: v for k, v in g.items() if k not in (ENTRY, SETTINGS)} for g in state_dict["param_groups"]]
    states = {n: {k: v for k, v in state.items() if k != SHARD} for n, state in state_dict["state"].items()}
    return {"state": states, "param_groups": groups}


def errors_that_come_back(run_rank: Callable[..., Any]) -> Callable[..., Any]:
    """A rank's part of a test. pytest's own failures are no Exception: a pool would wait for their rank for ever."""

    @functools.wraps(run_rank)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return run_rank(*args, **kwargs)
        except pytest.fail.Exception as failure:
            raise AssertionError(str(failure)) from failure

    return run


def flags_of_all_ranks(flag: bool, op: Callable[[list[bool]], bool] = all) -> bool:
    """What the tests compare over all ranks with. They gather a tensor without a dimension, which gloo refuses."""
    flags = [flag] * torch.distributed.get_world_size() if torch.distributed.is_initialized() else [flag]
    if len(flags) > 1:
        torch.distributed.all_gather_object(flags, flag)
    return op(flags)


def install() -> None:
    original = deepspeed.initialize

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        if ORDERS["optimizer"] == "amos":
            replace(bound.arguments)
            one_key(sys._getframe(1).f_globals)
        made = original(**bound.arguments)
        if os.environ.get("RANK", "0") == "0":
            note("engines", {"engine": type(getattr(made[0], "basic_optimizer", None)).__name__})
        return made

    deepspeed.initialize = initialize
    if ORDERS["optimizer"] == "amos":
        for verb, part in itertools.product(("get", "set"), ("full", "local")):
            name = f"safe_{verb}_{part}_optimizer_state"
            setattr(deepspeed.utils, name, of_momentum(getattr(deepspeed.utils, name)))
        stage3 = importlib.import_module("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
        stage3.get_hp_param_device = of_momentum(stage3.get_hp_param_device)
    for slow in ("torch._inductor.compile_fx", "torch.distributed.fsdp", "deepspeed.module_inject.auto_ep_config"):
        importlib.import_module(slow)

    saved = Amos.state_dict

    def state_dict(self: Amos) -> dict[str, Any]:
        found = saved(self)
        return alike_on_all_ranks(found) if asked_by_test() else found

    Amos.state_dict = state_dict  # type: ignore[method-assign]

    zero = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2").DeepSpeedZeroOptimizer
    zero.state = zero.state.getter(state_with_adams_keys)

    # Reductions through shared memory spin while they wait, for minutes where there are more ranks than processors.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

    # Ranks that wait for each other for ever end with an error, long before the test is ended.
    join = deepspeed.init_distributed
    waiting = datetime.timedelta(seconds=ORDERS["limit"] / 6)
    deepspeed.init_distributed = functools.partial(join, timeout=waiting)

    common, util = unit.common, unit.util
    common.DistributedExec._dist_run = errors_that_come_back(common.DistributedExec._dist_run)
    common.get_master_port = lambda: str(free_port())  # one that no other run on this machine has

    # What the tests have for a GPU alone: bf16, for which they ask for NCCL; devices by number; a collective.
    util.bf16_required_version_check = lambda *_, **__: True
    common.reduce_boolean_flags = flags_of_all_ranks
    replicate = torch.nn.parallel.DistributedDataParallel.__init__

    def on_the_cpu(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, **others: Any) -> None:
        replicate(self, module, **others)

    torch.nn.parallel.DistributedDataParallel.__init__ = on_the_cpu

    # The tests at hand may be of another version. What they ask for of a feature that DeepSpeed has dropped since:
    engine = deepspeed.DeepSpeedEngine
    if "sparse_tensor_module_names" not in inspect.getsource(engine.__init__):
        engine.sparse_tensor_module_names = frozenset()  # sparse gradients


install()


# ---- in pytest's process ---------------------------------------------------------------------------------------------

_found: dict[str, Any] = {}


def pytest_configure() -> None:
    multiprocessing.set_forkserver_preload([__name__])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that does not load, or skips itself, is a result, too."""
    if report.failed or report.skipped:
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr).strip()
        its = {"id": report.nodeid, "outcome": report.outcome, "reason": said.splitlines()[-1]}
        note("results", {**its, "optimizer": ORDERS["optimizer"], "engines": 0})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    wanted = [item.nodeid for item in items if item.get_closest_marker("nightly") is None]
    for file, count in Counter(name.split("::")[0].removeprefix("unit/") for name in wanted).items():
        note("results", {"optimizer": "collected", "id": file, "count": count})
    yield  # what -k and marks leave out
    done, only = set(ORDERS["done"]), ORDERS["only"]
    items[:] = [item for item in items if item.nodeid not in done and (only is None or item.nodeid in only)]
    for item, (pattern, reason) in itertools.product(items, CANNOT.items()):
        if re.search(pattern, item.nodeid):
            item.add_marker(pytest.mark.skip(reason=reason))


def engines() -> int:
    """How many the test has built with Amos so far."""
    lines = Path(ORDERS["engines"]).read_text().splitlines()
    return sum(json.loads(line)["engine"] == "Amos" for line in lines)


def pytest_runtest_logstart(nodeid: str) -> None:
    Path(ORDERS["engines"]).write_text("")
    _found.update(id=nodeid, outcome="started", reason="", optimizer=ORDERS["optimizer"], engines=0)
    note("results", _found)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        _found.update(outcome="skipped", reason=said)
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _found.update(outcome="failed", reason=crash.message if crash else str(report.longrepr).strip())
    elif report.when == "call" and _found["outcome"] == "started":
        _found["outcome"] = "passed"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logfinish() -> None:
    note("results", {**_found, "reason": _found["reason"][:2000], "engines": engines()})
