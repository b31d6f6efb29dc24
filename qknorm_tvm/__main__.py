"""``python -m qknorm_tvm``: the command line."""

import sys

from .cli import main

sys.exit(main())
