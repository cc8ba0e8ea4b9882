"""Model B: the prompts of the nearest neighbours in CLIP space (eq. 4-5)."""
