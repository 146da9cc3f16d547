"""What stands behind aten's flash attention ops takes what their schemas give, and names what it refuses."""

import inspect

import pytest
import torch

from tilewise.drop_in import flash_impl

aten = torch.ops.aten


@pytest.mark.oldest
def test_the_signatures_take_what_the_schemas_give():
    for name, function in flash_impl.OPS.items():
        if not hasattr(aten, name):
            continue
        schema = getattr(aten, name).default._schema.arguments
        ours = inspect.signature(function).parameters
        assert [a.name for a in schema if not a.kwarg_only] == [
            p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ], name
        named = {a.name for a in schema if a.kwarg_only}
        if "options" in ours:  # handed on
            ours = {
                **inspect.signature(flash_impl.as_request).parameters,
                **inspect.signature(flash_impl.forward_into).parameters,
            }
        assert named <= ours.keys(), name
        assert all(ours[a.name].default == a.default_value for a in schema if a.kwarg_only), name


NUMBERS = dict(cum_seq_q=None, cum_seq_k=None, max_q=20, max_k=20)
OTHERS = dict(dropout_p=0.0, is_causal=False, return_debug_mask=False)
WRONG = [
    (dict(return_debug_mask=True), NotImplementedError, "return_debug_mask=True"),
    (dict(dropout_p=1.5), ValueError, "dropout_p=1.5"),
    (dict(scale=float("inf")), ValueError, "scale=inf"),
    (dict(window_size_left=-2), ValueError, "window_size_left=-2"),
    (dict(window_size_right=-7), ValueError, "window_size_right=-7"),
    (dict(cum_seq_k=[0, 20]), ValueError, "cum_seq_q=None"),
    (dict(query=(20, 4, 8), cum_seq_q=[0, 20]), ValueError, "key.shape=(2, 20, 2, 8) must be [tokens, heads"),
    (dict(query=(20, 4)), ValueError, "query.shape=(20, 4) must be [batch, length, heads, dim]"),
    (dict(key=(2, 20, 3, 8)), ValueError, "4 heads of queries must be a multiple of 3"),
    (dict(key=(2, 20, 2, 4)), ValueError, "head_dim of query: 8, key: 4"),
    (dict(value=(2, 20, 2, 4)), ValueError, "value.shape=(2, 20, 2, 4) must end with query's dim, 8"),
    (dict(value=(2, 19, 2, 8)), ValueError, "key: 20, value: 19"),
    (dict(seqused_k=[1]), ValueError, "seqused_k.shape=(1,)"),
    (dict(seqused_k=1), ValueError, "seqused_k=1"),
    (dict(alibi_slopes=(3,)), ValueError, "alibi_slopes.shape=(3,)"),
    (dict(alibi_slopes=[1, 2, 3, 4]), ValueError, "alibi_slopes.dtype=torch.int32"),
    (dict(block_table=[[1, 0], [0, 1]]), ValueError, "seqused_k=None"),
    (dict(block_table=[1, 0]), ValueError, "block_table.shape=(2,) must be [2, max_pages]"),
    (dict(block_table=[[1, 0], [0, 1]], seqused_k=[1, 1], num_splits=-1), ValueError, "num_splits=-1"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "said"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_refusals_name_the_argument_and_its_value(wrong, error, said, device):
    shapes = dict(query=(2, 20, 4, 8), key=(2, 20, 2, 8), value=(2, 20, 2, 8)) | NUMBERS | OTHERS | wrong

    def made(given):
        if isinstance(given, tuple):
            return torch.randn(given, device=device)
        return torch.tensor(given, dtype=torch.int32, device=device) if isinstance(given, list) else given

    with pytest.raises(error) as raised:
        flash_impl.flash_forward(**{name: made(given) for name, given in shapes.items()})
    assert said in str(raised.value)
