#include "Internal.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- CPU levels ---- */

static const moec_level_info levels[] = {
    {"x86-64-v3", 3, 1}, {"x86-64-v4", 4, 1}, {"avx512-bf16", 5, 1}, {"amx-bf16", 6, 1}};

const moec_level_info *moec_find_level(const char *name) {
  for (size_t i = 0; i < sizeof levels / sizeof *levels; ++i)
    if (!strcmp(name, levels[i].name))
      return &levels[i];
  return NULL;
}

typedef struct {
  uint32_t c1, b7, d7, c80; /* ecx of leaf 1, ebx, edx of leaf 7, ecx of leaf 0x80000001 */
  uint32_t a71;             /* eax of leaf 7, subleaf 1 */
  uint32_t xcr0;            /* register state that the system saves */
  bool amd;                 /* AMD, or Hygon, which makes AMD's cores */
} features;

static features read_features(void) {
  features f = {0, 0, 0, 0, 0, 0, false};
  uint32_t a, b, c, d;
  if (__get_cpuid(0, &a, &b, &c, &d))
    f.amd = b == 0x68747541u /* "Auth" */ || b == 0x6f677948u /* "Hygo" */;
  if (__get_cpuid(1, &a, &b, &c, &d))
    f.c1 = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d))
    f.b7 = b, f.d7 = d;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d))
    f.a71 = a;
  if (__get_cpuid(0x80000001u, &a, &b, &c, &d))
    f.c80 = c;
  if (f.c1 & (1u << 27)) { /* OSXSAVE: xgetbv may be executed */
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    f.xcr0 = lo;
  }
  return f;
}

const char *moec_missing_feature(const moec_level_info *level) {
  const features f = read_features();
  if (level->rank >= 3) {
    if (!(f.c1 & (1u << 28)))
      return "AVX";
    if ((f.xcr0 & 6u) != 6u)
      return "AVX registers enabled by the operating system";
    if (!(f.b7 & (1u << 5)))
      return "AVX2";
    if (!(f.c1 & (1u << 12)))
      return "FMA";
    if (!(f.c1 & (1u << 29)))
      return "F16C";
    if (!(f.c1 & (1u << 22)))
      return "MOVBE";
    if (!(f.c1 & (1u << 23)))
      return "POPCNT";
    if (!(f.b7 & (1u << 3)))
      return "BMI1";
    if (!(f.b7 & (1u << 8)))
      return "BMI2";
    if (!(f.c80 & (1u << 5)))
      return "LZCNT";
  }
  if (level->rank >= 4) {
    if (!(f.b7 & (1u << 16)))
      return "AVX-512F";
    if ((f.xcr0 & 0xe6u) != 0xe6u)
      return "AVX-512 registers enabled by the operating system";
    if (!(f.b7 & (1u << 30)))
      return "AVX-512BW";
    if (!(f.b7 & (1u << 28)))
      return "AVX-512CD";
    if (!(f.b7 & (1u << 17)))
      return "AVX-512DQ";
    if (!(f.b7 & (1u << 31)))
      return "AVX-512VL";
  }
  if (level->rank >= 5 && !(f.a71 & (1u << 5)))
    return "AVX512-BF16";
#ifndef MOEC_EMULATE_AMX /* test/tools/amx_run.c executes these instructions in software */
  if (level->rank >= 6) {
    if (!(f.d7 & (1u << 24)))
      return "AMX-TILE";
    if (!(f.d7 & (1u << 22)))
      return "AMX-BF16";
    if ((f.xcr0 & 0x60000u) != 0x60000u)
      return "AMX tiles enabled by the operating system";
    /* Process-wide, and for ever: signal frames get room for the tiles. */
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA))
      return "AMX tiles that the operating system permits";
  }
#endif
  return NULL;
}

const char *moec_slow_feature(const moec_level_info *level) {
  /* Zen 4 issues one vdpbf16ps a cycle, twice the products of an FMA. Intel's cores issue one every
     second cycle or slower, where widened weights and FMA are as fast or faster. */
  if (level->rank == 5 && !read_features().amd)
    return "AVX512-BF16 at twice the rate of FMA";
  return NULL;
}

bool moec_has_avx2(void) {
  static atomic_int known; /* 0: not asked yet, 1: no, 2: yes */
  int v = atomic_load_explicit(&known, memory_order_relaxed);
  if (!v) {
    v = moec_missing_feature(&levels[0]) ? 1 : 2;
    atomic_store_explicit(&known, v, memory_order_relaxed);
  }
  return v == 2;
}

/* ---- CPUs this thread may use ---- */

/* The first bytes of a small file of the kernel; returns their number, -1 if there is none. */
static int slurp(const char *path, char *buffer, int size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return -1;
  ssize_t n = read(fd, buffer, (size_t)size - 1);
  close(fd);
  if (n < 0)
    return -1;
  buffer[n] = 0;
  return (int)n;
}

static int64_t cpus_of(int64_t quota, int64_t period) {
  if (quota <= 0 || period <= 0)
    return INT32_MAX;
  /* Rounded down: a thread more than the quota is throttled while others wait for it. */
  int64_t n = quota / period;
  return n < 1 ? 1 : n;
}

/* The smallest CPU quota on the way from this process's control group to the root. */
static int64_t quota_cpus(void) {
  char text[4096], path[4608], value[128];
  int64_t best = INT32_MAX;
  char group[4096] = "", *v2 = NULL;
  if (slurp("/proc/self/cgroup", text, sizeof text) > 0) {
    v2 = !strncmp(text, "0::", 3) ? text : strstr(text, "\n0::");
    if (v2) {
      v2 += *v2 == '\n' ? 4 : 3;
      size_t n = strcspn(v2, "\n");
      memcpy(group, v2, n);
      group[n] = 0;
    }
  }
  for (;;) {
    size_t n = strlen(group);
    while (n && group[n - 1] == '/')
      group[--n] = 0;
    snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", group);
    if (slurp(path, value, sizeof value) > 0 && value[0] != 'm') { /* "max 100000": none */
      char *end;
      int64_t quota = strtoll(value, &end, 10), period = strtoll(end, NULL, 10);
      int64_t c = cpus_of(quota, period);
      best = c < best ? c : best;
    }
    if (!n)
      break;
    char *slash = strrchr(group, '/');
    if (!slash)
      break;
    *slash = 0;
  }
  if (slurp("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", value, sizeof value) > 0) { /* version 1 */
    int64_t quota = strtoll(value, NULL, 10);
    if (quota > 0 && slurp("/sys/fs/cgroup/cpu/cpu.cfs_period_us", value, sizeof value) > 0) {
      int64_t c = cpus_of(quota, strtoll(value, NULL, 10));
      best = c < best ? c : best;
    }
  }
  return best;
}

int32_t moec_cpus_allowed(void) {
  int64_t n = 0;
  for (int cpus = 1024; cpus <= 1 << 16; cpus *= 2) { /* EINVAL: the kernel's mask is larger */
    cpu_set_t *set = CPU_ALLOC((size_t)cpus);
    if (!set)
      break;
    size_t bytes = CPU_ALLOC_SIZE((size_t)cpus);
    int r = sched_getaffinity(0, bytes, set);
    if (!r)
      n = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    if (!r || errno != EINVAL)
      break;
  }
  int64_t q = quota_cpus();
  n = n < q ? n : q;
  return n < 1 ? 1 : n > MOEC_MAX_LANES ? MOEC_MAX_LANES : (int32_t)n;
}

/* ---- memory ---- */

static size_t page_round(size_t bytes) {
  return (bytes + MOEC_PAGE - 1) & ~(size_t)(MOEC_PAGE - 1);
}

void *moec_map_memory(size_t bytes) {
  if (bytes > SIZE_MAX / 2)
    return NULL;
  bytes = page_round(bytes ? bytes : 1);
  size_t slack = bytes >= MOEC_HUGE ? MOEC_HUGE : 0;
  char *p = mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    return NULL;
  if (slack) { /* keep the part that begins at a huge page */
    size_t head = (size_t)(-(uintptr_t)p & (MOEC_HUGE - 1));
    if (head)
      munmap(p, head);
    if (slack - head)
      munmap(p + head + bytes, slack - head);
    p += head;
    (void)madvise(p, bytes, MADV_HUGEPAGE); /* a hint: works without */
  }
  return p;
}

void moec_unmap_memory(void *p, size_t bytes) {
  if (p)
    munmap(p, page_round(bytes ? bytes : 1));
}
