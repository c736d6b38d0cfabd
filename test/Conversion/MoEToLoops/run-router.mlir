// RUN: moe-opt %s --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s

// Router weight [4, 2], rows (1, 0), (0, 1), (1, 1), (0, 0), so that logits are x0, x1, x0 + x1, 0.
// ln 3 = 1.0986123. x = (ln 3, 0), (0, 0), (0, ln 3):
//   t0: logits (ln 3, 0, ln 3, 0): the best two are 0 and 2 (equal: lower id first)
//   t1: all 0: 0 and 1
//   t2: logits (0, ln 3, ln 3, 0): 1 and 2
// Softmax over all four: t0: 3/8 each; t1: 1/4 each; t2: 3/8.
// CHECK: {{\[}}[0.375,  0.375],
// CHECK-NEXT: [0.25,  0.25],
// CHECK-NEXT: [0.375,  0.375]]
// CHECK: {{\[}}[0,  2],
// CHECK-NEXT: [0,  1],
// CHECK-NEXT: [1,  2]]
// The three best of t0, softmax over them: 3/7, 3/7, 1/7; times 7.
// CHECK: {{\[}}[3,  3,  1],
// CHECK: {{\[}}[0,  2,  1],
// Logits.
// CHECK: {{\[}}[1.09861,  0,  1.09861,  0],
// Softmax over all, divided by the sum of three plus 1/8: t0 (3/8, 3/8, 1/8) / 1.
// CHECK: {{\[}}[0.375,  0.375,  0.125],
// Sorted pairs of the first ids (0, 2), (0, 1), (1, 2).
// CHECK: [0,  2,  4,  6,  6]
// CHECK: [0,  2,  3,  4,  1,  5]

func.func private @printMemrefF32(memref<*xf32>) attributes {llvm.emit_c_interface}
func.func private @printMemrefI32(memref<*xi32>) attributes {llvm.emit_c_interface}

// A packed weight with everything zero.
func.func private @zeros_f32() -> memref<1024xf32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = arith.constant 1024 : index
  %z = arith.constant 0.0 : f32
  %m = memref.alloc() : memref<1024xf32>
  scf.for %i = %c0 to %n step %c1 {
    memref.store %z, %m[%i] : memref<1024xf32>
  }
  return %m : memref<1024xf32>
}

func.func @print_f32(%m: memref<3x?xf32>) {
  %u = memref.cast %m : memref<3x?xf32> to memref<*xf32>
  call @printMemrefF32(%u) : (memref<*xf32>) -> ()
  return
}
func.func @print_i32(%m: memref<3x?xi32>) {
  %u = memref.cast %m : memref<3x?xi32> to memref<*xi32>
  call @printMemrefI32(%u) : (memref<*xi32>) -> ()
  return
}
func.func @main() {
  %packed = call @zeros_f32() : () -> memref<1024xf32>
  %pi0 = arith.constant 0 : index
  %pv0 = arith.constant 1.0 : f32
  memref.store %pv0, %packed[%pi0] : memref<1024xf32>
  %pi1 = arith.constant 33 : index
  %pv1 = arith.constant 1.0 : f32
  memref.store %pv1, %packed[%pi1] : memref<1024xf32>
  %pi2 = arith.constant 2 : index
  %pv2 = arith.constant 1.0 : f32
  memref.store %pv2, %packed[%pi2] : memref<1024xf32>
  %pi3 = arith.constant 34 : index
  %pv3 = arith.constant 1.0 : f32
  memref.store %pv3, %packed[%pi3] : memref<1024xf32>
  %wg = builtin.unrealized_conversion_cast %packed : memref<1024xf32> to !moe.weight<1x1x4x2xf32, panel32>
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c2 = arith.constant 2 : index
  %ln3 = arith.constant 1.0986122886681098 : f32
  %zero = arith.constant 0.0 : f32
  %x = memref.alloc() : memref<3x2xf32>
  memref.store %ln3, %x[%c0, %c0] : memref<3x2xf32>
  memref.store %zero, %x[%c0, %c1] : memref<3x2xf32>
  memref.store %zero, %x[%c1, %c0] : memref<3x2xf32>
  memref.store %zero, %x[%c1, %c1] : memref<3x2xf32>
  memref.store %zero, %x[%c2, %c0] : memref<3x2xf32>
  memref.store %ln3, %x[%c2, %c1] : memref<3x2xf32>
  %w2 = memref.alloc() : memref<3x2xf32>
  %e2 = memref.alloc() : memref<3x2xi32>
  moe.router ins(%x, %wg : memref<3x2xf32>, !moe.weight<1x1x4x2xf32, panel32>)
      outs(%w2, %e2 : memref<3x2xf32>, memref<3x2xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  %w2d = memref.cast %w2 : memref<3x2xf32> to memref<3x?xf32>
  %e2d = memref.cast %e2 : memref<3x2xi32> to memref<3x?xi32>
  call @print_f32(%w2d) : (memref<3x?xf32>) -> ()
  call @print_i32(%e2d) : (memref<3x?xi32>) -> ()

  %w3 = memref.alloc() : memref<3x3xf32>
  %e3 = memref.alloc() : memref<3x3xi32>
  %l = memref.alloc() : memref<3x4xf32>
  moe.router ins(%x, %wg : memref<3x2xf32>, !moe.weight<1x1x4x2xf32, panel32>)
      outs(%w3, %e3, %l : memref<3x3xf32>, memref<3x3xi32>, memref<3x4xf32>)
      #moe.router<score = softmax, order = select_then_score, top_k = 3, scale = 7.0>
  %w3d = memref.cast %w3 : memref<3x3xf32> to memref<3x?xf32>
  %e3d = memref.cast %e3 : memref<3x3xi32> to memref<3x?xi32>
  %ld = memref.cast %l : memref<3x4xf32> to memref<3x?xf32>
  call @print_f32(%w3d) : (memref<3x?xf32>) -> ()
  call @print_i32(%e3d) : (memref<3x?xi32>) -> ()
  call @print_f32(%ld) : (memref<3x?xf32>) -> ()

  moe.router ins(%x, %wg : memref<3x2xf32>, !moe.weight<1x1x4x2xf32, panel32>)
      outs(%w3, %e3 : memref<3x3xf32>, memref<3x3xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 3, renormalize = sum,
                  epsilon = 0.125>
  call @print_f32(%w3d) : (memref<3x?xf32>) -> ()

  %off = memref.alloc() : memref<5xi32>
  %pair = memref.alloc() : memref<6xi32>
  moe.route_dispatch ins(%x, %wg : memref<3x2xf32>, !moe.weight<1x1x4x2xf32, panel32>)
      outs(%w2, %e2, %off, %pair : memref<3x2xf32>, memref<3x2xi32>, memref<5xi32>, memref<6xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 2>
  %offu = memref.cast %off : memref<5xi32> to memref<*xi32>
  call @printMemrefI32(%offu) : (memref<*xi32>) -> ()
  %pairu = memref.cast %pair : memref<6xi32> to memref<*xi32>
  call @printMemrefI32(%pairu) : (memref<*xi32>) -> ()
  return
}
