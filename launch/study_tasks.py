"""What the study trains: small models on real text and real images that are on every machine that can run this.

Text: Python's own sources and documentation (data.py), as bytes and as words. Images: scikit-learn's digits.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import GPT, Config

HERE = Path(__file__).resolve().parent
VALIDATION_SHARE = 0.2  # of the images
VOCABULARY = 2048  # words, with the two that follow
UNKNOWN, MASK = 0, 1
MASKED = 0.15  # share of the words


class Data(Protocol):
    """Batches are tuples of what the model is called with.

    Attributes:
        batches: independent ones in the training set. predicted: the share of a batch that the loss is taken over.
    """

    batches: int
    predicted: float

    def train(self, seed: int, step: int) -> tuple[Tensor, ...]: ...

    def validation(self) -> list[tuple[Tensor, ...]]: ...


@dataclass(frozen=True)
class Task:
    """model: makes one that returns the mean loss of a batch, in nats. seconds: of one core, for a run (an estimate).

    wave: is added to that of each entry; what has a lower wave runs first. if_named: only for entries that name it.
    """

    name: str
    title: str
    language: bool
    steps: int
    batch: int
    seconds: float
    model: Callable[[], nn.Module]
    data: Callable[[Task, Path], Data]
    wave: int = 0
    if_named: bool = False


# ---- text ------------------------------------------------------------------------------------------------------------


def corpus() -> Path:
    """The folder of the bytes, which pretrain.py reads too."""
    return HERE.parent / "out" / "python{}.{}".format(*sys.version_info)


def build_words(source: Path, folder: Path) -> None:
    """Words, digits and punctuation of the bytes in `source`, numbered by their frequency in its training part."""
    texts = {
        part: np.load(source / f"{part}.npy").tobytes().decode(errors="replace") for part in ("train", "validation")
    }
    words = {part: re.findall(r"[a-z]+|\d|[^\sa-z\d]", text.lower()) for part, text in texts.items()}
    common = collections.Counter(words["train"]).most_common(VOCABULARY - 2)
    number = {word: 2 + place for place, (word, _) in enumerate(common)}
    folder.mkdir(parents=True, exist_ok=True)
    for part, some in words.items():
        beside = folder / f".{part}.npy"
        np.save(beside, np.array([number.get(word, UNKNOWN) for word in some], dtype=np.uint16))
        beside.rename(folder / f"{part}.npy")


def words_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_words")


def prepare(folder: Path, tasks: Sequence[Task]) -> None:
    """Makes the text where it is missing: once, before workers read it.

    Raises:
        ValueError: a package is missing.
    """
    needed = {"matplotlib": "matplotlib"}
    if not all(task.language for task in tasks):
        needed["sklearn"] = "scikit-learn"
    if any(task.name == "llama" for task in tasks):
        needed["transformers"] = "transformers"
    if missing := [package for name, package in needed.items() if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{' and '.join(missing)} must be installed first: pip install {' '.join(missing)}. "
            "Figures need matplotlib, the tasks with images scikit-learn, and llama transformers; "
            "--tasks can leave tasks out."
        )
    if folder == corpus() and not folder.is_dir():
        data.build(folder)
    needs_words = any(task.name == "bert" for task in tasks)
    if needs_words and not (words_of(folder) / "validation.npy").exists():  # it is written last
        build_words(folder, words_of(folder))


class Text:
    """Windows of a text: each token follows from those before it."""

    predicted = 1.0

    def __init__(self, task: Task, folder: Path, sequence: int, vocabulary: int, windows: int) -> None:
        self.task, self.windows = task, windows
        self.parts = [data.Tokens(folder / f"{part}.npy", sequence, vocabulary) for part in ("train", "validation")]
        self.batches = len(self.parts[0].tokens) // (task.batch * sequence)

    def train(self, seed: int, step: int) -> tuple[Tensor, ...]:
        return (self.parts[0].batch(seed, step, self.task.batch, slice(None)),)

    def validation(self) -> list[tuple[Tensor, ...]]:
        return [(part,) for part in self.parts[1].spread(self.windows, slice(None)).split(64)]


class MaskedText(Text):
    """Windows of words of which some are hidden; the targets are -100 where a word can be seen."""

    predicted = MASKED

    def train(self, seed: int, step: int) -> tuple[Tensor, ...]:
        return self._hide(super().train(seed, step)[0], (1, seed, step))

    def validation(self) -> list[tuple[Tensor, ...]]:
        return [self._hide(part, (0, number)) for number, (part,) in enumerate(super().validation())]

    @staticmethod
    def _hide(words: Tensor, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        hidden = torch.from_numpy(np.random.default_rng(seed).random(words.shape) < MASKED)
        return words.masked_fill(hidden, MASK), words.masked_fill(~hidden, -100)


class LSTM(nn.Module):
    """tokens (batch, sequence + 1) → the mean cross-entropy of each token given those before it, in nats."""

    def __init__(self, width: int, hidden: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.lstm(self.embedding(tokens[:, :-1]))[0])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def encoder(width: int, heads: int, layers: int, *, norm_first: bool) -> nn.TransformerEncoder:
    """torch's, without dropout: BERT's with the norm last, the vision transformer's with the norm first."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, nn.GELU(), batch_first=True, norm_first=norm_first)
    made = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width) if norm_first else None, enable_nested_tensor=False)
    for each in made.layers:  # they are copies, and all start alike
        for weight in (p for p in each.parameters() if p.dim() == 2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return made


class BERT(nn.Module):
    """words, targets (batch, sequence) → the mean cross-entropy of the hidden words, in nats."""

    def __init__(self, width: int, heads: int, layers: int, sequence: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(sequence, width)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.encoder = encoder(width, heads, layers, norm_first=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, words: Tensor, targets: Tensor) -> Tensor:
        words, targets = words[:, :-1], targets[:, :-1]  # windows have one token more, for models that look back
        x = self.encoder(self.norm(self.embedding(words) + self.position.weight))
        hidden = targets != -100
        return F.cross_entropy(self.head(x[hidden]), targets[hidden])


class Llama(nn.Module):
    """Hugging Face's, with its initialization, two queries to a key.

    tokens (batch, sequence + 1) → the mean cross-entropy of each token given those before it, in nats.
    """

    def __init__(self, width: int, heads: int, layers: int, sequence: int, vocabulary: int = 256) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=sequence,
            use_cache=False,
        )
        self.inner = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.inner(tokens[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


# ---- images ----------------------------------------------------------------------------------------------------------


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 handwritten digits of 8 x 8 pixels from 0 to 1, and what they are, in an order of chance."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order]).float().div_(16).unsqueeze(1)
    return images, torch.from_numpy(found.target[order])


class Images:
    """Digits, moved by up to one pixel at random while training."""

    predicted = 1.0

    def __init__(self, task: Task, folder: Path) -> None:
        images, labels = digits()
        self.task, self.held_out = task, int(VALIDATION_SHARE * len(images))
        self.images, self.labels = F.pad(images, (1, 1, 1, 1)), labels
        self.batches = (len(images) - self.held_out) // task.batch

    def train(self, seed: int, step: int) -> tuple[Tensor, ...]:
        random = np.random.default_rng((seed, step))
        chosen = torch.from_numpy(random.integers(self.held_out, len(self.images), size=self.task.batch))
        x, y = (torch.from_numpy(random.integers(0, 3, size=(self.task.batch, 1, 1))) for _ in range(2))
        rows, columns = y + torch.arange(8).view(1, 8, 1), x + torch.arange(8).view(1, 1, 8)
        return self.images[chosen.view(-1, 1, 1), 0, rows, columns].unsqueeze(1), self.labels[chosen]

    def validation(self) -> list[tuple[Tensor, ...]]:
        return [(self.images[: self.held_out, :, 1:-1, 1:-1], self.labels[: self.held_out])]


class ViT(nn.Module):
    """images (batch, 1, 8, 8), labels → the mean cross-entropy, in nats. Patches of 2 x 2, their mean is classified."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.encoder = encoder(width, heads, layers, norm_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.encoder(self.patches(images).flatten(2).transpose(1, 2) + self.position)
        return F.cross_entropy(self.head(x.mean(1)), labels)


class CNN(nn.Module):
    """images (batch, 1, 8, 8), labels → the mean cross-entropy, in nats."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        twice = 2 * channels
        self.features = nn.Sequential(
            *block(1, channels), *block(channels, twice), nn.MaxPool2d(2), *block(twice, twice)
        )
        self.head = nn.Linear(twice * 4, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(F.max_pool2d(self.features(images), 2).flatten(1)), labels)


# ---- the table -------------------------------------------------------------------------------------------------------


def text(sequence: int, windows: int = 128) -> Callable[[Task, Path], Data]:
    return lambda task, folder: Text(task, folder, sequence, 256, windows)


def masked(sequence: int, windows: int = 256) -> Callable[[Task, Path], Data]:
    return lambda task, folder: MaskedText(task, words_of(folder), sequence, VOCABULARY, windows)


SMALL, LARGE = Config(layers=3, width=96, heads=3, sequence=64), Config(layers=4, width=160, heads=5, sequence=128)
TASKS = {
    task.name: task
    for task in (
        Task("gpt-small", "GPT, 0.4 M", True, 600, 16, 29, lambda: GPT(SMALL), text(64)),
        Task("lstm", "LSTM, 0.5 M", True, 600, 16, 17, lambda: LSTM(128, 256), text(64)),
        Task("bert", "BERT, 0.7 M", True, 600, 16, 28, lambda: BERT(96, 3, 3, 64), masked(64)),
        Task("vit", "ViT, 0.2 M", False, 600, 64, 16, lambda: ViT(64, 2, 3), Images),
        Task("cnn", "CNN, 0.06 M", False, 600, 64, 8, lambda: CNN(32), Images),
        Task("gpt-large", "GPT, 1.3 M", True, 300, 16, 75, lambda: GPT(LARGE), text(128), 3, True),
        Task("gpt-batch", "GPT, 0.4 M, batch 64", True, 150, 64, 29, lambda: GPT(SMALL), text(64), 3, True),
        Task("llama", "Llama, 0.4 M", True, 600, 16, 40, lambda: Llama(96, 4, 3, 64), text(64), 3, True),
    )
}
