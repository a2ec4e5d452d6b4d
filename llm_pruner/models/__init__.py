"""Run any Hugging Face model: per-layer widths, layer stacks, blockwise passes, devices. Knows nothing of pruning."""
