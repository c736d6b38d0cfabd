// RUN: moe-opt %s --split-input-file --verify-diagnostics

// router_top_k
// expected-error @below {{expected top_k to be positive, but got 0}}
func.func private @router_top_k() attributes {test.attribute = #moe.router<score = softmax, order = score_then_select, top_k = 0>}

// -----

// router_epsilon
// expected-error @below {{expected epsilon to be finite and not negative, but got -1}}
func.func private @router_epsilon() attributes {test.attribute = #moe.router<score = softmax, order = score_then_select, top_k = 1, epsilon = -1.0>}

// -----

// router_norm_p
// expected-error @below {{expected norm_p to be finite and positive, but got 0}}
func.func private @router_norm_p() attributes {test.attribute = #moe.router<score = softmax, order = score_then_select, top_k = 1, norm_p = 0.0>}

// -----

// router_extra_rows
// expected-error @below {{expected extra_rows to be at least 0, but got -1}}
func.func private @router_extra_rows() attributes {test.attribute = #moe.router<score = softmax, order = score_then_select, top_k = 1, extra_rows = -1>}

// -----

// groups_keep
// expected-error @below {{expected keep in [1, 4], but got 5}}
func.func private @groups_keep() attributes {test.attribute = #moe.groups<count = 4, keep = 5, reduce = max, fill = zero>}

// -----

// groups_count
// expected-error @below {{expected count of groups to be positive, but got 0}}
func.func private @groups_count() attributes {test.attribute = #moe.groups<count = 0, keep = 1, reduce = max, fill = zero>}

// -----

// clamp_limit
// expected-error @below {{expected limit to be positive, but got 0}}
func.func private @clamp_limit() attributes {test.attribute = #moe.clamp<kind = pre, limit = 0.0>}

// -----

// expert_latent
// expected-error @below {{expected latent to be at least 0, but got -1}}
func.func private @expert_latent() attributes {test.attribute = #moe.expert<form = glu, activation = silu, latent = -1>}

// -----

// dims_k
// expected-error @below {{expected K to be at most E = 4, but got 5}}
func.func private @dims_k() attributes {test.attribute = #moe.dims<H = 8, F = 8, E = 4, K = 5>}

// -----

// dims_h
// expected-error @below {{expected H to be positive, but got 0}}
func.func private @dims_h() attributes {test.attribute = #moe.dims<H = 0, F = 8, E = 4, K = 4>}

// -----

// target_level
// expected-error @below {{expected level to be x86-64-v3, x86-64-v4, avx512-bf16 or amx-bf16, but got "x86-64-v2"}}
func.func private @target_level() attributes {test.attribute = #moe.target<cpu, level = "x86-64-v2">}

// -----

// ukernel_level
// expected-error @below {{expected level of a micro-kernel to be x86-64-v3, x86-64-v4, avx512-bf16 or amx-bf16, but got "x86-64-v2"}}
func.func private @ukernel_level() attributes {test.attribute = #moe.ukernel<level = "x86-64-v2", rows = 1, panels = 1>}

// -----

// ukernel_product
// expected-error @below {{expected product = dot_bf16 at level avx512-bf16 only, but got x86-64-v4}}
func.func private @ukernel_product() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 1, panels = 1, product = dot_bf16>}

// -----

// ukernel_tiles
// expected-error @below {{expected product = tile_bf16 at level amx-bf16 with rows = 16 or 32 and panels = 1, but got amx-bf16, rows = 8, panels = 1}}
func.func private @ukernel_tiles() attributes {test.attribute = #moe.ukernel<level = "amx-bf16", rows = 8, panels = 1, product = tile_bf16>}

// -----

// ukernel_tiles_level
// expected-error @below {{expected product = tile_bf16 at level amx-bf16 with rows = 16 or 32 and panels = 1, but got avx512-bf16, rows = 16, panels = 1}}
func.func private @ukernel_tiles_level() attributes {test.attribute = #moe.ukernel<level = "avx512-bf16", rows = 16, panels = 1, product = tile_bf16>}

// -----

// ukernel_v4_rows
// expected-error @below {{expected a micro-kernel in the 32 registers of x86-64-v4, but got rows = 15, panels = 1, order = b_first, which need 33}}
func.func private @ukernel_v4_rows() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 15, panels = 1>}

// -----

// ukernel_v4_panels
// expected-error @below {{expected a micro-kernel in the 32 registers of x86-64-v4, but got rows = 7, panels = 2, order = b_first, which need 33}}
func.func private @ukernel_v4_panels() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 7, panels = 2>}

// -----

// ukernel_v3_rows
// expected-error @below {{expected a micro-kernel in the 16 registers of x86-64-v3, but got rows = 4, panels = 1, order = b_first, which need 21}}
func.func private @ukernel_v3_rows() attributes {test.attribute = #moe.ukernel<level = "x86-64-v3", rows = 4, panels = 1>}

// -----

// ukernel_rows
// expected-error @below {{expected rows in [1, 32], but got 0}}
func.func private @ukernel_rows() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 0, panels = 1>}

// -----

// ukernel_v4_order
// expected-error @below {{expected a micro-kernel in the 32 registers of x86-64-v4, but got rows = 14, panels = 1, order = a_first, which need 43}}
func.func private @ukernel_v4_order() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1, order = a_first>}

// -----

// ukernel_v3_order
// expected-error @below {{expected a micro-kernel in the 16 registers of x86-64-v3, but got rows = 3, panels = 1, order = b_first, which need 17}}
func.func private @ukernel_v3_order() attributes {test.attribute = #moe.ukernel<level = "x86-64-v3", rows = 3, panels = 1>}

// -----

// ukernel_v4_most_panels
// expected-error @below {{expected panels in [1, 4] at x86-64-v4, but got 5}}
func.func private @ukernel_v4_most_panels() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 1, panels = 5>}

// -----

// ukernel_v3_most_panels
// expected-error @below {{expected panels in [1, 2] at x86-64-v3, but got 3}}
func.func private @ukernel_v3_most_panels() attributes {test.attribute = #moe.ukernel<level = "x86-64-v3", rows = 1, panels = 3, order = a_first>}

// -----

// ukernel_prefetch
// expected-error @below {{expected prefetch in [0, 1048576] bytes, but got -64}}
func.func private @ukernel_prefetch() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 1, panels = 1, prefetch = -64>}

// -----

// strategy_chunk_rows
// expected-error @below {{expected chunk_rows to be at least the micro-kernel's rows = 14, but got 13}}
func.func private @strategy_chunk_rows() attributes {test.attribute = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>, chunk_rows = 13, panels_per_task = 1, source = rows, result = rows>}

// -----

// strategy_panels
// expected-error @below {{expected panels_per_task to be a positive multiple of the micro-kernel's panels = 2, but got 3}}
func.func private @strategy_panels() attributes {test.attribute = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 6, panels = 2>, chunk_rows = 64, panels_per_task = 3, source = rows, result = rows>}

// -----

// source_pattern
// expected-error @below {{expected a tensor name, but got an empty string}}
func.func private @source_pattern() attributes {test.attribute = #moe.source<"">}

// -----

// source_rows
// expected-error @below {{expected rows to be [begin, end] with 0 <= begin < end, but got [8, 8]}}
func.func private @source_rows() attributes {test.attribute = #moe.source<"a", rows = [8, 8]>}

// -----

// source_arrangement
// expected-error @below {{expected arrangement to be per_expert or stacked, but got 'both'}}
func.func private @source_arrangement() attributes {test.attribute = #moe.source<"a", arrangement = both>}

// -----

// expected-error @below {{expected ahead to be 0 or a divisor of 32, but got 5}}
func.func private @ukernel_ahead() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 8, panels = 1, ahead = 5>}

// -----

// expected-error @below {{expected panels = 1 with ahead = 8, but got 2}}
func.func private @ukernel_ahead_panels() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 4, panels = 2, ahead = 8>}

// -----

// expected-error @below {{and 0 with product = fma_f64 or several panels, but got 16}}
func.func private @ukernel_k_block() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 6, panels = 1, product = fma_f64, k_block = 16>}

// -----

// expected-error @below {{expected hint = near unless product = tile_bf16, but got stream}}
func.func private @ukernel_hint() attributes {test.attribute = #moe.ukernel<level = "x86-64-v4", rows = 8, panels = 1, hint = stream>}

// -----

// expected-error @below {{expected defer in [0, 8], and 0 unless product = tile_bf16, rows = 32 and k_block is not 0, but got defer = 2, rows = 32, k_block = 0}}
func.func private @ukernel_defer() attributes {test.attribute = #moe.ukernel<level = "amx-bf16", rows = 32, panels = 1, product = tile_bf16, defer = 2>}

// -----

// expected-error @below {{expected sum_rows in [1, 16777216], but got 0}}
func.func private @strategy_sum_rows() attributes {test.attribute = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>, chunk_rows = 14, panels_per_task = 1, source = rows, result = combine, sum_rows = 0>}

// -----

// expected-error @below {{expected k_chunk to be 0 or a multiple of k_block = 16, but got 24}}
func.func private @strategy_k_chunk() attributes {test.attribute = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1, k_block = 16>, chunk_rows = 14 by k_chunk = 24, panels_per_task = 1, source = rows, result = rows>}
