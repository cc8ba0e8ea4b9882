"""Serve a page to try a trained model on, and an HTTP API, on this machine.

    img2prompt serve
    img2prompt serve --bundle DIR --port 8080

Pictures are kept in memory only, and no longer than it takes to answer. /openapi.json describes the API; docs/serve.md
has the limits, and how to run it as a service. It needs the extra `app`: `pip install 'img2prompt[app]'`.

Exit status: 0, it was told to end (SIGTERM, Ctrl-C) and has answered what it had taken; 1, the model cannot be loaded,
or the address not be had.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from img2prompt.cli.predict import OUTPUTS, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: what to serve, and where."""
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the trained model; default: the last run, outputs/")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that it goes by, as behind a proxy"
    )


def main(options: argparse.Namespace) -> None:
    """Serve until the process is told to end."""
    try:
        from img2prompt.app.server import listen, serve
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install 'img2prompt[app]'")
    try:
        with listen(options.host, options.port) as bound:
            predictor = load(options.bundle)
            # The server, told to end, ends the process by the same signal: then what clears up would not run.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            serve(predictor, options.bundle or OUTPUTS, bound, options.allow_host)
    except (ValueError, OSError) as error:
        if os.environ.get("IMG2PROMPT_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)
