// RUN: moe-opt %s --split-input-file --verify-diagnostics

// weight_type_rank
// expected-error @below {{expected a weight of 4 dimensions (experts, parts, rows, columns), but got 3}}
func.func private @weight_type_rank(!moe.weight<2x8x8xf32, panel32>)

// -----

// weight_type_format
// expected-error @below {{expected weight format f32 or bf16, but got 'f16'}}
func.func private @weight_type_format(!moe.weight<1x2x8x8xf16, panel32>)

// -----

// weight_type_layout
// expected-error @below {{expected weight layout panel32 or vector32, but got 'rows'}}
func.func private @weight_type_layout(!moe.weight<1x2x8x8xf32, rows>)

// -----

// weight_type_experts
// expected-error @below {{expected a weight with positive experts, but got 0}}
func.func private @weight_type_experts(!moe.weight<0x2x8x8xf32, panel32>)

// -----

// weight_type_parts
// expected-error @below {{expected a weight of 1 or 2 parts, but got 3}}
func.func private @weight_type_parts(!moe.weight<1x3x8x8xf32, panel32>)

// -----

// weight_type_bytes
// expected-error @below {{expected a weight of at most 2^60 bytes, but got 64x2x4294967296x4294967296 elements}}
func.func private @weight_type_bytes(!moe.weight<64x2x4294967296x4294967296xf32, panel32>)

// -----

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

// entry_attribute
// expected-error @below {{expected 'moe.entry' to be "forward", "route" or "experts", but got "backward"}}
func.func private @entry_attribute() attributes {moe.entry = "backward"}

// -----

// compute_attribute
// expected-error @below {{expected 'moe.compute' to be f32 or bf16, but got f16}}
func.func private @compute_attribute() attributes {moe.compute = f16}

// -----

// unknown_attribute
// expected-error @below {{expected moe.entry, moe.compute, moe.target or moe.workspace on a function, but got 'moe.entri'}}
func.func private @unknown_attribute() attributes {moe.entri = "forward"}

// -----

// arg_attribute
// expected-error @below {{argument 0: expected 'moe.arg' to be one of x, router_x, y, weights, experts, logits, accumulate, routed_only, weight, offsets, lanes, workspace, tokens, slots, but got "z"}}
func.func private @arg_attribute(i32 {moe.arg = "z"})

// -----

// weight_index_attribute
// expected-error @below {{argument 0: expected 'moe.weight_index' to be a non-negative i64, but got -1 : i64}}
func.func private @weight_index_attribute(i32 {moe.weight_index = -1})

// -----

// weight_c1
// expected-error @below {{expected part of source "a" below 1, but got 1}}
moe.weight @w : !moe.weight<1x1x8x8xf32, panel32> role "router" from [#moe.source<"a", part = 1>]

// -----

// weight_c2
// expected-error @below {{expected role to be one word, but got ""}}
moe.weight @w : !moe.weight<1x1x8x8xf32, panel32> role "" from [#moe.source<"a">]

// -----

// layer_c1
// expected-error @below {{expected route = @function in a moe layer, but got none}}
moe.layer @l "l" kind = moe index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights()
func.func private @f()

// -----

// layer_c1_dense
// expected-error @below {{expected a dense layer without route, but got @f}}
moe.layer @l "l" kind = dense index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f route = @f weights()
func.func private @f()

// -----

// layer_c2
// expected-error @below {{expected @f to be a func.func of this module}}
moe.layer @l "l" kind = dense index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights()

// -----

// code_c1
// expected-error @below {{expected at least one stage, but got none}}
moe.code @e stages = [] workspace = @f
func.func private @f()

// -----

// code_c2
// expected-error @below {{expected @g to be a function of this module}}
moe.code @e stages = [@f, @g] workspace = @f
func.func private @f()

// -----

// workspace_attribute
// expected-error @below {{expected 'moe.workspace' to be a symbol, but got "f"}}
func.func private @workspace_attribute() attributes {moe.workspace = "f"}

// -----

// layer_c3
// expected-error @below {{expected @f to be a moe.weight of this module}}
moe.layer @l "l" kind = dense index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights(@f)
func.func private @f()

// -----

// layer_c4
// expected-error @below {{expected index to be at least 0, but got -1}}
moe.layer @l "l" kind = dense index = -1 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights()
func.func private @f()

// -----

// router_c1
func.func @router_c1(%x: memref<?x33xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected hidden size H of x = 32, but got 33}}
  moe.router ins(%x, %wg : memref<?x33xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// router_c2
func.func @router_c2(%x: memref<?x32xf32>, %wg: !moe.weight<2x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected a router weight of 1 expert and 1 part, but got 2 and 1}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<2x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// router_c2_extra
func.func @router_c2_extra(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected extra_rows below the weight's rows = 8, but got 8}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, extra_rows = 8>
  return
}

// -----

// router_c3
func.func @router_c3(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x3xi32>) {
  // expected-error @below {{expected chosen experts K of the outs = 2, but got 3}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x3xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// router_c3_top_k
func.func @router_c3_top_k(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x9xf32>, %e: memref<?x9xi32>) {
  // expected-error @below {{expected top_k at most experts E = 8, but got 9}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x9xf32>, memref<?x9xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 9>
  return
}

// -----

// router_c3_tokens
func.func @router_c3_tokens(%x: memref<4x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<5x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected tokens T of the outs = 4, but got 5}}
  moe.router ins(%x, %wg : memref<4x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<5x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// router_c4
func.func @router_c4(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>, %l: memref<?x9xf32>) {
  // expected-error @below {{expected experts E of the logits = 8, but got 9}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e, %l : memref<?x2xf32>, memref<?x2xi32>, memref<?x9xf32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// router_c5
func.func @router_c5(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected a count of groups that divides E = 8, but got 3}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2,
                  groups = <count = 3, keep = 1, reduce = max, fill = zero>>
  return
}

// -----

// router_c5_keep
func.func @router_c5_keep(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected kept groups of at least top_k = 2 experts, but got 1}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2,
                  groups = <count = 8, keep = 1, reduce = max, fill = neg_inf>>
  return
}

// -----

// router_semantics
func.func @router_semantics(%x: tensor<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected operands to be all tensors or all memrefs, but got both}}
  moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// dispatch_c2
func.func @dispatch_c2(%e: memref<4x2xi32>, %off: memref<8xi32>, %pair: memref<8xi32>) {
  // expected-error @below {{expected elements E + 1 of offsets = 9, but got 8}}
  moe.dispatch ins(%e : memref<4x2xi32>) experts = 8
      outs(%off, %pair : memref<8xi32>, memref<8xi32>)
  return
}

// -----

// dispatch_c3
func.func @dispatch_c3(%e: memref<4x2xi32>, %off: memref<9xi32>, %pair: memref<7xi32>) {
  // expected-error @below {{expected elements T*k of pair = 8, but got 7}}
  moe.dispatch ins(%e : memref<4x2xi32>) experts = 8
      outs(%off, %pair : memref<9xi32>, memref<7xi32>)
  return
}

// -----

// dispatch_c4
func.func @dispatch_c4(%e: memref<4x2xi32>, %off: memref<9xi32>, %pair: memref<8xi32>) {
  // expected-error @below {{expected experts to be positive, but got 0}}
  moe.dispatch ins(%e : memref<4x2xi32>) experts = 0
      outs(%off, %pair : memref<9xi32>, memref<8xi32>)
  return
}

// -----

// route_dispatch_c6
func.func @route_dispatch_c6(%x: memref<4x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<4x2xf32>, %e: memref<4x2xi32>, %off: memref<10xi32>, %pair: memref<8xi32>) {
  // expected-error @below {{expected elements E + 1 of offsets = 9, but got 10}}
  moe.route_dispatch ins(%x, %wg : memref<4x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e, %off, %pair : memref<4x2xf32>, memref<4x2xi32>, memref<10xi32>, memref<8xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// route_dispatch_c7
func.func @route_dispatch_c7(%x: memref<4x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<4x2xf32>, %e: memref<4x2xi32>, %off: memref<9xi32>, %pair: memref<9xi32>) {
  // expected-error @below {{expected elements T*k of pair = 8, but got 9}}
  moe.route_dispatch ins(%x, %wg : memref<4x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e, %off, %pair : memref<4x2xf32>, memref<4x2xi32>, memref<9xi32>, memref<9xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// single_group_c1
func.func @single_group_c1(%t: index, %off: memref<3xi32>) {
  // expected-error @below {{expected elements of offsets = 2, but got 3}}
  moe.single_group rows(%t) outs(%off : memref<3xi32>)
  return
}

// -----

// experts_c1
func.func @experts_c1(%x: memref<?x31xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected hidden size H of x = 32, but got 31}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x31xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c2
func.func @experts_c2(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a first weight of 1 parts for form = mlp, but got 2}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = mlp, activation = silu>
  return
}

// -----

// experts_c3
func.func @experts_c3(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x2x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight of 1 part, but got 2}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x2x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c3_f
func.func @experts_c3_f(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x25xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight with columns F = 24, but got 25}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x25xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c3_h
func.func @experts_c3_h(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x31x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight with rows H = 32, but got 31}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x31x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c3_result
func.func @experts_c3_result(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x31xf32>) {
  // expected-error @below {{expected hidden size H of the result = 32, but got 31}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x31xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c4
func.func @experts_c4(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<5x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight of E = 4 experts, but got 5}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<5x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c4_offsets
func.func @experts_c4_offsets(%x: memref<?x32xf32>, %off: memref<4xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected elements E + 1 of offsets = 5, but got 4}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<4xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c5
func.func @experts_c5(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<9x32xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<8xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<9x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// combine_c1
func.func @combine_c1(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x31xf32>) {
  // expected-error @below {{expected width H of rows = 31, but got 32}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%y : memref<4x31xf32>)
  return
}

// -----

// combine_c1_dense
func.func @combine_c1_dense(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected rows T without pairs = 4, but got 8}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c2
func.func @combine_c2(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<7xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected elements N of pair = 8, but got 7}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<7xi32>, memref<4x2xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c2_weights
func.func @combine_c2_weights(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: memref<5x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected tokens T of the weights = 4, but got 5}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<8xi32>, memref<5x2xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c4
func.func @combine_c4(%r: memref<8x32xf32>, %off: memref<1xi32>, %pair: memref<8xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected offsets of at least 2 elements, but got 1}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<1xi32>)
      via(%pair, %w slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c3
func.func @combine_c3(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %y: memref<4x32xf32>) {
  // expected-error @below {{expected pair, weights and slots together, but got some of them}}
  "moe.combine"(%r, %off, %pair, %y) <{
      operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0, 0, 1>}>
      : (memref<8x32xf32>, memref<5xi32>, memref<8xi32>, memref<4x32xf32>) -> ()
  return
}

// -----

// ffn_c4
func.func @ffn_c4(%x: memref<?x32xf32>, %y: memref<?x32xf32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected weights of 1 expert, but got 4}}
  moe.ffn ins(%x, %w1, %w2 : memref<?x32xf32>, !moe.weight<4x2x24x32xf32, panel32>,
      !moe.weight<4x1x32x24xf32, panel32>) outs(%y : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// gather_c1
func.func @gather_c1(%x: memref<4x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %k: index, %g: memref<8x31xf32>) {
  // expected-error @below {{expected width H of the result = 32, but got 31}}
  moe.gather ins(%x, %off, %pair : memref<4x32xf32>, memref<5xi32>, memref<8xi32>)
      slots %k outs(%g : memref<8x31xf32>)
  return
}

// -----

// gather_c2
func.func @gather_c2(%x: memref<4x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %k: index, %g: memref<9x32xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.gather ins(%x, %off, %pair : memref<4x32xf32>, memref<5xi32>, memref<8xi32>)
      slots %k outs(%g : memref<9x32xf32>)
  return
}

// -----

// grouped_matmul_c1
func.func @grouped_matmul_c1(%x: memref<8x31xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected width of rows = 32, but got 31}}
  moe.grouped_matmul rows(%x : memref<8x31xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c2
func.func @grouped_matmul_c2(%x: memref<8x32xf32>, %off: memref<6xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected elements E + 1 of offsets = 5, but got 6}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<6xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c4
func.func @grouped_matmul_c4(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a region of 2 arguments, one per part, but got 1}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c4_type
func.func @grouped_matmul_c4_type(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected region arguments of type f32, but got 'f64'}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f64):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c4_yield
func.func @grouped_matmul_c4_yield(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected the region to yield one f32}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield
  }
  return
}

// -----

// grouped_matmul_c5
func.func @grouped_matmul_c5(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a result of rank 3, but got 2}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>)
  return
}

// -----

// grouped_matmul_c5_parts
func.func @grouped_matmul_c5_parts(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x1x24xf32>) {
  // expected-error @below {{expected parts of the result = 2, but got 1}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x1x24xf32>)
  return
}

// -----

// grouped_matmul_c5_width
func.func @grouped_matmul_c5_width(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x25xf32>) {
  // expected-error @below {{expected width of the result = 24, but got 25}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x25xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c5_rows
func.func @grouped_matmul_c5_rows(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<9x24xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<9x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c6
func.func @grouped_matmul_c6(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected one part or a region with combine, but got a weight of 2 parts and no region}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) combine as f32 outs(%o : memref<8x24xf32>)
  return
}

// -----

// grouped_matmul_c6_weights
func.func @grouped_matmul_c6_weights(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<5x24xf32>) {
  // expected-error @below {{expected tokens T of the weights = 5, but got 4}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>)
      combine as f32 (%pair, %tw slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%o : memref<5x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c7
func.func @grouped_matmul_c7(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected pairs, weights and accumulate with combine only}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>)
      (%pair, %tw slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c8
func.func @grouped_matmul_c8(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a strategy with result blocked or rows, but got combine}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>)
      strategy = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>,
          chunk_rows = 64, panels_per_task = 1, source = rows, result = combine> {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c3
func.func @grouped_matmul_c3(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: !moe.weight<4x1x32x24xf32, panel32>, %h: memref<8x24xf32>, %o: memref<8x32xf32>) {
  // expected-error @below {{expected via %pair slots %k, but got one of them}}
  "moe.grouped_matmul"(%h, %pair, %off, %w, %o) <{
      operandSegmentSizes = array<i32: 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1>}> ({})
      : (memref<8x24xf32>, memref<8xi32>, memref<5xi32>, !moe.weight<4x1x32x24xf32, panel32>,
         memref<8x32xf32>) -> ()
  return
}

// -----

// grouped_matmul_c4, side effects
func.func @grouped_matmul_c4_effects(%x: memref<8x32xf32>, %off: memref<5xi32>,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a region without side effects}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    // expected-note @below {{see 'memref.alloc'}}
    %a = memref.alloc() : memref<4xf32>
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c1
func.func @activate_c1(%p: memref<8x2x24xf32>, %o: memref<8x25xf32>) {
  // expected-error @below {{expected width F of the result = 24, but got 25}}
  moe.activate ins(%p : memref<8x2x24xf32>) outs(%o : memref<8x25xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c1_rows
func.func @activate_c1_rows(%p: memref<8x2x24xf32>, %o: memref<9x24xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.activate ins(%p : memref<8x2x24xf32>) outs(%o : memref<9x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c1_parts
func.func @activate_c1_parts(%p: memref<8x?x24xf32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a static number of parts, but got ?}}
  moe.activate ins(%p : memref<8x?x24xf32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c2
func.func @activate_c2(%p: memref<8x2x24xf32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a region of 2 arguments, one per part, but got 1}}
  moe.activate ins(%p : memref<8x2x24xf32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// claim_c1
func.func @claim_c1(%n: index) {
  // expected-error @below {{expected counter in [0, 16), but got 16}}
  %i = moe.claim counter(16) count(%n) : index
  return
}

// -----

// stage_c2
func.func @stage_c2() {
  moe.stage "a" body(%lane, %lanes) {
    // expected-error @below {{expected a stage outside other stages}}
    moe.stage "b" body(%l, %ls) {
    }
  }
  return
}

// -----

// stage_c1
func.func @stage_c1() {
  // expected-error @below {{expected a body with two index arguments (lane, lanes)}}
  "moe.stage"() <{label = "a"}> ({
  ^bb0(%lane: index):
    moe.yield
  }, {}) : () -> ()
  return
}

// -----

// gemm_tile_c2
func.func @gemm_tile_c2(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected a region of 1 arguments, one per part, but got 2}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into blocked(%o : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1> {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// gemm_tile_c3
func.func @gemm_tile_c3(%n: index, %a: memref<?xf32>, %o: memref<?x32xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected via, gate, scale and compute with into combine only}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into rows(%o row %n : memref<?x32xf32>) compute = bf16
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_c3_compute
func.func @gemm_tile_c3_compute(%n: index, %a: memref<?xf32>, %o: memref<1x?x32xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected compute with into combine, but got none}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into combine(%o row %n : memref<1x?x32xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_c4
func.func @gemm_tile_c4(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected row with into rows and into combine, and only there}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into blocked(%o row %n : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_c5
func.func @gemm_tile_c5(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x2x24x32xf32, panel32>) {
  // expected-error @below {{expected one part or a region with into blocked, but got 2 parts}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x2x24x32xf32, panel32>)
      into blocked(%o : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_rank
func.func @gemm_tile_rank(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected a result of rank 2 into rows, but got 1}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into rows(%o row %n : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_scratch
func.func @gemm_tile_scratch(%n: index, %a: memref<?xf32>, %o: memref<2x?x32xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected panels of the scratch = 1, but got 2}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into combine(%o row %n : memref<2x?x32xf32>) compute = f32
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// select_experts_c1
func.func @select_experts_c1(%l: memref<?x64xf32>, %n: index, %w: memref<?x3xf32>,
    %e: memref<?x2xi32>) {
  // expected-error @below {{expected chosen experts K of the weights = 2, but got 3}}
  moe.select_experts logits(%l : memref<?x64xf32>) experts = 64 range(%n, %n)
      outs(%w, %e : memref<?x3xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// select_experts_c2
func.func @select_experts_c2(%l: memref<?x64xf32>, %n: index, %w: memref<?x2xf32>,
    %e: memref<?x2xi32>) {
  // expected-error @below {{expected logits at least E = 65 wide, but got 64}}
  moe.select_experts logits(%l : memref<?x64xf32>) experts = 65 range(%n, %n)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// select_experts_top_k
func.func @select_experts_top_k(%l: memref<?x64xf32>, %n: index, %w: memref<?x2xf32>,
    %e: memref<?x2xi32>) {
  // expected-error @below {{expected top_k at most experts E = 1, but got 2}}
  moe.select_experts logits(%l : memref<?x64xf32>) experts = 1 range(%n, %n)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// begin_panels
func.func @begin_panels(%s: memref<1x?x32xf32>, %y: memref<?x64xf32>, %n: index, %acc: i1) {
  // expected-error @below {{expected panels of the scratch = 2, but got 1}}
  moe.begin_panels into(%s : memref<1x?x32xf32>) from(%y : memref<?x64xf32>)
      first(%n) panels(2) accumulate(%acc)
  return
}

// -----

// end_panels
func.func @end_panels(%s: memref<1x?x16xf32>, %y: memref<?x64xf32>, %n: index) {
  // expected-error @below {{expected columns of the scratch = 32, but got 16}}
  moe.end_panels from(%s : memref<1x?x16xf32>) into(%y : memref<?x64xf32>)
      first(%n) panels(1)
  return
}

// -----

// pack_rows_c2
func.func @pack_rows_c2(%x: memref<?x40xf32>, %n: index, %a: memref<?xbf16>) {
  // expected-error @below {{expected compute = bf16 for a block of bf16, but got 'f32'}}
  moe.pack_rows rows(%x : memref<?x40xf32>) range(%n, %n) compute = f32 into(%a : memref<?xbf16>)
  return
}

// -----

// gemm_tile_c6
func.func @gemm_tile_c6_block(%n: index, %a: memref<?xf32>, %h: memref<?xf32>,
    %w: !moe.weight<4x1x40x33xbf16, panel32>) {
  // expected-error @below {{expected a block of bf16 for product = dot_bf16, but got 'memref<?xf32>'}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xbf16, panel32>) into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "avx512-bf16", rows = 2, panels = 1, product = dot_bf16>
  return
}

// -----

// gemm_tile_c6
func.func @gemm_tile_c6_weight(%n: index, %a: memref<?xbf16>, %h: memref<?xf32>,
    %w: !moe.weight<4x1x40x33xf32, panel32>) {
  // expected-error @below {{expected a weight of bf16 for product = dot_bf16, but got}}
  moe.gemm_tile count(%n) a(%a : memref<?xbf16>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xf32, panel32>) into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "avx512-bf16", rows = 2, panels = 1, product = dot_bf16>
  return
}

// -----

// weight_type, vector32
// expected-error @below {{expected one column of f32 in layout vector32, but got 2 of f32}}
func.func private @vector32_columns(!moe.weight<1x1x8x2xf32, vector32>)

// -----

// router_c5, sum_top2
func.func @router_c5_pairs(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected groups of at least 2 experts for sum_top2, but got 1}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2,
                  groups = <count = 8, keep = 4, reduce = sum_top2, fill = zero>>
  return
}

// -----

// router_c6
func.func @router_c6(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %b: !moe.weight<1x1x9x1xf32, vector32>, %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected bias of 1x1x8x1, but got 1x1x9x1}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      bias(%b : !moe.weight<1x1x9x1xf32, vector32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  return
}

// -----

// router_c7
func.func @router_c7(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected input_scale exactly with input = rms_norm, but got none}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, input = rms_norm>
  return
}

// -----

// router_c8
func.func @router_c8(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected softmax without groups, selection bias and renormalisation}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = sigmoid, order = score_then_select, top_k = 2, select = sparse_mixer>
  return
}

// -----

// combine_c5
func.func @combine_c5(%r: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w: memref<4x2xf32>, %k: index, %g: memref<4x1xf32>, %y: memref<4x32xf32>) {
  // expected-error @below {{expected gate without pairs, but got both}}
  moe.combine ins(%r, %off : memref<?x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<?xi32>, memref<4x2xf32>) gate(%g : memref<4x1xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c6
func.func @combine_c6(%r: memref<4x32xf32>, %off: memref<2xi32>, %s: memref<4x32xf32>,
    %y: memref<4x32xf32>) {
  // expected-error @below {{expected accumulate with from, but got from alone}}
  moe.combine ins(%r, %off : memref<4x32xf32>, memref<2xi32>) from %s : memref<4x32xf32>
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// experts_c6
func.func @experts_c6(%x: memref<4x32xf32>, %y: memref<4x32xf32>,
    %w1: !moe.weight<1x2x16x32xf32, panel32>, %w2: !moe.weight<1x1x32x16xf32, panel32>) {
  // expected-error @below {{expected biases exactly with bias = true, but got none}}
  moe.ffn ins(%x, %w1, %w2 : memref<4x32xf32>, !moe.weight<1x2x16x32xf32, panel32>,
      !moe.weight<1x1x32x16xf32, panel32>) outs(%y : memref<4x32xf32>)
      #moe.expert<form = glu, activation = silu, bias = true>
  return
}

// -----

// grouped_matmul_c9
func.func @grouped_matmul_c9(%x: memref<8x32xf32>, %off: memref<5xi32>,
    %w: !moe.weight<4x1x24x32xf32, panel32>, %b: !moe.weight<4x1x23x1xf32, vector32>,
    %o: memref<8x24xf32>) {
  // expected-error @below {{expected a bias of 4x1x24x1, but got 4x1x23x1}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x1x24x32xf32, panel32>)
      bias(%b : !moe.weight<4x1x23x1xf32, vector32>) outs(%o : memref<8x24xf32>)
  return
}
