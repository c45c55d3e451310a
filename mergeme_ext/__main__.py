"""``python -m mergeme_ext``: the same as the command ``mergeme``."""

import sys

from mergeme_ext.cli import main

sys.exit(main())
