"""The monitor: what it says is what was done, it changes nothing, and it is told where it should go."""

from __future__ import annotations

import csv
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import amos_dist
from amos_dist import fallback, monitor, reference
from amos_dist.monitor.probe import SAMPLES, sampled

from .tables import make_case
from .test_ops import BF16, F32, F64, TYPES

native = torch.ops.amos_dist
KINDS = ("factored", "row", "column", "scalar", "full")
BOUND = {F64: 1e-12, F32: 1e-5, BF16: 1e-5, torch.float16: 1e-5}


# ---- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", TYPES, ids=lambda ts: "-".join(str(t).removeprefix("torch.") for t in ts))
@pytest.mark.parametrize("cut", [True, False], ids=["phases", "step"])
def test_norms_of_the_kernels(cut: bool, types: tuple[Any, ...]) -> None:
    """Those of plain torch, which are sums in float64, added to what is there; and nothing else has other bits."""
    for seed in range(3):
        case = make_case(seed, ("factored", "row", "column"), *types, cut=cut, largest=120)
        twin, unwatched = case.clone(), case.clone()
        found, expected = (torch.full((len(case.hyper), 2), 0.5, dtype=F64) for _ in range(2))
        for op in ("sums_", "slots_", "update_") if cut else ("step_",):
            getattr(native, op)(*case.arguments(op, found))
            getattr(native, op)(*unwatched.arguments(op))
            getattr(fallback, op)(*twin.arguments(op, expected))
        assert all(map(torch.equal, case.changed(), unwatched.changed()))
        torch.testing.assert_close(found - 0.5, expected - 0.5, rtol=BOUND[types[0]], atol=1e-15)


def test_padding_is_not_counted() -> None:
    """A row without any gradient yet makes 0 x inf of what is behind its end."""
    case = make_case(5, ("factored",), cut=False)
    case.state.zero_()
    for grad in case.grad:
        grad.zero_()
    norms = torch.zeros(len(case.hyper), 2, dtype=F64)
    native.step_(*case.arguments("step_"), norms)
    assert norms.isfinite().all() and norms[:, 1].all()


@pytest.mark.parametrize(
    "bad", [lambda x: x.float(), lambda x: x[:-1], lambda x: x[:, :1], lambda x: x.T.contiguous().T]
)
def test_door_of_norms(bad: Any) -> None:
    case = make_case(2, ("factored",), cut=False)
    before = case.clone()
    with pytest.raises(RuntimeError, match=r"norms: expected a contiguous float64 tensor of shape \[\d+, 2\]"):
        native.step_(*case.arguments("step_"), bad(torch.zeros(len(case.hyper), 2, dtype=F64)))
    assert all(map(torch.equal, case.changed(), before.changed()))


# ---- one step, against float64 -------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """Fewer entries of the state than are looked at, and more."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"small": (5, 7), "tall": (3 * SAMPLES + 1, 3), "wide": (3, 2 * SAMPLES + 3), "bias": (9,)}
    return [(n, nn.Parameter(torch.randn(s, generator=generator, dtype=F64).to(dtype))) for n, s in shapes.items()]


def expected_of(param: Tensor, grad: Tensor, state: dict[str, Any], sigma: float, kind: str) -> dict[str, float]:
    """By the reference, of the parameter and its state before the step."""
    given = {"lr": 0.1, "sigma": sigma, "beta": 0.9, "moments": kind, "extra_l2": 0.01, "momentum": 0.5}
    before = {k: v.double() if k != "step" else v.clone() for k, v in state.items() if k != "master"}
    theta = state.get("master", param).detach().double()
    new = theta.clone()
    after = {k: v.clone() for k, v in before.items()}
    out = reference.amos_step(new, grad.double(), after, **given)
    new = new if out is None else out
    delta = theta - new
    b = before["decay"]
    v_key = next(key for key in ("moment", "row_moment", "column_moment") if key in after)
    d = 1 / (1 + 0.25 * math.sqrt(0.1 * sigma) * b)
    gamma = (after["decay"] - b) / (1 + b)
    values = {
        "update_norm": delta.norm(), "update_ratio": delta.norm() / theta.norm(),
        "scale_ratio": theta.norm() / (math.sqrt(theta.numel()) * sigma),
    }  # fmt: skip
    some = sampled(b.numel())
    values["effective_lr"] = (d * 0.1 * sigma).flatten()[some].mean()
    values["weight_decay"] = (d * (gamma / 2 + 0.01)).flatten()[some].mean()
    for name, moment in (("v", after[v_key]), ("b", after["decay"])):
        ordered = moment.flatten()[some].sort().values
        for q in (5, 50, 95):
            values[f"{name}_p{q:02d}"] = ordered[round(q / 100 * (len(ordered) - 1))]
    return {key: float(value) for key, value in values.items()}


@pytest.mark.parametrize("fused", [None, False], ids=["native", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["float64", "float32", "bfloat16", "master", "stochastic"])
def test_report(variant: str, kind: str, fused: bool | None) -> None:
    dtype = {"float64": F64, "float32": F32}.get(variant, BF16)
    named = parameters(dtype)
    more = {"master": {"master_weights": True}, "stochastic": {"stochastic_rounding": True}}.get(variant, {})
    optimizer = amos_dist.Amos(
        named, lr=0.1, sigma=0.3, beta=0.9, moments=kind, extra_l2=0.01, momentum=0.5, fused=fused, **more
    )
    watch = amos_dist.Monitor(optimizer, every=3)
    generator = torch.Generator().manual_seed(1)
    expected: dict[str, dict[str, float]] = {}
    for step in range(1, 5):
        for name, param in named:
            param.grad = torch.randn(param.shape, generator=generator, dtype=F64).to(dtype)
            if step == 3:
                state = {k: v.clone() for k, v in optimizer.state[param].items()}
                effective = "scalar" if param.dim() < 2 and kind != "full" else kind
                expected[name] = expected_of(param, param.grad, state, 0.3, effective)
        optimizer.step()
    found = watch.last
    assert found is not None and found.step == 3 and found.skipped_steps == 0
    for name, values in expected.items():
        for key, value in values.items():
            bound = 1e-9 if dtype == F64 else 2e-5  # gamma is known from v, to 1 / (1 - beta) of its last bit
            assert found.values[name][key] == pytest.approx(value, rel=bound), (name, key)
        assert ("column_v_p50" in found.values[name]) == (kind == "factored" and name != "bias")
    total = found.values["total"]
    assert total["update_norm"] == pytest.approx(math.hypot(*(e["update_norm"] for e in expected.values())), rel=2e-5)
    counts = {name: param.numel() for name, param in named}
    mean = sum(counts[n] * e["weight_decay"] for n, e in expected.items()) / sum(counts.values())
    assert total["weight_decay"] == pytest.approx(mean, rel=2e-5)


def one_parameter(**given: Any) -> tuple[nn.Parameter, amos_dist.Amos]:
    param = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    return param, amos_dist.Amos([("weight", param)], lr=0.1, sigma=0.5, **given)


def run(param: nn.Parameter, optimizer: amos_dist.Amos, steps: int) -> None:
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()


class Listener:
    def __init__(self) -> None:
        self.heard: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def write(self, step: int, values: Any) -> None:
        self.heard.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


def test_steps_that_are_looked_at() -> None:
    """Those that the state counts: a job that is resumed goes on in the same; what is left is written at the end."""
    listener = Listener()
    param, optimizer = one_parameter()
    run(param, optimizer, 1)
    with amos_dist.Monitor(optimizer, every=2, to=[listener]):
        run(param, optimizer, 3)
        assert [step for step, _ in listener.heard] == [2]
    assert [step for step, _ in listener.heard] == [2, 4] and listener.is_closed
    run(param, optimizer, 4)
    assert len(listener.heard) == 2

    again, resumed = one_parameter()
    run(again, resumed, 1)
    resumed.load_state_dict(optimizer.state_dict())
    second = amos_dist.Monitor(resumed, every=5)
    run(again, resumed, 2)
    assert second.last is not None and second.last.step == 10


def test_skipped_steps_are_shown_and_not_looked_at() -> None:
    param, optimizer = one_parameter()
    watch = amos_dist.Monitor(optimizer, every=2)
    run(param, optimizer, 1)
    param.grad = torch.full_like(param, torch.inf)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert watch.last is None
    run(param, optimizer, 1)
    assert watch.last is not None and watch.last.skipped_steps == 1
    assert watch.last.flat()["skipped_steps/total"] == 1.0


def test_parameters_without_a_gradient_are_left_out() -> None:
    idle, busy = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(2, 2))
    optimizer = amos_dist.Amos([("idle", idle), ("busy", busy)], lr=0.1, sigma=1.0)
    watch = amos_dist.Monitor(optimizer, every=1)
    run(busy, optimizer, 1)
    assert watch.last is not None and set(watch.last.values) == {"busy", "total"}
    assert "busy" in str(watch.last)


def test_what_a_graph_records_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the device asked for anything then. A flag stands for the capture, the CPU for a device that counts."""
    listener, recording = Listener(), False
    param, optimizer = one_parameter(capturable=True)
    run(param, optimizer, 1)
    (plan,) = (plan for plans in optimizer._plans.values() for plan in plans.values())
    plan.launches[0].counts_on = types.SimpleNamespace(type="cuda")
    ask = monitor.monitor._Clock.next
    monkeypatch.setattr(monitor.monitor._Clock, "next", lambda *given: pytest.fail() if recording else ask(*given))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    with amos_dist.Monitor(optimizer, every=2, to=[listener]):
        run(param, optimizer, 2)
        recording = True
        run(param, optimizer, 1)
        optimizer.state[param]["step"] -= 1  # which a capture had not changed
        recording = False
        assert plan.launches[0].probe is None
        run(param, optimizer, 2)
    assert [step for step, _ in listener.heard] == [2, 4] and optimizer.state[param]["step"] == 5


def test_bits_are_those_of_steps_without_a_monitor() -> None:
    (a, watched), (b, plain) = one_parameter(momentum=0.9), one_parameter(momentum=0.9)
    amos_dist.Monitor(watched, every=1)
    run(a, watched, 3)
    run(b, plain, 3)
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(watched.state[a].values(), plain.state[b].values(), strict=True))


# ---- writers -------------------------------------------------------------------------------------------------------


def test_csv(tmp_path: Path) -> None:
    """Read back to the bit; a second run writes on."""
    path = tmp_path / "logs" / "monitor.csv"
    param, optimizer = one_parameter()
    seen = {}
    for _ in range(2):
        with amos_dist.Monitor(optimizer, every=1, to=[monitor.CSV(path)]) as watch:
            run(param, optimizer, 1)
            assert watch.last is not None
            seen[watch.last.step] = watch.last.flat()
    rows = list(csv.DictReader(path.open(newline="")))
    assert {(int(r["step"]), r["name"]): float(r["value"]) for r in rows} == {
        (step, name): value for step, values in seen.items() for name, value in values.items()
    }
    assert len(rows) == 2 * len(seen[1])


def test_a_writer_that_fails_is_left_out(tmp_path: Path) -> None:
    listener = Listener()
    param, optimizer = one_parameter()
    (tmp_path / "file").touch()
    broken = monitor.CSV(tmp_path / "file" / "monitor.csv")
    amos_dist.Monitor(optimizer, every=1, to=[broken, listener])
    with pytest.warns(UserWarning, match="CSV could not write step 1"):
        run(param, optimizer, 3)
    assert [step for step, _ in listener.heard] == [1, 2]


def test_a_writer_that_cannot_be_closed_keeps_no_other_open(tmp_path: Path) -> None:
    """The disk of the file that is flushed is full."""
    param = nn.Parameter(torch.ones(2, 3))
    broken, kept = monitor.CSV(tmp_path / "broken.csv"), monitor.CSV(tmp_path / "kept.csv")
    optimizer = amos_dist.Amos([("weight", param)], lr=0.01)
    watching = amos_dist.Monitor(optimizer, every=1, to=[broken, kept])
    param.grad = torch.ones(2, 3)
    optimizer.step()
    assert watching.last
    broken.close = lambda: (_ for _ in ()).throw(OSError("No space left"))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="the monitor's CSV could not be closed: No space left"):
        watching.close()
    assert watching.closed and kept._file is None


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    ended: list[bool] = []
    fake: Any = types.ModuleType("wandb")
    fake.run, fake.log = None, logged.append

    def init(**settings: Any) -> Any:
        fake.run = types.SimpleNamespace(finish=lambda: ended.append(True), settings=settings)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    param, optimizer = one_parameter()
    with amos_dist.Monitor(optimizer, every=1, to=[monitor.WandB(project="p")]):
        run(param, optimizer, 2)
    assert [each["optimizer_step"] for each in logged] == [1, 2] and ended == [True]
    assert fake.run.settings == {"project": "p"} and logged[0]["update_norm/weight"] > 0


@pytest.mark.parametrize(("writer", "module"), [("TensorBoard", "torch.utils.tensorboard"), ("WandB", "wandb")])
def test_missing_package(monkeypatch: pytest.MonkeyPatch, writer: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=f"pip install {writer.lower()}"):
        getattr(monitor, writer)(*(["logs"] if writer == "TensorBoard" else []))


def test_tensorboard(tmp_path: Path) -> None:
    """What TensorBoard itself reads from the files."""
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    param, optimizer = one_parameter()
    with amos_dist.Monitor(optimizer, every=1, to=[monitor.TensorBoard(tmp_path)]) as watch:
        run(param, optimizer, 2)
        assert watch.last is not None
        expected = watch.last.values["weight"]["update_norm"]
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    events = read.Scalars("update_norm/weight")
    assert [event.step for event in events] == [1, 2] and events[1].value == pytest.approx(expected, rel=1e-6)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_refusals() -> None:
    param, optimizer = one_parameter()
    with pytest.raises(ValueError, match="every=0 of the monitor is no count"):
        amos_dist.Monitor(optimizer, every=0)
    with pytest.raises(TypeError, match="there is no Amos optimizer in SGD"):
        amos_dist.Monitor(torch.optim.SGD([param], lr=0.1))
    with pytest.raises(ValueError, match="DeepSpeed's monitor is off"):
        monitor.DeepSpeed(types.SimpleNamespace(monitor=types.SimpleNamespace(enabled=False)))
    assert optimizer.monitor is None
    engine = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=optimizer))
    assert amos_dist.Monitor(engine).optimizer is optimizer
    with pytest.raises(RuntimeError, match="has a monitor already"):
        amos_dist.Monitor(optimizer)
