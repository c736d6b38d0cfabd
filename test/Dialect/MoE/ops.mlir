// RUN: moe-opt %s | moe-opt | FileCheck %s
// RUN: moe-opt %s --mlir-print-op-generic | moe-opt | FileCheck %s

// CHECK: moe.weight @L3.router : !moe.weight<1x1x64x2048xbf16, panel32> role "router" from [#moe.source<"model.layers.3.mlp.gate.weight">]
moe.weight @L3.router : !moe.weight<1x1x64x2048xbf16, panel32> role "router" from
    [#moe.source<"model.layers.3.mlp.gate.weight">]
// CHECK: moe.weight @L3.gate_up
// CHECK-SAME: role "gate_up" from [#moe.source<"model.layers.3.mlp.experts.{e}.gate_proj.weight">, #moe.source<"model.layers.3.mlp.experts.{e}.up_proj.weight", part = 1>]
moe.weight @L3.gate_up : !moe.weight<64x2x1024x2048xbf16, panel32> role "gate_up" from
    [#moe.source<"model.layers.3.mlp.experts.{e}.gate_proj.weight">,
     #moe.source<"model.layers.3.mlp.experts.{e}.up_proj.weight", part = 1>]
// CHECK: moe.weight @L3.down
// CHECK-SAME: #moe.source<"down", arrangement = stacked, rows = [0, 2048], transposed, interleaved>
moe.weight @L3.down : !moe.weight<64x1x2048x1024xbf16, panel32> role "down" from
    [#moe.source<"down", arrangement = stacked, rows = [0, 2048], transposed, interleaved>]

// CHECK: moe.layer @L3 "model.layers.3.mlp" kind = moe index = 3 compute = bf16 dims = <H = 2048, F = 1024, E = 64, K = 8> forward = @forward route = @route experts = @experts weights(@L3.router, @L3.gate_up, @L3.down)
moe.layer @L3 "model.layers.3.mlp" kind = moe index = 3 compute = bf16
    dims = <H = 2048, F = 1024, E = 64, K = 8> forward = @forward route = @route
    experts = @experts weights(@L3.router, @L3.gate_up, @L3.down)
// CHECK: moe.code @outlined stages = [@forward, @route] workspace = @experts
moe.code @outlined stages = [@forward, @route] workspace = @experts
// CHECK: moe.layer @L4 {{.*}} entries [#moe.entry<kind = forward, level = "x86-64-v4", x = bf16, y = f32, function = @forward>] weights()
moe.layer @L4 "model.layers.4.mlp" kind = dense index = 4 compute = f32
    dims = <H = 8, F = 4, E = 1, K = 1>
    entries [#moe.entry<kind = forward, level = "x86-64-v4", x = bf16, y = f32, function = @forward>]
    weights()

// CHECK-LABEL: func.func @forward
// CHECK-SAME: attributes {moe.compute = bf16, moe.entry = "forward", moe.target = #moe.target<cpu, level = "x86-64-v4">}
func.func @forward(%x: tensor<?x2048xbf16> {moe.arg = "x"}, %y: tensor<?x2048xbf16> {moe.arg = "y"},
    %w0: tensor<?x8xf32> {moe.arg = "weights"}, %e0: tensor<?x8xi32> {moe.arg = "experts"},
    %acc: i1 {moe.arg = "accumulate"},
    %wg: !moe.weight<1x1x64x2048xbf16, panel32> {moe.arg = "weight", moe.weight_index = 0},
    %w1: !moe.weight<64x2x1024x2048xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1},
    %w2: !moe.weight<64x1x2048x1024xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2})
    -> (tensor<?x2048xbf16>, tensor<?x8xf32>, tensor<?x8xi32>)
    attributes {moe.entry = "forward", moe.compute = bf16,
                moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  %c0 = arith.constant 0 : index
  %k = arith.constant 8 : index
  %t = tensor.dim %x, %c0 : tensor<?x2048xbf16>
  %n = arith.muli %t, %k : index
  // CHECK: %[[W:.*]], %[[E:.*]] = moe.router ins(%{{.*}}, %{{.*}} : tensor<?x2048xbf16>, !moe.weight<1x1x64x2048xbf16, panel32>) outs(%{{.*}}, %{{.*}} : tensor<?x8xf32>, tensor<?x8xi32>) #moe.router<score = softmax, order = score_then_select, top_k = 8, renormalize = sum> -> tensor<?x8xf32>, tensor<?x8xi32>
  %w, %e = moe.router ins(%x, %wg : tensor<?x2048xbf16>, !moe.weight<1x1x64x2048xbf16, panel32>)
      outs(%w0, %e0 : tensor<?x8xf32>, tensor<?x8xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 8, renormalize = sum>
      -> tensor<?x8xf32>, tensor<?x8xi32>
  %off0 = tensor.empty() : tensor<65xi32>
  %pair0 = tensor.empty(%n) : tensor<?xi32>
  // CHECK: %[[OFF:.*]], %[[PAIR:.*]] = moe.dispatch ins(%[[E]] : tensor<?x8xi32>) experts = 64 outs(%{{.*}}, %{{.*}} : tensor<65xi32>, tensor<?xi32>) -> tensor<65xi32>, tensor<?xi32>
  %off, %pair = moe.dispatch ins(%e : tensor<?x8xi32>) experts = 64
      outs(%off0, %pair0 : tensor<65xi32>, tensor<?xi32>) -> tensor<65xi32>, tensor<?xi32>
  %r0 = tensor.empty(%n) : tensor<?x2048xbf16>
  // CHECK: moe.experts ins(%{{.*}}, %[[OFF]], %[[PAIR]], %{{.*}}, %{{.*}} : {{.*}}) slots %{{.*}} outs(%{{.*}} : tensor<?x2048xbf16>) #moe.expert<form = glu, activation = silu> -> tensor<?x2048xbf16>
  %r = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x2048xbf16>, tensor<65xi32>,
      tensor<?xi32>, !moe.weight<64x2x1024x2048xbf16, panel32>,
      !moe.weight<64x1x2048x1024xbf16, panel32>) slots %k outs(%r0 : tensor<?x2048xbf16>)
      #moe.expert<form = glu, activation = silu> -> tensor<?x2048xbf16>
  // CHECK: moe.combine ins(%{{.*}}, %[[OFF]] : tensor<?x2048xbf16>, tensor<65xi32>) via(%[[PAIR]], %[[W]] slots %{{.*}} : tensor<?xi32>, tensor<?x8xf32>) accumulate %{{.*}} outs(%{{.*}} : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  %z = moe.combine ins(%r, %off : tensor<?x2048xbf16>, tensor<65xi32>)
      via(%pair, %w slots %k : tensor<?xi32>, tensor<?x8xf32>) accumulate %acc
      outs(%y : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  return %z, %w, %e : tensor<?x2048xbf16>, tensor<?x8xf32>, tensor<?x8xi32>
}

// CHECK-LABEL: func.func @route
func.func @route(%x: tensor<?x32xf32>, %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>,
    %l0: tensor<?x8xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %b: !moe.weight<1x1x8x1xf32, vector32>, %i: !moe.weight<1x1x32x1xf32, vector32>)
    -> (tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>) {
  // CHECK: moe.router {{.*}} bias(%{{.*}} : !moe.weight<1x1x8x1xf32, vector32>) selection_bias({{.*}}) expert_scale({{.*}}) input_scale(%{{.*}} : !moe.weight<1x1x32x1xf32, vector32>) outs(%{{.*}}, %{{.*}}, %{{.*}} : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>)
  // CHECK-SAME: #moe.router<score = sigmoid, order = score_then_select, top_k = 2, renormalize = clamp_sum, epsilon = 1.0e-20, scale = 2.5, precision = model, input = rms_norm, logit_transform = <softcap, 30.0>, selection_bias = score, groups = <count = 4, keep = 2, reduce = sum_top2, fill = neg_inf>, input_epsilon = 1.0e-06> compute = bf16
  %w, %e, %l = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      bias(%b : !moe.weight<1x1x8x1xf32, vector32>)
      selection_bias(%b : !moe.weight<1x1x8x1xf32, vector32>)
      expert_scale(%b : !moe.weight<1x1x8x1xf32, vector32>)
      input_scale(%i : !moe.weight<1x1x32x1xf32, vector32>)
      outs(%w0, %e0, %l0 : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>)
      #moe.router<score = sigmoid, order = score_then_select, top_k = 2, renormalize = clamp_sum,
                  epsilon = 1.0e-20, scale = 2.5, precision = model, input = rms_norm,
                  input_epsilon = 1.0e-6, logit_transform = <softcap, 30.0>, selection_bias = score,
                  groups = <count = 4, keep = 2, reduce = sum_top2, fill = neg_inf>>
      compute = bf16 -> tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>
  return %w, %e, %l : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>
}

// CHECK-LABEL: func.func private @model_rounding
// CHECK-SAME: #moe.router<score = softmax, order = score_then_select, top_k = 2, precision = model, model_arithmetic = cast_inputs, weight_dtype = f32>
// CHECK-SAME: #moe.router<score = softmax, order = score_then_select, top_k = 2, precision = model>
// CHECK-SAME: #moe.router<score = softmax, order = score_then_select, top_k = 2, precision = model, model_arithmetic = model_dtype>
func.func private @model_rounding() attributes {
    test.cast = #moe.router<score = softmax, order = score_then_select, top_k = 2, precision = model,
                            model_arithmetic = cast_inputs, weight_dtype = f32>,
    test.upcast = #moe.router<score = softmax, order = score_then_select, top_k = 2,
                              precision = model, model_arithmetic = upcast_logits,
                              weight_dtype = model>,
    test.whole = #moe.router<score = softmax, order = score_then_select, top_k = 2,
                             precision = model, model_arithmetic = model_dtype>}

// CHECK-LABEL: func.func @experts
func.func @experts(%x: tensor<?x32xf32>, %y: tensor<?x32xf32>, %acc: i1, %n: index,
    %w1: !moe.weight<1x2x16x32xf32, panel32>, %w2: !moe.weight<1x1x32x16xf32, panel32>,
    %b1: !moe.weight<1x2x16x1xf32, vector32>, %b2: !moe.weight<1x1x32x1xf32, vector32>,
    %gate: tensor<?x1xf32>, %scale: f32, %start: tensor<?x32xf32>)
    -> tensor<?x32xf32> {
  // CHECK: moe.ffn ins({{.*}}) bias({{.*}} : !moe.weight<1x2x16x1xf32, vector32>, !moe.weight<1x1x32x1xf32, vector32>) rows %{{.*}} gate(%{{.*}} : tensor<?x1xf32>) scale %{{.*}} accumulate %{{.*}} from %{{.*}} : tensor<?x32xf32> outs(%{{.*}} : tensor<?x32xf32>) #moe.expert<form = glu, activation = gelu_tanh, clamp = <kind = oai, limit = 7.0, alpha = 1.702>, bias = true> -> tensor<?x32xf32>
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x32xf32>, !moe.weight<1x2x16x32xf32, panel32>,
      !moe.weight<1x1x32x16xf32, panel32>)
      bias(%b1, %b2 : !moe.weight<1x2x16x1xf32, vector32>, !moe.weight<1x1x32x1xf32, vector32>)
      rows %n gate(%gate : tensor<?x1xf32>) scale %scale accumulate %acc
      from %start : tensor<?x32xf32> outs(%y : tensor<?x32xf32>)
      #moe.expert<form = glu, activation = gelu_tanh,
                  clamp = <kind = oai, limit = 7.0, alpha = 1.702>, bias = true>
      -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}

// CHECK-LABEL: func.func @fused
func.func @fused(%x: tensor<?x2048xbf16>, %y: tensor<?x2048xbf16>, %k: index, %acc: i1,
    %w0: tensor<?x8xf32>, %e0: tensor<?x8xi32>, %off0: tensor<65xi32>, %pair0: tensor<?xi32>,
    %h0: tensor<?x1024xf32>, %gu0: tensor<?x2x1024xf32>, %g0: tensor<?x2048xbf16>,
    %wg: !moe.weight<1x1x64x2048xbf16, panel32>, %w1: !moe.weight<64x2x1024x2048xbf16, panel32>,
    %w2: !moe.weight<64x1x2048x1024xbf16, panel32>)
    -> (tensor<?x2048xbf16>, tensor<?x2048xbf16>) {
  // CHECK: %[[W:.*]], %[[E:.*]], %[[OFF:.*]], %[[PAIR:.*]] = moe.route_dispatch ins({{.*}}) outs({{.*}}) #moe.router<score = softmax, order = score_then_select, top_k = 8> -> tensor<?x8xf32>, tensor<?x8xi32>, tensor<65xi32>, tensor<?xi32>
  %w, %e, %off, %pair = moe.route_dispatch
      ins(%x, %wg : tensor<?x2048xbf16>, !moe.weight<1x1x64x2048xbf16, panel32>)
      outs(%w0, %e0, %off0, %pair0 :
           tensor<?x8xf32>, tensor<?x8xi32>, tensor<65xi32>, tensor<?xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 8>
      -> tensor<?x8xf32>, tensor<?x8xi32>, tensor<65xi32>, tensor<?xi32>
  // CHECK: moe.gather ins(%{{.*}}, %[[OFF]], %[[PAIR]] : tensor<?x2048xbf16>, tensor<65xi32>, tensor<?xi32>) slots %{{.*}} outs(%{{.*}} : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  %g = moe.gather ins(%x, %off, %pair : tensor<?x2048xbf16>, tensor<65xi32>, tensor<?xi32>)
      slots %k outs(%g0 : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  // CHECK: moe.grouped_matmul rows(%{{.*}} : tensor<?x2048xbf16>) groups(%[[OFF]] : tensor<65xi32>) weights(%{{.*}} : !moe.weight<64x2x1024x2048xbf16, panel32>) outs(%{{.*}} : tensor<?x2x1024xf32>) -> tensor<?x2x1024xf32>
  %gu = moe.grouped_matmul rows(%g : tensor<?x2048xbf16>) groups(%off : tensor<65xi32>)
      weights(%w1 : !moe.weight<64x2x1024x2048xbf16, panel32>) outs(%gu0 : tensor<?x2x1024xf32>)
      -> tensor<?x2x1024xf32>
  // CHECK: moe.activate ins(%{{.*}} : tensor<?x2x1024xf32>) outs(%{{.*}} : tensor<?x1024xf32>) {
  // CHECK-NEXT: ^bb0(%[[G:.*]]: f32, %[[U:.*]]: f32):
  // CHECK-NEXT: %[[M:.*]] = arith.mulf %[[G]], %[[U]] : f32
  // CHECK-NEXT: moe.yield %[[M]] : f32
  // CHECK-NEXT: } -> tensor<?x1024xf32>
  %h1 = moe.activate ins(%gu : tensor<?x2x1024xf32>) outs(%h0 : tensor<?x1024xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x1024xf32>
  // CHECK: moe.grouped_matmul rows(%{{.*}} via %[[PAIR]] slots %{{.*}} as bf16 : tensor<?x2048xbf16>, tensor<?xi32>) {{.*}} outs(%{{.*}} : tensor<?x1024xf32>) strategy = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1, prefetch = 1024>, chunk_rows = 256, panels_per_task = 4, source = gather, result = blocked> {
  // CHECK: moe.yield
  // CHECK: } -> tensor<?x1024xf32>
  %h = moe.grouped_matmul
      rows(%x via %pair slots %k as bf16 : tensor<?x2048xbf16>, tensor<?xi32>)
      groups(%off : tensor<65xi32>) weights(%w1 : !moe.weight<64x2x1024x2048xbf16, panel32>)
      outs(%h0 : tensor<?x1024xf32>)
      strategy = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1,
                                                      order = b_first, prefetch = 1024>,
                               chunk_rows = 256, panels_per_task = 4, source = gather,
                               result = blocked> {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x1024xf32>
  // CHECK: moe.grouped_matmul rows(%{{.*}} : tensor<?x1024xf32>) groups(%[[OFF]] : tensor<65xi32>) weights({{.*}}) combine as bf16(%[[PAIR]], %[[W]] slots %{{.*}} : tensor<?xi32>, tensor<?x8xf32>) accumulate %{{.*}} outs(%{{.*}} : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  %z = moe.grouped_matmul rows(%h : tensor<?x1024xf32>) groups(%off : tensor<65xi32>)
      weights(%w2 : !moe.weight<64x1x2048x1024xbf16, panel32>)
      combine as bf16 (%pair, %w slots %k : tensor<?xi32>, tensor<?x8xf32>) accumulate %acc
      outs(%y : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  %v = moe.grouped_matmul rows(%h1 : tensor<?x1024xf32>) groups(%off : tensor<65xi32>)
      weights(%w2 : !moe.weight<64x1x2048x1024xbf16, panel32>)
      combine as f32 accumulate %acc
      outs(%y : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  return %z, %v : tensor<?x2048xbf16>, tensor<?x2048xbf16>
}

// CHECK-LABEL: func.func @single_group
func.func @single_group(%t: index, %off0: tensor<2xi32>) -> tensor<2xi32> {
  // CHECK: moe.single_group rows(%{{.*}}) outs(%{{.*}} : tensor<2xi32>) -> tensor<2xi32>
  %off = moe.single_group rows(%t) outs(%off0 : tensor<2xi32>) -> tensor<2xi32>
  return %off : tensor<2xi32>
}

// CHECK-LABEL: func.func @buffers
func.func @buffers(%x: memref<?x32xf32>, %y: memref<?x32xf32>, %off: memref<9xi32>,
    %pair: memref<?xi32>, %w: memref<?x2xf32>, %e: memref<?x2xi32>, %k: index,
    %wg: !moe.weight<1x1x8x32xf32, panel32>, %w1: !moe.weight<8x1x32x32xf32, panel32>) {
  // CHECK: moe.router ins({{.*}}) outs(%{{.*}}, %{{.*}} : memref<?x2xf32>, memref<?x2xi32>) #moe.router<score = softmax, order = score_then_select, top_k = 2>
  // CHECK-NOT: ->
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  moe.dispatch ins(%e : memref<?x2xi32>) experts = 8 outs(%off, %pair : memref<9xi32>, memref<?xi32>)
  moe.grouped_matmul rows(%x via %pair slots %k : memref<?x32xf32>, memref<?xi32>)
      groups(%off : memref<9xi32>) weights(%w1 : !moe.weight<8x1x32x32xf32, panel32>)
      combine as f32 (%pair, %w slots %k : memref<?xi32>, memref<?x2xf32>)
      outs(%y : memref<?x32xf32>)
  return
}

// CHECK-LABEL: func.func @tasks
func.func @tasks(%x: memref<?x2048xbf16, strided<[?, 1]>>, %y: memref<?x2048xbf16>,
    %pair: memref<?xi32>, %k: index, %a: memref<?xf32>, %h: memref<?xf32>,
    %scratch: memref<1x?x32xf32>, %logits: memref<?x64xf32>, %w: memref<?xf32>,
    %wm: memref<?x8xf32>, %em: memref<?x8xi32>, %r: memref<?x1024xf32>, %acc: i1, %ab: memref<?xbf16>,
    %w1: !moe.weight<64x2x1024x2048xbf16, panel32>,
    %w2: !moe.weight<64x1x2048x1024xbf16, panel32>) {
  // CHECK: moe.stage "up" body(%[[LANE:.*]], %{{.*}}) {
  moe.stage "up" body(%lane, %lanes) {
    %c1 = arith.constant 1 : index
    // CHECK: moe.claim counter(3) count(%{{.*}}) : index
    %i = moe.claim counter(3) count(%c1) : index
    // CHECK: moe.pack_rows rows(%{{.*}} : memref<?x2048xbf16, strided<[?, 1]>>) via(%{{.*}}, %{{.*}} : memref<?xi32>) range(%[[LANE]], %{{.*}}) compute = bf16 into(%{{.*}} : memref<?xf32>)
    moe.pack_rows rows(%x : memref<?x2048xbf16, strided<[?, 1]>>) via(%pair, %k : memref<?xi32>)
        range(%lane, %c1) compute = bf16 into(%a : memref<?xf32>)
    // CHECK: moe.gemm_tile count(%{{.*}}) a(%{{.*}} : memref<?xf32>) weight(%{{.*}}[%{{.*}}, %{{.*}}] : !moe.weight<64x2x1024x2048xbf16, panel32>) into blocked(%{{.*}} : memref<?xf32>) ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1> {
    moe.gemm_tile count(%c1) a(%a : memref<?xf32>)
        weight(%w1[%i, %lane] : !moe.weight<64x2x1024x2048xbf16, panel32>)
        into blocked(%h : memref<?xf32>)
        ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1> {
    ^bb0(%gate: f32, %up: f32):
      %m = arith.mulf %gate, %up : f32
      moe.yield %m : f32
    }
    // CHECK: moe.gemm_tile {{.*}} into rows(%{{.*}} row %{{.*}} : memref<?x1024xf32>) ukernel
    moe.gemm_tile count(%c1) a(%a : memref<?xf32>)
        weight(%w1[%i, %lane] : !moe.weight<64x2x1024x2048xbf16, panel32>)
        into rows(%r row %i : memref<?x1024xf32>)
        ukernel = #moe.ukernel<level = "x86-64-v3", rows = 3, panels = 1, order = a_first> {
    ^bb0(%gate: f32, %up: f32):
      %m = arith.mulf %gate, %up : f32
      moe.yield %m : f32
    }
    // CHECK: moe.begin_panels into(%{{.*}} : memref<1x?x32xf32>) from(%{{.*}} : memref<?x2048xbf16>) first(%{{.*}}) panels(1) accumulate(%{{.*}})
    moe.begin_panels into(%scratch : memref<1x?x32xf32>) from(%y : memref<?x2048xbf16>)
        first(%i) panels(1) accumulate(%acc)
    // CHECK: moe.gemm_tile {{.*}} into combine(%{{.*}} row %{{.*}} : memref<1x?x32xf32>) via(%{{.*}}, %{{.*}} slots %{{.*}} : memref<?xi32>, memref<?xf32>) compute = bf16 ukernel
    moe.gemm_tile count(%c1) a(%a : memref<?xf32>)
        weight(%w2[%i, %lane] : !moe.weight<64x1x2048x1024xbf16, panel32>)
        into combine(%scratch row %i : memref<1x?x32xf32>)
        via(%pair, %w slots %k : memref<?xi32>, memref<?xf32>) compute = bf16
        ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
    // CHECK: moe.gemm_tile {{.*}} ahead(%{{.*}}) k(%{{.*}} to %{{.*}}, %{{.*}} : memref<?xf32>) into blocked({{.*}} product = tile_bf16, ahead = 8, k_block = 16>
    moe.gemm_tile count(%c1) a(%ab : memref<?xbf16>)
        weight(%w2[%i, %lane] : !moe.weight<64x1x2048x1024xbf16, panel32>)
        ahead(%k) k(%i to %c1, %a : memref<?xf32>) into blocked(%ab : memref<?xbf16>)
        ukernel = #moe.ukernel<level = "amx-bf16", rows = 32, panels = 1, product = tile_bf16,
                               ahead = 8, k_block = 16>
    // CHECK: moe.gemm_tile {{.*}} k(%{{.*}} to %{{.*}}, %{{.*}} : memref<?xf32>) after(%{{.*}} of %{{.*}}) into blocked({{.*}} k_block = 16, hint = stream, defer = 2>
    moe.gemm_tile count(%c1) a(%ab : memref<?xbf16>)
        weight(%w2[%i, %lane] : !moe.weight<64x1x2048x1024xbf16, panel32>)
        k(%i to %c1, %a : memref<?xf32>) after(%i of %k) into blocked(%ab : memref<?xbf16>)
        ukernel = #moe.ukernel<level = "amx-bf16", rows = 32, panels = 1, product = tile_bf16,
                               k_block = 16, hint = stream, defer = 2>
    // CHECK: moe.end_panels from(%{{.*}} : memref<1x?x32xf32>) into(%{{.*}} : memref<?x2048xbf16>) first(%{{.*}}) panels(1)
    moe.end_panels from(%scratch : memref<1x?x32xf32>) into(%y : memref<?x2048xbf16>)
        first(%i) panels(1)
  // CHECK: } tail {
  } tail {
    %c0 = arith.constant 0 : index
    // CHECK: moe.select_experts logits(%{{.*}} : memref<?x64xf32>) experts = 64 range(%{{.*}}, %{{.*}}) outs(%{{.*}}, %{{.*}} : memref<?x8xf32>, memref<?x8xi32>) #moe.router<score = softmax, order = score_then_select, top_k = 8>
    moe.select_experts logits(%logits : memref<?x64xf32>) experts = 64 range(%c0, %k)
        outs(%wm, %em : memref<?x8xf32>, memref<?x8xi32>)
        #moe.router<score = softmax, order = score_then_select, top_k = 8>
  }
  return
}
