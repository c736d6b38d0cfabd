// RUN: moe-opt %s --moe-gpu-attach-target --moe-gpu-select-strategy | FileCheck %s
// RUN: moe-opt %s --moe-gpu-attach-target=levels=sm_90a --moe-gpu-select-strategy | FileCheck %s --check-prefix=HOPPER
// RUN: moe-opt %s --moe-gpu-attach-target=levels=sm_90a,sm_80 | FileCheck %s --check-prefix=BOTH
// RUN: not moe-opt %s --moe-gpu-attach-target=levels=sm_1 2>&1 | FileCheck %s --check-prefix=UNKNOWN
// RUN: sed 's/moe.compute = bf16/moe.compute = f32/' %s \
// RUN:   | not moe-opt - --moe-gpu-attach-target 2>&1 | FileCheck %s --check-prefix=F32

// HOPPER: moe.target = #moe.target<cuda, level = "sm_90a">
// HOPPER: gpu_tiles = [#moe.gpu_tile<cols = 128, rows = 8, k = 64, stages = 8, warps_cols = 8, warps_rows = 1, up_to = {{[0-9]+}}, unit = wgmma>
// HOPPER-SAME: #moe.gpu_tile<cols = 128, rows = 256, k = 64, stages = 4, warps_cols = 8, warps_rows = 1, unit = wgmma>]
// BOTH: moe.targets = [#moe.target<cuda, level = "sm_80">, #moe.target<cuda, level = "sm_90a">]
// BOTH-NOT: moe.target =
// UNKNOWN: expected a GPU architecture (`sm_80`, `sm_90a`), but got `sm_1`
// F32: expected moe.compute = bf16 for a GPU, but got 'f32'

// CHECK: moe.target = #moe.target<cuda, level = "sm_80">
// Rows that are f32 on a CPU are rounded here, and it is written down.
// CHECK: moe.grouped_matmul rows({{.*}} as bf16
// Few rows in narrow tiles with a long ring, some, many; the bounds rise and the last has none.
// CHECK-SAME: gpu_tiles = [#moe.gpu_tile<cols = 32, rows = 8, k = 64, stages = 8, warps_cols = 1, warps_rows = 1, up_to = {{[0-9]+}}>
// CHECK-SAME: #moe.gpu_tile<cols = 128, rows = 128, k = 32, stages = 4, warps_cols = 4, warps_rows = 2>]
func.func @f(%h: tensor<?x1024xf32>, %off: tensor<9xi32>, %r0: tensor<?x2048xbf16>,
    %w: !moe.weight<8x1x2048x1024xbf16, panel32>) -> tensor<?x2048xbf16>
    attributes {moe.entry = "experts", moe.compute = bf16} {
  %r = moe.grouped_matmul rows(%h : tensor<?x1024xf32>) groups(%off : tensor<9xi32>)
      weights(%w : !moe.weight<8x1x2048x1024xbf16, panel32>)
      outs(%r0 : tensor<?x2048xbf16>) -> tensor<?x2048xbf16>
  return %r : tensor<?x2048xbf16>
}

// The gate of a shared expert is a kernel of rows: there are no tiles to choose.
// CHECK-LABEL: func.func @gate
// CHECK: moe.grouped_matmul
// CHECK-NOT: gpu_tiles
// CHECK: return
func.func @gate(%h: tensor<?x1024xbf16>, %off: tensor<2xi32>, %r0: tensor<?x1xf32>,
    %w: !moe.weight<1x1x1x1024xbf16, panel32>) -> tensor<?x1xf32>
    attributes {moe.entry = "forward", moe.compute = bf16} {
  %r = moe.grouped_matmul rows(%h : tensor<?x1024xbf16>) groups(%off : tensor<2xi32>)
      weights(%w : !moe.weight<1x1x1x1024xbf16, panel32>)
      outs(%r0 : tensor<?x1xf32>) -> tensor<?x1xf32>
  return %r : tensor<?x1xf32>
}
