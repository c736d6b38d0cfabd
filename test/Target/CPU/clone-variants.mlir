// RUN: moe-opt %s --moe-attach-target=levels=x86-64-v4 --moe-clone-variants --split-input-file \
// RUN:   | FileCheck %s

// RUN: moe-opt %s --moe-attach-target=levels=x86-64-v4,avx512-bf16 \
// RUN:     --moe-clone-variants=types=bf16 --moe-select-strategy --split-input-file \
// RUN:   | FileCheck %s --check-prefix=PAIRS
// RUN: moe-opt %s --moe-attach-target=levels=avx512-bf16 --moe-clone-variants=types=f32 \
// RUN:     --split-input-file \
// RUN:   | FileCheck %s --check-prefix=ALONE

// Products of bf16: rows between the matmuls are bf16, the router stays a chain of multiply-adds; a
// function without such a product has the code of x86-64-v4.
// PAIRS-LABEL: func.func @f0_v4_bf16_bf16(
// PAIRS-NOT: dot_bf16
// PAIRS: combine as bf16
// PAIRS-LABEL: func.func @f0_bf16_bf16_bf16(
// PAIRS-SAME: moe.target = #moe.target<cpu, level = "avx512-bf16">
// PAIRS: moe.router
// PAIRS-SAME: #moe.ukernel<level = "avx512-bf16", rows = 14, panels = 1, prefetch = 1024>
// PAIRS: %[[H0:.*]] = tensor.empty(%{{.*}}) : tensor<?x8xbf16>
// PAIRS: %[[H:.*]] = moe.grouped_matmul rows(%{{.*}} via
// PAIRS-SAME: outs(%[[H0]] : tensor<?x8xbf16>)
// PAIRS-SAME: product = dot_bf16>
// PAIRS: moe.grouped_matmul rows(%[[H]] : tensor<?x8xbf16>)
// PAIRS-SAME: product = dot_bf16>
// PAIRS-NOT: func.func @r0_bf16
// PAIRS: kind = forward, level = "avx512-bf16", x = bf16, y = bf16, function = @f0_bf16_bf16_bf16>
// PAIRS-SAME: kind = route, level = "avx512-bf16", x = bf16, y = bf16, function = @r0_v4_bf16>

// ALONE-LABEL: func.func @f0_bf16_f32_f32(
// ALONE: moe.grouped_matmul rows({{.*}} as bf16 : tensor<?x40xf32>
// ALONE-LABEL: func.func @r0_v4_f32(
// ALONE-SAME: moe.target = #moe.target<cpu, level = "x86-64-v4">

// One clone per type of x and of y; an entry without y has one per type of x. Readers of an x that
// is not of the compute type say what they round it to.

// CHECK-LABEL: func.func @f0_v4_f32_f32(
// CHECK-SAME: tensor<?x40xf32> {moe.arg = "x"}, %{{.*}}: tensor<?x40xf32> {moe.arg = "y"}
// CHECK-SAME: moe.target = #moe.target<cpu, level = "x86-64-v4">
// CHECK: moe.router ins({{.*}}tensor<?x40xf32>{{.*}} compute = bf16
// CHECK: moe.grouped_matmul rows(%{{.*}} via %{{.*}} slots %{{.*}} as bf16 : tensor<?x40xf32>
// CHECK: outs(%{{.*}} : tensor<?x40xf32>) -> tensor<?x40xf32>
// CHECK-LABEL: func.func @f0_v4_f32_bf16(
// CHECK-LABEL: func.func @f0_v4_bf16_f32(
// CHECK-LABEL: func.func @f0_v4_bf16_bf16(
// CHECK-LABEL: func.func @r0_v4_f32(
// CHECK-LABEL: func.func @r0_v4_bf16(
// CHECK-NOT: func.func @f0(
// CHECK: moe.layer @L0
// CHECK-SAME: #moe.entry<kind = forward, level = "x86-64-v4", x = f32, y = f32, function = @f0_v4_f32_f32>
// CHECK-SAME: #moe.entry<kind = route, level = "x86-64-v4", x = bf16, y = bf16, function = @r0_v4_bf16>
func.func @f0(%x: tensor<?x40xbf16> {moe.arg = "x"}, %y: tensor<?x40xbf16> {moe.arg = "y"},
    %w0: tensor<?x2xf32> {moe.arg = "weights"}, %e0: tensor<?x2xi32> {moe.arg = "experts"},
    %wg: !moe.weight<1x1x4x40xbf16, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64},
    %w1: !moe.weight<4x2x8x40xbf16, panel32> {moe.arg = "weight", moe.weight_index = 1 : i64},
    %w2: !moe.weight<4x1x40x8xbf16, panel32> {moe.arg = "weight", moe.weight_index = 2 : i64})
    -> (tensor<?x40xbf16>, tensor<?x2xf32>, tensor<?x2xi32>)
    attributes {moe.entry = "forward", moe.compute = bf16} {
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
func.func @r0(%x: tensor<?x40xbf16> {moe.arg = "x"},
    %w0: tensor<?x2xf32> {moe.arg = "weights"}, %e0: tensor<?x2xi32> {moe.arg = "experts"},
    %l0: tensor<?x4xf32> {moe.arg = "logits"},
    %wg: !moe.weight<1x1x4x40xbf16, panel32> {moe.arg = "weight", moe.weight_index = 0 : i64})
    -> (tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x4xf32>)
    attributes {moe.entry = "route", moe.compute = bf16} {
  %w, %e, %l = moe.router ins(%x, %wg : tensor<?x40xbf16>, !moe.weight<1x1x4x40xbf16, panel32>)
      outs(%w0, %e0, %l0 : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x4xf32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
      -> tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x4xf32>
  return %w, %e, %l : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x4xf32>
}
moe.weight @L0.router : !moe.weight<1x1x4x40xbf16, panel32> role "router" from []
moe.weight @L0.gate_up : !moe.weight<4x2x8x40xbf16, panel32> role "gate_up" from []
moe.weight @L0.down : !moe.weight<4x1x40x8xbf16, panel32> role "down" from []
moe.layer @L0 "l0" kind = moe index = 0 compute = bf16 dims = <H = 40, F = 8, E = 4, K = 2>
    forward = @f0 route = @r0 experts = @r0
    weights(@L0.router, @L0.gate_up, @L0.down)
