// RUN: moe-opt %s --moe-fuse-combine | FileCheck %s
// RUN: moe-opt %s --moe-fuse-combine=remarks -verify-diagnostics -o /dev/null

// CHECK-LABEL: func.func @fused(
// CHECK-SAME: %[[H:.*]]: tensor<?x24xf32>, %[[OFF:.*]]: tensor<5xi32>, %[[PAIR:.*]]: tensor<?xi32>, %[[W:.*]]: tensor<?x2xf32>, %[[K:.*]]: index, %[[ACC:.*]]: i1, %{{.*}}: tensor<?x32xbf16>, %[[Y:.*]]: tensor<?x32xf32>
func.func @fused(%h: tensor<?x24xf32>, %off: tensor<5xi32>, %pair: tensor<?xi32>,
    %w: tensor<?x2xf32>, %k: index, %acc: i1, %r0: tensor<?x32xbf16>, %y: tensor<?x32xf32>,
    %w2: !moe.weight<4x1x32x24xbf16, panel32>) -> tensor<?x32xf32> {
  // CHECK: %[[Z:.*]] = moe.grouped_matmul rows(%[[H]] : tensor<?x24xf32>) groups(%[[OFF]] : tensor<5xi32>) weights({{.*}}) combine as bf16(%[[PAIR]], %[[W]] slots %[[K]] : tensor<?xi32>, tensor<?x2xf32>) accumulate %[[ACC]] outs(%[[Y]] : tensor<?x32xf32>)
  // CHECK-NOT: moe.combine
  // CHECK: return %[[Z]]
  %r = moe.grouped_matmul rows(%h : tensor<?x24xf32>) groups(%off : tensor<5xi32>)
      weights(%w2 : !moe.weight<4x1x32x24xbf16, panel32>) outs(%r0 : tensor<?x32xbf16>)
      -> tensor<?x32xbf16>
  %z = moe.combine ins(%r, %off : tensor<?x32xbf16>, tensor<5xi32>)
      via(%pair, %w slots %k : tensor<?xi32>, tensor<?x2xf32>) accumulate %acc
      outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}

// CHECK-LABEL: func.func @dense(
func.func @dense(%h: tensor<?x24xf32>, %off: tensor<2xi32>, %r0: tensor<?x32xf32>,
    %y: tensor<?x32xf32>, %w2: !moe.weight<1x1x32x24xf32, panel32>) -> tensor<?x32xf32> {
  // CHECK: moe.grouped_matmul {{.*}} combine as f32 outs(
  %r = moe.grouped_matmul rows(%h : tensor<?x24xf32>) groups(%off : tensor<2xi32>)
      weights(%w2 : !moe.weight<1x1x32x24xf32, panel32>) outs(%r0 : tensor<?x32xf32>)
      -> tensor<?x32xf32>
  %z = moe.combine ins(%r, %off : tensor<?x32xf32>, tensor<2xi32>)
      outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}

// CHECK-LABEL: func.func @clauses(
// CHECK-SAME: %[[G:[a-z0-9]+]]: tensor<?x1xf32>, %[[S:[a-z0-9]+]]: f32, %[[ACC:[a-z0-9]+]]: i1, %[[FROM:[a-z0-9]+]]: tensor<?x32xf32>
func.func @clauses(%h: tensor<?x24xf32>, %off: tensor<2xi32>, %r0: tensor<?x32xf32>,
    %y: tensor<?x32xbf16>, %w2: !moe.weight<1x1x32x24xf32, panel32>,
    %b: !moe.weight<1x1x32x1xf32, vector32>, %g: tensor<?x1xf32>, %s: f32, %acc: i1,
    %from: tensor<?x32xf32>) -> tensor<?x32xbf16> {
  // CHECK: moe.grouped_matmul {{.*}} bias(%{{.*}} : !moe.weight<1x1x32x1xf32, vector32>) combine as f32 gate(%[[G]] : tensor<?x1xf32>) scale %[[S]] accumulate %[[ACC]] from %[[FROM]] : tensor<?x32xf32> outs(
  // CHECK-NOT: moe.combine
  %r = moe.grouped_matmul rows(%h : tensor<?x24xf32>) groups(%off : tensor<2xi32>)
      weights(%w2 : !moe.weight<1x1x32x24xf32, panel32>)
      bias(%b : !moe.weight<1x1x32x1xf32, vector32>) outs(%r0 : tensor<?x32xf32>)
      -> tensor<?x32xf32>
  %z = moe.combine ins(%r, %off : tensor<?x32xf32>, tensor<2xi32>)
      gate(%g : tensor<?x1xf32>) scale %s accumulate %acc from %from : tensor<?x32xf32>
      outs(%y : tensor<?x32xbf16>) -> tensor<?x32xbf16>
  return %z : tensor<?x32xbf16>
}

// CHECK-LABEL: func.func @declined_other_groups(
func.func @declined_other_groups(%h: tensor<?x24xf32>, %off: tensor<2xi32>,
    %other: tensor<2xi32>, %r0: tensor<?x32xf32>, %y: tensor<?x32xf32>,
    %w2: !moe.weight<1x1x32x24xf32, panel32>) -> tensor<?x32xf32> {
  // CHECK: moe.combine
  %r = moe.grouped_matmul rows(%h : tensor<?x24xf32>) groups(%off : tensor<2xi32>)
      weights(%w2 : !moe.weight<1x1x32x24xf32, panel32>) outs(%r0 : tensor<?x32xf32>)
      -> tensor<?x32xf32>
  // expected-remark @below {{left as it is: matmul and combine have different groups}}
  %z = moe.combine ins(%r, %other : tensor<?x32xf32>, tensor<2xi32>)
      outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}
