/* Executors, the pool, fork, chunks, workspaces, E-BUSY, no allocation in moec_run: always the same
   bits. */
#include "helpers.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- allocations are counted ---- */

#ifndef NO_COUNTING
static int counting;
static long allocations;
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *malloc(size_t n) {
  __atomic_fetch_add(&allocations, counting, __ATOMIC_RELAXED);
  return __libc_malloc(n);
}
void *calloc(size_t n, size_t m) {
  __atomic_fetch_add(&allocations, counting, __ATOMIC_RELAXED);
  return __libc_calloc(n, m);
}
void *realloc(void *p, size_t n) {
  __atomic_fetch_add(&allocations, counting, __ATOMIC_RELAXED);
  return __libc_realloc(p, n);
}
#endif

/* ---- one layer, one set of tokens ---- */

enum { T = 50, H = 40, E = 5, K = 2 };
static float x[T * H], want[T * H];
static int32_t want_ids[T * K];

static int run(moec_context *c, float *y, int32_t *ids, int32_t *counts, float *logits) {
  tensor tx, ty, ti, tc, tl;
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&tx, x, F32, T, H);
  call.y = make2(&ty, y, F32, T, H);
  if (ids)
    call.experts_out = make2(&ti, ids, I32, T, K);
  if (counts)
    call.counts_out = make(&tc, counts, I32, E + 1, -1, -1);
  if (logits)
    call.logits_out = make2(&tl, logits, F32, T, E);
  return moec_run(c, 0, &call, &err);
}

static void check_same(moec_context *c) {
  float y[T * H], logits[T * E];
  int32_t ids[T * K], counts[E + 1];
  memset(y, 0xff, sizeof y);
  OK(run(c, y, NULL, NULL, NULL));
  CHECK(!memcmp(y, want, sizeof y));
  memset(y, 0xff, sizeof y);
  memset(logits, 0xff, sizeof logits);
  OK(run(c, y, ids, counts, logits)); /* route, then experts */
  CHECK(!memcmp(y, want, sizeof y));
  CHECK(!memcmp(ids, want_ids, sizeof ids));
  int32_t sum = 0;
  for (int e = 0; e <= E; ++e)
    sum += counts[e];
  CHECK(sum == T * K && counts[E] == 0);
  for (int i = 0; i < T * E; ++i)
    CHECK(logits[i] == logits[i]);
}

static moec_context *context(moec_model *m, const moec_executor *e, int64_t max_tokens) {
  moec_context_options o;
  MOEC_INIT(o);
  o.executor = e;
  o.max_tokens = max_tokens;
  moec_context *c = NULL;
  OK(moec_context_create(m, &o, &c, &err));
  return c;
}

static moec_executor *pool(int threads, int spin_us) {
  moec_pool_options o;
  MOEC_INIT(o);
  o.threads = threads;
  o.spin_us = spin_us;
  moec_executor *e = NULL;
  OK(moec_pool_create(&o, &e, &err));
  return e;
}

/* ---- executors of a host ---- */

typedef struct {
  void (*task)(void *, int32_t);
  void *arg;
  int32_t i;
} job;
static void *job_main(void *p) {
  job *j = (job *)p;
  j->task(j->arg, j->i);
  return NULL;
}
/* A thread for each task: all run together. */
static void run_threads(void *self, int32_t n, void (*task)(void *, int32_t), void *arg) {
  pthread_t threads[16];
  job jobs[16];
  ++*(int *)self;
  for (int32_t i = 0; i < n; ++i) {
    jobs[i].task = task;
    jobs[i].arg = arg;
    jobs[i].i = i;
    pthread_create(&threads[i], NULL, job_main, &jobs[i]);
  }
  for (int32_t i = 0; i < n; ++i)
    pthread_join(threads[i], NULL);
}
/* One after the other, the last first: nothing runs together. */
static void run_backwards(void *self, int32_t n, void (*task)(void *, int32_t), void *arg) {
  ++*(int *)self;
  for (int32_t i = n - 1; i >= 0; --i)
    task(arg, i);
}

static void executors(moec_model *m) {
  int runs = 0;
  moec_executor e;
  MOEC_INIT(e);
  e.self = &runs;
  e.lanes = 3;
  e.gang = 1;
  e.run = run_threads;
  moec_context *c = context(m, &e, 512);
  float y[T * H];
  OK(run(c, y, NULL, NULL, NULL));
  CHECK(runs == 1); /* all stages in one run() */
  CHECK(!memcmp(y, want, sizeof y));
  check_same(c);
  moec_context_destroy(c);
  e.gang = 0;
  e.run = run_backwards;
  c = context(m, &e, 512);
  runs = 0;
  OK(run(c, y, NULL, NULL, NULL));
  CHECK(runs == 3); /* one run() for each stage */
  CHECK(!memcmp(y, want, sizeof y));
  check_same(c);
  moec_context_destroy(c);

  moec_context_options o;
  MOEC_INIT(o);
  o.executor = &e;
  e.lanes = 0;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "executor.lanes");
  e.lanes = 2;
  e.gang = 2;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "executor.gang");
  e.gang = 1;
  e.run = NULL;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "executor.run");
  e.struct_size = 0;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "executor.struct_size");
  CHECK(!c);
}

/* ---- a second call in one context ---- */

static moec_context *busy_context;
static int busy_result;
static void run_twice(void *self, int32_t n, void (*task)(void *, int32_t), void *arg) {
  float y[T * H];
  (void)self;
  busy_result = run(busy_context, y, NULL, NULL, NULL);
  for (int32_t i = 0; i < n; ++i)
    task(arg, i);
}
static void busy(moec_model *m) {
  moec_executor e;
  MOEC_INIT(e);
  e.lanes = 2;
  e.run = run_twice;
  busy_context = context(m, &e, 512);
  float y[T * H];
  OK(run(busy_context, y, NULL, NULL, NULL));
  CHECK(busy_result == MOEC_E_BUSY);
  CHECK(!memcmp(y, want, sizeof y));
  moec_context_destroy(busy_context);
}

/* ---- the pool ---- */

static int32_t hits[64];
static void count_task(void *arg, int32_t i) {
  (void)arg;
  __atomic_fetch_add(&hits[i], 1, __ATOMIC_RELAXED);
}

static moec_executor *shared;
static moec_model *shared_model;
static void *caller(void *arg) {
  moec_context_options o;
  MOEC_INIT(o);
  o.executor = shared;
  o.max_tokens = 16;
  moec_context *c = NULL;
  float y[T * H];
  moec_error mine;
  if (moec_context_create(shared_model, &o, &c, &mine))
    __atomic_fetch_add((int *)arg, 1, __ATOMIC_RELAXED);
  for (int i = 0; i < 200; ++i) {
    tensor tx, ty;
    moec_call call;
    MOEC_INIT(call);
    call.x = make2(&tx, x, F32, T, H);
    call.y = make2(&ty, y, F32, T, H);
    if (moec_run(c, 0, &call, &mine) || memcmp(y, want, sizeof y))
      __atomic_fetch_add((int *)arg, 1, __ATOMIC_RELAXED);
  }
  moec_context_destroy(c);
  return NULL;
}

static void pools(moec_model *m) {
  static const int threads[] = {1, 2, 7};
  for (int i = 0; i < 3; ++i)
    for (int spin = -1; spin <= 50; spin += 51) {
      moec_executor *e = pool(threads[i], spin);
      CHECK(e->lanes == threads[i] && e->gang == 1);
      for (int n = 1; n <= 20; ++n) { /* more tasks than lanes, too */
        memset(hits, 0, sizeof hits);
        e->run(e->self, n, count_task, NULL);
        for (int j = 0; j < 64; ++j)
          CHECK(hits[j] == (j < n));
      }
      moec_context *c = context(m, e, 512), *small = context(m, e, 7);
      for (int j = 0; j < 20; ++j) {
        check_same(c);
        check_same(small);
      }
      moec_context_destroy(c);
      moec_context_destroy(small);
      moec_pool_destroy(e);
    }

  /* Callers queue. */
  shared = pool(2, 0);
  shared_model = m;
  int wrong = 0;
  pthread_t callers[4];
  for (int i = 0; i < 4; ++i)
    pthread_create(&callers[i], NULL, caller, &wrong);
  for (int i = 0; i < 4; ++i)
    pthread_join(callers[i], NULL);
  CHECK(!wrong);
  moec_pool_destroy(shared);

  moec_executor *e = pool(0, 0); /* as many as this process may use */
  CHECK(e->lanes >= 1 && e->lanes <= sysconf(_SC_NPROCESSORS_CONF));
  moec_pool_destroy(e);
  OK(moec_pool_create(NULL, &e, &err));
  moec_pool_destroy(e);
  moec_pool_destroy(NULL);
  moec_pool_options o;
  MOEC_INIT(o);
  FAILS(moec_pool_create(&o, NULL, &err), ARGUMENT, "pool");
  o.threads = -1;
  FAILS(moec_pool_create(&o, &e, &err), ARGUMENT, "threads");
  CHECK(!e);
  o.threads = 5000;
  FAILS(moec_pool_create(&o, &e, &err), ARGUMENT, "threads");
  o.threads = 2;
  o.spin_us = -2;
  FAILS(moec_pool_create(&o, &e, &err), ARGUMENT, "spin_us");
  o.struct_size = 1;
  FAILS(moec_pool_create(&o, &e, &err), ARGUMENT, "struct_size");
}

/* ---- fork ---- */

static int stop;
static void *keep_running(void *arg) {
  moec_context *c = (moec_context *)arg;
  static float y[T * H];
  moec_error mine;
  tensor tx, ty;
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&tx, x, F32, T, H);
  call.y = make2(&ty, y, F32, T, H);
  while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE))
    moec_run(c, 0, &call, &mine);
  return NULL;
}

static void forks(moec_model *m) {
  moec_executor *e = pool(3, 0);
  moec_context *c = context(m, e, 512), *other = context(m, e, 512);
  check_same(c);
  /* Another thread keeps the pool and its own context busy while this one forks. */
  pthread_t thread;
  pthread_create(&thread, NULL, keep_running, other);
  for (int i = 0; i < 40; ++i) {
    pid_t child = fork();
    if (!child) {
      alarm(20); /* a hang is a failure */
      failures = 0;
      check_same(c);
      check_same(other); /* perhaps in use by a thread of the parent when it forked */
      pid_t grandchild = i % 8 ? 0 : fork();
      if (i % 8 == 0 && !grandchild) {
        alarm(20);
        check_same(c);
        _exit(failures != 0);
      }
      int status = 0;
      if (grandchild)
        waitpid(grandchild, &status, 0);
      moec_context_destroy(c);
      moec_pool_destroy(e);
      _exit(failures || status);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
    check_same(c);
  }
  __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
  pthread_join(thread, NULL);
  moec_context_destroy(c);
  moec_context_destroy(other);
  moec_pool_destroy(e);
}

/* ---- chunks and workspaces ---- */

static void workspaces(moec_model *m) {
  moec_executor *e = pool(2, 0);
  for (int64_t tokens = 1; tokens <= 60; tokens += tokens < 9 ? 1 : 17) {
    moec_context_options o;
    MOEC_INIT(o);
    o.max_tokens = tokens;
    o.executor = tokens % 2 ? e : NULL;
    uint64_t bytes = 0;
    OK(moec_workspace_size(m, &o, &bytes, &err));
    char *memory = (char *)aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(memory, 0x77, (bytes + 127) / 64 * 64);
    o.workspace = memory;
    o.workspace_bytes = bytes;
    uint64_t again = 0;
    OK(moec_workspace_size(m, &o, &again, &err));
    CHECK(again == bytes);
    moec_context *c = NULL;
    OK(moec_context_create(m, &o, &c, &err));
    mock_most_tokens = 0;
    check_same(c);
    CHECK(mock_most_tokens == (tokens < T ? tokens : T));

    /* More slots than K: smaller chunks, the same workspace. */
    float y[T * H], w[T * 8], reference[T * H];
    int32_t ids[T * 8];
    for (int i = 0; i < T * 8; ++i) {
      ids[i] = (i * 7 + i / 8) % (E + 1) - 1;
      w[i] = 0.125f * (float)(1 + i % 13);
    }
    tensor tx, ty, ti, tw;
    moec_call call;
    for (int k = 1; k <= E; ++k) {
      MOEC_INIT(call);
      call.x = make2(&tx, x, F32, T, H);
      call.y = make2(&ty, y, F32, T, H);
      call.experts = make2(&ti, ids, I32, T, k);
      call.weights = make2(&tw, w, F32, T, k);
      OK(moec_run(c, 0, &call, &err));
      moec_context *big = context(m, NULL, 4096);
      call.y = make2(&ty, reference, F32, T, H);
      OK(moec_run(big, 0, &call, &err));
      CHECK(!memcmp(y, reference, sizeof y));
      moec_context_destroy(big);

      /* Rows with gaps: every chunk begins at the right one. */
      static float wide_x[T * 2 * H], wide_y[T * 3 * H], wide_w[T * 8];
      static int32_t wide_ids[T * 8];
      for (int t = 0; t < T; ++t) {
        memcpy(wide_x + t * 2 * H, x + t * H, H * 4);
        memcpy(wide_w + t * 8, w + t * k, (size_t)k * 4);
        memcpy(wide_ids + t * 8, ids + t * k, (size_t)k * 4);
      }
      call.x = stride2((make2(&tx, wide_x, F32, T, H), &tx), 2 * H, 1);
      call.y = stride2((make2(&ty, wide_y, F32, T, H), &ty), 3 * H, 1);
      call.experts = stride2((make2(&ti, wide_ids, I32, T, k), &ti), 8, 1);
      call.weights = stride2((make2(&tw, wide_w, F32, T, k), &tw), 8, 1);
      OK(moec_run(c, 0, &call, &err));
      for (int t = 0; t < T; ++t)
        CHECK(!memcmp(wide_y + t * 3 * H, reference + t * H, H * 4));
    }
    {
      static float wide_w[T * 3], wide_logits[T * 9];
      static int64_t wide_ids[T * 4];
      float logits[T * E], weights[T * K];
      int32_t plain[T * K];
      tensor tl;
      moec_context *big = context(m, NULL, 4096);
      MOEC_INIT(call);
      call.x = make2(&tx, x, F32, T, H);
      call.experts_out = make2(&ti, plain, I32, T, K);
      call.weights_out = make2(&tw, weights, F32, T, K);
      call.logits_out = make2(&tl, logits, F32, T, E);
      OK(moec_run(big, 0, &call, &err));
      moec_context_destroy(big);
      call.experts_out = stride2((make2(&ti, wide_ids, I64, T, K), &ti), 4, 1);
      call.weights_out = stride2((make2(&tw, wide_w, F32, T, K), &tw), 3, 1);
      call.logits_out = stride2((make2(&tl, wide_logits, F32, T, E), &tl), 9, 1);
      OK(moec_run(c, 0, &call, &err));
      for (int t = 0; t < T; ++t) {
        for (int j = 0; j < K; ++j)
          CHECK(wide_ids[t * 4 + j] == plain[t * K + j]);
        CHECK(!memcmp(wide_w + t * 3, weights + t * K, K * 4));
        CHECK(!memcmp(wide_logits + t * 9, logits + t * E, E * 4));
      }
    }
    if (tokens == 1) { /* room for max(K, E) rows */
      MOEC_INIT(call);
      call.x = make2(&tx, x, F32, T, H);
      call.y = make2(&ty, y, F32, T, H);
      call.experts = make2(&ti, ids, I32, T, E + 1);
      call.weights = make2(&tw, w, F32, T, E + 1);
      FAILS(moec_run(c, 0, &call, &err), SHAPE, "at most 5 ids");
    }
    for (uint64_t i = bytes; i < (bytes + 127) / 64 * 64; ++i)
      CHECK(memory[i] == 0x77); /* nothing behind the workspace */
    moec_context_destroy(c);

    o.workspace = memory + 32;
    FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "aligned to 64");
    o.workspace = memory;
    o.workspace_bytes = bytes - 1;
    FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "workspace_bytes");
    CHECK(!c);
    free(memory);
  }
  moec_pool_destroy(e);
  moec_context_options o;
  MOEC_INIT(o);
  moec_context *c;
  uint64_t bytes;
  o.max_tokens = -1;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "max_tokens");
  FAILS(moec_workspace_size(m, &o, &bytes, &err), ARGUMENT, "max_tokens");
  o.max_tokens = (int64_t)1 << 40;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "max_tokens");
  FAILS(moec_context_create(NULL, NULL, &c, &err), ARGUMENT, "model");
  FAILS(moec_context_create(m, NULL, NULL, &err), ARGUMENT, "context");
  FAILS(moec_workspace_size(NULL, NULL, &bytes, &err), ARGUMENT, "model");
  FAILS(moec_workspace_size(m, NULL, NULL, &err), ARGUMENT, "bytes");
}

static void no_allocation(moec_model *m) {
#ifndef NO_COUNTING
  moec_executor *e = pool(2, 0);
  moec_context *c = context(m, e, 16);
  float y[T * H], logits[T * E];
  int32_t ids[T * K], counts[E + 1];
  counting = 1;
  for (int i = 0; i < 10; ++i) {
    int r = run(c, y, ids, counts, logits);
    r |= run(c, y, NULL, NULL, NULL);
    CHECK(!r);
  }
  CHECK(run(c, NULL, NULL, NULL, NULL) == MOEC_E_ARGUMENT); /* refusals do not allocate either */
  counting = 0;
  CHECK(allocations == 0);
  moec_context_destroy(c);
  moec_pool_destroy(e);
#else
  (void)m;
#endif
}

/* No memory, no threads: an error, and nothing is left. In a child, as the limit stays. */
static void no_memory(moec_model *m) {
#ifndef NO_COUNTING
  pid_t child = fork();
  if (!child) {
    alarm(20);
    failures = 0;
    unsigned long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f || fscanf(f, "%lu", &pages) != 1)
      _exit(3);
    fclose(f);
    struct rlimit limit;
    limit.rlim_cur = limit.rlim_max = pages * 4096 + (20u << 20);
    setrlimit(RLIMIT_AS, &limit);
    moec_context_options o;
    MOEC_INIT(o);
    o.max_tokens = 1 << 20;
    moec_context *c = (moec_context *)&o;
    FAILS(moec_context_create(m, &o, &c, &err), MEMORY, "max_tokens = 1048576");
    CHECK(!c);
    moec_pool_options p;
    MOEC_INIT(p);
    p.threads = 16; /* stacks of 8 MB */
    moec_executor *e = (moec_executor *)&p;
    FAILS(moec_pool_create(&p, &e, &err), IO, "expected 16 threads");
    CHECK(!e);
    c = context(m, NULL, 64);
    check_same(c);
    moec_context_destroy(c);
    _exit(failures != 0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
#else
  (void)m;
#endif
}

int main(void) {
  make_sources();
  for (int i = 0; i < T * H; ++i)
    x[i] = uniform();
  moec_model *m = open_mock();
  set_all(m);
  moec_context *c = context(m, NULL, 512);
  OK(run(c, want, want_ids, NULL, NULL));
  check_same(c);
  moec_context_destroy(c);
  executors(m);
  busy(m);
  pools(m);
  forks(m);
  workspaces(m);
  no_allocation(m);
  no_memory(m);
  moec_close(m);
  return finish("threads");
}
