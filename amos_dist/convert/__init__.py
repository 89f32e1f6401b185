"""python -m amos_dist convert: a DeepSpeed ZeRO checkpoint, one of torch.distributed.checkpoint, and a plain file.

Each kind is read into whole tensors by name (`canonical.Checkpoint`) and written from them, exactly, so one machine
must hold model and optimizer state in its memory. Only ZeRO's own files need DeepSpeed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .canonical import DTYPES, Checkpoint, cast, numbered
from .files import KINDS, first_line, kind_of, refuse_destination, written_beside

__all__ = ["Checkpoint", "add_arguments", "command", "convert", "numbered"]


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    tag: str | None = None,
    dtype: str | None = None,
    model_key: str | None = None,
    optimizer_key: str | None = None,
    write_as: tuple[str, str] = ("model", "optimizer"),
    flatten: bool = False,
    force: bool = False,
    workers: int = 1,
) -> list[str]:
    """Writes the checkpoint `source`, whose kind its files tell, as another kind.

    Args:
        destination: made whole or not at all.
        to: "plain" (a file), "dcp" or "zero" (universal; folders).
        tag: of a ZeRO source; default: the one in its file `latest`.
        dtype: "float32", "bfloat16" or "float16", of the weights; default: as they are, and of a ZeRO source float32.
        model_key: where in a plain or dcp source it is, as "app.model"; default: found by its form.
        optimizer_key: the same of the optimizer.
        write_as: the same keys in a plain or dcp destination.
        flatten: the optimizer's section as with flatten_optimizer_state_dict=True.
        force: replace the checkpoint `destination`.
        workers: processes in which DeepSpeed reads ZeRO's files.

    Returns:
        Warnings: what could not be taken along.

    Raises:
        ValueError: two sentences, what is wrong with what, and what to do. Nothing has changed then.
    """
    source, destination = Path(source), Path(destination)
    if to not in KINDS:
        raise ValueError(f"--to {to}: that is no kind of checkpoint. Use {', '.join(KINDS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: weights cannot be that. Use {', '.join(DTYPES)}.")
    if write_as[0] == write_as[1] or not all(key and all(key.split(".")) for key in write_as):
        raise ValueError(f"--write-as {','.join(write_as)}: these are no two keys. Give some like app.model,app.optim.")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one process is needed. Give 1 or more.")
    kind = kind_of(source)
    if tag is not None and kind != "zero":
        raise ValueError(f"--tag {tag}: {source} is no ZeRO checkpoint, and has no tags. Leave it away.")
    refuse_destination(source, destination, force)
    try:
        with written_beside(destination) as new:
            try:
                checkpoint = _read(kind, source, tag, model_key, optimizer_key, new.parent, workers)
            except (
                LookupError,
                TypeError,
                AttributeError,
                RuntimeError,
                OSError,
            ) as error:  # what should be there is not
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(f"{source} is no complete checkpoint ({reason}). Give another one.") from error
            if dtype is not None:
                checkpoint = cast(checkpoint, DTYPES[dtype])
            try:
                return _write(to, checkpoint, new, str(source), flatten, write_as)
            except (LookupError, TypeError, AttributeError) as error:  # a file that somebody has changed
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(f"the parts of {source} do not fit together ({reason}). Give another one.") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{destination} cannot be written ({first_line(error)}). Nothing has changed: try again."
        ) from error


def _read(
    kind: str, source: Path, tag: str | None, model_key: str | None, optimizer_key: str | None, room: Path, workers: int
) -> Checkpoint:
    if kind == "plain":
        from . import plain

        return plain.read(source, model_key, optimizer_key)
    if kind == "dcp":
        from . import dcp

        return dcp.read(source, model_key, optimizer_key)
    from . import zero

    return zero.read(source, tag, room, workers)


def _write(to: str, checkpoint: Checkpoint, new: Path, source: str, flatten: bool, keys: tuple[str, str]) -> list[str]:
    if to == "plain":
        from . import plain

        return plain.write(checkpoint, new, flatten, keys, source)
    if to == "dcp":
        from . import dcp

        return dcp.write(checkpoint, new, flatten, keys, source)
    from . import zero

    return zero.write(checkpoint, new, source)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="folder of DeepSpeed or of torch.distributed.checkpoint, or file of torch.save")
    add("destination", help="a file (plain) or a folder (dcp, zero), made whole or not at all")
    add("--to", required=True, choices=KINDS, help="zero: a universal checkpoint, for any stage and number of ranks")
    add("--tag", help="which checkpoint of a ZeRO source (the one in its file latest)")
    add("--dtype", choices=tuple(DTYPES), help="of the weights (as they are; of a ZeRO source float32)")
    add("--model-key", metavar="KEY", help="where the model is in the source, as app.model (found)")
    add("--optimizer-key", metavar="KEY", help="where the optimizer is in the source (found)")
    add("--write-as", metavar="MODEL,OPTIMIZER", default="model,optimizer", help="keys written (%(default)s)")
    add("--flatten", action="store_true", help="write the optimizer as with flatten_optimizer_state_dict=True")
    add("--force", action="store_true", help="replace the destination, if it is a checkpoint")
    add("--workers", type=int, default=1, help="processes in which DeepSpeed reads ZeRO's files (%(default)s)")


def command(arguments: argparse.Namespace) -> list[str]:
    """What the command line asks for; returns warnings. Raises ValueError as `convert`."""
    keys = arguments.write_as.split(",")
    if len(keys) != 2:
        raise ValueError(f"--write-as {arguments.write_as}: two keys are needed. Give some like app.model,app.optim.")
    return convert(
        arguments.source,
        arguments.destination,
        arguments.to,
        tag=arguments.tag,
        dtype=arguments.dtype,
        model_key=arguments.model_key,
        optimizer_key=arguments.optimizer_key,
        write_as=(keys[0], keys[1]),
        flatten=arguments.flatten,
        force=arguments.force,
        workers=arguments.workers,
    )
