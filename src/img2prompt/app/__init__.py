"""The page to try a trained model on, and the HTTP API behind it."""
