"""`python -m obc_tools` is `obc`, of the very environment that runs it."""

from .cli import main

if __name__ == "__main__":
    main()
