"""What judges: metrics, and accuracy against tokens."""
