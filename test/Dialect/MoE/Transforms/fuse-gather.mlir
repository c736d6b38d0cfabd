// RUN: moe-opt %s --moe-fuse-gather | FileCheck %s
// RUN: moe-opt %s --moe-fuse-gather=remarks -verify-diagnostics -o /dev/null

// CHECK-LABEL: func.func @fused(
// CHECK-SAME: %[[X:.*]]: tensor<?x32xf32>, %[[OFF:.*]]: tensor<5xi32>, %[[PAIR:.*]]: tensor<?xi32>, %[[K:.*]]: index
func.func @fused(%x: tensor<?x32xf32>, %off: tensor<5xi32>, %pair: tensor<?xi32>, %k: index,
    %g0: tensor<?x32xbf16>, %h0: tensor<?x24xf32>, %w1: !moe.weight<4x1x24x32xbf16, panel32>)
    -> tensor<?x24xf32> {
  // CHECK-NOT: moe.gather
  // CHECK: moe.grouped_matmul rows(%[[X]] via %[[PAIR]] slots %[[K]] as bf16 : tensor<?x32xf32>, tensor<?xi32>) groups(%[[OFF]] : tensor<5xi32>)
  %g = moe.gather ins(%x, %off, %pair : tensor<?x32xf32>, tensor<5xi32>, tensor<?xi32>) slots %k
      outs(%g0 : tensor<?x32xbf16>) -> tensor<?x32xbf16>
  %h = moe.grouped_matmul rows(%g : tensor<?x32xbf16>) groups(%off : tensor<5xi32>)
      weights(%w1 : !moe.weight<4x1x24x32xbf16, panel32>) outs(%h0 : tensor<?x24xf32>)
      -> tensor<?x24xf32>
  return %h : tensor<?x24xf32>
}

// CHECK-LABEL: func.func @two_users(
func.func @two_users(%x: tensor<?x32xf32>, %off: tensor<5xi32>, %pair: tensor<?xi32>, %k: index,
    %g0: tensor<?x32xf32>, %h0: tensor<?x24xf32>, %w1: !moe.weight<4x1x24x32xf32, panel32>)
    -> (tensor<?x24xf32>, tensor<?x24xf32>) {
  // CHECK-NOT: moe.gather
  // CHECK-COUNT-2: moe.grouped_matmul rows(%{{.*}} via
  %g = moe.gather ins(%x, %off, %pair : tensor<?x32xf32>, tensor<5xi32>, tensor<?xi32>) slots %k
      outs(%g0 : tensor<?x32xf32>) -> tensor<?x32xf32>
  %a = moe.grouped_matmul rows(%g : tensor<?x32xf32>) groups(%off : tensor<5xi32>)
      weights(%w1 : !moe.weight<4x1x24x32xf32, panel32>) outs(%h0 : tensor<?x24xf32>)
      -> tensor<?x24xf32>
  %b = moe.grouped_matmul rows(%g : tensor<?x32xf32>) groups(%off : tensor<5xi32>)
      weights(%w1 : !moe.weight<4x1x24x32xf32, panel32>) outs(%h0 : tensor<?x24xf32>)
      -> tensor<?x24xf32>
  return %a, %b : tensor<?x24xf32>, tensor<?x24xf32>
}

// CHECK-LABEL: func.func @declined_other_groups(
func.func @declined_other_groups(%x: tensor<?x32xf32>, %off: tensor<5xi32>, %other: tensor<5xi32>,
    %pair: tensor<?xi32>, %k: index, %g0: tensor<?x32xf32>, %h0: tensor<?x24xf32>,
    %w1: !moe.weight<4x1x24x32xf32, panel32>) -> tensor<?x24xf32> {
  // CHECK: moe.gather
  // expected-remark @below {{left as it is: gather and matmul have different groups}}
  %g = moe.gather ins(%x, %off, %pair : tensor<?x32xf32>, tensor<5xi32>, tensor<?xi32>) slots %k
      outs(%g0 : tensor<?x32xf32>) -> tensor<?x32xf32>
  %a = moe.grouped_matmul rows(%g : tensor<?x32xf32>) groups(%other : tensor<5xi32>)
      weights(%w1 : !moe.weight<4x1x24x32xf32, panel32>) outs(%h0 : tensor<?x24xf32>)
      -> tensor<?x24xf32>
  return %a : tensor<?x24xf32>
}

// CHECK-LABEL: func.func @declined_two_pairs(
func.func @declined_two_pairs(%x: tensor<?x32xf32>, %off: tensor<5xi32>, %pair: tensor<?xi32>,
    %k: index, %g0: tensor<?x32xf32>, %h0: tensor<?x24xf32>,
    %w1: !moe.weight<4x1x24x32xf32, panel32>) -> tensor<?x24xf32> {
  // CHECK: moe.gather
  // expected-remark @below {{left as it is: a matmul reads the rows through pairs}}
  %g = moe.gather ins(%x, %off, %pair : tensor<?x32xf32>, tensor<5xi32>, tensor<?xi32>) slots %k
      outs(%g0 : tensor<?x32xf32>) -> tensor<?x32xf32>
  %a = moe.grouped_matmul rows(%g via %pair slots %k : tensor<?x32xf32>, tensor<?xi32>)
      groups(%off : tensor<5xi32>) weights(%w1 : !moe.weight<4x1x24x32xf32, panel32>)
      outs(%h0 : tensor<?x24xf32>) -> tensor<?x24xf32>
  return %a : tensor<?x24xf32>
}
