"""`hf-lmopt`: what this package has, on the command line."""

from __future__ import annotations

import argparse

from .optim.explain import optimizer_table


def main(argv: list[str] | None = None) -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="hf-lmopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    help_text = "the optimizers by name, with bytes of state per number of a parameter, options and sources"
    commands.add_parser("optimizers", help=help_text, description=help_text)
    parser.parse_args(argv)
    print(optimizer_table())


if __name__ == "__main__":
    main()
