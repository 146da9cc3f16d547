"""Three ways to write on, each a function of a model, prompts and how many characters to add to each.

Each takes the likeliest character, of all prompts at once, and leaves the choice on the device.

    dense    logits = model(whole text), for every character again
    cached   logits = model(new characters), whose keys and values are kept, in one piece for each prompt
    paged    the same, but they are kept in pages, which are taken as they are needed
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from train_gpt.model import GPT, Attend

from tilewise.nn import KVCache, PagedKVCache

Prompts = list[list[int]]  # of any lengths, none empty


def dense(model: GPT, prompts: Prompts, length: int) -> Tensor:
    """[prompts, length]: what comes after each prompt."""
    device = model.tokens.weight.device
    lens = torch.tensor([len(prompt) for prompt in prompts], device=device)
    rows, longest = torch.arange(len(prompts), device=device), max(map(len, prompts))
    # Attention is causal, so what fills the shorter ones up does not matter.
    text = torch.zeros(len(prompts), longest + length, dtype=torch.int64, device=device)
    for row, prompt in zip(text, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    for step in range(length):
        logits = model(text[:, : longest + step])[rows, lens + step - 1]
        text[rows, lens + step] = logits.argmax(dim=-1)
    return text.gather(1, lens[:, None] + torch.arange(length, device=device))


def cached(model: GPT, prompts: Prompts, length: int) -> Tensor:
    """The same, over a `KVCache` a layer."""
    longest = max(map(len, prompts))
    parts = [block.attention for block in model.blocks]
    caches = [
        KVCache(len(prompts), part.kv_heads, longest + length, part.head_dim, **options_of(model))
        for part in parts
    ]
    ids, positions, offsets = in_a_row(model, prompts)
    attends = [packed(partial(cache.attend, q_offsets=offsets, max_new=longest)) for cache in caches]
    found = [model(ids, positions, attends)[0, offsets[1:] - 1].argmax(dim=-1)]
    while len(found) < length:
        positions = caches[0].lens[:, None].clone()
        logits = model(found[-1][:, None], positions, [cache.attend for cache in caches])
        found.append(logits[:, 0].argmax(dim=-1))
    return torch.stack(found, dim=1)


def paged(model: GPT, prompts: Prompts, length: int, pages: int, page_size: int) -> Tensor:
    """The same, over a `PagedKVCache` for all layers. Raises CacheFull where there are too few pages."""
    part, layers = model.blocks[0].attention, len(model.blocks)
    cache = PagedKVCache(pages, page_size, part.kv_heads, part.head_dim, layers=layers, **options_of(model))
    sequences = [cache.allocate() for _ in prompts]
    ids, positions, offsets = in_a_row(model, prompts)
    step = cache.step(sequences, [len(prompt) for prompt in prompts])
    attends = [packed(partial(step.attend, layer=layer)) for layer in range(layers)]
    found = [model(ids, positions, attends)[0, offsets[1:] - 1].argmax(dim=-1)]
    while len(found) < length:
        step = cache.step(sequences)
        attends = [partial(step.attend, layer=layer) for layer in range(layers)]
        logits = model(found[-1][:, None], step.kv_lens[:, None], attends)
        found.append(logits[:, 0].argmax(dim=-1))
    return torch.stack(found, dim=1)


def pages_for(prompts: Prompts, length: int, page_size: int) -> int:
    """How many pages `paged` takes: the last character that is written is nobody's key."""
    return sum(-(-(len(prompt) + length - 1) // page_size) for prompt in prompts)


def in_a_row(model: GPT, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts behind one another: ids and positions [1, characters], and offsets [prompts + 1]."""
    device = model.tokens.weight.device
    ids = [each for prompt in prompts for each in prompt]
    positions = [position for prompt in prompts for position in range(len(prompt))]
    offsets = list(accumulate(map(len, prompts), initial=0))
    rows = torch.tensor([ids, positions], device=device)
    return rows[:1], rows[1:], torch.tensor(offsets, device=device)


def packed(attend: Attend) -> Attend:
    """An attend of packed rows, [tokens, heads, dim], for a batch of one with the same rows."""

    def of_heads(q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> Tensor:
        return attend(*(x[0].transpose(0, 1) for x in (q, k, v)), **arguments).transpose(0, 1)[None]

    return of_heads


def options_of(model: GPT) -> dict[str, object]:
    weight = model.tokens.weight
    return {"dtype": weight.dtype, "device": weight.device}
