"""`python -m tulu_lightning`: the same as the `tulu` command."""

import sys

from tulu_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
