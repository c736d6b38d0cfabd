// RUN: moe-opt %s --moe-cpu-plan-workspace --canonicalize --cse | FileCheck %s

// Shared scratch first, then a part per lane that is as large as the largest stage needs.

// CHECK-LABEL: func.func @f_workspace_bytes(
// CHECK-SAME: %[[T:.*]]: i64, %{{.*}}: i64, %[[LANES:.*]]: i64) -> i64
// CHECK-DAG: %[[LANE:.*]] = arith.constant 1024 : index
// CHECK: %[[L:.*]] = arith.index_cast %[[LANES]]
// CHECK: %[[ALL:.*]] = arith.muli %[[L]], %[[LANE]]
// CHECK-LABEL: func.func @f(
// CHECK-SAME: memref<?xi8> {moe.arg = "workspace"}, %{{.*}}: index {moe.arg = "lanes"}
// CHECK-NOT: memref.alloc
// CHECK: memref.view
// CHECK: moe.stage "a" body(%[[LANE0:.*]], %{{.*}}) {
// CHECK: arith.muli %[[LANE0]]
// CHECK: memref.view
// CHECK: moe.stage "b"
// CHECK-NOT: memref.alloc
func.func @f(%x: memref<?x40xf32, strided<[?, 1]>> {moe.arg = "x"})
    attributes {moe.entry = "forward", moe.compute = f32,
                moe.target = #moe.target<cpu, level = "x86-64-v3">} {
  %c0 = arith.constant 0 : index
  %one = arith.constant 1.0 : f32
  %t = memref.dim %x, %c0 : memref<?x40xf32, strided<[?, 1]>>
  %shared = memref.alloc(%t) : memref<?xf32>
  moe.stage "a" body(%lane, %lanes) {
    %own = memref.alloc() : memref<100xf32>
    memref.store %one, %own[%c0] : memref<100xf32>
    memref.store %one, %shared[%lane] : memref<?xf32>
  }
  moe.stage "b" body(%lane, %lanes) {
    %own = memref.alloc() : memref<256xf32>
    memref.store %one, %own[%c0] : memref<256xf32>
    memref.store %one, %shared[%lane] : memref<?xf32>
  }
  return
}
