"""One variant's training: its model, optimizer and losses, and what a step does to them."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .model import GPT, build_gpt
from .parts import load_parts
from .ranks import ALONE, Ranks
from .settings import Settings
from .text import Corpus, batch_of, seed_of

WARMUP = 0.05  # of all steps
FINAL_LR = 0.1  # of the highest
CLIP = 1.0
WEIGHT_DECAY = 0.1


class Run:
    """A model in training. losses: one a step; validation: the tail's loss after so many steps.

    ranks: those that train it together, each with its own part (`parallel.py`); by default one, which has
    all.
    """

    positions: Tensor | None = None  # of the characters that `own` leaves, if not 0, 1, ...

    def __init__(
        self,
        variant: str,
        settings: Settings,
        vocabulary: int,
        impl: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.variant, self.settings, self.ranks = variant, settings, ranks
        self.model = self.build(variant, vocabulary, impl)
        self.optimizer = build_optimizer(self.model, settings)
        self.losses: list[float] = []
        self.validation: dict[int, float] = {}
        self.seconds: list[float] = []

    def build(self, variant: str, vocabulary: int, impl: str | None) -> GPT:
        return build_gpt(variant, self.settings, vocabulary, impl)

    def own(self, batch: Tensor) -> Tensor:
        """What this rank has of a batch [texts, characters]."""
        return batch

    def whole(self) -> GPT | None:
        """The model in one piece, on the first rank; None on the others. All must call it."""
        return self.model

    def step(self, corpus: Corpus) -> None:
        """Train on the batch whose turn it is."""
        started = time.perf_counter()
        step = len(self.losses)
        ids, targets = batch_of(corpus, self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings)
        torch.manual_seed(seed_of(self.settings.seed, step))  # for dropout
        self.model.train()
        with autocast(self.settings):
            loss = self.model.loss(self.own(ids), self.own(targets), self.positions)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        # .item() waits for the GPU, so the time below is the whole step's.
        self.losses.append(self.ranks.total(loss.item())[0] / self.ranks.count)
        self.seconds.append(time.perf_counter() - started)

    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Record the mean loss over the characters of all batches."""
        self.model.eval()
        total = count = 0.0
        # Not inference_mode: the first forward makes the buffers that fully_shard then trains with.
        with torch.no_grad(), autocast(self.settings):
            for ids, targets in batches:
                own = self.own(targets)
                loss = self.model.loss(self.own(ids), own, self.positions)
                if own.numel():  # the last batch may have fewer texts than there are ranks
                    total += loss.item() * own.numel()
                    count += own.numel()
        total, count = self.ranks.total(total, count)
        self.validation[len(self.losses)] = total / count

    def save(self, out: Path) -> dict[str, Any]:
        """All that `load` needs to go on as if never interrupted: the state, or the name of a folder in `out`
        that has the tensors."""
        history = {"losses": self.losses, "validation": self.validation, "seconds": self.seconds}
        return self.tensors(out) | history

    def tensors(self, out: Path) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any], out: Path = Path()) -> None:
        """Go on from a state that was saved in the folder `out`."""
        if "parts" in state:
            load_parts(out / state["parts"], self.model, self.optimizer)
        else:
            self.load_whole(state)
        self.losses, self.validation = state["losses"], state["validation"]
        self.seconds = state["seconds"]

    def load_whole(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices, and leaves biases and norms alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99))


def learning_rate(step: int, settings: Settings) -> float:
    """A linear warm-up, then half a cosine down to a tenth."""
    warmup = math.ceil(WARMUP * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2)


def autocast(settings: Settings) -> AbstractContextManager[Any]:
    if settings.dtype == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(settings.device).type, torch.bfloat16)
