"""Reading and writing model files, which no other room does."""
