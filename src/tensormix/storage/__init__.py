"""What stands on disk: files written whole, checkpoints and their packed tensors, and the memory they are read into."""
