// RUN: moe-opt %s --split-input-file --verify-diagnostics

// entry_attribute
// expected-error @below {{expected 'moe.entry' to be "forward", "route" or "experts", but got "backward"}}
func.func private @entry_attribute() attributes {moe.entry = "backward"}

// -----

// compute_attribute
// expected-error @below {{expected 'moe.compute' to be f32 or bf16, but got f16}}
func.func private @compute_attribute() attributes {moe.compute = f16}

// -----

// unknown_attribute
// expected-error @below {{expected moe.entry, moe.compute, moe.target or moe.workspace on a function, but got 'moe.entri'}}
func.func private @unknown_attribute() attributes {moe.entri = "forward"}

// -----

// arg_attribute
// expected-error @below {{argument 0: expected 'moe.arg' to be one of x, router_x, y, weights, experts, logits, accumulate, routed_only, weight, offsets, lanes, workspace, tokens, slots, but got "z"}}
func.func private @arg_attribute(i32 {moe.arg = "z"})

// -----

// weight_index_attribute
// expected-error @below {{argument 0: expected 'moe.weight_index' to be a non-negative i64, but got -1 : i64}}
func.func private @weight_index_attribute(i32 {moe.weight_index = -1})

// -----

// weight_c1
// expected-error @below {{expected part of source "a" below 1, but got 1}}
moe.weight @w : !moe.weight<1x1x8x8xf32, panel32> role "router" from [#moe.source<"a", part = 1>]

// -----

// weight_c2
// expected-error @below {{expected role to be one word, but got ""}}
moe.weight @w : !moe.weight<1x1x8x8xf32, panel32> role "" from [#moe.source<"a">]

// -----

// layer_c1
// expected-error @below {{expected route = @function in a moe layer, but got none}}
moe.layer @l "l" kind = moe index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights()
func.func private @f()

// -----

// layer_c1_dense
// expected-error @below {{expected a dense layer without route, but got @f}}
moe.layer @l "l" kind = dense index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f route = @f weights()
func.func private @f()

// -----

// layer_c2
// expected-error @below {{expected @f to be a func.func of this module}}
moe.layer @l "l" kind = dense index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights()

// -----

// code_c1
// expected-error @below {{expected at least one stage, but got none}}
moe.code @e stages = [] workspace = @f
func.func private @f()

// -----

// code_c2
// expected-error @below {{expected @g to be a function of this module}}
moe.code @e stages = [@f, @g] workspace = @f
func.func private @f()

// -----

// workspace_attribute
// expected-error @below {{expected 'moe.workspace' to be a symbol, but got "f"}}
func.func private @workspace_attribute() attributes {moe.workspace = "f"}

// -----

// layer_c3
// expected-error @below {{expected @f to be a moe.weight of this module}}
moe.layer @l "l" kind = dense index = 0 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights(@f)
func.func private @f()

// -----

// layer_c4
// expected-error @below {{expected index to be at least 0, but got -1}}
moe.layer @l "l" kind = dense index = -1 compute = f32 dims = <H = 8, F = 8, E = 1, K = 1> forward = @f weights()
func.func private @f()
