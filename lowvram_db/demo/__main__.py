"""`python -m lowvram_db.demo RUN OTHER_RUN`: draw the base model and what two runs made of it into one sheet."""

import sys
from pathlib import Path

from lowvram_db.quiet import hide_loading_bars, quiet_libraries


def main() -> None:
    quiet_libraries()
    from lowvram_db.demo.showcase import before_after
    from lowvram_db.run import Run

    hide_loading_bars()
    trained, other = (Run(Path(folder)) for folder in sys.argv[1:])
    print(f"before and after: {before_after(trained, other)}")


if __name__ == "__main__":
    main()
