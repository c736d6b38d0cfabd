//===- ModuleTable.h - the one exported symbol of a library -----*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// `CodeTable` is the plain description of everything in `<name>_moec_module` (moec/module.h). It is
// derived from the `moe.layer` and `moe.weight` symbols, which stay in the IR to the end, and so is
// the same wherever the pipeline was entered.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_TARGET_CPU_MODULETABLE_H
#define MOE_TARGET_CPU_MODULETABLE_H

#include "llvm/ADT/StringRef.h"
#include "llvm/Support/Error.h"

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace llvm {
class Module;
} // namespace llvm

namespace mlir {
class ModuleOp;
namespace moe {

/// One packed tensor: moec_weight_desc.
struct WeightEntry {
  std::string role;                                   ///< "router", "gate_up", "down"
  std::string format;                                 ///< "f32", "bf16"
  std::string layout;                                 ///< "panel32-1"
  int64_t experts = 0, parts = 0, rows = 0, cols = 0; ///< [E][parts][Nout][Kin]
  uint64_t bytes = 0;                                 ///< packed size, a multiple of 4096
};

/// One compiled entry: moec_entry.
struct CodeEntry {
  int32_t kind = 0;                ///< MOEC_ENTRY_...
  int32_t xType = 0, yType = 0;    ///< MOEC_DT_...
  std::vector<std::string> stages; ///< symbols of the stage functions, in the order of running
  std::vector<std::string> labels; ///< of the stages, for people: "route", "up", "down"
  std::string workspaceBytes;      ///< symbol of uint64_t (int64_t tokens, slots, lanes)
};

/// All entries of one level: moec_level_code.
struct LevelCode {
  std::string level;
  int32_t rank = 0;
  std::vector<CodeEntry> entries;
};

/// Code shared by equal layers: moec_layer_code.
struct LayerCode {
  int32_t kind = 0;    ///< 0 MoE, 1 dense FFN
  int32_t compute = 0; ///< MOEC_DT_F32 or MOEC_DT_BF16
  int64_t H = 0, F = 0, E = 0, K = 0, S = 0, W = 0;
  uint32_t needs = 0;
  uint64_t activeFlops = 0; ///< per token
  std::vector<WeightEntry> weights;
  std::vector<LevelCode> levels; ///< by rising rank
};

/// One layer of the model: moec_layer_desc.
struct LayerEntry {
  std::string name; ///< "model.layers.3.mlp"
  std::string file; ///< "model.layers.3.mlp.safetensors"
  int32_t index = 0;
  unsigned code = 0;            ///< index into CodeTable::codes
  std::array<uint8_t, 32> id{}; ///< BLAKE3 of the layer's attributes, formats and layouts
};

/// Kernels of a GPU in one form: moec_gpu_image.
struct GPUImage {
  int32_t kind = 0;  ///< MOEC_IMAGE_...
  int32_t arch = 0;  ///< 80
  std::string name;  ///< "sm_90a", "compute_80"
  std::string bytes; ///< PTX ends in a zero byte
};

/// One kernel of the images: moec_gpu_kernel.
struct GPUKernel {
  std::string name;
  uint32_t threads = 0, sharedBytes = 0;
};

/// The images and kernels of one level: moec_gpu_level. Those of a level follow one another.
struct GPULevel {
  std::string level; ///< "sm_90a"
  int32_t rank = 0;
  uint32_t needs = 0; ///< MOEC_GPU_...
  int32_t firstImage = 0, imageCount = 0, firstKernel = 0, kernelCount = 0;
};

/// Everything in `<name>_moec_module`.
struct CodeTable {
  std::string name;           ///< C identifier, beginning of the exported symbol
  std::string version;        ///< moec's version
  uint32_t abi = 0x00010001u; ///< the least that a runtime has to know
  std::vector<LayerCode> codes;
  std::vector<LayerEntry> layers;
  std::vector<GPUImage> images; ///< empty: code for the CPU
  std::vector<GPUKernel> kernels;
  std::vector<GPULevel> gpuLevels; ///< by rising rank

  /// "<name>_moec_module".
  std::string symbol() const { return name + "_moec_module"; }
};

/// Reads the table from the symbols of `module`. Entries are filled in only where the outlined
/// functions exist (after phase `outline`); `needCode` makes their absence an error. `name` is made
/// a C identifier by replacing every other character with `_`.
llvm::Expected<CodeTable> buildCodeTable(ModuleOp module, llvm::StringRef name,
                                         llvm::StringRef version, bool needCode = true);

/// Adds the constant `table.symbol()` of type moec_module to `module` and gives every other
/// definition internal linkage, so that it is the only exported symbol. Fails where a function that
/// the table names is missing.
llvm::Error emitModuleTable(llvm::Module &module, const CodeTable &table);

} // namespace moe
} // namespace mlir

#endif // MOE_TARGET_CPU_MODULETABLE_H
