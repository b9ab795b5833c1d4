// The kernels for one instruction set, HARMODT_ISA. CMake compiles this file once with the flags of
// each instruction set.
//
// -ffp-contract=off: the compiler forms no fused multiply-adds of its own, only the code's explicit
// ones. So scores and AdamW round exactly as PyTorch does.

#include "attention/attention.h"
#include "dropout_add/dropout_add.h"
#include "harmony_selection/harmony_selection.h"
#include "masked_adamw/masked_adamw.h"
#include "masked_layer_norm/masked_layer_norm.h"
#include "masked_linear/masked_linear.h"
#include "native/peak.h"
#include "norm_linear/norm_linear.h"
#include "token_embedding/token_embedding.h"

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

extern const Kernels NAME(HARMODT_ISA);
const Kernels NAME(HARMODT_ISA) = {
    TEXT(HARMODT_ISA),
    [](const harmodt_linear_shape& s, const float* x, const float* weight, const float* bias,
       bool relu, const float* residual, float drop, const int64_t* seed, float* y, int threads) {
      auto layer = s.bf16 ? masked_linear<true> : masked_linear<false>;
      layer(s, {}, x, weight, bias, relu, {residual, {drop, key_at(seed)}}, y, threads);
    },
    [](const harmodt_linear_shape& s, const float* dy, const float* y, float drop,
       const int64_t* seed, const float* weight, float* dx, int threads) {
      auto gradient =
          s.bf16 ? masked_linear_input_gradient<true> : masked_linear_input_gradient<false>;
      gradient(s, {dy, y, {drop, key_at(seed)}}, weight, dx, threads);
    },
    [](const harmodt_linear_shape& s, const float* dy, const float* y, float drop,
       const int64_t* seed, const float* x, const float* statistics, const float* affine,
       const harmodt_weight_gradient& out, int threads) {
      auto gradient =
          s.bf16 ? masked_linear_weight_gradient<true> : masked_linear_weight_gradient<false>;
      gradient(s, {statistics, affine}, {dy, y, {drop, key_at(seed)}}, x, out, threads);
    },
    [](const harmodt_linear_shape& s, const harmodt_layer_norm_shape& norm, const float* x,
       const float* gain, const float* shift, const float* weight, const float* bias, bool relu,
       float* y, float* statistics, float* affine, int threads) {
      (s.bf16 ? norm_linear<true> : norm_linear<false>)(s, norm, x, gain, shift, weight, bias,
                                                         relu, y, statistics, affine, threads);
    },
    attention,
    attention_gradient,
    masked_layer_norm,
    masked_layer_norm_gradient,
    [](int64_t size, const float* x, const float* branch, float* out, float drop,
       const int64_t* seed, int threads) { dropout_add(size, x, branch, out, {drop, key_at(seed)}, threads); },
    token_embedding,
    token_embedding_gradient,
    select_harmony,
    masked_adamw,
    [](int64_t repeats, bool bf16, int threads) {
      return (bf16 ? multiply_adds<true> : multiply_adds<false>)(repeats, threads);
    },
};
