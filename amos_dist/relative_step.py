"""Su's step and weight decay around any torch optimizer: each parameter moves by a share of its own scale.

Sources: J. Su (苏剑林), kexue.fm/archives/9344, 2022 (the step, the weight decay); You et al., arXiv 1904.00962 (LAMB's
norm); J. Su, kexue.fm/archives/10648, 2024 (the decay of the spectral norm).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import roll_call
from .optimizer import LOOK_AROUND, Amos
from .originals import follow
from .relative_parts import Bucket, Member, buckets
from .rules import scales
from .sharding import Layout, Original, disagreement, dtensor, layout_of, refuse_unknown
from .sharding.zero import original_shape

CHOICES = {"norm": ("measured", "expected"), "decay": ("weights", "spectral", "none")}
VECTOR = "spectral_vector"  # of a state_dict: the power iteration's
_NO_DIRECTION = {
    "LBFGS": "it calls the closure many times in a step",
    "ASGD": "it averages the parameters themselves",
    "SparseAdam": "its gradients are sparse",
}
_OF_ANY_SIZE = (
    torch.optim.SGD,
    torch.optim.Muon,
    torch.optim.Rprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,  # not debiased: its first directions are ten times as long
)
_ELEMENTWISE = ("torch.optim.", "deepspeed.ops.adam.", "deepspeed.ops.lion.", "deepspeed.ops.adagrad.")


class RelativeStep(Optimizer):
    r"""Su's rule around a torch optimizer: theta <- theta - (alpha_t u_t + rho_t theta).

    u_t is the base optimizer's direction, alpha_t = alpha_0 f(t) sqrt(k) sigma / |u_t| for a parameter of k entries,
    rho_t = alpha_0^2 f(t) / (2 q). A group's `lr` is alpha_0 f(t): any learning-rate scheduler, of this optimizer or of
    the base, makes f. `param_groups` and `state` are the base's own.

    The base steps zeros in place of the parameters, with a learning rate of 1: what it leaves is -u_t, to the last bit.
    So its own lr and weight_decay take no part, and its direction must depend on gradients and its own state alone.
    That takes memory while a step runs: as much as the parameters that are cut over ranks, and beside them as much
    as the others, but not more than 2^24 entries or the largest parameter.

    Args:
        base: SGD, Adam, AdamW, Adafactor, Muon, … Its groups may have every keyword below but `base`.
        lr: alpha_0, the share of its scale by which a parameter moves in a step; about 1 / sqrt(number of independent
            batches). None: that of each of the base's groups.
        sigma: the scale of the entries: a number, "auto" (their root mean square now; 0.5 for 0-d and 1-d), or "lamb":
            their root mean square at every step. With "lamb", 0-d and 1-d parameters move by alpha_0 f u_t and do not
            decay, and parameters of zeros move by alpha_0 f u_t.
        q: the larger, the weaker the weight decay. Su: 1.
        norm: of u_t: "measured" (one all-reduce in a step for all parameters that are cut), or "expected": sqrt(k), as
            Adam-like directions have it.
        decay: "weights"; "spectral": rho_t sigma_1 u_1 v_1^T in place of rho_t theta, the gradient of half the square
            of the spectral norm, by one power iteration in a step (each parameter is read as the matrix of its first
            dimension and all others); "none".

    Raises:
        TypeError, ValueError: a base that does not fit, or a value out of range.
        RuntimeError: parameters that are sharded in a way that does not fit; at the first step, on every rank.
    """

    def __init__(
        self,
        base: Optimizer,
        lr: float | Tensor | None = None,
        *,
        sigma: float | str = "auto",
        q: float = 1.0,
        norm: str = "measured",
        decay: str = "weights",
    ) -> None:
        _refuse_base(base)
        self.base = base
        self._lr = lr
        self._originals: list[Original] = []
        self._vectors: dict[Tensor, Tensor] = {}
        self._forget()
        for look in LOOK_AROUND:
            look(self)
        before = [dict(group) for group in base.param_groups]
        try:
            super().__init__(base.param_groups, {"sigma": sigma, "q": q, "norm": norm, "decay": decay})
        except BaseException:
            for group, was in zip(base.param_groups, before, strict=True):
                group.clear()
                group.update(was)
            raise
        self.param_groups, self.state = base.param_groups, base.state

    def _forget(self) -> None:
        self._layouts: dict[int, tuple[Tensor, Layout]] = {}
        self._plans: dict[Any, list[Bucket]] = {}

    # ---- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base too; sigma="auto" is measured now. Nothing has changed where this raises."""
        groups = self.base.param_groups
        if any(param_group is group for group in groups):  # the constructor is at work
            if self._lr is not None:
                _set_lr(param_group, self._lr)
            self._take(param_group)
            self.param_groups.append(param_group)
            return
        if self._lr is not None:
            param_group.setdefault("lr", self._lr)
        self.base.add_param_group(param_group)
        try:
            self._take(groups[-1])
        except BaseException:
            groups.pop()
            raise

    def _take(self, group: dict[str, Any]) -> None:
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        _check(group, self.base)
        number = 1 + max((original.group for original in self._originals), default=-1)
        params, names = group["params"], group.get("param_names", ())
        taken = []
        for place, param in enumerate(params):
            name = names[place] if len(names) == len(params) else f"{place} of group {number}"
            _refuse_param(param, name, group, self.base)
            shape = original_shape(param)
            more = (shape, min(1, len(shape)), param.requires_grad)
            taken.append(Original(len(self._originals) + place, name, number, place, param, *more))
        if group["sigma"] == "auto":
            row_dims, called = [o.row_dims for o in taken], [o.name for o in taken]
            group["measured_sigma"] = scales(params, row_dims, called)
        # A scheduler of the base that was there first has lowered lr for its warm-up already.
        peak = group.get("initial_lr", group["lr"]) if self._lr is None else group["lr"]
        group["amos_group"], group["peak_lr"] = number, float(peak)
        self._originals += taken

    # ---- step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient. Every rank that cuts one of them must call this.

        Raises:
            RuntimeError: at the first step, on every rank: a layout that does not fit, ranks that differ.
            ValueError: a group has a value out of range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.base.state = self.state  # DeepSpeed and users may have given it another one
        for group in self.param_groups:
            _check(group, self.base)
        chosen = self._buckets()
        members = [member for bucket in chosen for member in bucket.members]
        for bucket in () if self._is_trial(members) else chosen:
            self._move(bucket)
        return loss

    @roll_call.guard("this step cannot be finished")
    def _move(self, bucket: Bucket) -> None:
        directions = self._directions(bucket)
        bucket.measure(directions, self._vectors).wait()
        bucket.apply(directions, self._vectors)

    def _directions(self, bucket: Bucket) -> list[Tensor | None]:
        """-u_t of each tensor that has a gradient, and the base's state moved on."""
        with contextlib.ExitStack() as stack:
            found: list[Tensor | None] = []
            for member in bucket.members:
                has_gradient = member.tensor.grad is not None
                found.append(stack.enter_context(_zeros_for(member.tensor)) if has_gradient else None)
            if any(each is not None for each in found):
                undo = stack.enter_context(self._unit_rate(bucket))
                self.base.step()
                for each in found:
                    if each is not None and undo != 1:
                        each.mul_(undo)
        return found

    @contextlib.contextmanager
    def _unit_rate(self, bucket: Bucket) -> Iterator[float]:
        """The base sees only the tensors of the bucket, and steps them by u_t, over the number that this gives."""
        undo = 1.0
        everything, before = self.base.param_groups, list[tuple[dict[str, Any], dict[str, Any]]]()
        try:
            self.base.param_groups = list({id(member.group): member.group for member in bucket.members}.values())
            for group in self.base.param_groups:
                before.append((group, {key: group[key] for key in ("params", "lr", "eps") if key in group}))
                group["params"] = [member.tensor for member in bucket.members if member.group is group]
                group["lr"] = 1.0
                if isinstance(self.base, torch.optim.Adafactor):
                    # Its step is max(eps, rms(theta)) min(lr, 1 / sqrt(t)) u: with these a constant, up to t = 2^28.
                    group["lr"], group["eps"], undo = 2.0**-14, (group["eps"][0], 1.0), 2.0**14
            yield undo
        finally:
            for group, values in before:
                group.update(values)
            self.base.param_groups = everything

    def _is_trial(self, members: list[Member]) -> bool:
        """DeepSpeed's stage 0 in bf16 and fp16 steps its copies with zeros at start, for the state: that is no step."""
        return all(member.layout.clone and not self.state.get(member.tensor) for member in members) and not any(
            bool(member.tensor.grad.any()) for member in members if member.tensor.grad is not None
        )

    # ---- layouts -----------------------------------------------------------------------------------------------------

    def _buckets(self) -> list[Bucket]:
        """The tensors of this step; made anew when they, or what is measured of them, have changed."""
        places = [(group, index, tensor) for group in self.param_groups for index, tensor in enumerate(group["params"])]
        key = tuple((id(tensor), id(g), g["norm"], g["decay"], g["sigma"] == "lamb") for g, _, tensor in places)
        if key not in self._plans:
            follow(self.param_groups, self._originals, self.state)
            members = [self._member(*place) for place in places if place[2].numel()]
            self._agree(members)
            while len(self._plans) >= 64:  # ZeRO's groups and sub-groups have one each
                del self._plans[next(iter(self._plans))]
            self._plans[key] = buckets(members)
        return self._plans[key]

    def _member(self, group: dict[str, Any], index: int, tensor: Tensor) -> Member:
        if id(tensor) not in self._layouts or self._layouts[id(tensor)][1].fault:
            mine = [original for original in self._originals if original.group == group["amos_group"]]
            layout = layout_of(tensor, index, len(group["params"]), mine, self._originals)
            self._layouts[id(tensor)] = (tensor, layout)
        layout = self._layouts[id(tensor)][1]
        originals = [self._originals[piece.key] for piece in layout.pieces]
        fault = layout.fault or _fault(layout, originals, group, self.base)
        return Member(tensor, group, layout, originals, {o.key: o for o in self._originals}, fault)

    @roll_call.guard("this step cannot be finished")
    def _agree(self, members: list[Member]) -> None:
        """Raises:
        RuntimeError: on every rank, where any rank cannot take this step, or ranks differ.
        """
        fault = next((member.fault for member in members if member.fault), "")
        for group in dict.fromkeys(group for member in members for group in member.layout.fellows):
            some = [member for member in members if group in member.layout.fellows]
            facts = [f"{type(self.base).__name__} in RelativeStep"]
            for settings in {id(member.group): member.group for member in some}.values():
                number = settings["amos_group"]
                facts += [f"{k}={settings[k]!r} in parameter group {number}" for k in (*self.defaults, "peak_lr")]
                facts.append(f"sigma={settings.get('measured_sigma')} measured in parameter group {number}")
            fault = disagreement(group, fault, facts)
        if fault:
            raise RuntimeError(fault)

    # ---- state dict --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base's, with what the power iteration needs as `spectral_vector`."""
        found = super().state_dict()
        states = dict(found["state"])
        for number, tensor in self._numbered(found):
            if tensor in self._vectors:
                vector = self._vectors[tensor].clone()
                kept = dtensor.like(tensor, vector, range(1, tensor.dim())) if dtensor.is_dtensor(tensor) else vector
                states[number] = {**states.get(number, {}), VECTOR: kept}
        return {**found, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave; sigma is what was measured then.

        Raises:
            ValueError: the state is of another model, or of an optimizer that was not in a RelativeStep.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            lost = [key for key in ("peak_lr", "amos_group", *self.defaults) if key not in saved]
            scale = saved.get("measured_sigma", [])
            if lost or (saved["sigma"] == "auto" and len(scale) != len(group.get("measured_sigma", scale))):
                raise ValueError(
                    f"the state has no {lost[0] if lost else 'sigma for each parameter'!r}: it was not saved by a "
                    "RelativeStep over the same parameters. Load it into the optimizer that has written it."
                )
        given = state_dict["state"]
        rest = {
            number: {key: value for key, value in state.items() if key != VECTOR} if isinstance(state, dict) else state
            for number, state in given.items()
        }
        super().load_state_dict({**state_dict, "state": rest})
        numbered = self._numbered(state_dict)
        # torch would have cast them to the parameter's dtype
        self._vectors = {
            tensor: dtensor.local_of(given[number][VECTOR]).detach().to(dtensor.local_of(tensor).device, copy=True)
            for number, tensor in numbered
            if VECTOR in given.get(number, ())
        }

    def _numbered(self, state_dict: dict[str, Any]) -> list[tuple[int, Tensor]]:
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        return list(zip(numbers, tensors, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "_lr", "_originals", "_vectors")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it
        self._forget()
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})


@contextlib.contextmanager
def _zeros_for(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor` has zeros for its numbers, which this gives, until the end."""
    held = dtensor.local_of(tensor)
    if held is not tensor:
        zeros = torch.zeros_like(held, memory_format=torch.contiguous_format)
        tensor._local_tensor = zeros  # type: ignore[attr-defined]
        try:
            yield zeros
        finally:
            tensor._local_tensor = held  # type: ignore[attr-defined]
        return
    numbers = tensor.data
    zeros = torch.zeros_like(numbers, memory_format=torch.contiguous_format)
    tensor.data = zeros
    try:
        yield zeros
    finally:
        tensor.data = numbers


def _refuse_base(base: Optimizer) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base={base!r} is no torch optimizer. Build one first: RelativeStep(torch.optim.AdamW(params), …)."
        )
    name = type(base).__name__
    if isinstance(base, (Amos, RelativeStep)):
        raise ValueError(f"{name} has Su's step and weight decay already. Use it as it is.")
    if any("amos_group" in group for group in base.param_groups):
        raise ValueError(f"this {name} is in a RelativeStep already, whose settings it has. Build a new {name}.")
    if name in _NO_DIRECTION and type(base).__module__.startswith("torch.optim."):
        raise ValueError(
            f"{name} has no direction to scale: {_NO_DIRECTION[name]}. Use SGD, Adam, AdamW, Adafactor or Muon."
        )


def _set_lr(group: dict[str, Any], lr: float | Tensor) -> None:
    """Also for schedulers that are built later: they would start from what an earlier one has left."""
    if "initial_lr" in group:
        if float(group["initial_lr"]) != float(lr):
            warnings.warn(
                f"lr={float(lr)} was given, and a scheduler of the base was built for {float(group['initial_lr'])}. "
                "It brings that back at its next step: build schedulers after RelativeStep.",
                stacklevel=5,
            )
        group["initial_lr"] = lr
    group["lr"] = lr


def _check(group: dict[str, Any], base: Optimizer) -> None:
    sigma, q, lr = group["sigma"], group["q"], float(group["lr"])
    named = sigma in ("auto", "lamb") if isinstance(sigma, str) else 0 < float(sigma) < math.inf
    if not named:
        raise ValueError(f"sigma={sigma!r} is out of range. Give a positive number, 'auto' or 'lamb'.")
    if not q > 0:
        raise ValueError(f"q={q!r} is out of range. Give a positive number.")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr={lr!r} is out of range. Give a finite number that is not negative.")
    for key, choices in CHOICES.items():
        if group[key] not in choices:
            raise ValueError(f"{key}={group[key]!r} is unknown. Use one of {', '.join(map(repr, choices))}.")
    if group["norm"] == "expected" and isinstance(base, _OF_ANY_SIZE):
        raise ValueError(
            f"norm='expected' does not fit {type(base).__name__}, whose directions are of any size. Use 'measured'."
        )


def _refuse_param(param: Tensor, name: str, group: dict[str, Any], base: Optimizer) -> None:
    refuse_unknown(param, name)
    if not param.is_floating_point():
        raise TypeError(f"parameter {name!r} is {param.dtype}. View it as real numbers, or leave it out.")
    if dtensor.is_dtensor(param) and isinstance(base, torch.optim.Adafactor):
        raise RuntimeError(
            f"parameter {name!r} is a DTensor, which torch's Adafactor cannot step. "
            "Use Adam, AdamW, SGD or Muon, or amos_dist.Amos, which is factored too."
        )


def _fault(layout: Layout, originals: list[Original], group: dict[str, Any], base: Optimizer) -> str:
    """Why a tensor cannot be stepped, or nothing."""
    names = ", ".join(repr(original.name) for original in originals[:3])
    if layout.is_partition and not _is_elementwise(base):
        return (
            f"{type(base).__name__} would take ZeRO's flat partition of {names} for one vector, because it looks at "
            "rows and columns, or because nothing says that it does not. Use Adam, AdamW or SGD (or set "
            "`base.elementwise = True` if each number of its direction depends on that number's gradients alone)."
        )
    if group["decay"] == "spectral" and (layout.is_partition or layout.row_groups):
        return (
            f"decay='spectral' needs whole rows, and those of {names} are cut. "
            "Use decay='weights' for them, or cut them by their first dimension only, as FSDP2 does."
        )
    return ""


def _is_elementwise(base: Optimizer) -> bool:
    if isinstance(base, (torch.optim.Adafactor, torch.optim.Muon)):
        return False
    return getattr(base, "elementwise", f"{type(base).__module__}.".startswith(_ELEMENTWISE))
