"""Reads images and prompts from sources in several layouts."""
