"""Surgery: slice weights by a plan, and rebuild the model."""
