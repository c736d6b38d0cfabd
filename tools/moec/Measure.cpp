//===- Measure.cpp - what this machine can do at most ---------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// Intrinsics with a target attribute on each function: this file is compiled
// for the oldest machine and asks before it calls.
//
//===----------------------------------------------------------------------===//

#include "Measure.h"

#include "moe/Export/Module.h"
#include "moe/Runtime/Machine.h"
#include "moe/Target/CPU/Level.h"

#include "llvm/ADT/ScopeExit.h"

#include <algorithm>
#include <chrono>
#include <cpuid.h>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <immintrin.h>
#include <sched.h>
#include <set>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moec::tool {

//===----------------------------------------------------------------------===//
// What is there
//===----------------------------------------------------------------------===//

Instructions instructions() {
  Instructions out;
  auto runs = [](const char *level) {
    const moec_level_info *info = moec_find_level(level);
    return info && !moec_missing_feature(info);
  };
  out.avx2 = runs("x86-64-v3");
  out.avx512 = runs("x86-64-v4");
  uint32_t a = 0, b = 0, c = 0, d = 0, a1 = 0;
  if (!out.avx512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
    return out;
  uint32_t amxBits = d;
  if (__get_cpuid_count(7, 1, &a1, &b, &c, &d))
    out.bf16 = a1 >> 5 & 1;
  constexpr uint32_t amxBF16 = 1u << 22, amxTile = 1u << 24;
  if ((amxBits & amxBF16) && (amxBits & amxTile)) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr long requestPermission = 0x1023, tileData = 18;
    out.amx = (low >> 17 & 3) == 3 && ::syscall(SYS_arch_prctl, requestPermission, tileData) == 0;
  }
  return out;
}

const char *missingFeature(const mlir::moe::CPULevel &level) {
  const moec_level_info *info = moec_find_level(level.name.str().c_str());
  if (!info)
    return "a runtime that knows it";
  if (const char *missing = moec_missing_feature(info))
    return missing;
  Instructions has = instructions();
  if (level.features.contains("avx512bf16") && !has.bf16)
    return "AVX512-BF16";
  if (level.features.contains("amx-bf16") && !has.amx)
    return "AMX-BF16, or the system's permission to use it";
  return nullptr;
}

static std::string firstLine(const std::string &path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

static std::vector<int> allowedCPUs() {
  std::vector<int> out;
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; ++i)
      if (CPU_ISSET(i, &set))
        out.push_back(i);
  return out;
}

CPUs affinity() {
  std::set<std::string> cores;
  std::vector<int> cpus = allowedCPUs();
  for (int cpu : cpus) {
    std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    std::string core = firstLine(base + "core_id");
    cores.insert(core.empty() ? "cpu" + std::to_string(cpu)
                              : firstLine(base + "physical_package_id") + ":" + core);
  }
  return {static_cast<int>(cpus.size()), static_cast<int>(cores.size())};
}

uint64_t availableMemory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  uint64_t kilobytes;
  while (file >> key >> kilobytes && std::getline(file, unit))
    if (key == "MemAvailable:")
      return kilobytes * 1024;
  return 0;
}

static std::string cpuName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line))
    if (llvm::StringRef(line).starts_with("model name"))
      return llvm::StringRef(line).split(':').second.trim().str();
  return "unknown";
}

MachineConstants describeMachine() {
  MachineConstants out;
  out.version = versionString().str();
  out.cpu = cpuName();
  out.threads = moec_cpus_allowed();
  for (const mlir::moe::CPULevel &level : mlir::moe::cpuLevels()) {
    if (!missingFeature(level))
      out.levels.push_back(level.name.str());
  }
  std::set<std::string> last; // which CPUs share an L3, one text for each instance
  for (int cpu : allowedCPUs())
    for (int i = 0; i < 8; ++i) {
      std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cache/index" +
                         std::to_string(i) + "/";
      std::string level = firstLine(base + "level"), type = firstLine(base + "type");
      std::string size = firstLine(base + "size");
      llvm::StringRef text = size;
      uint64_t bytes = 0;
      uint64_t unit = text.consume_back("K") ? 1024 : text.consume_back("M") ? 1048576 : 1;
      if (level.empty() || type == "Instruction" || text.getAsInteger(10, bytes))
        continue;
      bytes *= unit;
      if (level == "1") {
        out.l1d = static_cast<int64_t>(bytes);
        if (int64_t line;
            !llvm::StringRef(firstLine(base + "coherency_line_size")).getAsInteger(10, line))
          out.line = line;
      } else if (level == "2") {
        out.l2 = static_cast<int64_t>(bytes);
      } else if (level == "3") {
        out.l3 = static_cast<int64_t>(bytes);
        last.insert(firstLine(base + "shared_cpu_list"));
      }
    }
  out.l3Total = out.l3 * static_cast<int64_t>(last.size());
  return out;
}

//===----------------------------------------------------------------------===//
// Arithmetic: independent chains in registers. Each returns the FLOPs it did.
//===----------------------------------------------------------------------===//

// Twelve chains cover latency x ports of every core so far, and leave room in 16 registers; "v" is
// the constraint for all 32 registers of AVX-512.
#define MOEC_CHAINS(NAME, TARGET, COUNT, CONSTRAINT, VECTOR, INIT, STEP, STORE, FLOPS)             \
  __attribute__((target(TARGET), noinline)) static double NAME(int64_t n) {                        \
    VECTOR chain[COUNT];                                                                           \
    for (int i = 0; i < COUNT; ++i)                                                                \
      chain[i] = INIT;                                                                             \
    for (int64_t k = 0; k < n; ++k) {                                                              \
      _Pragma("GCC unroll 24") for (int i = 0; i < COUNT; ++i) chain[i] = STEP;                    \
      /* Keeps the loop: no value may be known after it. */                                        \
      _Pragma("GCC unroll 24") for (int i = 0; i < COUNT;                                          \
                                    ++i) __asm__ volatile("" : "+" CONSTRAINT(chain[i]));          \
    }                                                                                              \
    volatile float sink[COUNT];                                                                    \
    float out[16];                                                                                 \
    for (int i = 0; i < COUNT; ++i) {                                                              \
      STORE;                                                                                       \
      sink[i] = out[0];                                                                            \
    }                                                                                              \
    (void)sink;                                                                                    \
    return static_cast<double>(n) * COUNT * FLOPS;                                                 \
  }

MOEC_CHAINS(fma128, "avx2,fma", 12, "x", __m128, _mm_set1_ps(1),
            _mm_fmadd_ps(chain[i], _mm_set1_ps(0.5f), _mm_set1_ps(0.25f)),
            _mm_storeu_ps(out, chain[i]), 8)
MOEC_CHAINS(fma256, "avx2,fma", 12, "x", __m256, _mm256_set1_ps(1),
            _mm256_fmadd_ps(chain[i], _mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f)),
            _mm256_storeu_ps(out, chain[i]), 16)

MOEC_CHAINS(fma512, "avx512f", 24, "v", __m512, _mm512_set1_ps(1),
            _mm512_fmadd_ps(chain[i], _mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f)),
            _mm512_storeu_ps(out, chain[i]), 32)

// bf16 operands of 0x3c3c, 0.0115: sums stay finite for any count (they grow by 2.6e-4 a step).
MOEC_CHAINS(dot256, "avx512f,avx512vl,avx512bf16", 24, "v", __m256, _mm256_set1_ps(1),
            _mm256_dpbf16_ps(chain[i], (__m256bh)_mm256_set1_epi16(0x3c3c),
                             (__m256bh)_mm256_set1_epi16(0x3c3c)),
            _mm256_storeu_ps(out, chain[i]), 32)
MOEC_CHAINS(dot512, "avx512f,avx512bf16", 24, "v", __m512, _mm512_set1_ps(1),
            _mm512_dpbf16_ps(chain[i], (__m512bh)_mm512_set1_epi16(0x3c3c),
                             (__m512bh)_mm512_set1_epi16(0x3c3c)),
            _mm512_storeu_ps(out, chain[i]), 64)

__attribute__((target("amx-tile,amx-bf16"), noinline)) static double tiles(int64_t n) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columnBytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.columnBytes[i] = 64;
    config.rows[i] = 16;
  }
  alignas(64) static const uint8_t zeros[1024] = {};
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, zeros, 64);
  _tile_loadd(5, zeros, 64);
  _tile_loadd(6, zeros, 64);
  _tile_loadd(7, zeros, 64);
  for (int64_t k = 0; k < n; ++k) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(n) * 4 * 16 * 16 * 64;
}

//===----------------------------------------------------------------------===//
// Reading memory
//===----------------------------------------------------------------------===//

/// Reads [from, from + bytes), a multiple of 256; prefetches `ahead` bytes before it reads
/// (0: not), at most to the end of the buffer and one block more.
__attribute__((target("avx2"), noinline)) static void read256(const char *from, int64_t bytes,
                                                              int64_t ahead) {
  __m256i sum[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    if (ahead)
      for (int line = 0; line < 256; line += 64)
        _mm_prefetch(from + i + ahead + line, _MM_HINT_T1);
    for (int j = 0; j < 8; ++j)
      sum[j % 4] = _mm256_add_epi32(
          sum[j % 4], _mm256_load_si256(reinterpret_cast<const __m256i *>(from + i + 32 * j)));
  }
  volatile int sink = _mm256_extract_epi32(
      _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3])), 0);
  (void)sink;
}

__attribute__((target("avx512f"), noinline)) static void read512(const char *from, int64_t bytes,
                                                                 int64_t ahead) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    if (ahead)
      for (int line = 0; line < 256; line += 64)
        _mm_prefetch(from + i + ahead + line, _MM_HINT_T1);
    for (int j = 0; j < 4; ++j)
      sum[j] = _mm512_add_epi32(sum[j], _mm512_load_si512(from + i + 64 * j));
  }
  volatile int sink = _mm512_reduce_add_epi32(
      _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
  (void)sink;
}

//===----------------------------------------------------------------------===//
// Timing
//===----------------------------------------------------------------------===//

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

namespace {
/// Runs `body(lane, lanes)` on the first `lanes` lanes of a pool and gives seconds.
template <typename Body> double timed(moec_executor *pool, int32_t lanes, Body body) {
  struct Job {
    Body &body;
    int32_t lanes;
  } job = {body, lanes};
  double begin = now();
  if (lanes == 1)
    body(0, 1);
  else
    pool->run(
        pool->self, lanes,
        [](void *arg, int32_t lane) {
          Job &job = *static_cast<Job *>(arg);
          job.body(lane, job.lanes);
        },
        &job);
  return now() - begin;
}
} // namespace

/// The best of five runs of about 10 ms each: another process can only make it slower.
static double bestFlops(moec_executor *pool, int32_t lanes, double (*loop)(int64_t)) {
  int64_t n = 1000;
  for (double took = 0; took < 0.002; n *= 2)
    took = timed(pool, 1, [&](int32_t, int32_t) { loop(n); });
  n *= 2;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<double> work(lanes);
    double took = timed(pool, lanes, [&](int32_t lane, int32_t) { work[lane] = loop(n); });
    double sum = 0;
    for (double w : work)
      sum += w;
    best = std::max(best, sum / took);
  }
  return best;
}

llvm::Error measureMachine(MachineConstants &machine, moec_executor *pool, uint64_t bandwidth) {
  Instructions has = instructions();
  machine.threads = pool->lanes;
  auto flops = [&](const char *name, double (*loop)(int64_t)) {
    machine.flops[name] = {bestFlops(pool, pool->lanes, loop), bestFlops(pool, 1, loop)};
  };
  if (has.avx2) {
    flops("fma_f32_128", fma128);
    flops("fma_f32_256", fma256);
  }
  if (has.avx512)
    flops("fma_f32_512", fma512);
  if (has.bf16) {
    flops("dpbf16_256", dot256);
    flops("dpbf16_512", dot512);
  }
  if (has.amx)
    flops("amx_bf16", tiles);

  // Larger than the caches by far, but never so large that the system starts to swap.
  constexpr uint64_t huge = 2 << 20;
  uint64_t bytes = bandwidth ? bandwidth
                             : std::clamp<uint64_t>(4 * static_cast<uint64_t>(machine.l3Total),
                                                    uint64_t(512) << 20, uint64_t(1536) << 20);
  if (uint64_t room = availableMemory())
    bytes = std::min(bytes, room / 8);
  bytes = std::max<uint64_t>(bytes / huge * huge, huge);
  size_t mapped = bytes + huge + 4096; // prefetches run past the end
  void *memory =
      ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    return makeError(ErrorCode::MEMORY, "read bandwidth", llvm::Twine(mapped) + " bytes", "none");
  llvm::scope_exit unmap([&] { ::munmap(memory, mapped); });
  char *base = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(memory) + huge - 1) &
                                        ~uintptr_t(huge - 1));
  auto *read = has.avx512 ? read512 : has.avx2 ? read256 : nullptr;
  for (bool large : {false, true}) {
    if (large)
      ::madvise(base, bytes, MADV_DONTNEED); // the small pages go back
    if (::madvise(base, bytes, large ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) && large)
      break; // a kernel without huge pages
    timed(pool, pool->lanes, [&](int32_t lane, int32_t lanes) {
      uint64_t first = bytes / 4096 * lane / lanes, last = bytes / 4096 * (lane + 1) / lanes;
      memset(base + first * 4096, 1, (last - first) * 4096);
    });
    for (int64_t ahead : {int64_t(0), int64_t(1024)}) {
      if (!read)
        break;
      auto rate = [&](int32_t lanes) {
        double best = 0;
        for (int round = 0; round < 4; ++round)
          best = std::max(best, bytes / timed(pool, lanes, [&](int32_t lane, int32_t all) {
                                  uint64_t first = bytes / 4096 * lane / all,
                                           end = bytes / 4096 * (lane + 1) / all;
                                  read(base + first * 4096,
                                       static_cast<int64_t>((end - first) * 4096), ahead);
                                }));
        return best;
      };
      const char *name = large ? ahead ? "huge_prefetch" : "huge" : ahead ? "prefetch" : "plain";
      machine.read[name] = {rate(pool->lanes), rate(1)};
    }
  }

  double best = 1;
  for (int round = 0; round < 20; ++round) {
    double begin = now();
    for (int i = 0; i < 200; ++i)
      timed(pool, pool->lanes, [](int32_t, int32_t) {});
    best = std::min(best, (now() - begin) / 200);
  }
  machine.forkNs = best * 1e9;
  return llvm::Error::success();
}

ReadProbe::ReadProbe(const MachineConstants &machine, moec_executor *pool) : pool(pool) {
  constexpr size_t huge = 2 << 20;
  uint64_t wanted = std::max<uint64_t>(4 * static_cast<uint64_t>(machine.l3Total), 256u << 20);
  if (uint64_t room = availableMemory())
    wanted = std::min(wanted, room / 8);
  bytes = wanted / huge * huge;
  mapped = bytes + huge + 4096; // prefetches run past the end
  memory = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (!bytes || memory == MAP_FAILED) {
    memory = nullptr;
    return;
  }
  base = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(memory) + huge - 1) &
                                  ~uintptr_t(huge - 1));
  (void)::madvise(base, bytes, MADV_HUGEPAGE);
  memset(base, 1, bytes);
}

ReadProbe::~ReadProbe() {
  if (memory)
    ::munmap(memory, mapped);
}

double ReadProbe::pass() {
  Instructions has = instructions();
  auto *read = has.avx512 ? read512 : has.avx2 ? read256 : nullptr;
  if (!memory || !read)
    return 0;
  return bytes / timed(pool, pool->lanes, [&](int32_t lane, int32_t lanes) {
           size_t first = bytes / 4096 * lane / lanes, end = bytes / 4096 * (lane + 1) / lanes;
           read(base + first * 4096, static_cast<int64_t>((end - first) * 4096), 1024);
         });
}

} // namespace moec::tool
