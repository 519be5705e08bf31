"""`python -m pmc_fast` is `pmc-fast`."""

import sys

from pmc_fast.cli import main

sys.exit(main())
