"""Opens trained runs, exports them, and imports published weights."""
