"""`python -m cluster` is the command `understudy`."""

from cluster.cli import main

if __name__ == "__main__":
    main()
