"""`python -m labkit` is the program `labkit`."""

import sys

from labkit.cli import main

sys.exit(main())
