"""The virtual clock, for tests: those of deadlines and back-off take no time, and no test sleeps.

result = run(scenario())      `await asyncio.sleep(3600)` inside returns at once; `loop.time()` has moved by 3600
"""

from ale.virtual_clock import Deadlock, VirtualClockLoop, run

__all__ = ["Deadlock", "VirtualClockLoop", "run"]
