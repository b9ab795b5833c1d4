// The interface between dispatch.cpp and the kernels of each instruction set. kernels/ is on the
// include path, so operations are included by their folder.
//
// The kernels include no code of the standard library: if such a template were compiled for AVX-512,
// the linker could keep that copy for all instruction sets.
#pragma once

#include "harmodt.h"

struct Kernels {
  const char* isa;
  void (*masked_linear)(const harmodt_linear_shape&, const float* x, const float* weight,
                        const float* bias, bool relu, const float* residual, float drop,
                        const int64_t* seed, float* y, int threads);
  void (*masked_linear_input_gradient)(const harmodt_linear_shape&, const float* dy, const float* y,
                                       float drop, const int64_t* seed, const float* weight,
                                       float* dx, int threads);
  void (*masked_linear_weight_gradient)(const harmodt_linear_shape&, const float* dy,
                                        const float* y, float drop, const int64_t* seed,
                                        const float* x, const float* statistics,
                                        const float* affine, const harmodt_weight_gradient&,
                                        int threads);
  void (*norm_linear)(const harmodt_linear_shape&, const harmodt_layer_norm_shape&, const float* x,
                      const float* gain, const float* shift, const float* weight,
                      const float* bias, bool relu, float* y, float* statistics, float* affine,
                      int threads);
  void (*attention)(const harmodt_attention_shape&, const float* qkv, float* out, float* log_sums,
                    int threads);
  void (*attention_gradient)(const harmodt_attention_shape&, const float* d_out, const float* qkv,
                             const float* out, const float* log_sums, float* d_qkv, int threads);
  void (*masked_layer_norm)(const harmodt_layer_norm_shape&, const float* x, const float* weight,
                            const float* bias, float* y, float* statistics, int threads);
  void (*masked_layer_norm_gradient)(const harmodt_layer_norm_shape&, const float* dy,
                                     const float* d_residual, const float* x,
                                     const float* statistics, const float* weight, float* dx,
                                     const harmodt_weight_gradient&, int threads);
  void (*dropout_add)(int64_t size, const float* x, const float* branch, float* out, float drop,
                      const int64_t* seed, int threads);
  void (*token_embedding)(const harmodt_embedding_shape&, const float* const* parameters,
                          float* tokens, int threads);
  void (*token_embedding_gradient)(const harmodt_embedding_shape&, const float* d_tokens,
                                   float* const* gradients, int threads);
  // Cuts each task's words into `chunks`. keys are [tasks][chunks][2][capacity], counts
  // [tasks][chunks][4].
  void (*select_harmony)(const harmodt_selection_operands&, int64_t chunks, int64_t capacity,
                         int64_t* keys, int64_t* counts, uint8_t* refused, int threads);
  void (*masked_adamw)(const harmodt_adamw_operands&, int threads);
  int64_t (*multiply_adds)(int64_t repeats, bool bf16, int threads);
};

// The task of a group, for operands with `task_ids`. Without masks it is 0: strides are 0 then.
template <typename Operands>
inline int64_t task_of(const Operands& s, int64_t group) {
  return s.task_ids ? s.task_ids[group] : 0;
}

// The kernels in use.
const Kernels& kernels();

// Scratch memory of the calling thread, aligned to 64 bytes. The next call may return the same memory.
void* scratch(uint64_t bytes);
