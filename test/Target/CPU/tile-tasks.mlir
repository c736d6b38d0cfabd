// RUN: moe-opt %s --moe-select-strategy --moe-bufferize --moe-cpu-tile-tasks --canonicalize --cse \
// RUN:   | FileCheck %s
// RUN: not moe-opt %s --moe-bufferize --moe-cpu-tile-tasks 2>&1 | FileCheck %s --check-prefix=NONE

// NONE: expected a strategy, but got none; run moe-select-strategy

// CHECK-LABEL: func.func @f0(
// CHECK-SAME: %[[OFF:[a-z0-9]*]]: memref<5xi32> {moe.arg = "offsets"}
// The router: row blocks of tokens, at least one for every lane.
// CHECK: moe.stage "route"
// CHECK: arith.minui
// CHECK: arith.maxui
// CHECK: moe.claim counter(0)
// CHECK: moe.pack_rows
// CHECK: moe.gemm_tile {{.*}} into rows
// CHECK: moe.select_experts
// The sort is a stage of its own here: its tail runs once.
// CHECK: moe.stage "dispatch"
// CHECK: tail
// CHECK: memref.store {{.*}}%[[OFF]]
// Up: packed rows of a chunk are used again by its other tasks.
// CHECK: moe.stage "up"
// CHECK: moe.claim counter(1)
// CHECK: scf.if
// CHECK: moe.pack_rows {{.*}} via
// CHECK: moe.gemm_tile {{.*}} into blocked
// Down: a task owns its panels for all chunks.
// CHECK: moe.stage "down"
// CHECK: moe.claim counter(2)
// CHECK: moe.begin_panels
// CHECK: moe.gemm_tile {{.*}} into combine
// CHECK: moe.end_panels
func.func @f0(%x: tensor<?x40xbf16> {moe.arg = "x"}, %y: tensor<?x40xbf16> {moe.arg = "y"},
    %w0: tensor<?x2xf32> {moe.arg = "weights"}, %e0: tensor<?x2xi32> {moe.arg = "experts"},
    %wg: !moe.weight<1x1x4x40xbf16, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64},
    %w1: !moe.weight<4x2x8x40xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64},
    %w2: !moe.weight<4x1x40x8xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64})
    -> (tensor<?x40xbf16>, tensor<?x2xf32>, tensor<?x2xi32>)
    attributes {moe.entry = "forward", moe.compute = bf16,
                moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  %c0 = arith.constant 0 : index
  %c2 = arith.constant 2 : index
  %t = tensor.dim %x, %c0 : tensor<?x40xbf16>
  %n = arith.muli %t, %c2 : index
  %w, %e = moe.router ins(%x, %wg : tensor<?x40xbf16>, !moe.weight<1x1x4x40xbf16, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
      -> tensor<?x2xf32>, tensor<?x2xi32>
  %o = tensor.empty() : tensor<5xi32>
  %p = tensor.empty(%n) : tensor<?xi32>
  %off, %pair = moe.dispatch ins(%e : tensor<?x2xi32>) experts = 4
      outs(%o, %p : tensor<5xi32>, tensor<?xi32>) -> tensor<5xi32>, tensor<?xi32>
  %h0 = tensor.empty(%n) : tensor<?x8xf32>
  %h = moe.grouped_matmul rows(%x via %pair slots %c2 : tensor<?x40xbf16>, tensor<?xi32>)
      groups(%off : tensor<5xi32>) weights(%w1 : !moe.weight<4x2x8x40xbf16, panel32>)
      outs(%h0 : tensor<?x8xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x8xf32>
  %z = moe.grouped_matmul rows(%h : tensor<?x8xf32>) groups(%off : tensor<5xi32>)
      weights(%w2 : !moe.weight<4x1x40x8xbf16, panel32>)
      combine as bf16 (%pair, %w slots %c2 : tensor<?xi32>, tensor<?x2xf32>)
      outs(%y : tensor<?x40xbf16>) -> tensor<?x40xbf16>
  return %z, %w, %e : tensor<?x40xbf16>, tensor<?x2xf32>, tensor<?x2xi32>
}
