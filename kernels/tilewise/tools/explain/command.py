"""The command `tilewise explain`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, cast

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tilewise_reference.cases import (
    CACHED_CASES,
    CASES,
    FEATURE_CASES,
    LONG_CASES,
    SHORT_CASES,
    Case,
    Features,
    find_case,
    paper_grid,
)

from ...parts.masks.dense import Dense
from ..inputs import case_inputs, packed_offsets
from .explain import Explanation
from .explain import explain as explain_call
from .findings import Work
from .text import Section, is_number, sections, table, title

INTERVAL_FEATURES = ("causal", "window", "documents")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
GROUPS: dict[str, tuple[Case, ...]] = {
    "models": CASES,
    "features": FEATURE_CASES,
    "short sequences": SHORT_CASES,
    "for several GPUs": LONG_CASES,
    "keys and values in a cache": CACHED_CASES,
    "the papers' grid": tuple(paper_grid()),
}


def explain(
    case: Annotated[str | None, typer.Option(help="A named case; --list shows them.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="The GPU to explain it for. [default: this machine's, else H200]")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="With the backward.")] = False,
    q: Annotated[str | None, typer.Option(help="batch,heads,length,head_dim of the queries.")] = None,
    kv: Annotated[
        str | None, typer.Option(help="batch,heads,length,dim of keys and values. [default: as --q]")
    ] = None,
    value_dim: Annotated[int | None, typer.Option(help="The values' dim, where it differs.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32, with --q.")] = "bf16",
    causal: Annotated[bool, typer.Option("--causal", help="The last query at the last key.")] = False,
    window: Annotated[
        str | None, typer.Option(help="left,right: keys before and after the query's own; - is no limit.")
    ] = None,
    documents: Annotated[int | None, typer.Option(help="Packed documents of equal length.")] = None,
    bool_mask: Annotated[bool, typer.Option("--bool-mask", help="A dense mask [q_len, kv_len].")] = False,
    bias: Annotated[
        str | None, typer.Option(help="batch,heads,q_len,kv_len of a bias, 1 to broadcast.")
    ] = None,
    softcap: Annotated[float | None, typer.Option(help="cap · tanh(score / cap).")] = None,
    sink: Annotated[bool, typer.Option("--sink", help="A logit a head.")] = False,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes.")] = False,
    cosine: Annotated[bool, typer.Option("--cosine", help="Cosine similarity.")] = False,
    dropout: Annotated[float | None, typer.Option(help="Probability of dropping a pair.")] = None,
    impl: Annotated[str | None, typer.Option(help="Ask for portable, hopper or torch.")] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="Shared by so many GPUs, or on a mesh: 4x8 is 4 groups of 8. Needs --link."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="What a GPU sends and receives at once, as 450GB/s; on a mesh 50GB/s,450GB/s."),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="Of rows over ranks: zigzag or contiguous. [default: zigzag]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="List the named cases.")] = False,
) -> None:
    """Say what a call will do and what bounds it on a GPU, without running it.

    Give a named case, or sizes: tilewise explain --q 2,16,4096,128 --kv 2,4,4096,128 --causal
    """
    console = Console(highlight=False)
    if list_cases:
        print_cases(console)
        return
    asked = dict(
        causal="bottom_right" if causal else None, window=window, documents=documents,
        bool_mask=bool_mask or None, bias=bias, softcap=softcap, sink=sink or None, alibi=alibi or None,
        similarity="cosine" if cosine else None, dropout=dropout,
    )  # fmt: skip
    features = {name: value for name, value in asked.items() if value is not None}
    try:
        if case is None:
            chosen = case_of_sizes(q, kv, value_dim, dtype, features)
        elif q is not None or kv is not None or value_dim is not None or features:
            raise ValueError(
                "--case says everything but --gpu, --training, --impl and what goes with --ranks; leave the "
                "others out"
            )
        else:
            chosen = find_case(case)
        call = call_of(chosen, training, impl) | {"gpu": gpu}
        if ranks is not None:
            from .ranks.command import planned  # it imports what is distributed, for which others do not wait

            found, heading, said = planned(call, ranks, link, order)
        elif link is not None or order is not None:
            raise ValueError("--link and --order go with --ranks")
        else:
            explained = explain_call(**call)
            found, heading, said = explained.to_dict(), title(explained), sections(explained)
    except (ValueError, NotImplementedError) as error:
        typer.echo(f"tilewise explain: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps({"case": chosen.name, **found}, indent=1))
        return
    if case is not None:
        console.print(Text(f"{chosen.name}: {chosen.provenance}"))
    print_sections(console, heading, said)


def case_of_sizes(
    q: str | None, kv: str | None, value_dim: int | None, dtype: str, features: dict[str, Any]
) -> Case:
    """The call that --q and the options beside it describe."""
    if q is None:
        raise ValueError("give --case NAME (--list shows them) or sizes: --q batch,heads,length,head_dim")
    batch, q_heads, q_len, head_dim = numbers("--q", q, 4)
    kv_batch, kv_heads, kv_len, kv_dim = (
        numbers("--kv", kv, 4) if kv is not None else (batch, q_heads, q_len, head_dim)
    )
    if (kv_batch, kv_dim) != (batch, head_dim):
        raise ValueError(f"--kv {kv} must have the batch ({batch}) and the head_dim ({head_dim}) of --q {q}")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} must be one of {', '.join(DTYPES)}")
    if "window" in features:
        features["window"] = window_of(features["window"])
    if "bias" in features:
        features["bias"] = numbers("--bias", features["bias"], 4)
    if "documents" in features and q_len != kv_len:
        raise ValueError(f"--documents needs as many keys as queries, not {kv_len} and {q_len}")
    values = head_dim if value_dim is None else value_dim
    return Case(
        "by sizes", batch, q_heads, kv_heads, q_len, kv_len, head_dim, values, DTYPES[dtype], "prefill",
        "the command line", cast(Features, features),
    )  # fmt: skip


def numbers(option: str, given: str, count: int) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in given.split(","))
    except ValueError:
        found = ()
    if len(found) != count or min(found) < 0:
        raise ValueError(f"{option} {given} must be {count} whole numbers, as in 2,16,4096,128")
    return found


def window_of(given: str) -> tuple[int | None, int | None]:
    words = given.split(",")
    if len(words) != 2 or not all(word == "-" or word.isdigit() for word in words):
        raise ValueError(f"--window {given} must be left,right, as in 511,0, or - for no limit on a side")
    left, right = (None if word == "-" else int(word) for word in words)
    return left, right


def explain_case(case: Case, gpu: str | None, training: bool, impl: str | None = None) -> Explanation:
    """The explanation of a case."""
    return explain_call(gpu=gpu, **call_of(case, training, impl))


def call_of(case: Case, training: bool, impl: str | None = None) -> dict[str, Any]:
    """What `explain` takes of a case, with q, k and v on the device meta: nothing of their size is stored."""
    inputs = case_inputs(case, "meta", gradients=training)
    arguments = dict(inputs.arguments)
    if case.lengths is not None:  # what is visited stands in them
        arguments["q_offsets"] = packed_offsets(case.lengths, "cpu")
    if case.cache is not None:
        arguments["kv_lens"] = torch.tensor(case.cache, dtype=torch.int32)
    if "documents" in case.features:
        # What a row sees stands in the ids, so these need contents; without a batch, there is little else.
        structured = {name: value for name, value in case.features.items() if name in INTERVAL_FEATURES}
        counted = case_inputs(replace(case, batch=0, features=cast(Features, structured)), "cpu")
        given = arguments["mask"].parts()
        arguments["mask"] = counted.arguments["mask"]
        for part in given:
            if isinstance(part, Dense):
                arguments["mask"] = arguments["mask"] & part
    work: Work = "training" if training else "forward"
    return arguments | dict(q=inputs.q, k=inputs.k, v=inputs.v, work=work, impl=impl)


def print_cases(console: Console) -> None:
    """The named cases, one a line below the line that says what they are."""
    for name, cases in GROUPS.items():
        lines = table(
            ("case", "q", "k, v", "dtype"),
            [
                (
                    case.name,
                    f"{case.batch},{case.q_heads},{case.q_len},{case.head_dim}",
                    f"{case.batch},{case.kv_heads},{case.kv_len},{case.value_dim}",
                    case.dtype,
                )
                for case in cases
            ],
        )
        console.print(Text(name, style="bold italic"))
        console.print(Text(f"  {lines[0]}", style="italic"))
        said = ""
        for case, line in zip(cases, lines[1:], strict=True):
            if case.provenance != said:
                said = case.provenance
                console.print(Padding(Text(said, style="dim"), (0, 0, 0, 1)))
            console.print(Text(f"  {line.rstrip()}"), no_wrap=True)
        console.print()


def print_sections(console: Console, heading: str, found: list[Section]) -> None:
    console.print(Text(heading, style="bold"))
    for section in found:
        console.print()
        console.print(Text(section.title, style="bold italic"))
        for sentence in section.sentences:
            console.print(Padding(Text(sentence), (0, 0, 0, 2)))
        if section.rows:
            shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            cells = [section.heading, *section.rows]
            for i, column in enumerate(section.heading):
                shown.add_column(column, justify="right" if is_number(i, cells) else "left")
            for row in section.rows:
                shown.add_row(*map(Text, row))
            console.print(shown)
