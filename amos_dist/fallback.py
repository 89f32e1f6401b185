"""The kernels of csrc/ in plain torch, for machines without the extension: same arguments, same numbers, slower.

See csrc/block.h and csrc/ops.cpp for what the arguments mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import coefficients, column_profile, stochastic_bfloat16, stochastic_int8, widened_int8

ROW, COLUMN, FACTORED = 0, 1, 2
Tensors = list[Tensor]


class _Block(NamedTuple):
    tensor: int
    offset: int
    rows: int
    cols: int
    moments: int
    row_count: int
    column_count: int
    row_state: int
    column_state: int
    decay_state: int
    row_work: int
    column_work: int
    column_start: int
    columns: int
    hyper: int
    first: int
    run: int

    def runs_of(self, scales: Tensors) -> Tensor:
        """The scales of this block's momentum."""
        return scales[self.tensor].view(-1)[self.run :]

    def of(self, tensors: Tensors) -> Tensor:
        """This block's elements, as a matrix that shares the tensor's memory."""
        flat = tensors[self.tensor].view(-1)
        return flat[self.offset : self.offset + self.rows * self.cols].view(self.rows, self.cols)

    def row_places(self) -> slice:
        return slice(self.row_work, self.row_work + self.rows)

    def column_places(self) -> slice:
        begin = self.column_work + self.column_start
        return slice(begin, begin + self.cols)

    def all_columns(self) -> slice:
        return slice(self.column_work, self.column_work + self.columns)


class _Hyper(NamedTuple):
    lr: float
    sigma: float
    beta: float
    t: float
    momentum: float
    clip: float
    extra_l2: float
    c_coef: float
    d_coef: float
    eps: float
    grad_sign: float
    seed: float

    @property
    def key(self) -> int:
        """Of the random numbers."""
        return int(self.seed if self.seed >= 0 else -1 - self.seed)

    def coefficients(self, G: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B; moves v and b on."""
        v.mul_(self.beta).add_(G, alpha=1 - self.beta)
        scale, B, inv_v, decay = coefficients(
            G,
            v,
            b,
            lr=self.lr,
            sigma=self.sigma,
            bias=1 - self.beta**self.t,
            extra_l2=self.extra_l2,
            c_coef=self.c_coef,
            d_coef=self.d_coef,
            eps=self.eps,
        )
        b.copy_(decay)
        return scale * inv_v.sqrt(), B


Rows = list[tuple[_Block, _Hyper]]


def _rows(blocks: Tensor, hyper: Tensor) -> Rows:
    numbers = [_Hyper(*row) for row in hyper.tolist()]
    return [(block, numbers[block.hyper]) for block in (_Block(*b) for b in blocks.tolist()) if block.rows * block.cols]


def _rounded(values: Tensor, block: _Block, h: _Hyper) -> Tensor:
    rows = torch.arange(block.rows, device=values.device).unsqueeze(1) * block.row_count
    index = block.first + rows + torch.arange(block.cols, device=values.device)
    return stochastic_bfloat16(values, index, h.key, int(h.t))


def _sums(grad: Tensors, work: Tensor, rows: Rows) -> None:
    for block, h in rows:
        square = block.of(grad).to(work.dtype).clamp(-h.clip, h.clip).square()
        if block.moments != COLUMN:
            work[0, block.row_places()] = square.sum(1)
        if block.moments != ROW:
            work[0, block.column_places()] += square.sum(0)


def _slots(state: Tensor, work: Tensor, rows: Rows) -> None:
    for block, h in rows:
        if block.moments != COLUMN:
            places = block.row_places()
            v = state[block.row_state : block.row_state + block.rows]
            b = state[block.decay_state : block.decay_state + block.rows]
            work[0, places], work[1, places] = h.coefficients(work[0, places] / block.row_count, v, b)
            if block.moments == FACTORED:
                # amos_math.h: profile_limit
                work[2, places] = torch.where(v < h.eps, -(h.eps / v).sqrt(), v.sqrt() * h.eps**-0.5)
        if block.moments != ROW and block.columns:
            places = block.all_columns()
            G = work[0, places] / block.column_count
            v = state[block.column_state : block.column_state + block.columns]
            if block.moments == COLUMN:
                b = state[block.decay_state : block.decay_state + block.columns]
                work[0, places], work[1, places] = h.coefficients(G, v, b)
            else:
                v.mul_(h.beta).add_(G, alpha=1 - h.beta)
                work[0, places] = column_profile(v).rsqrt()


def _update(
    param: Tensors,
    grad: Tensors,
    momentum: Tensors,
    low_param: Tensors,
    work: Tensor,
    rows: Rows,
    norms: Tensor | None,
    scales: Tensors | None,
) -> None:
    for block, h in rows:
        theta, g = block.of(param), block.of(grad).to(work.dtype).clamp(-h.clip, h.clip) * h.grad_sign
        if block.moments == COLUMN:
            A, B = work[0, block.column_places()], work[1, block.column_places()]
        else:
            A, B = work[0, block.row_places()].unsqueeze(1), work[1, block.row_places()].unsqueeze(1)
        if block.moments == FACTORED:
            limit, one = work[2, block.row_places()].unsqueeze(1), work.new_ones(())
            factor, most = torch.where(limit < 0, -limit, one), torch.where(limit < 0, one, limit)
            A = A * torch.minimum(factor * work[0, block.column_places()], most)
        wide = theta.to(work.dtype)
        step = A * g + B * wide
        if momentum:
            m = block.of(momentum)
            wide_m = widened_int8(m.view(-1), block.runs_of(scales)).view(m.shape) if scales else m.to(work.dtype)
            step = h.momentum * wide_m + (1 - h.momentum) * step
            if scales:
                index = block.first + torch.arange(step.numel(), device=step.device)
                rounded, scale = stochastic_int8(step.view(-1), index, h.key, int(h.t))
                m.copy_(rounded.view(m.shape))
                block.runs_of(scales)[: len(scale)] = scale
            else:
                m.copy_(step)
        if norms is not None:
            norms[block.hyper] += torch.stack([each.double().square().sum() for each in (step, wide)])
        new = wide - step
        theta.copy_(_rounded(new, block, h) if h.seed >= 0 and theta.dtype == torch.bfloat16 else new)
        if low_param:
            block.of(low_param).copy_(new)


def sums_(grad: Tensors, work: Tensor, blocks: Tensor, hyper: Tensor, names: Tensor | None = None) -> None:
    _sums(grad, work, _rows(blocks, hyper))


def slots_(state: Tensor, work: Tensor, blocks: Tensor, hyper: Tensor, names: Tensor | None = None) -> None:
    _slots(state, work, _rows(blocks, hyper))


def update_(
    param: Tensors,
    grad: Tensors,
    momentum: Tensors,
    low_param: Tensors,
    work: Tensor,
    blocks: Tensor,
    hyper: Tensor,
    names: Tensor | None = None,
    norms: Tensor | None = None,
    scales: Tensors | None = None,
) -> None:
    _update(param, grad, momentum, low_param, work, _rows(blocks, hyper), norms, scales)


def step_(
    param: Tensors,
    grad: Tensors,
    momentum: Tensors,
    low_param: Tensors,
    state: Tensor,
    work: Tensor,
    blocks: Tensor,
    hyper: Tensor,
    names: Tensor | None = None,
    norms: Tensor | None = None,
    scales: Tensors | None = None,
) -> None:
    for block, h in _rows(blocks, hyper):  # one by one: blocks may share their places in the workspace
        places = work
        if block.moments == ROW:  # the kernels keep these on chip; here they need places of their own
            places = torch.empty(3, block.rows, dtype=work.dtype, device=work.device)
            block = block._replace(row_work=0)
        else:
            work[0, block.all_columns()] = 0
        row = [(block, h)]
        _sums(grad, places, row)
        _slots(state, places, row)
        _update(param, grad, momentum, low_param, places, row, norms, scales)
