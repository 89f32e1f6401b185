"""Takes two steps under DeepSpeed for each case, and reports what each rank really held and sent.

A case: as zero_worker.py has them.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import deepspeed
import torch

from amos_dist.optimizer import Amos
from amos_dist.state import has_rows
from amos_dist.travel import ROWS
from tests.distributed.harness import serve
from tests.distributed.zero_worker import Counter, engine_for, train_steps

warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def held(base: Any) -> dict[str, int]:
    """Bytes of state by key."""
    found: dict[str, int] = {}
    for state in base.state.values():
        for key, tensor in state.items():
            found[key] = found.get(key, 0) + tensor.numel() * tensor.element_size()
    return found


def count(case: dict[str, Any]) -> dict[str, Any]:
    engine, counter = engine_for(case, 12 * case.get("micro", 2)), Counter()
    counter.watch(engine)
    train_steps(engine, case, range(2))
    base = engine.basic_optimizer
    stage3 = case["stage"] == 3
    flats = (
        engine.optimizer.fp32_partitioned_groups_flat if stage3 else engine.optimizer.single_partition_of_fp32_groups
    )
    found = {"state": held(base), "elements": [flat.numel() for flat in flats], "calls": counter.calls}
    return found | (inside(base, flats) if isinstance(base, Amos) else {})


def inside(base: Any, flats: list[torch.Tensor]) -> dict[str, Any]:
    """What the optimizer knows of the partitions."""
    layouts = [base._layouts[id(flat)][1] for flat in flats]
    buckets = [bucket for plans in base._plans.values() for plan in plans.values() for bucket in plan.buckets]
    cuts = [cut for layout in layouts for cut in layout.cuts]
    waves = [wave for bucket in buckets for wave in bucket.waves]
    rows = [
        [row for row in range(cut.rows) if len(cut.holders_of_row(row)) > 1]
        for cut in cuts
        if has_rows(base._kinds[cut.key])
    ]
    return {
        "pieces": [[piece_told(piece) for piece in layout.pieces] for layout in layouts],
        "cuts": [[cut_told(cut) for cut in layout.cuts] for layout in layouts],
        "cut_rows": sum(map(len, rows)),
        "sent_rows": sum(name[0] == ROWS for wave in waves for name in wave.travel.places),
        "workspace": sum(tensor.nbytes for bucket in buckets for tensor in bucket.staying),
    }


def cut_told(cut: Any) -> list[Any]:
    return [cut.key, cut.rows, cut.cols, list(cut.borders), cut.first, cut.everybody]


def piece_told(piece: Any) -> list[Any]:
    share = None if piece.share is None else [piece.share.start, piece.share.stop]
    return [piece.key, piece.start, piece.length, piece.offset, share]


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    serve({"train": count})
