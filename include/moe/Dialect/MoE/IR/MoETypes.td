//===- MoETypes.td - types of the moe dialect --------------*- tablegen -*-===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#ifndef MOE_DIALECT_MOE_IR_MOETYPES_TD
#define MOE_DIALECT_MOE_IR_MOETYPES_TD

include "moe/Dialect/MoE/IR/MoEAttrs.td"
include "mlir/IR/AttrTypeBase.td"

def MoE_Weight : TypeDef<MoE_Dialect, "Weight"> {
  let mnemonic = "weight";
  let summary = "packed weight of all experts, opaque";
  let description = [{
    `!moe.weight<E x parts x Nout x Kin x format, layout>`: for each of E experts, `parts` matrices
    of Nout rows (columns of the product) and Kin columns (the reduction), in a packed layout. The
    value is a handle: it is never sliced, copied or loaded from by a tensor operation.

    Example:

    ```mlir
    !moe.weight<64x2x1024x2048xbf16, panel32>
    !moe.weight<64x2x1024x1xf32, vector32>
    ```

    Layout `vector32` needs one column and format f32.
  }];
  let parameters = (ins
    "int64_t":$experts, "int64_t":$parts, "int64_t":$rows, "int64_t":$cols,
    "WeightFormatInterface":$format,
    "WeightLayoutInterface":$layout);
  let hasCustomAssemblyFormat = 1;
  let genVerifyDecl = 1;
  let builders = [
    TypeBuilder<(ins "int64_t":$experts, "int64_t":$parts, "int64_t":$rows, "int64_t":$cols,
                     "PlainFormat":$format), [{
      return $_get($_ctxt, experts, parts, rows, cols, FormatAttr::get($_ctxt, format),
                   LayoutAttr::get($_ctxt, PanelLayout::Panel32));
    }]>,
  ];
  let extraClassDeclaration = [{
    /// A weight of one f32 column in layout vector32.
    static WeightType getVector(::mlir::MLIRContext *context, int64_t experts, int64_t parts,
                                int64_t rows);
    /// Whether the layout is vector32.
    bool isVector() const;
    /// The reduction dimension after padding, in elements.
    int64_t paddedCols() const;
    /// Panels of one expert.
    int64_t panelCount() const;
    /// Result columns of one part that a panel holds (32 for one part, 16 for two).
    int64_t panelCols() const;
    /// Bytes of one panel.
    int64_t panelBytes() const;
    /// Bytes of the packed tensor of all experts, rounded up to 4096.
    int64_t packedBytes() const;
  }];
}

//===----------------------------------------------------------------------===//
// Operand constraints
//===----------------------------------------------------------------------===//

class MoE_ShapedOf<list<Type> elements, list<int> ranks, string summary>
    : AnyTypeOf<[TensorRankOf<elements, ranks>, StridedMemRefRankOf<elements, ranks>], summary>;

/// A weight of one column.
def MoE_VectorWeight : Type<And<[MoE_Weight.predicate,
    CPred<"::llvm::cast<::mlir::moe::WeightType>($_self).isVector()">]>,
    "weight of layout vector32", "::mlir::moe::WeightType">;

def MoE_Float : AnyTypeOf<[F32, BF16], "f32 or bf16">;
/// [rows, width] of activations.
def MoE_Rows : MoE_ShapedOf<[F32, BF16], [2], "matrix of f32 or bf16">;
/// [N, F] or [N, parts, F].
def MoE_Products : MoE_ShapedOf<[F32, BF16], [2, 3], "matrix, or matrix per part, of f32 or bf16">;
def MoE_Weights : MoE_ShapedOf<[F32], [2], "matrix of f32">;
def MoE_Ids : MoE_ShapedOf<[I32], [2], "matrix of i32">;
def MoE_Offsets : MoE_ShapedOf<[I32], [1], "vector of i32">;
def MoE_Pairs : MoE_ShapedOf<[I32], [1], "vector of i32">;

#endif // MOE_DIALECT_MOE_IR_MOETYPES_TD
