// RUN: moe-opt %s --moe-merge-equal-functions | FileCheck %s

// CHECK: moe.layer @L0 {{.*}} forward = @a
// CHECK: moe.layer @L1 {{.*}} forward = @a
// CHECK: moe.layer @L2 {{.*}} forward = @other
// CHECK: func.func @a(
// CHECK-NOT: func.func @b(
// CHECK: func.func @other(
// CHECK: func.func @no_entry(
// CHECK: moe.code @e0 stages = [@s0] workspace = @s0
// CHECK: moe.code @e1 stages = [@s0, @s2] workspace = @s0
// CHECK: func.func @s0(
// CHECK-NOT: func.func @s1(
// CHECK: func.func @s2(
moe.layer @L0 "l0" kind = dense index = 0 compute = f32 dims = <H = 8, F = 4, E = 1, K = 1>
    forward = @a weights()
moe.layer @L1 "l1" kind = dense index = 1 compute = f32 dims = <H = 8, F = 4, E = 1, K = 1>
    forward = @b weights()
moe.layer @L2 "l2" kind = dense index = 2 compute = f32 dims = <H = 8, F = 4, E = 1, K = 1>
    forward = @other weights()
func.func @a(%x: tensor<?x8xf32> {moe.arg = "x"}) -> tensor<?x8xf32>
    attributes {moe.entry = "forward"} {
  return %x : tensor<?x8xf32>
}
func.func @b(%x: tensor<?x8xf32> {moe.arg = "x"}) -> tensor<?x8xf32>
    attributes {moe.entry = "forward"} {
  return %x : tensor<?x8xf32>
}
func.func @other(%x: tensor<?x8xf32> {moe.arg = "y"}) -> tensor<?x8xf32>
    attributes {moe.entry = "forward"} {
  return %x : tensor<?x8xf32>
}
func.func @no_entry(%x: tensor<?x8xf32> {moe.arg = "x"}) -> tensor<?x8xf32> {
  return %x : tensor<?x8xf32>
}

// Functions that entries have become.
moe.code @e0 stages = [@s0] workspace = @s0
moe.code @e1 stages = [@s1, @s2] workspace = @s1
func.func @s0(%p: !llvm.ptr) {
  return
}
func.func @s1(%p: !llvm.ptr) {
  return
}
func.func @s2(%p: !llvm.ptr) attributes {stage = "other"} {
  return
}
