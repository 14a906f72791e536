// x86-64 with AVX-512 and its 8-bit dot product (VNNI).
// The target stays set to the end of the file: templates are compiled where the file ends. Standard templates stay out,
// since the linker might keep this file's copy of one for CPUs that cannot run it.
#include <sched.h>

#include "operations.h"

#if defined(FLYRAY_X86_VARIANTS)
#define FLYRAY_AVX512 1  // GCC 12 sets no macros for this pragma in C++
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni")
namespace flyray {
namespace variant_avx512 {
#include "kernels.inc"
}  // namespace variant_avx512

const Operations kAvx512Operations = {
    "avx512",
    variant_avx512::rms_norm,
    variant_avx512::linear,
    variant_avx512::integer_linear,
    variant_avx512::rope,
    variant_avx512::write_kv,
    variant_avx512::attention,
    variant_avx512::gate,
    variant_avx512::quantize,
    variant_avx512::silu_mul,
    variant_avx512::combine,
    variant_avx512::experts,
    variant_avx512::fold_scales,
    variant_avx512::row_scales,
    variant_avx512::group_scales,
    variant_avx512::round_weights,
    variant_avx512::convert,
    variant_avx512::sample,
};

}  // namespace flyray
#endif
