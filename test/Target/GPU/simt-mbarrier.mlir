// Two warps hand values over through shared memory: warp 0 fills the place, warp 1 empties it, three
// times. `full` is passed by 32 arrivals, `empty` by 32 of the other warp.

// DEFINE: %{args} = --block 64 --shared 256 --arg in:x:f32:96:1 --arg out:y:f32:96
// RUN: moe-simt-kernel %s %{args} | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order reverse | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order shuffled:1 | FileCheck %s
// CHECK: y: 10 20 30 40
// CHECK-SAME: 950 960{{$}}

// Nobody waits until the place is empty: warp 0 writes where warp 1 may still read.
// RUN: sed 's/.*EMPTY-WAIT$//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=NO-EMPTY
// NO-EMPTY: race: {{read|write}} of shared memory at offset {{[0-9]+}}, which thread {{.*}}, without a barrier between them
// Nobody waits until it is full.
// RUN: sed 's/.*FULL-WAIT$//' %s | not moe-simt-kernel - %{args} --order reverse 2>&1 | FileCheck %s --check-prefix=NO-FULL
// NO-FULL: race: {{read|write}} of shared memory at offset
// The phase never turns: the second round waits for ever, or goes past.
// RUN: sed 's/.*TURN$/%%parity = llvm.mlir.constant(0 : i32) : i32/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=PHASE
// PHASE: {{deadlock|race}}
// An arrival less than the barrier counts.
// RUN: sed 's/mbarrier.init %%full, %%warp/mbarrier.init %%full, %%more/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=FEW
// FEW: deadlock: from thread 0 {{.*}} wait at {{.*}}nvvm.mbarrier.try_wait.parity #0 (phase 0 of the mbarrier at offset 136: 32 arrivals and 0 bytes are missing)
// FEW-SAME: from thread 32 {{.*}} (phase 0 of the mbarrier at offset 128: 1 arrivals and 0 bytes are missing); 0 of 64 threads have ended
// An arrival more.
// RUN: sed 's/.*EMPTY-ARRIVE$/nvvm.mbarrier.arrive %%empty, %%more : !llvm.ptr<3>/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=MANY
// MANY: expected at most 32 more arrivals in phase 0 of the mbarrier at offset 136, but got 33
// No barrier after the initialisation.
// RUN: sed 's/.*nvvm.barrier$//' %s | not moe-simt-kernel - %{args} --order shuffled:3 2>&1 | FileCheck %s --check-prefix=INIT
// INIT: {{expected an mbarrier, but got offset 1[0-9]+ of shared memory, where none was initialised|race: the mbarrier at offset 1[0-9]+ was initialised by thread 0}}
// A store into an mbarrier.
// RUN: sed 's/llvm.store %%v, %%place/llvm.store %%v, %%full/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=STORE
// STORE: expected the mbarrier at offset 128 to be left alone, but got a write of its bytes

gpu.module @m {
  llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>
  llvm.func @k(%x: !llvm.ptr<1>, %y: !llvm.ptr<1>) attributes {gpu.kernel, nvvm.kernel} {
    %c0 = llvm.mlir.constant(0 : i32) : i32
    %c1 = llvm.mlir.constant(1 : i32) : i32
    %c3 = llvm.mlir.constant(3 : i32) : i32
    %warp = llvm.mlir.constant(32 : i32) : i32
    %more = llvm.mlir.constant(33 : i32) : i32
    %ten = llvm.mlir.constant(10.0 : f32) : f32
    %ticks = llvm.mlir.constant(1000 : i32) : i32
    %shared = llvm.mlir.addressof @shared : !llvm.ptr<3>
    %full = llvm.getelementptr %shared[128] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %empty = llvm.getelementptr %shared[136] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %tid = nvvm.read.ptx.sreg.tid.x : i32
    %lane = llvm.urem %tid, %warp : i32
    %place = llvm.getelementptr %shared[%lane] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, f32
    %first = llvm.icmp "eq" %tid, %c0 : i32
    llvm.cond_br %first, ^init, ^start
  ^init:
    nvvm.mbarrier.init %full, %warp : !llvm.ptr<3>, i32
    nvvm.mbarrier.init %empty, %warp : !llvm.ptr<3>, i32
    llvm.br ^start
  ^start:
    nvvm.barrier
    %producer = llvm.icmp "ult" %tid, %warp : i32
    llvm.cond_br %producer, ^fill(%c0 : i32), ^drain(%c0 : i32)
  ^fill(%i: i32):
    %i_next = llvm.add %i, %c1 : i32
    %even = llvm.and %i, %c1 : i32
    // The first wait is for the phase before the first, which counts as complete.
    %odd = llvm.xor %even, %c1 : i32
    nvvm.mbarrier.try_wait.parity %empty, %odd, %ticks : !llvm.ptr<3>, i32, i32 // EMPTY-WAIT
    %at = llvm.mul %i, %warp : i32
    %index = llvm.add %at, %lane : i32
    %from = llvm.getelementptr %x[%index] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, f32
    %v = llvm.load %from : !llvm.ptr<1> -> f32
    llvm.store %v, %place : f32, !llvm.ptr<3>
    nvvm.mbarrier.arrive %full : !llvm.ptr<3>
    %again = llvm.icmp "ult" %i_next, %c3 : i32
    llvm.cond_br %again, ^fill(%i_next : i32), ^end
  ^drain(%j: i32):
    %j_next = llvm.add %j, %c1 : i32
    %parity = llvm.and %j, %c1 : i32 // TURN
    nvvm.mbarrier.try_wait.parity %full, %parity, %ticks : !llvm.ptr<3>, i32, i32 // FULL-WAIT
    %w = llvm.load %place : !llvm.ptr<3> -> f32
    nvvm.mbarrier.arrive %empty : !llvm.ptr<3> // EMPTY-ARRIVE
    %product = llvm.fmul %w, %ten : f32
    %to_at = llvm.mul %j, %warp : i32
    %to_index = llvm.add %to_at, %lane : i32
    %to = llvm.getelementptr %y[%to_index] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, f32
    llvm.store %product, %to : f32, !llvm.ptr<1>
    %more_to_do = llvm.icmp "ult" %j_next, %c3 : i32
    llvm.cond_br %more_to_do, ^drain(%j_next : i32), ^end
  ^end:
    llvm.return
  }
}
