// RUN: moe-opt %s --moe-fuse-router-dispatch | FileCheck %s
// RUN: moe-opt %s --moe-fuse-router-dispatch=remarks -verify-diagnostics -o /dev/null

#router = #moe.router<score = softmax, order = score_then_select, top_k = 2>

// CHECK-LABEL: func.func @fused(
// CHECK-SAME: %[[X:.*]]: tensor<?x32xf32>, %[[W0:.*]]: tensor<?x2xf32>, %[[E0:.*]]: tensor<?x2xi32>, %[[OFF0:.*]]: tensor<9xi32>, %[[PAIR0:.*]]: tensor<?xi32>, %[[WG:.*]]: !moe.weight
func.func @fused(%x: tensor<?x32xf32>, %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>,
    %off0: tensor<9xi32>, %pair0: tensor<?xi32>, %wg: !moe.weight<1x1x8x32xf32, panel32>)
    -> (tensor<?x2xf32>, tensor<?x2xi32>, tensor<9xi32>, tensor<?xi32>) {
  // CHECK: %[[W:.*]], %[[E:.*]], %[[OFF:.*]], %[[PAIR:.*]] = moe.route_dispatch ins(%[[X]], %[[WG]] : {{.*}}) outs(%[[W0]], %[[E0]], %[[OFF0]], %[[PAIR0]] : {{.*}}) {{.*}} compute = bf16
  // CHECK-NOT: moe.dispatch
  // CHECK: return %[[W]], %[[E]], %[[OFF]], %[[PAIR]]
  %w, %e = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>) #router compute = bf16
      -> tensor<?x2xf32>, tensor<?x2xi32>
  %off, %pair = moe.dispatch ins(%e : tensor<?x2xi32>) experts = 8
      outs(%off0, %pair0 : tensor<9xi32>, tensor<?xi32>) -> tensor<9xi32>, tensor<?xi32>
  return %w, %e, %off, %pair : tensor<?x2xf32>, tensor<?x2xi32>, tensor<9xi32>, tensor<?xi32>
}

// CHECK-LABEL: func.func @declined_given_ids(
func.func @declined_given_ids(%e: tensor<?x2xi32>, %off0: tensor<9xi32>, %pair0: tensor<?xi32>)
    -> (tensor<9xi32>, tensor<?xi32>) {
  // CHECK: moe.dispatch
  // expected-remark @below {{left as it is: ids do not come from a router}}
  %off, %pair = moe.dispatch ins(%e : tensor<?x2xi32>) experts = 8
      outs(%off0, %pair0 : tensor<9xi32>, tensor<?xi32>) -> tensor<9xi32>, tensor<?xi32>
  return %off, %pair : tensor<9xi32>, tensor<?xi32>
}

// CHECK-LABEL: func.func @declined_logits(
func.func @declined_logits(%x: tensor<?x32xf32>, %w0: tensor<?x2xf32>, %e0: tensor<?x2xi32>,
    %l0: tensor<?x8xf32>, %off0: tensor<9xi32>, %pair0: tensor<?xi32>,
    %wg: !moe.weight<1x1x8x32xf32, panel32>) -> (tensor<?x8xf32>, tensor<9xi32>, tensor<?xi32>) {
  // CHECK: moe.router
  // CHECK: moe.dispatch
  %w, %e, %l = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0, %l0 : tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>) #router
      -> tensor<?x2xf32>, tensor<?x2xi32>, tensor<?x8xf32>
  // expected-remark @below {{left as it is: the router gives its logits}}
  %off, %pair = moe.dispatch ins(%e : tensor<?x2xi32>) experts = 8
      outs(%off0, %pair0 : tensor<9xi32>, tensor<?xi32>) -> tensor<9xi32>, tensor<?xi32>
  return %l, %off, %pair : tensor<?x8xf32>, tensor<9xi32>, tensor<?xi32>
}

// CHECK-LABEL: func.func @declined_used_before(
func.func @declined_used_before(%x: tensor<?x32xf32>, %w0: tensor<?x2xf32>,
    %e0: tensor<?x2xi32>, %off0: tensor<9xi32>, %wg: !moe.weight<1x1x8x32xf32, panel32>)
    -> (tensor<9xi32>, tensor<?xi32>) {
  %c0 = arith.constant 0 : index
  %c2 = arith.constant 2 : index
  // CHECK: moe.router
  // CHECK: moe.dispatch
  %w, %e = moe.router ins(%x, %wg : tensor<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w0, %e0 : tensor<?x2xf32>, tensor<?x2xi32>) #router
      -> tensor<?x2xf32>, tensor<?x2xi32>
  %t = tensor.dim %e, %c0 : tensor<?x2xi32>
  %n = arith.muli %t, %c2 : index
  %pair0 = tensor.empty(%n) : tensor<?xi32>
  // expected-remark @below {{left as it is: the router's results are used before the dispatch}}
  %off, %pair = moe.dispatch ins(%e : tensor<?x2xi32>) experts = 8
      outs(%off0, %pair0 : tensor<9xi32>, tensor<?xi32>) -> tensor<9xi32>, tensor<?xi32>
  return %off, %pair : tensor<9xi32>, tensor<?xi32>
}
