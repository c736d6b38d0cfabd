/* A module as the compiler would generate it, written by hand: plain loops over packed weights. It
   reads the layout by its own formula, so it also checks the packer. The common subset of C99 and
   C++17.

   Layer  kind   H   F   E  K  weights  compute
   0, 1   MoE    40  23  5  2  f32      f32      (two layers share this code)
   2      MoE    33  48  9  3  bf16     bf16
   3      dense  40  70  1     bf16     f32
   An expert is down(relu(gate(x)) * up(x)); the router is softmax over all experts, then top-k. */
#ifndef MOCK_H
#define MOCK_H
#include "moec.h"
#include "moec/module.h"

#ifdef __cplusplus
extern "C" {
#endif
#define MOCK_LAYERS 4
extern const moec_module mock_moec_module;
extern unsigned mock_float_mode; /* control word seen by the last stage that ran */
extern int64_t mock_most_tokens; /* largest chunk seen since it was set to 0 */
#ifdef __cplusplus
}
#endif
#endif
