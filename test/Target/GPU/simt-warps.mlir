// Two warps copy 16 bytes a lane, each with an mbarrier that follows its copies; one lane that is
// elected counts; a barrier of two warps of the four; registers move from two warps to the others.

// DEFINE: %{args} = --block 256 --shared 2048 --arg in:x:i32:256 --arg out:y:i32:65
// RUN: moe-simt-kernel %s %{args} | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order reverse | FileCheck %s
// RUN: moe-simt-kernel %s %{args} --order shuffled:9 --early-copies | FileCheck %s
// Lane i reads what its neighbour copied: 4 (i + 1) mod 128 and further.
// CHECK: y: 4 8 12 16
// CHECK-SAME: 252 0 12{{$}}

// RUN: sed 's/^    nvvm.mbarrier.try_wait.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=WAIT
// WAIT: race: {{read of shared memory at offset [0-9]+, which a copy in flight of thread|write of shared memory at offset}}
// RUN: sed 's/^    nvvm.cp.async.mbarrier.arrive.*//' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=ARRIVE
// ARRIVE: deadlock: {{.*}}nvvm.mbarrier.try_wait.parity #0 (phase 0 of the mbarrier at offset 1024: 64 arrivals and 0 bytes are missing)
// An arrival that only counts what it added never completes the others.
// RUN: sed 's/noinc = true/noinc = false/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=ARRIVE
// RUN: sed 's/number_of_threads = %%c64/number_of_threads = %%c96/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=FEW
// FEW: expected 96 threads at the barrier, but got {{.*}} that have ended
// RUN: sed 's/id = %%c1 number_of_threads = %%c64/id = %%tid number_of_threads = %%c64/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=NUMBER
// NUMBER: {{expected a barrier from 0 to 15, but got|deadlock|ended}}
// RUN: sed 's/setmaxregister increase 168/setmaxregister increase 240/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=BUDGET
// BUDGET: deadlock: from thread {{[0-9]+ .*}}nvvm.setmaxregister
// RUN: sed 's/setmaxregister increase 168/setmaxregister increase 164/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=STEPS
// STEPS: {{expected 24 to 256 registers in steps of 8|attribute|new register size must be multiple of 8}}
// RUN: sed 's/nvvm.maxnreg = 128/other/' %s | not moe-simt-kernel - %{args} 2>&1 | FileCheck %s --check-prefix=LAUNCH
// LAUNCH: expected a kernel with nvvm.maxnreg, but got none
// Only one warp of the two synchronises before it reads what the elected lane wrote.
// RUN: sed 's/^    nvvm.barrier id.*//' %s | not moe-simt-kernel - %{args} --order shuffled:4 2>&1 | FileCheck %s --check-prefix=RACE
// RACE: race: {{read|write}} of shared memory at offset 1032

gpu.module @m {
  llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 1024 : i64} : !llvm.array<0 x i8>
  llvm.func @k(%x: !llvm.ptr<1>, %y: !llvm.ptr<1>) attributes {gpu.kernel, nvvm.kernel, nvvm.maxnreg = 128} {
    %c0 = llvm.mlir.constant(0 : i32) : i32
    %c1 = llvm.mlir.constant(1 : i32) : i32
    %c4 = llvm.mlir.constant(4 : i32) : i32
    %c12 = llvm.mlir.constant(12 : i32) : i32
    %c32 = llvm.mlir.constant(32 : i32) : i32
    %c63 = llvm.mlir.constant(63 : i32) : i32
    %c64 = llvm.mlir.constant(64 : i32) : i32
    %c96 = llvm.mlir.constant(96 : i32) : i32
    %c128 = llvm.mlir.constant(128 : i32) : i32
    %ticks = llvm.mlir.constant(1000 : i32) : i32
    %shared = llvm.mlir.addressof @shared : !llvm.ptr<3>
    %full = llvm.getelementptr %shared[1024] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %note = llvm.getelementptr %shared[1032] : (!llvm.ptr<3>) -> !llvm.ptr<3>, i8
    %tid = nvvm.read.ptx.sreg.tid.x : i32
    %first = llvm.icmp "eq" %tid, %c0 : i32
    llvm.cond_br %first, ^init, ^start
  ^init:
    nvvm.mbarrier.init %full, %c64 : !llvm.ptr<3>, i32
    llvm.br ^start
  ^start:
    nvvm.barrier
    %low = llvm.icmp "ult" %tid, %c128 : i32
    llvm.cond_br %low, ^few, ^many
  ^many:
    nvvm.setmaxregister increase 168
    llvm.br ^end
  ^few:
    nvvm.setmaxregister decrease 88
    %works = llvm.icmp "ult" %tid, %c64 : i32
    llvm.cond_br %works, ^copy, ^end
  ^copy:
    %index = llvm.mul %tid, %c4 : i32
    %from = llvm.getelementptr %x[%index] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, i32
    %to = llvm.getelementptr %shared[%index] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i32
    nvvm.cp.async.shared.global %to, %from, 16, cache = cg : !llvm.ptr<3>, !llvm.ptr<1>
    nvvm.cp.async.mbarrier.arrive %full {noinc = true} : !llvm.ptr<3>
    nvvm.mbarrier.try_wait.parity %full, %c0, %ticks : !llvm.ptr<3>, i32, i32
    %next = llvm.add %tid, %c1 : i32
    %turn = llvm.and %next, %c63 : i32
    %neighbour = llvm.mul %turn, %c4 : i32
    %there = llvm.getelementptr %shared[%neighbour] : (!llvm.ptr<3>, i32) -> !llvm.ptr<3>, i32
    %v = llvm.load %there : !llvm.ptr<3> -> i32
    %out = llvm.getelementptr %y[%tid] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, i32
    llvm.store %v, %out : i32, !llvm.ptr<1>
    %elected = nvvm.elect.sync -> i1
    %low_warp = llvm.icmp "ult" %tid, %c32 : i32
    %writes = llvm.and %elected, %low_warp : i1
    llvm.cond_br %writes, ^write, ^meet
  ^write:
    llvm.store %c12, %note : i32, !llvm.ptr<3>
    llvm.br ^meet
  ^meet:
    nvvm.barrier id = %c1 number_of_threads = %c64
    %last = llvm.icmp "eq" %tid, %c63 : i32
    llvm.cond_br %last, ^tell, ^end
  ^tell:
    %w = llvm.load %note : !llvm.ptr<3> -> i32
    %end_of_y = llvm.getelementptr %y[64] : (!llvm.ptr<1>) -> !llvm.ptr<1>, i32
    llvm.store %w, %end_of_y : i32, !llvm.ptr<1>
    llvm.br ^end
  ^end:
    llvm.return
  }
}
