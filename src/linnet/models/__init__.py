"""Models built from mixers: the language-model decoder, its MLPs, generation, and checkpoints on disk."""
