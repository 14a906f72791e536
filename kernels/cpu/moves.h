// An operation that moves rows, the same code for every CPU.
#pragma once

#include "operations.h"

namespace flyray {

// out [count, size] = table[rows]; the rows lie in the table.
struct TakeRows {
  const void* table;
  WeightType type;
  const int64_t* rows;
  float* out;
  int64_t count, size;
};

void take_rows(Pool& pool, const TakeRows& a);

}  // namespace flyray
