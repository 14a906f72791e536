// The C interface of the CPU kernels, loaded by kernels/cpu/library.py through ctypes.
//
// flyray_run returns 0, or 1 with a message in flyray_error() for arguments that contradict each other or point outside
// their tensors, or 2 when memory ran out. Shapes, dtypes and contiguity are the caller's to check.
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "commands.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace flyray {

constexpr size_t kHugePage = 2 << 20;

char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    // Whole huge pages, so that the system can give some: reading small ones takes a tenth longer.
    const size_t wanted = bytes + bytes / 4, page = wanted < kHugePage ? 4096 : kHugePage;
    const size_t rounded = (wanted + page - 1) / page * page;
    buffer.reset();
    capacity = 0;
    buffer.reset(static_cast<char*>(std::aligned_alloc(page, rounded)));
    if (!buffer) throw std::bad_alloc();
    capacity = rounded;
#if defined(MADV_HUGEPAGE)
    if (page == kHugePage) madvise(buffer.get(), rounded, MADV_HUGEPAGE);  // a request: small pages serve too
#endif
  }
  return buffer.get();
}

namespace {

struct Fp8Table {
  float values[256];
  Fp8Table() {
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      float value = exponent == 0 ? static_cast<float>(mantissa) / 512.0f : 1.0f + static_cast<float>(mantissa) / 8.0f;
      for (int e = exponent; e > 7 && exponent != 0; --e) value *= 2.0f;
      for (int e = exponent; e < 7 && exponent != 0; ++e) value /= 2.0f;
      if ((code & 127) == 127) value = __builtin_nanf("");
      values[code] = code & 128 ? -value : value;
    }
  }
};

const Fp8Table kFp8Table;

// The widest variant that this CPU runs, or the named one; null if it does not run that.
const Operations* choose(const char* variant) {
  const Operations* known[4] = {&kPortableOperations};
  int count = 1;
#if defined(FLYRAY_X86_VARIANTS)
  __builtin_cpu_init();
  // Every CPU with AVX2 has F16C too; older compilers cannot ask for it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (avx2) known[count++] = &kAvx2Operations;
  if (avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    known[count++] = &kAvx512Operations;
#if defined(FLYRAY_AMX_VARIANT)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("gfni") && tiles_permitted()) {
      known[count++] = &kAmxOperations;
    }
#endif
  }
#endif
  if (variant == nullptr || *variant == '\0') return known[count - 1];
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(known[i]->name, variant) == 0) return known[i];
  }
  return nullptr;
}

}  // namespace

const float* const kFp8Values = kFp8Table.values;

}  // namespace flyray

using namespace flyray;

EXPORT int flyray_abi_version() { return 8; }

EXPORT const char* flyray_error() { return error_text; }

// variant: "" for the widest that this CPU runs. Null when it cannot run the named one or threads do not start.
EXPORT void* flyray_open(int threads, const char* variant) {
  const Operations* operations = choose(variant);
  if (operations == nullptr) {
    refuse("this CPU or build has no variant \"%.60s\"", variant);
    return nullptr;
  }
  try {
    return new Library(threads, operations);
  } catch (const std::exception& error) {
    refuse("starting %d threads: %.180s", threads, error.what());
    return nullptr;
  }
}

EXPORT void flyray_close(void* library) { delete static_cast<Library*>(library); }

EXPORT const char* flyray_variant(void* library) { return static_cast<Library*>(library)->operations->name; }

// words: operations as commands.h says.
EXPORT int flyray_run(void* library, const int64_t* words, int64_t count) {
  try {
    return run_commands(*static_cast<Library*>(library), words, count);
  } catch (const std::bad_alloc&) {  // nothing may leave through the C interface
    refuse("out of memory for scratch space");
    return 2;
  }
}
