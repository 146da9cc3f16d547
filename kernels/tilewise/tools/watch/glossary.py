"""The variables of the kernels that the page shows: a symbol, and what it is."""

from __future__ import annotations

GLOSSARY: dict[str, tuple[str, str]] = {
    "q_idx": ("i", "the rows of queries of this tile, by their number in the sequence"),
    "kv_idx": ("j", "the keys of this tile, by their number in the sequence"),
    "row": ("i", "the same rows; those beyond the end repeat the last one"),
    "lo": ("lo", "the first key that a row may see"),
    "hi": ("hi", "the first key after the last that a row may see"),
    "span": ("span", "keys start and stop; tiles first, full first, full last and last of the walk"),
    "q": ("Q", "queries: what each word asks for"),
    "k": ("K", "keys: what each word offers to be found by"),
    "v": ("V", "values: what each word hands on"),
    "s": ("S", "scores: how well a query and a key match"),
    "kept": ("kept", "which pairs count"),
    "seen": ("seen", "which keys some row sees"),
    "new_max": ("m'", "the largest score so far, with this tile"),
    "base": ("m'", "what is subtracted from scores before the exponential"),
    "base_log2": ("m'", "the same for exponentials in base 2, scaled"),
    "row_max": ("m", "the largest score of each row so far"),
    "row_sum": ("l", "the sum of exp(score - m) of each row so far"),
    "p": ("P", "weights: exponentials of the scores; divided by l at the end, a row of them adds up to 1"),
    "rescale": ("rescale", "the factor that all before is multiplied with when the maximum grows"),
    "o": ("O", "the weighted sum of values so far"),
    "factor": ("1 / l", "one division a row, at the end"),
    "lse": ("LSE", "m + ln l: the logarithm of the sum of a row's exponentials"),
    "row_lse": ("LSE", "m + ln l: the logarithm of the sum of a row's exponentials"),
    "sum_log2": ("log₂ l", "the logarithm of a row's sum, which the backward needs"),
    "natural_max": ("m", "the largest score of each row, scaled"),
    "part_o": ("Oₛ", "the result of one split's keys"),
    "part_sum": ("lₛ", "1, or 0 for a split that saw no key"),
    "a": ("a", "the factor due to the state so far"),
    "b": ("b", "the factor due to the state that joins"),
    "do": ("dO", "the gradient that arrives at the output"),
    "sT": ("Sᵀ", "scores, with keys as rows"),
    "pT": ("Pᵀ", "weights, with keys as rows"),
    "dpT": ("dPᵀ", "the gradient of the weights, with keys as rows"),
    "dsT": ("dSᵀ", "the gradient of the scores, with keys as rows"),
    "dp": ("dP", "the gradient of the weights"),
    "ds": ("dS", "the gradient of the scores"),
    "delta": ("δ", "Σ dO · O of each row: what its weights get back on average"),
    "dq": ("dQ", "the gradient of the queries"),
    "dk": ("dK", "the gradient of the keys"),
    "dv": ("dV", "the gradient of the values"),
}  # fmt: skip


def glossary() -> dict[str, dict[str, str]]:
    return {name: {"symbol": symbol, "text": text} for name, (symbol, text) in GLOSSARY.items()}
