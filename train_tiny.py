"""Train a paper's own stages at tiny size, on the image encoder and the language model that come with this repository, or from nothing.

    python train_tiny.py --model llava
"""

import argparse
import sys

from nanovlm import recipes
from nanovlm.errors import UserError
from nanovlm.runs.checkpoint import NO_ROOM, SaveFailed
from nanovlm.runs.run import Options, run
from nanovlm.runs.setting import by_stage
from nanovlm.training.distributed import PeerLost, leave
from nanovlm.training.loop import TrainingFailed

MODELS = [name.removesuffix("/tiny") for name in recipes.names() if name.endswith("/tiny") and name not in recipes.BACKBONES]

EXAMPLES = """examples:
  python train_tiny.py --model llava                                the whole of it, on the embedded world
  python train_tiny.py --model llava --steps 0.05                   a quick look: a twentieth of the steps
  python train_tiny.py --model llava --data photos/                 your own pictures, a .txt beside each
  python train_tiny.py --model llava --data align=pairs/ --data tune=talk.json   for each stage its own
  python train_tiny.py --model llava --data a.jsonl --on-missing skip   leave out records whose picture is broken
  python train_tiny.py --model llava --out runs/a --resume          go on after Ctrl-C, a crash or a full disk
  python train_tiny.py --model llava --out runs/a --overwrite       delete that run and start again
  python train_tiny.py --model llava --device cuda --seed 7         another device, other random numbers
  python train_tiny.py --model llava --from-scratch                 train its image encoder and language model, too (over an hour)
  python train_tiny.py --model llava --from-scratch --no-cache      and take nothing of what was trained here before
  python train_tiny.py --recipe clip/tiny                           any recipe by name, here a backbone alone
  torchrun --nproc-per-node 2 train_tiny.py --model llava           two processes, one run
  torchrun --nproc-per-node 8 train_tiny.py --recipe llava15/7b --data mix665k.jsonl --shard   a model that one GPU cannot hold
  torchrun --nproc-per-node 8 train_tiny.py --recipe llava15/7b --data align=pairs558k.jsonl --data tune=mix665k.jsonl --shard --accumulate 2
exit codes: 0 done, 1 training failed or the disk is full, 2 bad usage or input, 130 Ctrl-C (checkpoint saved)"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_tiny.py", description=__doc__.splitlines()[0], epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = complain  # one sentence, like all other bad input
    parser.add_argument("--model", metavar="{" + ",".join(MODELS) + "}", help="which paper's tiny model to train")
    parser.add_argument("--recipe", choices=recipes.names(), metavar="NAME",
                        help="a recipe by its full name, instead of --model")
    parser.add_argument("--data", action="append", default=[], metavar="[STAGE=]PATH", help="folder of pictures with .txt, .jsonl, COCO or LLaVA "
                        ".json, documents, .tar; once for each stage, where they learn from different data; default: the embedded world, "
                        "which needs no download")
    parser.add_argument("--on-missing", choices=("error", "skip"), default="error",
                        help="what to do about a missing or broken picture (default: error)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: CUDA, else CPU")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--out", metavar="FOLDER", help="where the run is written (default: the next free of "
                        "runs/MODEL, runs/MODEL-2, ...)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out (default: the last runs/MODEL)")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    parser.add_argument("--from-scratch", action="store_true", help="train the backbones too, instead of taking the shipped ones")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write what earlier runs have trained")
    parser.add_argument("--steps", type=float, metavar="X", help="up to 1: this fraction of every stage's steps; "
                        "above 1: this number of steps in every stage")
    parser.add_argument("--shard", action="store_true", help="under torchrun: share weights, gradients and moments out over the processes "
                        "(python -m nanovlm.plan says what that saves); judge the finished run with --resume alone")
    parser.add_argument("--accumulate", type=int, metavar="N", help="micro-batches of a step, in place of the recipe's: less memory, the same step")
    return parser


def complain(message: str) -> None:
    raise UserError(f"{message}; --help shows examples.")


def main(arguments: list[str] | None = None) -> int:
    """Train, and return the exit code."""
    try:
        options = make_parser().parse_args(arguments)
        if bool(options.model) == bool(options.recipe):
            raise UserError(f"Give one of --model ({', '.join(MODELS)}) and --recipe, for example --model {MODELS[0]}.")
        if options.model and options.model not in MODELS:
            raise UserError(f"--model {options.model!r} is unknown; what can be trained: {', '.join(map(repr, MODELS))}.")
        recipe = options.recipe or f"{options.model}/tiny"
        data, stage_data = by_stage(recipes.get(recipe), options.data)
        run(recipe, Options(
            data=data, stage_data=stage_data, on_missing=options.on_missing, device=options.device, seed=options.seed, out=options.out,
            resume=options.resume, overwrite=options.overwrite, cache=not options.no_cache, steps=options.steps,
            from_scratch=options.from_scratch, shard=options.shard, accumulate=options.accumulate))
        return 0
    except UserError as error:
        return stop(2, f"{error}")
    except (TrainingFailed, SaveFailed, PeerLost) as error:
        return stop(1, f"{error}")
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return stop(1, f"The disk is full ({error}): free some space, then go on with --resume.")
    except KeyboardInterrupt as error:
        return stop(130, f"Interrupted: {str(error) or 'the same command with --resume goes on'}.")


def stop(code: int, sentence: str) -> int:
    print(f"train_tiny.py: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(main())
