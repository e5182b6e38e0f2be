"""`hf-lmopt`: what this package has, and what it says of a run, on the command line."""

from __future__ import annotations

import argparse
import sys

from .clipping import clipping_table
from .doctor import examine
from .optim.explain import optimizer_table
from .publishing.report import write_report
from .publishing.run_history import RunStateError
from .selftest import SelfTestUnavailable, run_selftest
from .selftest.device import DEVICES
from .selftest.run import DEFAULT_OUTPUT


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="hf-lmopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    help_text = "the optimizers by name, with bytes of state per number of a parameter, options and sources"
    commands.add_parser("optimizers", help=help_text, description=help_text)
    help_text = "the clipping strategies by name, with their thresholds, options and sources"
    commands.add_parser("clipping", help=help_text, description=help_text)
    help_text = "curves, heat maps and advice of a run of any Trainer, as one HTML file with its pictures beside it"
    report = commands.add_parser("report", help=help_text, description=help_text)
    report.add_argument("run", metavar="RUN", help="folder of the run, or of one of its checkpoints")
    report.add_argument("--output", metavar="FILE", help="the HTML file; report.html in the run's folder if not given")
    help_text = 'whether attn_implementation="lmopt" works here, and for a model: status 0 if it does, 1 if not'
    doctor = commands.add_parser("doctor", help=help_text, description=help_text)
    doctor.add_argument("model", metavar="MODEL", nargs="?", help="local folder, name on the Hub, or model type")
    doctor.add_argument("--build", action="store_true", help="build the compiled extension if it is not there")
    help_text = (
        "whether the compiled extension does here what it should, with speeds, as one JSON: status 0 if it does"
    )
    selftest = commands.add_parser("selftest", help=help_text, description=help_text)
    selftest.add_argument("--device", default=DEVICES[0], choices=DEVICES, help="what to test; cuda if not given")
    selftest.add_argument("--output", metavar="FILE", default=DEFAULT_OUTPUT, help=f"{DEFAULT_OUTPUT} if not given")
    selftest.add_argument("--quick", action="store_true", help="few cases, no timing and no compute-sanitizer")
    args = parser.parse_args(argv)
    if args.command == "optimizers":
        print(optimizer_table())
    elif args.command == "clipping":
        print(clipping_table())
    elif args.command == "doctor":
        try:
            text, works = examine(args.model, args.build)
        except ValueError as error:
            parser.exit(2, f"hf-lmopt doctor: {error}\n")
        print(text)
        return 0 if works else 1
    elif args.command == "selftest":
        try:
            return 0 if run_selftest(args.device, args.output, args.quick) else 1
        except (SelfTestUnavailable, OSError) as error:
            parser.exit(1, f"hf-lmopt selftest: {error}\n")
    else:
        try:
            page, *pictures = write_report(args.run, args.output)
        except (OSError, ImportError, RunStateError) as error:
            parser.exit(2, f"hf-lmopt report: {error}\n")
        print(f"{page} ({len(pictures)} pictures beside it)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
