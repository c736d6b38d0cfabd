//===- TensorMap.cpp - views of packed weights for the TMA unit -----------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "TensorMap.h"

#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Dialect/LLVMIR/NVVMDialect.h"

#include <cstddef>

#include "moec/module.h"

using namespace mlir;
using namespace mlir::moe;

static_assert(offsetof(moec_gpu_map, sizes) == 8 && offsetof(moec_gpu_map, strides) == 48 &&
              offsetof(moec_gpu_map, box) == 80 && offsetof(moec_gpu_map, rank) == 100 &&
              offsetof(moec_gpu_map, swizzle) == 104 && sizeof(moec_gpu_map) == 112 &&
              offsetof(moec_gpu_launcher, map) == 16);

Value mlir::moe::createWeightMap(OpBuilder &b, Location loc, Value frame, Value packed,
                                 WeightType weight, GPUTileAttr tile) {
  Type ptr = LLVM::LLVMPointerType::get(b.getContext());
  auto slot = [&](int64_t bytes, int64_t alignment) -> Value {
    OpBuilder::InsertionGuard guard(b);
    auto host = b.getInsertionBlock()->getParentOp()->getParentOfType<func::FuncOp>();
    b.setInsertionPointToStart(&host.getBody().front());
    Value count = LLVM::ConstantOp::create(b, loc, b.getI32Type(), bytes);
    return LLVM::AllocaOp::create(b, loc, ptr, b.getI8Type(), count, alignment);
  };
  Value view = slot(sizeof(moec_gpu_map), 8), map = slot(128, 64);
  auto at = [&](Value base, int64_t offset) -> Value {
    return LLVM::GEPOp::create(b, loc, ptr, b.getI8Type(), base,
                               ArrayRef<LLVM::GEPArg>{int32_t(offset)});
  };
  auto put = [&](Value v, int64_t offset) { LLVM::StoreOp::create(b, loc, v, at(view, offset)); };
  auto c32 = [&](int64_t v) { return LLVM::ConstantOp::create(b, loc, b.getI32Type(), v); };
  auto c64 = [&](int64_t v) { return LLVM::ConstantOp::create(b, loc, b.getI64Type(), v); };
  put(packed, offsetof(moec_gpu_map, base));
  // A row of a panel is 64 numbers: 32 columns by two steps of the reduction.
  int64_t panelRows = weight.panelBytes() / 128, panels = weight.panelCount();
  int64_t sizes[] = {64, panelRows, panels, weight.getExperts(), 1};
  int64_t strides[] = {128, weight.panelBytes(), panels * weight.panelBytes(), 0};
  int64_t box[] = {64, tile.getK() / 2, tile.getCols() / 32, 1, 1};
  for (int64_t i = 0; i < 5; ++i) {
    put(c64(sizes[i]), offsetof(moec_gpu_map, sizes) + i * 8);
    put(c32(box[i]), offsetof(moec_gpu_map, box) + i * 4);
  }
  for (int64_t i = 0; i < 4; ++i)
    put(c64(strides[i]), offsetof(moec_gpu_map, strides) + i * 8);
  put(c32(4), offsetof(moec_gpu_map, rank));
  put(c32(128), offsetof(moec_gpu_map, swizzle));
  Value launcher = LLVM::LoadOp::create(b, loc, ptr, at(frame, offsetof(moec_frame, launcher)));
  Value self = LLVM::LoadOp::create(b, loc, ptr, launcher);
  Value function =
      LLVM::LoadOp::create(b, loc, ptr, at(launcher, offsetof(moec_gpu_launcher, map)));
  auto type = LLVM::LLVMFunctionType::get(LLVM::LLVMVoidType::get(b.getContext()), {ptr, ptr, ptr});
  LLVM::CallOp::create(b, loc, type, ValueRange{function, self, view, map});
  return map;
}

void mlir::moe::setMapArgument(LLVM::LLVMFuncOp kernel, unsigned argument) {
  Builder b(kernel.getContext());
  kernel.setArgAttr(argument, LLVM::LLVMDialect::getByValAttrName(),
                    TypeAttr::get(LLVM::LLVMArrayType::get(b.getI8Type(), 128)));
  kernel.setArgAttr(argument, LLVM::LLVMDialect::getAlignAttrName(), b.getI64IntegerAttr(64));
  kernel.setArgAttr(argument, NVVM::NVVMDialect::getGridConstantAttrName(), b.getUnitAttr());
}
