"""Planted bugs in the forward of fp8, in what makes such numbers, and in its rules."""

from __future__ import annotations

from .mutation import Mutation, tests

FP8 = "kernels/tilewise/parts/fp8.py"
NUMERICS = "kernels/tilewise/parts/numerics.py"
QUANTIZE = "kernels/tilewise/kernels/quantize.py"
QUANTIZE_OP = "kernels/tilewise/pytorch/quantize.py"
DEQUANTIZED = "kernels/tilewise/pytorch/dequantized.py"
RULES = "kernels/tilewise/plan/rules/fp8.py"
FORWARD = "kernels/tilewise/kernels/forward.py"
ROUNDING = tests("fp8", "rounding_is_that_of_the_reference_bit_for_bit")
BITS = tests("fp8", "quantize_is_the_reference_bit_for_bit")
SHARES = tests("fp8", "the_shares_of_small_scales_are_kept")

# fmt: off
MUTATIONS = (
    Mutation("fp8: halves are rounded up", NUMERICS,
             "((known + 0x7FFFF + ((known >> 20) & 1)) >> 20)", "((known + 0x80000) >> 20)", ROUNDING),
    Mutation("fp8: numbers below 2⁻⁶ are rounded as larger ones", NUMERICS,
             "found = tl.where(size < 0.015625, step, normal)", "found = normal", ROUNDING),
    Mutation("fp8: the largest number is 480", NUMERICS,
             "size = tl.minimum(tl.abs(x), 448.0)", "size = tl.minimum(tl.abs(x), 480.0)", ROUNDING),
    Mutation("fp8: NaN becomes a number", NUMERICS,
             "    found = tl.where(x == x, found, 0x7F)\n", "", ROUNDING),
    Mutation("fp8: NaN is read as 480", NUMERICS,
             '    value = tl.where(size == 0x7F, float("nan"), value)\n', "",
             tests("fp8", "every_number_is_widened_as_pytorch_does", "nan_that_a_row_sees_stays")),
    Mutation("fp8: small numbers are read as normal ones", NUMERICS,
             "value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)", "value = normal",
             tests("fp8", "every_number_is_widened_as_pytorch_does")),
    Mutation("fp8: the scale of k is that of q's head", FP8,
             "scale_at(k_scale, layout[1], batch, head // group, kv_idx, kv_rows)",
             "scale_at(k_scale, layout[1], batch, head, kv_idx, kv_rows)",
             tests("fp8", "statistics_are_those_of_the_numbers")),
    Mutation("fp8: rows of packed sequences are counted in each", FP8,
             "tile = (place[1] + rows) // scale[3]", "tile = (rows + place[1] * 0) // scale[3]",
             tests("fp8", "packed_tensors_are_quantized_as_they_are")),
    Mutation("fp8: values without their scale", FP8,
             "return factor * (scale_at(largest, layout[1], batch, kv_head, kv_head, sizes[3]) / peak)",
             "return factor / peak", SHARES),
    Mutation("fp8: every tile of values has the largest scale", FP8,
             "factor = (part * (peak / most))[None, :]", "factor = (part * 0.0 + peak)[None, :]", SHARES),
    Mutation("fp8: P is rounded as it is", FP8,
             "return 2.0 ** math.floor(math.log2(LARGEST / kept_factor)) if kept_factor else 1.0",
             "return 1.0", tests("fp8", "the_small_weights_of_a_long_row_are_kept")),
    Mutation("fp8: dropout's factor is forgotten", FP8,
             "math.log2(LARGEST / kept_factor)", "math.log2(LARGEST)",
             tests("fp8", "weights_that_dropout_enlarges_do_not_overflow")),
    Mutation("fp8: tiles that hold no row have a say", FP8,
             "holds = first < cache.kv_lens[:, None, None]",
             "holds = first * 0 <= cache.kv_lens[:, None, None]",
             tests("fp8", "a_cache_is_split_and_its_empty_tiles_have_no_say")),
    Mutation("fp8: O keeps what P was stretched by", FORWARD,
             "    factor = shrunk(factor, v_largest, v_peak, batch, kv_head, sizes, layout)\n", "", SHARES),
    Mutation("quantize: infinity decides the scale", QUANTIZE,
             'tl.max(tl.where(size < float("inf"), size, 0.0), 1)', "tl.max(size, 1)",
             tests("fp8", "scales_of_what_has_no_finite_largest_number")),
    Mutation("quantize: rows of the next tile are measured", QUANTIZE,
             "last = tl.minimum(first + tile_rows, row_count)",
             "last = tl.minimum(first + tile_rows + 1, row_count)", BITS),
    Mutation("quantize: the signs are left out", QUANTIZE,
             "sign = is_odd((inside & (inside >> 1) & 0x55) ^ (inside & j))", "sign = is_odd(inside & j)",
             BITS),
    Mutation("quantize: blocks of the rotation run into each other", QUANTIZE,
             "r = tl.where(i // SIDE == j // SIDE, tl.where(sign, -1.0, 1.0), 0.0)",
             "r = tl.where(sign, -1.0, 1.0)", BITS),
    Mutation("quantize: a scale of heads is the tensor's", QUANTIZE_OP,
             "most = measured.amax(2) if rows == 0 else measured.amax()", "most = measured.amax()", BITS),
    Mutation("quantize: no smallest scale", QUANTIZE_OP,
             "torch.where(most > 0, most.clamp_min(SMALLEST_SCALE.value), 1.0)", "most",
             tests("fp8", "scales_of_what_has_no_finite_largest_number")),
    Mutation("fp8 in plain PyTorch: the last tile's scale for all", DEQUANTIZED,
             "found.append(scale.repeat_interleave(scales.rows, 2)[:, :, : x.shape[2], None])",
             "found.append(scale[:, :, -1:].repeat_interleave(x.shape[2], 2)[..., None])",
             tests("fp8", "plain_pytorch_has_the_same_numbers")),
    Mutation("fp8 in plain PyTorch: packed sequences have the first one's scale", DEQUANTIZED,
             "scale[batch : batch + 1, :, 0, 0]", "scale[:1, :, 0, 0]",
             tests("fp8", "plain_pytorch_has_the_same_numbers")),
    Mutation("fp8 rules: any chip", RULES,
             "    if tiles.multiplies_fp8(arch):\n", "    if arch:\n",
             tests("fp8", "chips_without_such_tensor_cores_are_refused")),
    Mutation("fp8 rules: forward mode is not seen", RULES,
             "or forward_ad._current_level >= 0", "or False",
             tests("fp8", "function_transforms_are_refused")),
    Mutation("fp8 machine code: sums are left to tensor cores", NUMERICS,
             "tl.dot(a, b, acc, max_num_imprecise_acc=at_once(a.shape[1]))", "tl.dot(a, b, acc)",
             tests("compiled", "sums_of_fp8_products_are_kept_in_fp32")),
)
# fmt: on
