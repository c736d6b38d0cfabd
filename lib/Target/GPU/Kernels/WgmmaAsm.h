//===- WgmmaAsm.h - wgmma with its left operand in registers ----*- C++ -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// nvvm.wgmma.mma_async takes its left operand from shared memory alone. With registers it is
// assembly, whose text is made and recognised (by the SIMT executor) here.
//
//===----------------------------------------------------------------------===//

#ifndef MOE_LIB_TARGET_GPU_KERNELS_WGMMAASM_H
#define MOE_LIB_TARGET_GPU_KERNELS_WGMMAASM_H

#include "mlir/Dialect/LLVMIR/LLVMDialect.h"

namespace mlir::moe {

/// D (64 x n, f32) += A (64 x 16, registers) · B (16 x n, bf16, K-major, in shared memory).
/// Results: n / 2 sums. Operands: 4 words of A, the descriptor of B, the sums before.
inline std::string wgmmaText(int64_t n) {
  std::string text = "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" +
                     std::to_string(n) + "k16.f32.bf16.bf16 {";
  int64_t sums = n / 2;
  for (int64_t i = 0; i < sums; ++i)
    text += (i ? ", $" : "$") + std::to_string(i);
  text += "}, {";
  for (int64_t i = 0; i < 4; ++i)
    text += (i ? ", $" : "$") + std::to_string(sums + i);
  return text + "}, $" + std::to_string(sums + 4) + ", p, 1, 1, 0;\n}";
}

/// The columns of the product in an assembly that `createWgmma` made, or 0.
inline int64_t wgmmaColumns(LLVM::InlineAsmOp op) {
  auto sums = dyn_cast_or_null<LLVM::LLVMStructType>(
      op->getNumResults() ? op->getResult(0).getType() : Type());
  int64_t n = sums ? int64_t(sums.getBody().size()) * 2 : 0;
  return n && op.getAsmString() == wgmmaText(n) ? n : 0;
}

/// Whether the assembly is the one of `createReadSums`.
inline bool isReadSums(LLVM::InlineAsmOp op) {
  return op.getAsmString().empty() && op->getNumResults() == 1 && op->getNumOperands() &&
         isa<LLVM::LLVMStructType>(op->getResult(0).getType());
}

inline SmallVector<Value> createSums(OpBuilder &b, Location loc, StringRef text,
                                     StringRef constraints, ValueRange operands, int64_t count) {
  auto type =
      LLVM::LLVMStructType::getLiteral(b.getContext(), SmallVector<Type>(count, b.getF32Type()));
  Value all =
      LLVM::InlineAsmOp::create(b, loc, type, operands, text, constraints,
                                /*has_side_effects=*/true, /*is_align_stack=*/false,
                                LLVM::TailCallKind::None, LLVM::AsmDialectAttr(), ArrayAttr())
          .getResult(0);
  SmallVector<Value> results;
  for (int64_t i = 0; i < count; ++i)
    results.push_back(LLVM::ExtractValueOp::create(b, loc, all, ArrayRef<int64_t>{i}));
  return results;
}

inline SmallVector<Value> createWgmma(OpBuilder &b, Location loc, ArrayRef<Value> left,
                                      Value descriptor, ValueRange sums) {
  int64_t count = int64_t(sums.size());
  std::string constraints;
  for (int64_t i = 0; i < count; ++i)
    constraints += "=f,";
  constraints += "r,r,r,r,l";
  for (int64_t i = 0; i < count; ++i)
    constraints += "," + std::to_string(i);
  SmallVector<Value> operands(left);
  operands.push_back(descriptor);
  operands.append(sums.begin(), sums.end());
  return createSums(b, loc, wgmmaText(count * 2), constraints, operands, count);
}

/// The sums, for use after wgmma.wait_group: an empty assembly, before which no compiler moves
/// their users.
inline SmallVector<Value> createReadSums(OpBuilder &b, Location loc, ValueRange sums) {
  std::string constraints;
  int64_t count = int64_t(sums.size());
  for (int64_t i = 0; i < count; ++i)
    constraints += i ? ",=f" : "=f";
  for (int64_t i = 0; i < count; ++i)
    constraints += "," + std::to_string(i);
  return createSums(b, loc, "", constraints, sums, count);
}

} // namespace mlir::moe

#endif // MOE_LIB_TARGET_GPU_KERNELS_WGMMAASM_H
