"""The command line: the only subpackage that uses argparse or DVC."""
