"""`python -m omnimerge`."""

from omnimerge.cli import main

if __name__ == "__main__":
    main(prog_name="omnimerge")
