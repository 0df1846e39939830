"""ale: an Agentic Learning Ecosystem on one node. `import ale` is light: it loads no torch."""

__version__ = "0.1.0"
