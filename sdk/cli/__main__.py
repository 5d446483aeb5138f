"""`python -m parallax.sdk.cli`: the `parallax` command."""

from parallax.sdk.cli import main

if __name__ == "__main__":
    main()
