"""The optimizers of the study: how each is built from a setting, and the schedules that all share.

A setting is a dictionary that JSON can hold: `optimizer` (a name in BUILDERS), `lr` (a number, or a rule of RULES),
`schedule`, `warmup` (share of the steps), `clip` (of the gradients' global norm; null: none), `length` (share of the
task's steps), and keywords of the builder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from amos_dist import Amos, InverseSquareDecay, RelativeStep, param_groups, suggest_lr
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Setting = dict[str, Any]
COMMON: Setting = {"schedule": "cosine", "warmup": 0.05, "clip": 1.0, "length": 1.0}
COSINE_END = 0.01  # share of the peak
SU_HALVINGS = 8  # the half-life of Su's decay is this part of the run: it ends at 5 % of the peak

SHORTEST = 600  # steps: a shorter run has the rate of one of so many (docs/quality.md)
# Learning rates that follow from the data: (independent batches in the training set, steps of the run, the share of a
# batch that is predicted) → rate
RULES: dict[str, Callable[[int, int, float], float]] = {
    "1/sqrt(batches)": lambda batches, steps, predicted: suggest_lr(batches),
    "1/sqrt(steps)": lambda batches, steps, predicted: suggest_lr(steps),
    "1/sqrt(predicted)": lambda batches, steps, predicted: suggest_lr(max(steps, SHORTEST), predicted),
}


# ---- schedules -------------------------------------------------------------------------------------------------------


def factor(schedule: str, t: int, steps: int, warmup: int) -> float:
    """The share of the peak rate at step t from 0."""
    if t < warmup:
        return (t + 1) / (warmup + 1)
    gone = min(1.0, (t - warmup + 1) / max(1, steps - warmup))
    if schedule == "cosine":
        return COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * gone)) / 2
    if schedule == "linear":
        return 1 - gone + 1 / max(1, steps - warmup)  # the last step is one too
    if schedule == "constant":
        return 1.0
    raise ValueError(f"there is no schedule {schedule!r}. Use cosine, linear, constant or su.")


def scheduler_for(optimizer: Optimizer, setting: Setting, steps: int) -> LRScheduler:
    warmup = round(setting["warmup"] * steps)
    if setting["schedule"] == "su":
        return InverseSquareDecay(optimizer, half_life=steps / SU_HALVINGS, warmup=warmup)
    return LambdaLR(optimizer, lambda t: factor(setting["schedule"], t, steps, warmup))


# ---- optimizers that torch and amos_dist do not have -----------------------------------------------------------------


class LAMB(Optimizer):
    """You et al. 2019 (arXiv 1904.00962), algorithm 2 with phi the identity: vectors are Adam's.

    RelativeStep(Adam, sigma="lamb") has the same norm, but its weight decay is no part of what is scaled.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"step": 0, "first": torch.zeros_like(param), "second": torch.zeros_like(param)}
                state["step"] += 1
                first = state["first"].lerp_(param.grad, 1 - beta1) / (1 - beta1 ** state["step"])
                second = state["second"].lerp_(param.grad.square(), 1 - beta2) / (1 - beta2 ** state["step"])
                direction = first.div_(second.sqrt_().add_(group["eps"])).add_(param, alpha=group["weight_decay"])
                trust = 1.0
                if param.dim() > 1 and (size := float(param.norm())) and (length := float(direction.norm())):
                    trust = size / length
                param.add_(direction, alpha=-group["lr"] * trust)


class AmosVariant(Optimizer):
    """Amos with factored moments in plain torch, for what the study tries and amos_dist.Amos does not have.

    With momentum_of="update" and no rms_clip it is amos_dist.Amos (a test compares them). It is slow, and its state is
    not kept small: for losses, not for times.

    Args:
        momentum_of: "update": m of the whole step, as Amos has it; "direction": m of g / sqrt(v), debiased, so that
            the weight decay and a falling rate act at once; "marginals": of the step's means over rows and over
            columns, which could be kept as two vectors, and the rest of the step without.
        nesterov: the step is mixed into m once more.
        own_decay: False: b stays 0.
        rms_clip: the direction's root mean square over a parameter is at most this, as in Adafactor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        beta: float,
        momentum: float,
        momentum_of: str = "direction",
        rms_clip: float | None = None,
        nesterov: bool = False,
        own_decay: bool = True,
    ) -> None:
        settings = {"lr": lr, "beta": beta, "momentum": momentum, "momentum_of": momentum_of, "rms_clip": rms_clip}
        super().__init__(params, settings | {"nesterov": nesterov, "own_decay": own_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            sigma = float(group["sigma"])
            for param in group["params"]:
                self._move(group, sigma, param, self.state[param])

    def _move(self, group: dict[str, Any], sigma: float, param: Tensor, state: dict[str, Any]) -> None:
        rate, beta, momentum = float(group["lr"]), group["beta"], group["momentum"]
        rows = param.shape[0] if param.dim() > 1 else 1
        assert param.grad is not None
        theta, gradient = param.view(rows, -1), param.grad.view(rows, -1)
        square = gradient.square()
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(theta), "decay": torch.zeros_like(square[:, :1])}
            state |= {"row": torch.zeros_like(square[:, :1]), "column": torch.zeros_like(square[:1])}
        state["step"] += 1
        of_rows = square.mean(1, keepdim=True)
        row, column, b = state["row"].lerp_(of_rows, 1 - beta), state["column"], state["decay"]
        debias = 1 - beta ** state["step"]
        column.lerp_(square.mean(0, keepdim=True), 1 - beta)
        second = row * (column / column.mean()) if param.dim() > 1 and column.any() else row
        direction = gradient * (debias / second.clamp(min=2**-125)).sqrt()
        if group["rms_clip"] is not None:
            direction /= (direction.square().mean().sqrt() / group["rms_clip"]).clamp(min=1)
        gamma = rate**2 * of_rows * debias / row.clamp(min=2**-125) / (1 + 0.25 * math.sqrt(rate) * b).sqrt()
        d = 1 / (1 + 0.25 * math.sqrt(rate * sigma) * b)
        if group["momentum_of"] == "direction":
            direction = state["m"].lerp_(direction, 1 - momentum) / (1 - momentum ** state["step"])
        update = d * (rate * sigma * direction + gamma / 2 * theta)
        if group["momentum_of"] == "marginals":
            means = update.mean(1, keepdim=True) + update.mean(0) - update.mean()
            update = update - means + state["m"].lerp_(means, 1 - momentum)
        if group["momentum_of"] == "update":
            mixed = state["m"].lerp_(update, 1 - momentum)
            update = mixed.lerp(update, 1 - momentum) if group["nesterov"] else mixed
        if group["own_decay"]:
            b.add_(gamma * (1 + b))
        theta.sub_(update)


# ---- builders --------------------------------------------------------------------------------------------------------


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay and vectors without, as is the custom."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def amos(
    model: nn.Module, lr: float, *, sigma: str, ends_at: float | None = None, steps: int = 0, **keywords: Any
) -> list[Optimizer]:
    """ends_at: Amos's own decay brings the rate to this share of the peak in `steps` steps, by d_coef of each group.

    d = 1 / (1 + d_coef sqrt(lr sigma) b), and b is about exp(lr^2 steps) - 1 while it is small.
    """
    groups = param_groups(model, sigma=sigma)
    if ends_at is not None:
        last = math.expm1(lr**2 * steps)
        for group in groups:
            group["d_coef"] = (1 / ends_at - 1) / (math.sqrt(lr * group["sigma"]) * last)
    return [Amos(groups, lr=lr, **keywords)]


def amos_variant(model: nn.Module, lr: float, *, sigma: str, **keywords: Any) -> list[Optimizer]:
    return [AmosVariant(param_groups(model, sigma=sigma), lr, **keywords)]


def adamw(model: nn.Module, lr: float, *, weight_decay: float, beta1: float, beta2: float) -> list[Optimizer]:
    return [torch.optim.AdamW(decayed(model, weight_decay), lr=lr, betas=(beta1, beta2))]


def lamb(model: nn.Module, lr: float, *, weight_decay: float, beta1: float, beta2: float) -> list[Optimizer]:
    return [LAMB(decayed(model, weight_decay), lr, (beta1, beta2), weight_decay)]


def adafactor(model: nn.Module, lr: float, *, weight_decay: float, beta2_decay: float) -> list[Optimizer]:
    return [torch.optim.Adafactor(decayed(model, weight_decay), lr=lr, beta2_decay=beta2_decay)]


def sgd(model: nn.Module, lr: float, *, weight_decay: float, momentum: float, nesterov: bool) -> list[Optimizer]:
    groups = decayed(model, weight_decay)
    return [torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)]


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon is for, and the rest: embeddings, heads, vectors, convolutions."""
    first_and_last = re.compile(r"embed|position|head\.|patches\.")
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and not first_and_last.search(name)]
    return hidden, [p for p in model.parameters() if not any(p is each for each in hidden)]


def muon(model: nn.Module, lr: float, *, weight_decay: float, momentum: float, adam: float) -> list[Optimizer]:
    """torch's, with steps of AdamW's size, for the matrices of hidden layers; AdamW at `adam` times lr for the rest."""
    hidden, rest = hidden_matrices(model)
    made: list[Optimizer] = [torch.optim.AdamW(rest, lr=adam * lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if hidden:
        of_adam = "match_rms_adamw"
        made.append(torch.optim.Muon(hidden, lr, weight_decay, momentum, adjust_lr_fn=of_adam))
    return made


def relative(model: nn.Module, lr: float, *, base: str, **keywords: Any) -> list[Optimizer]:
    """RelativeStep around torch optimizers, whose own lr and weight decay take no part; beside Muon around Adam."""
    params = list(model.parameters())
    bases: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "adam": lambda some: torch.optim.Adam(some, betas=(0.9, 0.95)),
        "muon": lambda some: torch.optim.Muon(some, weight_decay=0.0, momentum=0.9),
    }
    parts = [(base, params)]
    if base == "muon":
        hidden, rest = hidden_matrices(model)
        parts = [("muon", hidden), ("adam", rest)]
    return [RelativeStep(bases[name](some), lr=lr, **keywords) for name, some in parts if some]


def amos_muon(model: nn.Module, lr: float, *, sigma: str, **keywords: Any) -> list[Optimizer]:
    """RelativeStep around Muon for the matrices of hidden layers, Amos for the rest, at one rate."""
    hidden, rest = hidden_matrices(model)
    kept = {id(param) for param in rest}
    groups = [
        group | {"params": [pair for pair in group["params"] if id(pair[1]) in kept]}
        for group in param_groups(model, sigma=sigma)
    ]
    made: list[Optimizer] = [Amos([group for group in groups if group["params"]], lr=lr, **keywords)]
    if hidden:
        made.append(RelativeStep(torch.optim.Muon(hidden, weight_decay=0.0, momentum=0.9), lr=lr))
    return made


BUILDERS: dict[str, Callable[..., list[Optimizer]]] = {
    each.__name__: each for each in (amos, amos_variant, amos_muon, adamw, lamb, adafactor, sgd, muon, relative)
}


def build(model: nn.Module, setting: Setting, lr: float, steps: int) -> list[Optimizer]:
    """The optimizers of a setting, for disjoint parts of the model's parameters."""
    keywords = {key: value for key, value in setting.items() if key not in ("optimizer", "lr", *COMMON)}
    if "ends_at" in keywords:
        keywords["steps"] = steps
    return BUILDERS[setting["optimizer"]](model, lr, **keywords)
