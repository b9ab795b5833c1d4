// What the loops of the harmony selection need of parts.cpp, which calls them for parts of each task's
// vector and merges what they find.
#pragma once

#include <cstdint>

// Move the `count` smallest of `size` keys to the front, the largest of them last.
void keep_smallest(int64_t* keys, int64_t size, int64_t count);
