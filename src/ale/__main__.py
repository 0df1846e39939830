"""`python -m ale`: the `ale` command, where the interpreter is chosen by hand."""

from ale.cli import main

if __name__ == "__main__":
    main()
