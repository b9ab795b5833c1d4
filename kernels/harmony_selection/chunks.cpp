// The part of the harmony selection that is compiled once for all instruction sets. It cuts each
// task's vector into chunks, lets threads find the smallest keys of each chunk, and merges the chunks.

#include "harmony_selection/chunks.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "native/kernels.h"

namespace {

// A chunk collects at least this many candidates before it drops all but the smallest.
constexpr int64_t kFewestCandidates = 4096;

// The number of chunks per task that gives all threads about the same work.
int64_t chunks_of(const harmodt_selection_operands& s, int threads) {
  int64_t chunks = (2 * threads + s.tasks - 1) / s.tasks;
  return std::clamp<int64_t>(chunks, 1, std::max<int64_t>(s.words / 1024, 1));
}

// Sorts the keys of all chunks, for leaving or for entering weights, into `all`. Returns how many of
// them are taken: `count`, or all if they are fewer.
int64_t merge(const int64_t* keys, const int64_t* counts, int64_t chunks, int64_t capacity,
              int64_t count, std::vector<int64_t>& all) {
  all.clear();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t* chunk_keys = keys + chunk * 2 * capacity;
    all.insert(all.end(), chunk_keys, chunk_keys + counts[4 * chunk]);
  }
  std::sort(all.begin(), all.end());
  return std::min<int64_t>(count, all.size());
}

// The reason to refuse a task, from its loss and the reasons found in its chunks.
uint8_t refusal_of(const harmodt_selection_operands& s, int64_t task, const uint8_t* bad,
                   int64_t chunks) {
  std::vector<uint8_t> reasons(bad, bad + chunks);
  if (!std::isfinite(s.losses[task])) reasons.push_back(kLoss);
  if (s.fisher && s.paper && !(s.losses[task] > 0)) reasons.push_back(kZeroLoss);
  reasons.erase(std::remove(reasons.begin(), reasons.end(), kFine), reasons.end());
  if (reasons.empty()) return kFine;
  return *std::min_element(reasons.begin(), reasons.end());
}

// Selects the weights that leave and enter for all tasks of `s`. It allocates the workspace.
void select_tasks(const harmodt_selection_operands& s, int64_t chunks, int64_t* leaving,
                  int64_t* entering, int64_t* results, uint8_t* refused, int threads) {
  int64_t capacity = std::max(kFewestCandidates, 2 * s.count) + 64;
  // Not initialised, because most of the memory is never touched.
  std::unique_ptr<int64_t[]> keys(new int64_t[s.tasks * chunks * 2 * capacity]);
  std::vector<int64_t> counts(s.tasks * chunks * 4), all;
  std::vector<uint8_t> bad(s.tasks * chunks);
  kernels().select_harmony(s, chunks, capacity, keys.get(), counts.data(), bad.data(), threads);
  for (int64_t task = 0; task < s.tasks; ++task) {
    const int64_t* task_counts = &counts[task * chunks * 4];
    refused[task] = refusal_of(s, task, &bad[task * chunks], chunks);
    int64_t* out[2] = {leaving + task * s.count, entering + task * s.count};
    int64_t found[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t* from = keys.get() + task * chunks * 2 * capacity + side * capacity;
      found[side] = merge(from, task_counts + side, chunks, capacity, s.count, all);
      for (int64_t i = 0; i < found[side]; ++i) out[side][i] = all[i] & 0xffffffff;
    }
    int64_t* result = results + task * 3;
    result[0] = std::min(found[0], found[1]);
    for (int64_t* indices : out) std::fill(indices + result[0], indices + s.count, -1);
    result[1] = result[2] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      result[1] += task_counts[4 * chunk + 2];
      result[2] += task_counts[4 * chunk + 3];
    }
  }
}

}  // namespace

void keep_smallest(int64_t* keys, int64_t size, int64_t count) {
  if (count > 0 && count <= size) std::nth_element(keys, keys + count - 1, keys + size);
}

Refusal refusal_in(const float* masked, const float* dense, const float* mean, int64_t first,
                   int64_t last) {
  auto finite = [=](const float* values) {
    return std::all_of(values + first, values + last, [](float v) { return std::isfinite(v); });
  };
  return !finite(masked) ? kMasked : !finite(dense) ? kDense : !finite(mean) ? kMean : kScore;
}

extern "C" {

int harmodt_select_harmony(const harmodt_selection_operands* operands, int64_t* leaving,
                           int64_t* entering, int64_t* counts, uint8_t* refused, int threads) {
  harmodt_selection_operands s = *operands;
  if (s.tasks == 0) return 1;
  int64_t chunks = chunks_of(s, threads);
  try {
    // A few tasks at a time, so that the workspace does not grow with the number of tasks.
    int64_t step = std::max<int64_t>(1, 2 * threads / chunks);
    for (int64_t first = 0; first < operands->tasks; first += step) {
      s.tasks = std::min(step, operands->tasks - first);
      s.mask_bits = operands->mask_bits + first * s.mask_stride;
      s.masked_gradients = operands->masked_gradients + first * s.masked_stride;
      s.dense_gradients = operands->dense_gradients + first * s.dense_stride;
      s.losses = operands->losses + first;
      select_tasks(s, chunks, leaving + first * s.count, entering + first * s.count,
                   counts + 3 * first, refused + first, threads);
    }
  } catch (const std::bad_alloc&) {
    return 0;
  }
  return 1;
}

void harmodt_move_weights(int32_t* mask_bits, int64_t mask_stride, const int64_t* indices,
                       int64_t tasks, int64_t count) {
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = task * count; i < (task + 1) * count; ++i)
      if (indices[i] >= 0)
        mask_bits[task * mask_stride + indices[i] / 32] ^=
            static_cast<int32_t>(1u << indices[i] % 32);
}

}  // extern "C"
