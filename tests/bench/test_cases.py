"""Cases in words: no picture shows a name that is for commands only."""

import pytest

from bench.groups import GROUPS, comparisons
from bench.implementations import select
from bench.measure import blank
from bench.report.cases import case_labels, group_title, in_words, kind
from bench.report.page import write_report

from .synthetic import row, section


def sized(case: str, **sizes):
    return row("flex", 1.0, case, sizes=sizes)


def test_words_of_the_grid_are_those_of_the_rows_sizes():
    sizes = dict(batch=1, q_heads=2, kv_heads=2, q_len=64, kv_len=64, head_dim=128, value_dim=128)
    words = in_words(sized("paper-d128-full-512-tiny", **sizes))
    assert words == "head_dim 128, no mask, 64 tokens, batch 1, 2 heads"
    sizes |= dict(q_len=1, q_heads=1, kv_heads=1, value_dim=64)
    words = in_words(sized("llama3-8b-decode", **sizes))
    assert (
        words
        == "Llama 3 8B, writing one token, head_dim 128, value_dim 64, 1 query on 64 keys, batch 1, 1 head"
    )
    sizes = dict(batch=3, q_heads=4, kv_heads=2, q_len=64, kv_len=64, head_dim=128, value_dim=128, tokens=69)
    words = in_words(sized("packed-llama3-8b-mixed-tiny", **sizes))
    assert words == (
        "Llama 3 8B, packed in mixed lengths, head_dim 128, 69 tokens, 3 sequences of up to 64, "
        "4 heads on 2 key heads"
    )
    sizes = dict(batch=32, q_heads=8, kv_heads=4, q_len=1, kv_len=64, head_dim=128, value_dim=128)
    words = in_words(sized("cached-llama3-8b-decode-mixed-pages16", **sizes))
    assert words == (
        "Llama 3 8B, one row on a cache, mixed lengths, pages of 16, head_dim 128, 1 query on 64 keys, "
        "batch 32, 8 heads on 4 key heads"
    )
    assert kind("cached-narrow-decode-1x128k-tiny") == "4 key heads, one row on a cache"
    assert kind("packed-llama3-8b-dense") == "Llama 3 8B, equal lengths, not packed"
    assert in_words(sized("somebody-else")) == "" and kind("llama3-8b-somehow") == "llama3-8b-somehow"


@pytest.mark.parametrize("tiny", [False, True])
def test_every_case_of_every_group_has_words_and_a_label_of_its_own(tiny):
    (ours,) = select(["tilewise portable"])
    for group in GROUPS:
        assert group_title(group) != group
        rows = [blank(case, work, group, ours) for case, work in comparisons(group, tiny=tiny)]
        labels = case_labels(rows)
        assert len(set(labels.values())) == len(rows) == len(labels), group
        for one in rows:
            assert kind(one.case) != one.case and kind(one.case) in in_words(one)
            assert max(map(len, labels[one.key].split("\n"))) <= 34, labels[one.key]


def test_the_page_says_what_a_name_means(tmp_path):
    rows = [sized("feature-sink", q_len=8, kv_len=8), row("sdpa math", 2.0, "feature-sink", sizes={})]
    text = write_report([section(rows)], tmp_path).read_text()
    assert text.count("causal mask, sink, 8 tokens") == 1 and "Forward, as models call it." in text
    assert "| in words" not in write_report([section([row("flex", 1.0)])], tmp_path).read_text()
