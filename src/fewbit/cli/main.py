"""The `fewbit` command: finds the subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys

import click

from fewbit.errors import EngineError, FewbitError, InputError, suggest
from fewbit.version import __version__

COMMANDS: dict[str, str] = {
    "search": "fewbit.cli.search:search",
    "quantize": "fewbit.cli.quantize:quantize",
    "eval": "fewbit.cli.evaluate:evaluate",
    "bench": "fewbit.cli.bench:bench",
    "inspect": "fewbit.cli.inspect:inspect",
    "report": "fewbit.cli.search:report",
    "methods": "fewbit.cli.lists:methods",
    "recipes": "fewbit.cli.lists:recipes",
    "engines": "fewbit.cli.lists:engines",
    "demo": "fewbit.cli.demo:demo",
}
# Threads of torch that wait for each other by spinning steal the cores from the engines and from each other:
# on a busy machine seven times the processor time. It counts only when set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

USAGE, NOTHING_FOUND, ENGINE_FAILED, STOPPED = 2, 3, 4, 130
_RESUMED = "what was measured is kept: the same command with --resume goes on"
_LEFT = {
    "search": _RESUMED,
    "demo": _RESUMED,
    "quantize": "no file was written; the layers that were learned are kept: the same command goes on",
}


class _Lazy(click.Group):
    """Imports a subcommand only when it is called, so that `--help` does not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a subcommand, imported now; none where there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the subcommand, or name the nearest one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = suggest(args[0], COMMANDS)
            raise click.UsageError(f"no command '{args[0]}'{near}; there are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Lazy,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="fewbit %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Give a trained CNN, labelled images and an error budget; get the fastest network inside the budget."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Else those of the process.

    Returns:
        0 done; 2 the input cannot be used (one line on stderr says why); 3 no network inside the budget;
        4 an engine failed; 130 stopped by the user.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        result = cli.main(args=given, prog_name="fewbit", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say(f"stopped; {_LEFT.get(' '.join(given[:1]), 'nothing was written')}", STOPPED)
    except click.UsageError as reason:
        where = f"{reason.ctx.command_path}: " if reason.ctx else "fewbit: "
        return _say(f"{where}{_one_line(reason.format_message())} (see {where[:-2]} --help)", USAGE)
    except InputError as reason:
        return _say(f"fewbit: {_one_line(str(reason))}", USAGE)
    except EngineError as reason:
        return _say(f"fewbit: {_one_line(str(reason))}", ENGINE_FAILED)
    except FewbitError as reason:
        return _say(f"fewbit: {_one_line(str(reason))}", USAGE)
    return result if isinstance(result, int) else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def run() -> None:
    """Run as a process."""
    sys.exit(main())
