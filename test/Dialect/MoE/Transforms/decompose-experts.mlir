// RUN: moe-opt %s --moe-decompose-experts | FileCheck %s
// RUN: moe-opt %s --moe-decompose-experts=remarks -verify-diagnostics -o /dev/null

// CHECK-LABEL: func.func @glu(
// CHECK-SAME: %[[X:.*]]: tensor<?x32xbf16>, %[[OFF:.*]]: tensor<5xi32>, %[[PAIR:.*]]: tensor<?xi32>, %[[K:.*]]: index, %[[R:.*]]: tensor<?x32xbf16>, %[[W1:.*]]: !moe.weight{{.*}}, %[[W2:.*]]: !moe.weight
func.func @glu(%x: tensor<?x32xbf16>, %off: tensor<5xi32>, %pair: tensor<?xi32>, %k: index,
    %r: tensor<?x32xbf16>, %w1: !moe.weight<4x2x24x32xbf16, panel32>,
    %w2: !moe.weight<4x1x32x24xbf16, panel32>) -> tensor<?x32xbf16> {
  // CHECK: %[[N:.*]] = tensor.dim %[[PAIR]]
  // CHECK: %[[G0:.*]] = tensor.empty(%[[N]]) : tensor<?x32xbf16>
  // CHECK: %[[G:.*]] = moe.gather ins(%[[X]], %[[OFF]], %[[PAIR]] : {{.*}}) slots %[[K]] outs(%[[G0]]
  // CHECK: %[[GU:.*]] = moe.grouped_matmul rows(%[[G]] : tensor<?x32xbf16>) groups(%[[OFF]] : {{.*}}) weights(%[[W1]] : {{.*}}) outs(%{{.*}} : tensor<?x2x24xf32>)
  // CHECK: %[[H:.*]] = moe.activate ins(%[[GU]] : {{.*}}) outs(%{{.*}} : tensor<?x24xf32>) {
  // CHECK-NEXT: ^bb0(%[[GATE:.*]]: f32, %[[UP:.*]]: f32):
  // CHECK-DAG: %[[ONE:.*]] = arith.constant 1.0
  // CHECK-DAG: %[[NEG:.*]] = arith.negf %[[GATE]]
  // CHECK: %[[EXP:.*]] = math.exp %[[NEG]]
  // CHECK: %[[SUM:.*]] = arith.addf %[[ONE]], %[[EXP]]
  // CHECK: %[[ACT:.*]] = arith.divf %[[GATE]], %[[SUM]]
  // CHECK: %[[M:.*]] = arith.mulf %[[ACT]], %[[UP]]
  // CHECK: moe.yield %[[M]]
  // CHECK: %[[Z:.*]] = moe.grouped_matmul rows(%[[H]] : tensor<?x24xf32>) groups(%[[OFF]] : {{.*}}) weights(%[[W2]] : {{.*}}) outs(%[[R]] : tensor<?x32xbf16>)
  // CHECK: return %[[Z]]
  %z = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x32xbf16>, tensor<5xi32>,
      tensor<?xi32>, !moe.weight<4x2x24x32xbf16, panel32>,
      !moe.weight<4x1x32x24xbf16, panel32>) slots %k outs(%r : tensor<?x32xbf16>)
      #moe.expert<form = glu, activation = silu> -> tensor<?x32xbf16>
  return %z : tensor<?x32xbf16>
}

// CHECK-LABEL: func.func @mlp(
func.func @mlp(%x: tensor<?x32xf32>, %off: tensor<5xi32>, %pair: tensor<?xi32>, %k: index,
    %r: tensor<?x32xf32>, %w1: !moe.weight<4x1x24x32xf32, panel32>,
    %w2: !moe.weight<4x1x32x24xf32, panel32>) -> tensor<?x32xf32> {
  // CHECK: moe.activate ins(%{{.*}} : tensor<?x24xf32>) outs(%{{.*}} : tensor<?x24xf32>) {
  // CHECK-NEXT: ^bb0(%[[UP:.*]]: f32):
  // CHECK: %[[R:.*]] = arith.maximumf %[[UP]]
  // CHECK: arith.mulf %[[R]], %[[R]]
  %z = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x32xf32>, tensor<5xi32>,
      tensor<?xi32>, !moe.weight<4x1x24x32xf32, panel32>,
      !moe.weight<4x1x32x24xf32, panel32>) slots %k outs(%r : tensor<?x32xf32>)
      #moe.expert<form = mlp, activation = relu2> -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}

// CHECK-LABEL: func.func @dense(
// CHECK-SAME: %[[X:.*]]: tensor<?x32xf32>, %[[Y:.*]]: tensor<?x32xf32>, %[[ACC:.*]]: i1
func.func @dense(%x: tensor<?x32xf32>, %y: tensor<?x32xf32>, %acc: i1,
    %w1: !moe.weight<1x2x24x32xbf16, panel32>, %w2: !moe.weight<1x1x32x24xbf16, panel32>)
    -> tensor<?x32xf32> attributes {moe.compute = bf16} {
  // CHECK: %[[OFF:.*]] = moe.single_group rows(%{{.*}})
  // CHECK: moe.grouped_matmul rows(%[[X]] as bf16 : tensor<?x32xf32>)
  // CHECK: moe.activate
  // CHECK: math.erf
  // CHECK: %[[R:.*]] = moe.grouped_matmul {{.*}} outs(%{{.*}} : tensor<?x32xbf16>)
  // CHECK: moe.combine ins(%[[R]], %[[OFF]] : tensor<?x32xbf16>, tensor<2xi32>) accumulate %[[ACC]] outs(%[[Y]] : tensor<?x32xf32>)
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x32xf32>, !moe.weight<1x2x24x32xbf16, panel32>,
      !moe.weight<1x1x32x24xbf16, panel32>) accumulate %acc outs(%y : tensor<?x32xf32>)
      #moe.expert<form = glu, activation = gelu> -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}

// CHECK-LABEL: func.func @declined_latent(
func.func @declined_latent(%x: tensor<?x32xf32>, %y: tensor<?x32xf32>,
    %w1: !moe.weight<1x2x24x32xf32, panel32>, %w2: !moe.weight<1x1x32x24xf32, panel32>)
    -> tensor<?x32xf32> {
  // CHECK: moe.ffn
  // expected-remark @below {{left as it is: no formula for latent = 16}}
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x32xf32>, !moe.weight<1x2x24x32xf32, panel32>,
      !moe.weight<1x1x32x24xf32, panel32>) outs(%y : tensor<?x32xf32>)
      #moe.expert<form = glu, activation = silu, latent = 16>
      -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}

// CHECK-LABEL: func.func @declined_buffers(
func.func @declined_buffers(%x: memref<?x32xf32>, %y: memref<?x32xf32>,
    %w1: !moe.weight<1x2x24x32xf32, panel32>, %w2: !moe.weight<1x1x32x24xf32, panel32>) {
  // CHECK: moe.ffn
  // expected-remark @below {{left as it is: operands are not tensors}}
  moe.ffn ins(%x, %w1, %w2 : memref<?x32xf32>, !moe.weight<1x2x24x32xf32, panel32>,
      !moe.weight<1x1x32x24xf32, panel32>) outs(%y : memref<?x32xf32>)
      #moe.expert<form = glu, activation = silu>
  return
}
