// RUN: moe-opt %s --canonicalize --split-input-file | FileCheck %s

// Softmax over all experts, the best two, divided by their sum: softmax over the best two.
// CHECK-LABEL: func.func @softmax_sum(
func.func @softmax_sum(%x: tensor<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>) -> (tensor<?x2xf32>, tensor<?x2xi32>) {
  // CHECK: moe.router {{.*}} #moe.router<score = softmax, order = select_then_score, top_k = 2, scale = 2.5> ->
  %w, %e = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = sum,
                  scale = 2.5> -> tensor<?x2xf32>, tensor<?x2xi32>
  return %w, %e : tensor<?x2xf32>, tensor<?x2xi32>
}

// -----

// The same for a router fused with its dispatch, and for the norm with p = 1.
// CHECK-LABEL: func.func @softmax_l1_norm(
func.func @softmax_l1_norm(%x: tensor<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>, %off0: tensor<9xi32>, %pair0: tensor<?xi32>)
    -> (tensor<9xi32>, tensor<?xi32>) {
  // CHECK: moe.route_dispatch {{.*}} #moe.router<score = softmax, order = select_then_score, top_k = 2> ->
  %w, %e, %off, %pair = moe.route_dispatch
      ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0, %off0, %pair0 : tensor<?x2xf32>, tensor<?x2xi32>, tensor<9xi32>, tensor<?xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = lp_norm,
                  epsilon = 0.5, norm_p = 1.0, groups = <count = 2, keep = 2, reduce = max, fill = zero>>
      -> tensor<?x2xf32>, tensor<?x2xi32>, tensor<9xi32>, tensor<?xi32>
  return %off, %pair : tensor<9xi32>, tensor<?xi32>
}

// -----

// An epsilon, a bias or the model's own rounding: left as it is.
// CHECK-LABEL: func.func @kept(
func.func @kept(%x: tensor<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %bias: !moe.weight<1x1x8x1xf32, vector32>, %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>)
    -> (tensor<?x2xf32>, tensor<?x2xf32>, tensor<?x2xf32>, tensor<?x2xf32>) {
  // CHECK: moe.router {{.*}} order = score_then_select, top_k = 2, renormalize = sum, epsilon = 1.0e-20>
  %a, %ae = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = sum,
                  epsilon = 1.0e-20> -> tensor<?x2xf32>, tensor<?x2xi32>
  // CHECK: moe.router {{.*}} order = score_then_select, top_k = 2, renormalize = sum, selection_bias = score>
  %b, %be = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      selection_bias(%bias : !moe.weight<1x1x8x1xf32, vector32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = sum,
                  selection_bias = score> -> tensor<?x2xf32>, tensor<?x2xi32>
  // CHECK: moe.router {{.*}} order = score_then_select, top_k = 2, renormalize = sum, precision = model>
  %c, %ce = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, renormalize = sum,
                  precision = model> -> tensor<?x2xf32>, tensor<?x2xi32>
  // CHECK: moe.router {{.*}} #moe.router<score = sigmoid, order = score_then_select, top_k = 2, renormalize = sum>
  %d, %de = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = sigmoid, order = score_then_select, top_k = 2, renormalize = sum>
      -> tensor<?x2xf32>, tensor<?x2xi32>
  return %a, %b, %c, %d : tensor<?x2xf32>, tensor<?x2xf32>, tensor<?x2xf32>, tensor<?x2xf32>
}

// -----

// Without renormalisation an epsilon means nothing.
// CHECK-LABEL: func.func @unused_epsilon(
func.func @unused_epsilon(%x: tensor<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>) -> tensor<?x2xf32> {
  // CHECK: #moe.router<score = softmax, order = score_then_select, top_k = 2> ->
  %w, %e = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, epsilon = 1.0e-6,
                  norm_p = 3.0> -> tensor<?x2xf32>, tensor<?x2xi32>
  return %w : tensor<?x2xf32>
}

// -----

// CHECK-LABEL: func.func @accumulate_false(
func.func @accumulate_false(%r: tensor<?x32xf32>, %off: tensor<2xi32>, %y: tensor<?x32xf32>,
    %w1: !moe.weight<1x2x16x32xf32, panel32>, %w2: !moe.weight<1x1x32x16xf32, panel32>,
    %w3: !moe.weight<1x1x32x32xf32, panel32>)
    -> (tensor<?x32xf32>, tensor<?x32xf32>, tensor<?x32xf32>) {
  %false = arith.constant false
  // CHECK-NOT: accumulate
  // CHECK: return
  %a = moe.combine ins(%r, %off : tensor<?x32xf32>, tensor<2xi32>) accumulate %false
      outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  %b = moe.ffn ins(%r, %w1, %w2 : tensor<?x32xf32>, !moe.weight<1x2x16x32xf32, panel32>,
      !moe.weight<1x1x32x16xf32, panel32>) accumulate %false outs(%y : tensor<?x32xf32>)
      #moe.expert<form = glu, activation = silu> -> tensor<?x32xf32>
  %c = moe.grouped_matmul rows(%r : tensor<?x32xf32>) groups(%off : tensor<2xi32>)
      weights(%w3 : !moe.weight<1x1x32x32xf32, panel32>) combine as f32 accumulate %false
      outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  return %a, %b, %c : tensor<?x32xf32>, tensor<?x32xf32>, tensor<?x32xf32>
}

// -----

// Results have the shape of the outs; unused operations on tensors disappear; constants of an
// activation stay in its region.
// CHECK-LABEL: func.func @shapes(
// CHECK-SAME: %{{.*}}: tensor<?x24xf32>, %[[Y:.*]]: tensor<?x24xf32>
func.func @shapes(%g: tensor<?x24xf32>, %y: tensor<?x24xf32>) -> (tensor<?x24xf32>, index) {
  %c0 = arith.constant 0 : index
  // CHECK: moe.activate
  // CHECK-NEXT: ^bb0
  // CHECK-NEXT: arith.constant
  // CHECK-NOT: moe.activate
  %a = moe.activate ins(%g : tensor<?x24xf32>) outs(%y : tensor<?x24xf32>) {
  ^bb0(%v: f32):
    %half = arith.constant 0.5 : f32
    %m = arith.mulf %half, %v : f32
    moe.yield %m : f32
  } -> tensor<?x24xf32>
  %unused = moe.activate ins(%g : tensor<?x24xf32>) outs(%y : tensor<?x24xf32>) {
  ^bb0(%v: f32):
    moe.yield %v : f32
  } -> tensor<?x24xf32>
  // CHECK: tensor.dim %[[Y]]
  %d = tensor.dim %a, %c0 : tensor<?x24xf32>
  return %a, %d : tensor<?x24xf32>, index
}

// -----

// A score is positive: a group that is filled with 0 cannot win either. With a bias it can.
// CHECK-LABEL: func.func @group_fill(
func.func @group_fill(%x: tensor<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %bias: !moe.weight<1x1x8x1xf32, vector32>, %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>)
    -> (tensor<?x2xf32>, tensor<?x2xf32>) {
  // CHECK: groups = <count = 4, keep = 2, reduce = max, fill = neg_inf>>
  %a, %ae = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2,
                  groups = <count = 4, keep = 2, reduce = max, fill = zero>>
      -> tensor<?x2xf32>, tensor<?x2xi32>
  // CHECK: groups = <count = 4, keep = 2, reduce = max, fill = zero>>
  %b, %be = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      selection_bias(%bias : !moe.weight<1x1x8x1xf32, vector32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2, selection_bias = score,
                  groups = <count = 4, keep = 2, reduce = max, fill = zero>>
      -> tensor<?x2xf32>, tensor<?x2xi32>
  return %a, %b : tensor<?x2xf32>, tensor<?x2xf32>
}

// -----

// A factor of one is none, and without accumulate nothing is started from.
// CHECK-LABEL: func.func @plain_sum(
func.func @plain_sum(%r: tensor<?x32xf32>, %off: tensor<2xi32>, %y: tensor<?x32xf32>,
    %s: tensor<?x32xf32>) -> tensor<?x32xf32> {
  // CHECK: moe.combine ins(%{{.*}}, %{{.*}} : tensor<?x32xf32>, tensor<2xi32>) outs(
  %one = arith.constant 1.0 : f32
  %no = arith.constant false
  %z = moe.combine ins(%r, %off : tensor<?x32xf32>, tensor<2xi32>) scale %one
      accumulate %no from %s : tensor<?x32xf32> outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}
