"""Selection: how much goes, and which indices."""
