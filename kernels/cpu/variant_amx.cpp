// x86-64 with AVX-512 and AMX tiles of 8-bit integers and bfloat16.
// The target stays set to the end of the file: templates are compiled where the file ends. Standard templates stay out,
// since the linker might keep this file's copy of one for CPUs that cannot run it.
#include <sched.h>

#include "operations.h"

#if defined(FLYRAY_AMX_VARIANT)
#define FLYRAY_AVX512 1  // GCC 12 sets no macros for this pragma in C++
#define FLYRAY_AMX 1
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx512vbmi")
#pragma GCC target("avx512bf16,gfni,amx-tile,amx-int8,amx-bf16")
namespace flyray {
namespace variant_amx {
#include "kernels.inc"
}  // namespace variant_amx

const Operations kAmxOperations = {
    "amx",
    variant_amx::rms_norm,
    variant_amx::tile_linear,
    variant_amx::integer_linear,
    variant_amx::rope,
    variant_amx::write_parts,
    variant_amx::tile_attention,
    variant_amx::gate,
    variant_amx::quantize,
    variant_amx::silu_mul,
    variant_amx::combine,
    variant_amx::experts,
    variant_amx::fold_scales,
    variant_amx::row_scales,
    variant_amx::group_scales,
    variant_amx::round_weights,
    variant_amx::convert,
    variant_amx::sample,
};

}  // namespace flyray
#endif
