// RUN: moe-opt %s --split-input-file --verify-diagnostics

// grouped_matmul_c1
func.func @grouped_matmul_c1(%x: memref<8x31xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected width of rows = 32, but got 31}}
  moe.grouped_matmul rows(%x : memref<8x31xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c2
func.func @grouped_matmul_c2(%x: memref<8x32xf32>, %off: memref<6xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected elements E + 1 of offsets = 5, but got 6}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<6xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c4
func.func @grouped_matmul_c4(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a region of 2 arguments, one per part, but got 1}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c4_type
func.func @grouped_matmul_c4_type(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected region arguments of type f32, but got 'f64'}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f64):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c4_yield
func.func @grouped_matmul_c4_yield(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected the region to yield one f32}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield
  }
  return
}

// -----

// grouped_matmul_c5
func.func @grouped_matmul_c5(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a result of rank 3, but got 2}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>)
  return
}

// -----

// grouped_matmul_c5_parts
func.func @grouped_matmul_c5_parts(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x1x24xf32>) {
  // expected-error @below {{expected parts of the result = 2, but got 1}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x1x24xf32>)
  return
}

// -----

// grouped_matmul_c5_width
func.func @grouped_matmul_c5_width(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x25xf32>) {
  // expected-error @below {{expected width of the result = 24, but got 25}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x25xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c5_rows
func.func @grouped_matmul_c5_rows(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<9x24xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<9x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c6
func.func @grouped_matmul_c6(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected one part or a region with combine, but got a weight of 2 parts and no region}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) combine as f32 outs(%o : memref<8x24xf32>)
  return
}

// -----

// grouped_matmul_c6_weights
func.func @grouped_matmul_c6_weights(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<5x24xf32>) {
  // expected-error @below {{expected tokens T of the weights = 5, but got 4}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>)
      combine as f32 (%pair, %tw slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%o : memref<5x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c7
func.func @grouped_matmul_c7(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected pairs, weights and accumulate with combine only}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>)
      (%pair, %tw slots %k : memref<8xi32>, memref<4x2xf32>)
      outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c8
func.func @grouped_matmul_c8(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %tw: memref<4x2xf32>, %k: index,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a strategy with result blocked or rows, but got combine}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>)
      strategy = #moe.strategy<ukernel = #moe.ukernel<level = "x86-64-v4", rows = 14, panels = 1>,
          chunk_rows = 64, panels_per_task = 1, source = rows, result = combine> {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c3
func.func @grouped_matmul_c3(%x: memref<8x32xf32>, %off: memref<5xi32>, %pair: memref<8xi32>,
    %w: !moe.weight<4x1x32x24xf32, panel32>, %h: memref<8x24xf32>, %o: memref<8x32xf32>) {
  // expected-error @below {{expected via %pair slots %k, but got one of them}}
  "moe.grouped_matmul"(%h, %pair, %off, %w, %o) <{
      operandSegmentSizes = array<i32: 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1>}> ({})
      : (memref<8x24xf32>, memref<8xi32>, memref<5xi32>, !moe.weight<4x1x32x24xf32, panel32>,
         memref<8x32xf32>) -> ()
  return
}

// -----

// grouped_matmul_c4, side effects
func.func @grouped_matmul_c4_effects(%x: memref<8x32xf32>, %off: memref<5xi32>,
    %w: !moe.weight<4x2x24x32xf32, panel32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a region without side effects}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x2x24x32xf32, panel32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    // expected-note @below {{see 'memref.alloc'}}
    %a = memref.alloc() : memref<4xf32>
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c1
func.func @activate_c1(%p: memref<8x2x24xf32>, %o: memref<8x25xf32>) {
  // expected-error @below {{expected width F of the result = 24, but got 25}}
  moe.activate ins(%p : memref<8x2x24xf32>) outs(%o : memref<8x25xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c1_rows
func.func @activate_c1_rows(%p: memref<8x2x24xf32>, %o: memref<9x24xf32>) {
  // expected-error @below {{expected rows N of the result = 8, but got 9}}
  moe.activate ins(%p : memref<8x2x24xf32>) outs(%o : memref<9x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c1_parts
func.func @activate_c1_parts(%p: memref<8x?x24xf32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a static number of parts, but got ?}}
  moe.activate ins(%p : memref<8x?x24xf32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32, %u: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// activate_c2
func.func @activate_c2(%p: memref<8x2x24xf32>, %o: memref<8x24xf32>) {
  // expected-error @below {{expected a region of 2 arguments, one per part, but got 1}}
  moe.activate ins(%p : memref<8x2x24xf32>) outs(%o : memref<8x24xf32>) {
  ^bb0(%g: f32):
    moe.yield %g : f32
  }
  return
}

// -----

// grouped_matmul_c9
func.func @grouped_matmul_c9(%x: memref<8x32xf32>, %off: memref<5xi32>,
    %w: !moe.weight<4x1x24x32xf32, panel32>, %b: !moe.weight<4x1x23x1xf32, vector32>,
    %o: memref<8x24xf32>) {
  // expected-error @below {{expected a bias of 4x1x24x1, but got 4x1x23x1}}
  moe.grouped_matmul rows(%x : memref<8x32xf32>) groups(%off : memref<5xi32>)
      weights(%w : !moe.weight<4x1x24x32xf32, panel32>)
      bias(%b : !moe.weight<4x1x23x1xf32, vector32>) outs(%o : memref<8x24xf32>)
  return
}
