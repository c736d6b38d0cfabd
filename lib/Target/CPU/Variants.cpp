//===- Variants.cpp - targets, and a clone of every entry for each --------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Dialect/MoE/IR/MoEOps.h"
#include "moe/Target/CPU/Level.h"
#include "moe/Target/CPU/Passes.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/Tensor/IR/Tensor.h"
#include "llvm/ADT/MapVector.h"

#include <map>

namespace mlir::moe {
#define GEN_PASS_DEF_MOEATTACHTARGET
#define GEN_PASS_DEF_MOECLONEVARIANTS
#include "moe/Target/CPU/Passes.h.inc"
} // namespace mlir::moe

using namespace mlir;
using namespace mlir::moe;

static constexpr llvm::StringLiteral kTargetsAttrName = "moe.targets";

/// Refuses unknown levels and those that are not built yet, in the user's words.
static const CPULevel *checkLevel(Operation *op, StringRef name) {
  const CPULevel *level = findCPULevel(name);
  if (!level) {
    op->emitError("expected a CPU level (")
        << implementedLevelNames() << "), but got `" << name << "`";
    return nullptr;
  }
  if (!level->implemented) {
    op->emitError("expected a CPU level that is built (")
        << implementedLevelNames() << "), but got `" << name << "`: " << level->refusal;
    return nullptr;
  }
  return level;
}

namespace {

/// What a clone is made for.
struct Machine {
  TargetAttr target;
  StringRef suffix;                ///< of the clone's name: "v4", "sm_80"
  const CPULevel *level = nullptr; ///< null for a GPU

  bool operator<(const Machine &other) const { return suffix < other.suffix; }
};

struct AttachTargetPass : public mlir::moe::impl::MoEAttachTargetBase<AttachTargetPass> {
  using MoEAttachTargetBase::MoEAttachTargetBase;

  void runOnOperation() override {
    ModuleOp module = getOperation();
    if (module->hasAttr(kTargetsAttrName))
      return;
    SmallVector<const CPULevel *> chosen;
    if (levels.empty()) {
      for (const CPULevel &level : cpuLevels())
        if (level.implemented)
          chosen.push_back(&level);
    } else {
      for (const std::string &name : levels) {
        const CPULevel *level = checkLevel(module, name);
        if (!level)
          return signalPassFailure();
        if (!llvm::is_contained(chosen, level))
          chosen.push_back(level);
      }
    }
    // By rising rank whatever the order of the option, so that the output does not depend on it.
    llvm::sort(chosen, [](auto *a, auto *b) { return a->rank < b->rank; });
    SmallVector<Attribute> targets;
    for (const CPULevel *level : chosen)
      targets.push_back(TargetAttr::get(&getContext(), Device::CPU, level->name));
    module->setAttr(kTargetsAttrName, ArrayAttr::get(&getContext(), targets));
  }
};

struct CloneVariantsPass : public mlir::moe::impl::MoECloneVariantsBase<CloneVariantsPass> {
  using MoECloneVariantsBase::MoECloneVariantsBase;

  void runOnOperation() override;

private:
  FailureOr<SmallVector<Type>> elementTypes();
  FailureOr<func::FuncOp> makeVariant(func::FuncOp original, const Machine &machine, Type x,
                                      Type y);
};

} // namespace

FailureOr<SmallVector<Type>> CloneVariantsPass::elementTypes() {
  Builder b(&getContext());
  SmallVector<Type> result;
  if (types.empty())
    return SmallVector<Type>{b.getF32Type(), b.getBF16Type()};
  for (const std::string &name : types) {
    if (name != "f32" && name != "bf16") {
      getOperation().emitError("expected element type f32 or bf16, but got `") << name << "`";
      return failure();
    }
    result.push_back(name == "f32" ? Type(b.getF32Type()) : Type(b.getBF16Type()));
  }
  return result;
}

static BlockArgument argumentOf(func::FuncOp func, StringRef role) {
  for (BlockArgument argument : func.getArguments())
    if (auto name =
            func.getArgAttrOfType<StringAttr>(argument.getArgNumber(), MoEDialect::kArgAttrName))
      if (name == role)
        return argument;
  return nullptr;
}

/// The matmuls that a level with products of bf16 computes that way: rows and weights of bf16.
static bool hasBF16Product(GroupedMatmulOp matmul, Type compute) {
  auto format = dyn_cast<FormatAttr>(matmul.getWeightType().getFormat());
  return compute.isBF16() && format && format.getValue() == PlainFormat::BF16;
}

/// The level whose code `original` gets at `level`. Without a product of bf16 the code of a level
/// with such products is that of the level below.
static const CPULevel *codeLevel(func::FuncOp original, const CPULevel *level) {
  if (!level->bf16Products)
    return level;
  auto compute = original->getAttrOfType<TypeAttr>(MoEDialect::kComputeAttrName);
  bool uses = false;
  original.walk([&](GroupedMatmulOp matmul) {
    uses |= compute && hasBF16Product(matmul, compute.getValue());
  });
  return uses ? level : findCPULevel(kLevelV4);
}

static std::string typeName(Type type) { return type.isF32() ? "f32" : "bf16"; }

FailureOr<func::FuncOp> CloneVariantsPass::makeVariant(func::FuncOp original,
                                                       const Machine &machine, Type x, Type y) {
  std::string name = original.getSymName().str() + "_" + machine.suffix.str() + "_" + typeName(x);
  if (y)
    name += "_" + typeName(y);
  auto compute = original->getAttrOfType<TypeAttr>(MoEDialect::kComputeAttrName);
  if (!compute)
    return original.emitOpError("expected attribute ") << MoEDialect::kComputeAttrName;
  func::FuncOp clone = original.clone();
  clone.setSymName(name);
  clone->setAttr(MoEDialect::kTargetAttrName, machine.target);
  original->getBlock()->getOperations().insert(original->getIterator(), clone);
  ++numClones;

  auto retype = [&](Value value, Type element) {
    value.setType(cast<RankedTensorType>(value.getType()).clone(element));
  };
  // x, and router_x where there is one: whoever reads it rounds to the compute type, which its
  // readers must now say.
  if (!argumentOf(clone, "x"))
    return clone.emitOpError("expected an argument with moe.arg = \"x\"");
  for (StringRef role : {"x", "router_x"}) {
    BlockArgument input = argumentOf(clone, role);
    if (!input || cast<RankedTensorType>(input.getType()).getElementType() == x)
      continue;
    retype(input, x);
    for (OpOperand &use : input.getUses()) {
      if (auto matmul = dyn_cast<GroupedMatmulOp>(use.getOwner())) {
        if (!matmul.getRowTypeAttr())
          matmul.setRowTypeAttr(compute);
      } else if (auto router = dyn_cast<RouterOp>(use.getOwner())) {
        if (!router.getComputeAttr())
          router.setComputeAttr(compute);
      } else if (auto router = dyn_cast<RouteDispatchOp>(use.getOwner())) {
        if (!router.getComputeAttr())
          router.setComputeAttr(compute);
      }
    }
  }
  // Rows between two matmuls: products of bf16 round them, as the operations that made them say.
  if (machine.level && machine.level->bf16Products)
    clone.walk([&](GroupedMatmulOp matmul) {
      auto rows = dyn_cast<OpResult>(matmul.getRows());
      if (!rows || !hasBF16Product(matmul, compute.getValue()))
        return;
      auto producer = dyn_cast<DestinationStyleOpInterface>(rows.getOwner());
      if (!producer || !isa<GroupedMatmulOp, ActivateOp>(rows.getOwner()))
        return;
      OpOperand *init = producer.getTiedOpOperand(rows);
      auto empty = init->get().getDefiningOp<tensor::EmptyOp>();
      if (!empty)
        return;
      // An empty tensor of its own: another operation may use the same one.
      OpBuilder b(empty);
      init->set(b.clone(*empty)->getResult(0));
      retype(init->get(), compute.getValue());
      retype(rows, compute.getValue());
      if (empty->use_empty())
        empty.erase();
    });
  // y: every result tied to it has its type.
  if (y) {
    Value output = argumentOf(clone, "y");
    if (!output)
      return clone.emitOpError("expected an argument with moe.arg = \"y\"");
    SmallVector<Value> work = {output};
    while (!work.empty()) {
      Value value = work.pop_back_val();
      retype(value, y);
      for (OpOperand &use : value.getUses())
        if (auto dps = dyn_cast<DestinationStyleOpInterface>(use.getOwner()))
          if (dps.isDpsInit(&use))
            work.push_back(dps.getTiedOpResult(&use));
    }
  }
  Operation *terminator = clone.getBody().front().getTerminator();
  clone.setFunctionType(FunctionType::get(&getContext(), clone.getBody().getArgumentTypes(),
                                          terminator->getOperandTypes()));
  return clone;
}

void CloneVariantsPass::runOnOperation() {
  ModuleOp module = getOperation();
  auto targets = module->getAttrOfType<ArrayAttr>(kTargetsAttrName);
  if (!targets) {
    module.emitError("expected attribute moe.targets; run moe-attach-target first");
    return signalPassFailure();
  }
  FailureOr<SmallVector<Type>> elements = elementTypes();
  if (failed(elements))
    return signalPassFailure();
  SymbolTable symbols(module);
  // Layers share functions, so clones are made once per function.
  llvm::MapVector<Operation *, SmallVector<EntryAttr>> clones;

  auto entriesOf = [&](LayerOp layer, FlatSymbolRefAttr reference,
                       EntryKind kind) -> FailureOr<SmallVector<EntryAttr>> {
    auto original = symbols.lookup<func::FuncOp>(reference.getAttr());
    if (!original)
      return layer.emitOpError("expected a function ") << reference << ", but got none";
    if (auto it = clones.find(original); it != clones.end())
      return it->second;
    SmallVector<EntryAttr> entries;
    std::map<std::tuple<Machine, const void *, const void *>, func::FuncOp> made;
    for (TargetAttr target : targets.getAsRange<TargetAttr>()) {
      Machine code{target, target.getLevel()};
      if (target.getDevice() == Device::CPU) {
        const CPULevel *level = checkLevel(original, target.getLevel());
        if (!level)
          return failure();
        code.level = codeLevel(original, level);
        code.suffix = code.level->suffix;
        code.target = TargetAttr::get(&getContext(), Device::CPU, code.level->name);
      }
      for (Type x : *elements) {
        SmallVector<Type> outputs = *elements;
        if (kind == EntryKind::Route)
          outputs = {Type()};
        for (Type y : outputs) {
          func::FuncOp &clone = made[{code, x.getAsOpaquePointer(), y.getAsOpaquePointer()}];
          if (!clone) {
            FailureOr<func::FuncOp> variant = makeVariant(original, code, x, y);
            if (failed(variant))
              return failure();
            clone = *variant;
            if (symbols.lookup(clone.getSymName()))
              return clone.emitOpError("expected a new name, but got one that is taken");
            symbols.insert(clone);
          }
          entries.push_back(EntryAttr::get(&getContext(), kind, target.getLevel(), x, y ? y : x,
                                           FlatSymbolRefAttr::get(clone)));
        }
      }
    }
    clones[original] = entries;
    return entries;
  };

  for (LayerOp layer : module.getOps<LayerOp>()) {
    if (layer.getEntriesAttr())
      continue;
    SmallVector<Attribute> entries;
    std::pair<FlatSymbolRefAttr, EntryKind> functions[] = {
        {layer.getForwardAttr(), EntryKind::Forward},
        {layer.getRouteAttr(), EntryKind::Route},
        {layer.getExpertsAttr(), EntryKind::Experts}};
    for (auto [reference, kind] : functions) {
      if (!reference)
        continue;
      FailureOr<SmallVector<EntryAttr>> made = entriesOf(layer, reference, kind);
      if (failed(made))
        return signalPassFailure();
      entries.append(made->begin(), made->end());
    }
    layer.setEntriesAttr(ArrayAttr::get(&getContext(), entries));
    layer.removeForwardAttr();
    layer.removeRouteAttr();
    layer.removeExpertsAttr();
  }
  for (auto &[original, entries] : clones)
    symbols.erase(original);
}
