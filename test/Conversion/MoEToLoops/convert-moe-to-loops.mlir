// RUN: moe-opt %s --convert-moe-to-loops --split-input-file --verify-diagnostics | FileCheck %s

// A weight becomes a memref of its packed elements: 4 experts x 2 panels of 32 rows x 32 columns.
// CHECK-LABEL: func.func @matmul(
// CHECK-SAME: %[[X:.*]]: memref<?x32xbf16>, %[[OFF:.*]]: memref<5xi32>, %[[OUT:.*]]: memref<?x24xf32>, %[[W:.*]]: memref<8192xf32>)
func.func @matmul(%x: memref<?x32xbf16>, %off: memref<5xi32>, %out: memref<?x24xf32>,
    %w: !moe.weight<4x2x24x32xf32, panel32>) {
  // CHECK: scf.for %[[E:.*]] =
  // CHECK: memref.load %[[OFF]][%[[E]]]
  // CHECK: scf.for %[[N:.*]] =
  // CHECK: scf.for %[[J:.*]] =
  // CHECK: %[[P:.*]]:2 = scf.for %[[I:.*]] = {{.*}} iter_args(%[[G:.*]] = %{{.*}}, %[[U:.*]] = %{{.*}})
  // CHECK: memref.load %[[X]][%[[N]], %[[I]]] : memref<?x32xbf16>
  // CHECK: arith.extf
  // CHECK: memref.load %[[W]]
  // CHECK: math.fma {{.*}}, {{.*}}, %[[G]]
  // CHECK: memref.load %[[W]]
  // CHECK: math.fma {{.*}}, {{.*}}, %[[U]]
  // CHECK: %[[M:.*]] = arith.mulf %[[P]]#0, %[[P]]#1
  // CHECK: memref.store %[[M]], %[[OUT]][%[[N]], %[[J]]]
  moe.grouped_matmul rows(%x : memref<?x32xbf16>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%out : memref<?x24xf32>) {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  }
  return
}

// -----

// Declined: operations of the import level.
func.func @declined_ffn(%x: memref<?x32xf32>, %y: memref<?x32xf32>,
    %w1: !moe.weight<1x2x24x32xf32, panel32>, %w2: !moe.weight<1x1x32x24xf32, panel32>) {
  // expected-error @below {{failed to legalize operation 'moe.ffn'}}
  moe.ffn ins(%x, %w1, %w2 : memref<?x32xf32>, !moe.weight<1x2x24x32xf32, panel32>,
      !moe.weight<1x1x32x24xf32, panel32>) outs(%y : memref<?x32xf32>)
      #moe.expert<form = glu, activation = silu>
  return
}

// -----

// Declined: tensors.
func.func @declined_tensor(%g: tensor<?x24xf32>, %y: tensor<?x24xf32>) -> tensor<?x24xf32> {
  // expected-error @below {{failed to legalize operation 'moe.activate'}}
  %a = moe.activate ins(%g : tensor<?x24xf32>) outs(%y : tensor<?x24xf32>) {
  ^bb0(%v: f32):
    moe.yield %v : f32
  } -> tensor<?x24xf32>
  return %a : tensor<?x24xf32>
}

// -----

// Declined: router attributes without a reference lowering.
func.func @declined_precision(%x: memref<?x32xf32>, %wg: !moe.weight<1x1x8x32xf32, panel32>,
    %w: memref<?x2xf32>, %e: memref<?x2xi32>) {
  // expected-error @below {{expected router attributes with a reference lowering, but got precision = model}}
  // expected-error @below {{failed to legalize operation 'moe.router'}}
  moe.router ins(%x, %wg : memref<?x32xf32>, !moe.weight<1x1x8x32xf32, panel32>)
      outs(%w, %e : memref<?x2xf32>, memref<?x2xi32>)
      #moe.router<score = sigmoid, order = score_then_select, top_k = 2, precision = model>
  return
}
