// RUN: moe-opt %s --allow-unregistered-dialect --split-input-file --verify-diagnostics

// expected-error @below {{expected cols to be a multiple of 128, but got 96 (C1)}}
"test.a"() {a = #moe.gpu_tile<cols = 96, rows = 8, k = 32, stages = 4, warps_cols = 4, warps_rows = 1>} : () -> ()

// -----

// expected-error @below {{expected rows to be 16 or a multiple of 32, but got 24 (C2)}}
"test.a"() {a = #moe.gpu_tile<cols = 64, rows = 24, k = 32, stages = 4, warps_cols = 2, warps_rows = 2>} : () -> ()

// -----

// expected-error @below {{expected k to be 32 or 64, but got 48 (C3)}}
"test.a"() {a = #moe.gpu_tile<cols = 64, rows = 16, k = 48, stages = 4, warps_cols = 2, warps_rows = 1>} : () -> ()

// -----

// expected-error @below {{expected 2 to 8 stages, but got 1 (C4)}}
"test.a"() {a = #moe.gpu_tile<cols = 64, rows = 16, k = 32, stages = 1, warps_cols = 2, warps_rows = 1>} : () -> ()

// -----

// expected-error @below {{expected 1 to 8 warps, but got 4 x 4 (C5)}}
"test.a"() {a = #moe.gpu_tile<cols = 128, rows = 64, k = 32, stages = 4, warps_cols = 4, warps_rows = 4>} : () -> ()

// -----

// expected-error @below {{expected at most 163840 bytes of shared memory, but got 262144 (C6)}}
"test.a"() {a = #moe.gpu_tile<cols = 128, rows = 128, k = 64, stages = 8, warps_cols = 4, warps_rows = 2>} : () -> ()

// -----

// expected-error @below {{expected at most 255 registers a thread, but got at least 344 (C7)}}
"test.a"() {a = #moe.gpu_tile<cols = 128, rows = 64, k = 32, stages = 4, warps_cols = 1, warps_rows = 1>} : () -> ()

// -----

// expected-error @below {{expected up_to not to be negative, but got -1 (C8)}}
"test.a"() {a = #moe.gpu_tile<cols = 64, rows = 16, k = 32, stages = 4, warps_cols = 2, warps_rows = 1, up_to = -1>} : () -> ()

// -----

// expected-error @below {{expected cols = 128, k = 64, warps_cols = 8 and warps_rows = 1 with wgmma, but got 128, 32, 8 and 1 (C9)}}
"test.a"() {a = #moe.gpu_tile<cols = 128, rows = 64, k = 32, stages = 4, warps_cols = 8, warps_rows = 1, unit = wgmma>} : () -> ()

// -----

// expected-error @below {{expected rows to be a multiple of 8 up to 256 with wgmma, but got 264 (C9)}}
"test.a"() {a = #moe.gpu_tile<cols = 128, rows = 264, k = 64, stages = 2, warps_cols = 8, warps_rows = 1, unit = wgmma>} : () -> ()

// -----

// expected-error @below {{expected at most 232448 bytes of shared memory, but got 264272 (C9)}}
"test.a"() {a = #moe.gpu_tile<cols = 128, rows = 256, k = 64, stages = 5, warps_cols = 8, warps_rows = 1, unit = wgmma>} : () -> ()
