"""Generation of answers at any of the scales."""
