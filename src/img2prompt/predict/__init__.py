"""From predictions to what the competition takes."""
