"""CLIP as one open_clip folder, its image tower as layers, its features."""
