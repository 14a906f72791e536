"""The GPU backend: Triton kernels of one source for CUDA and for gfx942."""
