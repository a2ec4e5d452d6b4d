"""Selection: how many indices to remove, and which."""
