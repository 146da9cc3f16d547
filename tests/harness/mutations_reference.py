"""Planted bugs in the specification of tangents and second derivatives, which no kernel would show."""

from __future__ import annotations

from .mutation import Mutation

SCORES = "reference/tilewise_reference/scores.py"
SECOND = "reference/tilewise_reference/second.py"
TANGENT = "reference/tilewise_reference/tangent.py"


def tests(*names: str) -> tuple[str, ...]:
    """The node ids of tests in tests/reference/test_derivatives.py."""
    return tuple(f"tests/reference/test_derivatives.py::{name}" for name in names)


# fmt: off
MUTATIONS = (
    Mutation("reference: a sink's tangent forgotten", TANGENT,
             " + fwd.p_sink * tsink", "",
             tests("TestByHand::test_sink")),
    Mutation("reference: tangents of unseen keys not set to 0", TANGENT,
             "tx.masked_fill(fwd.kv_unseen[..., None], 0)", "tx",
             tests("TestUnseenRowsNeverLeak::test_from_tensors_tangents_and_what_arrives")),
    Mutation("reference: delta does not move", SECOND,
             "fwd.p * (tdp - tdelta[..., None])", "fwd.p * tdp",
             tests("TestByHand::test_second")),
    Mutation("reference: a modifier's slope does not move", SECOND,
             "ds, tds = ds * f, tds * f + ds * tf", "ds, tds = ds * f, tds * f",
             tests("test_autograd_for_what_models_ask_for[feature-softcap]")),
    Mutation("reference: softcap's second derivative of the other sign", SCORES,
             "(-2 / cap)", "(2 / cap)",
             tests("test_autograd_for_what_models_ask_for[feature-softcap]")),
    Mutation("reference: mixed second derivatives asked for in one order", SECOND,
             " if (one, other) in second else (other, one)", "",
             tests("test_finite_differences")),
    Mutation("reference: directions of rows do not turn", SECOND,
             "tunit * a + ", "",
             tests("test_finite_differences")),
    Mutation("reference: NaN of a slope where nothing counts", SECOND,
             "(tds * f + ds * tf).masked_fill(~fwd.keep, 0)", "(tds * f + ds * tf)",
             tests("TestUnseenRowsNeverLeak::test_from_scores_of_pairs_that_do_not_count")),
)
# fmt: on
