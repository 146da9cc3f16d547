"""Do CUDA graphs, streams, `torch.compile` and the allocator see what they should? The GPU tests say so."""

from __future__ import annotations

from .trial import Trial, from_tests

TESTS = (
    ("CUDA graph, new data", "test_a_captured_step_answers_new_data", "plain"),
    ("second stream, late producer", "test_a_late_producer_on_another_stream"),
    ("no memory growth", "test_no_memory_growth"),
    ("CUDA graph, masks made inside", "test_a_captured_step_answers_new_data", "masks made inside"),
    ("CUDA graph, trained scores", "test_a_captured_step_answers_new_data", "trained scores"),
    ("CUDA graph, seeded dropout", "test_a_captured_step_answers_new_data", "seeded dropout"),
    ("CUDA graph, dropout draws anew", "test_dropout_in_a_captured_step_draws_anew"),
    ("backward on another stream than forward", "test_backward_called_from_another_stream_than_forward"),
    ("memory linear in length", "test_memory_is_linear_in_length", True),
    ("autocast", "test_autocast_casts_what_goes_in"),
    ("torch.compile", "test_compiled_by_inductor", "default"),
    ("torch.compile with CUDA graphs", "test_compiled_by_inductor", "reduce-overhead"),
)

GRAPHS: list[Trial] = [
    Trial(name, from_tests("test_cuda", test, *arguments), needs_gpu=True) for name, test, *arguments in TESTS
]
