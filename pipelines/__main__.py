"""Check params.yaml; the make targets do so before anything runs."""

import sys

import pipelines  # noqa: F401 - puts the library on the path
from img2prompt.params import load_params

try:
    load_params()
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
