"""`python -m fewbit` is the `fewbit` command."""

from fewbit.cli.main import run

if __name__ == "__main__":
    run()
