"""Run as a program: finds its package where this file lies, and starts the rocklet."""

import sys

sys.path.append(__file__.rpartition("/")[0].rpartition("/")[0])

# By name: there is no such top-level package but in the sandbox.
__import__("rocklet.agent").agent.main()
