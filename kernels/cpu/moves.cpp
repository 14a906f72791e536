// An operation that moves rows: memory bound, so no instruction set has its own.
#include "moves.h"

namespace flyray {
namespace {

// Values that one task moves: enough to repay claiming it.
constexpr int64_t kTaskValues = 1 << 14;

template <class Body>
void for_rows(Pool& pool, int64_t rows, int64_t width, const Body& body) {
  struct Call {
    const Body& body;
    int64_t rows, step;
    static void run(void* context, int64_t task, int) {
      const Call& call = *static_cast<const Call*>(context);
      const int64_t end = (task + 1) * call.step;
      for (int64_t row = task * call.step; row < (end < call.rows ? end : call.rows); ++row) call.body(row);
    }
  };
  const int64_t step = width >= kTaskValues ? 1 : kTaskValues / (width > 0 ? width : 1);
  Call call{body, rows, step};
  pool.run((rows + step - 1) / step, rows * width, &Call::run, &call);
}

}  // namespace

void take_rows(Pool& pool, const TakeRows& a) {
  for_rows(pool, a.count, a.size, [&](int64_t row) {
    float* out = a.out + row * a.size;
    if (a.type == kFloat32) {
      std::memcpy(out, static_cast<const float*>(a.table) + a.rows[row] * a.size,
                  static_cast<size_t>(a.size) * sizeof(float));
      return;
    }
    const uint16_t* values = static_cast<const uint16_t*>(a.table) + a.rows[row] * a.size;
    for (int64_t k = 0; k < a.size; ++k) {
      const uint32_t bits = static_cast<uint32_t>(values[k]) << 16;
      std::memcpy(out + k, &bits, sizeof(bits));
    }
  });
}

}  // namespace flyray
