// RUN: moe-opt %s --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s

// Where panel32-1 puts an element, and where values are rounded.

// Column 33 of 34 lies in panel 1, lane 1; row 2 of it: 1·1024 + 2·32 + 1 = 1089. 5·x2 = 5·7.
// CHECK: [0,  35]
// In bf16, row 2 of panel 1, lane 1: 1·1024 + (2/2)·64 + 1·2 + 0 = 1090.
// CHECK: [0,  35]
// Two parts: column 17 of part 1 lies in panel 1, lane 16 + 1; row 2: 1024 + 64 + 17 = 1105.
// CHECK: [0,  35]
// 257 needs nine bits: as bf16 it is 256 (ties to even). Rows rounded when they are read: 3·256.
// CHECK: [768]
// The product rounded before it is weighted: 3·257 = 771 is 772 in steps of 4.
// CHECK: [772]
// A bf16 result: 771 in f32, rounded when it is stored, and again 772.
// CHECK: [772]

func.func private @printMemrefF32(memref<*xf32>) attributes {llvm.emit_c_interface}
func.func private @printMemrefI32(memref<*xi32>) attributes {llvm.emit_c_interface}

// A packed weight with everything zero.
func.func private @zeros_f32() -> memref<2048xf32> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = arith.constant 2048 : index
  %z = arith.constant 0.0 : f32
  %m = memref.alloc() : memref<2048xf32>
  scf.for %i = %c0 to %n step %c1 {
    memref.store %z, %m[%i] : memref<2048xf32>
  }
  return %m : memref<2048xf32>
}

// A packed weight with everything zero.
func.func private @zeros_bf16() -> memref<2048xbf16> {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %n = arith.constant 2048 : index
  %z = arith.constant 0.0 : bf16
  %m = memref.alloc() : memref<2048xbf16>
  scf.for %i = %c0 to %n step %c1 {
    memref.store %z, %m[%i] : memref<2048xbf16>
  }
  return %m : memref<2048xbf16>
}

// A packed weight with everything zero.
func.func private @zeros_one() -> memref<1024xf32> {
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

func.func @print_pair(%a: f32, %b: f32) {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %m = memref.alloc() : memref<2xf32>
  memref.store %a, %m[%c0] : memref<2xf32>
  memref.store %b, %m[%c1] : memref<2xf32>
  %u = memref.cast %m : memref<2xf32> to memref<*xf32>
  call @printMemrefF32(%u) : (memref<*xf32>) -> ()
  return
}
func.func @print_one(%a: f32) {
  %c0 = arith.constant 0 : index
  %m = memref.alloc() : memref<1xf32>
  memref.store %a, %m[%c0] : memref<1xf32>
  %u = memref.cast %m : memref<1xf32> to memref<*xf32>
  call @printMemrefF32(%u) : (memref<*xf32>) -> ()
  return
}
func.func @main() {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c2 = arith.constant 2 : index
  %c17 = arith.constant 17 : index
  %c32 = arith.constant 32 : index
  %c33 = arith.constant 33 : index
  %zero = arith.constant 0 : i32
  %one = arith.constant 1 : i32
  %off = memref.alloc() : memref<2xi32>
  memref.store %zero, %off[%c0] : memref<2xi32>
  memref.store %one, %off[%c1] : memref<2xi32>
  %seven = arith.constant 7.0 : f32
  %x = memref.alloc() : memref<1x3xf32>
  memref.store %seven, %x[%c0, %c0] : memref<1x3xf32>
  memref.store %seven, %x[%c0, %c1] : memref<1x3xf32>
  memref.store %seven, %x[%c0, %c2] : memref<1x3xf32>

  %m0 = call @zeros_f32() : () -> memref<2048xf32>
  %ai0 = arith.constant 1089 : index
  %av0 = arith.constant 5.0 : f32
  memref.store %av0, %m0[%ai0] : memref<2048xf32>
  %w0 = builtin.unrealized_conversion_cast %m0 : memref<2048xf32> to !moe.weight<1x1x34x3xf32, panel32>
  %o0 = memref.alloc() : memref<1x34xf32>
  moe.grouped_matmul rows(%x : memref<1x3xf32>) groups(%off : memref<2xi32>)
      weights(%w0 : !moe.weight<1x1x34x3xf32, panel32>) outs(%o0 : memref<1x34xf32>)
  %a0 = memref.load %o0[%c0, %c32] : memref<1x34xf32>
  %a1 = memref.load %o0[%c0, %c33] : memref<1x34xf32>
  call @print_pair(%a0, %a1) : (f32, f32) -> ()

  %m1 = call @zeros_bf16() : () -> memref<2048xbf16>
  %bi0 = arith.constant 1090 : index
  %bv0 = arith.constant 5.0 : bf16
  memref.store %bv0, %m1[%bi0] : memref<2048xbf16>
  %w1 = builtin.unrealized_conversion_cast %m1 : memref<2048xbf16> to !moe.weight<1x1x34x3xbf16, panel32>
  moe.grouped_matmul rows(%x : memref<1x3xf32>) groups(%off : memref<2xi32>)
      weights(%w1 : !moe.weight<1x1x34x3xbf16, panel32>) outs(%o0 : memref<1x34xf32>)
  %b0 = memref.load %o0[%c0, %c32] : memref<1x34xf32>
  %b1 = memref.load %o0[%c0, %c33] : memref<1x34xf32>
  call @print_pair(%b0, %b1) : (f32, f32) -> ()

  %m2 = call @zeros_f32() : () -> memref<2048xf32>
  %ci0 = arith.constant 1105 : index
  %cv0 = arith.constant 5.0 : f32
  memref.store %cv0, %m2[%ci0] : memref<2048xf32>
  %w2 = builtin.unrealized_conversion_cast %m2 : memref<2048xf32> to !moe.weight<1x2x18x3xf32, panel32>
  %o2 = memref.alloc() : memref<1x2x18xf32>
  moe.grouped_matmul rows(%x : memref<1x3xf32>) groups(%off : memref<2xi32>)
      weights(%w2 : !moe.weight<1x2x18x3xf32, panel32>) outs(%o2 : memref<1x2x18xf32>)
  %d0 = memref.load %o2[%c0, %c0, %c17] : memref<1x2x18xf32>
  %d1 = memref.load %o2[%c0, %c1, %c17] : memref<1x2x18xf32>
  call @print_pair(%d0, %d1) : (f32, f32) -> ()

  %m3 = call @zeros_one() : () -> memref<1024xf32>
  %ei0 = arith.constant 0 : index
  %ev0 = arith.constant 3.0 : f32
  memref.store %ev0, %m3[%ei0] : memref<1024xf32>
  %w3 = builtin.unrealized_conversion_cast %m3 : memref<1024xf32> to !moe.weight<1x1x1x1xf32, panel32>
  %v = arith.constant 257.0 : f32
  %x1 = memref.alloc() : memref<1x1xf32>
  memref.store %v, %x1[%c0, %c0] : memref<1x1xf32>
  %o3 = memref.alloc() : memref<1x1xf32>
  moe.grouped_matmul rows(%x1 as bf16 : memref<1x1xf32>) groups(%off : memref<2xi32>)
      weights(%w3 : !moe.weight<1x1x1x1xf32, panel32>) outs(%o3 : memref<1x1xf32>)
  %f0 = memref.load %o3[%c0, %c0] : memref<1x1xf32>
  call @print_one(%f0) : (f32) -> ()
  moe.grouped_matmul rows(%x1 : memref<1x1xf32>) groups(%off : memref<2xi32>)
      weights(%w3 : !moe.weight<1x1x1x1xf32, panel32>) combine as bf16 outs(%o3 : memref<1x1xf32>)
  %f1 = memref.load %o3[%c0, %c0] : memref<1x1xf32>
  call @print_one(%f1) : (f32) -> ()
  %o4 = memref.alloc() : memref<1x1xbf16>
  moe.grouped_matmul rows(%x1 : memref<1x1xf32>) groups(%off : memref<2xi32>)
      weights(%w3 : !moe.weight<1x1x1x1xf32, panel32>) outs(%o4 : memref<1x1xbf16>)
  %f2 = memref.load %o4[%c0, %c0] : memref<1x1xbf16>
  %f3 = arith.extf %f2 : bf16 to f32
  call @print_one(%f3) : (f32) -> ()
  return
}
