// The CPU kernels of flyray: a plain C library loaded through ctypes.
extern "C" __attribute__((visibility("default"))) int flyray_abi_version() { return 1; }
