// The C interface of the CPU kernels. Strides are in elements, matrices row-major, masks packed 32 to
// a word, lowest bit first. Every call runs on `threads` threads, and its result does not depend on
// their number.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define HARMODT_API __attribute__((visibility("default")))
#else
#define HARMODT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// A batch of a masked linear layer: x is [groups][rows][inputs], y [groups][rows][outputs].
typedef struct {
  int64_t groups, rows, inputs, outputs;
  int64_t weight_stride;          // from row to row of the weight [outputs][inputs]
  const int32_t* weight_bits;     // [tasks][outputs][words]
  int64_t weight_bits_task_stride, weight_bits_row_stride;
  const int32_t* bias_bits;       // [tasks][words], or null without a bias
  int64_t bias_bits_task_stride;
  const int64_t* task_ids;        // [groups]
  int bf16;                       // round the operands of products to bf16
} harmodt_linear_shape;

// Where the gradient of weight and bias goes: summed over the groups, or each group's own.
typedef struct {
  int per_group;
  float* weight;
  int64_t weight_group_stride, weight_row_stride;
  float* bias;                    // null without a bias
  int64_t bias_group_stride;
} harmodt_weight_gradient;

// Operands of the harmony selection over `words` mask words; one row per task.
typedef struct {
  int64_t tasks, words;
  const int32_t* mask_bits;
  int64_t mask_stride;
  const int32_t* maskable_bits;
  const float* weights;
  const float* masked_gradients;
  int64_t masked_stride;
  const float* dense_gradients;
  int64_t dense_stride;
  const float* mean_gradient;
  const float* losses;
  int64_t count;                  // weights to move
  float balance;
  int fisher, paper;              // importance and rule
} harmodt_selection_operands;

// Operands of the masked AdamW step over `size` elements.
typedef struct {
  int64_t size;
  float* weights;
  const float* gradient;
  float* first_moment;
  float* second_moment;
  int64_t mask_words;             // that masks cover; all weights beyond them are active
  const int32_t* mask_bits;       // of each task, mask_stride words apart
  int64_t mask_stride;
  int64_t tasks;                  // of the step
  const int64_t* task_ids;
  const float* norm;              // of the gradient, which is scaled to at most max_norm
  float max_norm;
  float first_rate, second_rate;  // 1 - beta
  float epsilon, weight_decay;
  const float* rates;             // learning rate, corrections of the first and second moment
} harmodt_adamw_operands;

// Causal self-attention over short sequences; qkv is [sequences][tokens][3][heads][head_size].
typedef struct {
  int64_t sequences, tokens, heads, head_size;
  int64_t queries, first_query, query_step;  // query i is token first_query + i * query_step
  int64_t past;                   // tokens before these, whose keys and values are
  const float* past_keys;         // [sequences][heads][past][head_size], for no gradient
  const float* past_values;
  float dropout;                  // probability of dropping a key's weight
  const int64_t* seed;            // of the dropout, at least 0 and below 2^31; null without
} harmodt_attention_shape;

// A masked LayerNorm; x is [groups][rows][size].
typedef struct {
  int64_t groups, rows, size;
  const int32_t* weight_bits;     // [tasks][words]
  int64_t weight_bits_task_stride;
  const int32_t* bias_bits;       // [tasks][words]
  int64_t bias_bits_task_stride;
  const int64_t* task_ids;        // [groups]
  float epsilon;
} harmodt_layer_norm_shape;

// Operands of the token embedding: inputs of three kinds, and the row of each step in a table.
typedef struct {
  int64_t steps, size, rows;      // elements of a token, rows of the table
  const int64_t* timesteps;       // [steps]
  const float* x[3];              // [steps][inputs]
  int64_t inputs[3];
} harmodt_embedding_shape;

// The size in bytes of a structure above, by its name, for who mirrors it; 0 if there is none.
HARMODT_API int64_t harmodt_size_of(const char* structure);

// The instruction set in use: "amx", "avx512bf16", "avx512", "avx2" or "portable".
HARMODT_API const char* harmodt_isa(void);
// Use another one; returns 0 if this machine does not have it, or the name is none.
HARMODT_API int harmodt_use_isa(const char* name);

// y = x (W with mask)^T + bias with mask, then max(0, y) if relu; bias may be null. Where drop is
// above 0, elements of that are dropped or divided by 1 - drop; where residual is given, it is added.
HARMODT_API void harmodt_masked_linear(const harmodt_linear_shape* shape, const float* x,
                                       const float* weight, const float* bias, int relu,
                                       const float* residual, float drop, const int64_t* seed,
                                       float* y, int threads);
// dx = dy (W with mask). Where y is given, the layer had a ReLU: dy counts where y > 0. Where drop
// is above 0, dy counts where the layer dropped nothing, and is divided by 1 - drop.
HARMODT_API void harmodt_masked_linear_input_gradient(const harmodt_linear_shape* shape,
                                                      const float* dy, const float* y, float drop,
                                                      const int64_t* seed,
                                                      const float* weight, float* dx,
                                                      int threads);
// dy^T x with mask, and the sums of dy with mask; dy counts as above. Where statistics and affine
// are given, those of harmodt_norm_linear, x is normalised first.
HARMODT_API void harmodt_masked_linear_weight_gradient(const harmodt_linear_shape* shape,
                                                       const float* dy, const float* y, float drop,
                                                       const int64_t* seed, const float* x,
                                                       const float* statistics,
                                                       const float* affine,
                                                       const harmodt_weight_gradient* out,
                                                       int threads);

// A masked LayerNorm, then the layer as above. For the gradient: statistics, [groups][rows][2], of
// x, and affine, [groups][2][inputs], gain and shift under the masks.
HARMODT_API void harmodt_norm_linear(const harmodt_linear_shape* shape,
                                     const harmodt_layer_norm_shape* norm, const float* x,
                                     const float* gain, const float* shift, const float* weight,
                                     const float* bias, int relu, float* y, float* statistics,
                                     float* affine, int threads);

// The indices that leave and enter each task's mask, [tasks][count] in order of their scores, -1
// after those that move. counts are [tasks][3]: those, signs of the masked gradient that agree with
// the mean's, and signs that differ. refused[task] is 0 unless an operand or a score is not finite.
// Returns 0 if memory is lacking.
HARMODT_API int harmodt_select_harmony(const harmodt_selection_operands* operands, int64_t* leaving,
                                       int64_t* entering, int64_t* counts, uint8_t* refused,
                                       int threads);
// Flip the mask bits of [tasks][count] indices, leaving or entering; those below 0 are none.
HARMODT_API void harmodt_move_weights(int32_t* mask_bits, int64_t mask_stride,
                                      const int64_t* indices, int64_t tasks, int64_t count);

HARMODT_API void harmodt_masked_adamw(const harmodt_adamw_operands* operands, int threads);

// out is [sequences][queries][heads][head_size]; log_sums [sequences][queries][heads] is for the
// gradient, which is of all of qkv.
HARMODT_API void harmodt_attention(const harmodt_attention_shape* shape, const float* qkv,
                                   float* out, float* log_sums, int threads);
HARMODT_API void harmodt_attention_gradient(const harmodt_attention_shape* shape,
                                            const float* d_out, const float* qkv, const float* out,
                                            const float* log_sums, float* d_qkv, int threads);

// y = (x normalised) (weight with mask) + bias with mask; statistics [groups][rows][2] are for the
// gradient.
HARMODT_API void harmodt_masked_layer_norm(const harmodt_layer_norm_shape* shape, const float* x,
                                           const float* weight, const float* bias, float* y,
                                           float* statistics, int threads);
// Gains are weights of one row. d_residual, which is added to dx, may be null.
HARMODT_API void harmodt_masked_layer_norm_gradient(const harmodt_layer_norm_shape* shape,
                                                    const float* dy, const float* d_residual,
                                                    const float* x, const float* statistics,
                                                    const float* weight, float* dx,
                                                    const harmodt_weight_gradient* out,
                                                    int threads);

// out = x + branch, of `size` elements; those of the branch are dropped or divided by 1 - drop.
// x may be null.
HARMODT_API void harmodt_dropout_add(int64_t size, const float* x, const float* branch, float* out,
                                     float drop, const int64_t* seed, int threads);

// tokens [steps][3][size]: of each kind W x + bias, and the row of the step's time. Parameters are the
// weight [size][inputs] and the bias of each kind in turn, then the table [rows][size]. Returns -1, or
// the first step whose time has no row; there are no tokens then.
HARMODT_API int64_t harmodt_token_embedding(const harmodt_embedding_shape* shape,
                                            const float* const* parameters, float* tokens,
                                            int threads);
// Gradients lie as the parameters.
HARMODT_API void harmodt_token_embedding_gradient(const harmodt_embedding_shape* shape,
                                                  const float* d_tokens, float* const* gradients,
                                                  int threads);

// Multiply-adds of the kind that products use, on zeros in registers, to measure the peak of this
// machine. Returns how many floating-point operations they were, over all threads.
HARMODT_API int64_t harmodt_multiply_adds(int64_t repeats, int bf16, int threads);

#ifdef __cplusplus
}
#endif
