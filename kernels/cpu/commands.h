// A list of operations in 64-bit words, as kernels/cpu/commands.py writes it: for each operation its code, then its
// arguments in the order that its function in commands.cpp takes them. An address or an integer is one word, a real
// number the bits of a double.
#pragma once

#include <cstdio>

#include "operations.h"

namespace flyray {

struct Library {
  Library(int threads, const Operations* chosen) : pool(threads), operations(chosen) {}
  Pool pool;
  const Operations* operations;
};

// Why the calling thread's last call was refused.
extern thread_local char error_text[256];

template <class... Values>
int refuse(const char* format, Values... values) {
  std::snprintf(error_text, sizeof(error_text), format, values...);
  return 1;
}

// Runs the operations in order. Returns 0, or 1 with error_text for arguments that contradict each other or point
// outside their tensors, and for words that are no operation; those before it have run then. Throws std::bad_alloc alone.
int run_commands(Library& library, const int64_t* words, int64_t count);

}  // namespace flyray
