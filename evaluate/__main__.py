"""How good, and how fast, cached samples are. From the root of a clone: python -m evaluate COMMAND --help."""

import importlib
import sys
from collections.abc import Sequence

from adacorr.command import Parser, run_command

COMMANDS = {  # name: (module with add_flags(parser) and run(args), what it does)
    "fid": ("evaluate.fid", "FID, sFID, Inception Score, precision, recall and KID of sets of images"),
    "statistics": ("evaluate.reference", "measure a reference once, for `fid`"),
    "fidelity": ("evaluate.fidelity_command", "PSNR, SSIM and LPIPS of sets of images to the uncached set"),
    "drift": ("evaluate.drift", "relative error of the state after each step, to the uncached run"),
    "cost": ("evaluate.cost", "seconds, overhead, memory and compute of a cached run beside the uncached one"),
    "compare": ("evaluate.compare", "every caching method, alone and under AdaCorrection, at equal compute"),
    "leaderboard": ("evaluate.leaderboard", "the page of a comparison, from its JSON"),
    "table1": ("evaluate.tables", "Table I of the paper: caching methods, alone and corrected"),
    "table2": ("evaluate.tables", "Table II: backbones and data"),
    "table3": ("evaluate.tables", "Table III: plug and play, every method"),
    "table4": ("evaluate.tables", "Table IV: gamma and lambda"),
    "figure2": ("evaluate.figures", "Figure 2: spatial variation over the image, by step"),
    "figure3": ("evaluate.table_figures", "Figure 3: quality against speed, from the JSON of table1"),
    "figure4": ("evaluate.table_figures", "Figure 4: gamma and lambda, from the JSON of table4"),
    "figure5": ("evaluate.figures", "Figure 5: offset, drift and hit rate by layer and step"),
    "motion": ("evaluate.motion", "temporal consistency of clips whose noise moves, cached against uncached: t-FID"),
    "theory": ("evaluate.theory", "the bound of Proposition 1 and the limit of Theorem 1 on real runs"),
    "report": ("evaluate.report", "results and samples on one HTML page"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code. Only the module of the command is imported."""
    argv = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:11} {line}" for name, (_, line) in COMMANDS.items())
    parser = Parser("evaluate", description=__doc__, epilog=f"commands:\n{lines}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(argv[:1]).command
    module = importlib.import_module(COMMANDS[command][0])
    parser = Parser(f"evaluate {command}", description=module.__doc__)
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    parser.set_defaults(command=command, made_with=["python", "-m", "evaluate", *argv])
    module.add_flags(parser)  # a module with several commands asks parser.get_default("command")
    args = parser.parse_args(argv[1:])
    return run_command(f"evaluate {command}", lambda: module.run(args), args.debug)


if __name__ == "__main__":
    sys.exit(main())
