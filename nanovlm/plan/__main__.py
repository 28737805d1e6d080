"""The command: what a recipe's stages would need, in words, or a table of all published recipes.

    python -m nanovlm.plan --recipe llava15/7b --gpus 8 --memory 80          python -m nanovlm.plan --all

The plan is that of training sharded over the GPUs, as PyTorch's FSDP2 does it (`train_tiny.py --shard`); the row DDP is that of a whole copy
on each. experiments/plan_simulation.py compares it with PyTorch's own memory tracker. No GPU is used here, and nothing of a model's size is
allocated. The formulas stand in stages.py, what is measured in simulate.py.
"""

import argparse
import sys
from collections.abc import Sequence

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.plan.simulate import look
from nanovlm.plan.stages import GIB, MFU, PEAK, Machine, Plan, make_batch, meta_model, plan, words_of
from nanovlm.recipes.stage import Recipe
from nanovlm.training.weights import checkpointed, downloads


def describe(found: Plan) -> str:
    """All that is known of one stage."""
    recipe, stage, machine = found.recipe, found.stage, found.machine
    model = checkpointed(meta_model(recipe, stage), False)
    plain = look(model, make_batch(model, recipe, stage, found.micro, words_of(model, stage)[0]), machine.gpus)
    parts = ", ".join(f"{part} {count / 1e6:,.1f} M (learn {learned / 1e6:,.1f} M)" for part, (count, learned) in found.parts.items() if count)
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in found.bytes.items())
    verdict = "fits" if found.fits else "DOES NOT FIT, even at the smallest micro-batch: more GPUs, more memory or a smaller batch"
    saved = f"without checkpointing {plain.peak / GIB:.2f}" if recipe.checkpointing else "this recipe has no checkpointing"
    cost = f"{found.hours:,.1f} hours, {found.hours * machine.gpus:,.0f} GPU-hours"
    shape = f"{machine.gpus} GPUs × {found.micro} × {found.accumulate} accumulated"
    return f"""{recipe.name}, stage {stage.name}: {stage.steps:,} steps of {stage.batch_size:,} = {shape}
  parameters      {parts}
  GiB, sharded    {kinds}
                  largest rank's peak {found.needed / GIB:.1f} of {machine.memory:g}: {verdict}
  activations     kept {found.look.kept / GIB:.2f} of {found.look.peak / GIB:.2f}, logits of a chunk in fp32 {found.look.logits / GIB:.2f}; {saved}
  GiB, DDP        {found.whole / GIB:.1f} on each GPU before the first activation
  time            {found.flops:.3e} FLOPs a step; at {machine.mfu:.0%} of {machine.peak / 1e12:g} TFLOP/s {cost}"""


HEAD = (f"{'recipe':<33}{'stage':<11}{'parameters':>11}{'learn':>10}{'batch':>7}{'micro':>7}{'acc.':>6}{'GiB':>7}{'DDP':>8}{'FLOPs/step':>12}"
        f"{'hours':>9}{'GPU-hours':>11}")


def row(found: Plan) -> str:
    """One line of the table; DDP: GiB on each GPU without activations."""
    count, learned = map(sum, zip(*found.parts.values()))
    return (f"{found.recipe.name:<33}{found.stage.name:<11}{count / 1e6:>9,.0f} M{learned / 1e6:>8,.1f} M{found.stage.batch_size:>7,}{found.micro:>7}"
            f"{found.accumulate:>6}{found.needed / GIB:>7.1f}{found.whole / GIB:>8.1f}{found.flops:>12.2e}{found.hours:>9,.1f}"
            f"{found.hours * found.machine.gpus:>11,.0f}{'' if found.fits else '  does not fit'}")


def published() -> list[Recipe]:
    """Those that are neither tiny nor small, nor a backbone alone."""
    return [recipes.get(name) for name in recipes.names() if name not in recipes.BACKBONES and not name.split("/")[1].startswith(("tiny", "small"))]


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        machine, chosen = checked(options)
        if options.all:
            print(HEAD)
        for recipe, stage in [(one, stage) for one in chosen for stage in one.stages]:
            try:
                found = plan(recipe, stage, machine, options.words)
                print(row(found) if options.all else describe(found), flush=True)
            except UserError as error:
                if not options.all:
                    raise
                print(f"{recipe.name:<33}{error}", flush=True)  # the others may have a plan
        if not options.all and (wanted := downloads(chosen[0])):
            print("below $NANOVLM_WEIGHTS:", ", ".join(f"{folder} ({use})" for folder, use in wanted))
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def checked(options: argparse.Namespace) -> tuple[Machine, list[Recipe]]:
    """The machine and the recipes that the options mean."""
    if (options.recipe is None) != options.all:
        raise UserError("Give either --recipe, for example --recipe llava15/7b, or --all.")
    if options.recipe in recipes.BACKBONES:
        raise UserError(f"--recipe {options.recipe} is a backbone, which is not planned; give a paper's recipe, such as llava15/7b.")
    for name, least, most, mend in (("gpus", 1, 2 ** 20, "give 1 GPU or more"), ("memory", 1, 2 ** 20, "give the GiB of one GPU, such as 80"),
                                    ("mfu", 0.001, 1, f"give a share of the peak from 0.001 to 1, such as {MFU}"),
                                    ("peak", 0.001, 2 ** 20, f"give the TFLOP/s of one GPU in bf16, such as {PEAK / 1e12:g}"),
                                    ("words", 1, 2 ** 20, "a usual text has 1 token or more")):
        value = vars(options)[name]
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} {value:g}: {mend}.")
    return Machine(options.gpus, options.memory, options.mfu, options.peak * 1e12), published() if options.all else [recipes.get(options.recipe)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.plan", description="What a full-size run would need: memory, micro-batch, FLOPs, hours. No GPU is used.",
        epilog="example: python -m nanovlm.plan --recipe llava15/7b --gpus 8 --memory 80", allow_abbrev=False)
    parser.add_argument("--recipe", metavar="NAME", help="one recipe, all of its stages")
    parser.add_argument("--all", action="store_true", help="a table of all published recipes (minutes)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="how many share the model and the batch (default: 8)")
    parser.add_argument("--memory", type=float, default=80.0, metavar="GIB", help="of one GPU (default: 80)")
    parser.add_argument("--mfu", type=float, default=MFU, metavar="SHARE", help=f"share of the peak that the model's own FLOPs reach (default: {MFU})")
    parser.add_argument("--peak", type=float, default=PEAK / 1e12, metavar="TFLOPS", help="of one GPU in bf16 (default: 312, an A100's)")
    parser.add_argument("--words", type=int, metavar="N", help="tokens of a usual text, for the time (default: by the kind of the data)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
