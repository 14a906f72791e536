// What one instruction-set variant of the kernels implements. Shapes and meanings are those of kernels/protocol.py;
// arguments are checked before they come here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.h"

namespace flyray {

// A 64-byte aligned buffer of the calling thread, valid until its next call of scratch(). Throws std::bad_alloc.
char* scratch(size_t bytes);

// The 256 values of float8_e4m3fn.
extern const float* const kFp8Values;

enum WeightType : int { kFloat32 = 0, kBfloat16 = 1 };

// `heads` products side by side: x [tokens, heads, inner], weight [heads, outputs, inner], out [tokens, heads, outputs].
// strides: from one head's values to the next one's, which are `heads` of them from one token's to the next one's.
// residual: laid out as out, to which the products are added, or null.
struct Linear {
  const float* x;
  const void* weight;
  WeightType type;
  const float* residual;
  float* out;
  int64_t tokens, heads, inner, outputs, x_stride, out_stride;
};

// Rows of x are x_stride apart. out, or quantized and scale, the result in int8 with a scale a row, may be null.
struct RmsNorm {
  const float* x;
  const void* weight;
  WeightType type;
  float* out;
  int64_t tokens, size, x_stride;
  float eps;
  int8_t* quantized;
  float* scale;
};

// Strides as in `Linear`.
struct Rope {
  const float* x;
  const int64_t* positions;
  const float* cos;
  const float* sin;
  float* out;
  int64_t tokens, heads, size, x_stride, out_stride;
};

// What KV pages hold: float32, in words of which `write_kv` and `attention` of a variant make what they like, or bytes.
enum Entries : int { kFloatEntries = 0, kInt8Entries = 1, kFp8Entries = 2 };

// An entry's bytes, as kernels/kv_entries.py says: from 0 on what stands for the latent, then the key and the scale.
struct EntryLayout {
  int64_t key, scale, size;
  EntryLayout(Entries kind, int64_t rank, int64_t rope) {
    const auto up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
    key = kind == kFloatEntries ? rank * 4 : up(rank, 16);
    scale = up(key + rope * (kind == kFloatEntries ? 4 : 2), 4);
    size = kind == kFloatEntries ? scale : up(scale + 4, 16);
  }
};

// A row has a latent of `rank` values, to be normed, and a key of `rope`, to be rotated; rows are x_stride apart.
struct WriteKv {
  char* pages;
  Entries kind;
  const int64_t* slots;
  const float* x;
  const void* norm;
  WeightType type;
  float eps;
  const int64_t* positions;
  const float* cos;
  const float* sin;
  int64_t tokens, rank, rope, x_stride;
};

struct Attention {
  const float* q;
  const char* pages;
  Entries kind;
  const int32_t* query_start;
  const int32_t* context_len;
  const int32_t* page_table;
  float* out;
  int64_t sequences, queries, heads, width, rank, page_size, max_pages;
  float scale;
};

struct Gate {
  const float* x;
  const void* weight;
  WeightType type;
  const float* bias;
  int32_t* ids;
  float* weights;
  int64_t tokens, inner, experts, top_k, groups, chosen_groups;
  bool normalize;
  float factor;
};

enum Format : int { kInt8 = 1, kFp8 = 2 };

struct Quantize {
  const float* x;
  Format format;
  void* values;
  float* scale;
  int64_t tokens, size;
};

struct SiluMul {
  const float* gate_up;
  float* out;
  int64_t tokens, size;
};

// out = residual + (sum of slots + shared)
struct Combine {
  const float* slots;
  const float* weights;
  const float* shared;
  const float* residual;
  float* out;
  int64_t tokens, top_k, size;
};

enum MatrixKind : int { kInt4Matrix = 0, kInt8Matrix = 1, kFp8Matrix = 2, kBf16Matrix = 3 };

// multipliers only for kInt4Matrix, scale not for kBf16Matrix.
struct Matrix {
  const void* values;
  const uint8_t* multipliers;
  const float* scale;
};

// x: int8 rows with their scales, or, where x_scale is null, floats, which are quantized to such; out = float(integer
// sum) * (row scale of x * row scale of the weight), added to residual, if there is one. kind: kInt4Matrix or
// kInt8Matrix.
struct IntegerLinear {
  const void* x;
  const float* x_scale;
  MatrixKind kind;
  Matrix weight;
  const float* residual;
  float* out;
  int64_t tokens, inner, outputs;
};

// residual [pairs, hidden]: what the pairs' results are added to, or null, and so where weights are no integers.
struct Experts {
  MatrixKind kind;
  const void* values;
  const float* scale;
  const int32_t* pair_token;
  const int32_t* pair_expert;
  Matrix gate_up, down;
  const float* residual;
  float* out;
  int64_t tokens, pairs, experts, hidden, intermediate;
};

// The row scales that kernels/folding.py tries first, and how often it refits the best.
struct FoldSearch {
  const float* candidates;
  int64_t count, refits;
};

// kernels/folding.py. packed [rows, groups * 16] bytes, group_scale [rows, groups]; `bad` becomes the least
// row * groups + group whose scale is refused.
struct Fold {
  const uint8_t* packed;
  const void* group_scale;
  WeightType type;
  FoldSearch search;
  uint8_t* multipliers;
  float* scale;
  double* difference;
  double* norm;
  int64_t* bad;
  int64_t rows, groups;
};

// kernels/clipping.py; no candidates: absmax / limit. importance may be null; `bad` becomes the least row with a value
// that is not finite.
struct ScaleSearch {
  const float* weight;
  const float* importance;
  const float* clips;
  const float* steps;
  const float* squares;
  int64_t candidates;
  float limit;
  float* scale;
  int64_t* bad;
  int64_t rows, columns;
};

// scale [rows, columns / group]; `bad` as in ScaleSearch.
struct Rounding {
  const float* weight;
  const float* scale;
  int8_t* out;
  int64_t* bad;
  int64_t rows, columns, group;
  float low, high;
};

enum StoredKind : int { kNativeGroups = 0, kFoldedGroups = 1, kFloatRows = 2 };

// A stored matrix to what is multiplied, row by row. values: packed native nibbles, or floats of `type`; groups: what
// belongs to the nibbles, native scales of `type` or two multipliers a byte. multipliers null: INT8 is made, else INT4
// in groups of 32. `bad` becomes the least row that is refused.
struct Conversion {
  StoredKind kind;
  const void* values;
  const void* groups;
  WeightType type;
  FoldSearch search;
  void* out;
  uint8_t* multipliers;
  float* scale;
  int64_t* bad;
  int64_t rows, columns;
};

// A row's words, kernels/sampling.py. reach: temperature * log(min_p); uniform: its random number in [0, 1).
struct SampleRow {
  double temperature, top_p, reach, uniform, top_k;
};

// logits as given and as changed [count, vocabulary]; top_* [count, columns]. largest [count, 2] becomes the largest of
// a row as given and as changed; where one is not finite nothing else of the row is written.
struct Sample {
  const float* logits;
  const float* changed;
  const SampleRow* rows;
  int64_t* tokens;
  float* logprobs;
  int64_t* top_tokens;
  float* top_logprobs;
  float* largest;
  int64_t count, vocabulary, columns;
};

struct Operations {
  const char* name;
  void (*rms_norm)(Pool&, const RmsNorm&);
  void (*linear)(Pool&, const Linear&);
  void (*integer_linear)(Pool&, const IntegerLinear&);
  void (*rope)(Pool&, const Rope&);
  void (*write_kv)(Pool&, const WriteKv&);
  void (*attention)(Pool&, const Attention&);
  void (*gate)(Pool&, const Gate&);
  void (*quantize)(Pool&, const Quantize&);
  void (*silu_mul)(Pool&, const SiluMul&);
  void (*combine)(Pool&, const Combine&);
  void (*experts)(Pool&, const Experts&);
  void (*fold_scales)(Pool&, const Fold&);
  void (*row_scales)(Pool&, const ScaleSearch&);
  void (*group_scales)(Pool&, const ScaleSearch&);
  void (*round_weights)(Pool&, const Rounding&);
  void (*convert)(Pool&, const Conversion&);
  void (*sample)(Pool&, const Sample&);
};

extern const Operations kPortableOperations;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FLYRAY_X86_VARIANTS 1
extern const Operations kAvx2Operations;
extern const Operations kAvx512Operations;
#if defined(__linux__) && __GNUC__ >= 11
#define FLYRAY_AMX_VARIANT 1
extern const Operations kAmxOperations;
bool tiles_permitted();  // asks the system once a process
#endif
#endif

}  // namespace flyray
