// RUN: moe-opt %s --split-input-file --verify-diagnostics

// experts_c1
func.func @experts_c1(%x: memref<?x31xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected hidden size H of x = 32, but got 31}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x31xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c2
func.func @experts_c2(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a first weight of 1 parts for form = mlp, but got 2}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = mlp, activation = silu>
  return
}

// -----

// experts_c3
func.func @experts_c3(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x2x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight of 1 part, but got 2}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x2x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c3_f
func.func @experts_c3_f(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x25xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight with columns F = 24, but got 25}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x25xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c3_h
func.func @experts_c3_h(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x31x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight with rows H = 32, but got 31}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x31x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c3_result
func.func @experts_c3_result(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x31xf32>) {
  // expected-error @below {{expected hidden size H of the result = 32, but got 31}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x31xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c4
func.func @experts_c4(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<5x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected a second weight of E = 4 experts, but got 5}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<5x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c4_offsets
func.func @experts_c4_offsets(%x: memref<?x32xf32>, %off: memref<4xi32>, %pair: memref<?xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<?x32xf32>) {
  // expected-error @below {{expected elements E + 1 of offsets = 5, but got 4}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<4xi32>, memref<?xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// experts_c5
func.func @experts_c5(%x: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>,
    %k: index, %r: memref<9x32xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.experts ins(%x, %off, %pair, %w1, %w2 : memref<?x32xf32>, memref<5xi32>, memref<8xi32>,
      !moe.weight<4x2x24x32xf32, panel32>, !moe.weight<4x1x32x24xf32, panel32>) slots %k
      outs(%r : memref<9x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// combine_c1
func.func @combine_c1(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x31xf32>) {
  // expected-error @below {{expected width H of rows = 31, but got 32}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%y : memref<4x31xf32>)
  return
}

// -----

// combine_c1_dense
func.func @combine_c1_dense(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected rows T without pairs = 4, but got 8}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c2
func.func @combine_c2(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<7xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected elements N of pair = 8, but got 7}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<7xi32>, memref<4x2xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c2_weights
func.func @combine_c2_weights(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: memref<5x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected tokens T of the weights = 4, but got 5}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<8xi32>, memref<5x2xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c4
func.func @combine_c4(%r: memref<8x32xf32>, %off: memref<1xi32>, %pair: memref<8xi32>,
    %w: memref<4x2xf32>, %k: index, %y: memref<4x32xf32>) {
  // expected-error @below {{expected offsets of at least 2 elements, but got 1}}
  moe.combine ins(%r, %off : memref<8x32xf32>, memref<1xi32>)
      via(%pair, %w slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c3
func.func @combine_c3(%r: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %y: memref<4x32xf32>) {
  // expected-error @below {{expected pair, weights and slots together, but got some of them}}
  "moe.combine"(%r, %off, %pair, %y) <{
      operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0, 0, 1>}>
      : (memref<8x32xf32>, memref<5xi32>, memref<8xi32>, memref<4x32xf32>) -> ()
  return
}

// -----

// ffn_c4
func.func @ffn_c4(%x: memref<?x32xf32>, %y: memref<?x32xf32>,
    %w1: !moe.weight<4x2x24x32xf32, panel32>, %w2: !moe.weight<4x1x32x24xf32, panel32>) {
  // expected-error @below {{expected weights of 1 expert, but got 4}}
  moe.ffn ins(%x, %w1, %w2 : memref<?x32xf32>, !moe.weight<4x2x24x32xf32, panel32>,
      !moe.weight<4x1x32x24xf32, panel32>) outs(%y : memref<?x32xf32>) #moe.expert<form = glu, activation = silu>
  return
}

// -----

// gather_c1
func.func @gather_c1(%x: memref<4x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %k: index, %g: memref<8x31xf32>) {
  // expected-error @below {{expected width H of the result = 32, but got 31}}
  moe.gather ins(%x, %off, %pair : memref<4x32xf32>, memref<5xi32>, memref<8xi32>)
      slots %k outs(%g : memref<8x31xf32>)
  return
}

// -----

// gather_c2
func.func @gather_c2(%x: memref<4x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %k: index, %g: memref<9x32xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.gather ins(%x, %off, %pair : memref<4x32xf32>, memref<5xi32>, memref<8xi32>)
      slots %k outs(%g : memref<9x32xf32>)
  return
}

// -----

// combine_c5
func.func @combine_c5(%r: memref<?x32xf32>, %off: memref<5xi32>, %pair: memref<?xi32>,
    %w: memref<4x2xf32>, %k: index, %g: memref<4x1xf32>, %y: memref<4x32xf32>) {
  // expected-error @below {{expected gate without pairs, but got both}}
  moe.combine ins(%r, %off : memref<?x32xf32>, memref<5xi32>)
      via(%pair, %w slots %k : memref<?xi32>, memref<4x2xf32>) gate(%g : memref<4x1xf32>)
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// combine_c6
func.func @combine_c6(%r: memref<4x32xf32>, %off: memref<2xi32>, %s: memref<4x32xf32>,
    %y: memref<4x32xf32>) {
  // expected-error @below {{expected accumulate with from, but got from alone}}
  moe.combine ins(%r, %off : memref<4x32xf32>, memref<2xi32>) from %s : memref<4x32xf32>
      outs(%y : memref<4x32xf32>)
  return
}

// -----

// experts_c6
func.func @experts_c6(%x: memref<4x32xf32>, %y: memref<4x32xf32>,
    %w1: !moe.weight<1x2x16x32xf32, panel32>, %w2: !moe.weight<1x1x32x16xf32, panel32>) {
  // expected-error @below {{expected biases exactly with bias = true, but got none}}
  moe.ffn ins(%x, %w1, %w2 : memref<4x32xf32>, !moe.weight<1x2x16x32xf32, panel32>,
      !moe.weight<1x1x32x16xf32, panel32>) outs(%y : memref<4x32xf32>)
      #moe.expert<form = glu, activation = silu, bias = true>
  return
}
