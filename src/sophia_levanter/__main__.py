"""Make `python -m sophia_levanter VERB ...` equivalent to `sophia-levanter VERB ...`."""

import sys

from sophia_levanter.cli import main

if __name__ == "__main__":
    sys.exit(main())
