// RUN: moe-opt %s --split-input-file --verify-diagnostics --moe-cpu-emit-kernels

func.func @no_target(%x: memref<?x8xf32>, %n: index, %a: memref<?xf32>) {
  // expected-error @+1 {{expected a function with moe.target around it, but got none}}
  moe.pack_rows rows(%x : memref<?x8xf32>) range(%n, %n) compute = f32 into(%a : memref<?xf32>)
  return
}

// -----

func.func @gaps(%x: memref<?x8xf32, strided<[16, 2]>>, %n: index, %a: memref<?xf32>)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v3">} {
  // expected-error @+1 {{expected buffers whose elements are next to each other, but got 'memref<?x8xf32, strided<[16, 2]>>'}}
  moe.pack_rows rows(%x : memref<?x8xf32, strided<[16, 2]>>) range(%n, %n) compute = f32
      into(%a : memref<?xf32>)
  return
}

// -----

func.func @router(%l: memref<?x64xf32>, %w: memref<?x8xf32>, %e: memref<?x8xi32>, %n: index)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  // expected-error @+1 {{expected a router that the CPU target has code for, but got score = sqrt_softplus}}
  moe.select_experts logits(%l : memref<?x64xf32>) experts = 64 range(%n, %n)
      outs(%w, %e : memref<?x8xf32>, memref<?x8xi32>)
      #moe.router<score = sqrt_softplus, order = score_then_select, top_k = 8>
  return
}

// -----

func.func @op_without_vector_form(%n: index, %a: memref<?xf32>, %h: memref<?xf32>,
                                  %w: !moe.weight<4x1x40x33xbf16, panel32>)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xbf16, panel32>)
      into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 1, panels = 1, order = a_first> {
  ^bb0(%x: f32):
    // expected-error @+1 {{expected arith, math.exp, math.erf, math.tanh, math.absf or math.fma in a kernel epilogue, but got an operation without a vector form}}
    %s = math.sin %x : f32
    moe.yield %s : f32
  }
  return
}
