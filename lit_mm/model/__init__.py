"""What computes: pixels and tokens to losses. Plain PyTorch; imports nothing else of this package."""
