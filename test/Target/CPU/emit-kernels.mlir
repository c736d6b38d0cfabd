// RUN: moe-opt %s --split-input-file --moe-cpu-emit-kernels | FileCheck %s
// RUN: moe-opt %s --split-input-file --moe-cpu-emit-kernels --canonicalize --cse \
// RUN:   --expand-strided-metadata --convert-scf-to-cf --convert-vector-to-llvm \
// RUN:   --finalize-memref-to-llvm --convert-to-llvm > /dev/null

// A block of 1 or 2 rows, exact kernels for both; the panel's columns of a block of h begin
// panel * count * 64 bytes into it; columns beyond F are cut off.

// CHECK-LABEL: func @up
// CHECK-SAME:    %[[COUNT:.*]]: index, %{{.*}}: memref<?xf32>
// CHECK-DAG:     builtin.unrealized_conversion_cast %{{.*}} : !moe.weight<4x2x40x33xbf16, panel32> to !llvm.ptr
// CHECK-DAG:     arith.constant 4096 : i64
// CHECK:         scf.index_switch %[[COUNT]]
// CHECK:         case 1 {
// CHECK-NEXT:      call @[[K1:moe_gemm_v4_r1_p1_bf16_pf512_blocked2_[0-9a-f]+]](
// CHECK:         case 2 {
// CHECK-NEXT:      call @[[K2:moe_gemm_v4_r2_p1_bf16_pf512_blocked2_[0-9a-f]+]](
// CHECK:         default {
// CHECK-NEXT:    }
// CHECK-NOT:     moe.gemm_tile
// CHECK:       func.func private @[[K1]](
// CHECK-SAME:    !llvm.ptr, %{{.*}}: !llvm.ptr, %{{.*}}: i64, %{{.*}}: i64, %{{.*}}: !llvm.ptr, %{{.*}}: i64)
// CHECK-SAME:    llvm.linkage = #llvm.linkage<internal>
// CHECK-SAME:    passthrough = ["noinline", "nounwind"]
// CHECK-SAME:    prefer_vector_width = "512"
// CHECK-SAME:    target_cpu = "x86-64-v4"
// CHECK:         scf.for
// CHECK:           llvm.intr.prefetch{{.*}}hint = 2
// CHECK:           vector.fma %{{.*}} : vector<16xf32>
func.func @up(%n: index, %a: memref<?xf32>, %h: memref<?xf32>,
              %w: !moe.weight<4x2x40x33xbf16, panel32>, %e: index, %p: index)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%e, %p] : !moe.weight<4x2x40x33xbf16, panel32>)
      into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 2, panels = 1, order = b_first, prefetch = 512> {
  ^bb0(%gate: f32, %up: f32):
    %one = arith.constant 1.0 : f32
    %neg = arith.negf %gate : f32
    %exp = math.exp %neg : f32
    %sum = arith.addf %exp, %one : f32
    %s = arith.divf %gate, %sum : f32
    %m = arith.mulf %s, %up : f32
    moe.yield %m : f32
  }
  return
}

// -----

// Three panels in tiles of two: the last one alone, never the next expert's.

// CHECK-LABEL: func @odd_panels
// CHECK:         scf.if
// CHECK:           scf.for
// CHECK:             call @moe_gemm_v4_r1_p1_f32_rows1_bf16
// CHECK:         } else {
// CHECK:             call @moe_gemm_v4_r1_p2_f32_rows1_bf16
func.func @odd_panels(%n: index, %a: memref<?xf32>, %r: memref<?x96xbf16>,
                      %w: !moe.weight<4x1x96x33xf32, panel32>, %e: index, %p: index)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%e, %p] : !moe.weight<4x1x96x33xf32, panel32>)
      into rows(%r row %n : memref<?x96xbf16>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 1, panels = 2, order = a_first>
  return
}

// -----

// Kernels with equal specifications are one function, on each level.

// CHECK-LABEL: func @combine
// CHECK-COUNT-2: call @moe_gemm_v3_r1_p1_f32_combine1_bf16
// CHECK:         call @moe_gemm_v3_r1_p1_f32_add1_f32
// CHECK:       func.func private @moe_gemm_v3_r1_p1_f32_combine1_bf16
// CHECK-SAME:    target_cpu = "x86-64-v3"
// CHECK-NOT:     vector<16x
// CHECK:         vector<8xf32>
// CHECK-NOT:   func.func private @moe_gemm_v3_r1_p1_f32_combine1_bf16
func.func @combine(%n: index, %a: memref<?xf32>, %y: memref<1x?x32xf32>, %pair: memref<?xi32>,
                   %weights: memref<?xf32>, %k: index, %w: !moe.weight<4x1x96x33xf32, panel32>,
                   %e: index, %p: index)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v3">} {
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%e, %p] : !moe.weight<4x1x96x33xf32, panel32>)
      into combine(%y row %n : memref<1x?x32xf32>)
      via(%pair, %weights slots %k : memref<?xi32>, memref<?xf32>) compute = bf16
      ukernel = #moe.ukernel<level = "x86-64-v3", rows = 1, panels = 1, order = a_first>
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%p, %e] : !moe.weight<4x1x96x33xf32, panel32>)
      into combine(%y row %n : memref<1x?x32xf32>)
      via(%pair, %weights slots %k : memref<?xi32>, memref<?xf32>) compute = bf16
      ukernel = #moe.ukernel<level = "x86-64-v3", rows = 1, panels = 1, order = a_first>
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%e, %p] : !moe.weight<4x1x96x33xf32, panel32>)
      into combine(%y row %n : memref<1x?x32xf32>) compute = f32
      ukernel = #moe.ukernel<level = "x86-64-v3", rows = 1, panels = 1, order = a_first>
  return
}

// -----

// CHECK-LABEL: func @others
// CHECK:         call @moe_pack_v4_bf16_gather
// CHECK:         call @moe_pack_v4_f32_round
// CHECK:         call @moe_select_v4_e64_k8_softmax_
// CHECK:         arith.extui %{{.*}} : i1 to i64
// CHECK:         call @moe_begin_panels_v4_bf16
// CHECK:         call @moe_end_panels_v4_bf16
// CHECK-NOT:     moe.
func.func @others(%x: memref<?x130xbf16, strided<[?, 1]>>, %x32: memref<?x130xf32>,
                  %pair: memref<?xi32>, %k: index, %f: index, %n: index, %a: memref<?xf32>,
                  %l: memref<?x64xf32>, %w: memref<?x8xf32>, %e: memref<?x8xi32>, %acc: i1,
                  %scratch: memref<1x?x32xf32>, %y: memref<?x130xbf16, strided<[?, 1]>>)
    attributes {moe.target = #moe.target<cpu, level = "x86-64-v4">} {
  moe.pack_rows rows(%x : memref<?x130xbf16, strided<[?, 1]>>) via(%pair, %k : memref<?xi32>)
      range(%f, %n) compute = bf16 into(%a : memref<?xf32>)
  moe.pack_rows rows(%x32 : memref<?x130xf32>) range(%f, %n) compute = bf16
      into(%a : memref<?xf32>)
  moe.select_experts logits(%l : memref<?x64xf32>) experts = 64 range(%f, %n)
      outs(%w, %e : memref<?x8xf32>, memref<?x8xi32>)
      #moe.router<score = softmax, order = score_then_select, top_k = 8, renormalize = sum, scale = 2.5>
  moe.begin_panels into(%scratch : memref<1x?x32xf32>)
      from(%y : memref<?x130xbf16, strided<[?, 1]>>) first(%f) panels(1) accumulate(%acc)
  moe.end_panels from(%scratch : memref<1x?x32xf32>)
      into(%y : memref<?x130xbf16, strided<[?, 1]>>) first(%f) panels(1)
  return
}

// -----

// The activation of an unfused stage: the kernels' own polynomial, no call.

// CHECK-LABEL: func @unfused
// CHECK-NOT:     math.exp
// CHECK:         vector.fma
func.func @unfused(%v: vector<16xf32>) -> vector<16xf32> {
  %0 = math.exp %v : vector<16xf32>
  return %0 : vector<16xf32>
}

// -----

// Products of bf16 pairs: a group of a rows32 block is two panels of 16 columns; the last of an odd
// number of panels is told to zero the half after it.

// CHECK-LABEL: func @pairs
// CHECK:         scf.index_switch
// CHECK:         case 1 {
// CHECK-NEXT:      call @[[D1:moe_gemm_dot_r1_p1_bf16_blocked2_bf16_[0-9a-f]+]](
// CHECK:         call @moe_pack_v4_f32_block32(
// CHECK:       func.func private @[[D1]](
// CHECK-SAME:    target_cpu = "x86-64-v4"
// CHECK-SAME:    target_features = #llvm.target_features<["+avx512bf16"]>
// CHECK:         llvm.call_intrinsic "llvm.x86.avx512bf16.dpbf16ps.512"
func.func @pairs(%n: index, %x: memref<?x33xf32>, %a: memref<?xbf16>, %h: memref<?xbf16>,
                 %w: !moe.weight<4x2x40x33xbf16, panel32>, %e: index, %p: index)
    attributes {moe.target = #moe.target<cpu, level = "avx512-bf16">} {
  moe.gemm_tile count(%n) a(%a : memref<?xbf16>)
      weight(%w[%e, %p] : !moe.weight<4x2x40x33xbf16, panel32>)
      into blocked(%h : memref<?xbf16>)
      ukernel = #moe.ukernel<level = "avx512-bf16", rows = 2, panels = 1, product = dot_bf16> {
  ^bb0(%gate: f32, %up: f32):
    %m = arith.mulf %gate, %up : f32
    moe.yield %m : f32
  }
  moe.pack_rows rows(%x : memref<?x33xf32>) range(%e, %n) compute = bf16 into(%a : memref<?xbf16>)
  return
}
