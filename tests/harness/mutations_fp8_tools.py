"""Planted bugs in what tools and benchmarks make of fp8."""

from __future__ import annotations

from .mutation import Mutation, tests

ANSWERS = "bench/answers_fp8.py"
AS_WORKLOAD = "kernels/tilewise/tools/explain/as_workload.py"
CHECKS = "bench/checks/fp8.py"
CHIPS = "kernels/tilewise/tools/chips.py"
COMPILER = "kernels/tilewise/tools/compiled/compiler.py"
EXPLAIN = "kernels/tilewise/tools/explain/explain.py"
RIVALS = "bench/implementations/fp8.py"
WORKLOAD = "kernels/tilewise/tools/explain/workload.py"


def of_bench(name: str) -> tuple[str, ...]:
    return (f"tests/bench/test_fp8.py::test_{name}",)


# fmt: off
MUTATIONS = (
    Mutation("fp8 explained: out in one byte", AS_WORKLOAD,
             "out_element_bytes=None if request.scales is None else request.out_dtype.itemsize",
             "out_element_bytes=None",
             tests("fp8_tools", "explain_counts_bytes_of_each_tensor_and_twice_the_rate")),
    Mutation("fp8 explained: on any chip", EXPLAIN,
             "if request.scales is None or multiplies_fp8(chip.arch):", "if chip.arch:",
             tests("fp8_tools", "what_fp8_cannot_do_is_said")),
    Mutation("fp8 explained: columns as in 16 bits", WORKLOAD,
             "NARROWEST_FP8 if self.element_bytes == 1 else NARROWEST", "NARROWEST",
             tests("fp8_tools", "columns_of_fp8_are_no_fewer_than_a_matmul_needs")),
    Mutation("fp8 inspected: tensor cores are those of 16 bits", COMPILER,
             "(FP8_MATMUL if self.dtype == FP8 else MATMUL)[", "MATMUL[",
             tests("fp8_tools", "tensor_cores_and_limits_are_those_of_the_dtype")),
    Mutation("fp8: no chip multiplies it faster", CHIPS,
             "            return self.fp8_flops", "            return self.matmul_flops",
             tests("fp8_tools", "rates_are_of_chips_that_multiply_fp8")),
    Mutation("fp8 in the bench: held against what was quantized", ANSWERS,
             "numbers = prepared.numbers", "numbers = None",
             of_bench("an_answer_is_judged_by_plain_fp8")),
    Mutation("fp8 in the bench: any rotated number is right", ANSWERS,
             "judge(name, x8.double(), exact,", "judge(name, exact, exact,",
             of_bench("wrong_numbers_are_found")),
    Mutation("fp8 in the bench: a rival is given another scale", RIVALS,
             "q_descale=q_scale", "q_descale=k_scale",
             of_bench("flash_attention_3_is_asked_for_the_right_thing")),
    Mutation("fp8 in the GPU run: asked of every GPU", CHECKS,
             'device.type == "cuda" and not multiplies_fp8', 'device.type == "mps" and not multiplies_fp8',
             of_bench("checks_do_not_apply_to_a_gpu_without_fp8")),
)
# fmt: on
