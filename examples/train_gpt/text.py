"""From a text to batches: its characters as numbers, a tail held out, and a baseline to beat."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .settings import ExampleError, Settings

TEXT = Path(__file__).resolve().parents[1] / "data" / "pride_and_prejudice.txt"
HELD_OUT = 0.1  # of the text, at its end
VALIDATION_BATCH = 64


class Corpus(NamedTuple):
    """A text as numbers. train, tail [characters] int64: indices into the vocabulary."""

    vocabulary: str
    train: Tensor
    tail: Tensor
    digest: str

    def encode(self, text: str) -> Tensor:
        """Indices [characters] int64. Raises ExampleError for a character that the text does not have."""
        for character in text:
            if character not in self.vocabulary:
                raise ExampleError(f"the text has no character {character!r}, so the model cannot read it")
        return torch.tensor([self.vocabulary.index(character) for character in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)


def load_corpus(path: Path, context: int) -> Corpus:
    """The text in a UTF-8 file. Raises ExampleError where it cannot be read, or is too short for windows of
    `context` characters and one more."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExampleError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExampleError(f"the text {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    ids = torch.tensor([index[character] for character in text], dtype=torch.int64)
    held_out = int(len(ids) * HELD_OUT)
    if held_out <= context:
        raise ExampleError(
            f"the text {path} has {len(ids)} characters: too few for texts of {context}, which must be "
            f"less than the {HELD_OUT:.0%} held out"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(vocabulary, ids[:-held_out], ids[-held_out:], digest)


def seed_of(seed: int, step: int) -> int:
    """A seed for everything random in one step, so that a resumed run needs to know only the step."""
    return seed * 1_000_003 + step


def batch_of(corpus: Corpus, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: ids and targets, both [batch, context]."""
    generator = torch.Generator().manual_seed(seed_of(settings.seed, step))
    last = len(corpus.train) - settings.context
    starts = torch.randint(last, (settings.batch, 1), generator=generator)
    windows = corpus.train[starts + torch.arange(settings.context + 1)].to(settings.device)
    return windows[:, :-1], windows[:, 1:]


def validation_batches(corpus: Corpus, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """The held-out tail in windows side by side, what does not fill one left out: (ids, targets) pairs."""
    windows = corpus.tail.unfold(0, settings.context + 1, settings.context).to(settings.device)
    return [(group[:, :-1], group[:, 1:]) for group in windows.split(VALIDATION_BATCH)]


def bigram_loss(corpus: Corpus) -> float:
    """The tail's loss, in nats a character, under counts of which character follows which (add-one smoothed).

    What a model has to beat that looks at no more than the character before.
    """
    size = len(corpus.vocabulary)
    pairs = corpus.train[:-1] * size + corpus.train[1:]
    counts = torch.bincount(pairs, minlength=size * size).view(size, size).double() + 1
    log_p = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -log_p[corpus.tail[:-1], corpus.tail[1:]].mean().item()
