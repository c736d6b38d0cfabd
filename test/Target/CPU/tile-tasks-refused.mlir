// RUN: moe-opt %s --moe-decompose-experts --moe-attach-target --moe-clone-variants \
// RUN:   --moe-select-strategy --moe-bufferize --moe-cpu-tile-tasks -verify-diagnostics -o /dev/null

// An expert without a formula goes through every phase as it is and is refused here by name.
moe.weight @L0.gate_up : !moe.weight<1x2x24x32xf32, panel32> role "gate_up" from
    [#moe.source<"a">, #moe.source<"b", part = 1>]
moe.weight @L0.down : !moe.weight<1x1x32x24xf32, panel32> role "down" from
    [#moe.source<"c">]
moe.layer @L0 "l0" kind = dense index = 0 compute = f32
    dims = <H = 32, F = 24, E = 1, K = 1> forward = @f0
    weights(@L0.gate_up, @L0.down)
func.func @f0(%x: tensor<?x32xf32> {moe.arg = "x"}, %y: tensor<?x32xf32> {moe.arg = "y"},
    %acc: i1 {moe.arg = "accumulate"},
    %w1: !moe.weight<1x2x24x32xf32, panel32> {moe.arg = "weight", moe.weight_index = 0},
    %w2: !moe.weight<1x1x32x24xf32, panel32> {moe.arg = "weight", moe.weight_index = 1})
    -> tensor<?x32xf32> attributes {moe.entry = "forward", moe.compute = f32} {
  // expected-error @below {{expected an expert that the CPU target implements, but got latent = 16}}
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x32xf32>, !moe.weight<1x2x24x32xf32, panel32>,
      !moe.weight<1x1x32x24xf32, panel32>) accumulate %acc outs(%y : tensor<?x32xf32>)
      #moe.expert<form = glu, activation = silu, latent = 16>
      -> tensor<?x32xf32>
  return %z : tensor<?x32xf32>
}
