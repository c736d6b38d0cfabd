// One thread orders a box of 64 x 8 elements with its corner at (32, 5) of a tensor of 72 x 12: the
// rows beyond 12 and the columns beyond 72 are zero. It lies swizzled by 128 bytes. Thread t reads
// element 9 t of the box.

// DEFINE: %{t} = --block 32 --shared 2048 --arg hide:x:bf16:864:0:0.25
// DEFINE: %{args} = %{t} --arg map:x:72x12:144:64x8:128 --arg out:y:f32:32
// RUN: moe-simt-kernel %s %{args} | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order shuffled:5 --early-copies | FileCheck %s
// Element 9 t is column 9 t mod 64 of row 9 t / 64; x is a quarter of its index, rounded.
// CHECK: y: 98 100 102.5 105 107 0 0 0 118 120 122.5 125 0 0 0 136 138 140 142 0 0 0 154 156 158 160 0 0 0 171 174 176

// Fewer bytes than arrive, or more.
// RUN: sed 's/constant(1024 : i32)/constant(1008 : i32)/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=BYTES
// BYTES: deadlock: {{.*}}phase 0 of the mbarrier at offset 1024: 0 arrivals and -16 bytes are missing
// RUN: sed 's/constant(1024 : i32)/constant(2048 : i32)/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=MORE-BYTES
// MORE-BYTES: deadlock: {{.*}}0 arrivals and 1024 bytes are missing
// Nobody says how many: the phase is over before the box is there.
// RUN: sed 's/arrive.expect_tx %%full, %%bytes : !llvm.ptr<3>, i32/arrive %%full : !llvm.ptr<3>/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=NO-WAIT
// No wait at all.
// RUN: sed 's/^    nvvm.mbarrier.try_wait.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=NO-WAIT
// NO-WAIT: race: {{read of shared memory at offset [0-9]+, which a copy in flight of thread 0|write of shared memory at offset [0-9]+, which thread [0-9]+ .*read}}
// The wait is missing although the box is there in time.
// RUN: sed 's/^    nvvm.mbarrier.try_wait.*//' %s | not moe-simt-kernel - %{args} --early-copies 2>&1 | FileCheck %s --check-prefix=EARLY
// EARLY: race: {{(read|write)}} of shared memory at offset {{[0-9]+}}, which thread {{.*}}, without a barrier between them
// The TMA unit must be told that the barrier was initialised.
// RUN: sed 's/^    nvvm.fence.mbarrier.init//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=FENCE
// FENCE: expected fence.mbarrier.init between the initialisation of the mbarrier at offset 1024 and this copy, but got none
// The kernel and the map differ in the swizzle: other numbers.
// RUN: moe-simt-kernel %s %{t} --arg map:x:72x12:144:64x8:0 --arg out:y:f32:32 | FileCheck %s --check-prefix=SWIZZLE
// SWIZZLE: y: 98
// SWIZZLE-NOT: 118 120 122.5 125 0 0 0 136
// The box is not where the pattern can begin; what the driver and the unit refuse.
// RUN: sed 's/shared\[0\]/shared[64]/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=PLACE
// PLACE: expected a box at a multiple of 128 bytes of shared memory, but got offset 64
// RUN: not moe-simt-kernel %s %{t} --arg map:x:72x12:72:64x8:128 --arg out:y:f32:32 2>&1 | FileCheck %s --check-prefix=STRIDE
// STRIDE: expected a tensor map with strides that are multiples of 16 below 2^40, but got 72
// RUN: not moe-simt-kernel %s %{t} --arg map:x:72x12:144:64x8:64 --arg out:y:f32:32 2>&1 | FileCheck %s --check-prefix=INNER
// INNER: expected a tensor map with inner rows within the swizzle, but got 128
// RUN: not moe-simt-kernel %s %{t} --arg map:x:72x12:144:4x8:0 --arg out:y:f32:32 2>&1 | FileCheck %s --check-prefix=ROWS
// ROWS: expected a tensor map with inner rows of a multiple of 16 bytes, but got 8
// RUN: not moe-simt-kernel %s %{t} --arg map:x:72x2x6:144x288:64x8x1:128 --arg out:y:f32:32 2>&1 | FileCheck %s --check-prefix=RANK
// RANK: expected 3 coordinates, as the tensor map has dimensions, but got 2
// RUN: not moe-simt-kernel %s %{t} --arg map:x:72x14:144:64x8:128 --arg out:y:f32:32 2>&1 | FileCheck %s --check-prefix=BOUNDS
// BOUNDS: expected a read within a buffer, but got 16 bytes at 0x

gpu.module @m {
  llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>
  llvm.func @k(%map: !llvm.ptr {llvm.byval = !llvm.array<128 x i8>, llvm.align = 64 : i64, nvvm.grid_constant}, %y: !llvm.ptr<1>) attributes {gpu.kernel, nvvm.kernel} {
    %c0 = llvm.mlir.constant(0 : i32) : i32
    %c1 = llvm.mlir.constant(1 : i32) : i32
    %c3 = llvm.mlir.constant(3 : i32) : i32
    %c5 = llvm.mlir.constant(5 : i32) : i32
    %c9 = llvm.mlir.constant(9 : i32) : i32
    %c32 = llvm.mlir.constant(32 : i32) : i32
    %pattern = llvm.mlir.constant(112 : i32) : i32
    %bytes = llvm.mlir.constant(1024 : i32) : i32
    %ticks = llvm.mlir.constant(1000 : i32) : i32
    %shared = llvm.mlir.addressof @shared : !llvm.ptr<3>
    %box = llvm.getelementptr %shared[0] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %full = llvm.getelementptr %shared[1024] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %tid = nvvm.read.ptx.sreg.tid.x : i32
    %first = llvm.icmp "eq" %tid, %c0 : i32
    llvm.cond_br %first, ^init, ^start
  ^init:
    nvvm.mbarrier.init %full, %c1 : !llvm.ptr<3>, i32
    nvvm.fence.mbarrier.init
    llvm.br ^start
  ^start:
    nvvm.barrier
    llvm.cond_br %first, ^order, ^wait
  ^order:
    nvvm.mbarrier.arrive.expect_tx %full, %bytes : !llvm.ptr<3>, i32
    %to = llvm.addrspacecast %box : !llvm.ptr<3> to !llvm.ptr<7>
    nvvm.cp.async.bulk.tensor.shared.cluster.global %to, %map, %full, box [%c32, %c5] : !llvm.ptr<7>, !llvm.ptr
    llvm.br ^wait
  ^wait:
    nvvm.mbarrier.try_wait.parity %full, %c0, %ticks : !llvm.ptr<3>, i32, i32
    %element = llvm.mul %tid, %c9 : i32
    %offset = llvm.shl %element, %c1 : i32
    %row = llvm.lshr %offset, %c3 : i32
    %turn = llvm.and %row, %pattern : i32
    %swizzled = llvm.xor %offset, %turn : i32
    %at = llvm.getelementptr %box[%swizzled] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i8
    %half = llvm.load %at : !llvm.ptr<3> -> bf16
    %value = llvm.fpext %half : bf16 to f32
    %out = llvm.getelementptr %y[%tid] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, f32
    llvm.store %value, %out : f32, !llvm.ptr<1>
    llvm.return
  }
}
