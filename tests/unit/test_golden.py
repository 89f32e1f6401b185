"""The numbers that the public JAX reference of Amos gave, at each of 30 steps; see tests/data/golden/manifest.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from amos_dist import Amos
from amos_dist.reference import amos_step

from ..conftest import TOLERANCES, relative_error

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())["cases"]

# JAX keeps (in, out), torch (out, in): how each parameter's axes go to torch's order, and what its state is there.
TORCH: dict[tuple[str, str], tuple[tuple[int, ...], dict[str, Any]]] = {
    ("bias_1d_scalar_state", "bias"): ((0,), {}),
    ("kernel_2d_reduce_input_axis", "kernel"): ((1, 0), {"moments": "row"}),
    ("embedding_2d_reduce_feature_axis", "embedding"): ((0, 1), {"moments": "row"}),
    ("conv_4d_clip_l2", "kernel"): ((3, 2, 0, 1), {"moments": "row"}),
    ("tree_mixed_states_momentum", "attn/query"): ((1, 2, 0), {"moments": "row", "row_dims": 2}),
    ("tree_mixed_states_momentum", "attn/key"): ((1, 0, 2), {"moments": "row"}),
    ("tree_mixed_states_momentum", "ln/scale"): ((0,), {}),
    ("tree_mixed_states_momentum", "full"): ((0, 1), {"moments": "full"}),
    ("tree_mixed_states_momentum", "temperature"): ((), {}),
}

Stepper = Callable[[list[Tensor], float], None]
# (parameters, settings of each, dtype of state) -> what moves them by one step, and the state of each by then
Maker = Callable[[list[Tensor], list[dict[str, Any]]], tuple[Stepper, Callable[[int], dict[str, Any]]]]


def by_reference(params: list[Tensor], settings: list[dict[str, Any]]) -> Any:
    states: list[dict[str, Any]] = [{} for _ in params]

    def step(grads: list[Tensor], lr: float) -> None:
        for param, grad, state, given in zip(params, grads, states, settings, strict=True):
            amos_step(param, grad, state, lr=lr, **given)

    return step, states.__getitem__


def by_amos(fused: bool) -> Maker:
    def make(params: list[Tensor], settings: list[dict[str, Any]]) -> Any:
        groups = [{"params": [p], **given} for p, given in zip(params, settings, strict=True)]
        optimizer = Amos(groups, lr=1.0, fused=fused)

        def step(grads: list[Tensor], lr: float) -> None:
            for group, param, grad in zip(optimizer.param_groups, params, grads, strict=True):
                param.grad, group["lr"] = grad, lr
            optimizer.step()

        return step, lambda i: optimizer.state[params[i]]

    return make


MAKERS = {"reference": by_reference, "native": by_amos(fused=True), "fallback": by_amos(fused=False)}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", MANIFEST)
def test_every_step(case: str, dtype: torch.dtype, maker: str) -> None:
    facts = MANIFEST[case]
    data = np.load(GOLDEN / facts["file"])
    names = list(facts["parameters"])
    common = {key: value for key, value in facts["hyper_parameters"].items() if value is not None}
    axes = [TORCH[case, name][0] for name in names]
    settings = [{**common, "sigma": facts["parameters"][name]["eta"], **TORCH[case, name][1]} for name in names]

    def there(key: str, t: int | None = None) -> Iterator[Tensor]:
        for name, order in zip(names, axes, strict=True):
            array = data[f"{key}/{name}"] if t is None else data[f"{key}/{name}"][t]
            yield torch.tensor(array.transpose(order) if array.ndim else array)

    params = [start.to(dtype).contiguous().requires_grad_() for start in there("init")]
    step, state_of = MAKERS[maker](params, settings)
    tolerance = TOLERANCES[dtype]
    for t in range(facts["steps"]):
        step([grad.to(dtype).contiguous() for grad in there("grad", t)], float(data["xi"][t]))
        expected = [there("f64/param", t), there("f64/v", t), there("f64/b", t)]
        if "momentum" in common and dtype == torch.float64:  # in float32 it cancels where it passes through zero
            expected.append(there("f64/ema", t))
        for i, (param, v, b, *ema) in enumerate(zip(*expected, strict=True)):
            where = f"{names[i]}, step {t + 1}"
            state = state_of(i)
            moment = state.get("row_moment", state.get("moment"))
            assert relative_error(params[i], param) <= tolerance.param, where
            # (state of 0-d and 1-d parameters: () there, keepdim shapes here)
            assert relative_error(moment.view(v.shape), v) <= tolerance.state, where
            assert relative_error(state["decay"].view(b.shape), b) <= tolerance.state, where
            for m in ema:  # what is added there is subtracted here
                assert relative_error(-state["momentum"], m) <= tolerance.state, where
    assert int(state_of(0)["step"]) == facts["steps"]


def test_every_parameter_is_known() -> None:
    assert set(TORCH) == {(case, name) for case, facts in MANIFEST.items() for name in facts["parameters"]}
