// The C interface. The kernels for this machine are chosen when the library is loaded.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

extern const Kernels kernels_portable;
#ifdef HARMODT_X86
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16;
#endif

namespace {

// What this machine has, the best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef HARMODT_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
  if (avx512) found.push_back(&kernels_avx512);
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_portable);
  return found;
}

const Kernels* kernels = available().front();

// Candidates of a part that are kept until they are cut down to the smallest.
constexpr int64_t kFewestCandidates = 4096;

// Parts of each task's vector, so that the threads have as much to do.
int64_t parts_of(const harmodt_selection& s, int threads) {
  int64_t parts = (2 * threads + s.tasks - 1) / s.tasks;
  return std::clamp<int64_t>(parts, 1, std::max<int64_t>(s.words / 1024, 1));
}

// The `count` smallest of all parts' keys in order, of one side; returns how many there are.
int64_t merge(const int64_t* keys, const int64_t* held, int64_t parts, int64_t capacity,
              int64_t count, std::vector<int64_t>& all) {
  all.clear();
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t* of_part = keys + part * 2 * capacity;
    all.insert(all.end(), of_part, of_part + held[2 * part]);
  }
  std::sort(all.begin(), all.end());
  return std::min<int64_t>(count, all.size());
}

// Tasks [first, last) with the workspace for them.
void select_tasks(const harmodt_selection& s, int64_t parts, int64_t* leaving, int64_t* entering,
                  int64_t* moved, uint8_t* refused, int threads) {
  int64_t capacity = std::max(kFewestCandidates, 2 * s.count) + 64;
  // Not initialised: most of it is never touched.
  std::unique_ptr<int64_t[]> keys(new int64_t[s.tasks * parts * 2 * capacity]);
  std::vector<int64_t> held(s.tasks * parts * 2), all;
  std::vector<uint8_t> bad(s.tasks * parts);
  kernels->select_harmony(s, parts, capacity, keys.get(), held.data(), bad.data(), threads);
  for (int64_t task = 0; task < s.tasks; ++task) {
    refused[task] = std::any_of(&bad[task * parts], &bad[task * parts] + parts,
                                [](uint8_t b) { return b != 0; });
    int64_t* out[2] = {leaving + task * s.count, entering + task * s.count};
    int64_t found[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t* from = keys.get() + task * parts * 2 * capacity + side * capacity;
      found[side] = merge(from, &held[task * parts * 2 + side], parts, capacity, s.count, all);
      for (int64_t i = 0; i < found[side]; ++i) out[side][i] = all[i] & 0xffffffff;
    }
    moved[task] = std::min(found[0], found[1]);
    for (int64_t* indices : out) std::fill(indices + moved[task], indices + s.count, -1);
  }
}

}  // namespace

void* scratch(uint64_t bytes) {
  static thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, std::free);
  static thread_local uint64_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, size));
    if (!memory) std::abort();  // there is no way back from a parallel region
  }
  return memory.get();
}

void keep_smallest(int64_t* keys, int64_t size, int64_t count) {
  if (count > 0 && count <= size) std::nth_element(keys, keys + count - 1, keys + size);
}

extern "C" {

const char* harmodt_isa(void) { return kernels->isa; }

int harmodt_use_isa(const char* name) {
  for (const Kernels* candidate : available()) {
    if (std::strcmp(candidate->isa, name) == 0) {
      kernels = candidate;
      return 1;
    }
  }
  return 0;
}

void harmodt_masked_linear(const harmodt_linear* shape, const float* x, const float* weight,
                           const float* bias, int relu, float* y, int threads) {
  kernels->masked_linear(*shape, x, weight, bias, relu, y, threads);
}

void harmodt_input_gradient(const harmodt_linear* shape, const float* dy, const float* y,
                            const float* weight, float* dx, int threads) {
  kernels->input_gradient(*shape, dy, y, weight, dx, threads);
}

void harmodt_weight_gradient_of(const harmodt_linear* shape, const float* dy, const float* y,
                                const float* x, const harmodt_weight_gradient* out, int threads) {
  kernels->weight_gradient(*shape, dy, y, x, *out, threads);
}

int harmodt_select_harmony(const harmodt_selection* operands, int64_t* leaving, int64_t* entering,
                           int64_t* moved, uint8_t* refused, int threads) {
  harmodt_selection s = *operands;
  int64_t parts = parts_of(s, threads);
  try {
    // A few tasks at a time, so that the workspace does not grow with their number.
    int64_t step = std::max<int64_t>(1, 2 * threads / parts);
    for (int64_t first = 0; first < operands->tasks; first += step) {
      s.tasks = std::min(step, operands->tasks - first);
      s.mask_bits = operands->mask_bits + first * s.mask_stride;
      s.masked_gradients = operands->masked_gradients + first * s.masked_stride;
      s.dense_gradients = operands->dense_gradients + first * s.dense_stride;
      s.losses = operands->losses + first;
      select_tasks(s, parts, leaving + first * s.count, entering + first * s.count, moved + first,
                   refused + first, threads);
    }
  } catch (const std::bad_alloc&) {
    return 0;
  }
  return 1;
}

void harmodt_flip_bits(int32_t* mask_bits, int64_t mask_stride, const int64_t* indices,
                       int64_t tasks, int64_t count) {
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = task * count; i < (task + 1) * count; ++i)
      if (indices[i] >= 0)
        mask_bits[task * mask_stride + indices[i] / 32] ^= static_cast<int32_t>(1u << indices[i] % 32);
}

void harmodt_masked_adamw(const harmodt_adamw* operands, int threads) {
  kernels->masked_adamw(*operands, threads);
}

void harmodt_attention_forward(const harmodt_attention* shape, const float* qkv, float* out,
                               float* log_sums, int threads) {
  kernels->attention(*shape, qkv, out, log_sums, threads);
}

void harmodt_attention_gradient(const harmodt_attention* shape, const float* d_out,
                                const float* qkv, const float* out, const float* log_sums,
                                float* d_qkv, int threads) {
  kernels->attention_gradient(*shape, d_out, qkv, out, log_sums, d_qkv, threads);
}

void harmodt_masked_layer_norm(const harmodt_layer_norm* shape, const float* x,
                               const float* weight, const float* bias, float* y, float* statistics,
                               int threads) {
  kernels->masked_layer_norm(*shape, x, weight, bias, y, statistics, threads);
}

void harmodt_masked_layer_norm_gradient(const harmodt_layer_norm* shape, const float* dy,
                                        const float* x, const float* statistics,
                                        const float* weight, float* dx, float* d_weight,
                                        float* d_bias, int threads) {
  kernels->masked_layer_norm_gradient(*shape, dy, x, statistics, weight, dx, d_weight, d_bias,
                                      threads);
}

void harmodt_dropout_add(int64_t size, const float* x, const float* branch, float* out, float drop,
                         uint32_t seed, int threads) {
  kernels->dropout_add(size, x, branch, out, drop, seed, threads);
}

}  // extern "C"
