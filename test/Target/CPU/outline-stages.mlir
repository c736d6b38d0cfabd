// RUN: moe-opt %s --moe-cpu-tile-tasks --moe-cpu-plan-workspace --moe-cpu-outline-stages \
// RUN:   --canonicalize --cse | FileCheck %s

// The sort of a call with experts given: one stage whose tail runs on the last lane, scratch in the
// workspace, everything else from the frame.

// CHECK-LABEL: func.func @f_workspace_bytes(
// CHECK-SAME: i64, %{{.*}}: i64, %{{.*}}: i64) -> i64
// CHECK-SAME: target_cpu = "x86-64-v4"

// CHECK-LABEL: func.func @f_stage0(
// CHECK-SAME: %[[FRAME:.*]]: !llvm.ptr, %{{.*}}: i32, %[[LANES:.*]]: i32)
// CHECK-SAME: stage = "dispatch"
// CHECK: llvm.atomicrmw add %{{.*}} acq_rel
// CHECK: scf.if
// CHECK-NOT: memref.alloc
// CHECK-LABEL: func.func @f_stage1(
// CHECK-SAME: stage = "gather"
// CHECK: scf.while
// CHECK: llvm.atomicrmw add %{{.*}} monotonic
// CHECK-NOT: memref.alloc
// CHECK: moe.code @f stages = [@f_stage0, @f_stage1] workspace = @f_workspace_bytes
func.func @f(%x: memref<?x100xbf16, strided<[?, 1]>> {moe.arg = "x"},
             %e: memref<?x?xi32> {moe.arg = "experts"})
    attributes {moe.entry = "experts", moe.compute = bf16,
                moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %t = memref.dim %e, %c0 : memref<?x?xi32>
  %k = memref.dim %e, %c1 : memref<?x?xi32>
  %n = arith.muli %t, %k : index
  %off = memref.alloc() : memref<6xi32>
  %pair = memref.alloc(%n) : memref<?xi32>
  moe.dispatch ins(%e : memref<?x?xi32>) experts = 5
      outs(%off, %pair : memref<6xi32>, memref<?xi32>)
  %g = memref.alloc(%n) : memref<?x100xf32>
  moe.gather ins(%x, %off, %pair : memref<?x100xbf16, strided<[?, 1]>>, memref<6xi32>,
      memref<?xi32>) slots %k outs(%g : memref<?x100xf32>)
  return
}
