"""`python -m temper` is `temper`. Floor 9."""

import sys

from temper.cli import main

sys.exit(main())
