"""Run as a program: finds its package where this file lies, and starts the rocklet.

start.pyc [number=value ...]      the agent, with its connection as descriptor 0 (agent.py)
start.pyc listen ...              the agent, to be connected to from inside (listen.py)
start.pyc bridge                  such a connection (bridge.py)
"""

import sys


def load(path: str) -> None:
    """Makes modules of what `bundle` in interpreter.py wrote: to find and read file after file would take the import
    system longer than Python takes to run what is in them."""
    import marshal

    with open(path, "rb") as file:
        for entry in file.readline().split():
            module, _, size = entry.decode().partition("=")
            made = sys.modules[module] = type(sys)(module)
            made.__package__ = "rocklet"
            if module == "rocklet":
                made.__path__ = [folder]  # of those that are loaded when first asked for
            exec(marshal.loads(file.read(int(size))), made.__dict__)


folder = __file__.rpartition("/")[0]
sys.path.append(folder.rpartition("/")[0])
if __file__.endswith(".pyc"):  # the copy in a sandbox
    load(folder + "/bundle")

name = "rocklet." + (sys.argv.pop(1) if sys.argv[1:2] in (["listen"], ["bridge"]) else "agent")
__import__(name)  # by name: there is no such top-level package but in the sandbox
sys.modules[name].main()
