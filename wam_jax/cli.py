"""What binaries without a config share: a user's mistake is one line, an interruption too."""

import os
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


def check_output(path: str, *endings: str) -> None:
    """Checks the name of a file that --output asks for, before any work.

    Raises:
      ValueError: its ending is none of `endings`, or no file of that name can be written.
    """
    ending = os.path.splitext(path)[1]
    if ending not in endings:
        raise ValueError(
            f"--output={path} ends in none of {', '.join(endings)}; name the file after what it is to hold"
        )
    if os.path.isdir(path):
        raise ValueError(f"--output={path} is a folder; name a file")
    folder = os.path.dirname(path)
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if folder and not os.path.isdir(folder):
        raise ValueError(f"--output={path}: {folder} is a file; name another folder")
    if not os.access(folder or ".", os.W_OK):
        raise ValueError(f"--output={path}: nothing can be written in {folder or 'this folder'}; name another folder")


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {'; '.join(line.strip() for line in str(error).splitlines() if line.strip())}")
