// RUN: not moe-opt %s --moe-attach-target=levels=amx-bf16 2>&1 | FileCheck %s --check-prefix=AMX
// RUN: not moe-opt %s --moe-attach-target=levels=avx512-bf16 2>&1 | FileCheck %s --check-prefix=BF16
// RUN: not moe-opt %s --moe-attach-target=levels=sse 2>&1 | FileCheck %s --check-prefix=UNKNOWN
// RUN: moe-opt %s --moe-attach-target=levels=x86-64-v4,x86-64-v3 | FileCheck %s --check-prefix=BOTH
// RUN: moe-opt %s --moe-attach-target | FileCheck %s --check-prefix=BOTH

// AMX: expected a CPU level that is built (`x86-64-v3`, `x86-64-v4`), but got `amx-bf16`: level `amx-bf16` is known but not built yet
// BF16: expected a CPU level that is built (`x86-64-v3`, `x86-64-v4`), but got `avx512-bf16`
// UNKNOWN: expected a CPU level (`x86-64-v3`, `x86-64-v4`), but got `sse`
// BOTH: moe.targets = [#moe.target<cpu, level = "x86-64-v3">, #moe.target<cpu, level = "x86-64-v4">]
module {
}
