"""class Amos: gradients in, parameters updated. How tensors are cut is sharding's, how a step runs is plan's."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import rules as module_rules
from . import settings
from .plan import Member, Plan
from .reference import effective_moments, matrix_view
from .sharding import Layout, Original, layout_of, refuse_unknown
from .sharding.zero import original_shape
from .state import (
    FLOAT_STATE,
    State,
    compute_dtype,
    own_memory,
    put_back,
    refuse_foreign,
    refuse_shapes,
    state_sizes,
    whole_shapes,
)
from .tables import Constants, seed_of_parameter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Surroundings:
    """What a framework that is building the optimizer knows: names by id(parameter), and advice by name."""

    names: dict[int, str] = field(default_factory=dict)
    advice: dict[str, module_rules.Advice] = field(default_factory=dict)


# Each is called with the optimizer that is being made, and returns None where its framework is not at work.
LOOK_AROUND: list[Callable[[Optimizer], Surroundings | None]] = []


class Amos(Optimizer):
    r"""Amos: an Adam-style optimizer whose weight decay and learning-rate decay follow from each parameter's scale.

    Source: Tian & Parikh 2022 (arXiv 2210.11693), algorithm 1. With ``moments="factored"`` the second moment is a row
    vector and a column vector, so that the state is R + C + R numbers for an R x C matrix.

    Args:
        params: parameters, groups, or named parameters. Every keyword below can stand in a group.
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
        c_coef, d_coef: the paper's c and d are 1 / sqrt(1 + c_coef sqrt(lr) b) and 1 / (1 + d_coef sqrt(lr sigma) b).
        eps: floor of the second moment.
        momentum_dtype: "float32" (default) or "bfloat16"; float64 parameters have float64.
        maximize: go up instead of down.
        foreach, fused: None: the native kernels where they are built. fused=True insists; fused=False or foreach=True
            asks for plain torch.
        capturable: `step`, and `lr` where it is a tensor, stay on the device and are not looked at: a CUDA graph can
            replay the step. Take an ordinary step before the capture; after it, change nothing in the groups but `lr`.
        master_weights: bfloat16 and float16 parameters are kept in the state in float32 too, as `master`; the parameter
            itself gets the rounded numbers in the same pass. Weights that are loaded later reach the master too.
        stochastic_rounding: bfloat16 parameters (without a master) are rounded up or down by chance, so that small
            steps are not lost. seed: below 2**31; the same seed gives the same numbers in every run, at every step, on
            every rank and device.
        rules: `[{"match": regex on the full name, ...any keyword...}]`; the first match wins.

    State for each parameter: `step` (0-d float32), `decay`, `momentum` (with momentum), `master` (with master_weights),
    and `row_moment` and `column_moment`, or one of them, or `moment` ("scalar", "full"); keepdim shapes, float32
    (float64 for float64).

    Raises:
        TypeError, ValueError: an unknown keyword, a value out of range, a rule that matches nothing.
        RuntimeError: parameters that are sharded in an unknown way; at step(): sparse or complex gradients.
    """

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
        momentum_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        rules: list[dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        settings.check_keys(unknown, "Amos")
        defaults: dict[str, Any] = {
            "lr": lr,
            "sigma": sigma,
            "beta": beta,
            "momentum": momentum,
            "moments": moments,
            "row_dims": row_dims,
            "clip_value": clip_value,
            "extra_l2": extra_l2,
            "c_coef": c_coef,
            "d_coef": d_coef,
            "eps": eps,
            "momentum_dtype": momentum_dtype,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        settings.check(defaults)
        self._rules = settings.Rules(rules)
        self._surroundings = next(filter(None, (look(self) for look in LOOK_AROUND)), Surroundings())
        self._originals: list[Original] = []
        self._overrides: dict[int, dict[str, Any]] = {}
        self._kinds: dict[int, str] = {}
        self._views: dict[int, dict[str, Any]] = {}
        self._plans: dict[int, dict[Any, Plan]] = {}  # by the id of their first tensor
        self._layouts: dict[int, tuple[Tensor, Layout]] = {}
        self._checked: dict[int, list[Any]] = {}  # by id(group): the values that were looked at
        super().__init__(params, defaults)
        self._rules.refuse_useless([original.name for original in self._originals])

    # ---- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; sigma="auto" is measured now. Nothing has changed where this raises."""
        if isinstance(param_group, dict):
            param_group = {**param_group}  # what is noted in it must not reach the caller's
            settings.check_keys(param_group, "a parameter group", settings.GROUP_KEYS, strict=False)
            settings.check({key: value for key, value in param_group.items() if key in settings.KEYWORDS})
        super().add_param_group(param_group)
        before = len(self._originals)
        try:
            self._note_originals(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            del self._originals[before:]
            raise

    def _note_originals(self, number: int) -> None:
        """Writes down what the group's parameters are, before any framework flattens them."""
        group = self.param_groups[number]
        group["amos_group"] = number  # frameworks replace a group's tensors, not the group
        self._views[number] = {key: group[key] for key in ("moments", "row_dims")}
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
            group["measured_sigma"][original.place] = scale

    def _note_original(self, number: int, place: int, name: str, param: Tensor) -> Original:
        group = self.param_groups[number]
        refuse_unknown(param, name)
        if param.dtype not in DTYPES:
            raise TypeError(
                f"parameter {name!r} is {str(param.dtype).removeprefix('torch.')}. Amos trains float64, float32, "
                "bfloat16 and float16 parameters: convert it, or view complex numbers as pairs."
            )
        values = dict(self._rules.for_name(name))
        given = {**group, **values}
        if given["sigma"] == "paper":
            advice = self._surroundings.advice.get(name)
            if advice is None:
                raise ValueError(
                    f"sigma='paper' needs the module that parameter {name!r} belongs to. "
                    "Make the groups with amos_dist.param_groups(model, sigma='paper')."
                )
            explicit = {k: v for k, v in given.items() if k in values or v != settings.DEFAULTS.get(k)}
            values |= module_rules.settings_from(advice, "paper", explicit)
            given = {**group, **values}
        if "lr" in values:  # a rule's lr follows the group's schedule
            if not float(group["lr"]):
                raise ValueError(
                    f"a rule sets lr={values['lr']} for {name!r}, but its group has lr=0: nothing to scale. "
                    "Give the group its peak lr; a schedule moves both."
                )
            values["lr_factor"] = float(values.pop("lr")) / float(group["lr"])
        if param.dtype != torch.float64 and float(given["eps"]) < 2**-126:
            raise ValueError(
                f"eps={given['eps']:g} for {name!r} is below what float32, in which it is computed, can hold. "
                "Use 2**-126 or more."
            )
        shape, key = original_shape(param), len(self._originals)
        try:
            kind = effective_moments(shape, given["moments"], given["row_dims"])
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from None
        numel = math.prod(shape)
        views = {"scalar": (1, numel), "full": (numel, 1)}
        rows, cols = views.get(kind) or matrix_view(shape, given["row_dims"])
        self._kinds[key], self._overrides[key] = kind, values
        self._originals.append(Original(key, name, number, place, param, shape, rows, cols, param.requires_grad))
        return self._originals[-1]

    def _names_of(self, group: dict[str, Any]) -> list[str]:
        if "param_names" in group:
            return list(group["param_names"])
        known, start = self._surroundings.names, len(self._originals)
        return [known.get(id(p), f"param[{start + i}]") for i, p in enumerate(group["params"])]

    def _setting(self, original: Original, group: dict[str, Any], keyword: str) -> Any:
        return self._overrides[original.key].get(keyword, group[keyword])

    def _constants_of(self, key: int, group: dict[str, Any]) -> Constants:
        """The hyper-parameters of one parameter: what does not change from step to step."""
        original = self._originals[key]

        def setting(keyword: str) -> Any:
            return self._setting(original, group, keyword)

        sigma, clip = setting("sigma"), setting("clip_value")
        if sigma == "auto":
            sigma = group["measured_sigma"][original.place]
        if sigma is None or isinstance(sigma, str):
            raise ValueError(
                f"sigma={setting('sigma')!r} of {original.name!r} was set after the optimizer was built, which has "
                "measured none. Give a number, or build a new optimizer."
            )
        factor = self._overrides[key].get("lr_factor", 1.0)
        return Constants(
            factor,
            [
                math.nan,  # lr
                float(sigma),
                float(setting("beta")),
                math.nan,  # t
                float(setting("momentum")),
                math.inf if clip is None else float(clip),
                float(setting("extra_l2")),
                float(setting("c_coef")),
                float(setting("d_coef")),
                float(setting("eps")),
                -1.0 if setting("maximize") else 1.0,
                float(seed_of_parameter(setting("seed"), key)) if setting("stochastic_rounding") else -1.0,
            ],
        )

    # ---- step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient. closure: reevaluates the model and returns the loss.

        Every rank of a process group must call this. Nothing has changed where it raises an error about its input.

        Raises:
            RuntimeError: sparse or complex gradients; a layout or a state that does not fit.
            ValueError: lr is not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        grads = [grad for tensor in tensors if (grad := tensor.grad) is not None]
        if not grads:
            return loss
        for group in self.param_groups:
            self._check_group(group)
        if {grad.layout for grad in grads} != {torch.strided} or any(d.is_complex for d in {g.dtype for g in grads}):
            self._refuse_gradients(tensors)
        plan = self._plan(tensors)
        if not self._is_trial(plan):
            plan.run(self.state, self._constants_of)
        return loss

    def _check_group(self, group: dict[str, Any]) -> None:
        """Schedulers and users change groups between steps: checks their values when they have changed."""
        lr = group["lr"]
        if not (group["capturable"] and isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.numel() == 1):
            settings.check({"lr": lr})
        values = [float(v) if isinstance(v := group[key], Tensor) else v for key in settings.DEFAULTS]
        if self._checked.get(id(group)) != values:
            settings.check(dict(zip(settings.DEFAULTS, values, strict=True)))
            self._refuse_other_views(group)
            self._checked[id(group)] = values
            for plans in self._plans.values():
                for plan in plans.values():
                    plan.settings_changed()

    def _refuse_other_views(self, group: dict[str, Any]) -> None:
        """`moments` and `row_dims` shape the state: they are fixed when the optimizer is built."""
        for key, built in self._views.get(group["amos_group"], {}).items():
            if group[key] != built:
                raise ValueError(
                    f"{key}={group[key]!r} in a parameter group, but its state was made for {key}={built!r}. "
                    "Build a new optimizer to change it."
                )

    def _refuse_gradients(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if (grad := tensor.grad) is None or (grad.layout is torch.strided and not grad.is_complex()):
                continue
            name = next((o.name for o in self._originals if o.param is tensor), "a flat partition")
            if grad.is_complex():
                raise RuntimeError(
                    f"the gradient of {name!r} is complex, which Amos does not support. "
                    "View the parameter as pairs of real numbers."
                )
            raise RuntimeError(
                f"the gradient of {name!r} is sparse, which Amos does not support. "
                "Build the embedding with sparse=False."
            )

    def _plan(self, tensors: list[Tensor]) -> Plan:
        """The plan of this step; made anew when the tensors, their dtypes or devices, or the state have changed."""
        keywords = ("momentum_dtype", "fused", "foreach", "capturable", "master_weights")
        stepped = [tensor.requires_grad or self._is_stepped(tensor) for tensor in tensors]
        key = (
            tuple(map(id, tensors)),
            tuple(stepped),
            tuple([tensor.dtype for tensor in tensors]),
            tuple([tensor.device for tensor in tensors]),
            tuple((id(g), len(g["params"]), bool(g["momentum"]), *(g[k] for k in keywords)) for g in self.param_groups),
        )
        plans = self._plans.setdefault(key[0][0], {})
        if key in plans:
            if plans[key].fits(self.state):
                return plans[key]
            del plans[key]  # a fault that may be mended, or the state was replaced: make it anew
        places = [(index, tensor, group) for group in self.param_groups for index, tensor in enumerate(group["params"])]
        members = [self._member(*place) for place in itertools.compress(places, stepped)]
        for member in members:
            member.fault = member.layout.fault or self._make_state(member)
        while len(plans) >= 4:  # freezing parameters makes new plans, and each has a workspace
            del plans[next(iter(plans))]
        plans[key] = Plan(members, self._kinds)
        return plans[key]

    def _is_stepped(self, frozen: Tensor) -> bool:
        """A frozen tensor that has a gradient, or state: one that is thawed and frozen again stays in the same plan."""
        return frozen.grad is not None or frozen in self.state

    def _member(self, index: int, tensor: Tensor, group: dict[str, Any]) -> Member:
        layout = self._layout(index, tensor, group)
        originals = [self._originals[piece.key] for piece in layout.pieces]
        name = ", ".join(o.name for o in originals[:3]) + (", …" if len(originals) > 3 else "")
        # One buffer for all pieces: the widest dtype that any of them asks for.
        wanted = {
            settings.momentum_dtype(self._setting(o, group, "momentum_dtype")) or compute_dtype(tensor)
            for o in originals
            if self._setting(o, group, "momentum")
        }
        dtype = next(iter(wanted)) if len(wanted) == 1 else (compute_dtype(tensor) if wanted else None)
        if dtype is not None and compute_dtype(tensor) == torch.float64:
            dtype = torch.float64
        fused = False if group["foreach"] else group["fused"]
        low = tensor.dtype in (torch.bfloat16, torch.float16)
        master = low and any(self._setting(o, group, "master_weights") for o in originals)
        return Member(tensor, group, layout, name, dtype, fused, group["capturable"], master)

    def _layout(self, index: int, tensor: Tensor, group: dict[str, Any]) -> Layout:
        if id(tensor) not in self._layouts or self._layouts[id(tensor)][1].fault:
            originals = [original for original in self._originals if original.group == group["amos_group"]]
            count = len(group["params"])
            self._layouts[id(tensor)] = (tensor, layout_of(tensor, index, count, originals, self._originals))
        return self._layouts[id(tensor)][1]

    def _state_shapes(self, tensor: Tensor, layout: Layout) -> dict[str, tuple[int, ...]]:
        """The shapes of a tensor's float state: keepdim shapes of a whole parameter, else one vector for all pieces."""
        whole = self._originals[layout.pieces[0].key] if len(layout.pieces) == 1 else None
        if whole is None or whole.shape != tuple(tensor.shape) or not whole.numel:
            return {key: (size,) for key, size in state_sizes(layout.pieces, self._kinds).items() if size}
        return whole_shapes(
            self._kinds[whole.key], whole.shape, self._setting(whole, self._views[whole.group], "row_dims")
        )

    def _make_state(self, member: Member) -> str:
        """State for every parameter that is trained, gradient or not: checkpoints of unused ones must be complete.

        Returns:
            What is wrong with the state that is there already, or nothing.
        """
        state, tensor = self.state[member.tensor], member.tensor
        shapes = self._state_shapes(tensor, member.layout)
        if foreign := [key for key in FLOAT_STATE if key in state and key not in shapes]:
            return (
                f"the state of {member.name!r} has {foreign[0]!r}, which its `moments` do not have. "
                "Use the `moments` that the state was made with, or clear it."
            )
        fresh = not state
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
        if fresh:
            for key, shape in shapes.items():
                state[key] = torch.zeros(shape, dtype=compute_dtype(tensor), device=tensor.device)
        if member.capturable:
            state["step"] = state["step"].to(tensor.device)
        if member.master:
            if "master" not in state:
                state["master"] = tensor.detach().float().contiguous()
            shapes["master"] = tuple(tensor.shape)
        if member.momentum_dtype is not None:
            if "momentum" not in state:
                state["momentum"] = torch.zeros(tensor.shape, dtype=member.momentum_dtype, device=tensor.device)
            shapes["momentum"] = tuple(tensor.shape)
        for key, shape in shapes.items():
            if key not in state or state[key].numel() != math.prod(shape):
                return (
                    f"the state {key!r} of {member.name!r} has {state[key].numel() if key in state else 'no'} entries, "
                    f"expected {math.prod(shape)}. The checkpoint is of another model, another number of ranks or "
                    "other `moments`: use the ones it was written with."
                )
            dtype = member.momentum_dtype if key == "momentum" else compute_dtype(tensor)
            state[key] = state[key].to(tensor.device, dtype).contiguous()  # the model may have been moved since
        return ""

    def _is_trial(self, plan: Plan) -> bool:
        """DeepSpeed's stage 0 in fp16 and bf16 calls step() once with zero gradients at start: that must not count."""
        return all(m.layout.clone and not self.state[m.tensor]["step"] for m in plan.members) and not any(
            bool(m.tensor.grad.any()) for m in plan.members if m.tensor.grad is not None
        )

    # ---- state dict --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the small tensors are copies, because the optimizer's own are views of one buffer."""
        result = super().state_dict()
        result["state"] = {number: own_memory(state) for number, state in result["state"].items()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict()` gave; the state keeps its own dtype, whatever the parameter's.

        Raises:
            ValueError: the state is of another optimizer, another model or other `moments`; nothing has changed then.
        """
        arrived: list[dict[str, Any]] = []  # what the user's own hooks, which run first, made of it

        def refuse(_: Optimizer, final: dict[str, Any]) -> None:
            self._refuse_state_dict(final)
            arrived.append(final)

        def mend(_: Optimizer) -> None:
            put_back(arrived[0], self.param_groups, self.state)
            self._plans.clear()
            self._checked.clear()

        handles = (
            self.register_load_state_dict_pre_hook(refuse),
            self.register_load_state_dict_post_hook(mend, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _refuse_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"the state_dict has no {key!r}. Give what Amos.state_dict() returned.")
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(
                f"the state_dict has {len(state_dict['param_groups'])} parameter groups, the optimizer has "
                f"{len(self.param_groups)}. Build the optimizer with the groups that the checkpoint was written with."
            )
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"a parameter group of the state_dict has {len(saved['params'])} parameters, the optimizer's has "
                    f"{len(group['params'])}. Load it into the model that it was written with."
                )
            for place, (number, tensor) in enumerate(zip(saved["params"], group["params"], strict=True)):
                self._refuse_state(state_dict["state"].get(number, {}), tensor, place)
            if "amos_group" not in saved or "measured_sigma" not in saved:
                raise ValueError(
                    "the state_dict is not of Amos: a parameter group has no 'amos_group'. "
                    "To start with a fresh optimizer on these weights, load the model only."
                )
            settings.check({key: saved[key] for key in settings.KEYWORDS if key in saved})
            self._refuse_other_views({**settings.DEFAULTS, **saved})
            for original in (o for o in self._originals if o.group == saved["amos_group"]):
                measured = saved["measured_sigma"]
                sigma = self._overrides[original.key].get("sigma", saved.get("sigma", "auto"))
                if sigma == "auto" and (original.place >= len(measured) or measured[original.place] is None):
                    raise ValueError(
                        f"the state_dict has no sigma for {original.name!r}. "
                        "Build the optimizer with the `sigma` and the rules that the checkpoint was written with."
                    )

    def _refuse_state(self, state: State, tensor: Tensor, place: int) -> None:
        if not state:
            return
        original = next((o for o in self._originals if o.param is tensor), None)
        name = original.name if original else f"the tensor at place {place}"
        refuse_foreign(state, name)
        if original is not None:  # a partition's state is checked when its layout is known, at the next step
            refuse_shapes(state, name, original.shape, self._state_shapes(tensor, Layout([original.whole()])))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_originals", "_overrides", "_kinds", "_views", "_rules")
        given = super().__getstate__()
        given["state"] = defaultdict(dict, {tensor: own_memory(state) for tensor, state in self.state.items()})
        return {**given, **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._surroundings, self._plans, self._layouts = Surroundings(), {}, {}
        self._checked = {}
        for group in self.param_groups:
            for key, value in settings.DEFAULTS.items():
                group.setdefault(key, value)
