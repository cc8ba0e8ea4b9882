"""Model A: heads on CLIP's image tower (arXiv 2401.06167, eq. 1-3)."""
