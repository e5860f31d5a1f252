"""The Triton kernels and their launchers, imported as `fastenc.kernels`."""
