"""Each mask against a double loop over its pairs, with its meaning written another way."""

import pytest
import torch

from tilewise_reference import masks

LENGTHS = [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1), (0, 3), (3, 0)]
ALIGNS = ["bottom_right", "top_left", -2, 3, torch.tensor([4, -1])]
B, H = 2, 3


def dense(mask, q_len, kv_len):
    """The mask on the index tensors that attention passes, as [B, H, q_len, kv_len]."""
    index = (
        torch.arange(B).reshape(B, 1, 1, 1),
        torch.arange(H).reshape(1, H, 1, 1),
        torch.arange(q_len).reshape(1, 1, q_len, 1),
        torch.arange(kv_len).reshape(1, 1, 1, kv_len),
    )
    kept = mask(*index)
    assert kept.dtype == torch.bool
    return kept.expand(B, H, q_len, kv_len)


def check(mask, rule, q_len, kv_len):
    """rule(b, h, i, j) -> bool on Python ints decides every pair by itself."""
    expected = torch.zeros(B, H, q_len, kv_len, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for i in range(q_len):
                for j in range(kv_len):
                    expected[b, h, i, j] = rule(b, h, i, j)
    assert torch.equal(dense(mask, q_len, kv_len), expected)


def is_causal(b, i, j, q_len, kv_len, align):
    """Bottom right: no fewer keys than queries follow. Top left: no more keys than queries precede."""
    if isinstance(align, str):
        return kv_len - 1 - j >= q_len - 1 - i if align == "bottom_right" else j <= i
    return j <= position(b, i, q_len, kv_len, align)


def position(b, i, q_len, kv_len, align):
    """The last key is the last query's under bottom right, the first key the first's under top left."""
    if isinstance(align, str):
        return kv_len - (q_len - i) if align == "bottom_right" else i
    return i + (align if isinstance(align, int) else int(align[b]))


@pytest.mark.parametrize("align", ALIGNS, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
class TestAligned:
    def test_causal(self, q_len, kv_len, align):
        mask = masks.causal(q_len, kv_len, align)
        check(mask, lambda b, h, i, j: is_causal(b, i, j, q_len, kv_len, align), q_len, kv_len)

    @pytest.mark.parametrize(
        ("left", "right"), [(0, 0), (1, 0), (2, 1), (0, 3), (None, 0), (1, None), (None, None)]
    )
    def test_window(self, q_len, kv_len, align, left, right):
        def rule(b, h, i, j):
            own = position(b, i, q_len, kv_len, align)
            first = -(10**6) if left is None else own - left
            last = 10**6 if right is None else own + right
            return j in range(first, last + 1)

        check(masks.window(left, right, q_len, kv_len, align), rule, q_len, kv_len)

    @pytest.mark.parametrize("lengths", [0, 2, torch.tensor([0, 3]), torch.tensor([4, 1], dtype=torch.int32)])
    def test_prefix(self, q_len, kv_len, align, lengths):
        def rule(b, h, i, j):
            length = lengths if isinstance(lengths, int) else int(lengths[b])
            return j < length or is_causal(b, i, j, q_len, kv_len, align)

        check(masks.prefix(lengths, q_len, kv_len, align), rule, q_len, kv_len)


def test_causal_pictures():
    """The two corners drawn out, for 2 queries and 4 keys and the other way round."""
    wide = {"bottom_right": ["###.", "####"], "top_left": ["#...", "##.."]}
    tall = {"bottom_right": ["..", "..", "#.", "##"], "top_left": ["#.", "##", "##", "##"]}
    for align in ALIGNS[:2]:
        for (q_len, kv_len), drawn in (((2, 4), wide[align]), ((4, 2), tall[align])):
            kept = dense(masks.causal(q_len, kv_len, align), q_len, kv_len)[0, 0]
            assert ["".join("#" if x else "." for x in row) for row in kept.tolist()] == drawn


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lens", [0, 2, 5, torch.tensor([1, 4]), torch.tensor([0, 5], dtype=torch.int32)])
def test_padding(side, lens):
    def rule(b, h, i, j):
        real = lens if isinstance(lens, int) else int(lens[b])
        slots = ["real"] * real + ["pad"] * (5 - real)
        return (slots if side == "right" else slots[::-1])[j] == "real"

    check(masks.padding(lens, 5, side), rule, 3, 5)


@pytest.mark.parametrize(
    ("q_ids", "kv_ids"),
    [
        ([0, 0, 1, 1, 1], None),
        ([[0, 0, 1, 1, 1], [3, 2, 2, 3, 3]], None),  # ids need not be sorted
        ([0, 1, 1], [0, 0, 1, 2, 1]),
        ([[0, 1, 1], [5, 5, 6]], [0, 0, 1, 5, 6]),
        ([0, 1, 1], [[0, 0, 1, 2, 1], [9, 9, 9, 9, 9]]),
    ],
)
def test_documents(q_ids, kv_ids):
    def at(ids, b, n):
        return ids[b][n] if isinstance(ids[0], list) else ids[n]

    keys = q_ids if kv_ids is None else kv_ids
    mask = masks.documents(torch.tensor(q_ids), None if kv_ids is None else torch.tensor(kv_ids))
    q_len, kv_len = torch.tensor(q_ids).shape[-1], torch.tensor(keys).shape[-1]
    check(mask, lambda b, h, i, j: at(q_ids, b, i) == at(keys, b, j), q_len, kv_len)


@pytest.mark.parametrize("shape", [(4,), (H, 4), (B, 1, 4), (B, H, 4), (1, H, 1), (1,)])
def test_intervals(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(-1, 5, shape, generator=generator)
    end = torch.randint(0, 8, (4,), generator=generator)  # some rows end before they start, or past the keys

    def rule(b, h, i, j):
        return int(start.expand(B, H, 4)[b, h, i]) <= j < int(end[i])

    check(masks.intervals(start, end), rule, 4, 6)


def test_masks_work_on_plain_index_tensors():
    """As a mask on a device asks: scalars for batch and head, a column of rows, a row of keys."""
    q_idx, kv_idx = torch.arange(3)[:, None], torch.arange(5)[None]
    batch, head = torch.tensor(1), torch.tensor(2)
    for mask in (
        masks.causal(3, 5),
        masks.prefix(torch.tensor([0, 2]), 3, 5),
        masks.padding(torch.tensor([0, 2]), 5),
        masks.documents(torch.tensor([[0, 1, 1], [0, 0, 1]]), torch.tensor([0, 0, 1, 1, 1])),
        masks.intervals(torch.tensor([0, 1, 2]), torch.tensor([[4], [3], [5]])),
    ):
        kept = mask(batch, head, q_idx, kv_idx).expand(3, 5)
        assert torch.equal(kept, dense(mask, 3, 5)[1, 2])


def test_errors():
    with pytest.raises(ValueError, match="align='center' must be"):
        masks.causal(3, 3, "center")
    with pytest.raises(ValueError, match="left=-1"):
        masks.window(-1, 0, 3, 3)
    with pytest.raises(ValueError, match="right=-2"):
        masks.window(None, -2, 3, 3)
    with pytest.raises(ValueError, match="side='top' must be"):
        masks.padding(3, 3, "top")
    with pytest.raises(ValueError, match="3 dimensions, at most 2"):
        dense(masks.documents(torch.zeros(1, 1, 3, dtype=torch.int64)), 3, 3)
