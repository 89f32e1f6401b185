"""Tokens on disk: `train.npy` and `validation.npy` in a folder, 1-D arrays of uint8 or uint16, memory-mapped.

Any corpus will do: tokenise it and `numpy.save` it under these names. Without one, `build` makes a corpus of
bytes from Python's own sources and documentation, which are on every machine that can run this.
"""

import hashlib
import itertools
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}

Texts = Iterable[tuple[str, bytes]]  # (name, content)


def sources() -> Iterator[tuple[str, bytes]]:
    """Each standard-library source file."""
    library = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder, name)
                yield path.relative_to(library).as_posix(), path.read_bytes()


def documentation() -> Iterator[tuple[str, bytes]]:
    """Each topic of Python's documentation."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it separately
        return
    for name, text in topics.items():
        yield f"topics/{name}", text.encode()


def build(folder: Path, texts: Texts | None = None, *, megabytes: float = 12.0, validation: float = 0.06) -> None:
    """Write a corpus of `texts` (all there are), at most `megabytes` (1e6 bytes) long, of which a share is held out.

    Whole files are held out, and a hash of their names gives the order: the same Python, the same corpus.
    """

    def key(item: tuple[str, bytes]) -> str:
        return hashlib.sha256(item[0].encode()).hexdigest()

    split: dict[str, list[bytes]] = {"train": [], "validation": []}
    room = int(megabytes * 1e6)
    for name, content in sorted(itertools.chain(sources(), documentation()) if texts is None else texts, key=key):
        if 0 < len(content) + 1 <= room:
            held_out = int(key((name, b""))[-8:], 16) < validation * 16**8
            split["validation" if held_out else "train"].append(content + b"\0")  # NUL ends a text
            room -= len(content) + 1
    if not split["train"] or not split["validation"]:
        raise ValueError(
            f"{sysconfig.get_path('stdlib')}: no Python sources here to make a text from. "
            "Give a folder with train.npy and validation.npy as --data."
        )

    # Written beside and renamed: a build that was cut off, or two at once, never leave half a corpus.
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for part, contents in split.items():
            np.save(beside / f"{part}.npy", np.frombuffer(b"".join(contents), dtype=np.uint8))
        beside.chmod(0o755)
        beside.rename(folder)
    except OSError:
        if not (folder / "train.npy").exists():  # else another job was first, with the same content
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class Tokens:
    """One token file, cut into windows of `sequence` + 1 tokens. A file that cannot serve is a ValueError."""

    def __init__(self, path: Path, sequence: int, vocabulary: int) -> None:
        self.sequence = sequence
        how = "Make it with numpy.save(path, tokens), tokens a 1-D array of uint8 or uint16."
        if not path.is_file():
            raise ValueError(f"{path}: no such token file. {how}")
        try:
            self.tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: not a readable token file, or truncated ({error}). {how}") from error
        if self.tokens.dtype not in (np.uint8, np.uint16) or self.tokens.ndim != 1:
            raise ValueError(f"{path}: holds {self.tokens.ndim}-D {self.tokens.dtype}, not tokens. {how}")
        if len(self.tokens) <= sequence:
            raise ValueError(
                f"{path}: {len(self.tokens)} tokens are fewer than one sequence of {sequence} + 1. "
                "Give a longer text, or a --size with a shorter sequence."
            )
        if np.iinfo(self.tokens.dtype).max >= vocabulary and int(self.tokens.max()) >= vocabulary:
            raise ValueError(
                f"{path}: token {self.tokens.max()} is outside the model's vocabulary of {vocabulary}. "
                "Give a --size with a larger vocabulary, or tokenise the text again."
            )

    def windows(self, starts: np.ndarray) -> Tensor:
        """(len(starts), sequence + 1) tokens, int64."""
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.sequence + 1)].astype(np.int64))

    def batch(self, seed: int, step: int, count: int, part: slice) -> Tensor:
        """Rows `part` of the `count` random windows of one step, the same however many ranks share them."""
        random = np.random.default_rng((seed, step))
        starts = random.integers(0, len(self.tokens) - self.sequence, size=count)
        return self.windows(starts[part])

    def spread(self, count: int, part: slice) -> Tensor:
        """Rows `part` of `count` windows at equal distances over the whole file, for evaluation."""
        starts = np.linspace(0, len(self.tokens) - self.sequence - 1, num=count, dtype=np.int64)
        return self.windows(starts[part])
