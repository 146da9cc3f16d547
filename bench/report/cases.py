"""What is a case, in words? A name such as `paper-d128-full-512` is for commands; pictures say what it is."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from ..results import Row

WIDTH = 34  # characters of a label's line
SHRUNK = ("-tiny", "-shortened")  # the sizes of the row say how far

GROUPS = {
    "forward grid": "Forward, on the grid of FlashAttention's papers",
    "backward grid": "Backward, on the grid of FlashAttention's papers",
    "short forward": "Forward, on short sequences",
    "models forward": "Forward, as models call it",
    "models backward": "Backward, as models call it",
    "packed forward": "Forward, on packed sequences",
    "packed backward": "Backward, on packed sequences",
    "decode": "Forward, on keys and values in a cache",
    "features forward": "Forward, with one feature at a time",
    "features backward": "Backward, with one feature at a time",
    "host": "The host's work in a call",
    "cold start": "First call, with nothing compiled yet",
    "second derivatives": "Second derivatives, and forward mode",
    "statistics": "Forward, with what the softmax knows",
    "fp8": "Forward in fp8, beside bf16",
    "quantize": "Making fp8 numbers of q, k and v",
}
MASKS = {"full": "no mask", "causal": "causal mask"}
FEATURES = {
    "bool-mask": "boolean mask",
    "bool-mask-grouped": "boolean mask, grouped queries",
    "bias-gradient": "bias that gets a gradient",
    "documents": "causal mask, packed documents",
    "window": "causal mask, window",
    "softcap": "causal mask, softcap",
    "sink": "causal mask, sink",
    "alibi": "causal mask, ALiBi",
    "dropout": "causal mask, dropout",
}
HOST = {"plain": "no mask", "causal": "causal mask", "documents-bias": "packed documents and a bias"}
MODELS = {
    "llama3-8b": "Llama 3 8B",
    "narrow": "4 key heads",
    "llama3-70b": "Llama 3 70B",
    "llama3.2-1b": "Llama 3.2 1B",
    "llama2-7b": "Llama 2 7B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-0.6b": "Qwen3-0.6B",
    "gemma2-2b": "Gemma 2 2B",
    "gemma2-27b": "Gemma 2 27B",
    "gpt-oss-20b": "gpt-oss-20b",
    "deepseek-v3": "DeepSeek-V3",
    "falcon-7b": "Falcon-7B",
    "bloom-7b1": "BLOOM-7B1",
    "modernbert-base": "ModernBERT-base",
    "minilm-l6": "MiniLM-L6",
    "vit-l16": "ViT-L/16",
    "swinv2-b": "Swin-v2-B",
    "t5-base": "T5-base",
    "whisper-large": "Whisper large",
    "dit-xl2": "DiT-XL/2",
    "flux1": "FLUX.1",
    "alphafold2": "AlphaFold 2",
    "beginner": "beginner's example",
}
PARTS = {  # what follows a model's name
    "prefill": "reading a prompt",
    "chunk": "reading a chunk of a prompt",
    "decode": "writing one token",
    "training": "training",
    "encoder": "encoder",
    "decoder": "decoder",
    "global": "layer without window",
    "local": "layer with a window",
    "window16": "windows of 16 × 16",
    "cross": "cross-attention",
    "triangle": "triangle attention",
    "article": "one head",
}
PACKED = {
    "equal": "packed in equal lengths",
    "dense": "equal lengths, not packed",
    "mixed": "packed in mixed lengths",
}
CACHED = {
    "decode": "one row on a cache",
    "drafts": "some rows on a cache",
    "chunk": "a chunk of rows on a cache",
}


def group_title(group: str) -> str:
    """What the group compares; its own name where nobody has put it into words."""
    return GROUPS.get(group, group)


def kind(name: str) -> str:
    """What sets the case apart, without its sizes: "head_dim 128, no mask", "Llama 3 8B, training". A name
    that is none of ours comes back as it is."""
    for suffix in SHRUNK:
        name = name.removesuffix(suffix)
    if grid := re.fullmatch(r"paper-d(\d+)-(full|causal)(-\d+)?", name):
        return f"head_dim {grid[1]}, {MASKS[grid[2]]}"
    if short := re.fullmatch(r"short-d(\d+)(-\d+)?", name):
        return f"head_dim {short[1]}, no mask"
    family, _, rest = name.partition("-")
    if family == "feature" and rest in FEATURES:
        return FEATURES[rest]
    if family == "host" and rest.removesuffix("-training") in HOST:
        return HOST[rest.removesuffix("-training")]
    model, _, how = rest.rpartition("-")
    if family == "packed" and model in MODELS and how in PACKED:
        return f"{MODELS[model]}, {PACKED[how]}"
    if cached := re.fullmatch(r"cached-(.+)-([a-z]+)-(\d+x\d+k|mixed)(?:-pages(\d+))?", name):
        model, how, length, page = cached.groups()
        if model in MODELS and how in CACHED:
            more = [", mixed lengths"] * (length == "mixed") + [f", pages of {page}"] * bool(page)
            return f"{MODELS[model]}, {CACHED[how]}{''.join(more)}"
    for model, words in MODELS.items():
        parts = name.removeprefix(f"{model}-").split("-")
        if name.startswith(f"{model}-") and all(part in PARTS for part in parts):
            return ", ".join([words, *(PARTS[part] for part in parts)])
    return name


def work_words(row: Row) -> str:
    """What is timed, as a part of a label: "forward, recorded for the backward"."""
    recorded = row.work == "host forward" and row.case.endswith("-training")
    return row.work.removeprefix("host ") + (", recorded for the backward" if recorded else "")


def sizes(row: Row, head_dim: bool = True) -> str:
    """ "512 tokens, batch 32, 16 heads", with head_dim before it unless that has been said; empty for a row
    without sizes."""
    size = row.sizes
    parts = []
    if head_dim and "head_dim" in size:
        parts.append(f"head_dim {size['head_dim']}")
    if size.get("value_dim", size.get("head_dim")) != size.get("head_dim"):
        parts.append(f"value_dim {size['value_dim']}")
    q_len, kv_len = size.get("q_len"), size.get("kv_len")
    if q_len is not None and kv_len is not None:
        tokens = _count(kv_len, "token")
        parts.append(tokens if q_len == kv_len else f"{_count(q_len, 'query')} on {_count(kv_len, 'key')}")
    if "tokens" in size:
        parts[-1] = (
            f"{_count(size['tokens'], 'token')}, {_count(size['batch'], 'sequence')} of up to {kv_len}"
        )
    elif "batch" in size:
        parts.append(f"batch {size['batch']}")
    heads, kv_heads = size.get("q_heads"), size.get("kv_heads")
    if heads is not None:
        shared = "" if kv_heads in (None, heads) else f" on {_count(kv_heads, 'key head')}"
        parts.append(_count(heads, "head") + shared)
    return ", ".join(parts)


def describe(row: Row) -> tuple[str, str]:
    """Two short lines: what sets the case apart, and its sizes."""
    first = kind(row.case)
    return first, sizes(row, head_dim="head_dim" not in first)


def in_words(row: Row) -> str:
    """The case in one line; empty where that would be its name again."""
    said = ", ".join(filter(None, describe(row)))
    return "" if said == row.case else said


def case_labels(rows: Iterable[Row]) -> dict[tuple[str, str, str], str]:
    """A label of a few short lines for each case of a group: what it is, with the work where the group has
    several, then its sizes."""
    rows = list(rows)
    several = len({row.work for row in rows}) > 1
    labels = {}
    for row in rows:
        first, second = describe(row)
        first += f": {work_words(row)}" if several else ""
        labels[row.key] = "\n".join([*_wrapped(first), *_wrapped(second)])
    return labels


def _wrapped(text: str) -> list[str]:
    """Lines of at most WIDTH characters where that can be, broken after commas and colons alone."""
    whole = re.sub(r"(?<![,:]) ", "\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(whole, WIDTH, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def extent(labels: Iterable[str]) -> tuple[int, int]:
    """Characters of the longest line of any label, and lines of the highest."""
    lines = [label.split("\n") for label in labels]
    return max(len(line) for label in lines for line in label), max(map(len, lines))


def _count(number: int, noun: str) -> str:
    plural = {"query": "queries"}.get(noun, noun + "s")
    return f"{number} {noun if number == 1 else plural}"
