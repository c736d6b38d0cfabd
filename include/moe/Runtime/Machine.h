/* moe/Runtime/Machine.h: what the machine is, as the runtime sees it. C and C++; internal to moec
   (not installed). Linked into libmoec and, statically, into the compiler's driver, so that `moec
   doctor` gives the runtime's own answers. */
#ifndef MOE_RUNTIME_MACHINE_H
#define MOE_RUNTIME_MACHINE_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct moec_level_info {
  const char *name;
  int32_t rank;  /* as moec_level_code.rank */
  int32_t built; /* 0: a name whose code no compiler of this version makes */
} moec_level_info;

const moec_level_info *moec_find_level(const char *name); /* NULL: no such name */
/* NULL if this machine runs `level`, else the first feature that it lacks, as "AVX-512BW". */
const char *moec_missing_feature(const moec_level_info *level);
/* NULL if `level`, which this machine runs, is also faster here than the level below it; else what
   is missing for that: such a level is taken only when it is asked for. */
const char *moec_slow_feature(const moec_level_info *level);
/* Threads worth starting: the CPUs of the affinity mask, at most what the control group pays for.
 */
int32_t moec_cpus_allowed(void);

#ifdef __cplusplus
}
#endif
#endif
