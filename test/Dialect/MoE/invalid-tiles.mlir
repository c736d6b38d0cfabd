// RUN: moe-opt %s --split-input-file --verify-diagnostics

// claim_c1
func.func @claim_c1(%n: index) {
  // expected-error @below {{expected counter in [0, 16), but got 16}}
  %i = moe.claim counter(16) count(%n) : index
  return
}

// -----

// stage_c2
func.func @stage_c2() {
  moe.stage "a" body(%lane, %lanes) {
    // expected-error @below {{expected a stage outside other stages}}
    moe.stage "b" body(%l, %ls) {
    }
  }
  return
}

// -----

// stage_c1
func.func @stage_c1() {
  // expected-error @below {{expected a body with two index arguments (lane, lanes)}}
  "moe.stage"() <{label = "a"}> ({
  ^bb0(%lane: index):
    moe.yield
  }, {}) : () -> ()
  return
}

// -----

// gemm_tile_c2
func.func @gemm_tile_c2(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected a region of 1 arguments, one per part, but got 2}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into blocked(%o : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1> {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// gemm_tile_c3
func.func @gemm_tile_c3(%n: index, %a: memref<?xf32>, %o: memref<?x32xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected via, gate, scale and compute with into combine only}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into rows(%o row %n : memref<?x32xf32>) compute = bf16
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_c3_compute
func.func @gemm_tile_c3_compute(%n: index, %a: memref<?xf32>, %o: memref<1x?x32xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected compute with into combine, but got none}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into combine(%o row %n : memref<1x?x32xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_c4
func.func @gemm_tile_c4(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected row with into rows and into combine, and only there}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into blocked(%o row %n : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_c5
func.func @gemm_tile_c5(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x2x24x32xf32, panel32>) {
  // expected-error @below {{expected one part or a region with into blocked, but got 2 parts}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x2x24x32xf32, panel32>)
      into blocked(%o : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_rank
func.func @gemm_tile_rank(%n: index, %a: memref<?xf32>, %o: memref<?xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected a result of rank 2 into rows, but got 1}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into rows(%o row %n : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// gemm_tile_scratch
func.func @gemm_tile_scratch(%n: index, %a: memref<?xf32>, %o: memref<2x?x32xf32>, %pair: memref<?xi32>,
    %tw: memref<?xf32>, %w: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected panels of the scratch = 1, but got 2}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x32x24xf32, panel32>)
      into combine(%o row %n : memref<2x?x32xf32>) compute = f32
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>
  return
}

// -----

// begin_panels
func.func @begin_panels(%s: memref<1x?x32xf32>, %y: memref<?x64xf32>, %n: index, %acc: i1) {
  // expected-error @below {{expected panels of the scratch = 2, but got 1}}
  moe.begin_panels into(%s : memref<1x?x32xf32>) from(%y : memref<?x64xf32>)
      first(%n) panels(2) accumulate(%acc)
  return
}

// -----

// end_panels
func.func @end_panels(%s: memref<1x?x16xf32>, %y: memref<?x64xf32>, %n: index) {
  // expected-error @below {{expected columns of the scratch = 32, but got 16}}
  moe.end_panels from(%s : memref<1x?x16xf32>) into(%y : memref<?x64xf32>)
      first(%n) panels(1)
  return
}

// -----

// pack_rows_c2
func.func @pack_rows_c2(%x: memref<?x40xf32>, %n: index, %a: memref<?xbf16>) {
  // expected-error @below {{expected compute = bf16 for a block of bf16, but got 'f32'}}
  moe.pack_rows rows(%x : memref<?x40xf32>) range(%n, %n) compute = f32 into(%a : memref<?xbf16>)
  return
}

// -----

// gemm_tile_c6
func.func @gemm_tile_c6_block(%n: index, %a: memref<?xf32>, %h: memref<?xf32>,
    %w: !moe.weight<4x1x40x33xbf16, panel32>) {
  // expected-error @below {{expected a block of bf16 for product = dot_bf16, but got 'memref<?xf32>'}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xbf16, panel32>) into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "avx512-bf16", rows = 2, panels = 1, product = dot_bf16>
  return
}

// -----

// gemm_tile_c6
func.func @gemm_tile_c6_weight(%n: index, %a: memref<?xbf16>, %h: memref<?xf32>,
    %w: !moe.weight<4x1x40x33xf32, panel32>) {
  // expected-error @below {{expected a weight of bf16 for product = dot_bf16, but got}}
  moe.gemm_tile count(%n) a(%a : memref<?xbf16>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xf32, panel32>) into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "avx512-bf16", rows = 2, panels = 1, product = dot_bf16>
  return
}

// -----

// gemm_tile_c8
func.func @gemm_tile_c8(%n: index, %a: memref<?xf32>, %h: memref<?xf32>,
    %w: !moe.weight<4x1x40x33xf32, panel32>) {
  // expected-error @below {{expected ahead exactly with a micro-kernel that has lines of it, but got ahead = 8 and no distance}}
  moe.gemm_tile count(%n) a(%a : memref<?xf32>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xf32, panel32>) into blocked(%h : memref<?xf32>)
      ukernel = #moe.ukernel<level = "x86-64-v4", rows = 2, panels = 1, ahead = 8>
  return
}

// -----

// gemm_tile_c9
func.func @gemm_tile_c9(%n: index, %a: memref<?xbf16>, %h: memref<?xbf16>,
    %w: !moe.weight<4x1x40x33xbf16, panel32>) {
  // expected-error @below {{expected the clause k exactly with a k_block, but got k_block = 16 and no steps}}
  moe.gemm_tile count(%n) a(%a : memref<?xbf16>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xbf16, panel32>) into blocked(%h : memref<?xbf16>)
      ukernel = #moe.ukernel<level = "amx-bf16", rows = 32, panels = 1, product = tile_bf16, k_block = 16>
  return
}

// -----

// gemm_tile_c10
func.func @gemm_tile_c10(%n: index, %a: memref<?xbf16>, %h: memref<?xbf16>, %s: memref<?xf32>,
    %w: !moe.weight<4x1x40x33xbf16, panel32>) {
  // expected-error @below {{expected the clause after exactly with defer, but got defer = 2 and no number}}
  moe.gemm_tile count(%n) a(%a : memref<?xbf16>)
      weight(%w[%n, %n] : !moe.weight<4x1x40x33xbf16, panel32>)
      k(%n to %n, %s : memref<?xf32>) into blocked(%h : memref<?xbf16>)
      ukernel = #moe.ukernel<level = "amx-bf16", rows = 32, panels = 1, product = tile_bf16,
                             k_block = 16, defer = 2>
  return
}
