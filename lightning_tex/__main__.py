"""``python -m lightning_tex``."""

from lightning_tex.cli import main

if __name__ == "__main__":
    main()
