// What the loops of the harmony selection need of parts.cpp, which calls them for parts of each task's
// vector and merges what they find.
#pragma once

#include <cstdint>

// What is wrong with a task, as REFUSALS in reference.py has it.
enum Refusal : uint8_t { kFine, kMasked, kDense, kLoss, kZeroLoss, kMean, kScore };

// The same of elements [first, last), of whose operands or scores one is known not to be finite.
Refusal what_is_wrong(const float* masked, const float* dense, const float* mean, int64_t first,
                      int64_t last);

// Move the `count` smallest of `size` keys to the front, the largest of them last.
void keep_smallest(int64_t* keys, int64_t size, int64_t count);
