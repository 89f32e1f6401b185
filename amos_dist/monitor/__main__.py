"""`python -m amos_dist.monitor FILE.csv PICTURE.png`: a picture of what a monitor wrote."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .plot import plot


def main() -> int | str:
    parser = argparse.ArgumentParser(prog="python -m amos_dist.monitor", description=__doc__)
    parser.add_argument("file", type=Path, help="what amos_dist.monitor.CSV wrote")
    parser.add_argument("picture", type=Path, help="to write: .png, .svg or .pdf")
    arguments = parser.parse_args()
    try:
        plot(arguments.file, arguments.picture)
    except (OSError, ValueError) as error:
        return str(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
