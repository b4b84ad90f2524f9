"""`python -m fastfar`: the same as the command `fastfar`."""

import sys

from fastfar.cli import main

if __name__ == "__main__":
    sys.exit(main())
