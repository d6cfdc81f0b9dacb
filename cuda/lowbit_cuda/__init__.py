"""CUDA for lowbit: shared device headers, and later the NVRTC build and launch. Imports neither core nor formats."""
