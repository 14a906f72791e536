// Whether this process may use AMX tiles: the CPU has them, the system saves them, and it gave them to this process.
#include "operations.h"

#if defined(FLYRAY_AMX_VARIANT)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace flyray {
namespace {

bool cpu_has_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return (edx & kNeeded) == kNeeded;
}

bool system_saves_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // XTILECFG and XTILEDATA
  return (low & kTileState) == kTileState;
}

// Linux gives a process the eight kilobytes of tile state only when asked; threads and forked children inherit it.
bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool tiles_permitted() {
  static const bool permitted = cpu_has_tiles() && system_saves_tiles() && ask_for_tiles();
  return permitted;
}

}  // namespace flyray
#endif
