"""Models larger than memory: compressed from disk to disk, or while transformers loads them."""
