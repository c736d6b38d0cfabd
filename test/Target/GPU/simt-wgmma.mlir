// D (64 x 8) = A (64 x 16) · B (16 x 8) twice, by one warpgroup. Row m of A is the unit vector m mod
// 16, and B[n][k] is 16 n + k: D[m][n] is 32 n + 2 (m mod 16). Both operands lie K-major in rows of
// 128 bytes with a swizzle of 128, in the second 32 bytes of their rows.

// DEFINE: %{t} = --block 128 --shared 9216 --arg in:b:bf16:128
// DEFINE: %{args} = %{t} --arg out:d:f32:512
// RUN: moe-simt-kernel %s %{args} | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order reverse | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order shuffled:2 | FileCheck %s
// CHECK: d: 0 32 64 96 128 160 192 224 2 34 66 98 130 162 194 226 4 36
// CHECK-SAME: 30 62 94 126 158 190 222 254{{$}}
// The left operand from registers.
// RUN: sed 's/%%left = llvm.mlir.constant(false)/%%left = llvm.mlir.constant(true)/' %s > %t.registers
// RUN: moe-simt-kernel %t.registers %{args} --order shuffled:2 | FileCheck %s

// The other proxy is not told of the stores.
// RUN: sed 's/^    nvvm.fence.proxy.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=PROXY
// RUN: sed 's/^    nvvm.fence.proxy.*//' %t.registers | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=PROXY
// PROXY: expected fence.proxy.async between the write of shared memory at offset {{[0-9]+}} by thread {{.*}} and this read by the asynchronous proxy, but got none
// No barrier between the stores and the product.
// RUN: sed 's/^    nvvm.barrier$//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=BARRIER
// BARRIER: race: {{read|write}} of shared memory at offset {{[0-9]+}}, which
// No wait, or one for too few, or for what was not committed.
// RUN: sed 's/^    nvvm.wgmma.wait.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=WAIT
// RUN: sed 's/^    nvvm.wgmma.wait.*/    nvvm.wgmma.wait.group.sync.aligned 1/' %t.registers | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=WAIT
// RUN: sed 's/^    nvvm.wgmma.commit.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=WAIT
// WAIT: llvm.inline_asm {{.*}}expected accumulators whose wgmma was waited for, but got those of one in flight
// Registers are written before the product and no fence says so.
// RUN: sed 's/^    nvvm.wgmma.fence.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=FENCE
// FENCE: expected wgmma.fence before the first wgmma after other uses of its registers, but got none
// An operand is overwritten while the product runs.
// RUN: sed 's/^    \/\/ HERE/    llvm.store %%zero, %%place : i128, !llvm.ptr<3>/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=OVERWRITE
// OVERWRITE: race: write of shared memory at offset {{[0-9]+}}, which {{a wgmma in flight reads|thread .* read, without a barrier}}
// A lost or an added transpose, another stride: other numbers, or an operand that is not there.
// RUN: moe-simt-kernel %s %{args} > %t.0
// RUN: sed 's/B \[<bf16>, <one>, <col>\]/B [<bf16>, <one>, <row>]/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=OUTSIDE
// OUTSIDE: expected a wgmma operand within 9216 bytes of shared memory
// RUN: sed 's/A \[<bf16>, <one>, <row>\]/A [<bf16>, <one>, <col>]/' %s | moe-simt-kernel - %{args} > %t.1
// RUN: not cmp %t.0 %t.1
// RUN: sed 's/constant(4611686293305360384 : i64)/constant(4611686018427453440 : i64)/' %s | moe-simt-kernel - %{args} > %t.2
// RUN: not cmp %t.0 %t.2
// Another swizzle.
// RUN: sed 's/constant(4611686293305360384 : i64)/constant(-4611685743549415424 : i64)/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=SWIZZLE
// SWIZZLE: expected a descriptor whose pattern begins at a multiple of 8 rows of the swizzle, but got another address
// One warp of the four is missing.
// RUN: sed 's/%%all = llvm.mlir.constant(128 : i32)/%%all = llvm.mlir.constant(96 : i32)/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=MISSING
// MISSING: deadlock: from thread 0 {{.*}} threads wait at {{.*}}nvvm.wgmma.wait.group.sync.aligned #0; 32 of 128 threads have ended
// Half a warpgroup.
// RUN: not moe-simt-kernel %s --block 64 --shared 9216 --arg in:b:bf16:128 --arg out:d:f32:512 2>&1 | FileCheck %s --check-prefix=HALF
// HALF: expected whole warpgroups of 128 threads, but got a block of 64

!sums = !llvm.struct<(f32, f32, f32, f32)>
gpu.module @m {
  llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>
  llvm.func @k(%b: !llvm.ptr<1>, %d: !llvm.ptr<1>) attributes {gpu.kernel, nvvm.kernel} {
    %left = llvm.mlir.constant(false) : i1
    %all = llvm.mlir.constant(128 : i32) : i32
    %zero = llvm.mlir.constant(0 : i128) : i128
    %one = llvm.mlir.constant(16256 : i128) : i128
    %word = llvm.mlir.constant(16256 : i32) : i32
    %f0 = llvm.mlir.constant(0.0 : f32) : f32
    %c0 = llvm.mlir.constant(0 : i32) : i32
    %c1 = llvm.mlir.constant(1 : i32) : i32
    %c2 = llvm.mlir.constant(2 : i32) : i32
    %c3 = llvm.mlir.constant(3 : i32) : i32
    %c4 = llvm.mlir.constant(4 : i32) : i32
    %c7 = llvm.mlir.constant(7 : i32) : i32
    %c8 = llvm.mlir.constant(8 : i32) : i32
    %c16 = llvm.mlir.constant(16 : i32) : i32
    %c32 = llvm.mlir.constant(32 : i32) : i32
    %c128 = llvm.mlir.constant(128 : i32) : i32
    %shared = llvm.mlir.addressof @shared : !llvm.ptr<3>
    %right = llvm.getelementptr %shared[8192] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %tid = nvvm.read.ptx.sreg.tid.x : i32
    // Chunk tid mod 2 of row tid / 2: 8 values of k.
    %row = llvm.lshr %tid, %c1 : i32
    %chunk = llvm.and %tid, %c1 : i32
    %row8 = llvm.and %row, %c7 : i32
    %start = llvm.mul %row, %c128 : i32
    %chunk2 = llvm.add %chunk, %c2 : i32
    %turned = llvm.xor %chunk2, %row8 : i32
    %inrow = llvm.mul %turned, %c16 : i32
    %offset = llvm.add %start, %inrow : i32
    %place = llvm.getelementptr %shared[%offset] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i8
    // The unit vector of the row, where it lies in this chunk.
    %shift = llvm.mul %row8, %c16 : i32
    %wide = llvm.zext %shift : i32 to i128
    %unit = llvm.shl %one, %wide : i128
    %half = llvm.lshr %row, %c3 : i32
    %which = llvm.and %half, %c1 : i32
    %mine = llvm.icmp "eq" %which, %chunk : i32
    %value = llvm.select %mine, %unit, %zero : i1, i128
    llvm.store %value, %place {alignment = 16 : i64} : i128, !llvm.ptr<3>
    %copies = llvm.icmp "ult" %tid, %c16 : i32
    llvm.cond_br %copies, ^copy, ^copied
  ^copy:
    %index = llvm.mul %tid, %c16 : i32
    %from = llvm.getelementptr %b[%index] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, i8
    %eight = llvm.load %from {alignment = 16 : i64} : !llvm.ptr<1> -> i128
    %to = llvm.getelementptr %right[%offset] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i8
    llvm.store %eight, %to {alignment = 16 : i64} : i128, !llvm.ptr<3>
    llvm.br ^copied
  ^copied:
    nvvm.fence.proxy {kind = #nvvm.proxy_kind<async.shared>, space = #nvvm.shared_space<cta>}
    nvvm.barrier
    %takes_part = llvm.icmp "ult" %tid, %all : i32
    llvm.cond_br %takes_part, ^multiply, ^end
  ^multiply:
    // Rows of the pattern are 1024 bytes apart, swizzle 128, and 32 bytes into the row.
    %form = llvm.mlir.constant(4611686293305360384 : i64) : i64
    %c2w = llvm.mlir.constant(2 : i64) : i64
    %c4w = llvm.mlir.constant(4 : i64) : i64
    %window = llvm.mlir.constant(262143 : i64) : i64
    %aa = llvm.ptrtoint %shared : !llvm.ptr<3> to i64
    %ab = llvm.and %aa, %window : i64
    %ac = llvm.lshr %ab, %c4w : i64
    %ad = llvm.add %ac, %c2w : i64
    %da = llvm.or %ad, %form : i64
    %ba = llvm.ptrtoint %right : !llvm.ptr<3> to i64
    %bb = llvm.and %ba, %window : i64
    %bc = llvm.lshr %bb, %c4w : i64
    %bd = llvm.add %bc, %c2w : i64
    %db = llvm.or %bd, %form : i64
    // The left operand of this lane: rows group and group + 8, columns 2 quad and further.
    %lane = llvm.urem %tid, %c32 : i32
    %group = llvm.lshr %lane, %c2 : i32
    %quad = llvm.and %lane, %c3 : i32
    %pair = llvm.lshr %group, %c1 : i32
    %hit = llvm.icmp "eq" %pair, %quad : i32
    %odd = llvm.and %group, %c1 : i32
    %high = llvm.mul %odd, %c16 : i32
    %set = llvm.shl %word, %high : i32
    %a0 = llvm.select %hit, %set, %c0 : i1, i32
    nvvm.wgmma.fence.aligned
    llvm.cond_br %left, ^registers, ^memory
  ^registers:
    %r0 = llvm.inline_asm has_side_effects "{\0A.reg .pred p;\0Asetp.ne.b32 p, 1, 0;\0Awgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {$0, $1, $2, $3}, {$4, $5, $6, $7}, $8, p, 1, 1, 0;\0A}", "=f,=f,=f,=f,r,r,r,r,l,0,1,2,3" %a0, %c0, %c0, %a0, %db, %f0, %f0, %f0, %f0 : (i32, i32, i32, i32, i64, f32, f32, f32, f32) -> !sums
    %p0 = llvm.extractvalue %r0[0] : !sums
    %p1 = llvm.extractvalue %r0[1] : !sums
    %p2 = llvm.extractvalue %r0[2] : !sums
    %p3 = llvm.extractvalue %r0[3] : !sums
    %r1 = llvm.inline_asm has_side_effects "{\0A.reg .pred p;\0Asetp.ne.b32 p, 1, 0;\0Awgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {$0, $1, $2, $3}, {$4, $5, $6, $7}, $8, p, 1, 1, 0;\0A}", "=f,=f,=f,=f,r,r,r,r,l,0,1,2,3" %a0, %c0, %c0, %a0, %db, %p0, %p1, %p2, %p3 : (i32, i32, i32, i32, i64, f32, f32, f32, f32) -> !sums
    llvm.br ^done(%r1 : !sums)
  ^memory:
    %none = llvm.mlir.undef : !sums
    %s0 = nvvm.wgmma.mma_async %da, %db, %none, <m = 64, n = 8, k = 16>, D [<f32>, <zero>], A [<bf16>, <one>, <row>], B [<bf16>, <one>, <col>] : !sums -> !sums
    %s1 = nvvm.wgmma.mma_async %da, %db, %s0, <m = 64, n = 8, k = 16>, D [<f32>, <one>], A [<bf16>, <one>, <row>], B [<bf16>, <one>, <col>] : !sums -> !sums
    llvm.br ^done(%s1 : !sums)
  ^done(%sums: !sums):
    nvvm.wgmma.commit.group.sync.aligned
    // HERE
    nvvm.wgmma.wait.group.sync.aligned 0
    %q0 = llvm.extractvalue %sums[0] : !sums
    %q1 = llvm.extractvalue %sums[1] : !sums
    %q2 = llvm.extractvalue %sums[2] : !sums
    %q3 = llvm.extractvalue %sums[3] : !sums
    %read = llvm.inline_asm has_side_effects "", "=f,=f,=f,=f,0,1,2,3" %q0, %q1, %q2, %q3 : (f32, f32, f32, f32) -> !sums
    %v0 = llvm.extractvalue %read[0] : !sums
    %v1 = llvm.extractvalue %read[1] : !sums
    %v2 = llvm.extractvalue %read[2] : !sums
    %v3 = llvm.extractvalue %read[3] : !sums
    // Rows 16 warp + group (+ 8), columns 2 quad (+ 1).
    %warp = llvm.udiv %tid, %c32 : i32
    %first = llvm.mul %warp, %c16 : i32
    %m = llvm.add %first, %group : i32
    %at = llvm.mul %m, %c8 : i32
    %col = llvm.mul %quad, %c2 : i32
    %o = llvm.add %at, %col : i32
    %o0 = llvm.getelementptr %d[%o] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, f32
    %o1 = llvm.getelementptr %o0[1] : (!llvm.ptr<1>) -> !llvm.ptr<1>, f32
    %o2 = llvm.getelementptr %o0[64] : (!llvm.ptr<1>) -> !llvm.ptr<1>, f32
    %o3 = llvm.getelementptr %o0[65] : (!llvm.ptr<1>) -> !llvm.ptr<1>, f32
    llvm.store %v0, %o0 : f32, !llvm.ptr<1>
    llvm.store %v1, %o1 : f32, !llvm.ptr<1>
    llvm.store %v2, %o2 : f32, !llvm.ptr<1>
    llvm.store %v3, %o3 : f32, !llvm.ptr<1>
    llvm.br ^end
  ^end:
    llvm.return
  }
}
