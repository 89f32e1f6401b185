"""The entry in torch's database, and what Amos refuses."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from amos_dist import Amos, settings

from .common import same
from .registration import AMOS


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
    expected: Any = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    if error.error_on.name == "STEP_ERROR":
        optimizer = Amos(params, **kwargs)
        before = copy.deepcopy(params)
        with expected(error.error_type, match=error.error_regex):
            optimizer.step()
        assert same(params, before) and not optimizer.state
    else:
        with expected(error.error_type, match=error.error_regex):
            Amos(params, **kwargs)
