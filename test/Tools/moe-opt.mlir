// RUN: moe-opt %s | moe-opt | FileCheck %s
// RUN: moe-opt --help | FileCheck %s --check-prefix=HELP

// HELP: moec optimizer driver

// CHECK-LABEL: func.func @kept
func.func @kept(%x: tensor<4xf32>) -> tensor<4xf32> {
  return %x : tensor<4xf32>
}
