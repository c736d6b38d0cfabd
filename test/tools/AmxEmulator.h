/*===- AmxEmulator.h - AMX instructions in software ------------------------===//
//
// Part of moec, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// For tests on machines without AMX: amx_emulate() catches the signal of an unknown instruction and
// does what the instructions of AMX-TILE and AMX-BF16 do, as Intel's manual says, so that the very
// machine code that a user would run is executed here. C99 and C++, x86-64 Linux, one file.
//
// TDPBF16PS: per row and column the even and the odd products of the 32 k are two chains of fused
// multiply-adds from zero; their sum is added to the result. Round to nearest, subnormals as zero.
//
//===----------------------------------------------------------------------===*/

#ifndef MOE_TEST_AMXEMULATOR_H
#define MOE_TEST_AMXEMULATOR_H

#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

/* Every thread has tiles of its own. */
static __thread struct {
  int configured;
  uint16_t bytes[8]; /* of a row */
  uint8_t rows[8];
  uint8_t data[8][16][64];
} amx_state;
static uint64_t amx_configurations, amx_products; /* executed; not exact with several threads */

static float amx_flush(float v) { return fpclassify(v) == FP_SUBNORMAL ? v * 0.0f : v; }

static float amx_bf16(const uint8_t *p) {
  const uint32_t bits = (uint32_t)p[1] << 24 | (uint32_t)p[0] << 16;
  float v;
  memcpy(&v, &bits, 4);
  return amx_flush(v);
}

/* One element of TDPBF16PS: sum + products of `pairs` pairs of a row of a and of column n of b. */
static float amx_dot(float sum, const uint8_t *a, const uint8_t (*b)[64], int n, int pairs) {
  float even = 0, odd = 0;
  for (int k = 0; k < pairs; ++k) {
    even = amx_flush(fmaf(amx_bf16(a + 4 * k), amx_bf16(b[k] + 4 * n), even));
    odd = amx_flush(fmaf(amx_bf16(a + 4 * k + 2), amx_bf16(b[k] + 4 * n + 2), odd));
  }
  return amx_flush(amx_flush(sum) + amx_flush(even + odd));
}

static int64_t amx_register(const ucontext_t *c, int number) {
  static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
  return c->uc_mcontext.gregs[names[number]];
}

/* Executes the instruction at `code`; returns its length, 0 if it is none of AMX. */
static int amx_execute(const ucontext_t *context, const uint8_t *code) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) /* three bytes of VEX, map 0F 38 */
    return 0;
  const int x = (code[1] & 0x40) ? 0 : 8, base8 = (code[1] & 0x20) ? 0 : 8;
  const int prefix = code[2] & 3, operand = (~code[2] >> 3) & 15;
  const uint8_t opcode = code[3], modrm = code[4];
  const int mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  if (code[2] & 0x84) /* W, L */
    return 0;
  if (mod == 3) {
    if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) { /* tilerelease */
      memset(&amx_state, 0, sizeof amx_state);
    } else if (!amx_state.configured) {
      return 0;
    } else if (opcode == 0x49 && prefix == 3 && rm == 0) { /* tilezero */
      memset(amx_state.data[reg], 0, sizeof amx_state.data[reg]);
    } else if (opcode == 0x5c && prefix == 2 && operand < 8) { /* tdpbf16ps reg, rm, operand */
      if (reg == rm || reg == operand || rm == operand ||
          amx_state.bytes[rm] / 4 != amx_state.rows[operand] ||
          amx_state.rows[reg] != amx_state.rows[rm] ||
          amx_state.bytes[reg] != amx_state.bytes[operand])
        return 0; /* what the processor refuses, too */
      ++amx_products;
      for (int m = 0; m < amx_state.rows[reg]; ++m)
        for (int n = 0; n < amx_state.bytes[reg] / 4; ++n) {
          float sum;
          memcpy(&sum, &amx_state.data[reg][m][4 * n], 4);
          sum = amx_dot(sum, amx_state.data[rm][m], (const uint8_t (*)[64])amx_state.data[operand],
                        n, amx_state.bytes[rm] / 4);
          memcpy(&amx_state.data[reg][m][4 * n], &sum, 4);
        }
    } else {
      return 0;
    }
    return 5;
  }
  /* A memory operand: [base + index * scale + displacement]; tiles: the index is the stride. */
  int length = 5;
  int64_t address = 0, stride = 0;
  if (rm == 4) {
    const uint8_t sib = code[length++];
    const int index = (sib >> 3 & 7) + x, base = (sib & 7);
    if (base == 5 && mod == 0)
      return 0;
    address = amx_register(context, base + base8);
    if (index != 4)
      stride = (int64_t)((uint64_t)amx_register(context, index) << (sib >> 6));
  } else if (rm == 5 && mod == 0) { /* relative to the next instruction */
    address = (int64_t)(intptr_t)(code + length + 4);
  } else {
    address = amx_register(context, rm + base8);
  }
  if (mod == 1) {
    address += (int8_t)code[length++];
  } else if (mod == 2 || (rm == 5 && mod == 0)) {
    int32_t displacement;
    memcpy(&displacement, code + length, 4);
    address += displacement;
    length += 4;
  }
  uint8_t *memory = (uint8_t *)(intptr_t)address;
  if (opcode == 0x49 && prefix == 0 && reg == 0) { /* ldtilecfg */
    memory += stride;
    if (memory[0] != 1)
      return 0;
    memset(&amx_state, 0, sizeof amx_state);
    amx_state.configured = 1;
    ++amx_configurations;
    memcpy(amx_state.bytes, memory + 16, 16);
    memcpy(amx_state.rows, memory + 48, 8);
    for (int t = 0; t < 8; ++t)
      if (amx_state.rows[t] > 16 || amx_state.bytes[t] > 64)
        return 0;
  } else if (opcode == 0x4b && rm == 4 && amx_state.configured && prefix) {
    for (int m = 0; m < amx_state.rows[reg]; ++m) {
      if (prefix == 2) { /* tilestored */
        memcpy(memory + m * stride, amx_state.data[reg][m], amx_state.bytes[reg]);
      } else { /* tileloadd, tileloaddt1 */
        memset(amx_state.data[reg][m], 0, 64);
        memcpy(amx_state.data[reg][m], memory + m * stride, amx_state.bytes[reg]);
      }
    }
  } else {
    return 0;
  }
  return length;
}

static void amx_trap(int number, siginfo_t *info, void *pointer) {
  ucontext_t *context = (ucontext_t *)pointer;
  const int length =
      amx_execute(context, (const uint8_t *)(intptr_t)context->uc_mcontext.gregs[REG_RIP]);
  (void)number;
  (void)info;
  context->uc_mcontext.gregs[REG_RIP] += length;
  if (!length)
    signal(SIGILL, SIG_DFL); /* none of ours: it traps again, for good */
}

static void amx_emulate(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = amx_trap;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, NULL);
}

#endif
