// Implements the C interface. When the library is loaded, it selects the kernels for this machine.

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#ifdef HARMODT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "kernels.h"

extern const Kernels kernels_portable;
#ifdef HARMODT_X86
extern const Kernels kernels_avx2;
#endif
#ifdef HARMODT_AVX512
extern const Kernels kernels_avx512, kernels_avx512bf16;
#endif
#ifdef HARMODT_AMX
extern const Kernels kernels_amx;
#endif

namespace {

#ifdef HARMODT_AMX
// Whether the processor has matrix units for bf16 and Linux permits this process to use them. A
// process must ask Linux for this permission.
bool has_amx() {
  // ARCH_REQ_XCOMP_PERM of arch_prctl(2), and the XSAVE component of the tile data.
  constexpr int request_permission = 0x1023, tile_data = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// The kernels that this machine can run, the fastest first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef HARMODT_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef HARMODT_AVX512
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef HARMODT_AMX
  if (bf16 && has_amx()) found.push_back(&kernels_amx);
#endif
  if (bf16) found.push_back(&kernels_avx512bf16);
  if (avx512) found.push_back(&kernels_avx512);
#endif
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_portable);
  return found;
}

const Kernels* in_use = available().front();

// The place of the first id that is not in [0, end), or -1. Null stands for no ids.
int64_t beyond(const int64_t* ids, int64_t count, int64_t end) {
  for (int64_t i = 0; ids && i < count; ++i)
    if (ids[i] < 0 || ids[i] >= end) return i;
  return -1;
}
int64_t beyond(const harmodt_linear_shape& s) { return beyond(s.task_ids, s.groups, s.tasks); }
int64_t beyond(const harmodt_layer_norm_shape& s) { return beyond(s.task_ids, s.groups, s.tasks); }
int64_t beyond(const harmodt_adamw_operands& s) { return beyond(s.task_ids, s.groups, s.tasks); }
int64_t beyond(const harmodt_embedding_shape& s) { return beyond(s.timesteps, s.steps, s.rows); }

// Runs a kernel unless an id of the operands is out of range. Returns what the C functions return.
template <typename Operands, typename Kernel>
int64_t if_within(const Operands& operands, Kernel kernel) {
  int64_t place = beyond(operands);
  if (place < 0) kernel();
  return place;
}

}  // namespace

const Kernels& kernels() { return *in_use; }

void* scratch(uint64_t bytes) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, std::free);
  static thread_local uint64_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
    if (!memory) std::abort();  // an error cannot leave a parallel region
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory.get()) + bytes, size - bytes);
#endif
  return memory.get();
}

extern "C" {

int64_t harmodt_size_of(const char* structure) {
  const struct {
    const char* name;
    int64_t size;
  } sizes[] = {
#define SIZE_OF(name) {#name, sizeof(name)}
      SIZE_OF(harmodt_linear_shape),       SIZE_OF(harmodt_weight_gradient),
      SIZE_OF(harmodt_selection_operands), SIZE_OF(harmodt_adamw_operands),
      SIZE_OF(harmodt_attention_shape),    SIZE_OF(harmodt_layer_norm_shape),
      SIZE_OF(harmodt_embedding_shape),
#undef SIZE_OF
  };
  for (const auto& known : sizes)
    if (std::strcmp(known.name, structure) == 0) return known.size;
  return 0;
}

const char* harmodt_isa(void) { return in_use->isa; }

int harmodt_use_isa(const char* name) {
  for (const Kernels* candidate : available()) {
    if (std::strcmp(candidate->isa, name) == 0) {
      in_use = candidate;
      return 1;
    }
  }
  return 0;
}

int64_t harmodt_masked_linear(const harmodt_linear_shape* shape, const float* x,
                              const float* weight, const float* bias, int relu,
                              const float* residual, float drop, const int64_t* seed,
                              float* y, int threads) {
  return if_within(*shape, [&] {
    in_use->masked_linear(*shape, x, weight, bias, relu, residual, drop, seed, y, threads);
  });
}

int64_t harmodt_masked_linear_input_gradient(const harmodt_linear_shape* shape,
                                             const float* dy, const float* y,
                                             float drop, const int64_t* seed,
                                             const float* weight, float* dx,
                                             int threads) {
  return if_within(*shape, [&] {
    in_use->masked_linear_input_gradient(*shape, dy, y, drop, seed, weight, dx, threads);
  });
}

int64_t harmodt_masked_linear_weight_gradient(const harmodt_linear_shape* shape,
                                              const float* dy, const float* y,
                                              float drop, const int64_t* seed,
                                              const float* x, const float* statistics,
                                              const float* affine,
                                              const harmodt_weight_gradient* out,
                                              int threads) {
  return if_within(*shape, [&] {
    in_use->masked_linear_weight_gradient(*shape, dy, y, drop, seed, x, statistics, affine, *out,
                                          threads);
  });
}

int64_t harmodt_norm_linear(const harmodt_linear_shape* shape,
                            const harmodt_layer_norm_shape* norm, const float* x,
                            const float* gain, const float* shift, const float* weight,
                            const float* bias, int relu, float* y, float* statistics,
                            float* affine, int threads) {
  return if_within(*shape, [&] {
    in_use->norm_linear(*shape, *norm, x, gain, shift, weight, bias, relu, y, statistics, affine,
                        threads);
  });
}

int64_t harmodt_masked_adamw(const harmodt_adamw_operands* operands, int threads) {
  return if_within(*operands, [&] { in_use->masked_adamw(*operands, threads); });
}

void harmodt_attention(const harmodt_attention_shape* shape, const float* qkv, float* out,
                       float* log_sums, int threads) {
  in_use->attention(*shape, qkv, out, log_sums, threads);
}

void harmodt_attention_gradient(const harmodt_attention_shape* shape, const float* d_out,
                                const float* qkv, const float* out, const float* log_sums,
                                float* d_qkv, int threads) {
  in_use->attention_gradient(*shape, d_out, qkv, out, log_sums, d_qkv, threads);
}

int64_t harmodt_masked_layer_norm(const harmodt_layer_norm_shape* shape,
                                  const float* x, const float* weight,
                                  const float* bias, float* y, float* statistics,
                                  int threads) {
  return if_within(*shape, [&] {
    in_use->masked_layer_norm(*shape, x, weight, bias, y, statistics, threads);
  });
}

int64_t harmodt_masked_layer_norm_gradient(const harmodt_layer_norm_shape* shape,
                                           const float* dy, const float* d_residual,
                                           const float* x, const float* statistics,
                                           const float* weight, float* dx,
                                           const harmodt_weight_gradient* out,
                                           int threads) {
  return if_within(*shape, [&] {
    in_use->masked_layer_norm_gradient(*shape, dy, d_residual, x, statistics, weight, dx, *out,
                                       threads);
  });
}

void harmodt_dropout_add(int64_t size, const float* x, const float* branch, float* out, float drop,
                         const int64_t* seed, int threads) {
  in_use->dropout_add(size, x, branch, out, drop, seed, threads);
}

int64_t harmodt_token_embedding(const harmodt_embedding_shape* shape,
                                const float* const* parameters, float* tokens,
                                int threads) {
  return if_within(*shape, [&] { in_use->token_embedding(*shape, parameters, tokens, threads); });
}

int64_t harmodt_token_embedding_gradient(const harmodt_embedding_shape* shape,
                                         const float* d_tokens,
                                         float* const* gradients, int threads) {
  return if_within(*shape, [&] {
    in_use->token_embedding_gradient(*shape, d_tokens, gradients, threads);
  });
}

int64_t harmodt_multiply_adds(int64_t repeats, int bf16, int threads) {
  return in_use->multiply_adds(repeats, bf16, threads);
}

}  // extern "C"
