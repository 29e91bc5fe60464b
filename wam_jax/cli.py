"""What binaries without a config share: a user's mistake is one line, an interruption too."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


def run(main: Callable[[Sequence[str]], None], *, takes: str = "") -> None:
    """Runs a binary and ends the process.

    Args:
      main: gets the arguments that are no flags.
      takes: what they are, "datasets"; empty: there are none.
    """

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if argv[1:] and not takes:
                raise ValueError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            main(argv[1:])
        except (ValueError, OSError) as error:
            logging.debug("traceback", exc_info=True)
            sys.exit(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            print("interrupted: finished work is kept; the same command goes on from there", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {'; '.join(line.strip() for line in str(error).splitlines() if line.strip())}")
