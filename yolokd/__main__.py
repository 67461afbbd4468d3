"""`python -m yolokd`: the command line."""

from yolokd.cli import main

if __name__ == "__main__":
    main()
