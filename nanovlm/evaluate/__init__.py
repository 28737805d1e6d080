"""Held-out questions, answered and judged, each beside its two controls.

    source.exam(n) ─► samples whose last turn is to be answered ─► model.generate ─► text ─► metric
                                  │
                                  └─► the same questions with the images permuted ─► the `shuffled` control

A figure means something only beside what can be had without looking: `chance`, how often the most common answer of
that kind is right, and `shuffled`, the same model and the same questions with pictures that belong to others. A model
that ignores its images scores the same on both; a model that uses them falls to chance when they are permuted.

A stage names what its model is judged by (`Stage.evaluate`):

    "answers"     vqa_accuracy, vqa_accuracy/<kind>       official VQA normalisation
    "captions"    caption_exact, caption_cider            against every caption that counts as right; or
    "two"         the same, on scenes of two objects      of the embedded world
    "classes"     vqa_accuracy/class                      all class names ranked by log-likelihood
    "retrieval"   i2t_r1, i2t_r10, t2i_r1, t2i_r10        after re-ranking by image-text matching; …/itc before
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

import torch
from torch import nn

from nanovlm import metrics
from nanovlm.data.collate import PAIR_LENGTH, collate_images, collate_prompts, collate_questions, collate_texts
from nanovlm.data.conversation import answer_ids, find_format, prompt, stop_ids
from nanovlm.data.sample import TALKS, Sample
from nanovlm.data.transforms import Transform, load_image
from nanovlm.errors import UserError
from nanovlm.recipes.stage import Recipe, Stage
from nanovlm.tokenizer import Tokenizer

BATCH = 100
MAX_NEW_TOKENS = 64
RERANK = 16  # candidates judged again; BLIP-2 has 128, for galleries of 1,000 to 5,000


class Examinee:
    """A trained model with all that is needed to ask it something: tokenizer, format, picture size, device."""

    def __init__(self, model: nn.Module, recipe: Recipe, stage: Stage, tokenizer: Tokenizer, device: torch.device | str):
        self.model, self.tokenizer, self.format, self.device = model.eval(), tokenizer, stage.format, device
        self.transform = Transform(recipe.image_size, fit=stage.fit, tiling=getattr(model, "tiling", None))

    def inputs(self, samples: Sequence[Sample]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """images (n, 3, H, W), input_ids (B, T), attention_mask (B, T), padded as `collate_prompts` does; and by name, what
        only some models read: the sizes of pictures that are tiled, the questions for a bridge that reads.
        """
        ids, mask = collate_prompts([prompt(s.turns, self.tokenizer, self.format, name=s.id) for s in samples],
                                    self.tokenizer.pad_id, find_format(self.format).separate)
        named = collate_images([picture(image) for s in samples for image in s.images], self.transform)
        if getattr(self.model, "asks", False):
            named |= collate_questions(samples, self.tokenizer)
        named = {name: tensor.to(self.device) for name, tensor in named.items()}
        return (named.pop("images"), ids.to(self.device), mask.to(self.device)), named

    def answer(self, samples: Sequence[Sample], room: int = 0) -> list[str]:
        """Greedy answers to the last question of each sample, its turns before given; of `room` tokens at most, if told."""
        stop = stop_ids(self.format, self.tokenizer)
        answers = []
        for chunk in chunks(samples):
            inputs, named = self.inputs(chunk)
            if not hasattr(self.model, "encode_image"):  # a language model reads only
                inputs = inputs[1:]
            most = room or max(REASONS if s.turns[-1].kind == "science" else MAX_NEW_TOKENS for s in chunk)
            for ids in self.model.generate(*inputs, most, stop, **named).tolist():
                answers.append(self.text(ids, stop))
        return answers

    def text(self, ids: list[int], stop: list[int]) -> str:
        """The answer without what closes it."""
        for end in range(len(ids) - len(stop) + 1):
            if ids[end:end + len(stop)] == stop:
                ids = ids[:end]
                break
        # A small set of texts may fill only a part of the model's vocabulary; an untrained model says the rest too.
        return self.tokenizer.decode([i for i in ids if i < len(self.tokenizer)]).strip()

    def choose(self, samples: Sequence[Sample], candidates: Sequence[str]) -> list[str]:
        """Of the candidate answers the most likely one, for each sample."""
        ids = [answer_ids(candidate, self.tokenizer, self.format) for candidate in candidates]
        chosen = []
        for chunk in chunks(samples):
            inputs, named = self.inputs(chunk)
            chosen += [candidates[best] for best in self.model.score(*inputs, ids, **named).argmax(dim=1).tolist()]
        return chosen


def right(guess: str, truth: str) -> float:
    return metrics.vqa_accuracy(guess, [truth])


# kinds whose answers are not compared word by word: how they are, and what makes two of them the same answer
JUDGES: dict[str, tuple[Callable[[str, str], float], Callable[[str], object]]] = {
    "grounding": (metrics.box_hit, str), "science": (metrics.same_letter, metrics.option_letter),
    "science_text": (metrics.same_letter, metrics.option_letter)}
REASONS = 1024  # tokens for an answer whose letter comes last


def evaluate(model: nn.Module, recipe: Recipe, stage: Stage, source: object, tokenizer: Tokenizer,
             device: torch.device | str) -> dict[str, dict[str, float]]:
    """{metric: {"value", "n", "chance", "shuffled"}} on the source's whole exam, as far as the stage is judged by it."""
    examinee = Examinee(model, recipe, stage, tokenizer, device)
    if "retrieval" in stage.evaluate:
        return judge_retrieval(examinee, source)
    by_kind = defaultdict(list)
    for sample in source.exam(view=stage.view if stage.view in TALKS else "instruct"):
        by_kind[sample.turns[-1].kind].append(sample)
    if "two" in stage.evaluate:
        by_kind["caption"] = source.exam(kinds=("caption of two",))
    results: dict[str, dict[str, float]] = {}
    marks: list[tuple[float, float, float]] = []  # value, chance, shuffled of every question
    for kind, samples in by_kind.items():
        if kind == "caption":
            if {"captions", "two"} & set(stage.evaluate):
                results |= judge_captions(examinee, samples, source)
        elif "answers" in stage.evaluate:
            of_kind = judge_answers(examinee, samples, kind)
            # without a picture there is nothing to exchange: such questions have a row of their own only
            marks += [mark for mark, sample in zip(of_kind, samples) if sample.images]
            if kind:
                results[f"vqa_accuracy/{kind}"] = mean(of_kind)
    if marks:
        results["vqa_accuracy"] = mean(marks)
    if "classes" in stage.evaluate and getattr(source, "labels", ()):
        results["vqa_accuracy/class"] = judge_classes(examinee, by_kind["caption"], source.labels)
    return results


def judge_answers(examinee: Examinee, samples: Sequence[Sample],
                  kind: str = "") -> list[tuple[float, float, float]]:
    judge, same = JUDGES.get(kind, (right, metrics.normalise_answer))
    truths = [s.turns[-1].answer for s in samples]
    ((often, _),) = Counter(map(same, truths)).most_common(1)
    common = next(truth for truth in truths if same(truth) == often)
    return [tuple(judge(guess, truth) for guess in (said, common, blind))
            for truth, said, blind in zip(truths, examinee.answer(samples), examinee.answer(permuted(samples)))]


def judge_captions(examinee: Examinee, samples: Sequence[Sample], source: object) -> dict[str, dict[str, float]]:
    references = [source.references(s) for s in samples]
    common = Counter(text for texts in references for text in set(texts)).most_common(1)[0][0]
    guesses = {"value": examinee.answer(samples), "chance": [common] * len(samples),
               "shuffled": examinee.answer(permuted(samples))}
    exact = {name: sum(map(metrics.exact_match, texts, references)) / len(samples) for name, texts in guesses.items()}
    cider = {name: metrics.cider(texts, references) for name, texts in guesses.items()}
    return {"caption_exact": {**exact, "n": len(samples)}, "caption_cider": {**cider, "n": len(samples)}}


def judge_classes(examinee: Examinee, samples: Sequence[Sample], classes: Sequence[str]) -> dict[str, float]:
    truths = [s.turns[-1].answer for s in samples]
    common = Counter(truths).most_common(1)[0][0]
    pairs = zip(truths, examinee.choose(samples, classes), examinee.choose(permuted(samples), classes))
    return mean([(truth == right, truth == common, truth == wrong) for truth, right, wrong in pairs])


def judge_retrieval(examinee: Examinee, source: object) -> dict[str, dict[str, float]]:
    """Each gallery's pictures against its own texts, both ways; the mean over the galleries.

    BLIP-2 §4.4: the RERANK best by contrast are judged again, by matching plus contrast (as the released code adds them).
    """
    if not hasattr(examinee.model, "match"):
        raise UserError("This model cannot be judged by retrieval: it does not say whether a picture and a text belong "
                        "together. Of BLIP-2 only stage 1 does, for example trained_model('blip2/tiny', 'stage1').")
    marks = defaultdict(list)  # metric → a value for each gallery
    galleries = source.galleries()
    for samples in galleries:
        texts = list(dict.fromkeys(s.caption for s in samples))
        right = torch.tensor([[text in source.references(s) for text in texts] for s in samples])  # (n, G)
        images = torch.stack([examinee.transform(picture(s.images[0])) for s in samples])
        ids, mask = collate_texts(texts, examinee.tokenizer, PAIR_LENGTH)
        found = retrieve(examinee.model, *(tensor.to(examinee.device) for tensor in (images, ids, mask)))
        for name, similarity in found.items():
            way, rows, relevant = name[:3], similarity, right
            if way == "t2i":
                rows, relevant = similarity.T, right.T
            moved = relevant[torch.randperm(len(relevant), generator=torch.Generator().manual_seed(0))]
            for k in (1, 10):
                values = [metrics.recall_at_k(rows.cpu(), truth, k) for truth in (relevant, moved)]
                marks[f"{way}_r{k}{name[3:]}"].append((values[0], min(1.0, k / rows.shape[1]), values[1]))
    return {name: {**mean(values), "n": sum(map(len, galleries))} for name, values in marks.items()}


@torch.no_grad()
def retrieve(model: nn.Module, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores (images, texts) under four names: "i2t/itc" and "t2i/itc", and re-ranked "i2t" and "t2i"."""
    cosine = model.score(images, ids, mask)  # (n, G)
    found = {"i2t/itc": cosine, "t2i/itc": cosine}
    tokens = model.encode_image(images)
    for way in ("i2t", "t2i"):
        best = (cosine if way == "i2t" else cosine.T).topk(min(RERANK, len(ids), len(images)), dim=1).indices
        first = torch.arange(len(best), device=best.device)[:, None].expand_as(best)
        i, j = (first, best) if way == "i2t" else (best, first)
        i, j = i.flatten(), j.flatten()
        belongs = torch.cat([model.match(tokens[a], ids[b], mask[b])[:, 1]
                             for a, b in zip(i.split(10 * BATCH), j.split(10 * BATCH))])
        # a candidate stands before everything that was not one
        scores = cosine - 1000
        scores[i, j] = cosine[i, j] + belongs
        found[way] = scores
    return found


def mean(marks: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    value, chance, shuffled = (sum(column) / len(marks) for column in zip(*marks))
    return {"value": value, "n": len(marks), "chance": chance, "shuffled": shuffled}


def permuted(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions with pictures that belong to other samples of the list; text-only samples stay as they are."""
    images = [image for s in samples for image in s.images]
    order = list(range(len(images)))
    Random(0).shuffle(order)
    moved = iter([images[order[(order.index(i) + 1) % len(order)]] for i in range(len(images))])
    return [replace(s, images=tuple(next(moved) for _ in s.images)) for s in samples]


def examples(model: nn.Module, recipe: Recipe, stage: Stage, source: object, tokenizer: Tokenizer,
             device: torch.device | str, n: int = 12) -> list[tuple[object, str, str, str]]:
    """(picture, question, truth, prediction) of n held-out samples, spread over the kinds: rows for `plots.save_samples`."""
    examinee = Examinee(model, recipe, stage, tokenizer, device)
    if stage.view in TALKS:
        exam = source.exam(n, view=stage.view)
        samples = [exam[i * len(exam) // n] for i in range(min(n, len(exam)))]
    else:  # before instruction tuning: what it says of a picture, of a text, or which caption it finds the best
        samples = [source.sample(stage.view, "val", i) for i in range(min(n, source.size(stage.view, "val")))]
        if stage.pairs:
            return best_captions(examinee, samples)
        samples = [replace(s, turns=s.turns[:1]) for s in samples]
    answers = examinee.answer(samples)
    return [(picture(s.images[0]) if s.images else None, question(s), truth(s, answer, source), answer)
            for s, answer in zip(samples, answers)]


def truth(sample: Sample, answer: str, source: object) -> str:
    """The right answer; of the captions that count as right the one that was given, if it was."""
    turn = sample.turns[-1]
    return answer if turn.kind == "caption" and answer in source.references(sample) else turn.answer


def best_captions(examinee: Examinee, samples: Sequence[Sample]) -> list[tuple[object, str, str, str]]:
    """For each picture the caption that a contrastive model likes best, of all captions and their false versions."""
    texts = list(dict.fromkeys(text for s in samples for text in (s.caption, *s.negatives)))
    ids, mask = collate_texts(texts, examinee.tokenizer, PAIR_LENGTH)
    images = torch.stack([examinee.transform(picture(s.images[0])) for s in samples])
    scores = examinee.model.score(*(tensor.to(examinee.device) for tensor in (images, ids, mask)))
    return [(picture(s.images[0]), f"which of {len(texts)} captions?", s.caption, texts[best])
            for s, best in zip(samples, scores.argmax(dim=1).tolist())]


def question(sample: Sample) -> str:
    """What was asked, with the turn before where the question leans on one."""
    asked = [turn.question.replace("<image>", "").strip() for turn in sample.turns]
    if len(asked) == 1:
        return asked[0]
    return f"{asked[-2]} {sample.turns[-2].answer}. {asked[-1]}"


def notes(results: dict[str, dict[str, float]], source: object) -> list[str]:
    """What a reader should know before believing the figures, in whole sentences."""
    said = []
    if getattr(source, "few", False):
        said.append(f"{source.size('captions', 'train')} training and {source.size('captions', 'val')} held-out pictures "
                    "are too few to judge by: the figures above may be luck.")
    exact = results.get("caption_exact")
    if source.name != "scenes" and exact and not getattr(source, "labels", ()):
        said.append(f"{source.size('captions', 'train')} pictures teach naming only so far: {exact['value']:.1%} of the "
                    f"held-out captions are exactly right ({exact['shuffled']:.1%} with the images permuted).")
    return said


def picture(image: object) -> object:
    return image if hasattr(image, "convert") else load_image(image)


def chunks(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    return (samples[start:start + BATCH] for start in range(0, len(samples), BATCH))
