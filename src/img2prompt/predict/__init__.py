"""The trained model as one object, and the competition's submission file."""
