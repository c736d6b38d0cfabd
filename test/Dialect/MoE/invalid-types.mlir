// RUN: moe-opt %s --split-input-file --verify-diagnostics

// weight_type_rank
// expected-error @below {{expected a weight of 4 dimensions (experts, parts, rows, columns), but got 3}}
func.func private @weight_type_rank(!moe.weight<2x8x8xf32, panel32>)

// -----

// weight_type_format
// expected-error @below {{expected weight format f32 or bf16, but got 'f16'}}
func.func private @weight_type_format(!moe.weight<1x2x8x8xf16, panel32>)

// -----

// weight_type_layout
// expected-error @below {{expected weight layout panel32 or vector32, but got 'rows'}}
func.func private @weight_type_layout(!moe.weight<1x2x8x8xf32, rows>)

// -----

// weight_type_experts
// expected-error @below {{expected a weight with positive experts, but got 0}}
func.func private @weight_type_experts(!moe.weight<0x2x8x8xf32, panel32>)

// -----

// weight_type_parts
// expected-error @below {{expected a weight of 1 or 2 parts, but got 3}}
func.func private @weight_type_parts(!moe.weight<1x3x8x8xf32, panel32>)

// -----

// weight_type_bytes
// expected-error @below {{expected a weight of at most 2^60 bytes, but got 64x2x4294967296x4294967296 elements}}
func.func private @weight_type_bytes(!moe.weight<64x2x4294967296x4294967296xf32, panel32>)

// -----

// weight_type, vector32
// expected-error @below {{expected one column of f32 in layout vector32, but got 2 of f32}}
func.func private @vector32_columns(!moe.weight<1x1x8x2xf32, vector32>)
