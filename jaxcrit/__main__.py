"""``python -m jaxcrit`` is the command ``jaxcrit``."""

import sys

from jaxcrit.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
