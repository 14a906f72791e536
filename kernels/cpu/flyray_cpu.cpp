// The C interface of the CPU kernels, loaded by kernels/cpu/library.py through ctypes.
//
// Functions return 0, or 1 with a message in flyray_error() for arguments that contradict each other or point outside
// their tensors, or 2 when memory ran out. Shapes, dtypes and contiguity are the caller's to check.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "operations.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace flyray {

char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    buffer.reset();
    capacity = 0;
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, rounded)));
    if (!buffer) throw std::bad_alloc();
    capacity = rounded;
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

thread_local char error_text[256];

struct Library {
  Library(int threads, const Operations* chosen) : pool(threads), operations(chosen) {}
  Pool pool;
  const Operations* operations;
};

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

template <class... Values>
int refuse(const char* format, Values... values) {
  std::snprintf(error_text, sizeof(error_text), format, values...);
  return 1;
}

// The operations do not throw but for memory; nothing may leave through the C interface.
template <class Arguments>
int call(void* library, void (*Operations::*operation)(Pool&, const Arguments&), const Arguments& arguments) {
  try {
    Library& own = *static_cast<Library*>(library);
    (own.operations->*operation)(own.pool, arguments);
    return 0;
  } catch (const std::bad_alloc&) {
    std::snprintf(error_text, sizeof(error_text), "out of memory for scratch space");
    return 2;
  }
}

// Runs an operation that lowers *bad to the first index it refuses; -1 when there is none.
template <class Operation>
int first_bad(int64_t* bad, const Operation& operation) {
  *bad = INT64_MAX;
  const int code = operation();
  if (*bad == INT64_MAX) *bad = -1;
  return code;
}

template <class Index>
int check_indices(const char* operation, const char* name, const Index* indices, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= limit) {
      return refuse("%s: %s[%lld] is %lld, expected 0 to %lld", operation, name, static_cast<long long>(i),
                    static_cast<long long>(indices[i]), static_cast<long long>(limit - 1));
    }
  }
  return 0;
}

int check_batch(const Attention& a, const int64_t* positions, int64_t num_pages) {
  if (a.query_start[0] != 0 || a.query_start[a.sequences] != a.queries) {
    return refuse("mla_attention: batch.query_start runs from %d to %d, not 0 to %lld", a.query_start[0],
                  a.query_start[a.sequences], static_cast<long long>(a.queries));
  }
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t begin = a.query_start[s], end = a.query_start[s + 1], length = a.context_len[s];
    if (begin < 0 || end < begin || end > a.queries || end - begin > length) {
      return refuse("mla_attention: sequence %lld has queries %lld to %lld and batch.context_len %lld",
                    static_cast<long long>(s), static_cast<long long>(begin), static_cast<long long>(end),
                    static_cast<long long>(length));
    }
    for (int64_t t = begin; t < end; ++t) {
      if (positions[t] != length - (end - t)) {
        return refuse("mla_attention: batch.positions[%lld] is %lld, expected %lld from context_len and query_start",
                      static_cast<long long>(t), static_cast<long long>(positions[t]),
                      static_cast<long long>(length - (end - t)));
      }
    }
    const int64_t used = begin == end ? 0 : (length + a.page_size - 1) / a.page_size;
    const int32_t* table = a.page_table + s * a.max_pages;
    bool complete = used <= a.max_pages;
    for (int64_t i = 0; complete && i < used; ++i) complete = table[i] >= 0 && table[i] < num_pages;
    if (!complete) {
      return refuse("mla_attention: batch.page_table[%lld] lacks some of the %lld pages of %lld tokens (pages are 0 to "
                    "%lld)", static_cast<long long>(s), static_cast<long long>(used), static_cast<long long>(length),
                    static_cast<long long>(num_pages - 1));
    }
  }
  return 0;
}

}  // namespace

const float* const kFp8Values = kFp8Table.values;

}  // namespace flyray

using namespace flyray;

EXPORT int flyray_abi_version() { return 4; }

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

EXPORT int flyray_rms_norm(void* library, const float* x, const void* weight, int type, float* out, int64_t tokens,
                           int64_t size, float eps) {
  return call(library, &Operations::rms_norm,
              RmsNorm{x, weight, static_cast<WeightType>(type), out, tokens, size, eps});
}

EXPORT int flyray_linear(void* library, const float* x, const void* weight, int type, float* out, int64_t tokens,
                         int64_t heads, int64_t inner, int64_t outputs) {
  return call(library, &Operations::linear,
              Linear{x, weight, static_cast<WeightType>(type), out, tokens, heads, inner, outputs});
}

EXPORT int flyray_linear_int8(void* library, const float* x, const int8_t* values, const float* scale, float* out,
                              int64_t tokens, int64_t inner, int64_t outputs) {
  return call(library, &Operations::linear_int8, LinearInt8{x, values, scale, out, tokens, inner, outputs});
}

EXPORT int flyray_rope(void* library, const float* x, const int64_t* positions, const float* cos, const float* sin,
                       float* out, int64_t tokens, int64_t heads, int64_t size, int64_t length) {
  const int refused = check_indices("rope", "positions", positions, tokens, length);
  return refused ? refused : call(library, &Operations::rope, Rope{x, positions, cos, sin, out, tokens, heads, size});
}

EXPORT int flyray_write_kv(float* pages, const int64_t* slots, const float* latent, const float* k_rope,
                           int64_t tokens, int64_t rank, int64_t rope, int64_t limit) {
  const int refused = check_indices("write_kv", "slots", slots, tokens, limit);
  if (refused) return refused;
  for (int64_t token = 0; token < tokens; ++token) {
    float* entry = pages + slots[token] * (rank + rope);
    std::memcpy(entry, latent + token * rank, static_cast<size_t>(rank) * sizeof(float));
    std::memcpy(entry + rank, k_rope + token * rope, static_cast<size_t>(rope) * sizeof(float));
  }
  return 0;
}

EXPORT int flyray_attention(void* library, const float* q, const float* pages, const int32_t* query_start,
                            const int32_t* context_len, const int32_t* page_table, const int64_t* positions,
                            float* out, int64_t sequences, int64_t queries, int64_t heads, int64_t width, int64_t rank,
                            int64_t num_pages, int64_t page_size, int64_t max_pages, float scale) {
  const Attention arguments{q,       pages, query_start, context_len, page_table, out,   sequences,
                            queries, heads, width,       rank,        page_size,  max_pages, scale};
  const int refused = check_batch(arguments, positions, num_pages);
  return refused ? refused : call(library, &Operations::attention, arguments);
}

EXPORT int flyray_gate(void* library, const float* x, const void* weight, int type, const float* bias, int32_t* ids,
                       float* weights, int64_t tokens, int64_t inner, int64_t experts, int64_t top_k, int64_t groups,
                       int64_t chosen_groups, int normalize, float factor) {
  return call(library, &Operations::gate,
              Gate{x, weight, static_cast<WeightType>(type), bias, ids, weights, tokens, inner, experts, top_k, groups,
                   chosen_groups, normalize != 0, factor});
}

EXPORT int flyray_quantize(void* library, const float* x, int format, void* values, float* scale, int64_t tokens,
                           int64_t size) {
  return call(library, &Operations::quantize, Quantize{x, static_cast<Format>(format), values, scale, tokens, size});
}

EXPORT int flyray_silu_mul(void* library, const float* gate_up, float* out, int64_t tokens, int64_t size) {
  return call(library, &Operations::silu_mul, SiluMul{gate_up, out, tokens, size});
}

EXPORT int flyray_combine(void* library, const float* slots, const float* weights, float* out, int64_t tokens,
                          int64_t top_k, int64_t size) {
  return call(library, &Operations::combine, Combine{slots, weights, out, tokens, top_k, size});
}

EXPORT int flyray_experts(void* library, int kind, const void* values, const float* scale, const int32_t* pair_token,
                          const int32_t* pair_expert, const void* gate_up, const uint8_t* gate_up_multipliers,
                          const float* gate_up_scale, const void* down, const uint8_t* down_multipliers,
                          const float* down_scale, float* out, int64_t tokens, int64_t pairs, int64_t experts,
                          int64_t hidden, int64_t intermediate) {
  int refused = check_indices("experts", "pair_token", pair_token, pairs, tokens);
  if (!refused) refused = check_indices("experts", "pair_expert", pair_expert, pairs, experts);
  if (refused) return refused;
  return call(library, &Operations::experts,
              Experts{static_cast<MatrixKind>(kind), values, scale, pair_token, pair_expert,
                      Matrix{gate_up, gate_up_multipliers, gate_up_scale},
                      Matrix{down, down_multipliers, down_scale}, out, tokens, pairs, experts, hidden, intermediate});
}

// *bad: -1, or the least index of what is refused; the other results are then not to be used.
EXPORT int flyray_fold(void* library, const void* packed, const void* group_scale, int type, const float* candidates,
                       int64_t candidate_count, int64_t refits, uint8_t* multipliers, float* scale, double* difference,
                       double* norm, int64_t* bad, int64_t rows, int64_t groups) {
  return first_bad(bad, [&] {
    return call(library, &Operations::fold_scales,
                Fold{static_cast<const uint8_t*>(packed), group_scale, static_cast<WeightType>(type), candidates,
                     candidate_count, refits, multipliers, scale, difference, norm, bad, rows, groups});
  });
}

// groups: one scale for 32 columns, otherwise one for a row.
EXPORT int flyray_scales(void* library, int groups, const float* weight, const float* importance, const float* clips,
                         const float* steps, const float* squares, int64_t candidates, float limit, float* scale,
                         int64_t* bad, int64_t rows, int64_t columns) {
  return first_bad(bad, [&] {
    return call(library, groups ? &Operations::group_scales : &Operations::row_scales,
                ScaleSearch{weight, importance, clips, steps, squares, candidates, limit, scale, bad, rows, columns});
  });
}

EXPORT int flyray_round(void* library, const float* weight, const float* scale, int8_t* out, int64_t* bad,
                        int64_t rows, int64_t columns, int64_t group, float low, float high) {
  return first_bad(bad, [&] {
    return call(library, &Operations::round_weights,
                Rounding{weight, scale, out, bad, rows, columns, group, low, high});
  });
}
