// Every form of a layer gives the values calculated by hand.
// RUN: moe-opt %s --moe-decompose-experts --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s
// RUN: moe-opt %s --moe-decompose-experts --moe-fuse-gather \
// RUN:   --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s
// RUN: moe-opt %s --moe-decompose-experts --moe-fuse-activation \
// RUN:   --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s
// RUN: moe-opt %s --moe-decompose-experts --moe-fuse-combine \
// RUN:   --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s
// RUN: moe-opt %s --moe-decompose-experts --moe-fuse-gather --moe-fuse-activation --moe-fuse-combine \
// RUN:   --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s

// x = (1, 2), (3, -1), (1, 1); ids = (1, 0), (1, -1), (2, 1); weights = (1/2, 2), (1, 7), (4, 1/4).
// Experts, as [[row of F = 0], [row of F = 1]] (gate, up) and [[row of H = 0], …] (down):
//   e0: gate [[1, 0], [0, 1]]   up [[1, 1], [1, -1]]  down [[1, 2], [0, 1]]
//   e1: gate [[1, 1], [2, 0]]   up [[1, 0], [0, 1]]   down [[1, 0], [1, 1]]
//   e2: gate [[0, 1], [-1, 0]]  up [[2, 0], [0, 3]]   down [[1, 1], [2, -1]]
// Sorted rows: e0: pair 1; e1: pairs 0, 2, 5; e2: pair 4. With relu:
//   pair 1: gate (1, 2)   up (3, -1)  h (3, -2)  row (-1, -2)
//   pair 0: gate (3, 2)   up (1, 2)   h (3, 4)   row (3, 7)
//   pair 2: gate (2, 6)   up (3, -1)  h (6, -6)  row (6, 0)
//   pair 5: gate (2, 2)   up (1, 1)   h (2, 2)   row (2, 4)
//   pair 4: gate (1, -1)  up (2, 3)   h (2, 0)   row (2, 4)
// Sums: t0: 2 (-1, -2) + 1/2 (3, 7) = (-1/2, -1/2); t1: (6, 0); t2: 1/4 (2, 4) + 4 (2, 4).

// CHECK: [0,  1,  4,  5]
// CHECK: {{\[}}[-0.5,  -0.5],
// CHECK-NEXT: [6,  0],
// CHECK-NEXT: [8.5,  17]]
// The same added to (10, 20), (30, 40), (50, 60).
// CHECK: {{\[}}[9.5,  19.5],
// CHECK-NEXT: [36,  40],
// CHECK-NEXT: [58.5,  77]]

func.func @layer(%x: tensor<?x2xf32>, %y: tensor<?x2xf32>, %w: tensor<?x?xf32>,
    %e: tensor<?x?xi32>, %off0: tensor<4xi32>, %acc: i1, %w1: !moe.weight<3x2x2x2xf32, panel32>,
    %w2: !moe.weight<3x1x2x2xf32, panel32>) -> (tensor<4xi32>, tensor<?x2xf32>)
    attributes {moe.compute = f32} {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %t = tensor.dim %e, %c0 : tensor<?x?xi32>
  %k = tensor.dim %e, %c1 : tensor<?x?xi32>
  %n = arith.muli %t, %k : index
  %pair0 = tensor.empty(%n) : tensor<?xi32>
  %off, %pair = moe.dispatch ins(%e : tensor<?x?xi32>) experts = 3
      outs(%off0, %pair0 : tensor<4xi32>, tensor<?xi32>) -> tensor<4xi32>, tensor<?xi32>
  %r0 = tensor.empty(%n) : tensor<?x2xf32>
  %r = moe.experts ins(%x, %off, %pair, %w1, %w2 : tensor<?x2xf32>, tensor<4xi32>,
      tensor<?xi32>, !moe.weight<3x2x2x2xf32, panel32>, !moe.weight<3x1x2x2xf32, panel32>)
      slots %k outs(%r0 : tensor<?x2xf32>) #moe.expert<form = glu, activation = relu>
      -> tensor<?x2xf32>
  %z = moe.combine ins(%r, %off : tensor<?x2xf32>, tensor<4xi32>)
      via(%pair, %w slots %k : tensor<?xi32>, tensor<?x?xf32>) accumulate %acc
      outs(%y : tensor<?x2xf32>) -> tensor<?x2xf32>
  return %off, %z : tensor<4xi32>, tensor<?x2xf32>
}

func.func private @printMemrefF32(memref<*xf32>) attributes {llvm.emit_c_interface}
func.func private @printMemrefI32(memref<*xi32>) attributes {llvm.emit_c_interface}

// A packed weight with everything zero.
func.func private @zeros_f32() -> memref<3072xf32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = arith.constant 3072 : index
  %z = arith.constant 0.0 : f32
  %m = memref.alloc() : memref<3072xf32>
  scf.for %i = %c0 to %n step %c1 {
    memref.store %z, %m[%i] : memref<3072xf32>
  }
  return %m : memref<3072xf32>
}

func.func @main() {
  %true = arith.constant true
  %false = arith.constant false
  %gate_up = call @zeros_f32() : () -> memref<3072xf32>
  %down = call @zeros_f32() : () -> memref<3072xf32>
  %gi0 = arith.constant 0 : index
  %gv0 = arith.constant 1.0 : f32
  memref.store %gv0, %gate_up[%gi0] : memref<3072xf32>
  %gi1 = arith.constant 16 : index
  %gv1 = arith.constant 1.0 : f32
  memref.store %gv1, %gate_up[%gi1] : memref<3072xf32>
  %gi2 = arith.constant 48 : index
  %gv2 = arith.constant 1.0 : f32
  memref.store %gv2, %gate_up[%gi2] : memref<3072xf32>
  %gi3 = arith.constant 17 : index
  %gv3 = arith.constant 1.0 : f32
  memref.store %gv3, %gate_up[%gi3] : memref<3072xf32>
  %gi4 = arith.constant 33 : index
  %gv4 = arith.constant 1.0 : f32
  memref.store %gv4, %gate_up[%gi4] : memref<3072xf32>
  %gi5 = arith.constant 49 : index
  %gv5 = arith.constant -1.0 : f32
  memref.store %gv5, %gate_up[%gi5] : memref<3072xf32>
  %gi6 = arith.constant 1024 : index
  %gv6 = arith.constant 1.0 : f32
  memref.store %gv6, %gate_up[%gi6] : memref<3072xf32>
  %gi7 = arith.constant 1040 : index
  %gv7 = arith.constant 1.0 : f32
  memref.store %gv7, %gate_up[%gi7] : memref<3072xf32>
  %gi8 = arith.constant 1056 : index
  %gv8 = arith.constant 1.0 : f32
  memref.store %gv8, %gate_up[%gi8] : memref<3072xf32>
  %gi9 = arith.constant 1025 : index
  %gv9 = arith.constant 2.0 : f32
  memref.store %gv9, %gate_up[%gi9] : memref<3072xf32>
  %gi10 = arith.constant 1073 : index
  %gv10 = arith.constant 1.0 : f32
  memref.store %gv10, %gate_up[%gi10] : memref<3072xf32>
  %gi11 = arith.constant 2064 : index
  %gv11 = arith.constant 2.0 : f32
  memref.store %gv11, %gate_up[%gi11] : memref<3072xf32>
  %gi12 = arith.constant 2080 : index
  %gv12 = arith.constant 1.0 : f32
  memref.store %gv12, %gate_up[%gi12] : memref<3072xf32>
  %gi13 = arith.constant 2049 : index
  %gv13 = arith.constant -1.0 : f32
  memref.store %gv13, %gate_up[%gi13] : memref<3072xf32>
  %gi14 = arith.constant 2097 : index
  %gv14 = arith.constant 3.0 : f32
  memref.store %gv14, %gate_up[%gi14] : memref<3072xf32>
  %di0 = arith.constant 0 : index
  %dv0 = arith.constant 1.0 : f32
  memref.store %dv0, %down[%di0] : memref<3072xf32>
  %di1 = arith.constant 32 : index
  %dv1 = arith.constant 2.0 : f32
  memref.store %dv1, %down[%di1] : memref<3072xf32>
  %di2 = arith.constant 33 : index
  %dv2 = arith.constant 1.0 : f32
  memref.store %dv2, %down[%di2] : memref<3072xf32>
  %di3 = arith.constant 1024 : index
  %dv3 = arith.constant 1.0 : f32
  memref.store %dv3, %down[%di3] : memref<3072xf32>
  %di4 = arith.constant 1025 : index
  %dv4 = arith.constant 1.0 : f32
  memref.store %dv4, %down[%di4] : memref<3072xf32>
  %di5 = arith.constant 1057 : index
  %dv5 = arith.constant 1.0 : f32
  memref.store %dv5, %down[%di5] : memref<3072xf32>
  %di6 = arith.constant 2048 : index
  %dv6 = arith.constant 1.0 : f32
  memref.store %dv6, %down[%di6] : memref<3072xf32>
  %di7 = arith.constant 2080 : index
  %dv7 = arith.constant 1.0 : f32
  memref.store %dv7, %down[%di7] : memref<3072xf32>
  %di8 = arith.constant 2049 : index
  %dv8 = arith.constant 2.0 : f32
  memref.store %dv8, %down[%di8] : memref<3072xf32>
  %di9 = arith.constant 2081 : index
  %dv9 = arith.constant -1.0 : f32
  memref.store %dv9, %down[%di9] : memref<3072xf32>
  %w1 = builtin.unrealized_conversion_cast %gate_up : memref<3072xf32> to !moe.weight<3x2x2x2xf32, panel32>
  %w2 = builtin.unrealized_conversion_cast %down : memref<3072xf32> to !moe.weight<3x1x2x2xf32, panel32>
  %x = arith.constant dense<[[1.0, 2.0], [3.0, -1.0], [1.0, 1.0]]> : tensor<3x2xf32>
  %xd = tensor.cast %x : tensor<3x2xf32> to tensor<?x2xf32>
  %y = arith.constant dense<[[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]> : tensor<3x2xf32>
  %yd = tensor.cast %y : tensor<3x2xf32> to tensor<?x2xf32>
  %w = arith.constant dense<[[0.5, 2.0], [1.0, 7.0], [4.0, 0.25]]> : tensor<3x2xf32>
  %wd = tensor.cast %w : tensor<3x2xf32> to tensor<?x?xf32>
  %e = arith.constant dense<[[1, 0], [1, -1], [2, 1]]> : tensor<3x2xi32>
  %ed = tensor.cast %e : tensor<3x2xi32> to tensor<?x?xi32>
  %off0 = tensor.empty() : tensor<4xi32>
  %off, %z = call @layer(%xd, %yd, %wd, %ed, %off0, %false, %w1, %w2) : (tensor<?x2xf32>,
      tensor<?x2xf32>, tensor<?x?xf32>, tensor<?x?xi32>, tensor<4xi32>, i1,
      !moe.weight<3x2x2x2xf32, panel32>, !moe.weight<3x1x2x2xf32, panel32>)
      -> (tensor<4xi32>, tensor<?x2xf32>)
  %offb = bufferization.to_buffer %off : tensor<4xi32> to memref<4xi32>
  %offu = memref.cast %offb : memref<4xi32> to memref<*xi32>
  call @printMemrefI32(%offu) : (memref<*xi32>) -> ()
  %zb = bufferization.to_buffer %z : tensor<?x2xf32> to memref<?x2xf32>
  %zu = memref.cast %zb : memref<?x2xf32> to memref<*xf32>
  call @printMemrefF32(%zu) : (memref<*xf32>) -> ()
  %off2, %a = call @layer(%xd, %yd, %wd, %ed, %off0, %true, %w1, %w2) : (tensor<?x2xf32>,
      tensor<?x2xf32>, tensor<?x?xf32>, tensor<?x?xi32>, tensor<4xi32>, i1,
      !moe.weight<3x2x2x2xf32, panel32>, !moe.weight<3x1x2x2xf32, panel32>)
      -> (tensor<4xi32>, tensor<?x2xf32>)
  %ab = bufferization.to_buffer %a : tensor<?x2xf32> to memref<?x2xf32>
  %au = memref.cast %ab : memref<?x2xf32> to memref<*xf32>
  call @printMemrefF32(%au) : (memref<*xf32>) -> ()
  return
}
