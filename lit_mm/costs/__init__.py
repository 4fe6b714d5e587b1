"""Costs from shapes (FLOPs, KV cache, token counts), and devices and timing."""
