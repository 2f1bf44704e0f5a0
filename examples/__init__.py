"""Examples: each is a file to copy, and each is run by a test."""
