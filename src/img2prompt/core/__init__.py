"""Shared by all other packages: files, parameters, progress, images, rows, the metric."""
