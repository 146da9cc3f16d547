"""Planted bugs in the modules of tilewise.nn."""

from __future__ import annotations

from .mutation import Mutation, tests

CORE = "kernels/tilewise/nn/core.py"
KV_CACHE = "kernels/tilewise/nn/kv_cache.py"
PAGED = "kernels/tilewise/nn/paged_kv_cache.py"
PROJECTED = "kernels/tilewise/nn/projected.py"
ROTARY = "kernels/tilewise/nn/rotary.py"
WEIGHTS = "kernels/tilewise/nn/weights.py"

# fmt: off
MUTATIONS = (
    Mutation("rotary: turned backwards", ROTARY,
             "(a * cos - b * sin, a * sin + b * cos)", "(a * cos + b * sin, b * cos - a * sin)",
             tests("nn_rotary", "turns_by_position_times_frequency[half-8-None-torch.float32]")),
    Mutation("rotary: angles in fp32", ROTARY,
             "torch.remainder(positions.unsqueeze(-1) * frequencies, 2 * math.pi)",
             "torch.remainder((positions.unsqueeze(-1) * frequencies).float(), 2 * math.pi)",
             tests("nn_rotary", "right_at_a_million[theta-torch.bfloat16]")),
    Mutation("rotary: frequencies of the whole head for a part of it", ROTARY,
             "exponents / -self.rotary_dim", "exponents / -self.head_dim",
             tests("nn_rotary", "turns_by_position_times_frequency[interleaved-10-4-torch.float32]")),
    Mutation("rotary: frequencies rounded with the weights", ROTARY,
             "self.frequencies = kept.to(self.frequencies.device)", "pass",
             tests("nn_rotary", "right_at_a_million[own-torch.bfloat16]")),
    Mutation("nn: a step that stands at 0", CORE,
             "self.rotary(q, k, positions)", "self.rotary(q, k)",
             tests("nn_language_model", "steps_with_a_cache_are_the_whole[llama-torch]")),
    Mutation("nn: a cache without positions", CORE,
             "positions is None and all_k.shape[2] != k.shape[2]", "False",
             tests("nn_language_model", "a_cache_without_positions_is_refused")),
    Mutation("nn: values of their own forgotten", WEIGHTS,
             "if all(x is inputs[0] for x in inputs):", "if len(inputs):",
             tests("nn", "cross_attention_from_multihead_attention[None-None]")),
    Mutation("nn: queries with the heads of keys", PROJECTED,
             'split_heads(made["q"], self.heads)', 'split_heads(made["q"], self.kv_heads)',
             tests("nn", "from_linears_with_grouped_heads[6-2]")),
    Mutation("kv cache: full one row too late", KV_CACHE,
             "self.longest + rows > self.capacity", "self.longest + rows > self.capacity + 1",
             tests("kv_cache", "a_full_cache_loses_nothing")),
    Mutation("kv cache: packed sequences that all grow by all tokens", KV_CACHE,
             "count if offsets is None else offsets.diff().to(self.lens.dtype)", "count",
             tests("kv_cache", "contiguous_is_dense[torch-as_is]")),
    Mutation("pages: written to though another has them", PAGED,
             "if left > 1:", "if left > 2:",
             tests("kv_cache", "forks_diverge[4-torch]")),
    Mutation("pages: a copy for the last user too", PAGED,
             "users[page] = left - 1", "pass",
             tests("kv_cache", "the_last_of_a_page_needs_no_copy")),
    Mutation("pages: freed while another has them", PAGED,
             "if not self._users[page]:", "if True:",
             tests("kv_cache", "pages_that_were_others[torch]")),
    Mutation("pages: copied in the first layer alone", PAGED,
             "pool[:, targets] = pool[:, sources]", "pool[0, targets] = pool[0, sources]",
             tests("kv_cache", "layers_share_a_table[torch]")),
    Mutation("pages: rows that count before the last layer has them", PAGED,
             "if layer == cache.layers - 1:", "if layer == 0:",
             tests("kv_cache", "layers_share_a_table[torch]")),
    Mutation("pages: copies not counted among those needed", PAGED,
             "needed = missing + len(shared)", "needed = missing",
             tests("kv_cache", "full_pages_lose_nothing")),
)
# fmt: on
