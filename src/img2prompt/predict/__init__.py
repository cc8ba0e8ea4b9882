"""From predictions to the competition's submission file."""
