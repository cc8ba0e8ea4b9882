"""The ensemble (eq. 6), its members and their weights, and the constant prediction."""
