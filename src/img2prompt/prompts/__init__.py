"""Prompts: their embeddings, augmented copies, near-duplicates, folds."""
