"""What several files here train on, and compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.integration.pretraining import pretrain


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is easy to learn: 40 words in random order."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, size=5, dtype=np.uint8)) + b" " for _ in range(40)]
    for name, count in (("train", 8000), ("validation", 800)):
        text = b"".join(words[i] for i in random.integers(0, 40, size=count))
        np.save(folder / f"{name}.npy", np.frombuffer(text, dtype=np.uint8))
    return folder


@pytest.fixture(scope="session")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 steps with ZeRO-2 on 2 ranks without a break, with checkpoints after 5 and 10."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("saved")
    done = pretrain("--data", corpus, "--steps", 10, "--save-every", 5, "--out", out, launcher=True)
    assert done.returncode == 0, done.stdout
    return out
