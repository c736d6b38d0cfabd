// RUN: moe-opt %s --moe-bufferize --canonicalize --cse | FileCheck %s

// x and y have a dynamic row stride, routing is compact; results are the destination arguments.

// CHECK-LABEL: func.func @f0(
// CHECK-SAME: memref<?x40xbf16, strided<[?, 1]>> {moe.arg = "x"}
// CHECK-SAME: %[[Y:.*]]: memref<?x40xbf16, strided<[?, 1]>> {moe.arg = "y"}
// CHECK-SAME: %[[W:.*]]: memref<?x2xf32> {moe.arg = "weights"}
// CHECK-SAME: %[[E:.*]]: memref<?x2xi32> {moe.arg = "experts"}
// CHECK-NOT: memref.copy
// CHECK: moe.router {{.*}} outs(%[[W]], %[[E]] :
// CHECK: outs(%[[Y]] : memref<?x40xbf16, strided<[?, 1]>>)
// CHECK-NOT: memref.copy
// CHECK: return{{$}}
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
