"""`python -m lowvram_db` is `lowvram-db`, for a Python whose scripts are not on the PATH."""

from lowvram_db.cli import main

main()
