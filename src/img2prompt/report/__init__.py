"""Scores, comparisons and figures."""
