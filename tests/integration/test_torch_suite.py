"""What torch asks of its own optimizers (test/test_optim.py: TestOptimRenewed, TestOptim), asked of Amos.

torch's wheels do not have that file, so the checks are written anew; the inputs come from torch's own database of
optimizers, in which tests/integration/torch_registration.py enters Amos. Checks run on the CPU and, where there is one,
on a CUDA device. Where torch allows a tolerance between two runs of the same code, equal bits are asked for here.

Left out, and why:

* differentiable: refused by name (test_errors). Amos's step writes in place through kernels without a derivative.
* sparse gradients, rosenbrock on them: refused at the step (test_errors). The second moment is of whole rows.
* complex parameters, complex_2d: refused by name (test_errors). A complex entry has no single scale.
* weight_decay of groups: Amos has none and refuses the keyword; `extra_l2` stands in for it here.
* optimizers that need a closure to step (LBFGS), and a step that asks for sparse gradients: Amos is neither.
* large tensors (more than 64 GB), peak memory of foreach: tests/unit/test_memory_of_step.py measures the step's memory.
* fused with `grad_scale` and `found_inf`: Amos does not take them over from GradScaler, which then unscales and skips
  steps itself; that is checked.
* the default is foreach: Amos's is the native kernels; that is checked.
* CUDA graphs, and all else of capturable that only a GPU shows: tests/gpu/features.py.
* torch.compile of a step, and functional optimizers: torch tests them in other files.
* SWA and averaged models: they do not ask the optimizer for anything.
* what needs CUDA, or two devices, is skipped where they are not. Meta tensors show where loaded state goes.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from amos_dist import Amos, fallback, settings
from amos_dist.ops import why_not
from tests.conftest import TOLERANCES, relative_error
from tests.unit.compare import assert_same, randn

pytest.importorskip("expecttest", reason="torch's database of optimizers under test imports expecttest")
from tests.integration.torch_registration import AMOS, KWARGS, LR

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORLOOP = dict.fromkeys(AMOS.supported_impls, False)
IMPLS = {"forloop": FORLOOP, **{impl: {**FORLOOP, impl: True} for impl in AMOS.supported_impls}}
# On the CPU torch does not repeat its checks for `foreach`; here that is the forloop's code, which is shown once.
WAYS = [impl for impl in IMPLS if impl != "foreach" or torch.cuda.is_available()]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
named_or_not = pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def registered(desc: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """The keywords of one registered input, made anew: a tensor in them may be written to."""
    (found,) = [each.kwargs for each in AMOS.optim_inputs_func(device=device) if each.desc == desc]
    return {**found, **more}


@pytest.fixture(params=KWARGS)
def chosen(request: pytest.FixtureRequest, device: str) -> dict[str, Any]:
    """A registered input, without saying how it is computed."""
    return registered(request.param, device)


@pytest.fixture(params=WAYS)
def given(request: pytest.FixtureRequest, chosen: dict[str, Any], device: str) -> dict[str, Any]:
    """A registered input, computed in each of the ways."""
    if request.param == "fused" and device not in AMOS.supports_fused_on:
        pytest.skip(why_not(device))
    return {**chosen, **IMPLS[request.param]}


class Problem:
    """(W x + b)^2, with W and b to be found."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        weight, bias = randn(1, 10, 5, 2, dtype=dtype).to(device), randn(2, 10, 2, dtype=dtype).to(device)
        if contiguous:
            weight, bias = weight[..., 0].contiguous(), bias[..., 0].contiguous()
        else:
            weight, bias = weight[..., 0], bias[..., 0]
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.x = randn(3, 5, dtype=dtype).to(device)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def listed(self, named: bool) -> list[Any]:
        return [("weight", self.weight), ("bias", self.bias)] if named else self.params

    def backward(self) -> Tensor:
        """Fresh gradients. Returns the loss."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.x) + self.bias.to(self.x.device)).square().sum()
        loss.backward()
        return loss.detach()

    def steps(self, optimizer: Amos, count: int) -> None:
        for _ in range(count):
            self.backward()
            optimizer.step()

    def clone(self) -> Problem:
        return copy.deepcopy(self)


def trained(given: dict[str, Any], count: int = 3, device: str = "cpu", named: bool = False) -> tuple[Problem, Amos]:
    problem = Problem(device)
    optimizer = Amos(problem.listed(named), **given)
    problem.steps(optimizer, count)
    return problem, optimizer


def same(a: Any, b: Any) -> bool:
    """The same values of the same types, dtypes and devices, to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def same_run(one: tuple[Problem, Amos], other: tuple[Problem, Amos]) -> bool:
    states = [[optimizer.state[param] for param in problem.params] for problem, optimizer in (one, other)]
    return same(states[0], states[1]) and all(map(torch.equal, one[0].params, other[0].params))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


# ---- the registration itself ---------------------------------------------------------------------------------


def test_inputs_say_nothing_of_the_implementation() -> None:
    for each in AMOS.optim_inputs_func(device="cpu"):
        assert not {"foreach", "fused", "differentiable"} & set(each.kwargs), each.desc


def test_inputs_use_every_keyword() -> None:
    used = {key for each in AMOS.optim_inputs_func(device="cpu") for key in each.kwargs}
    assert used == set(settings.KEYWORDS) - {"foreach", "fused"}


def test_registered_flags_are_those_of_the_constructor() -> None:
    taken = set(inspect.signature(Amos).parameters)
    assert {*AMOS.supported_impls, *AMOS.not_og_supported_flags} <= taken
    assert AMOS.has_capturable_arg == ("capturable" in taken)
    assert "differentiable" not in taken and "differentiable" not in AMOS.supported_impls
    assert AMOS.name == "Amos" and AMOS.optim_cls is Amos


def test_flags_of_backends_can_still_be_set() -> None:
    """Importing torch's database forbids it, to every test of the same process."""
    assert not torch.backends.flags_frozen()


ERRORS = {each.optimizer_error_input.desc: each for each in AMOS.optim_error_inputs_func("cpu", torch.float32)}


@pytest.mark.parametrize("desc", ERRORS)
def test_errors(desc: str) -> None:
    error = ERRORS[desc]
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    warns = issubclass(error.error_type, Warning)
    expected: Any = pytest.warns if warns else pytest.raises
    if error.error_on.name == "STEP_ERROR":
        optimizer = Amos(params, **kwargs)
        before = copy.deepcopy(params)
        with expected(error.error_type, match=error.error_regex):
            optimizer.step()
        assert same([*map(torch.detach, params)], [*map(torch.detach, before)]) and not optimizer.state
    else:
        with expected(error.error_type, match=error.error_regex):
            Amos(params, **kwargs)


# ---- the update: it goes the right way, however it is computed -----------------------------------------------


def goes_right(problem: Problem, optimizer: Amos, schedulers: Sequence[Callable[[Any], Any]] = ()) -> None:
    running = [scheduler(optimizer) for scheduler in schedulers]
    first = float(problem.backward())
    for _ in range(20):
        loss = optimizer.step(problem.backward)
        for scheduler in running:
            scheduler.step(*([loss] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
    last = float(problem.backward())
    assert last > first if optimizer.param_groups[0]["maximize"] else last < first


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_the_right_way(given: dict[str, Any], device: str, contiguous: bool) -> None:
    problem = Problem(device, contiguous=contiguous)
    goes_right(problem, Amos(problem.params, **given))


@pytest.mark.parametrize("schedulers", AMOS.scheduler_inputs, ids=range(len(AMOS.scheduler_inputs)))
def test_goes_the_right_way_on_a_schedule(
    chosen: dict[str, Any], device: str, schedulers: Sequence[Callable[[Any], Any]]
) -> None:
    problem = Problem(device)
    goes_right(problem, Amos(problem.params, **chosen), schedulers)


@pytest.mark.parametrize("schedulers", AMOS.scheduler_inputs, ids=range(len(AMOS.scheduler_inputs)))
def test_groups_go_the_right_way_on_a_schedule(device: str, schedulers: Sequence[Callable[[Any], Any]]) -> None:
    problem = Problem(device)
    groups: list[dict[str, Any]] = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.02}]
    optimizer = Amos(groups, lr=LR)
    goes_right(problem, optimizer, schedulers)


@needs_two
@pytest.mark.gpu
def test_goes_the_right_way_on_two_devices() -> None:
    for desc in KWARGS:
        problem = Problem("cuda:0")
        problem.bias = nn.Parameter(problem.bias.detach().to("cuda:1"))
        goes_right(problem, Amos(problem.params, **registered(desc, "cuda")))


class Net:
    """Two layers, a parameter of no dimensions that has a gradient once, and one of no elements."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        shapes = [(3, 2), (3,), (1, 3), (1,), (), (0, 3)]
        self.params = [
            (randn(i, *shape, dtype=dtype) / 2).to(device).requires_grad_() for i, shape in enumerate(shapes)
        ]
        self.params[4].grad = torch.full_like(self.params[4], 0.25)

    def gradients(self, optimizer: Amos, i: int) -> None:
        if i:
            optimizer.zero_grad()
        if i in (3, 5):  # the second layer is frozen for two steps
            for param in self.params[2:4]:
                param.requires_grad_(i == 5)
        if i != 2:  # a step without any gradient
            # No matmul: those of half precision are slow to start.
            outputs = [(param.double().sin() + param.square()).mean() for param in self.params[:4]]
            torch.stack(outputs).sum().backward()


def take_over(optimizer: Amos, params: Sequence[Tensor], other: Amos, others: Sequence[Tensor]) -> None:
    """Gives `others` what `params` and their states hold, so that roundings do not add up from step to step."""
    with torch.no_grad():
        for param, copied in zip(params, others, strict=True):
            copied.copy_(param)
            for key, value in optimizer.state[param].items():
                other.state[copied][key].copy_(value)


def step_alike(kwargs: dict[str, Any], impl: str, device: str, dtype: torch.dtype) -> None:
    runs = []
    for how in ("forloop", impl):
        net = Net(device, dtype)
        runs.append((net, Amos(net.params, **{**copy.deepcopy(kwargs), **IMPLS[how]})))
    (net, optimizer), (other_net, other) = runs
    for i in range(7):
        before = [param.detach().clone() for param in net.params]
        for each, its in runs:
            each.gradients(its, i)
            its.step()
        if i == 2:
            assert same([*map(torch.detach, net.params)], before)
        for param, copied in zip(net.params, other_net.params, strict=True):
            state, expected = other.state[copied], optimizer.state[param]
            assert state["step"].dtype == expected["step"].dtype == torch.float32
            if impl == "foreach":  # the same code: the same bits
                assert same(dict(state), dict(expected)) and torch.equal(param, copied)
            else:
                assert_same(copied, state, param, dict(expected), where=f"{tuple(param.shape)}, step {i}")
        take_over(optimizer, net.params, other, other_net.params)


def test_foreach_is_the_forloop(chosen: dict[str, Any], device: str) -> None:
    step_alike(chosen, "foreach", device, torch.float64)


@every_dtype
def test_fused_matches_the_forloop(chosen: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    if device not in AMOS.supports_fused_on:
        pytest.skip(why_not(device))
    step_alike(chosen, "fused", device, dtype)


def test_the_default_is_fused(chosen: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And `foreach` and fused=False are not: what plain torch does is seen to be called there, and only there."""
    if device not in AMOS.supports_fused_on:
        pytest.skip(why_not(device))
    calls: list[None] = []
    monkeypatch.setattr(fallback, "step_", lambda *_: calls.append(None))
    for how, expected in ({}, 0), ({"fused": True}, 0), ({"fused": False}, 1), ({"foreach": True}, 1):
        calls.clear()
        trained({**chosen, **how}, 1, device)
        assert len(calls) == expected, how


@pytest.mark.parametrize("impl", AMOS.supported_impls)
def test_mixed_dtypes_and_devices(impl: str, chosen: dict[str, Any], device: str) -> None:
    if device != DEVICES[-1]:
        pytest.skip("all devices are mixed in one test")
    if impl == "fused" and set(DEVICES) > set(AMOS.supports_fused_on):
        pytest.skip(why_not(device))
    runs = []
    for how in ("forloop", impl):
        params = [randn(i, 2, 3, dtype=dtype).to(on) for i, dtype in enumerate(DTYPES) for on in DEVICES]
        optimizer = Amos(params, **{**copy.deepcopy(chosen), **IMPLS[how]})
        for i, param in enumerate(params):
            param.grad = randn(100 + i, 2, 3, dtype=param.dtype).to(param.device)
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    for _ in range(3):
        for _, each in runs:
            each.step()
        for param, copied in zip(params, others, strict=True):
            assert_same(copied, other.state[copied], param, dict(optimizer.state[param]))
        take_over(optimizer, params, other, others)


@needs_cuda
@pytest.mark.gpu
@every_dtype
def test_fused_on_the_cpu_matches_cuda(dtype: torch.dtype) -> None:
    if len(AMOS.supports_fused_on) < 2:
        pytest.skip(why_not("cpu") or why_not("cuda"))
    for desc in KWARGS:
        net, other_net = Net("cpu", dtype), Net("cuda", dtype)
        optimizer = Amos(net.params, fused=True, **registered(desc))
        other = Amos(other_net.params, fused=True, **registered(desc, "cuda"))
        for i in range(7):
            net.gradients(optimizer, i)
            for param, copied in zip(net.params, other_net.params, strict=True):  # a matmul's sums differ by device
                copied.grad = None if param.grad is None else param.grad.to("cuda")
            optimizer.step()
            other.step()
            for param, copied in zip(net.params, other_net.params, strict=True):
                found, expected = other.state[copied], dict(optimizer.state[param])
                assert_same(copied.detach().cpu(), found, param, expected, where=f"{desc}, {tuple(param.shape)}")
            take_over(optimizer, net.params, other, other_net.params)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_default_dtype_does_not_reach_the_state(
    impl: str, dtype: torch.dtype, default_dtype: Callable[[torch.dtype], None], device: str
) -> None:
    """A step counted in bfloat16 would stay at 256 for ever."""
    given = registered("momentum", device, **IMPLS[impl])
    expected = trained(given, 3, device)
    default_dtype(dtype)
    found = trained(given, 3, device)
    assert {value.dtype for state in found[1].state.values() for value in state.values()} == {torch.float32}
    assert same_run(found, expected)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_default_device_does_not_matter(impl: str, capturable: bool, device: str) -> None:
    """torch.set_default_device: the parameters say where the work is. Meta, because nothing can be read from it."""
    given = {"lr": LR, "momentum": 0.9, "capturable": capturable, **IMPLS[impl]}
    problem, optimizer = trained(given, 0, device)
    for _ in range(3):
        problem.backward()
        with torch.device("meta"):
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
    assert same_run((problem, optimizer), trained(given, 3, device))


# ---- lr --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr(given: dict[str, Any], device: str, shape: tuple[int, ...]) -> None:
    """The same bits as with a float; it is read, not kept, and neither replaced nor written to."""
    lr = torch.full(shape, 0.0625)
    number, tensor = trained({**given, "lr": 0.0625}, 0, device), trained({**given, "lr": lr}, 0, device)
    for _ in range(5):
        for problem, optimizer in (number, tensor):
            problem.steps(optimizer, 1)
        assert same_run(number, tensor)
        assert tensor[1].param_groups[0]["lr"] is lr and lr.flatten().tolist() == [0.0625]
    as_before = copy.deepcopy(number)
    lr.fill_(0.25)
    number[1].param_groups[0]["lr"] = 0.25
    for problem, optimizer in (number, tensor, as_before):
        problem.steps(optimizer, 1)
    assert same_run(number, tensor) and not same_run(number, as_before)


@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_on_the_device(device: str, capturable: bool) -> None:
    lr = torch.tensor(0.0625, device=device)
    given = {"lr": lr, "capturable": capturable}
    assert same_run(trained(given, 3, device), trained({**given, "lr": 0.0625}, 3, device))


def test_loaded_lr_is_the_loaders_own(given: dict[str, Any], device: str) -> None:
    """A schedule that writes into one tensor must not reach the other optimizer, or the file's contents."""
    given["lr"] = torch.tensor(0.25)
    problem, optimizer = trained(given, 2, device)
    saved = optimizer.state_dict()
    other = Amos(problem.clone().params, **{**given, "lr": torch.tensor(0.5)})
    other.load_state_dict(saved)
    lr = other.param_groups[0]["lr"]
    assert isinstance(lr, Tensor) and lr.shape == () and float(lr) == 0.25
    lr.fill_(0.125)
    assert float(saved["param_groups"][0]["lr"]) == float(optimizer.param_groups[0]["lr"]) == 0.25


def test_capturable_counts_on_the_device(chosen: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(chosen, 2, device)
    where = device if chosen.get("capturable") else "cpu"
    assert {optimizer.state[param]["step"].device.type for param in problem.params} == {where}


@pytest.mark.parametrize("capturable", [False, True])
def test_lr_of_two_numbers_at_the_step(capturable: bool) -> None:
    problem, optimizer = trained({"lr": LR, "capturable": capturable}, 1)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = torch.tensor([0.1, 0.2])
    with pytest.raises(TypeError, match="is not a number"):
        problem.steps(optimizer, 1)
    assert same(optimizer.state_dict()["state"], before)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": functools.partial(lrs.StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": functools.partial(lrs.MultiStepLR, milestones=[2, 4], gamma=0.5),
    "LambdaLR": functools.partial(lrs.LambdaLR, lr_lambda=lambda t: 1 / (1 + t)),
    "MultiplicativeLR": functools.partial(lrs.MultiplicativeLR, lr_lambda=lambda t: 0.9),
    "ExponentialLR": functools.partial(lrs.ExponentialLR, gamma=0.8),
    "ConstantLR": functools.partial(lrs.ConstantLR, factor=0.25, total_iters=3),
    "LinearLR": functools.partial(lrs.LinearLR, start_factor=0.25, total_iters=4),
    "PolynomialLR": functools.partial(lrs.PolynomialLR, total_iters=10, power=2.0),
    "CosineAnnealingLR": functools.partial(lrs.CosineAnnealingLR, T_max=6),
    "CosineAnnealingWarmRestarts": functools.partial(lrs.CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": functools.partial(lrs.OneCycleLR, max_lr=0.2, total_steps=8),
    "CyclicLR": functools.partial(lrs.CyclicLR, base_lr=0.05, max_lr=0.2, step_size_up=3),
    "SequentialLR": lambda opt: lrs.SequentialLR(
        opt, [lrs.ConstantLR(opt, 0.1, 2), lrs.ExponentialLR(opt, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda opt: lrs.ChainedScheduler([lrs.LinearLR(opt, 0.5, total_iters=3)], optimizer=opt),
    "ReduceLROnPlateau": functools.partial(lrs.ReduceLROnPlateau, patience=0, threshold=100.0, threshold_mode="abs"),
}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_a_tensor_lr(name: str, capturable: bool, device: str) -> None:
    """They fill the tensor, in float32, and do not replace it; the optimizer is in order with them, so none warns.

    OneCycleLR and CyclicLR move the momentum as well.
    """
    runs = []
    for lr in (0.0625, torch.tensor(0.0625)):
        problem = Problem(device)
        optimizer = Amos(problem.params, lr=lr, momentum=0.9, capturable=capturable)
        scheduler, seen = SCHEDULES[name](optimizer), []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if name == "SequentialLR":  # of torch's own making: it steps a schedule by number
                warnings.filterwarnings("ignore", "The epoch parameter")
            for _ in range(6):
                loss = optimizer.step(problem.backward)
                seen.append((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["momentum"])))
                scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
        assert not isinstance(lr, Tensor) or optimizer.param_groups[0]["lr"] is lr
        runs.append((problem, seen))
    (numbers, seen), (tensors, seen_too) = runs
    assert len(set(seen)) > 1
    assert torch.allclose(torch.tensor(seen), torch.tensor(seen_too), rtol=1e-5, atol=1e-9)
    for one, other in zip(numbers.params, tensors.params, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_a_schedule_warns_of_the_wrong_order() -> None:
    """torch looks at whether `step` was called, through a wrapper that it puts around it."""
    problem = Problem()
    optimizer = Amos(problem.params, lr=LR)
    scheduler = lrs.StepLR(optimizer, 2)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\).* before .*optimizer\.step\(\)"):
        scheduler.step()


# ---- which gradients there are ---------------------------------------------------------------------------------


def test_nothing_happens_without_gradients(given: dict[str, Any], device: str) -> None:
    params = [randn(i, 2, 3).to(device) for i in range(2)]
    before = copy.deepcopy(params)
    optimizer = Amos(params, **given)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1.0
    assert optimizer.step() is None
    assert same(params, before) and not optimizer.state


def test_gradients_of_zero_move_nothing(given: dict[str, Any], device: str) -> None:
    """But `extra_l2`, as weight decay would."""
    param = randn(1, 5, 1).to(device).requires_grad_()
    before = param.detach().clone()
    optimizer = Amos([param], **given)
    for _ in range(2):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before) != bool(given.get("extra_l2"))
    assert optimizer.state[param]["step"] == 2


def test_gradients_come_and_go(given: dict[str, Any], device: str) -> None:
    """A parameter without one waits: as an optimizer of its own that is not asked."""
    together, apart = Problem(device), Problem(device)
    optimizer = Amos(together.params, **given)
    own = [Amos([param], **given) for param in apart.params]
    for t in range(6):
        for problem in (together, apart):
            problem.backward()
        if t % 3:
            which = t % 2
            together.params[which].grad = apart.params[which].grad = None
        optimizer.step()
        for each in own:
            each.step()
    assert same(list(map(torch.detach, together.params)), list(map(torch.detach, apart.params)))
    for param, alone, each in zip(together.params, apart.params, own, strict=True):
        assert same(dict(optimizer.state[param]), dict(each.state[alone]))


def test_gradients_of_other_strides(given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 0, device)
    for t in range(4):
        problem.backward()
        grad = problem.weight.grad
        assert grad is not None
        if t % 2:
            problem.weight.grad = grad.t().contiguous().t()
        optimizer.step()
    assert same_run((problem, optimizer), trained(given, 4, device))


def test_a_parameter_may_get_other_memory(given: dict[str, Any], device: str) -> None:
    expected, found = trained(given, 4, device), trained(given, 2, device)
    for param in found[0].params:
        param.data = param.detach().clone()
    found[0].steps(found[1], 2)
    assert same_run(found, expected)


def test_repeated_parameters_step_once(given: dict[str, Any], device: str) -> None:
    """torch only warns of them (test_errors). One of two states would be lost, and two threads write to one place."""
    twice, once = Problem(device), trained(given, 3, device)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = Amos([*twice.params, twice.weight], **given)
    twice.steps(optimizer, 3)
    assert same_run((twice, optimizer), once)


def test_the_state_is_not_empty(given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 1, device)
    assert set(optimizer.state) == set(problem.params)
    assert all(len(state) > 1 and state["step"] == 1 for state in optimizer.state.values())


def test_scaled_gradients(given: dict[str, Any], device: str) -> None:
    """GradScaler: a step with an infinite gradient is left out, and a power of two changes no bit of the others."""
    problem, expected = Problem(device), trained(given, 2, device)
    optimizer, scaler = Amos(problem.params, **given), torch.amp.GradScaler(device, init_scale=1024.0)
    for t in range(3):
        optimizer.zero_grad()
        loss = (problem.weight.mv(problem.x) + problem.bias).square().sum()
        scaler.scale(loss).backward()
        if t == 1:
            assert problem.bias.grad is not None
            problem.bias.grad[3] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert same_run((problem, optimizer), expected)


def test_meta_parameters_are_refused_by_the_kernels() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    optimizer = Amos(model.parameters(), lr=LR, sigma=0.5, fused=True)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="fused=True cannot be had on 'meta'"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()


# ---- parameter groups ------------------------------------------------------------------------------------------


def test_groups_are_like_optimizers_of_their_own(given: dict[str, Any], device: str) -> None:
    together, apart = Problem(device), Problem(device)
    bias = {**given, "lr": 0.125, "extra_l2": 0.01}
    optimizer = Amos([{"params": [together.weight]}, {"params": [together.bias], **bias}], **given)
    own = [Amos([apart.weight], **given), Amos([apart.bias], **bias)]
    first = float(together.backward())
    for _ in range(20):
        together.steps(optimizer, 1)
        apart.backward()
        for each in own:
            each.step()
    for param, alone, each in zip(together.params, apart.params, own, strict=True):
        assert torch.equal(param, alone) and same(dict(optimizer.state[param]), dict(each.state[alone]))
    last = float(together.backward())
    assert last > first if given.get("maximize") else last < first


def test_lr_of_a_group(given: dict[str, Any], device: str) -> None:
    """It wins over the optimizer's, which is nothing here: so the other group stays where it is."""
    problem, other = Problem(device), randn(9, 2).to(device).requires_grad_()
    before = other.detach().clone()
    optimizer = Amos([{"params": problem.params, **given}, {"params": [other], "extra_l2": 0.0}], lr=1e-28)
    first = float(problem.backward())
    for _ in range(20):
        other.grad = torch.ones_like(other)
        problem.steps(optimizer, 1)
    last = float(problem.backward())
    assert last > first if given.get("maximize") else last < first
    assert torch.equal(other, before)


def test_defaults_fill_groups_that_say_nothing(chosen: dict[str, Any]) -> None:
    weight, bias = Problem().params
    groups: list[dict[str, Any]] = [{"params": [weight], "beta": 0.5, "tag": "first"}, {"params": [bias]}]
    optimizer = Amos(groups, **chosen)
    first, second = optimizer.param_groups
    assert first["beta"] == 0.5 and first["tag"] == "first" and "tag" not in second
    expected = {**settings.DEFAULTS, **chosen}
    assert {key: second[key] for key in settings.KEYWORDS} == expected
    assert set(optimizer.defaults) == set(settings.KEYWORDS)


def test_a_group_that_is_added_later(given: dict[str, Any], device: str) -> None:
    expected, found = trained(given, 0, device), Problem(device)
    optimizer = Amos([found.weight], **given)
    optimizer.add_param_group({"params": found.bias})
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    for problem, each in (expected, (found, optimizer)):
        problem.steps(each, 3)
    assert same_run((found, optimizer), expected)


def test_a_group_added_after_loading_can_be_copied_and_saved() -> None:
    """Loading makes torch write a keyword into the defaults that Amos refuses."""
    problem, optimizer = trained({"lr": LR})
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [randn(1, 2, 3).requires_grad_()]})
    optimizer.add_param_group({**optimizer.param_groups[-1], "params": [randn(2, 2, 3).requires_grad_()]})
    assert all(set(group) == set(optimizer.param_groups[0]) for group in optimizer.param_groups)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    problem.steps(optimizer, 1)


def non_leaf() -> Tensor:
    return randn(1, 2, 3).requires_grad_() * 2


BAD_GROUPS: dict[str, tuple[Callable[[Problem], Any], type[Exception], str]] = {
    "no dict": (lambda problem: [problem.bias], TypeError, "param_group must be a dict"),
    "a set": (lambda problem: {"params": {problem.bias}}, TypeError, "ordered collections"),
    "no tensor": (lambda problem: {"params": [1.0]}, TypeError, "can only optimize Tensors"),
    "no leaf": (lambda problem: {"params": [non_leaf()]}, ValueError, "non-leaf"),
    "known already": (lambda problem: {"params": [problem.weight]}, ValueError, "more than one parameter group"),
    "names": (lambda problem: {"params": [("bias", problem.bias)]}, ValueError, "cannot add param group with names"),
    "a bad value": (lambda problem: {"params": [problem.bias], "beta": 2.0}, ValueError, "beta=2 is out of range"),
    "an integer": (lambda problem: {"params": [torch.ones(3).int()]}, TypeError, "is int32"),
}


@pytest.mark.parametrize("what", BAD_GROUPS)
def test_a_bad_group_is_refused_and_changes_nothing(what: str) -> None:
    make, error, message = BAD_GROUPS[what]
    problem = Problem()
    optimizer = Amos([problem.weight], lr=LR)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.add_param_group(make(problem))
    assert same(optimizer.state_dict(), before)
    optimizer.add_param_group({"params": [problem.bias]})
    problem.steps(optimizer, 1)
    assert same_run((problem, optimizer), trained({"lr": LR}, 1))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Amos([], lr=LR)


def test_zero_grad(given: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = Amos(problem.params, **given)
    problem.backward()
    kept = [param.grad for param in problem.params]
    optimizer.zero_grad(set_to_none=False)
    for param, grad in zip(problem.params, kept, strict=True):
        assert grad is not None and param.grad is grad and not grad.any()
    optimizer.zero_grad()
    assert all(param.grad is None for param in problem.params)


def test_it_can_be_printed(given: dict[str, Any]) -> None:
    weight, bias = Problem().params
    text = repr(Amos([{"params": [weight]}, {"params": [bias]}], **given))
    assert text.startswith("Amos (") and "Parameter Group 0" in text and "Parameter Group 1" in text
    assert all(f"    {key}: " in text for key in settings.KEYWORDS)


# ---- names -----------------------------------------------------------------------------------------------------


def test_names_go_round() -> None:
    problem = Problem()
    optimizer = Amos(problem.listed(named=True), lr=LR)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert same([*optimizer.param_groups[0]["params"]], [*problem.params])
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("loader_named", [False, True], ids=["into unnamed", "into named"])
@named_or_not
def test_named_and_unnamed_load_each_other(
    chosen: dict[str, Any], device: str, named: bool, loader_named: bool
) -> None:
    problem, optimizer = trained(chosen, 3, device, named)
    other_problem = problem.clone()
    other = Amos(other_problem.listed(loader_named), **chosen)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    names = other.state_dict()["param_groups"][0].get("param_names")
    assert names == (["weight", "bias"] if named or loader_named else None)
    for each, its in (problem, optimizer), (other_problem, other):
        each.steps(its, 1)
    assert same_run((problem, optimizer), (other_problem, other))


def test_names_of_the_file_win() -> None:
    """torch's rule: what is loaded has names, so they are taken."""
    problem = Problem()
    optimizer = Amos([("a", problem.weight), ("b", problem.bias)], lr=LR)
    other = Amos(Problem().listed(named=True), lr=LR)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["a", "b"]


# ---- state dict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader_named", [False, True], ids=["into unnamed", "into named"])
@named_or_not
def test_state_dict_is_determined(chosen: dict[str, Any], device: str, named: bool, loader_named: bool) -> None:
    """By the values: a resumed run has the bits of the one that went on, and so does its state dict."""
    problem, optimizer = trained(chosen, 5, device, named)
    resumed = problem.clone()
    other = Amos(resumed.listed(loader_named), **copy.deepcopy(chosen))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        problem.steps(optimizer, 1)
        resumed.steps(other, 1)
        assert same_run((problem, optimizer), (resumed, other))
    one, two = without_names(optimizer.state_dict()), without_names(other.state_dict())
    assert same(one, two)
    # The same parameters once more are known by the same numbers.
    other.param_groups.extend(other.param_groups)
    assert same(without_names(other.state_dict())["param_groups"], two["param_groups"] * 2)


@named_or_not
def test_saved_is_loaded(given: dict[str, Any], device: str, named: bool) -> None:
    """Through a file that holds no code."""
    _, optimizer = trained(given, 3, device, named)
    assert same(through_a_file(optimizer.state_dict()), optimizer.state_dict())


def test_loading_leaves_what_it_is_given_alone(given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 3, device)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    other_problem = problem.clone()
    other = Amos(other_problem.params, **copy.deepcopy(given))
    other.load_state_dict(saved)
    assert same(saved, before)
    other.param_groups[0]["lr"] = 0.5
    other_problem.steps(other, 2)
    assert same(saved, before)


def load_without(flags: Sequence[str], given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 3, device)
    older = optimizer.state_dict()
    for group in older["param_groups"]:
        for flag in flags:
            del group[flag]
    optimizer.load_state_dict(older)
    assert all(optimizer.param_groups[0][flag] == settings.DEFAULTS[flag] for flag in flags)
    before = [param.detach().clone() for param in problem.params]
    problem.steps(optimizer, 1)
    assert not any(map(torch.equal, problem.params, before))


def test_older_state_dicts_load(given: dict[str, Any], device: str) -> None:
    """Those of a version that did not have the flags yet; they say nothing of them, so they are off."""
    load_without(AMOS.not_og_supported_flags, given, device)


@pytest.mark.parametrize("flag", AMOS.not_og_supported_flags)
def test_state_dicts_without_one_flag_load(flag: str, device: str) -> None:
    load_without([flag], registered("default", device), device)


@pytest.mark.parametrize("kind", [int, float])
def test_a_step_that_is_no_tensor_loads(kind: type, given: dict[str, Any], device: str) -> None:
    problem, optimizer = trained(given, 3, device)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = kind(state["step"])
    resumed = problem.clone()
    other = Amos(resumed.params, **copy.deepcopy(given))
    other.load_state_dict(saved)
    assert all(same(state["step"], torch.tensor(3.0)) for state in other.state.values())
    for each, its in (problem, optimizer), (resumed, other):
        each.steps(its, 2)
    assert same_run((problem, optimizer), (resumed, other))


@pytest.mark.parametrize("loader", DTYPES, ids=str)
@every_dtype
def test_loaded_state_keeps_its_dtype(dtype: torch.dtype, loader: torch.dtype) -> None:
    """torch casts it to the parameter's; a second moment in float16 would be zero, and one in bfloat16 stand still."""
    problem = Problem(dtype=dtype)
    optimizer = Amos(problem.params, lr=LR, momentum=0.9, momentum_dtype="bfloat16")
    problem.steps(optimizer, 2)
    saved = optimizer.state_dict()
    found = Problem(dtype=loader)
    other = Amos(found.params, lr=LR, momentum=0.9, momentum_dtype="bfloat16")
    other.load_state_dict(saved)
    wide = torch.float64 if loader == torch.float64 else torch.float32
    for state, given in zip(other.state_dict()["state"].values(), saved["state"].values(), strict=True):
        assert state["step"].dtype == torch.float32
        assert same(state["momentum"], given["momentum"])
        for key in state.keys() - {"step", "momentum"}:
            assert same(state[key], given[key].to(wide)), key
    found.steps(other, 1)
    momentum = torch.float64 if loader == torch.float64 else torch.bfloat16
    assert {other.state[param]["momentum"].dtype for param in found.params} == {momentum}


@pytest.mark.parametrize("there", ["meta", *DEVICES[1:]])
def test_loaded_state_goes_to_the_parameters_device(there: str, chosen: dict[str, Any]) -> None:
    problem, optimizer = trained({**chosen, "sigma": 0.3})
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    moved = [nn.Parameter(param.detach().to(there)) for param in problem.params]
    other = Amos(moved, **{**chosen, "sigma": 0.3})
    other.load_state_dict(saved)
    for state, given in zip(other.state_dict()["state"].values(), before["state"].values(), strict=True):
        assert same(state.pop("step"), given.pop("step"))
        assert {value.device.type for value in state.values()} == {there}
        assert {key: (v.shape, v.dtype) for key, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in given.items()
        }


@needs_cuda
@pytest.mark.gpu
def test_cpu_state_goes_on_on_cuda_and_back() -> None:
    for desc in KWARGS:
        problem, optimizer = trained(registered(desc))
        on_cuda = Problem("cuda")
        with torch.no_grad():
            for param, copied in zip(problem.params, on_cuda.params, strict=True):
                copied.copy_(param)
        other = Amos(on_cuda.params, **registered(desc))
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        for _ in range(3):
            problem.steps(optimizer, 1)
            for param, copied in zip(problem.params, on_cuda.params, strict=True):
                assert param.grad is not None
                copied.grad = param.grad.to("cuda")
            other.step()
            for param, copied in zip(problem.params, on_cuda.params, strict=True):
                counts_on = "cuda" if registered(desc).get("capturable") else "cpu"
                assert other.state[copied]["step"].device.type == counts_on
                assert_same(copied, other.state[copied], param, dict(optimizer.state[param]), where=desc)
            take_over(optimizer, problem.params, other, on_cuda.params)
        back = problem.clone()
        returned = Amos(back.params, **registered(desc))
        returned.load_state_dict(through_a_file(other.state_dict()))
        problem.steps(optimizer, 1)
        back.steps(returned, 1)
        assert same_run((problem, optimizer), (back, returned)), desc


@pytest.mark.parametrize("impl", ["fused", "capturable"])
def test_state_of_the_cpu_loads_under_a_flag(impl: str, chosen: dict[str, Any], device: str) -> None:
    """A file whose groups ask for kernels or graphs, but whose tensors were put on the CPU."""
    problem, optimizer = trained(chosen)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][impl] = True
    found = Problem(device)
    with torch.no_grad():
        for param, copied in zip(problem.params, found.params, strict=True):
            copied.copy_(param)
    other = Amos(found.params, **{**chosen, impl: True})
    other.load_state_dict(saved)
    found.steps(other, 1)
    problem.steps(optimizer, 1)
    capturable = other.param_groups[0]["capturable"]
    for param, copied in zip(problem.params, found.params, strict=True):
        assert other.state[copied]["step"].device.type == (device if capturable else "cpu")
        assert other.state[copied]["step"] == 4
        assert relative_error(copied, param) <= TOLERANCES[torch.float32].param


def test_implementations_load_each_other(chosen: dict[str, Any], device: str) -> None:
    """What is loaded has the last word on how to compute, and the state does not depend on it."""
    problem, optimizer = trained({**chosen, **IMPLS["forloop"]}, 3, device)
    other_problem = problem.clone()
    other = Amos(other_problem.params, **{**copy.deepcopy(chosen), **IMPLS["foreach"]})
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["foreach"] is False and other.param_groups[0]["fused"] is False
    for each, its in (problem, optimizer), (other_problem, other):
        each.steps(its, 2)
    assert same_run((problem, optimizer), (other_problem, other))


# ---- hooks -----------------------------------------------------------------------------------------------------


def test_step_hooks(given: dict[str, Any]) -> None:
    """Each is called once a step, with what step() was called with, until it is taken off."""
    problem = Problem()
    optimizer = Amos(problem.params, **given)
    seen: list[Any] = []

    def note(what: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((what, opt is optimizer, args[1:], kwargs, problem.weight.clone()))

    handles = [optimizer.register_step_pre_hook(note("pre")), optimizer.register_step_post_hook(note("post"))]
    before = problem.weight.detach().clone()
    optimizer.step(problem.backward)
    (pre, post) = seen
    assert pre[:4] == ("pre", True, (problem.backward,), {}) and torch.equal(pre[4], before)
    assert post[:4] == ("post", True, (problem.backward,), {}) and torch.equal(post[4], problem.weight)
    assert not torch.equal(before, problem.weight)
    optimizer.step(closure=problem.backward)
    assert [each[2:4] for each in seen[2:]] == [((), {"closure": problem.backward})] * 2
    for handle in handles:
        handle.remove()
    optimizer.step(problem.backward)
    assert len(seen) == 4


def test_hooks_run_without_gradients_too() -> None:
    optimizer = Amos([torch.ones(2)], lr=LR)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "post"]


def test_step_hooks_of_all_optimizers() -> None:
    """Global ones are outermost, and those of another optimizer stay its own."""
    one, other = Amos(Problem().params, lr=LR), torch.optim.SGD(Problem().params, lr=LR)
    seen: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
        one.register_step_pre_hook(note("one before")),
        one.register_step_post_hook(note("one after")),
        other.register_step_pre_hook(note("other before")),
        other.register_step_post_hook(note("other after")),
    ]
    try:
        for optimizer, name in ((one, "one"), (other, "other"), (one, "one")):
            seen.clear()
            optimizer.step()
            assert seen == ["all before", f"{name} before", f"{name} after", "all after"]
    finally:
        for handle in handles:
            handle.remove()
    seen.clear()
    one.step()
    assert not seen


def test_a_step_hook_may_change_the_arguments() -> None:
    problem = Problem()
    optimizer = Amos(problem.params, lr=LR)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {"closure": problem.backward}))
    before = problem.weight.detach().clone()
    assert float(optimizer.step()) > 0
    assert not torch.equal(problem.weight, before)


def test_a_step_hook_that_returns_nonsense_is_refused() -> None:
    problem, optimizer = trained({"lr": LR})
    before = problem.weight.detach().clone()
    optimizer.register_step_pre_hook(lambda *_: 1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        problem.steps(optimizer, 1)
    assert torch.equal(problem.weight, before)


def test_hooks_of_a_subclass_run_once() -> None:
    class Mine(Amos):
        """Has step() of its parent."""

    seen: list[str] = []
    optimizer = Mine(Problem().params, lr=LR)
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["post"]


def test_state_dict_hooks(given: dict[str, Any]) -> None:
    """One before that puts a thing of its own into the state, and one after that takes it out again."""
    problem, optimizer = trained(given)

    def before(opt: Any) -> None:
        opt.state["test"] = 1

    def after(opt: Any, found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "had test": found["state"].pop("test", None)}

    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["had test"] is None
    handle.remove()
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["state"]["test"] == 1
    optimizer.register_state_dict_post_hook(after)
    found = optimizer.state_dict()
    assert found["had test"] == 1 and set(found["state"]) == {0, 1}
    # With it in the state, all else goes on.
    problem.steps(optimizer, 1)
    copied = copy.deepcopy(optimizer)
    assert copied.state["test"] == 1  # type: ignore[index]
    optimizer.load_state_dict(through_a_file(found))
    problem.steps(optimizer, 1)


def test_state_dict_hooks_in_their_order() -> None:
    _, optimizer = trained({"lr": LR})
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre 1"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre 0"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda opt, found: seen.append("post 1"))
    optimizer.register_state_dict_post_hook(lambda opt, found: seen.append("post 0"), prepend=True)
    for _ in range(2):
        seen.clear()
        optimizer.state_dict()
        assert seen == ["pre 0", "pre 1", "post 0", "post 1"]


def test_a_state_dict_hook_may_return_another_dict() -> None:
    """Its tensors own their memory all the same: else a file would hold the whole buffer for each."""
    _, optimizer = trained({"lr": LR})
    expected = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda opt, found: {"inside": found})
    found = optimizer.state_dict()
    assert found.keys() == {"inside"} and same(found["inside"], expected)
    for state in found["inside"]["state"].values():
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


def set_lr(value: float) -> Callable[[Any, dict[str, Any]], None]:
    def hook(optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = value

    return hook


def with_lr(value: float) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    def hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = value
        return changed

    return hook


def test_load_hooks_in_their_order(given: dict[str, Any]) -> None:
    """Those before may write into the dict or return another; those after find all loaded."""
    _, optimizer = trained(given)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_lr(0.002))
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(with_lr(0.003), prepend=True)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(with_lr(0.004))
    seen: list[Any] = []

    def after(opt: Any) -> None:
        seen.append((opt.param_groups[0]["lr"], same(opt.state_dict()["state"], saved["state"])))
        opt.state["was here"] = True

    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("first"), prepend=True)
    optimizer.load_state_dict(saved)
    assert seen == ["first", (0.004, True)]
    assert optimizer.state["was here"] is True  # type: ignore[index]
    assert optimizer.param_groups[0]["lr"] == 0.004


def test_load_hooks_are_as_many_as_before() -> None:
    """Amos uses hooks of its own while it loads and saves, and takes them off, also where something fails."""
    _, optimizer = trained({"lr": LR})
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError):
        optimizer.load_state_dict({"state": {}})

    def fails(*_: Any) -> None:
        raise KeyError("mine")

    optimizer.register_state_dict_pre_hook(fails)
    with pytest.raises(KeyError, match="mine"):
        optimizer.state_dict()
    kinds = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
    assert [len(getattr(optimizer, f"_optimizer_{kind}_hooks")) for kind in kinds] == [1, 0, 0, 0]


# ---- autograd, closures, the profiler --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_the_step_records_no_graph(given: dict[str, Any], device: str) -> None:
    """Even where the gradients have one; autograd sees that the parameters have changed."""
    problem = Problem(device)
    optimizer = Amos(problem.params, **given)
    # The gradient of W depends on W.
    loss = (problem.weight.mv(problem.x) + problem.bias).square().sum()
    loss.backward(create_graph=True)
    held = problem.weight.square().sum()
    optimizer.step()
    assert torch.is_grad_enabled()
    for param in problem.params:
        assert param.is_leaf and param.requires_grad and param.grad_fn is None
        assert not any(value.requires_grad for value in optimizer.state[param].values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()
    optimizer.zero_grad()  # a gradient with a graph holds its parameter in a cycle


@pytest.mark.parametrize("outside", [True, False])
def test_the_closure(outside: bool, given: dict[str, Any]) -> None:
    """Called once, with gradients recorded whatever the mode outside; its loss is returned; the mode is put back."""
    problem = Problem()
    optimizer = Amos(problem.params, **given)
    modes: list[bool] = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        return problem.backward()

    expected = problem.backward()
    with torch.set_grad_enabled(outside):
        loss = optimizer.step(closure)
        assert torch.is_grad_enabled() == outside
    assert modes == [True] and torch.equal(loss, expected)
    assert optimizer.step() is None


def test_profiler(device: str) -> None:
    problem = Problem(device)
    optimizer = Amos(problem.params, lr=LR)
    problem.backward()
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert names.count("Optimizer.step#Amos.step") == 1
    assert names.count("Optimizer.zero_grad#Amos.zero_grad") == 1


# ---- copies ----------------------------------------------------------------------------------------------------


def public(optimizer: Amos) -> set[str]:
    return {key for key in vars(optimizer) if not key.startswith("_")}


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("count", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[Any], Any], count: int, given: dict[str, Any], device: str) -> None:
    """Of the optimizer and its model together: they have all public attributes, go on alike, and share nothing."""
    problem, optimizer = trained(given, count, device)
    twin, other = copied((problem, optimizer))
    assert public(other) == public(optimizer) and repr(other) == repr(optimizer)
    assert same(other.state_dict(), optimizer.state_dict())
    before = [param.detach().clone() for param in problem.params], copy.deepcopy(optimizer.state_dict())
    twin.steps(other, 2)
    assert same(before[0], [*map(torch.detach, problem.params)]) and same(before[1], optimizer.state_dict())
    problem.steps(optimizer, 2)
    assert same_run((problem, optimizer), (twin, other))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
def test_copies_on_a_schedule(copied: Callable[[Any], Any]) -> None:
    """A schedule wraps the optimizer's `step`, which a copy must not inherit."""
    problem, optimizer = trained({"lr": 0.1})
    scheduler = lrs.StepLR(optimizer, 1, gamma=0.5)
    problem.steps(optimizer, 1)
    scheduler.step()
    twin, other = copied((problem, optimizer))
    assert other.param_groups[0]["lr"] == 0.05
    for each, its in (problem, optimizer), (twin, other):
        each.steps(its, 1)
    assert same_run((problem, optimizer), (twin, other))
    lrs.StepLR(other, 1)


@pytest.mark.parametrize("missing", [*AMOS.not_og_supported_flags, AMOS.not_og_supported_flags], ids=str)
def test_older_pickles(missing: Any) -> None:
    problem, optimizer = trained({"lr": LR})
    older = copy.deepcopy((problem, optimizer.__getstate__()))
    for flag in [missing] if isinstance(missing, str) else missing:
        del older[1]["param_groups"][0][flag]
    other = Amos.__new__(Amos)
    other.__setstate__(older[1])
    for each, its in (problem, optimizer), (older[0], other):
        each.steps(its, 1)
    assert same_run((problem, optimizer), (older[0], other))


@pytest.mark.parametrize("count", [0, 3])
def test_it_is_freed_at_once(count: int) -> None:
    """No cycle keeps it, and so its state, until the garbage is collected."""
    _problem, optimizer = trained({"lr": LR, "momentum": 0.9}, count)  # the model lives on
    optimizer.load_state_dict(optimizer.state_dict())
    found = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert found() is None
    finally:
        gc.enable()
