// RUN: moe-opt %s --moe-select-strategy | FileCheck %s
// RUN: moe-opt %s --moe-select-strategy="overrides={\"f0\":{\"grouped_matmul.*\":{\"rows\":12,\"chunk_rows\":24},\"grouped_matmul.0\":{\"prefetch\":0}}}" \
// RUN:   | FileCheck %s --check-prefix=OVER
// RUN: not moe-opt %s --moe-select-strategy="overrides={\"*\":{\"grouped_matmul.0\":{\"rows\":15}}}" 2>&1 \
// RUN:   | FileCheck %s --check-prefix=BUDGET
// RUN: not moe-opt %s --moe-select-strategy="overrides={\"*\":{\"grouped_matmul.1\":{\"rows\":7}}}" 2>&1 \
// RUN:   | FileCheck %s --check-prefix=BLOCKS
// RUN: not moe-opt %s --moe-select-strategy="overrides={\"*\":{\"grouped_matmul.1\":{\"chunk_rows\":28}}}" 2>&1 \
// RUN:   | FileCheck %s --check-prefix=CHUNKS
// RUN: not moe-opt %s --moe-select-strategy="overrides={\"*\":{\"grouped_matmul.0\":{\"row\":7}}}" 2>&1 \
// RUN:   | FileCheck %s --check-prefix=FIELD
// RUN: not moe-opt %s --moe-select-strategy="overrides={\"*\":{\"matmul\":{\"rows\":7}}}" 2>&1 \
// RUN:   | FileCheck %s --check-prefix=NAME

// CHECK: moe.router
// CHECK-SAME: rows = 14, panels = 1
// CHECK-SAME: source = rows, result = rows>
// CHECK: moe.grouped_matmul rows(%{{.*}} via
// CHECK-SAME: #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1, prefetch = 1024>
// CHECK-SAME: chunk_rows = 504, panels_per_task = 1, source = gather, result = blocked>
// CHECK: moe.grouped_matmul
// CHECK-SAME: chunk_rows = 504, panels_per_task = 2, source = blocked, result = combine, sum_rows = 16384>

// OVER: rows = 12, panels = 1>, chunk_rows = 24
// OVER: rows = 12, panels = 1, prefetch = 1024>, chunk_rows = 24

// BUDGET: illegal strategy:
// BLOCKS: illegal strategy: expected rows 14 as in the matmul that wrote the blocks, but got 7
// CHUNKS: illegal strategy: expected chunk_rows 504 as in the matmul before it, but got 28
// FIELD: expected a strategy field (rows, panels, order, prefetch, ahead, k_block, hint, defer, chunk_rows, panels_per_task, sum_rows, k_chunk), but got `row`
// NAME: expected strategy overrides to name a matmul, but got `*` / `matmul`, which matches none
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
