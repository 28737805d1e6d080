"""Few-shot: a question after worked examples, with weights that stay as they are.

"Flamingo" (2204.14198) §2.5, App. A.2, B.1.4, B.1.5. An example is a picture with its right answer; they stand before the question
as earlier turns, and so the same exam can be had with 0, 4 or 32 of them.

    support ─► choose ─► <s><image>Output: dax<EOC><image>Output: wug<EOC><image>Output: ─► ?
                 │          └── examples ──────────────────────────────┘└─ query ─────┘
                 ├ by chance
                 └ RICES    the pictures most like the query's to the frozen eyes; the most similar one stands last

    no shots   <s>Output: dax<EOC>Output: wug<EOC><image>Output: ─► ?    two examples without pictures: they show what an answer looks like,
                                                                         and only where the answer is open
    open       beams of width 3, up to <EOC>
    closed     the candidate of highest log-likelihood, which may be the mean over several orders of the examples

Controls. shuffled: all pictures exchanged among all prompts. "no images": blank ones. "text only": the examples lose their pictures
and tags. A model that scores the same without the pictures has not learned from them.

differs: the paper draws orders at random; here the given order is the first, and no order comes twice.

Legend: n queries, N examples to choose from, F frames, D width of an image token, C candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import factorial
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.data.sample import CONTROLS, IMAGE, Sample, Turn
from nanovlm.data.source import Exam
from nanovlm.errors import UserError
from nanovlm.evaluate.judges import JUDGES, mean, most_common
from nanovlm.evaluate.pupil import Pupil, chunks, permuted
from nanovlm.training.loop import to_device

BEAMS = 3
ORDERS = 6  # of an ensemble


@dataclass(frozen=True)
class Episode:
    query: Sample
    examples: Sequence[Sample]  # as many as the most shots; fewer shots are the last ones, which stand next to the query
    among: tuple[str, ...] = ()  # the answers to choose from; () means that any may be given


# ---- prompts

def with_examples(query: Sample, examples: Sequence[Sample]) -> Sample:
    """The query, and before it the last question of each example with its answer. Without a question it is "Output:"."""
    images = tuple(image for sample in (*examples, query) for image in sample.images)
    return replace(query, images=images, turns=(*map(worked, examples), *query.turns), format="flamingo")


def worked(example: Sample) -> Turn:
    """Its last turn, with the tags of all its pictures: a conversation shows them earlier than that."""
    turn = example.turns[-1]
    return Turn(IMAGE * len(example.images) + turn.question.replace(IMAGE, "").strip(), turn.answer.strip(), turn.kind)


def zero_shot(query: Sample, examples: Sequence[Sample]) -> Sample:
    """Two examples without pictures and tags. With one of them a model copies it: App. A.2, "highly detrimental"."""
    return with_examples(query, [replace(example, images=()) for example in examples[:2]])


def prompts(episode: Episode, shots: int, several: int = 1) -> list[Sample]:
    """The episode's prompt with so many shots; `several` times, with the examples in different orders (see `orders`).

    No shots, and no answers to choose from: `zero_shot`. UserError where there are fewer examples than shots.
    """
    if shots > len(episode.examples):
        raise UserError(f"{shots} shots: there are {len(episode.examples)} examples for {episode.query.id}.")
    if shots == 0 and not episode.among:
        return [zero_shot(episode.query, episode.examples)]
    examples = episode.examples[len(episode.examples) - shots:]
    return [with_examples(episode.query, order) for order in orders(examples, several)]


def orders(examples: Sequence[Sample], several: int) -> list[list[Sample]]:
    """The examples as they are and in other orders, each order once: as many as there are, `several` at most."""
    rng, found = Random(0), [tuple(range(len(examples)))]
    while len(found) < min(several, factorial(len(examples))):
        order = tuple(rng.sample(found[0], len(examples)))
        found += [order] if order not in found else []
    return [[examples[i] for i in order] for order in found]


# ---- which examples

def by_chance(support: Sequence[Sample], shots: int, rng: Random) -> list[Sample]:
    return rng.sample(_enough(support, shots), shots)


def rices(query: Tensor, features: Tensor, support: Sequence[Sample], shots: int) -> list[Sample]:
    """Those most similar to the query, the best one last: query (D,) and the support's features (N, D), all of length one.

    UserError where more are wanted than there are.
    """
    nearest = (features @ query).argsort(stable=True)[len(_enough(support, shots)) - shots:]  # (shots,)
    return [support[i] for i in nearest.tolist()]


def _enough(support: Sequence[Sample], shots: int) -> Sequence[Sample]:
    if shots > len(support):
        raise UserError(f"{shots} shots: there are {len(support)} examples to choose from.")
    return support


@torch.no_grad()
def features(pupil: Pupil, samples: Sequence[Sample]) -> Tensor:
    """What the frozen eyes see in each sample's last picture or clip: the mean of its tokens, of length one: (n, D)."""
    found = []
    for chunk in chunks(samples):
        seen = to_device(pupil.collate.clips([sample.images[-1:] for sample in chunk]), pupil.device)
        images = seen["images"][:, 0]  # (n, F, 3, h, w)
        frames = seen["frames"]  # (n, 1)
        tokens = pupil.model.vision(images.flatten(0, 1)).mean(dim=1).unflatten(0, images.shape[:2])  # (n, F, D)
        there = torch.arange(images.shape[1], device=frames.device) < frames  # (n, F)
        found.append(F.normalize((tokens * there[..., None]).sum(dim=1), dim=-1))
    return torch.cat(found)


# ---- answers

def answers(pupil: Pupil, rounds: Sequence[Sequence[Sample]], among: Sequence[tuple[str, ...]], room: int) -> list[str]:
    """rounds: the prompts of all queries, once for each order of their examples; among: each query's candidates."""
    if not among[0]:
        return pupil.answer(rounds[0], room, beams=BEAMS)
    chosen = [""] * len(among)
    for names in dict.fromkeys(among):  # together whoever has the same candidates
        those = [i for i, own in enumerate(among) if own == names]
        best = ensemble(pupil, [[samples[i] for i in those] for samples in rounds], names).argmax(dim=1)
        for i, place in zip(those, best.tolist()):
            chosen[i] = names[place]
    return chosen


def ensemble(pupil: Pupil, rounds: Sequence[Sequence[Sample]], among: Sequence[str]) -> Tensor:
    """App. B.1.5: the mean over the orders of the candidates' log-likelihoods (n, C)."""
    return torch.stack([pupil.scores(samples, among) for samples in rounds]).mean(dim=0)


def measure(pupil: Pupil, episodes: Sequence[Episode], shots: Sequence[int] = (0, 1, 2, 4, 8), several: int = 1, room: int = Exam.room,
            controls: Mapping[str, Callable[[Sample], Sample]] = CONTROLS) -> dict[str, dict[str, float]]:
    """{"fewshot_accuracy/4", "fewshot_accuracy/4/no images", …: {"value", "n", "chance", "shuffled"}}.

    several: over how many orders of the examples closed answers are judged, ORDERS as the paper does it.
    """
    among, figures = [episode.among for episode in episodes], {}
    if len({bool(names) for names in among}) > 1:
        raise UserError("Some questions have answers to choose from and others have none: measure them apart.")
    for many in shots:
        rounds = [*zip(*(prompts(episode, many, several) for episode in episodes))]
        figures[f"fewshot_accuracy/{many}"] = judged(pupil, rounds, among, room)
        for name, change in controls.items() if many else ():
            figures[f"fewshot_accuracy/{many}/{name}"] = judged(pupil, [[*map(change, samples)] for samples in rounds], among, room)
    return figures


def judged(pupil: Pupil, rounds: Sequence[Sequence[Sample]], among: Sequence[tuple[str, ...]], room: int) -> dict[str, float]:
    """chance: the most common answer, or one candidate of C."""
    judge, guess = JUDGES["fewshot"], [1 / len(names) for names in among if names]
    truths = [judge.truths(sample) for sample in rounds[0]]
    said, blind = (answers(pupil, those, among, room) for those in (rounds, [permuted(samples) for samples in rounds]))
    common = guess or judge.score([most_common(truths, judge.same)] * len(truths), truths)
    return mean([*zip(judge.score(said, truths), common, judge.score(blind, truths))])
