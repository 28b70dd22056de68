"""python -m meft_bench is meft-bench."""

import sys

from meft_bench.cli import main

sys.exit(main())
