"""A pupil: a trained model with all that is needed to ask it something, be it a question of an exam or a person's.

    samples ─► Collate.ask ─► model.generate ─► ids up to what closes the answer ─► text
                           └► model.prefill, then each candidate's likelihood ─► the best of them
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from random import Random

import torch
from PIL import Image
from torch import Tensor, nn

from nanovlm import generation
from nanovlm.contract import Batch
from nanovlm.data.collate import as_picture
from nanovlm.data.conversation import candidate_ids, stop_ids
from nanovlm.data.sample import IMAGE, Sample
from nanovlm.data.source import Exam, Source
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.tokenizer import Tokenizer
from nanovlm.training.batches import make_collate
from nanovlm.training.loop import to_device

BATCH = 100
WAYS = {"yes": ("yes", "true"), "no": ("no", "false")}  # in which an answer may be said, where it is one of the two
Rows = list[tuple[object, str, str, str]]  # picture, question, truth, answer


class Pupil:
    def __init__(self, model: nn.Module, recipe: Recipe, stage: Stage, tokenizer: Tokenizer, device: torch.device | str):
        self.model, self.recipe, self.stage, self.tokenizer, self.device = model.eval(), recipe, stage, tokenizer, device
        self.collate = make_collate(recipe, replace(stage, augment=False), tokenizer, model.reads)

    def read(self, samples: Sequence[Sample]) -> Batch:
        """What the model is given: the turns up to the last answer, and the pictures."""
        return to_device(self.collate.ask(samples), self.device)

    def answer(self, samples: Sequence[Sample], room: int = Exam.room, ranked: bool = False, **how) -> list[str]:
        """Answers to the last question of each sample, its turns before given: greedy unless `how` says more to generation.generate;
        `ranked`: the likeliest of the options that its turn has, if it has any.
        """
        if not samples:
            return []
        if ranked:
            return self.each_ranked(samples, room, **how)
        stop = self.stop(samples)
        return [self.text(ids, stop) for chunk in chunks(samples)
                for ids in self.model.generate(self.read(chunk), room, stop, **how).tolist()]

    def each_ranked(self, samples: Sequence[Sample], room: int, **how) -> list[str]:
        """The likeliest option of each, samples of equal options together; those without any are answered freely."""
        rows: dict[tuple[str, ...], list[int]] = {}
        for i, sample in enumerate(samples):
            rows.setdefault(tuple(sorted(sample.turns[-1].options)), []).append(i)
        said: dict[int, str] = {}
        for options, places in rows.items():
            alike = [samples[i] for i in places]
            said |= zip(places, self.best(alike, options) if options else self.answer(alike, room, **how))
        return [said[i] for i in range(len(samples))]

    def best(self, samples: Sequence[Sample], among: Sequence[str], mean: bool = False) -> list[str]:
        """The likeliest of the candidates. Yes and no may be said in several ways, the likeliest of which counts (InstructBLIP §2.5).

        mean: by log p for each token; by their sum, as published, what is longer is less likely.
        """
        means = {way: answer for answer in among for way in (WAYS if set(among) == set(WAYS) else {}).get(answer, (answer,))}
        return [means[list(means)[best]] for best in self.scores(samples, tuple(means), mean).argmax(dim=1).tolist()]

    def scores(self, samples: Sequence[Sample], among: Sequence[str], mean: bool = False) -> Tensor:
        """log p of each of the C candidates, with what closes it unless the format ranks without, as the answer to each sample's last
        question: fp32 (n, C); mean: divided by its number of tokens.
        """
        if not among or not all(candidate.strip() for candidate in among):
            raise UserError(f"{samples[0].id}: there are no candidates to rank, or an empty one; give the answers to choose from.")
        ids = [candidate_ids(candidate, self.tokenizer, self.collate.layout(samples[0])) for candidate in among]
        found = []
        for chunk in chunks(samples):
            batch = self.read(chunk)
            found.append(generation.score_candidates(lambda: self.model.prefill(batch), self.model.step, ids))  # noqa: B023
        return torch.cat(found) / (torch.tensor([len(i) for i in ids], device=self.device) if mean else 1)

    @torch.no_grad()
    def belongs(self, samples: Sequence[Sample]) -> list[float]:
        """How likely each sample's caption is its picture's, by the model's matching head."""
        found = []
        for chunk in chunks(samples):
            batch = to_device(self.collate.images(chunk) | self.collate.texts([s.caption for s in chunk]), self.device)
            logits = self.model.match(self.model.encode_image(batch["images"]), batch["input_ids"], batch["attention_mask"])
            found += logits.softmax(dim=1)[:, 1].tolist()
        return found

    def stop(self, samples: Sequence[Sample]) -> list[int]:
        """What closes an answer: samples that are asked together are of one format."""
        return stop_ids(self.collate.layout(samples[0]), self.tokenizer)

    def text(self, ids: list[int], stop: list[int]) -> str:
        """The answer without what closes it."""
        for end in range(len(ids) - len(stop) + 1):
            if ids[end:end + len(stop)] == stop:
                ids = ids[:end]
                break
        # A small set of texts may fill only a part of the model's vocabulary; an untrained model says the rest too.
        return self.tokenizer.decode([i for i in ids if i < len(self.tokenizer)]).strip()

    def examples(self, source: Source, n: int = 12) -> Rows:
        """Answers to n held-out questions, spread over the kinds: rows for `plots.save_samples`."""
        exams = source.exams(self.stage.evaluate, n)
        samples = [sample for exam in exams for sample in exam.samples]
        samples = [samples[i * len(samples) // n] for i in range(min(n, len(samples)))]
        if not samples:  # before instruction tuning: what it says of a picture, of a text, or which caption it finds the best
            samples = [opening(s) for s in source.look(self.recipe.worldly(self.stage.data), self.stage.real, n)]
            if self.model.reads.kind == "pairs":
                return self.best_captions(samples) if samples else []
        return [(drawn(s.images[-1]) if s.images else None, question(s), truth(s, answer), answer)
                for s, answer in zip(samples, self.answer(samples))]

    def best_captions(self, samples: Sequence[Sample]) -> Rows:
        """For each picture the caption that the model likes best, of all captions and their false versions."""
        texts = list(dict.fromkeys(text for s in samples for text in (s.caption, *s.negatives)))
        batch = to_device(self.collate.images(samples) | self.collate.texts(texts), self.device)
        scores = self.model.score(batch["images"], batch["input_ids"], batch["attention_mask"])
        return [(as_picture(s.images[0]), f"which of {len(texts)} captions?", s.caption, texts[best])
                for s, best in zip(samples, scores.argmax(dim=1).tolist())]


def opening(sample: Sample) -> Sample:
    """A conversation or page up to its first turn with a picture: a title may stand before that. A pair has no turns, and stays."""
    if not sample.turns:
        return sample
    end = next((i for i, turn in enumerate(sample.turns) if IMAGE in turn.question), 0) + 1
    shown = sum(turn.question.count(IMAGE) for turn in sample.turns[:end])
    return replace(sample, turns=sample.turns[:end], images=sample.images[:shown], told=sample.told[:shown])


def drawn(image: object) -> Image.Image:
    """A picture to look at; of a clip its first, middle and last frame, side by side."""
    if not isinstance(image, tuple):
        return as_picture(image)
    frames = [as_picture(image[place]) for place in (0, len(image) // 2, -1)]
    strip = Image.new("RGB", (3 * frames[0].width, frames[0].height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * frame.width, 0))
    return strip


def question(sample: Sample) -> str:
    """What was asked, with what was told in a picture's place, and with the turn before where the question leans on one.

    Of pictures with examples and no question what each example was said to show: "dax, wug, dax → ?".
    """
    if sample.format == "flamingo" and not sample.told and sample.turns[-1].question == IMAGE:
        return f"{', '.join(turn.answer for turn in sample.turns[:-1])} → ?".strip()
    asked = [turn.question.replace(IMAGE, "").strip() for turn in sample.turns]
    before = [f"{asked[-2]} {sample.turns[-2].answer}."] if len(asked) > 1 else []
    return " ".join([*sample.told, *before, asked[-1]])


def truth(sample: Sample, answer: str) -> str:
    """The right answer; of the captions that count as right the one that was given, if it was."""
    turn = sample.turns[-1]
    return answer if turn.kind == "caption" and answer in sample.captions else turn.answer


def permuted(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions with other pictures, or what is told in their places, of the list: not their own, nor one that equals it."""
    images = _moved([image for s in samples for image in s.images])
    told = _moved([text for s in samples for text in s.told])
    return [replace(s, images=tuple(next(images) for _ in s.images), told=tuple(next(told) for _ in s.told)) for s in samples]


def _moved(things: list) -> Iterator:
    order = list(range(len(things)))
    Random(0).shuffle(order)
    after = dict(zip(order, order[1:] + order[:1]))  # round in a circle: nothing stays in its place
    return iter([things[i] for i in _to_others(list(map(_content, things)), [after[i] for i in range(len(things))])])


def _to_others(had: list, gets: list[int]) -> list[int]:
    """The places from which each takes its thing, exchanged where it would get what equals its own, as two questions about one picture do.

    Each thing is taken once. Only where more than half of them are equal that cannot be, and the others are taken several times.
    """
    n = len(had)
    for i in range(n):
        if had[gets[i]] == had[i]:
            other = next((j % n for j in range(i + 1, i + n) if had[i] not in (had[j % n], had[gets[j % n]])), None)
            if other is None:
                break
            gets[i], gets[other] = gets[other], gets[i]
    stuck = [i for i in range(n) if had[gets[i]] == had[i]]  # all of them with the same thing
    others = [i for i in range(n) if had[i] != had[stuck[0]]] if stuck else []
    for count, i in enumerate(stuck if others else ()):
        gets[i] = others[count % len(others)]
    return gets


def _content(thing: object) -> object:
    """What equal pictures, clips or texts share."""
    if isinstance(thing, tuple):
        return tuple(map(_content, thing))
    return (thing.size, blake2b(thing.tobytes()).digest()) if isinstance(thing, Image.Image) else thing


def chunks(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    return (samples[start:start + BATCH] for start in range(0, len(samples), BATCH))
