"""The model in plain PyTorch, from pixels and tokens to losses. It imports no other part of this package."""
