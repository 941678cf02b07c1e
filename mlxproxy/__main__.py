"""`python -m mlxproxy`."""

from mlxproxy.cli import main

if __name__ == "__main__":
    main()
