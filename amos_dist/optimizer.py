"""class Amos: gradients in, parameters updated. How tensors are cut is sharding's, how a step runs is plan's."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import amp, checkpoint, nonfinite, runs, settings
from . import rules as module_rules
from .loading import in_own_terms, refuse_damaged, refuse_other_model, refuse_other_views, refuse_state_dict
from .member import Member, is_lost, make_state, member_of
from .originals import (
    Surroundings,
    constants_of,
    describe,
    facts_of,
    follow,
    note_measured,
    refuse_gradients,
)
from .plan import Plan
from .sharding import Layout, Original, dtensor, layout_of
from .sharding.zero import link, original_shape
from .state import own_memory, put_back
from .tables import Constants

if TYPE_CHECKING:
    from .monitor import Monitor

# Each is called with the optimizer that is being made, and returns None where its framework is not at work.
LOOK_AROUND: list[Callable[[Optimizer], Surroundings | None]] = []


class Amos(Optimizer):
    r"""Amos: an Adam-style optimizer whose weight decay and learning-rate decay follow from each parameter's scale.

    Source: Tian & Parikh 2022 (arXiv 2210.11693), algorithm 1. With ``moments="factored"`` the second moment is a row
    vector and a column vector, so that the state is R + C + R numbers for an R x C matrix.

    Args:
        params: parameters, groups, or named parameters. Every keyword below can stand in a group. Parameters may be
            DTensors, as fully_shard and parallelize_module make them; every rank of their meshes must take each step.
        lr: the paper's xi, about 1 / sqrt(number of independent batches in the training set). Constant after warm-up.
        sigma: the paper's eta, the scale at which the entries settle: a number, "auto" (their root mean square now, so
            build the optimizer after DDP has made the replicas equal; 0.5 for 0-d and 1-d) or "paper" (by module;
            needs `amos_dist.param_groups` or DeepSpeed's JSON).
        beta: decay of the second moment. 1 - beta should be of the order of lr.
        momentum: of the final update, not debiased; 0: none, and no buffer.
        moments: what the second moment is shared over: "factored", "row", "column", "scalar" or "full".
        row_dims: the first `row_dims` dimensions are the rows of a parameter's matrix view.
        clip_value: element-wise bound on the gradient, before anything else.
        extra_l2: more weight decay, inside the paper's d factor.
        c_coef: the paper's c is 1 / sqrt(1 + c_coef sqrt(lr) b).
        d_coef: the paper's d is 1 / (1 + d_coef sqrt(lr sigma) b).
        eps: floor of the second moment.
        decay_init: b of state that is made new, for weights that are trained already: see `decay_after`. A state that
            is loaded has its own.
        momentum_dtype: "float32" (default), "bfloat16" or "int8"; float64 parameters have float64. "int8": whole
            multiples of a scale for each run of 256 elements, rounded up or down by chance, by `seed`: 1.016 bytes for
            an element. Runs begin anew where a rank's part of a parameter begins, so what is cut differs from the whole
            by a multiple of the scale here and there; cut alike, every run gives the same bits.
        maximize: go up instead of down.
        foreach: True asks for plain torch.
        fused: None: the native kernels where they are built; True insists, False asks for plain torch.
        capturable: `step`, and `lr` where it is a tensor, stay on the device and are not looked at: a CUDA graph can
            replay the step. Take an ordinary step before the capture; after it, change nothing in the groups but `lr`.
        master_weights: bfloat16 and float16 parameters are kept in the state in float32 too, as `master`; the parameter
            itself gets the rounded numbers in the same pass. Weights that are loaded later reach the master too.
        stochastic_rounding: bfloat16 parameters (without a master) are rounded up or down by chance, so that small
            steps are not lost.
        seed: of that, and of momentum in 8 bits; below 2**31. The same seed gives the same numbers in every run, at
            every step, on every rank and device.
        on_nonfinite: where a gradient is NaN or infinite (or so large that its squares are): "skip": no parameter is
            stepped on any rank, and `skipped_steps` counts it. "raise": an error, on every rank; nothing has changed.
            "ignore": it goes where the formulas take it, but "row" and "full" moments then read the gradient once, not
            twice. Under ZeRO DeepSpeed itself skips such steps; with `capturable` nothing is looked at.
        rules: `[{"match": regex on the full name, ...any keyword...}]`; the first match wins.

    State for each parameter: `step` (0-d float32), `decay`, `momentum` (with momentum), `master` (with master_weights),
    and `row_moment` and `column_moment`, or one of them, or `moment` ("scalar", "full"); keepdim shapes, float32
    (float64 for float64). Of a DTensor all but `step` are DTensors, made when the optimizer is built, and cut as it is:
    mesh dimensions that cut rows replicate what columns have, and the other way round. An int8 `momentum` has
    `momentum_scale` beside it, a plain vector: the scales of what this rank holds.

    Raises:
        TypeError, ValueError: an unknown keyword, a value out of range, a rule that matches nothing.
        RuntimeError: parameters that are sharded in an unknown way; at step(): sparse or complex gradients.
    """

    monitor: Monitor | None = None  # see monitor/monitor.py; it is not saved

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        sigma: float | str = "auto",
        beta: float = 0.999,
        momentum: float = 0.0,
        moments: str = "factored",
        row_dims: int = 1,
        clip_value: float | None = None,
        extra_l2: float = 0.0,
        c_coef: float = 0.25,
        d_coef: float = 0.25,
        eps: float = 2**-125,
        decay_init: float = 0.0,
        momentum_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        on_nonfinite: str = "skip",
        rules: list[dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        given = locals()  # every keyword can stand in a group: one list of them will do
        settings.check_keys(unknown, "Amos")
        defaults = {key: given[key] for key in settings.KEYWORDS}
        settings.check(defaults)
        self._rules = settings.Rules(rules)
        self.skipped_steps = 0  # because a gradient was not finite
        self._surroundings = next(filter(None, (look(self) for look in LOOK_AROUND)), Surroundings())
        self._originals: list[Original] = []
        self._overrides: dict[int, dict[str, Any]] = {}
        self._kinds: dict[int, str] = {}
        self._built: dict[int, dict[str, Any]] = {}  # the settings of each group when it was added
        self._groups: list[dict[str, Any]] = []  # all, also while ZeRO steps one of them
        self._loaded = checkpoint.Loaded()
        self._plans: dict[int, dict[Any, Plan]] = {}  # by the id of their first tensor
        self._layouts: dict[int, tuple[Tensor, Layout]] = {}
        self._checked: dict[int, list[Any]] = {}  # by id(group): the values that were looked at
        super().__init__(params, defaults)
        self._rules.refuse_useless([original.name for original in self._originals])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler leaves it to us to skip steps: see amp.py."""
        return any(map(dtensor.is_dtensor, self._tensors()))

    # ---- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; sigma="auto" is measured now. Nothing has changed where this raises."""
        if isinstance(param_group, dict):
            param_group = {**param_group}  # what is noted in it must not reach the caller's
            if "params" not in param_group:
                raise TypeError("a parameter group has no 'params'. Give the group's parameters under that key.")
            params = param_group["params"]
            if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):  # a set is refused by torch
                param_group["params"] = [
                    (each[0], module_rules.current(each[1])) if isinstance(each, tuple) and len(each) == 2 else each
                    for each in params
                ]
            settings.check_keys(param_group, "a parameter group", settings.GROUP_KEYS, strict=False)
            settings.check({key: value for key, value in param_group.items() if key in settings.KEYWORDS})
        super().add_param_group(param_group)
        before = len(self._originals)
        try:
            self._note_originals(len(self.param_groups) - 1)
            self._make_states()
        except Exception:
            self.param_groups.pop()
            del self._originals[before:]
            raise
        self._groups = list(self.param_groups)

    def _note_originals(self, number: int) -> None:
        """Writes down what the group's parameters are, before any framework flattens them."""
        group = self.param_groups[number]
        group["amos_group"] = number  # frameworks replace a group's tensors, not the group
        originals = [
            self._note_original(number, place, name, param)
            for place, (name, param) in enumerate(zip(self._names_of(group), group["params"], strict=True))
        ]
        measured = [original for original in originals if self._setting(original, group, "sigma") == "auto"]
        scales = module_rules.scales(
            [original.param for original in measured],
            [self._setting(original, group, "row_dims") for original in measured],
            [original.name for original in measured],
        )
        # In the group, so that it is in every checkpoint: on resuming, "auto" must not be measured again.
        group["measured_sigma"] = [None] * len(originals)
        for original, scale in zip(measured, scales, strict=True):
            group["measured_sigma"][original.place] = original.measured = scale
        self._built[number] = {key: group[key] for key in settings.KEYWORDS}

    def _note_original(self, number: int, place: int, name: str, param: Tensor) -> Original:
        advice = self._surroundings.advice.get(name)
        described = describe(param, name, self.param_groups[number], self._rules.for_name(name), advice)
        key = len(self._originals)
        self._overrides[key], self._kinds[key], row_dims = described
        shape = original_shape(param)
        self._originals.append(Original(key, name, number, place, param, shape, row_dims, param.requires_grad))
        return self._originals[-1]

    def _make_states(self) -> None:
        """The state of every parameter, gradient or not, where DTensors are among them; else at the first step.

        Checkpoints that are read and written before the first step need it, and the same on every rank. Other
        frameworks put tensors of their own into the groups before they step.
        """
        tensors = self._tensors()
        if not any(map(dtensor.is_dtensor, tensors)):
            return
        follow(self.param_groups, self._originals, self.state)
        for member in self._members(map(self._is_stepped, tensors)):
            if not self.state.get(member.tensor) or is_lost(self.state[member.tensor], member.tensor):
                self._complete(member)

    def _tensors(self) -> list[Tensor]:
        return [tensor for group in self.param_groups for tensor in group["params"]]

    def _names_of(self, group: dict[str, Any]) -> list[str]:
        if "param_names" in group:
            return list(group["param_names"])
        known, start = self._surroundings.names, len(self._originals)
        return [known.get(id(p), f"param[{start + i}]") for i, p in enumerate(group["params"])]

    def _setting(self, original: Original, group: dict[str, Any], keyword: str) -> Any:
        return self._overrides[original.key].get(keyword, group[keyword])

    def _constants_of(self, key: int, group: dict[str, Any]) -> Constants:
        original = self._originals[key]
        setting = functools.partial(self._setting, original, group)
        return constants_of(original, group, setting, self._overrides[key].get("lr_factor", 1.0))

    # ---- step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient. closure: reevaluates the model and returns the loss.

        Every rank of a process group must call this. Nothing has changed where it raises an error about its input. What
        is wrong on one rank before its first step is an error on every rank; later on it is one there alone, because
        asking would cost every step a wait for the device.

        Raises:
            RuntimeError: sparse or complex gradients; a layout or a state that does not fit; on_nonfinite="raise".
            ValueError: lr is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = self._tensors()
        grads = [grad for tensor in tensors if (grad := tensor.grad) is not None]
        # Other ranks may have gradients of parameters that are cut over ranks: they wait for this one.
        if not grads and not any(map(dtensor.is_dtensor, tensors)):
            return loss
        self._take_loaded()
        for group in self.param_groups:
            self._check_group(group)
        strided = {grad.layout for grad in grads} <= {torch.strided}
        if not strided or any(dtype.is_complex for dtype in {grad.dtype for grad in grads}):
            refuse_gradients(tensors, {id(original.param): original.name for original in self._originals})
        plan = self._plan(tensors)
        if not plan.agreed:
            plan.agree(self._facts)
        if not plan.is_trial(self.state):
            found_inf = amp.unscaled(self, grads)
            if self.monitor:
                self.monitor.begin(plan)
            moved = plan.run(self.state, self._constants_of, found_inf)
            if self.monitor:
                self.monitor.end(plan, moved)
            if not moved and found_inf is None:
                nonfinite.tell(plan.members, self.param_groups, is_first=not self.skipped_steps)
                self.skipped_steps += 1
        return loss

    def _facts(self, keys: Collection[int] | None) -> list[str]:
        chosen = [original for original in self._originals if keys is None or original.key in keys]
        watched = self.monitor.fact() if self.monitor else "no monitor"
        return [*facts_of(chosen, self._kinds, self._overrides, self.param_groups), watched]

    def _check_group(self, group: dict[str, Any]) -> None:
        """Schedulers and users change groups between steps: checks their values when they have changed."""
        lr = group["lr"]
        if not (group["capturable"] and isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.numel() == 1):
            settings.check({"lr": lr})
        values = [float(v) if isinstance(v := group[key], Tensor) else v for key in settings.DEFAULTS]
        if self._checked.get(id(group)) != values:
            settings.check(dict(zip(settings.DEFAULTS, values, strict=True)))
            refuse_other_views(group, self._built)
            self._checked[id(group)] = values
            for plans in self._plans.values():
                for plan in plans.values():
                    plan.settings_changed()

    def _take_loaded(self) -> None:
        """A universal load has written into the groups, of which nobody told this optimizer."""
        about = self._originals, self._kinds, self._setting
        if loaded := checkpoint.take(self._groups, self._built, self.state, *about):
            self._loaded = loaded
            self._note_loaded(self._groups)

    def _note_loaded(self, groups: list[dict[str, Any]]) -> None:
        """What was made of the groups and the state before is of no use any more."""
        note_measured(groups, self._originals)
        self._plans.clear()
        self._checked.clear()

    def _plan(self, tensors: list[Tensor]) -> Plan:
        """The plan of this step; made anew when the tensors, their dtypes or devices, or the state have changed."""
        keywords = ("momentum_dtype", "fused", "foreach", "capturable", "master_weights", "on_nonfinite")
        stepped = list(map(self._is_stepped, tensors))
        key = (
            tuple(map(id, tensors)),
            tuple(stepped),
            tuple([tensor.dtype for tensor in tensors]),
            tuple([tensor.device for tensor in tensors]),
            tuple((id(g), len(g["params"]), bool(g["momentum"]), *(g[k] for k in keywords)) for g in self.param_groups),
        )
        plans, agreed = self._plans.setdefault(key[0][0], {}), False
        if key in plans:
            if plans[key].fits(self.state):
                return plans[key]
            # A fault that may be mended, or the state was replaced, maybe on this rank alone: made anew, but the ranks
            # need not agree again, for which the others would not come.
            agreed = plans.pop(key).agreed
        follow(self.param_groups, self._originals, self.state)
        members = self._members(stepped)
        for member in members:
            member.fault = member.fault or self._complete(member)
            if member.fault and agreed:
                raise RuntimeError(member.fault)
        while len(plans) >= 4:  # freezing parameters makes new plans, and each has a workspace
            del plans[next(iter(plans))]
        plans[key] = Plan(members, self._kinds, agreed)
        return plans[key]

    def _is_stepped(self, tensor: Tensor) -> bool:
        """Also a frozen tensor that has a gradient, or state: one that is thawed and frozen again keeps its plan.

        Of a DTensor every rank must say the same, and ranks may differ in the gradients that they have.
        """
        if tensor.requires_grad or self.state.get(tensor):  # to ask for a state makes an empty one
            return True
        return tensor.grad is not None and not dtensor.is_dtensor(tensor)

    def _members(self, stepped: Iterable[bool]) -> list[Member]:
        places = [(index, tensor, group) for group in self.param_groups for index, tensor in enumerate(group["params"])]
        once = {id(place[1]): place for place in itertools.compress(places, stepped)}  # torch lets a group repeat one
        return [self._member(*place) for place in once.values()]

    def _member(self, index: int, tensor: Tensor, group: dict[str, Any]) -> Member:
        layout = self._layout(index, tensor, group)
        originals = [self._originals[piece.key] for piece in layout.pieces]
        return member_of(tensor, group, layout, originals, self._setting)

    def _complete(self, member: Member) -> str:
        """Makes what the state of a tensor lacks; says what is wrong with what is there."""
        original = next((self._originals[piece.key] for piece in member.layout.pieces), None)
        state = self.state[member.tensor]
        fault = self._loaded.adopt(member, state, self._originals, self._kinds)
        fault = fault or make_state(member, state, original, self._kinds)
        if not fault and member.layout.is_partition:
            link(member.tensor, state, [self._originals[piece.key] for piece in member.layout.pieces])
        return fault

    def _layout(self, index: int, tensor: Tensor, group: dict[str, Any]) -> Layout:
        if id(tensor) not in self._layouts or self._layouts[id(tensor)][1].fault:
            originals = [original for original in self._originals if original.group == group["amos_group"]]
            count = len(group["params"])
            self._layouts[id(tensor)] = (tensor, layout_of(tensor, index, count, originals, self._originals))
        return self._layouts[id(tensor)][1]

    # ---- state dict --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the small tensors are copies, because the optimizer's own are views of one buffer.

        Momentum of 8 bits is in it as float32, so that it fits any layout: the very numbers, which loading takes back.
        State that was made while the model was on the meta device has its place and its zeros by now. Under ZeRO every
        rank must call this, and the state can be loaded on another number of ranks: see checkpoint.py.

        Raises:
            RuntimeError: under ZeRO, on every rank, where any rank cannot tell what its partition holds.
        """
        self._take_loaded()
        self._make_states()
        partitions = self._partitions()

        def own(_: Optimizer, found: dict[str, Any]) -> None:  # before the user's hooks, which may put it all elsewhere
            found["state"] = {number: own_memory(state) for number, state in found["state"].items()}
            places = [(i, tensor, group) for group in self.param_groups for i, tensor in enumerate(group["params"])]
            for number, (index, tensor, group) in enumerate(places):
                if runs.is_narrow(found["state"].get(number, {})):
                    pieces = self._layout(index, tensor, group).pieces
                    found["state"][number] = runs.in_float32(found["state"][number], tensor, pieces)
            if partitions:
                checkpoint.save(found, partitions, self.state, self._groups, self._originals, self._kinds)

        handle = self.register_state_dict_post_hook(own, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _partitions(self) -> list[Member]:
        """ZeRO's flat partitions, with their state."""
        own = {id(original.param) for original in self._originals}
        tensors = self._tensors()
        members = [m for m in self._members(id(tensor) not in own for tensor in tensors) if m.layout.is_partition]
        for member in members:
            member.fault = member.fault or self._complete(member)
        return members

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave; the state keeps its own dtype, whatever the parameter's.

        Raises:
            ValueError: the state is of another optimizer, another model or other `moments`; nothing has changed then.
        """
        arrived: list[dict[str, Any]] = []  # what the user's own hooks, which run first, made of it

        def refuse(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            refuse_damaged(given)
            refuse_other_model(given, self._originals)
            final = in_own_terms(checkpoint.own_part(given), self.param_groups, self._originals)
            refuse_state_dict(final, self.param_groups, self._originals, self._kinds, self._setting)
            for saved in final["param_groups"]:
                refuse_other_views({**settings.DEFAULTS, **saved}, self._built)
            arrived.append(final)
            return final

        def mend(_: Optimizer) -> None:
            put_back(arrived[0], self.param_groups, self.state)
            self._note_loaded(self.param_groups)

        handles = (
            self.register_load_state_dict_pre_hook(refuse),
            self.register_load_state_dict_post_hook(mend, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_originals", "_overrides", "_kinds", "_built", "_rules", "skipped_steps")
        given = super().__getstate__()
        given["state"] = defaultdict(dict, {tensor: own_memory(state) for tensor, state in self.state.items()})
        return {**given, **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and a group that has it is refused
        self._surroundings, self._plans, self._layouts = Surroundings(), {}, {}
        self._checked, self._groups, self._loaded = {}, list(self.param_groups), checkpoint.Loaded()
        for group in self.param_groups:
            for key, value in settings.DEFAULTS.items():
                group.setdefault(key, value)
