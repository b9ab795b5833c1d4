// The harmony selection around its loops: each task's vector is divided into parts, a thread finds
// the smallest keys of a part, and the parts are merged. Compiled once, for any processor.

#include "harmony_selection/parts.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "native/kernels.h"

namespace {

// Candidates of a part that are kept until they are cut down to the smallest.
constexpr int64_t kFewestCandidates = 4096;

// Parts of each task's vector, so that the threads have as much to do.
int64_t parts_of(const harmodt_selection_operands& s, int threads) {
  int64_t parts = (2 * threads + s.tasks - 1) / s.tasks;
  return std::clamp<int64_t>(parts, 1, std::max<int64_t>(s.words / 1024, 1));
}

// The `count` smallest of all parts' keys in order, of one side; returns how many there are.
int64_t merge(const int64_t* keys, const int64_t* counts, int64_t parts, int64_t capacity,
              int64_t count, std::vector<int64_t>& all) {
  all.clear();
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t* of_part = keys + part * 2 * capacity;
    all.insert(all.end(), of_part, of_part + counts[4 * part]);
  }
  std::sort(all.begin(), all.end());
  return std::min<int64_t>(count, all.size());
}

// What is wrong with a task, given what is with its parts.
uint8_t refusal_of(const harmodt_selection_operands& s, int64_t task, const uint8_t* bad,
                   int64_t parts) {
  std::vector<uint8_t> reasons(bad, bad + parts);
  if (!std::isfinite(s.losses[task])) reasons.push_back(kLoss);
  if (s.fisher && s.paper && !(s.losses[task] > 0)) reasons.push_back(kZeroLoss);
  reasons.erase(std::remove(reasons.begin(), reasons.end(), kFine), reasons.end());
  if (reasons.empty()) return kFine;
  return *std::min_element(reasons.begin(), reasons.end());
}

// All tasks with the workspace for them.
void select_tasks(const harmodt_selection_operands& s, int64_t parts, int64_t* leaving,
                  int64_t* entering, int64_t* results, uint8_t* refused, int threads) {
  int64_t capacity = std::max(kFewestCandidates, 2 * s.count) + 64;
  // Not initialised: most of it is never touched.
  std::unique_ptr<int64_t[]> keys(new int64_t[s.tasks * parts * 2 * capacity]);
  std::vector<int64_t> counts(s.tasks * parts * 4), all;
  std::vector<uint8_t> bad(s.tasks * parts);
  kernels().select_harmony(s, parts, capacity, keys.get(), counts.data(), bad.data(), threads);
  for (int64_t task = 0; task < s.tasks; ++task) {
    const int64_t* of_task = &counts[task * parts * 4];
    refused[task] = refusal_of(s, task, &bad[task * parts], parts);
    int64_t* out[2] = {leaving + task * s.count, entering + task * s.count};
    int64_t found[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t* from = keys.get() + task * parts * 2 * capacity + side * capacity;
      found[side] = merge(from, of_task + side, parts, capacity, s.count, all);
      for (int64_t i = 0; i < found[side]; ++i) out[side][i] = all[i] & 0xffffffff;
    }
    int64_t* result = results + task * 3;
    result[0] = std::min(found[0], found[1]);
    for (int64_t* indices : out) std::fill(indices + result[0], indices + s.count, -1);
    result[1] = result[2] = 0;
    for (int64_t part = 0; part < parts; ++part) {
      result[1] += of_task[4 * part + 2];
      result[2] += of_task[4 * part + 3];
    }
  }
}

}  // namespace

void keep_smallest(int64_t* keys, int64_t size, int64_t count) {
  if (count > 0 && count <= size) std::nth_element(keys, keys + count - 1, keys + size);
}

Refusal what_is_wrong(const float* masked, const float* dense, const float* mean, int64_t first,
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
      select_tasks(s, parts, leaving + first * s.count, entering + first * s.count,
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
