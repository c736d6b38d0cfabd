/* Reads memory, and nothing else: the time a layer cannot go below when its weights are not in a
   cache. read_loop_open makes a buffer of huge pages; read_loop_run reads `bytes` of it from
   `offset` on, each thread one contiguous share, in the way that open found fastest (plain loads,
   or with a prefetch into L2 1 KB ahead). cc -O2 -march=native -pthread -shared -fPIC */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t vector __attribute__((vector_size(64)));
enum { AHEAD = 1024, MOST_THREADS = 256 };

static char *buffer;
static int prefetch;
static volatile uint64_t sink;
static struct {
  size_t offset, share;
  int ahead, threads;
  atomic_int ready;
} job;

static void sum(const char *from, size_t bytes, int ahead) {
  vector a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i < bytes; i += 256) {
    const vector *v = (const vector *)(const void *)(from + i);
    if (ahead)
      for (int line = 0; line < 256; line += 64)
        __builtin_prefetch(from + i + AHEAD + line, 0, 2);
    a += v[0], b += v[1], c += v[2], d += v[3];
  }
  a += b + c + d;
  sink = a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
}

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *work(void *index) {
  atomic_fetch_add(&job.ready, 1);
  while (atomic_load(&job.ready) < job.threads)
    ;
  sum(buffer + job.offset + job.share * (size_t)(uintptr_t)index, job.share, job.ahead);
  return NULL;
}

/* Seconds from when all threads run to when the last has read its share. The threads are made for
   it and end with it: one that went on polling would disturb whoever is timed next. */
static double read_all(size_t offset, size_t bytes, int threads, int ahead) {
  pthread_t others[MOST_THREADS];
  job.offset = offset, job.share = bytes / (size_t)threads / 256 * 256;
  job.ahead = ahead, job.threads = threads;
  atomic_store(&job.ready, 0);
  for (int i = 1; i < threads; ++i)
    pthread_create(&others[i], NULL, work, (void *)(uintptr_t)i);
  while (atomic_load(&job.ready) < threads - 1)
    ;
  const double begin = seconds();
  work(NULL);
  for (int i = 1; i < threads; ++i)
    pthread_join(others[i], NULL);
  return seconds() - begin;
}

/* 0, or -1 without memory. */
int read_loop_open(size_t bytes, int threads) {
  const size_t huge = (size_t)2 << 20;
  bytes = (bytes + AHEAD + 256 + huge - 1) / huge * huge;
  char *p = mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED || threads > MOST_THREADS)
    return -1;
  buffer = p + (-(uintptr_t)p & (huge - 1));
  madvise(buffer, bytes, MADV_HUGEPAGE);
  memset(buffer, 1, bytes);
  double best[2] = {1e9, 1e9};
  for (int pass = 0; pass < 6; ++pass) {
    const double took = read_all(0, bytes - huge, threads, pass % 2);
    if (took < best[pass % 2])
      best[pass % 2] = took;
  }
  prefetch = best[1] < best[0];
  return 0;
}

double read_loop_run(size_t offset, size_t bytes, int threads) {
  return read_all(offset, bytes, threads, prefetch);
}

int read_loop_prefetches(void) { return prefetch; }
