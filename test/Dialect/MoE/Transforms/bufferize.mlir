// RUN: moe-opt %s --one-shot-bufferize="bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map" | FileCheck %s

// The whole layer, written in place: one buffer for each intermediate, no copy of x or y.
// CHECK-LABEL: func.func @layer(
// CHECK-SAME: %[[X:.*]]: memref<?x32xf32>, %[[Y:.*]]: memref<?x32xf32>, %[[W:.*]]: memref<?x2xf32>, %[[E:.*]]: memref<?x2xi32>
func.func @layer(%x: tensor<?x32xf32> {bufferization.writable = false}, %y: tensor<?x32xf32>,
    %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>, %acc: i1,
    %wg: !moe.weight<1x1x4x32xf32, panel32>, %w1: !moe.weight<4x2x24x32xf32, panel32>,
    %w2: !moe.weight<4x1x32x24xf32, panel32>) -> tensor<?x32xf32> {
  %c0 = arith.constant 0 : index
  %k = arith.constant 2 : index
  %t = tensor.dim %x, %c0 : tensor<?x32xf32>
  %n = arith.muli %t, %k : index
  %off0 = tensor.empty() : tensor<5xi32>
  %pair0 = tensor.empty(%n) : tensor<?xi32>
  // CHECK-DAG: %[[OFF:.*]] = memref.alloc() {{.*}}: memref<5xi32>
  // CHECK-DAG: %[[PAIR:.*]] = memref.alloc(%{{.*}}) {{.*}}: memref<?xi32>
  // CHECK: moe.route_dispatch ins(%[[X]], %{{.*}} : {{.*}}) outs(%[[W]], %[[E]], %[[OFF]], %[[PAIR]] : memref<?x2xf32>, memref<?x2xi32>, memref<5xi32>, memref<?xi32>)
  %w, %e, %off, %pair = moe.route_dispatch
      ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x4x32xf32, panel32>)
      outs(%w0, %e0, %off0, %pair0 : tensor<?x2xf32>, tensor<?x2xi32>, tensor<5xi32>, tensor<?xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
      -> tensor<?x2xf32>, tensor<?x2xi32>, tensor<5xi32>, tensor<?xi32>
  %h0 = tensor.empty(%n) : tensor<?x24xf32>
  // CHECK: %[[H:.*]] = memref.alloc(%{{.*}}) {{.*}}: memref<?x24xf32>
  // CHECK: moe.grouped_matmul rows(%[[X]] via %[[PAIR]] {{.*}}) groups(%[[OFF]] : {{.*}}) {{.*}} outs(%[[H]] : memref<?x24xf32>) {
  // CHECK: moe.yield
  %h = moe.grouped_matmul rows(%x via %pair slots %k : tensor<?x32xf32>, tensor<?xi32>)
      groups(%off : tensor<5xi32>) weights(%w1 : !moe.weight<4x2x24x32xf32, panel32>)
      outs(%h0 : tensor<?x24xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  } -> tensor<?x24xf32>
  // CHECK-NOT: memref.copy
  // CHECK: moe.grouped_matmul rows(%[[H]] : {{.*}}) groups(%[[OFF]] : {{.*}}) {{.*}} combine as f32(%[[PAIR]], %[[W]] slots {{.*}}) accumulate %{{.*}} outs(%[[Y]] : memref<?x32xf32>)
  %z = moe.grouped_matmul rows(%h : tensor<?x24xf32>) groups(%off : tensor<5xi32>)
      weights(%w2 : !moe.weight<4x1x32x24xf32, panel32>)
      combine as f32 (%pair, %w slots %k : tensor<?xi32>, tensor<?x2xf32>) accumulate %acc
      outs(%y : tensor<?x32xf32>) -> tensor<?x32xf32>
  // CHECK: return %[[Y]]
  return %z : tensor<?x32xf32>
}

// Without accumulate the old content of y is not read: no copy is made for the second use.
// CHECK-LABEL: func.func @overwritten(
func.func @overwritten(%g: tensor<?x24xf32>, %off: tensor<2xi32>, %y: tensor<?x24xf32>)
    -> (tensor<?x24xf32>, tensor<?x24xf32>) {
  // CHECK-NOT: memref.copy
  // CHECK: moe.combine ins(%{{.*}}, %{{.*}} : memref<?x24xf32>, memref<2xi32>) outs
  // CHECK-NOT: memref.copy
  // CHECK: moe.activate
  %a = moe.combine ins(%g, %off : tensor<?x24xf32>, tensor<2xi32>) outs(%y : tensor<?x24xf32>)
      -> tensor<?x24xf32>
  %b = moe.activate ins(%g : tensor<?x24xf32>) outs(%y : tensor<?x24xf32>) {
  ^bb0(%v: f32):
    moe.yield %v : f32
  } -> tensor<?x24xf32>
  return %a, %b : tensor<?x24xf32>, tensor<?x24xf32>
}
