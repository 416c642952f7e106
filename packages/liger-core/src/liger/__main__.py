"""`python -m liger`: a report on this installation, what `liger.apply` would do to a model, and what it brings here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from liger.cli.answer import Answer, RefusalError, show, show_json

_STATUS = """\
exit status:
  0  report: all fits together; explain: an adapter knows the model; bench: all was measured
  1  report: a version is out of range, an adapter cannot be used, or a kernel fails;
     explain: no adapter can be used for the model; bench: something that was measured fails
  2  asked wrongly: an unknown argument, a config that cannot be read or built, no GPU for bench
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m liger",
        description="Without a command: a report on this installation, to be pasted into an issue.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    as_json = argparse.ArgumentParser(add_help=False)
    # Suppressed, or a command's default would undo what stands before the command.
    as_json.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="a JSON document instead of the page"
    )
    parser.add_argument("--json", action="store_true", help="a JSON document instead of the page")
    commands = parser.add_subparsers(dest="command", metavar="command")
    explain = commands.add_parser("explain", parents=[as_json], help="what liger.apply would do to a model, and why")
    explain.add_argument("model", help="a model type (llama), a config.json, or a directory with one; no hub names")
    explain.add_argument("--modules", action="store_true", help="a line for every module")
    bench = commands.add_parser("bench", parents=[as_json], help="eager, torch.compile and liger on this GPU")
    bench.add_argument("--only", action="append", metavar="OP", help="one op, or step; may be repeated")
    bench.add_argument("--tiny", action="store_true", help="sizes that prove that it runs, without a GPU too")
    bench.add_argument(
        "--seconds", type=float, default=120, help="after these, no further shape of an op is begun; 120 by default"
    )
    return parser


def _answer(options: argparse.Namespace) -> Answer:
    # Each command imports what it alone needs.
    if options.command == "explain":
        from liger.cli.explain import explain

        return explain(options.model, each_module=options.modules)
    if options.command == "bench":
        from liger.cli.bench import bench

        return bench(only=options.only, tiny=options.tiny, seconds=options.seconds)
    from liger.cli.report import report

    return report()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, by default that of the process's own command line, and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        answer = _answer(options)
    except RefusalError as error:
        sys.stderr.write(f"python -m liger: {error}\n")
        if options.json:
            show_json(options.command, {"error": str(error)})
        return error.status
    if options.json:
        show_json(answer.command, answer.data)
    else:
        show(answer)
    return answer.status


if __name__ == "__main__":
    raise SystemExit(main())
