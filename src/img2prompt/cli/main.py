"""`img2prompt`: the commands that are not stages of the pipeline."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from img2prompt.core import process

COMMANDS = {
    "predict": "the prompts behind images: in words, and as embeddings",
    "serve": "a page to try a trained model on, and an HTTP API",
    "score": "the mean cosine of a submission with the truth, as the host has it",
    "explain": "one image of the last run: what each model made of it, and why",
    "check": "check params.yaml",
    "compare": "experiments with a base, image by image: did it help, on which folds, and is it noise?",
    "table": "the paper's table on the data of params.yaml; the figures of the documents",
    "export": "the trained model as one folder, to hand on or to run on Kaggle",
    "search": "settings of Model A and of the linear baseline, on inner splits of the training folds",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without `arguments`, those of the process count."""
    process.settle()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="img2prompt", description="From images to the embeddings of their prompts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in words[:1]:  # importing the other commands' modules would only cost time
            module = import_module(f"img2prompt.cli.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    options = parser.parse_args(words)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
