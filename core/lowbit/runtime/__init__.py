"""Running packed weights: the layer, its torch ops, CPU kernels, and whole models."""
