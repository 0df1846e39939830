"""Run as a program: finds its package where this file lies, and starts the rocklet."""

import sys

sys.path.append(__file__.rpartition("/")[0].rpartition("/")[0])

from rocklet.agent import main  # type: ignore[import-not-found]

main()
