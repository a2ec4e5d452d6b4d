"""The only part that touches model files."""
