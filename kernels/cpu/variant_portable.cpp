// Any CPU: GCC's vector types, lowered to what the compiler's default target has.
#include "operations.h"

namespace flyray {
namespace variant_portable {
#include "kernels.inc"
}  // namespace variant_portable

const Operations kPortableOperations = {
    "portable",
    variant_portable::rms_norm,
    variant_portable::linear,
    variant_portable::integer_linear,
    variant_portable::rope,
    variant_portable::write_kv,
    variant_portable::attention,
    variant_portable::gate,
    variant_portable::quantize,
    variant_portable::silu_mul,
    variant_portable::combine,
    variant_portable::experts,
    variant_portable::fold_scales,
    variant_portable::row_scales,
    variant_portable::group_scales,
    variant_portable::round_weights,
    variant_portable::convert,
    variant_portable::sample,
};

}  // namespace flyray
