"""Masks of Transformers as masks of tilewise: the same pairs as the bool tensor that Transformers makes."""

import inspect
import itertools

import pytest
import torch
import transformers.masking_utils as library
from transformers.masking_utils import sdpa_mask

from harness.hf_models import padded
from tilewise import Causal, Dense, Documents, Intervals, Padding, Window
from tilewise.integrations.transformers import known, masks
from tilewise.integrations.transformers.masks import ModelMask, model_mask
from tilewise.parts.shape import Shape

BATCH, LENGTH = 2, 11
REMAP = getattr(library, "remap_positions_for_packed_sequence", None)  # not there in the oldest version


def pairs_of(made: ModelMask) -> torch.Tensor:
    """The pairs that a mask keeps, by the twins of its parts: [batch, 1, q_len, kv_len]."""
    batch, _, q_len, kv_len = made.shape
    shape = Shape(batch, 1, 1, q_len, kv_len, 8, 8)
    index = torch.meshgrid(*(torch.arange(n) for n in (batch, 1, q_len, kv_len)), indexing="ij")
    keep = torch.ones(made.shape, dtype=torch.bool)
    for part in () if made.mask is None else made.mask.parts():
        assert not part.misfits(shape)
        keep = keep & part.twin(shape)(*index)
    return keep


def wanted(**arguments):
    return sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)


def parts_of(made: ModelMask) -> list[type]:
    return [] if made.mask is None else [type(part) for part in made.mask.parts()]


def functions():
    """Every factory's functions, and what masks of tilewise are made of them."""
    ids = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4, [0] * 11])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3], list(range(11))])
    padding = torch.tensor([0, 3])
    apart = library.packed_sequence_mask_function(ids)

    def packed(function):
        return library.and_masks(REMAP(function, positions) if REMAP else function, apart)

    sliding, both_sides = library.sliding_window_causal_mask_function(4), 3
    return {
        "causal": (library.causal_mask_function, [Causal]),
        "bidirectional": (library.bidirectional_mask_function, []),
        "window": (sliding, [Causal, Window]),
        "window to both sides": (
            library.sliding_window_bidirectional_mask_function(both_sides), [Window],
        ),
        "chunks": (library.chunked_causal_mask_function(3, padding), [Causal, Intervals]),
        "packed, causal": (packed(library.causal_mask_function), [Causal, Documents]),
        "packed, window": (packed(sliding), [Causal, Window, Documents]),
        "nested": (library.and_masks(sliding, library.and_masks(apart)), [Causal, Window, Documents]),
    }  # fmt: skip


SQUARE = dict(q_length=LENGTH, kv_length=LENGTH)
CACHED = {
    "square": SQUARE,
    "a cache that grows": dict(q_length=3, kv_length=LENGTH, q_offset=LENGTH - 3),
    "one token": dict(q_length=1, kv_length=LENGTH, q_offset=LENGTH - 1),
    "a static cache": dict(q_length=3, kv_length=LENGTH, q_offset=4),
    "a static cache, its offset on the device": dict(q_length=3, kv_length=LENGTH, q_offset=torch.tensor(4)),
    "a cache of a window": dict(q_length=2, kv_length=6, q_offset=9, kv_offset=5),
    "a cache of a window, on the device": dict(
        q_length=2, kv_length=6, q_offset=torch.tensor([9]), kv_offset=5
    ),
    "more keys than seen": dict(q_length=2, kv_length=LENGTH + 4, q_offset=3),
}


IN_SQUARES = ("packed, causal", "packed, window", "nested")  # Transformers makes them of no others
SIDES = (None, "none", "left", "right", "torn", "empty")


@pytest.mark.oldest
@pytest.mark.parametrize(
    "name, sizes",
    [(name, sizes) for name in functions() for sizes in (["square"] if name in IN_SQUARES else CACHED)],
)
def test_same_pairs(name, sizes):
    function, parts = functions()[name]
    for side in SIDES:
        real = None if side is None else padded(side).bool()
        if side == "empty":
            real[1] = False
        given = dict(batch_size=BATCH, **CACHED[sizes], mask_function=function, attention_mask=real)
        made = model_mask(**given)
        assert made.shape == wanted(**given).shape
        assert torch.equal(pairs_of(made), wanted(**given)), side
        assert parts_of(made)[: len(parts)] == parts
        of_padding = parts_of(made)[len(parts) :]
        if sizes == "square":
            assert of_padding == OF_PADDING[side], side
        assert Dense not in of_padding or side == "torn"


OF_PADDING = {  # at the right end, at the left end, holes
    None: [],
    "none": [],
    "left": [Padding],
    "right": [Padding],
    "torn": [Padding, Padding, Dense],
    "empty": [Padding, Padding],
}


@pytest.mark.parametrize("name", ["packed, window", "chunks", "window to both sides"])  # all the factories
def test_traced_without_looking_at_padding(name):
    """torch.compile, fullgraph: the host may not read what is padding, and the pairs are the same."""
    function, _ = functions()[name]
    real = padded("torn").bool()

    @torch.compile(backend="eager", fullgraph=True)
    def kept(real):
        made = model_mask(batch_size=BATCH, **SQUARE, mask_function=function, attention_mask=real)
        return pairs_of(made)

    want = wanted(batch_size=BATCH, **SQUARE, mask_function=function, attention_mask=real)
    assert torch.equal(kept(real), want)


def test_every_factory_is_known():
    """A function of Transformers that makes masks, and is neither known nor known to be a bool tensor, is
    new: it wants a look."""
    made = {
        name
        for name, function in vars(library).items()
        if inspect.isfunction(function) and function.__module__ == library.__name__
        and (name.endswith(("_overlay", "_mask_function", "_masks")) or name.startswith("remap_"))
    }  # fmt: skip
    compositions = {
        "sliding_window_causal_mask_function", "sliding_window_bidirectional_mask_function",
        "chunked_causal_mask_function",
    }  # fmt: skip
    plain = {"causal_mask_function", "bidirectional_mask_function"}
    tensors = {"or_masks", "blockwise_overlay", "padding_mask_function", "add_offsets_to_mask_function"}
    assert made - compositions - plain - tensors <= set(known.TAGGED)


def test_an_unknown_function_becomes_a_tensor_and_says_so(recwarn):
    """What it is joined to with "and" stays structured, so that tiles are skipped; "or" leaves nothing."""
    masks.warned.clear()

    def every_other(batch, head, q_idx, kv_idx):
        return (q_idx + kv_idx) % 2 == 0

    function = library.and_masks(library.causal_mask_function, every_other)
    made = model_mask(batch_size=BATCH, **SQUARE, mask_function=function)
    assert parts_of(made) == [Causal, Dense]
    assert torch.equal(pairs_of(made), wanted(batch_size=BATCH, **SQUARE, mask_function=function))
    assert [str(w.message) for w in recwarn if "every_other" in str(w.message)]

    joined = library.or_masks(library.causal_mask_function, every_other)
    for use_vmap, real in itertools.product((False, True), (None, padded("left").bool())):
        given = dict(batch_size=BATCH, **SQUARE, mask_function=joined, attention_mask=real, use_vmap=use_vmap)
        made = model_mask(**given)
        assert parts_of(made) == ([Dense] if real is None else [Padding, Dense])
        assert torch.equal(pairs_of(made), wanted(**given))
    model_mask(batch_size=BATCH, **SQUARE, mask_function=joined)
    assert len([w for w in recwarn if "or_mask" in str(w.message)]) == 1  # once


if REMAP is not None:

    def test_remapped_positions_alone_are_not_taken_for_a_causal_mask(recwarn):
        """Without what keeps the sequences apart they say something else: a key of an earlier sequence whose
        position is low enough is seen."""
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]]).expand(BATCH, -1)
        remapped = REMAP(library.causal_mask_function, positions)
        for function in (remapped, library.and_masks(remapped, library.bidirectional_mask_function)):
            made = model_mask(batch_size=BATCH, **SQUARE, mask_function=function)
            assert parts_of(made) == [Dense]
            assert torch.equal(pairs_of(made), wanted(batch_size=BATCH, **SQUARE, mask_function=function))


def test_what_was_made_in_advance_stays():
    """generate() makes the mask of a static cache first and gives it to the model, which asks again."""
    made = model_mask(batch_size=BATCH, **SQUARE)
    assert model_mask(batch_size=BATCH, **SQUARE, attention_mask=made, dtype=torch.float32) is made


@pytest.mark.parametrize("name", functions())
def test_moved_to_another_device(name):
    """A model that lies on several devices moves its mask from layer to layer."""
    function, parts = functions()[name]
    given = dict(batch_size=BATCH, **SQUARE, mask_function=function)
    made = model_mask(**given, attention_mask=padded("left").bool())
    moved = made.to("meta")
    assert moved.device.type == "meta" and moved.shape == made.shape and made.to("cpu") is made
    assert parts_of(moved)[: len(parts)] == parts
    tensors = [tensor for part in moved.mask.parts() for tensor in part.tensors().values()]
    assert tensors and all(tensor.is_meta for tensor in tensors)


def test_an_argument_that_it_does_not_know():
    with pytest.raises(TypeError, match="gives a mask block_size=, which tilewise does not know"):
        model_mask(batch_size=BATCH, **SQUARE, block_size=128)


def test_a_model_that_reads_its_mask_as_a_tensor():
    made = model_mask(batch_size=BATCH, **SQUARE)
    for use in (lambda: made[:, :, :, :4], lambda: made + torch.zeros(1), lambda: torch.zeros(1) + made):
        with pytest.raises(TypeError, match=r"AttentionInterface, so tilewise cannot answer them.*'eager'"):
            use()
