"""Planted bugs in the functions of other libraries."""

from __future__ import annotations

from .mutation import Mutation, tests

FLASH_ATTN = "kernels/tilewise/compat/flash_attn.py"
KVCACHE = "kernels/tilewise/compat/kvcache.py"
SHARED = "kernels/tilewise/compat/shared.py"
VARLEN = "kernels/tilewise/compat/varlen.py"

# fmt: off
MUTATIONS = (
    Mutation("compat: a causal window that sees to the right", SHARED,
             "        right = 0", "        right = right",
             tests("compat", "flash_attn_func[causal window-(5, 8)]")),
    Mutation("compat: left and right of a window exchanged", SHARED,
             "left, right = [None if", "right, left = [None if",
             tests("compat", "flash_attn_func[window-(5, 8)]")),
    Mutation("compat: the cap on what slopes have added", FLASH_ATTN,
             "scores.append(ALiBi(alibi_slopes))", "scores.insert(0, ALiBi(alibi_slopes))",
             tests("compat", "flash_attn_func[all-(5, 8)]")),
    Mutation("compat: values for keys", FLASH_ATTN,
             "k, v = kv.unbind(2)", "v, k = kv.unbind(2)",
             tests("compat", "packed_into_one_tensor[plain]")),
    Mutation("compat: keys that are not used are seen", VARLEN,
             "torch.minimum(starts + seqused_k.clamp(min=0), ends)", "ends",
             tests("compat", "only_the_used_keys_of_each_sequence[torch.int32-(-1, -1)]")),
    Mutation("compat: rows behind the last sequence taken for a mistake", SHARED,
             "kv_offsets = kv_offsets[:]", "pass",
             tests("compat", "one_tensor_of_offsets_for_tensors_with_different_rows_behind")),
    Mutation("compat: queries turned apart though none is hidden from another", KVCACHE,
             'options["mask"] is None)', "False)",
             tests("compat_cache", "rotary_positions[{}-2-5-True]")),
    Mutation("compat: queries that stand at the last key turned by it", KVCACHE,
             "cache=Cache(starts + rows.shape[2])", "cache=request.cache",
             tests("compat_cache", "rotary_positions[{'causal': True}-2-5-True]")),
    Mutation("compat: every sequence in its own row of the cache", KVCACHE,
             "return index[:, None]", "return torch.arange(batch, device=index.device)[:, None]",
             tests("compat_cache", "a_row_of_the_caches_batch_for_each_sequence")),
    Mutation("compat: pages as long as the longest sequence", FLASH_ATTN,
             "cu_k.diff(), block_table", "cu_k.diff().amax().expand(len(cu_k) - 1), block_table",
             tests("compat_cache", "varlen_over_pages[plain]")),
    Mutation("compat: errors in words that the caller does not know", SHARED,
             "name.sub(lambda found: words[found[0]], str(error))", "str(error)",
             tests("compat_errors", "plain_pytorch_names_the_offsets_that_lead_outside")),
)
# fmt: on
