// Functions of chunks.cpp that the loops of harmony_selection.h call. chunks.cpp cuts each task's
// vector into chunks, calls the loops for each chunk and merges the results.
#pragma once

#include <cstdint>

// Why a task is refused, in the order of REFUSALS in reference.py. kFine: not refused.
enum Refusal : uint8_t { kFine, kMasked, kDense, kLoss, kZeroLoss, kMean, kScore };

// Finds the reason among elements [first, last), where an operand or a score is not finite.
Refusal refusal_in(const float* masked, const float* dense, const float* mean, int64_t first,
                   int64_t last);

// Moves the `count` smallest of `size` keys to the front, with the largest of them last.
void keep_smallest(int64_t* keys, int64_t size, int64_t count);
