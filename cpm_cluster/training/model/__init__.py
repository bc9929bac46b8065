"""The decoder: its blocks, layers, attention and LoRA; what computes it is an engine."""
