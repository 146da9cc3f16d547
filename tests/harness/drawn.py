"""Random calls of the oracle, a feature at a time or several together."""

import torch

from tilewise_reference import dropout_keep, masks, scores

from .exact import F64, random_qkv

EPS = torch.finfo(F64).eps


def close(actual, expected):
    """Apart by rounding: the longest sums here, of 420 pairs, add up some √420 roundings of numbers that are
    a few times as large as the largest result."""
    largest = max([1.0, *expected.detach().abs().flatten().tolist()])
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * EPS * largest)


def of_two(by_head, by_key):
    """s -> a² s² b + s b, a an element a head and b one a key: all second derivatives but that by b twice."""

    def a(index, x=by_head):
        return x[index[1]]

    def b(index, x=by_key):
        return x[index[3]]

    return scores.Score(
        lambda s, *index: a(index) ** 2 * s**2 * b(index) + s * b(index),
        lambda s, *index: 2 * a(index) ** 2 * s * b(index) + b(index),
        (
            scores.Parameter(
                by_head,
                lambda x, *index: a(index, x),
                lambda x, *index: x.sum(dim=(0, 2, 3)),
                lambda s, *index: 2 * a(index) * s**2 * b(index),
            ),
            scores.Parameter(
                by_key,
                lambda x, *index: b(index, x),
                lambda x, *index: x.sum(dim=(0, 1, 2)),
                lambda s, *index: a(index) ** 2 * s**2 + s,
            ),
        ),
        {
            ("s", "s"): lambda s, *index: 2 * a(index) ** 2 * b(index) + 0 * s,
            ("s", 0): lambda s, *index: 4 * a(index) * s * b(index),
            ("s", 1): lambda s, *index: 2 * a(index) ** 2 * s + 1,
            (0, 0): lambda s, *index: 2 * s**2 * b(index),
            (0, 1): lambda s, *index: 2 * a(index) * s**2,
        },
    )


class Draw:
    """Random tensors for the options of one call."""

    def __init__(self, q_heads, kv_heads, q_len, kv_len, batch=2, head_dim=3, value_dim=4):
        self.q_heads, self.q_len, self.kv_len, self.batch = q_heads, q_len, kv_len, batch
        self.qkv = random_qkv(batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, grad=True)
        self.lengths = q_len, kv_len
        self.generator = torch.Generator().manual_seed(1)
        self.pairs = batch, q_heads, q_len, kv_len

    def randn(self, *shape):
        return torch.randn(shape, dtype=F64, generator=self.generator).requires_grad_()

    def keep(self):
        keep = torch.rand(self.pairs, generator=self.generator) < 0.6
        keep[:, 1, 0] = False  # a row with no key
        keep[1, :, :, -1] = False  # a key that nobody sees
        return keep


FEATURES = {
    "causal": lambda d: {"mask": [masks.causal(*d.lengths)]},
    "top left": lambda d: {"mask": [masks.causal(*d.lengths, "top_left"), masks.padding(d.kv_len - 1, 9)]},
    "dense mask": lambda d: {"mask": [d.keep()]},
    "bias": lambda d: {"bias": d.randn(1, d.q_heads, 1, d.kv_len)},
    "bias first": lambda d: {"score": [scores.additive_bias(d.randn(d.batch, 1, d.q_len, 1))]},
    "alibi": lambda d: {"score": [scores.alibi(d.randn(d.q_heads), *d.lengths)]},
    "softcap": lambda d: {"score": [scores.softcap(1.5)]},
    "alibi by batch": lambda d: {"score": [scores.alibi(d.randn(2, d.q_heads), *d.lengths, "top_left")]},
    "table": lambda d: {"score": [scores.relative_position(d.randn(d.q_heads, 8), *d.lengths, 6)]},
    "table, one way": lambda d: {
        "score": [scores.relative_position(d.randn(d.q_heads, 4), *d.lengths, 6, False, "top_left")]
    },
    "square": lambda d: {
        "score": [
            scores.Score(
                lambda s, *index: s**2,
                lambda s, *index: 2 * s,
                second_derivatives={("s", "s"): lambda s, *index: torch.full_like(s, 2)},
            )
        ]
    },
    "of two": lambda d: {"score": [of_two(d.randn(d.q_heads), d.randn(d.kv_len))]},
    "number scale": lambda d: {"scale": -0.7},
    "scale": lambda d: {"scale": d.randn()},
    "cosine": lambda d: {"similarity": "cosine", "temperature": d.randn(d.q_heads)},
    "number temperature": lambda d: {"similarity": "cosine", "temperature": 3.0},
    "sink": lambda d: {"sink": d.randn(d.q_heads)},
    "dropout": lambda d: {"dropout_p": 0.3, "dropout_keep": dropout_keep(7, 0.3, d.pairs)},
}


def options_of(draw, features):
    """The options of several features: their masks and scores one after the other."""
    options = {}
    for feature in features:
        for name, value in FEATURES[feature](draw).items():
            options[name] = options.get(name, []) + value if isinstance(value, list) else value
    return options


def inputs_of(qkv, options):
    """The tensors that have a gradient, in the order of ``flat``."""
    named = [options.get(name) for name in ("bias", "scale", "temperature", "sink")]
    tables = [p.tensor for score in options.get("score", ()) for p in score.parameters]
    return [*qkv, *(t for t in named if isinstance(t, torch.Tensor)), *tables]


EVERYTHING = ["dense mask", "bias first", "alibi", "table", "softcap", "square", "bias", "scale", "cosine",
              "sink", "dropout"]  # fmt: skip
