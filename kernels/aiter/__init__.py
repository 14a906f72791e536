"""AMD's AITER (package amd-aiter) as a source of kernels for gfx942."""
