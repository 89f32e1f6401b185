"""CUDA graphs, stochastic rounding and master weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amos_dist import Amos
from amos_dist.reference import amos_step

from ..conftest import TOLERANCES, relative_error
from . import common

# The CPU kernels and nvcc's may differ in the last bit of a float32, and so, once in 2**16 times, in the rounded value.
ROUNDED_OTHERWISE = 1e-4  # share of elements

OPTIONS: list[dict[str, Any]] = [{}, {"momentum": 0.9}, {"momentum": 0.9, "momentum_dtype": torch.bfloat16}]


def each(section: common.Section, checks: Callable[[str, dict[str, Any]], list[str]]) -> common.Section:
    """Calls `checks` for every kind and option; it gives what it found, failures marked by a leading '!'."""
    for moments in common.KINDS:
        for options in OPTIONS:
            name = ", ".join([moments, *(f"{key}={value}" for key, value in options.items())]).replace("torch.", "")
            try:
                found = checks(moments, options)
            except Exception as raised:
                found = [f"!{common.error_text(raised)}"]
            problems = [text[1:] for text in found if text.startswith("!")]
            section.failures += [f"{name}: {problem}" for problem in problems]
            section.data[name] = found
            shown = "; ".join(f"**{text[1:]}**" if text.startswith("!") else text for text in found)
            section.lines.append(f"* {name}: {shown}")
    return section


def different(tensors: list[Tensor], others: list[Tensor]) -> int:
    """Number of elements."""
    return sum(int((x.cpu() != y.cpu()).sum()) for x, y in zip(tensors, others, strict=True))


def everything(optimizer: Amos, params: list[torch.nn.Parameter]) -> list[Tensor]:
    """Parameters and state, by name, so that two optimizers can be compared."""
    result: list[Tensor] = [param.detach() for param in params]
    for param in params:
        result += [torch.as_tensor(value) for _, value in sorted(optimizer.state[param].items())]
    return result


# ---- capturable ------------------------------------------------------------------------------------------------------


def _rates() -> list[float]:
    return [0.125, 0.125, 0.125, 0.0625, 0.25, 0.125]  # exact in float32; they change while the graph replays


def _eager(
    device: torch.device, sizes: list[tuple[int, ...]], capturable: bool, keywords: dict[str, Any]
) -> list[Tensor]:
    rates = _rates()
    values, *gradients = common.draws(sizes, torch.float32, len(rates))
    params = common.parameters(values, device)
    lr = torch.tensor(rates[0], device=device) if capturable else rates[0]
    optimizer = Amos(params, lr=lr, capturable=capturable, fused=True, **keywords)
    for rate, grads in zip(rates, gradients, strict=True):
        common.give(params, grads)
        if isinstance(lr, Tensor):
            lr.fill_(rate)
        else:
            optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return everything(optimizer, params)


def _replayed(device: torch.device, sizes: list[tuple[int, ...]], keywords: dict[str, Any]) -> list[Tensor]:
    """The same steps: two on a side stream, as torch wants before a capture, the others by the graph of one."""
    rates = _rates()
    values, *gradients = common.draws(sizes, torch.float32, len(rates))
    params = common.parameters(values, device)
    common.give(params, gradients[0])
    lr = torch.tensor(rates[0], device=device)
    optimizer = Amos(params, lr=lr, capturable=True, fused=True, **keywords)

    def feed(t: int) -> None:  # into the same memory
        lr.fill_(rates[t])
        for param, grad in zip(params, gradients[t], strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(2):
            feed(t)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(2, len(rates)):
        feed(t)
        graph.replay()
    torch.cuda.synchronize()
    return everything(optimizer, params)


def capturable(device: torch.device, quick: bool) -> common.Section:
    section = common.Section("CUDA graphs (capturable=True)")
    if device.type != "cuda":
        section.skipped = "CUDA graphs need a GPU"
        return section
    section.lines = ["Parameters and state after 6 steps, 4 of them replays of one graph while lr changes.", ""]
    sizes = common.shapes(quick)

    def checks(moments: str, options: dict[str, Any]) -> list[str]:
        keywords = {"sigma": 0.5, "beta": 0.9, "moments": moments, **options}
        replayed = _replayed(device, sizes, keywords)
        found = []
        for name, other in (("eager, capturable", True), ("eager", False)):
            count = different(replayed, _eager(device, sizes, other, keywords))
            found.append(f"!{count} elements differ from {name}" if count else f"equal to {name}")
        return found

    return each(section, checks)


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def _rounded(device: torch.device, sizes: list[tuple[int, ...]], offset: int = 0, **keywords: Any) -> list[Tensor]:
    """bfloat16 parameters after one step from the same start."""
    keywords = {"fused": True, "stochastic_rounding": True, "seed": 0, **keywords}
    values, grads = common.draws(sizes, torch.bfloat16, 1)
    params = common.parameters(values, device, offset)
    optimizer = Amos(params, **common.HYPER, **keywords)
    common.give(params, grads, offset)
    optimizer.step()
    return [param.detach().cpu() for param in params]


def rounding(device: torch.device, quick: bool) -> common.Section:
    sizes = common.shapes(quick)
    numel = sum(torch.Size(size).numel() for size in sizes)
    # On a GPU the other side is the CPU kernels; on a CPU plain torch.
    other, fused = ("the CPU kernels", True) if device.type == "cuda" else ("plain torch", False)
    section = common.Section("Stochastic rounding")
    section.lines = [
        f"bfloat16 parameters, {numel:,} elements, one step; beside {other}. At most {ROUNDED_OTHERWISE:.2%} may be "
        "rounded otherwise, where float32 differs in its last bit.",
        "",
    ]

    def checks(moments: str, options: dict[str, Any]) -> list[str]:
        keywords = {"moments": moments, **options}
        ours = _rounded(device, sizes, **keywords)
        count = different(ours, _rounded(torch.device("cpu"), sizes, **{**keywords, "fused": fused}))
        text = f"{count} elements differ from {other}" if count else f"equal to {other}, bit for bit"
        found = [text if count <= max(2, ROUNDED_OTHERWISE * numel) else f"!{text}"]
        for name, changed in (("unaligned", {"offset": 3}), ("again", {})):
            if different(ours, _rounded(device, sizes, **{**keywords, **changed})):
                found.append(f"!not the same bits {name}")
        if different(ours, _rounded(device, sizes, **{**keywords, "seed": 1})) < 0.05 * numel:
            found.append("!another seed gives nearly the same")
        found.append(unbiased(ours, sizes, keywords))
        return found

    return each(section, checks)


def unbiased(rounded: list[Tensor], sizes: list[tuple[int, ...]], keywords: dict[str, Any]) -> str:
    """Rounding up is as likely as it should be: the mean error is some standard deviations from zero, few of them."""
    values, grads = common.draws(sizes, torch.bfloat16, 1)
    errors = []
    for value, grad, result in zip(values, grads, rounded, strict=True):
        exact = value.double()
        amos_step(exact, grad.double(), {}, **common.HYPER, **keywords)
        size = torch.finfo(torch.bfloat16).eps * exact.abs().clamp(min=1e-30)  # so that large values do not rule
        errors.append(((result.double() - exact) / size).flatten())
    error = torch.cat(errors)
    deviations = float(error.mean() / (error.std() / error.numel() ** 0.5))
    text = f"mean error {deviations:+.1f} standard deviations"
    return text if abs(deviations) < 5 else f"!{text}"


# ---- master weights --------------------------------------------------------------------------------------------------


def master(device: torch.device, quick: bool) -> common.Section:
    section = common.Section("Master weights")
    section.lines = ["The float32 master beside the reference in float64, 3 steps; the parameter is it, rounded.", ""]
    sizes = common.shapes(quick)

    def checks(moments: str, options: dict[str, Any]) -> list[str]:
        found = []
        for dtype in (torch.bfloat16, torch.float16):
            values, *gradients = common.draws(sizes, dtype, 3)
            params = common.parameters(values, device)
            optimizer = Amos(params, moments=moments, master_weights=True, fused=True, **common.HYPER, **options)
            for grads in gradients:
                common.give(params, grads)
                optimizer.step()
            masters = [optimizer.state[param]["master"].reshape(param.shape) for param in params]
            rounded_momentum = "momentum_dtype" in options
            exact = torch.float32 if rounded_momentum else torch.float64
            worst = 0.0
            for i, value in enumerate(values):
                expected, state = value.to(device, exact, copy=True), {}  # type: Tensor, dict[str, Any]
                for grads in gradients:
                    grad = grads[i].to(device, exact)
                    amos_step(expected, grad, state, moments=moments, **common.HYPER, **options)
                worst = max(worst, relative_error(masters[i], expected))
            tolerance = 1e-4 if rounded_momentum else TOLERANCES[torch.float32].param
            text = f"{str(dtype)[6:]}: error / tolerance {worst / tolerance:.3f}"
            found.append(text if worst <= tolerance else f"!{text}")
            if any(master.dtype != torch.float32 for master in masters):
                found.append(f"!{str(dtype)[6:]}: the master is not float32")
            if different([param.detach() for param in params], [master.to(dtype) for master in masters]):
                found.append(f"!{str(dtype)[6:]}: the parameter is not the rounded master")
        return found

    return each(section, checks)
