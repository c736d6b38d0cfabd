/* The pool: threads - 1 workers that wait for one word to change.

   The word holds a run's number (20 bits) and its number of tasks (12 bits). A caller writes the
   job, then the word; a worker whose index is below the number of tasks runs them and counts
   `pending` down. A worker that takes no part reads nothing but the word, so it may miss any number
   of runs. Workers poll the word for a while, then sleep on it (futex). Nothing is allocated. */
#include "Internal.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { TASK_BITS = 12, TASK_MASK = (1 << TASK_BITS) - 1, DEFAULT_SPIN_US = 50 };

typedef struct pool pool;
typedef struct {
  pool *owner;
  int32_t index; /* lane: 1 ... lanes-1 */
  pthread_t thread;
} worker;

struct pool {
  moec_executor executor; /* first: what the user holds */
  pool *next, *previous;  /* every pool of the process, for the child of a fork */
  worker *workers;
  int64_t spin_ns;
  bool alive; /* workers run; guarded by `lock` */
  uint32_t start_word;
  _Alignas(64) _Atomic uint32_t lock; /* callers queue: 0 free, 1 held, 2 held and waited for */
  _Alignas(64) _Atomic uint32_t word; /* what workers watch */
  void (*task)(void *, int32_t);
  void *arg;
  int32_t tasks;
  atomic_bool stop;
  _Alignas(64) _Atomic uint32_t sleepers; /* workers that sleep on `word` or are about to */
  _Alignas(64) _Atomic uint32_t pending;  /* workers that have not finished the run */
  _Atomic uint32_t waiting;               /* the caller sleeps on `pending` or is about to */
};

/* ---- time, futex ---- */

int64_t moec_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void moec_futex_wait(_Atomic uint32_t *word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

void moec_futex_wake(_Atomic uint32_t *word, int32_t count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* Polls until *word is not `value` or `spin_ns` have passed; returns the last value read. */
static uint32_t spin_while(_Atomic uint32_t *word, uint32_t value, int64_t spin_ns) {
  int64_t end = 0;
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      uint32_t w = atomic_load_explicit(word, memory_order_acquire);
      if (w != value)
        return w;
      moec_pause();
    }
    if (spin_ns <= 0)
      return value;
    int64_t now = moec_now_ns();
    if (!end)
      end = now + spin_ns;
    else if (now >= end)
      return value;
  }
}

/* ---- fork ---- */

static _Atomic uint32_t fork_generation;
static atomic_flag list_lock = ATOMIC_FLAG_INIT;
static pool *list;

static void lock_list(void) {
  while (atomic_flag_test_and_set_explicit(&list_lock, memory_order_acquire))
    sched_yield();
}
static void unlock_list(void) { atomic_flag_clear_explicit(&list_lock, memory_order_release); }

/* In the child only the forking thread lives: no worker, nobody who holds a lock. */
static void in_child(void) {
  for (pool *p = list; p; p = p->next) {
    p->alive = false;
    atomic_store(&p->lock, 0);
    atomic_store(&p->sleepers, 0);
    atomic_store(&p->pending, 0);
    atomic_store(&p->waiting, 0);
    atomic_store(&p->stop, false);
  }
  atomic_fetch_add(&fork_generation, 1);
  unlock_list();
}

static void watch(void) { (void)pthread_atfork(lock_list, unlock_list, in_child); }

void moec_watch_forks(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch);
}

uint32_t moec_fork_generation(void) {
  return atomic_load_explicit(&fork_generation, memory_order_relaxed);
}

/* ---- workers ---- */

static void *work(void *argument) {
  worker *self = argument;
  pool *p = self->owner;
  uint32_t last = p->start_word;
  for (;;) {
    uint32_t w = spin_while(&p->word, last, p->spin_ns);
    if (w == last) {
      atomic_fetch_add(&p->sleepers, 1);
      while ((w = atomic_load(&p->word)) == last)
        moec_futex_wait(&p->word, last);
      atomic_fetch_sub(&p->sleepers, 1);
    }
    last = w;
    if (atomic_load_explicit(&p->stop, memory_order_acquire))
      return NULL;
    if (self->index >= (int32_t)(w & TASK_MASK))
      continue;
    for (int32_t i = self->index, n = p->tasks, step = p->executor.lanes; i < n; i += step)
      p->task(p->arg, i);
    if (atomic_fetch_sub(&p->pending, 1) == 1 && atomic_load(&p->waiting))
      moec_futex_wake(&p->pending, 1);
  }
}

static uint32_t next_word(pool *p, uint32_t tasks) {
  uint32_t w = atomic_load_explicit(&p->word, memory_order_relaxed);
  return ((w >> TASK_BITS) + 1) << TASK_BITS | tasks;
}

static void stop_workers(pool *p, int32_t count) {
  atomic_store(&p->stop, true);
  atomic_store(&p->word, next_word(p, 0));
  moec_futex_wake(&p->word, INT_MAX);
  for (int32_t i = 0; i < count; ++i)
    pthread_join(p->workers[i].thread, NULL);
  atomic_store(&p->stop, false);
  p->alive = false;
}

/* With the lock held. 0 or an errno. */
static int start_workers(pool *p) {
  if (p->alive)
    return 0;
  p->start_word = atomic_load(&p->word);
  sigset_t all, before; /* the host's signal handlers stay on the host's threads */
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int r = 0;
  int32_t started = 0;
  for (; !r && started < p->executor.lanes - 1; started += !r)
    r = pthread_create(&p->workers[started].thread, NULL, work, &p->workers[started]);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (r)
    stop_workers(p, started);
  else
    p->alive = true;
  return r;
}

/* ---- callers ---- */

static void lock_pool(pool *p) {
  uint32_t seen = 0;
  if (atomic_compare_exchange_strong(&p->lock, &seen, 1))
    return;
  for (int i = 0; i < 256; ++i) {
    moec_pause();
    seen = 0;
    if (atomic_load_explicit(&p->lock, memory_order_relaxed) == 0 &&
        atomic_compare_exchange_strong(&p->lock, &seen, 1))
      return;
  }
  while (atomic_exchange(&p->lock, 2))
    moec_futex_wait(&p->lock, 2);
}

static void unlock_pool(pool *p) {
  if (atomic_exchange(&p->lock, 0) == 2)
    moec_futex_wake(&p->lock, 1);
}

static void pool_run(void *self, int32_t n, void (*task)(void *, int32_t), void *arg) {
  pool *p = self;
  if (n <= 1 || p->executor.lanes == 1) {
    for (int32_t i = 0; i < n; ++i)
      task(arg, i);
    return;
  }
  lock_pool(p);
  if (start_workers(p)) { /* moec_run asks moec_pool_ready first, and reports it */
    unlock_pool(p);
    for (int32_t i = 0; i < n; ++i)
      task(arg, i);
    return;
  }
  uint32_t lanes = (uint32_t)(n < p->executor.lanes ? n : p->executor.lanes);
  p->task = task;
  p->arg = arg;
  p->tasks = n;
  atomic_store_explicit(&p->pending, lanes - 1, memory_order_relaxed);
  atomic_store(&p->word, next_word(p, lanes));
  if (atomic_load(&p->sleepers))
    moec_futex_wake(&p->word, INT_MAX);
  for (int32_t i = 0; i < n; i += p->executor.lanes)
    task(arg, i);
  int64_t end = 0;
  uint32_t left;
  for (uint32_t spins = 0; (left = atomic_load_explicit(&p->pending, memory_order_acquire));) {
    moec_pause();
    if (++spins % 32)
      continue;
    int64_t now = moec_now_ns();
    if (!end)
      end = now + p->spin_ns;
    else if (now >= end)
      break;
  }
  if (left) {
    atomic_store(&p->waiting, 1);
    while ((left = atomic_load(&p->pending)))
      moec_futex_wait(&p->pending, left);
    atomic_store(&p->waiting, 0);
  }
  unlock_pool(p);
}

bool moec_is_pool(const moec_executor *e) { return e->run == pool_run; }

int moec_pool_ready(const moec_executor *e) {
  pool *p = e->self;
  if (p->executor.lanes == 1)
    return 0;
  lock_pool(p);
  int r = start_workers(p);
  unlock_pool(p);
  return r;
}

int moec_pool_create(const moec_pool_options *options, moec_executor **out, moec_error *error) {
  static const char where[] = "moec_pool_create";
  if (!out)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: pool: expected a pointer, but got NULL", where);
  *out = NULL;
  int32_t threads = 0, spin_us = 0;
  if (options) {
    int r = moec_check_struct(options, sizeof *options, where, "options", error);
    if (r)
      return r;
    threads = options->threads;
    spin_us = options->spin_us;
  }
  if (threads < 0 || threads > MOEC_MAX_LANES)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: threads: expected 0 to %d, but got %d", where,
                     MOEC_MAX_LANES, threads);
  if (spin_us < -1 || spin_us > 1000000)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: spin_us: expected -1 to 1000000, but got %d",
                     where, spin_us);
  if (!threads)
    threads = moec_cpus_allowed();
  moec_watch_forks();
  pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
  worker *workers = calloc((size_t)threads, sizeof *workers);
  if (!p || !workers) {
    free(p);
    free(workers);
    return moec_fail(error, MOEC_E_MEMORY, "%s: expected memory for %d threads, but got none",
                     where, threads);
  }
  memset(p, 0, sizeof *p);
  p->workers = workers;
  for (int32_t i = 0; i < threads - 1; ++i) {
    workers[i].owner = p;
    workers[i].index = i + 1;
  }
  if (!spin_us && threads > moec_cpus_allowed())
    spin_us = -1; /* whoever polls keeps another worker from its CPU */
  p->spin_ns = spin_us < 0 ? 0 : (spin_us ? spin_us : DEFAULT_SPIN_US) * (int64_t)1000;
  p->executor.struct_size = sizeof p->executor;
  p->executor.self = p;
  p->executor.lanes = threads;
  p->executor.gang = 1;
  p->executor.run = pool_run;
  lock_list();
  p->next = list;
  if (list)
    list->previous = p;
  list = p;
  unlock_list();
  int r = moec_pool_ready(&p->executor);
  if (r) {
    moec_pool_destroy(&p->executor);
    return moec_fail(error, MOEC_E_IO, "%s: expected %d threads, but got: %s", where, threads,
                     r == EAGAIN ? "the system's limit on threads is reached (EAGAIN)"
                                 : "the system refused");
  }
  *out = &p->executor;
  return moec_succeed(error);
}

void moec_pool_destroy(moec_executor *executor) {
  if (!executor)
    return;
  pool *p = executor->self;
  lock_pool(p);
  if (p->alive)
    stop_workers(p, p->executor.lanes - 1);
  unlock_pool(p);
  lock_list();
  if (p->previous)
    p->previous->next = p->next;
  else
    list = p->next;
  if (p->next)
    p->next->previous = p->previous;
  unlock_list();
  free(p->workers);
  free(p);
}
