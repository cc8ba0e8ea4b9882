"""What every room stands on: files, params, progress, images, rows, the metric."""
