"""The stages of dvc.yaml, one script each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

# A copy of the project (`dvc exp run --temp`, a worktree) must run its own library.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from img2prompt.core import process

process.settle()
WATCH = process.Watch()  # knows the parent from now on
if sys.argv[0] == "-m":  # `python -m pipelines.STAGE`, and not a test that imports a stage
    WATCH.attend()


def run(stage: Callable[..., None]) -> None:
    """Check all of params.yaml, then give a stage the sections that its parameters name."""
    from img2prompt.cli.check import load_params  # judges sections of other stages too, but none reaches this one

    WATCH.attend()
    try:
        params = load_params()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    with process.turn(" ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]), recorded=True):
        stage(**{name: getattr(params, name) for name in inspect.signature(stage).parameters})
