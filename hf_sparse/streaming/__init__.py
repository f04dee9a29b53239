"""What pruning from disk to disk consists of: weights by block, files written in place, and a journal to go on from."""
