//===- Passes.td - passes of the CPU target ----------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_PASSES
#define MOE_TARGET_CPU_PASSES

include "mlir/Pass/PassBase.td"

def MoEAttachTarget : Pass<"moe-attach-target", "::mlir::ModuleOp"> {
  let summary = "List the CPU levels that code is made for";
  let description = [{
    Writes `moe.targets`, an array of `#moe.target`, on the module. Levels that are known but not
    built yet, and unknown names, are errors. A module that has targets already keeps them.
  }];
  let options = [
    ListOption<"levels", "levels", "std::string",
               "CPU levels, for example x86-64-v3,x86-64-v4 (default: every level that is built)">
  ];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
}

def MoECloneVariants : Pass<"moe-clone-variants", "::mlir::ModuleOp"> {
  let summary = "Clone every entry per level, type of x and type of y";
  let description = [{
    For every function that a `moe.layer` names, makes one clone per target of `moe.targets`, per
    type of x (f32, bf16) and per type of y (f32, bf16; an entry without y has one), writes
    `moe.target` on it and lists it in the layer's `entries`. The original is erased. x is rounded
    to the layer's compute type when read, y is rounded once when written.

    At a level with products of bf16 (`avx512-bf16`) a function whose compute type and weights are
    bf16 also rounds the rows between its matmuls to bf16: their tensors become bf16. A function
    without such a product (f32 compute, f32 weights, or a router alone) has no code of its own at
    that level: its entries name the clones of `x86-64-v4`.
  }];
  let options = [
    ListOption<"types", "types", "std::string",
               "element types of x and y to make clones for (default: f32,bf16)">
  ];
  let statistics = [Statistic<"numClones", "clones", "Number of functions made">];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
}

def MoESelectStrategy : Pass<"moe-select-strategy", "::mlir::ModuleOp"> {
  let summary = "Choose the schedule of every matmul and write it down";
  let description = [{
    Writes `strategy = #moe.strategy<...>` on every `moe.grouped_matmul`, `moe.router` and
    `moe.route_dispatch` of functions with a `moe.target`: the one that takes least by the formulas of
    moe/Target/CPU/CostModel.h. Deterministic: it depends on the level, the shape and the constants of
    a core alone, which are options; 0 is what the level assumes. Later passes obey. `overrides`
    changes single fields; the result is verified, so an illegal strategy is an error and never a
    slower kernel.

    ```json
    {"f0_v4_bf16_bf16": {"grouped_matmul.0": {"rows": 12, "prefetch": 512},
                         "router": {"rows": 8}},
     "*": {"*": {"chunk_rows": 128}}}
    ```
    The outer key is a function's name or a pattern with `*`, the inner one `router`,
    `grouped_matmul.<i>` (i-th of the function) or a pattern. Patterns apply from the shortest,
    then the name itself. Fields: rows, panels, order ("b_first" | "a_first"), prefetch, ahead,
    k_block, hint ("near" | "stream"), defer, chunk_rows, panels_per_task, sum_rows, k_chunk. The
    product is not one of them: rows and weights of bf16
    at a level with such products are multiplied as bf16 pairs in every variant, a router never is.
  }];
  let options = [
    Option<"overrides", "overrides", "std::string", /*default=*/"\"\"",
           "JSON text of changed fields">,
    Option<"overridesFile", "overrides-file", "std::string", /*default=*/"\"\"",
           "file with that JSON text">,
    Option<"l1Bytes", "l1-bytes", "int64_t", /*default=*/"0", "bytes of a core's L1 cache">,
    Option<"l2Bytes", "l2-bytes", "int64_t", /*default=*/"0", "bytes of a core's L2 cache">,
    Option<"read", "read", "int64_t", /*default=*/"0", "bytes/s that a core reads from memory">,
    Option<"fma256", "fma-256", "int64_t", /*default=*/"0", "FLOP/s of a core by 256-bit FMA">,
    Option<"fma512", "fma-512", "int64_t", /*default=*/"0", "FLOP/s of a core by 512-bit FMA">,
    Option<"dot", "dot", "int64_t", /*default=*/"0", "FLOP/s of a core by vdpbf16ps">,
    Option<"tile", "tile", "int64_t", /*default=*/"0", "FLOP/s of a core by tdpbf16ps">
  ];
  let dependentDialects = ["::mlir::moe::MoEDialect"];
}

def MoEBufferize : Pass<"moe-bufferize", "::mlir::ModuleOp"> {
  let summary = "Turn entries on tensors into entries on memrefs with out-parameters";
  let description = [{
    Rewrites the boundary of every function with a `moe.target`: tensor arguments become memrefs
    (x, y and logits with a dynamic row stride, everything else compact), results disappear because
    each is one of the destination arguments. Then runs one-shot bufferization.
  }];
  let dependentDialects = ["::mlir::bufferization::BufferizationDialect",
                           "::mlir::memref::MemRefDialect"];
}

def MoECPUTileTasks : Pass<"moe-cpu-tile-tasks", "::mlir::ModuleOp"> {
  let summary = "Turn an entry into stages of tasks";
  let description = [{
    Rewrites every bufferized function with a `moe.target` into `moe.stage` operations whose bodies
    claim tasks from a counter, with loops over row blocks and weight panels around the task-level
    operations, as the strategies say. The counting sort and the list of row chunks become scalar
    loops in the tail of the stage that knows the expert ids.
  }];
  let dependentDialects = ["::mlir::arith::ArithDialect", "::mlir::memref::MemRefDialect",
                           "::mlir::moe::MoEDialect", "::mlir::scf::SCFDialect",
                           "::mlir::vector::VectorDialect"];
}

def MoECPUEmitKernels : Pass<"moe-cpu-emit-kernels", "::mlir::ModuleOp"> {
  let summary = "Replace task operations by vector kernels";
  let description = [{
    Emits every micro-kernel that a `#moe.ukernel` asks for, one per exact number of rows, as a
    private function in vector form, and replaces `moe.gemm_tile`, `moe.pack_rows`,
    `moe.select_experts`, `moe.begin_panels` and `moe.end_panels` by calls. Kernels with equal
    specifications are one function. math.exp, math.erf and math.tanh on vectors become the
    polynomials of the kernels here, so that an activation gives the same bits fused or not.
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect", "::mlir::arith::ArithDialect",
                           "::mlir::func::FuncDialect", "::mlir::memref::MemRefDialect",
                           "::mlir::scf::SCFDialect", "::mlir::vector::VectorDialect"];
}

def MoECPUPlanWorkspace : Pass<"moe-cpu-plan-workspace", "::mlir::ModuleOp"> {
  let summary = "Give every scratch an offset of one workspace";
  let description = [{
    Replaces every `memref.alloc` of a function with a `moe.target` by a view of a new argument
    `moe.arg = "workspace"`: allocations outside of stages are shared by all lanes and stages,
    those inside a stage exist once per lane (their memory is used again by the next stage). All
    offsets are multiples of 64 bytes. Adds `<function>_workspace_bytes(tokens, slots, lanes)`,
    which is monotone in tokens, in tokens · slots and in lanes, and names it in `moe.workspace`.
  }];
  let dependentDialects = ["::mlir::arith::ArithDialect", "::mlir::func::FuncDialect",
                           "::mlir::memref::MemRefDialect"];
}

def MoECPUOutlineStages : Pass<"moe-cpu-outline-stages", "::mlir::ModuleOp"> {
  let summary = "Make one function per stage that reads its arguments from the frame";
  let description = [{
    Every `moe.stage` of a function `@f` becomes `@f_stage<i>(frame, lane, lanes)` with the C
    interface of moec/module.h; what it uses from outside is computed again inside. `moe.claim`
    becomes an atomic addition to a counter of the frame; a tail runs on the lane that finishes the
    body last. `@f` becomes a `moe.code` that names its stages and its workspace function.
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect", "::mlir::arith::ArithDialect",
                           "::mlir::func::FuncDialect", "::mlir::scf::SCFDialect"];
}

def MoECPUConvertToLLVM : Pass<"moe-cpu-convert-to-llvm", "::mlir::ModuleOp"> {
  let summary = "Convert outlined stages and kernels to the LLVM dialect";
  let description = [{
    The conversions of scf, memref, affine, arith, index, vector, cf and func in one walk, which
    takes a quarter of the time that they take one after the other. Views are resolved first, in the
    functions that have any (stages; kernels work on pointers). Operations of the moe dialect at the
    top of the module are left alone; anything else that remains is an error.
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect", "::mlir::affine::AffineDialect",
                           "::mlir::arith::ArithDialect", "::mlir::cf::ControlFlowDialect",
                           "::mlir::memref::MemRefDialect", "::mlir::vector::VectorDialect"];
}

#endif // MOE_TARGET_CPU_PASSES
