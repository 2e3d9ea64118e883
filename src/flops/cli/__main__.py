"""`python -m flops.cli` is `flops`."""

from flops.cli.main import main

if __name__ == "__main__":
    main()
