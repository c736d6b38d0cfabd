//===- Passes.td - passes of the GPU target ----------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_GPU_PASSES
#define MOE_TARGET_GPU_PASSES

include "mlir/Pass/PassBase.td"

def MoEGPUAttachTarget : Pass<"moe-gpu-attach-target", "::mlir::ModuleOp"> {
  let summary = "Mark every entry for GPU architectures";
  let description = [{
    Lists `#moe.target<cuda, level = ...>` by rising level in `moe.targets` of the module, for
    `moe-clone-variants`, and writes `as bf16` on every matmul whose rows are not rounded yet:
    tensor cores read bf16, so the rows between the matmuls are rounded too, which most CPU levels
    do not do. Where there is one level, every function with a `moe.entry` gets it as `moe.target`
    at once. Functions whose compute type is not bf16, unknown architectures and those that are not
    built yet are errors.
  }];
  let options = [
    ListOption<"levels", "levels", "std::string", "GPU architectures; none: sm_80">
  ];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
}

def MoEGPUSelectStrategy : Pass<"moe-gpu-select-strategy", "::mlir::ModuleOp"> {
  let summary = "Choose the tiles of every matmul on a GPU and write them down";
  let description = [{
    Writes `gpu_tiles = [#moe.gpu_tile<...>, ...]` on every `moe.grouped_matmul` of functions with
    a `cuda` target: for each range of T·K the tile that the cost model finds fastest, by rising
    `up_to`, the last without a limit. A matmul that has `gpu_tiles` keeps them. The gate of a shared
    expert has none: its kernel is one of rows, without tiles. Deterministic.
    `overrides` is JSON, the `strategy` section of a manifest: functions, of matmuls, of
    `gpu_tiles` (a list of attributes as text) and `gpu_combine` (`ordered` or `atomic`).
  }];
  let options = [
    Option<"overrides", "overrides", "std::string", /*default=*/"\"\"",
           "strategies that replace those chosen, as JSON">
  ];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
}

def MoEGPUEmitKernels : Pass<"moe-gpu-emit-kernels", "::mlir::ModuleOp"> {
  let summary = "Replace an entry by GPU kernels and the function that launches them";
  let description = [{
    A function with a `cuda` target, bufferized and fused, becomes:

    * `gpu.module @<function>_kernels` with one kernel per step: `stage` or `logits` (x rounded to
      bf16 and padded; partial sums of the logits), `select` (sums, scores, top-k), `sort` (stable
      counting sort), `weigh` (rows times weights, where they are applied to the input), `up_<i>`
      and `down_<i>` (grouped matmul, one per tile), `gate`, `shared_up_<i>` and `shared_down_<i>`
      (shared expert), `combine`;
    * `func.func @<function>(%frame: !llvm.ptr)`, which reads the call from a moec_frame and
      launches them. Grids follow from tokens and slots alone; nothing is read back.
    * `func.func @<function>_workspace_bytes(tokens, slots, lanes)`.

    `gpu_combine = "atomic"` on the matmul with combine adds rows up where they are made, in
    whatever order blocks come: no buffer of rows, and other bits from run to run. Without it
    (`"ordered"`) a token's rows are added by rising expert.

    What has no GPU code is refused by name, attributes that this pass does not know included.
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect", "::mlir::NVVM::NVVMDialect",
                           "::mlir::arith::ArithDialect", "::mlir::func::FuncDialect",
                           "::mlir::gpu::GPUDialect", "::mlir::scf::SCFDialect",
                           "::mlir::vector::VectorDialect"];
}

def MoEGPUEmitCallKernels : Pass<"moe-gpu-emit-call-kernels", "::mlir::ModuleOp"> {
  let summary = "Add the kernels that read and write the tensors of a call";
  let description = [{
    For every level that has kernels, adds `gpu.module @call_kernels_<level>` with what the runtime
    launches around the entries of every layer: `call_in` (ids and weights of the caller, of any type and
    stride, become compact i32 and f32; foreign ids are reported), `call_out` (the reverse) and
    `call_counts` (rows per expert).
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect", "::mlir::NVVM::NVVMDialect",
                           "::mlir::arith::ArithDialect", "::mlir::gpu::GPUDialect",
                           "::mlir::scf::SCFDialect"];
}

def MoEGPUMergeKernels : Pass<"moe-gpu-merge-kernels", "::mlir::ModuleOp"> {
  let summary = "Put the kernels of all entries of a level into one gpu.module";
  let description = [{
    `gpu.module @kernels_<level>` gets every kernel of its level under the name `<entry>_<kernel>`;
    kernels that are equal but for their name are kept once, as most matmuls of entries that differ
    by the types of x and y are. Launches follow.
  }];
  let dependentDialects = ["::mlir::gpu::GPUDialect"];
}

def MoEGPULowerHost : Pass<"moe-gpu-lower-host", "::mlir::ModuleOp"> {
  let summary = "Make launches calls of a launch interface";
  let description = [{
    A function with a `cuda` target becomes the one stage of its entry, `<function>_stage0`, a
    moec_stage_fn. Its `gpu.launch_func` become calls through the moec_gpu_launcher of the frame
    (include/moec/module.h): the kernel's number (in the order of the gpu.modules), its name, grid,
    block, shared memory and the addresses of its arguments. `moe.gpu_kernels` on the module lists
    the kernels of merged gpu.modules.
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect"];
}

def MoEGPUToSimt : Pass<"moe-gpu-to-simt", "::mlir::ModuleOp"> {
  let summary = "Make kernels run on the SIMT executor";
  let description = [{
    For tests without a GPU. Every `gpu.module` is dissolved into functions for the host in which
    NVVM operations, and accesses of shared and global memory, are calls of the executor
    (include/moe/Target/GPU/Simt.h). For each kernel a function `<kernel>_simt(void **arguments)`
    is added. Runs after `moe-gpu-lower-kernels`; an operation that the executor does not know is
    an error.
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect"];
}

#endif // MOE_TARGET_GPU_PASSES
