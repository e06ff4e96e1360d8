"""`python -m morsr` is the `morsr` command."""

import sys

from morsr.cli import main

sys.exit(main())
