"""Surgery: carrying out a plan."""
