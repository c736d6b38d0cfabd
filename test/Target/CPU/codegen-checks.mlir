// RUN: split-file %s %t
// RUN: not moe-phase-test %t/wide.mlir --to= --emit=obj 2>&1 | FileCheck %s --check-prefix=WIDE
// RUN: not moe-phase-test %t/amx.mlir --to= --emit=obj 2>&1 | FileCheck %s --check-prefix=AMX
// RUN: not moe-phase-test %t/call.mlir --to= --emit=obj 2>&1 | FileCheck %s --check-prefix=CALL
// RUN: not moe-phase-test %t/rest.mlir --to= --emit=obj 2>&1 | FileCheck %s --check-prefix=REST
// RUN: moe-phase-test %t/good.mlir --to= --emit=asm | FileCheck %s --check-prefix=GOOD

// WIDE: E-INTERNAL: function `f`: expected CPU attributes with `avx512f` for fma on 512-bit vectors, but got target-cpu `x86-64-v3`
// AMX: expected CPU attributes with `amx-tile` for `llvm.x86.tilezero.internal`, but got target-cpu `x86-64-v4`
// CALL: generated code: expected calls to memset, memcpy and memmove alone, but got a call to `expf`
// REST: expected a module in the LLVM dialect, but got an operation `func.func`
// The table is the only exported symbol.
// GOOD-NOT: .globl
// GOOD: .globl test_moec_module
// GOOD-NOT: .globl

//--- wide.mlir
llvm.func @f(%p: !llvm.ptr) attributes {target_cpu = "x86-64-v3"} {
  %v = llvm.load %p : !llvm.ptr -> vector<16xf32>
  %w = llvm.intr.fma(%v, %v, %v) : (vector<16xf32>, vector<16xf32>, vector<16xf32>) -> vector<16xf32>
  llvm.store %w, %p : vector<16xf32>, !llvm.ptr
  llvm.return
}

//--- amx.mlir
llvm.func @f(%p: !llvm.ptr, %n: i16) attributes {target_cpu = "x86-64-v4"} {
  %t = llvm.call_intrinsic "llvm.x86.tilezero.internal"(%n, %n) : (i16, i16) -> !llvm.x86_amx
  llvm.return
}

//--- call.mlir
llvm.func @expf(f32) -> f32
llvm.func @f(%p: !llvm.ptr) attributes {target_cpu = "x86-64-v4"} {
  %v = llvm.load %p : !llvm.ptr -> f32
  %w = llvm.call @expf(%v) : (f32) -> f32
  llvm.store %w, %p : f32, !llvm.ptr
  llvm.return
}
llvm.mlir.global external @keep() : !llvm.ptr {
  %f = llvm.mlir.addressof @f : !llvm.ptr
  llvm.return %f : !llvm.ptr
}

//--- rest.mlir
func.func @f() {
  return
}

//--- good.mlir
llvm.func @f(%p: !llvm.ptr) attributes {target_cpu = "x86-64-v4"} {
  llvm.return
}
