"""What it costs, from shapes: FLOPs and KV cache; devices and timing."""
