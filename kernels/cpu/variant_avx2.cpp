// x86-64 with AVX2.
// The target stays set to the end of the file: templates are compiled where the file ends. Standard templates stay out,
// since the linker might keep this file's copy of one for CPUs that cannot run it.
#include "operations.h"

#if defined(FLYRAY_X86_VARIANTS)
#define FLYRAY_AVX2 1  // GCC 12 sets no macros for this pragma in C++
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
namespace flyray {
namespace variant_avx2 {
#include "kernels.inc"
}  // namespace variant_avx2

const Operations kAvx2Operations = {
    "avx2",
    variant_avx2::rms_norm,
    variant_avx2::linear,
    variant_avx2::integer_linear,
    variant_avx2::rope,
    variant_avx2::write_kv,
    variant_avx2::attention,
    variant_avx2::gate,
    variant_avx2::quantize,
    variant_avx2::silu_mul,
    variant_avx2::combine,
    variant_avx2::experts,
    variant_avx2::fold_scales,
    variant_avx2::row_scales,
    variant_avx2::group_scales,
    variant_avx2::round_weights,
    variant_avx2::convert,
    variant_avx2::sample,
};

}  // namespace flyray
#endif
