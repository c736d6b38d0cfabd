//===- BuildCodeTable.cpp - the module table from moe symbols -------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Support/Error.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/CPU/ModuleTable.h"

#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/SymbolTable.h"
#include "moec.h"
#include "moec/module.h"

using namespace mlir;
using namespace mlir::moe;
using moec::ErrorCode;
using moec::makeError;

static int32_t typeCode(Type type) { return type.isF32() ? MOEC_DT_F32 : MOEC_DT_BF16; }

static std::string cIdentifier(StringRef name) {
  std::string result;
  for (char c : name)
    result += llvm::isAlnum(c) || c == '_' ? c : '_';
  if (result.empty() || llvm::isDigit(result[0]))
    result.insert(result.begin(), '_');
  return result;
}

static WeightEntry describe(WeightOp op) {
  auto type = cast<WeightType>(op.getType());
  WeightEntry entry;
  entry.role = op.getRole().str();
  entry.format = type.getFormat().getFormatName().str();
  entry.layout = type.getLayout().getLayoutName().str();
  entry.experts = type.getExperts();
  entry.parts = type.getParts();
  entry.rows = type.getRows();
  entry.cols = type.getCols();
  entry.bytes = static_cast<uint64_t>(type.packedBytes());
  return entry;
}

/// Multiplications and additions of one token, counted as two: all of a weight that every token
/// uses, K experts of the others.
static uint64_t activeFlops(const LayerCode &code) {
  uint64_t flops = 0;
  for (const WeightEntry &w : code.weights) {
    uint64_t product = 2ull * w.parts * w.rows * w.cols;
    flops += w.experts == 1 ? product : product * static_cast<uint64_t>(code.K);
  }
  return flops;
}

llvm::Expected<CodeTable> mlir::moe::buildCodeTable(ModuleOp module, StringRef name,
                                                    StringRef version, bool needCode) {
  CodeTable table;
  table.name = cIdentifier(name);
  table.version = version.str();
  SymbolTable symbols(module);
  // Layers whose code is the same in every respect share one record.
  llvm::StringMap<unsigned> known;
  for (LayerOp layer : module.getOps<LayerOp>()) {
    std::string key;
    llvm::raw_string_ostream keyText(key);
    LayerCode code;
    code.kind = layer.getKind() == LayerKind::Dense ? 1 : 0;
    code.compute = typeCode(layer.getCompute());
    DimsAttr dims = layer.getDims();
    code.H = dims.getH();
    code.F = dims.getF();
    code.E = dims.getE();
    code.K = dims.getK();
    code.S = dims.getS();
    if (layer.getRouterX())
      code.needs |= MOEC_ROUTER_X;
    keyText << code.kind << layer.getCompute() << dims << code.needs;
    for (auto reference : layer.getWeights().getAsRange<FlatSymbolRefAttr>()) {
      auto weight = symbols.lookup<WeightOp>(reference.getAttr());
      if (!weight)
        return makeError(ErrorCode::INTERNAL, "layer `" + layer.getLayerName() + "`",
                         "a weight `" + reference.getValue() + "`", "none");
      code.weights.push_back(describe(weight));
      keyText << weight.getRole() << weight.getType();
    }
    code.activeFlops = activeFlops(code);
    if (layer.getEntriesAttr())
      keyText << layer.getEntriesAttr();
    else
      keyText << layer.getForwardAttr() << layer.getRouteAttr() << layer.getExpertsAttr();

    auto [place, inserted] = known.try_emplace(keyText.str(), table.codes.size());
    if (inserted) {
      if (needCode && !layer.getEntriesAttr())
        return makeError(ErrorCode::INTERNAL, "layer `" + layer.getLayerName() + "`",
                         "compiled entries", "none", "run the phases up to `outline` first");
      ArrayAttr entries = layer.getEntriesAttr();
      for (Attribute attribute : entries ? entries.getValue() : ArrayRef<Attribute>()) {
        auto entry = cast<EntryAttr>(attribute);
        StringRef function = entry.getFunction().getValue();
        CodeEntry made;
        made.kind = static_cast<int32_t>(entry.getKind());
        made.xType = typeCode(entry.getX());
        made.yType = typeCode(entry.getY());
        if (auto codeOp = symbols.lookup<CodeOp>(function)) {
          made.workspaceBytes = codeOp.getWorkspace().str();
          for (auto name : codeOp.getStages().getAsRange<FlatSymbolRefAttr>()) {
            Operation *stage = symbols.lookup(name.getAttr());
            auto label = stage ? stage->getAttrOfType<StringAttr>("stage") : StringAttr();
            made.labels.push_back(label ? label.getValue().str() : "stage");
            made.stages.push_back(name.getValue().str());
          }
        } else if (needCode) {
          return makeError(ErrorCode::INTERNAL, "layer `" + layer.getLayerName() + "`",
                           "stages of the entry `" + function + "`", "none",
                           "run the phases up to `outline` first");
        }
        int32_t rank = 0;
        if (const CPULevel *level = findCPULevel(entry.getLevel()))
          rank = level->rank;
        else if (StringRef number = entry.getLevel(); // of a GPU: "sm_80"
                 !number.consume_front("sm_") || number.consumeInteger(10, rank))
          return makeError(ErrorCode::TARGET, "entry `" + function + "`", "a known CPU level",
                           "`" + entry.getLevel() + "`");
        auto list = llvm::find_if(code.levels,
                                  [&](const LevelCode &l) { return l.level == entry.getLevel(); });
        if (list == code.levels.end()) {
          code.levels.push_back({entry.getLevel().str(), rank, {}});
          list = std::prev(code.levels.end());
        }
        list->entries.push_back(std::move(made));
      }
      llvm::sort(code.levels,
                 [](const LevelCode &a, const LevelCode &b) { return a.rank < b.rank; });
      table.codes.push_back(std::move(code));
    }
    LayerEntry entry;
    entry.name = layer.getLayerName().str();
    entry.file = entry.name + ".safetensors";
    entry.index = static_cast<int32_t>(layer.getIndex());
    entry.code = place->second;
    table.layers.push_back(std::move(entry));
  }
  return table;
}
