// Dense layers of H = F = 1 with all weights 1: y = act(x) x, for every activation.
// RUN: moe-opt %s --moe-decompose-experts --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s
// RUN: moe-opt %s --moe-decompose-experts --moe-fuse-activation --moe-fuse-combine \
// RUN:   --one-shot-bufferize="bufferize-function-boundaries \
// RUN:   function-boundary-type-conversion=identity-layout-map" \
// RUN:   --convert-moe-to-loops --reconcile-unrealized-casts \
// RUN:   --arith-expand=include-bf16=true --expand-strided-metadata --lower-affine \
// RUN:   --convert-scf-to-cf --convert-math-to-llvm --convert-math-to-libm --convert-to-llvm \
// RUN:   --reconcile-unrealized-casts \
// RUN:   | mlir-runner -e main -entry-point-result=void \
// RUN:     -shared-libs=%mlir_runner_utils,%mlir_c_runner_utils | FileCheck %s

// x = 1, -1. silu(1) = 0.7310586, silu(-1) = -0.2689414
// CHECK: {{\[}}[0.731059],
// CHECK-NEXT: [0.268941]]
// gelu(1) = 0.8413447, gelu(-1) = -0.1586553
// CHECK: {{\[}}[0.841345],
// CHECK-NEXT: [0.158655]]
// gelu_tanh(1) = 0.8411920, gelu_tanh(-1) = -0.1588080
// CHECK: {{\[}}[0.841192],
// CHECK-NEXT: [0.158808]]
// relu(1) = 1, relu(-1) = 0
// CHECK: {{\[}}[1],
// CHECK-NEXT: [{{-?}}0]]
// The mlp form, relu squared, added to 3.
// CHECK: {{\[}}[4],
// CHECK-NEXT: [3]]

func.func @silu(%x: tensor<?x1xf32>, %y: tensor<?x1xf32>,
    %w1: !moe.weight<1x2x1x1xf32, panel32>, %w2: !moe.weight<1x1x1x1xf32, panel32>)
    -> tensor<?x1xf32> {
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x1xf32>, !moe.weight<1x2x1x1xf32, panel32>,
      !moe.weight<1x1x1x1xf32, panel32>) outs(%y : tensor<?x1xf32>)
      #moe.expert<form = glu, activation = silu> -> tensor<?x1xf32>
  return %z : tensor<?x1xf32>
}
func.func @gelu(%x: tensor<?x1xf32>, %y: tensor<?x1xf32>,
    %w1: !moe.weight<1x2x1x1xf32, panel32>, %w2: !moe.weight<1x1x1x1xf32, panel32>)
    -> tensor<?x1xf32> {
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x1xf32>, !moe.weight<1x2x1x1xf32, panel32>,
      !moe.weight<1x1x1x1xf32, panel32>) outs(%y : tensor<?x1xf32>)
      #moe.expert<form = glu, activation = gelu> -> tensor<?x1xf32>
  return %z : tensor<?x1xf32>
}
func.func @gelu_tanh(%x: tensor<?x1xf32>, %y: tensor<?x1xf32>,
    %w1: !moe.weight<1x2x1x1xf32, panel32>, %w2: !moe.weight<1x1x1x1xf32, panel32>)
    -> tensor<?x1xf32> {
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x1xf32>, !moe.weight<1x2x1x1xf32, panel32>,
      !moe.weight<1x1x1x1xf32, panel32>) outs(%y : tensor<?x1xf32>)
      #moe.expert<form = glu, activation = gelu_tanh> -> tensor<?x1xf32>
  return %z : tensor<?x1xf32>
}
func.func @relu(%x: tensor<?x1xf32>, %y: tensor<?x1xf32>,
    %w1: !moe.weight<1x2x1x1xf32, panel32>, %w2: !moe.weight<1x1x1x1xf32, panel32>)
    -> tensor<?x1xf32> {
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x1xf32>, !moe.weight<1x2x1x1xf32, panel32>,
      !moe.weight<1x1x1x1xf32, panel32>) outs(%y : tensor<?x1xf32>)
      #moe.expert<form = glu, activation = relu> -> tensor<?x1xf32>
  return %z : tensor<?x1xf32>
}
func.func @mlp(%x: tensor<?x1xf32>, %y: tensor<?x1xf32>, %acc: i1,
    %w1: !moe.weight<1x1x1x1xf32, panel32>, %w2: !moe.weight<1x1x1x1xf32, panel32>)
    -> tensor<?x1xf32> {
  %z = moe.ffn ins(%x, %w1, %w2 : tensor<?x1xf32>, !moe.weight<1x1x1x1xf32, panel32>,
      !moe.weight<1x1x1x1xf32, panel32>) accumulate %acc outs(%y : tensor<?x1xf32>)
      #moe.expert<form = mlp, activation = relu2> -> tensor<?x1xf32>
  return %z : tensor<?x1xf32>
}

func.func private @printMemrefF32(memref<*xf32>) attributes {llvm.emit_c_interface}
func.func @print(%t: tensor<?x1xf32>) {
  %b = bufferization.to_buffer %t : tensor<?x1xf32> to memref<?x1xf32>
  %u = memref.cast %b : memref<?x1xf32> to memref<*xf32>
  call @printMemrefF32(%u) : (memref<*xf32>) -> ()
  return
}

func.func @main() {
  %true = arith.constant true
  %one = arith.constant 1.0 : f32
  %c0 = arith.constant 0 : index
  %c16 = arith.constant 16 : index
  %packed = memref.alloc() : memref<1024xf32>
  memref.store %one, %packed[%c0] : memref<1024xf32>
  memref.store %one, %packed[%c16] : memref<1024xf32>
  %gu = builtin.unrealized_conversion_cast %packed : memref<1024xf32> to !moe.weight<1x2x1x1xf32, panel32>
  %w = builtin.unrealized_conversion_cast %packed : memref<1024xf32> to !moe.weight<1x1x1x1xf32, panel32>
  %xs = arith.constant dense<[[1.0], [-1.0]]> : tensor<2x1xf32>
  %x = tensor.cast %xs : tensor<2x1xf32> to tensor<?x1xf32>
  %ys = arith.constant dense<3.0> : tensor<2x1xf32>
  %y = tensor.cast %ys : tensor<2x1xf32> to tensor<?x1xf32>
  %silu = call @silu(%x, %y, %gu, %w) : (tensor<?x1xf32>, tensor<?x1xf32>,
      !moe.weight<1x2x1x1xf32, panel32>, !moe.weight<1x1x1x1xf32, panel32>) -> tensor<?x1xf32>
  call @print(%silu) : (tensor<?x1xf32>) -> ()
  %gelu = call @gelu(%x, %y, %gu, %w) : (tensor<?x1xf32>, tensor<?x1xf32>,
      !moe.weight<1x2x1x1xf32, panel32>, !moe.weight<1x1x1x1xf32, panel32>) -> tensor<?x1xf32>
  call @print(%gelu) : (tensor<?x1xf32>) -> ()
  %gelu_tanh = call @gelu_tanh(%x, %y, %gu, %w) : (tensor<?x1xf32>, tensor<?x1xf32>,
      !moe.weight<1x2x1x1xf32, panel32>, !moe.weight<1x1x1x1xf32, panel32>) -> tensor<?x1xf32>
  call @print(%gelu_tanh) : (tensor<?x1xf32>) -> ()
  %relu = call @relu(%x, %y, %gu, %w) : (tensor<?x1xf32>, tensor<?x1xf32>,
      !moe.weight<1x2x1x1xf32, panel32>, !moe.weight<1x1x1x1xf32, panel32>) -> tensor<?x1xf32>
  call @print(%relu) : (tensor<?x1xf32>) -> ()
  %mlp = call @mlp(%x, %y, %true, %w, %w) : (tensor<?x1xf32>, tensor<?x1xf32>, i1,
      !moe.weight<1x1x1x1xf32, panel32>, !moe.weight<1x1x1x1xf32, panel32>) -> tensor<?x1xf32>
  call @print(%mlp) : (tensor<?x1xf32>) -> ()
  return
}
