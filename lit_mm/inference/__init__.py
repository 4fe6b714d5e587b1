"""What answers: generation at any scale."""
