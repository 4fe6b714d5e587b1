"""Metrics, and accuracy against tokens."""
