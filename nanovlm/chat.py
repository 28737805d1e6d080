"""Talk to a trained model about pictures: `python -m nanovlm.chat runs/llava --image photo.png`, or `… llava --scene 3`

    turns so far + question ─► prompt in the format of training ─► model ─► words, printed as they come ─► turns

    > what is it?                      a question
    > /image other.png                 one more picture; it belongs to the next question
    > /output TEXT                     an example: what you would say of that picture (Flamingo)
    > /output                          now the model says it
    > /new                             forget all that was said, keep the first pictures
    > /help                            these lines
    an empty line, Ctrl-D or Ctrl-C    the end

Every question is put to the model with all earlier turns and pictures, as in its training; a model that was never trained on
several pictures in one conversation will read them, and is likely to mix them up. BLIP-2 and InstructBLIP read one picture, before all else.
Flamingo learns from the conversation: /image, /output dax, /image, /output wug, /image, /output ─► "dax" or "wug".
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from nanovlm import generation, recipes
from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.data.transforms import load_image
from nanovlm.errors import UserError
from nanovlm.evaluate.pupil import Pupil
from nanovlm.published_tokenizer import restored
from nanovlm.recipes.stage import resolve
from nanovlm.runs import checkpoint, shipped
from nanovlm.runs.folder import is_run
from nanovlm.runs.run import model_of, shortened
from nanovlm.runs.setting import Job, world_of
from nanovlm.training import distributed

ROOM = 128  # tokens of an answer, where none is given
SILENT = {"pairs": "compares pictures with texts", "masked": "fills gaps in texts", "statements": "judges statements about two pictures"}
HELP = "\n".join(line.strip() for line in __doc__.split("\n") if line.startswith(("    > ", "    an empty")))


class Dialogue:
    """A conversation that goes on: `ask` yields the pieces of the answer and then remembers it."""

    def __init__(self, pupil: Pupil, images: Sequence[Image.Image] = (), limit: int = 0,
                 room: int = ROOM, temperature: float = 0.0, seed: int = 0):
        """limit: the longest sequence, picture tokens included, that the model was trained on; 0 = any."""
        self.pupil, self.first, self.limit, self.room = pupil, list(images), limit, room
        self.temperature, self.generator = temperature, torch.Generator(pupil.device).manual_seed(seed)
        self.begin()

    def begin(self) -> None:
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []  # of the turns
        self.waiting = list(self.first)  # for the next question

    def ask(self, question: str) -> Iterator[str]:
        marked = f"{IMAGE}\n" * len(self.waiting) + question.replace(IMAGE, "")
        # the pages that Flamingo was trained on are no conversations; those it reads as its few-shot prompts are written
        format = "flamingo" if self.pupil.model.reads.kind == "pages" else ""
        answer = ""
        for piece in self.say(Sample("the conversation", (*self.images, *self.waiting), turns=(*self.turns, Turn(marked, " ")), format=format)):
            answer += piece
            yield piece
        # what the model has said nothing to is no turn: the next prompt would be of a kind that it never met
        if answer.strip():
            self.add(Turn(marked, answer.strip()))

    def tell(self, answer: str) -> None:
        """A worked example: the waiting pictures, and a person's words for them."""
        self.add(Turn(f"{IMAGE}\n" * len(self.waiting), answer))

    def add(self, turn: Turn) -> None:
        self.turns, self.images, self.waiting = [*self.turns, turn], [*self.images, *self.waiting], []

    @torch.inference_mode()
    def say(self, sample: Sample) -> Iterator[str]:
        """The answer to the last question, in pieces that end at whole characters."""
        model, said, text = self.pupil.model, "", ""
        if sample.images and model.reads.kind == "texts":
            raise UserError("This model is a language model alone, which reads no pictures: ask without --image, --scene and /image.")
        logits, cache = model.prefill(self.pupil.read([sample]))
        stop = self.pupil.stop([sample])
        length = cache.mask.shape[1]
        if self.limit and length >= self.limit:
            raise UserError(f"The conversation is {length} tokens long, the model was trained on {self.limit} at most: begin "
                            "a new one with /new.")
        room = min(self.room, self.limit - length) if self.limit else self.room
        for ids in generation.stream(lambda: (logits, cache), model.step, room, stop,
                                     temperature=self.temperature, generator=self.generator):
            text = self.pupil.text(ids[0].tolist(), stop)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may take several tokens
                yield text[len(said):]
                said = text
        yield text[len(said):]


def open_model(name: str, device: torch.device | str = "cpu") -> Pupil:
    """The model of a run's folder, or of this name as it is shipped: llava, blip2/tiny-t5."""
    full = name if "/" in name else f"{name}/tiny"
    if Path(name).exists() or full not in there():
        return load_run(name, device)
    recipe, stage = recipes.get(full), recipes.get(full).stage()
    if (weights := shipped.read(recipe, stage)) is None:
        raise UserError(f"Train it anew, by train_tiny.py --recipe {full}, and name the folder of that run.")
    return Pupil(model_of(Job(recipe, stage), weights).to(device), recipe, stage, shipped.tokenizer(), device)


def there() -> list[str]:
    return [name for name in recipes.names() if shipped.path(name, recipes.get(name).stage().name).exists()]


def load_run(path: str | Path, device: torch.device | str = "cpu") -> Pupil:
    """The model that a run has trained, after its last stage, ready to be asked."""
    path = Path(path)
    if not is_run(path):
        raise UserError(f"{path} is no folder of a run (it has no config.json of ours): name one that train_tiny.py wrote, "
                        f"such as runs/llava, or a shipped model ({', '.join(there()) or 'there are none here'}).")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("steps"):
        print(shortened(config["steps"]), file=sys.stderr)
    recipe = resolve(recipes.get(config["recipe"]["name"]), real=config["data"] != "scenes")  # BLIP's last stages are not for --data
    stage = recipe.stages[-1]
    weights = path / f"{stage.name}.pt"
    if not weights.exists():
        raise UserError(f"{path} is not finished (it has no {weights.name}): go on with train_tiny.py --recipe {recipe.name} "
                        f"--out {path} --resume.")
    model = model_of(Job(recipe, stage), checkpoint.load(weights))
    tokenizer = restored(checkpoint.load(path / "last.pt")["tokenizer"])
    return Pupil(model.to(device), recipe, stage, tokenizer, device)


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        if options.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {options.max_new_tokens}: an answer needs room for 1 token or more.")
        if not 0 <= options.temperature < math.inf:
            raise UserError(f"--temperature {options.temperature}: give 0, for the most likely words, or more, such as 0.7.")
        pupil = open_model(options.run, distributed.choose_device(options.device))
        if does := SILENT.get(pupil.model.reads.kind):
            raise UserError(f"{options.run} holds a {type(pupil.model).__name__}, which {does} and was never trained to converse: "
                            "name a run of llava, llava15, blip2 or instructblip, or of --recipe blip/tiny-vqa.")
        images = [load_image(image) for image in options.image]
        if options.scene is not None:
            scene = world_of(pupil.recipe, 0).held_out("captions", options.scene)
            images += scene.images
        dialogue = Dialogue(pupil, images, pupil.stage.max_length, options.max_new_tokens, options.temperature, options.seed)
        if options.ask is not None:
            answer(dialogue, options.ask)
        else:
            converse(dialogue)
        if options.scene is not None:
            print(f"truth: {scene.caption}", file=sys.stderr)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


def converse(dialogue: Dialogue) -> None:
    """Until an empty line or the end of the input; Ctrl-C ends an answer, and between two answers the conversation."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        try:
            follow(dialogue, line)
        except UserError as error:  # a wrong path need not end the conversation
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print(" …")


def follow(dialogue: Dialogue, line: str) -> None:
    """One line: a command or a question."""
    command, _, rest = line.partition(" ")
    if command == "/new":
        dialogue.begin()
    elif command == "/help":
        print(HELP)
    elif command == "/image" and rest.strip():
        dialogue.waiting.append(load_image(rest.strip()))
    elif command == "/output":
        dialogue.tell(rest.strip()) if rest.strip() else answer(dialogue, "")
    elif line.startswith("/"):
        raise UserError(f"{command} is no command, or lacks something: there are /image FILE, /output TEXT, /new and /help.")
    else:
        answer(dialogue, line)


def answer(dialogue: Dialogue, question: str) -> None:
    for piece in dialogue.ask(question):
        print(piece, end="", flush=True)
    print()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.chat", description="Talk to a trained model about pictures.",
        epilog='example: python -m nanovlm.chat llava --scene 3 --ask "what colour is the square?"')
    parser.add_argument("run", help="the folder of a finished run, such as runs/llava, or a shipped model: llava, llava15, blip2, instructblip, flamingo")
    parser.add_argument("--scene", type=int, metavar="N", help="show it held-out scene N of the embedded world")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    parser.add_argument("--ask", metavar="QUESTION", help="one question, its answer, and out")
    parser.add_argument("--max-new-tokens", type=int, default=ROOM, metavar="N", help=f"of an answer (default: {ROOM})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default); above, answers are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
