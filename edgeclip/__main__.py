"""`python -m edgeclip`, which is how torchrun starts it."""

from edgeclip.cli import main

if __name__ == "__main__":
    main()
