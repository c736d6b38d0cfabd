// RUN: moe-opt %s --moe-fuse-activation | FileCheck %s
// RUN: moe-opt %s --moe-fuse-activation=remarks -verify-diagnostics -o /dev/null

// CHECK-LABEL: func.func @fused(
// CHECK-SAME: %[[X:.*]]: tensor<?x32xf32>, %[[OFF:.*]]: tensor<5xi32>, %[[PAIR:.*]]: tensor<?xi32>, %[[K:.*]]: index, %{{.*}}: tensor<?x2x24xf32>, %[[H0:.*]]: tensor<?x24xf32>
func.func @fused(%x: tensor<?x32xf32>, %off: tensor<5xi32>, %pair: tensor<?xi32>, %k: index,
    %gu0: tensor<?x2x24xf32>, %h0: tensor<?x24xf32>, %w1: !moe.weight<4x2x24x32xbf16, panel32>)
    -> tensor<?x24xf32> {
  // CHECK: moe.grouped_matmul rows(%[[X]] via %[[PAIR]] slots %[[K]] as bf16 : tensor<?x32xf32>, tensor<?xi32>) groups(%[[OFF]] : tensor<5xi32>) weights({{.*}}) outs(%[[H0]] : tensor<?x24xf32>) {
  // CHECK-NEXT: ^bb0(%[[G:.*]]: f32, %[[U:.*]]: f32):
  // CHECK-NEXT: %[[M:.*]] = arith.mulf %[[G]], %[[U]]
  // CHECK-NEXT: moe.yield %[[M]]
  // CHECK-NOT: moe.activate
  %gu = moe.grouped_matmul
      rows(%x via %pair slots %k as bf16 : tensor<?x32xf32>, tensor<?xi32>)
      groups(%off : tensor<5xi32>) weights(%w1 : !moe.weight<4x2x24x32xbf16, panel32>)
      outs(%gu0 : tensor<?x2x24xf32>) -> tensor<?x2x24xf32>
  %h = moe.activate ins(%gu : tensor<?x2x24xf32>) outs(%h0 : tensor<?x24xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x24xf32>
  return %h : tensor<?x24xf32>
}

// CHECK-LABEL: func.func @declined_rounded(
func.func @declined_rounded(%x: tensor<?x32xf32>, %off: tensor<5xi32>,
    %gu0: tensor<?x2x24xbf16>, %h0: tensor<?x24xf32>, %w1: !moe.weight<4x2x24x32xbf16, panel32>)
    -> tensor<?x24xf32> {
  // CHECK: moe.activate
  %gu = moe.grouped_matmul rows(%x : tensor<?x32xf32>)
      groups(%off : tensor<5xi32>) weights(%w1 : !moe.weight<4x2x24x32xbf16, panel32>)
      outs(%gu0 : tensor<?x2x24xbf16>) -> tensor<?x2x24xbf16>
  // expected-remark @below {{left as it is: products are rounded before the activation}}
  %h = moe.activate ins(%gu : tensor<?x2x24xbf16>) outs(%h0 : tensor<?x24xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x24xf32>
  return %h : tensor<?x24xf32>
}

// CHECK-LABEL: func.func @declined_used_elsewhere(
func.func @declined_used_elsewhere(%x: tensor<?x32xf32>, %off: tensor<5xi32>,
    %gu0: tensor<?x2x24xf32>, %h0: tensor<?x24xf32>, %w1: !moe.weight<4x2x24x32xbf16, panel32>)
    -> (tensor<?x24xf32>, tensor<?x2x24xf32>) {
  // CHECK: moe.activate
  %gu = moe.grouped_matmul rows(%x : tensor<?x32xf32>)
      groups(%off : tensor<5xi32>) weights(%w1 : !moe.weight<4x2x24x32xbf16, panel32>)
      outs(%gu0 : tensor<?x2x24xf32>) -> tensor<?x2x24xf32>
  // expected-remark @below {{left as it is: the products are used elsewhere}}
  %h = moe.activate ins(%gu : tensor<?x2x24xf32>) outs(%h0 : tensor<?x24xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x24xf32>
  return %h, %gu : tensor<?x24xf32>, tensor<?x2x24xf32>
}
