// What runs for each operation of a list: its words become the arguments of operations.h, checked as far as only their
// contents tell; shapes, dtypes and contiguity were checked when the words were written.
#include "commands.h"

#include <optional>

#include "moves.h"

namespace flyray {

thread_local char error_text[256];

namespace {

// Reads an operation's words one by one.
class Words {
 public:
  explicit Words(const int64_t* words) : next_(words) {}
  int64_t integer() { return *next_++; }
  float real() {
    double value;
    std::memcpy(&value, next_++, sizeof(value));
    return static_cast<float>(value);
  }
  template <class T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(*next_++));
  }
  template <class E>
  E choice() {
    return static_cast<E>(*next_++);
  }

 private:
  const int64_t* next_;
};

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

// Runs an operation that lowers *bad to the first index it refuses; -1 when there is none. The other results are then
// not to be used.
template <class Operation>
int first_bad(int64_t* bad, const Operation& operation) {
  *bad = INT64_MAX;
  operation();
  if (*bad == INT64_MAX) *bad = -1;
  return 0;
}

// Members of a braced list are read in order, as the words stand.
int rms_norm(Library& library, Words words) {
  const RmsNorm arguments{words.address<const float>(), words.address<const void>(), words.choice<WeightType>(),
                          words.address<float>(),       words.integer(),             words.integer(),
                          words.integer(),              words.real(),                words.address<int8_t>(),
                          words.address<float>()};
  library.operations->rms_norm(library.pool, arguments);
  return 0;
}

int linear(Library& library, Words words) {
  const Linear arguments{words.address<const float>(), words.address<const void>(), words.choice<WeightType>(),
                         words.address<const float>(), words.address<float>(),       words.integer(),
                         words.integer(),              words.integer(),             words.integer(),
                         words.integer(),              words.integer()};
  library.operations->linear(library.pool, arguments);
  return 0;
}

int rope(Library& library, Words words) {
  const Rope arguments{words.address<const float>(), words.address<const int64_t>(), words.address<const float>(),
                       words.address<const float>(), words.address<float>(),         words.integer(),
                       words.integer(),              words.integer(),                words.integer(),
                       words.integer()};
  const int64_t length = words.integer();
  const int refused = check_indices("absorb", "positions", arguments.positions, arguments.tokens, length);
  if (!refused) library.operations->rope(library.pool, arguments);
  return refused;
}

int write_kv(Library& library, Words words) {
  const WriteKv arguments{words.address<char>(),        words.choice<Entries>(),      words.address<const int64_t>(),
                          words.address<const float>(), words.address<const void>(),  words.choice<WeightType>(),
                          words.real(),                 words.address<const int64_t>(), words.address<const float>(),
                          words.address<const float>(), words.integer(),              words.integer(),
                          words.integer(),              words.integer()};
  const int64_t limit = words.integer(), length = words.integer();
  int refused = check_indices("write_kv", "slots", arguments.slots, arguments.tokens, limit);
  if (!refused) refused = check_indices("write_kv", "positions", arguments.positions, arguments.tokens, length);
  if (!refused) library.operations->write_kv(library.pool, arguments);
  return refused;
}

int attention(Library& library, Words words) {
  const int64_t* positions = words.address<const int64_t>();
  const int64_t num_pages = words.integer();
  const Attention arguments{words.address<const float>(),   words.address<const char>(),
                            words.choice<Entries>(),
                            words.address<const int32_t>(), words.address<const int32_t>(),
                            words.address<const int32_t>(), words.address<float>(),
                            words.integer(),                words.integer(),
                            words.integer(),                words.integer(),
                            words.integer(),                words.integer(),
                            words.integer(),                words.real()};
  const int refused = check_batch(arguments, positions, num_pages);
  if (!refused) library.operations->attention(library.pool, arguments);
  return refused;
}

int gate(Library& library, Words words) {
  const Gate arguments{words.address<const float>(), words.address<const void>(), words.choice<WeightType>(),
                       words.address<const float>(), words.address<int32_t>(),    words.address<float>(),
                       words.integer(),              words.integer(),             words.integer(),
                       words.integer(),              words.integer(),             words.integer(),
                       words.integer() != 0,         words.real()};
  library.operations->gate(library.pool, arguments);
  return 0;
}

int quantize(Library& library, Words words) {
  const Quantize arguments{words.address<const float>(), words.choice<Format>(), words.address<void>(),
                           words.address<float>(),       words.integer(),        words.integer()};
  library.operations->quantize(library.pool, arguments);
  return 0;
}

int silu_mul(Library& library, Words words) {
  const SiluMul arguments{words.address<const float>(), words.address<float>(), words.integer(), words.integer()};
  library.operations->silu_mul(library.pool, arguments);
  return 0;
}

int combine(Library& library, Words words) {
  const Combine arguments{words.address<const float>(), words.address<const float>(), words.address<const float>(),
                          words.address<const float>(), words.address<float>(),       words.integer(),
                          words.integer(),              words.integer()};
  library.operations->combine(library.pool, arguments);
  return 0;
}

Matrix matrix(Words& words) {
  return Matrix{words.address<const void>(), words.address<const uint8_t>(), words.address<const float>()};
}

int integer_linear(Library& library, Words words) {
  const IntegerLinear arguments{words.address<const void>(), words.address<const float>(), words.choice<MatrixKind>(),
                                matrix(words),               words.address<const float>(), words.address<float>(),
                                words.integer(),             words.integer(),              words.integer()};
  library.operations->integer_linear(library.pool, arguments);
  return 0;
}

int experts(Library& library, Words words) {
  const Experts a{words.choice<MatrixKind>(),
                  words.address<const void>(),
                  words.address<const float>(),
                  words.address<const int32_t>(),
                  words.address<const int32_t>(),
                  matrix(words),
                  matrix(words),
                  words.address<const float>(),
                  words.address<float>(),
                  words.integer(),
                  words.integer(),
                  words.integer(),
                  words.integer(),
                  words.integer()};
  int refused = check_indices("experts", "pair_token", a.pair_token, a.pairs, a.tokens);
  if (!refused) refused = check_indices("experts", "pair_expert", a.pair_expert, a.pairs, a.experts);
  if (!refused) library.operations->experts(library.pool, a);
  return refused;
}

FoldSearch fold_search(Words& words) {
  return FoldSearch{words.address<const float>(), words.integer(), words.integer()};
}

int fold(Library& library, Words words) {
  const Fold arguments{words.address<const uint8_t>(), words.address<const void>(), words.choice<WeightType>(),
                       fold_search(words),             words.address<uint8_t>(),    words.address<float>(),
                       words.address<double>(),        words.address<double>(),     words.address<int64_t>(),
                       words.integer(),                words.integer()};
  return first_bad(arguments.bad, [&] { library.operations->fold_scales(library.pool, arguments); });
}

ScaleSearch scale_search(Words& words) {
  return ScaleSearch{words.address<const float>(), words.address<const float>(), words.address<const float>(),
                     words.address<const float>(), words.address<const float>(), words.integer(),
                     words.real(),                 words.address<float>(),       words.address<int64_t>(),
                     words.integer(),              words.integer()};
}

int row_scales(Library& library, Words words) {
  const ScaleSearch arguments = scale_search(words);
  return first_bad(arguments.bad, [&] { library.operations->row_scales(library.pool, arguments); });
}

int group_scales(Library& library, Words words) {
  const ScaleSearch arguments = scale_search(words);
  return first_bad(arguments.bad, [&] { library.operations->group_scales(library.pool, arguments); });
}

int round_weights(Library& library, Words words) {
  const Rounding arguments{words.address<const float>(), words.address<const float>(), words.address<int8_t>(),
                           words.address<int64_t>(),     words.integer(),              words.integer(),
                           words.integer(),              words.real(),                 words.real()};
  return first_bad(arguments.bad, [&] { library.operations->round_weights(library.pool, arguments); });
}

int convert(Library& library, Words words) {
  const Conversion arguments{words.choice<StoredKind>(), words.address<const void>(), words.address<const void>(),
                             words.choice<WeightType>(), fold_search(words),          words.address<void>(),
                             words.address<uint8_t>(),   words.address<float>(),      words.address<int64_t>(),
                             words.integer(),            words.integer()};
  return first_bad(arguments.bad, [&] { library.operations->convert(library.pool, arguments); });
}

int run_take_rows(Library& library, Words words) {
  const TakeRows arguments{words.address<const void>(), words.choice<WeightType>(), words.address<const int64_t>(),
                           words.address<float>(),      words.integer(),            words.integer()};
  const int64_t limit = words.integer();
  const int refused = check_indices("take_rows", "rows", arguments.rows, arguments.count, limit);
  if (!refused) take_rows(library.pool, arguments);
  return refused;
}

int sample(Library& library, Words words) {
  const Sample arguments{words.address<const float>(), words.address<const float>(), words.address<const SampleRow>(),
                         words.address<int64_t>(),     words.address<float>(),       words.address<int64_t>(),
                         words.address<float>(),       words.address<float>(),       words.integer(),
                         words.integer(),              words.integer()};
  library.operations->sample(library.pool, arguments);
  for (int64_t i = 0; i < 2 * arguments.count; ++i) {
    const float largest = arguments.largest[i];
    if (largest - largest != 0.0f) {
      return refuse("sample: the largest of logits row %lld is %g, expected a finite number",
                    static_cast<long long>(i / 2), static_cast<double>(largest));
    }
  }
  return 0;
}

struct Command {
  int64_t words;  // of arguments
  int (*run)(Library&, Words);
};

// By code; commands.py has the same order. New ones are added at the end.
const Command kCommands[] = {
    {10, rms_norm},      {11, linear},        {11, integer_linear}, {11, rope},         {16, write_kv},
    {17, attention},     {14, gate},          {6, quantize},        {4, silu_mul},      {8, combine},
    {18, experts},       {13, fold},          {11, row_scales},     {11, group_scales}, {9, round_weights},
    {7, run_take_rows},  {11, sample},        {13, convert},
};
constexpr int64_t kCommandCount = sizeof(kCommands) / sizeof(kCommands[0]);

}  // namespace

int run_commands(Library& library, const int64_t* words, int64_t count) {
  std::optional<Pool::Awake> awake;
  for (int64_t at = 0; at < count;) {
    const int64_t code = words[at];
    if (code < 0 || code >= kCommandCount) {
      return refuse("word %lld of the operations is %lld, expected a code of 0 to %lld", static_cast<long long>(at),
                    static_cast<long long>(code), static_cast<long long>(kCommandCount - 1));
    }
    const Command& command = kCommands[code];
    if (count - at <= command.words) {
      return refuse("operation %lld at word %lld takes %lld words, only %lld are left", static_cast<long long>(code),
                    static_cast<long long>(at), static_cast<long long>(command.words),
                    static_cast<long long>(count - at - 1));
    }
    const int64_t next = at + command.words + 1;
    if (next < count && !awake) awake.emplace(library.pool);
    const int refused = command.run(library, Words(words + at + 1));
    if (refused) return refused;
    at = next;
  }
  return 0;
}

}  // namespace flyray
