"""``python -m kvpack``: the command line."""

from kvpack.cli import main

if __name__ == "__main__":
    main()
