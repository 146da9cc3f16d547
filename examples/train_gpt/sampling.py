"""Text from a trained model, a character at a time."""

from __future__ import annotations

import torch

from .model import GPT
from .settings import Settings
from .text import Corpus
from .training import autocast


@torch.inference_mode()
def sample(
    model: GPT, corpus: Corpus, settings: Settings, prompt: str, length: int, temperature: float
) -> str:
    """The prompt and `length` characters after it, each drawn from softmax(logits / temperature).

    The same seed, in settings, draws the same text.
    """
    model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    ids = corpus.encode(prompt).tolist()
    for _ in range(length):
        seen = ids[-settings.context :]
        # Always a whole context: attention is causal, so what is beyond the last character does not matter,
        # and a compiled kernel sees one length only.
        window = torch.tensor([seen + [0] * (settings.context - len(seen))], device=settings.device)
        with autocast(settings):
            logits = model(window)[0, len(seen) - 1].float().cpu()
        ids.append(torch.multinomial((logits / temperature).softmax(dim=0), 1, generator=generator).item())
    return corpus.decode(ids)
