"""Callbacks: metrics of token efficiency, progress, answer files, stopping and advice."""
