"""The sample competition: scenes drawn at random, as prompts and images, and a CLIP for them."""
