"""Competitions in, whatever their layout."""
