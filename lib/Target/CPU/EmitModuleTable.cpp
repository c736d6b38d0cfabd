//===- EmitModuleTable.cpp - the one exported symbol of a library ---------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Support/Error.h"
#include "moe/Target/CPU/ModuleTable.h"

#include "moec/module.h"
#include "llvm/ADT/StringMap.h"
#include "llvm/IR/Constants.h"
#include "llvm/IR/DerivedTypes.h"
#include "llvm/IR/Module.h"

using namespace mlir::moe;
using moec::ErrorCode;
using moec::makeError;

namespace {

/// Builds constants whose fields follow moec/module.h one by one. All structs have natural
/// alignment and explicit padding, so LLVM lays them out as C does; the sizes are checked.
class TableBuilder {
public:
  explicit TableBuilder(llvm::Module &module) : module(module), context(module.getContext()) {}

  llvm::Error build(const CodeTable &table);

private:
  llvm::Constant *i32(int64_t value) {
    return llvm::ConstantInt::get(llvm::Type::getInt32Ty(context), value, true);
  }
  llvm::Constant *i64(uint64_t value) {
    return llvm::ConstantInt::get(llvm::Type::getInt64Ty(context), value);
  }
  llvm::Constant *null() {
    return llvm::ConstantPointerNull::get(llvm::PointerType::get(context, 0));
  }
  llvm::Constant *text(llvm::StringRef value) {
    llvm::Constant *&global = strings[value];
    if (!global)
      global = global_(llvm::ConstantDataArray::getString(context, value), "moec.text");
    return global;
  }
  llvm::GlobalVariable *global_(llvm::Constant *value, llvm::StringRef name) {
    auto *result = new llvm::GlobalVariable(module, value->getType(), /*isConstant=*/true,
                                            llvm::GlobalValue::PrivateLinkage, value, name);
    result->setUnnamedAddr(llvm::GlobalValue::UnnamedAddr::Global);
    return result;
  }
  llvm::Constant *structure(llvm::ArrayRef<llvm::Constant *> fields, uint64_t size) {
    llvm::Constant *result = llvm::ConstantStruct::getAnon(context, fields);
    if (module.getDataLayout().getTypeAllocSize(result->getType()) != size)
      mismatch = true;
    return result;
  }
  /// A private array; null where there are no elements.
  llvm::Constant *array(llvm::ArrayRef<llvm::Constant *> elements, llvm::StringRef name) {
    if (elements.empty())
      return null();
    auto *type = llvm::ArrayType::get(elements[0]->getType(), elements.size());
    return global_(llvm::ConstantArray::get(type, elements), name);
  }
  llvm::Expected<llvm::Constant *> function(llvm::StringRef name) {
    llvm::Function *result = module.getFunction(name);
    if (!result || result->isDeclaration())
      return makeError(ErrorCode::INTERNAL, "module table", "a function `" + name + "`", "none");
    return result;
  }
  llvm::Expected<llvm::Constant *> entry(const CodeEntry &entry);
  llvm::Expected<llvm::Constant *> code(const LayerCode &code);

  llvm::Module &module;
  llvm::LLVMContext &context;
  llvm::StringMap<llvm::Constant *> strings;
  bool mismatch = false;
};

} // namespace

llvm::Expected<llvm::Constant *> TableBuilder::entry(const CodeEntry &entry) {
  if (entry.stages.size() > MOEC_MAX_STAGES)
    return makeError(ErrorCode::INTERNAL, "module table",
                     "at most " + llvm::Twine(MOEC_MAX_STAGES) + " stages",
                     llvm::Twine(entry.stages.size()));
  llvm::SmallVector<llvm::Constant *> stages;
  for (const std::string &name : entry.stages) {
    auto stage = function(name);
    if (!stage)
      return stage.takeError();
    stages.push_back(*stage);
  }
  auto workspace = function(entry.workspaceBytes);
  if (!workspace)
    return workspace.takeError();
  return structure({i32(entry.kind), i32(entry.xType), i32(entry.yType),
                    i32(static_cast<int64_t>(stages.size())), array(stages, "moec.stages"),
                    *workspace},
                   sizeof(moec_entry));
}

llvm::Expected<llvm::Constant *> TableBuilder::code(const LayerCode &code) {
  llvm::SmallVector<llvm::Constant *> weights, levels;
  for (const WeightEntry &w : code.weights)
    weights.push_back(structure({text(w.role), text(w.format), text(w.layout), i64(w.experts),
                                 i64(w.parts), i64(w.rows), i64(w.cols), i64(w.bytes)},
                                sizeof(moec_weight_desc)));
  for (const LevelCode &level : code.levels) {
    llvm::SmallVector<llvm::Constant *> entries;
    for (const CodeEntry &e : level.entries) {
      auto constant = entry(e);
      if (!constant)
        return constant.takeError();
      entries.push_back(*constant);
    }
    levels.push_back(
        structure({text(level.level), i32(level.rank), i32(static_cast<int64_t>(entries.size())),
                   array(entries, "moec.entries")},
                  sizeof(moec_level_code)));
  }
  return structure({i32(code.kind), i32(code.compute), i64(code.H), i64(code.F), i64(code.E),
                    i64(code.K), i64(code.S), i64(code.W), i32(code.needs), i32(0),
                    i64(code.activeFlops), i32(static_cast<int64_t>(weights.size())),
                    i32(static_cast<int64_t>(levels.size())), array(weights, "moec.weights"),
                    array(levels, "moec.levels")},
                   sizeof(moec_layer_code));
}

llvm::Error TableBuilder::build(const CodeTable &table) {
  llvm::SmallVector<llvm::Constant *> codes, layers;
  for (const LayerCode &c : table.codes) {
    auto constant = code(c);
    if (!constant)
      return constant.takeError();
    codes.push_back(global_(*constant, "moec.code"));
  }
  for (const LayerEntry &layer : table.layers) {
    if (layer.code >= codes.size())
      return makeError(ErrorCode::INTERNAL, "module table", "code for layer `" + layer.name + "`",
                       "none");
    layers.push_back(structure({text(layer.name), text(layer.file), i32(layer.index), i32(0),
                                codes[layer.code], llvm::ConstantDataArray::get(context, layer.id)},
                               sizeof(moec_layer_desc)));
  }
  llvm::SmallVector<llvm::Constant *> images, kernels, levels;
  for (const GPUImage &image : table.images) {
    auto *bytes = llvm::ConstantDataArray::getString(context, image.bytes, /*AddNull=*/false);
    auto *data = global_(bytes, "moec.image");
    data->setAlignment(llvm::Align(8));
    images.push_back(structure({i32(image.kind), i32(image.arch), data, i64(image.bytes.size())},
                               sizeof(moec_gpu_image)));
  }
  for (const GPUKernel &kernel : table.kernels)
    kernels.push_back(structure({text(kernel.name), i32(kernel.threads), i32(kernel.sharedBytes)},
                                sizeof(moec_gpu_kernel)));
  for (const GPULevel &l : table.gpuLevels)
    levels.push_back(structure({text(l.level), i32(l.rank), i32(l.needs), i32(l.firstImage),
                                i32(l.imageCount), i32(l.firstKernel), i32(l.kernelCount)},
                               sizeof(moec_gpu_level)));
  llvm::Constant *root = structure(
      {i64(sizeof(moec_module)), i32(table.abi), i32(0), text(table.name), text(table.version),
       i32(static_cast<int64_t>(layers.size())), i32(0), array(layers, "moec.layers"),
       i32(static_cast<int64_t>(images.size())), i32(static_cast<int64_t>(kernels.size())),
       array(images, "moec.images"), array(kernels, "moec.kernels"),
       i32(static_cast<int64_t>(levels.size())), i32(0), array(levels, "moec.gpu_levels")},
      sizeof(moec_module));
  if (mismatch)
    return makeError(ErrorCode::INTERNAL, "module table", "the struct sizes of moec/module.h",
                     "another layout");
  for (llvm::Function &function : module)
    if (!function.isDeclaration())
      function.setLinkage(llvm::GlobalValue::InternalLinkage);
  new llvm::GlobalVariable(module, root->getType(), /*isConstant=*/true,
                           llvm::GlobalValue::ExternalLinkage, root, table.symbol());
  return llvm::Error::success();
}

llvm::Error mlir::moe::emitModuleTable(llvm::Module &module, const CodeTable &table) {
  return TableBuilder(module).build(table);
}
