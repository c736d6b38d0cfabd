// RUN: moe-opt %s --split-input-file --verify-diagnostics

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
