// The C interface of the CPU kernels. Strides count elements. Matrices are row-major. Masks are packed
// 32 bits to a word, lowest bit first. Every call runs on `threads` threads, and its result does not
// depend on their number.
//
// Functions that return int64_t check task ids and timesteps first. They return -1, or the place of
// the first one that is out of range; then they have written nothing.
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
  int64_t weight_stride;          // between rows of the weight [outputs][inputs]
  int64_t tasks;
  const int32_t* weight_bits;     // [tasks][outputs][words], or null: all weights are active
  int64_t weight_bits_task_stride, weight_bits_row_stride;
  const int32_t* bias_bits;       // [tasks][words], or null: the whole bias is active
  int64_t bias_bits_task_stride;
  const int64_t* task_ids;        // [groups], below `tasks`; null without masks
  int bf16;                       // round the operands of products to bf16
} harmodt_linear_shape;

// The buffers for the gradients of weight and bias.
typedef struct {
  int per_group;                  // write one gradient per group; otherwise their sum over groups
  float* weight;
  int64_t weight_group_stride, weight_row_stride;
  float* bias;                    // null without a bias
  int64_t bias_group_stride;
} harmodt_weight_gradient;

// Operands of the harmony selection over `words` mask words. Bits and gradients have a row per task.
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
  int64_t count;                  // weights to move per task
  float balance;
  int fisher;                     // importance by Fisher information; otherwise by magnitude
  int paper;                      // the paper's rule; otherwise the authors' code's
} harmodt_selection_operands;

// Operands of the masked AdamW step over `size` elements.
typedef struct {
  int64_t size;
  float* weights;
  const float* gradient;
  float* first_moment;
  float* second_moment;
  int64_t mask_words;             // words of a mask; all weights beyond them are active
  const int32_t* mask_bits;       // [tasks][mask_words], rows mask_stride words apart
  int64_t mask_stride;
  int64_t tasks;
  int64_t groups;                 // number of tasks in this step
  const int64_t* task_ids;        // [groups], below `tasks`
  const float* norm;              // norm of the gradient, which the step clips to max_norm
  float max_norm;
  float first_rate, second_rate;  // 1 - beta1 and 1 - beta2
  float epsilon, weight_decay;
  const float* lr_and_corrections;  // learning rate, bias corrections of first and second moment
} harmodt_adamw_operands;

// Causal self-attention over short sequences; qkv is [sequences][tokens][3][heads][head_size].
typedef struct {
  int64_t sequences, tokens, heads, head_size;
  int64_t queries, first_query, query_step;  // query i is token first_query + i * query_step
  int64_t past;                   // number of earlier tokens
  const float* past_keys;         // their keys [sequences][heads][past][head_size], no gradient
  const float* past_values;       // their values, in the same layout
  float dropout;                  // probability of dropping a key's weight
  const int64_t* seed;            // of the dropout, at least 0 and below 2^31; null: no dropout
} harmodt_attention_shape;

// A masked LayerNorm; x is [groups][rows][size].
typedef struct {
  int64_t groups, rows, size;
  int64_t tasks;
  const int32_t* weight_bits;     // [tasks][words], or null: all weights are active
  int64_t weight_bits_task_stride;
  const int32_t* bias_bits;       // in the same way
  int64_t bias_bits_task_stride;
  const int64_t* task_ids;        // [groups], below `tasks`; null without masks
  float epsilon;
} harmodt_layer_norm_shape;

// Operands of the token embedding. A step has three tokens (return-to-go, observation, action), and
// its timestep selects a row of the table.
typedef struct {
  int64_t steps;                  // number of steps
  int64_t size;                   // elements of a token
  int64_t rows;                   // rows of the table of timesteps
  const int64_t* timesteps;       // [steps]
  const float* x[3];              // inputs of each kind of token, [steps][inputs]
  int64_t inputs[3];
} harmodt_embedding_shape;

// The size in bytes of a structure above, by its name; 0 if the name is unknown. A caller that
// declares the structures again compares the sizes.
HARMODT_API int64_t harmodt_size_of(const char* structure);

// The instruction set in use: "amx", "avx512bf16", "avx512", "avx2" or "portable".
HARMODT_API const char* harmodt_isa(void);
// Switches to another instruction set. Returns 0 if this machine lacks it or the name is unknown.
HARMODT_API int harmodt_use_isa(const char* name);

// y = x (W with mask)^T + bias with mask, then max(0, y) if relu. bias may be null. If drop is above
// 0, elements of y are dropped with this probability and the others are divided by 1 - drop. Then
// residual is added, unless it is null.
HARMODT_API int64_t harmodt_masked_linear(const harmodt_linear_shape* shape, const float* x,
                                          const float* weight, const float* bias, int relu,
                                          const float* residual, float drop, const int64_t* seed,
                                          float* y, int threads);
// dx = dy (W with mask). If y is not null, the layer had a ReLU, and dy counts as 0 where y is not
// above 0. If drop is above 0, dy counts as 0 where the layer dropped an element, and is divided by
// 1 - drop elsewhere.
HARMODT_API int64_t harmodt_masked_linear_input_gradient(const harmodt_linear_shape* shape,
                                                         const float* dy, const float* y,
                                                         float drop, const int64_t* seed,
                                                         const float* weight, float* dx,
                                                         int threads);
// Writes the gradients of the weight, dy^T x with mask, and of the bias, the sums of dy with mask. y
// and drop change dy as in the function above. If statistics and affine are not null,
// harmodt_norm_linear returned them, and x is normalised first.
HARMODT_API int64_t harmodt_masked_linear_weight_gradient(const harmodt_linear_shape* shape,
                                                          const float* dy, const float* y,
                                                          float drop, const int64_t* seed,
                                                          const float* x, const float* statistics,
                                                          const float* affine,
                                                          const harmodt_weight_gradient* out,
                                                          int threads);

// A masked LayerNorm, then harmodt_masked_linear. Two outputs serve the backward pass: statistics
// [groups][rows][2] of x, and affine [groups][2][inputs], the LayerNorm's gain and shift with masks.
HARMODT_API int64_t harmodt_norm_linear(const harmodt_linear_shape* shape,
                                        const harmodt_layer_norm_shape* norm, const float* x,
                                        const float* gain, const float* shift, const float* weight,
                                        const float* bias, int relu, float* y, float* statistics,
                                        float* affine, int threads);

// Selects the weights that leave and that enter each task's mask. leaving and entering are indices
// [tasks][count] in order of their scores; -1 fills the rest of a row. counts [tasks][3] holds the
// number of weights that move, of signs of the masked gradient that agree with the mean gradient's,
// and of signs that differ. refused[task] is 0, or the Refusal code of an operand or a score that is
// not finite. Returns 0 if there is not enough memory.
HARMODT_API int harmodt_select_harmony(const harmodt_selection_operands* operands, int64_t* leaving,
                                       int64_t* entering, int64_t* counts, uint8_t* refused,
                                       int threads);
// Flips the mask bits at indices [tasks][count]: of the weights that leave, or of those that enter.
// Ignores indices below 0.
HARMODT_API void harmodt_move_weights(int32_t* mask_bits, int64_t mask_stride,
                                      const int64_t* indices, int64_t tasks, int64_t count);

HARMODT_API int64_t harmodt_masked_adamw(const harmodt_adamw_operands* operands, int threads);

// out is [sequences][queries][heads][head_size]. log_sums [sequences][queries][heads] serves the
// backward pass. d_qkv has the shape of qkv; all of it is written. The gradient needs a shape whose
// past is 0.
HARMODT_API void harmodt_attention(const harmodt_attention_shape* shape, const float* qkv,
                                   float* out, float* log_sums, int threads);
HARMODT_API void harmodt_attention_gradient(const harmodt_attention_shape* shape,
                                            const float* d_out, const float* qkv, const float* out,
                                            const float* log_sums, float* d_qkv, int threads);

// y = (x normalised) * (weight with mask) + bias with mask. statistics [groups][rows][2] serve the
// backward pass.
HARMODT_API int64_t harmodt_masked_layer_norm(const harmodt_layer_norm_shape* shape,
                                              const float* x, const float* weight,
                                              const float* bias, float* y, float* statistics,
                                              int threads);
// In `out`, the gradients of the LayerNorm's weight and bias are matrices of one row. d_residual is
// added to dx; it may be null.
HARMODT_API int64_t harmodt_masked_layer_norm_gradient(const harmodt_layer_norm_shape* shape,
                                                       const float* dy, const float* d_residual,
                                                       const float* x, const float* statistics,
                                                       const float* weight, float* dx,
                                                       const harmodt_weight_gradient* out,
                                                       int threads);

// out = x + dropout(branch), of `size` elements: elements of the branch are dropped with probability
// `drop`, and the others are divided by 1 - drop. x may be null, for 0.
HARMODT_API void harmodt_dropout_add(int64_t size, const float* x, const float* branch, float* out,
                                     float drop, const int64_t* seed, int threads);

// tokens [steps][3][size]: each token is W x + bias of its kind plus the table's row of the step's
// timestep. parameters holds the weight [size][inputs] and the bias of each kind in turn, then the
// table [rows][size].
HARMODT_API int64_t harmodt_token_embedding(const harmodt_embedding_shape* shape,
                                            const float* const* parameters, float* tokens,
                                            int threads);
// gradients has the layout of parameters above.
HARMODT_API int64_t harmodt_token_embedding_gradient(const harmodt_embedding_shape* shape,
                                                     const float* d_tokens,
                                                     float* const* gradients, int threads);

// Measures this machine's peak: runs the multiply-adds of products on registers that hold zeros.
// Returns the number of floating-point operations over all threads.
HARMODT_API int64_t harmodt_multiply_adds(int64_t repeats, int bf16, int threads);

#ifdef __cplusplus
}
#endif
