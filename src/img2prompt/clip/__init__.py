"""CLIP: its open_clip folder, its image tower as a sequence of layers, and its features."""
