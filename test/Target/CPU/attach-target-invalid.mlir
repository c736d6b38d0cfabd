// RUN: not moe-opt %s --moe-attach-target=levels=sse 2>&1 | FileCheck %s --check-prefix=UNKNOWN
// RUN: moe-opt %s --moe-attach-target=levels=x86-64-v4,x86-64-v3 | FileCheck %s --check-prefix=BOTH
// RUN: moe-opt %s --moe-attach-target | FileCheck %s --check-prefix=ALL

// UNKNOWN: expected a CPU level (`x86-64-v3`, `x86-64-v4`, `avx512-bf16`, `amx-bf16`), but got `sse`
// BOTH: moe.targets = [#moe.target<cpu, level = "x86-64-v3">, #moe.target<cpu, level = "x86-64-v4">]
// ALL: moe.targets = [#moe.target<cpu, level = "x86-64-v3">, #moe.target<cpu, level = "x86-64-v4">, #moe.target<cpu, level = "avx512-bf16">, #moe.target<cpu, level = "amx-bf16">]
module {
}
