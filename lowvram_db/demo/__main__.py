"""`python -m lowvram_db.demo RUN OTHER_RUN`: the base model beside what two runs made of it, in one sheet."""

import argparse
import sys
from pathlib import Path

from lowvram_db.demo.showcase import before_after
from lowvram_db.errors import UserError
from lowvram_db.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lowvram_db.demo", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run; the sheet goes there")
    parser.add_argument("other", type=Path, help="folder of another one on the same base model")
    given = parser.parse_args()
    try:
        print(f"before and after: {before_after(Run(given.run), Run(given.other))}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
