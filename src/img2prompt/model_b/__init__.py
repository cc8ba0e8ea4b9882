"""Model B: the prompts of the nearest neighbours in CLIP's embedding space (eq. 4-5)."""
