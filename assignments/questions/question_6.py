"""Question of assignment 6: what does the filter find, what does the captioner add, and could a cosine have done it?

Pictures of the embedded web, of whose captions four in ten are wrong in one of four ways. The shipped filter and the shipped
captioner make four data sets of them by your `bootstrap`: nothing done, filtered, captioned, both. Here the truth is known, so each
data set can be counted: how many texts, how many pictures have one, how many of the texts are right.

Then the filter by itself: of each kind of noise, how much is dropped (recall), and how much of what is dropped is of this kind or
right (precision). The same for ITC's cosine, at the threshold that drops as many texts; a text costs the cosine one product, the
matching head a whole pass of the transformer.

Last, what it was for: two models of the same steps, `pretrain` on the web as it is and `retrain` on what CapFilt made of it, tell
held-out captions from captions with one fact wrong.

Prints the numbers and writes question_6.png.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from nanovlm import plots, recipes
from nanovlm.data.sample import Sample
from nanovlm.evaluate.pupil import Pupil, chunks
from nanovlm.making.bootstrap import Text, Write, bootstrap
from nanovlm.runs.capfilt import writer
from nanovlm.runs.run import trained_model
from nanovlm.training.loop import to_device
from nanovlm.world.datasets import Scenes
from nanovlm.world.noise import KINDS

PICTURES, HELD_OUT, WEB = 300, 200, "web pairs"
RECIPE = recipes.get("blip/tiny")


def pupil_of(stage: str) -> Pupil:
    model, tokenizer = trained_model("blip/tiny", stage)
    return Pupil(model, RECIPE, RECIPE.stage(stage), tokenizer, "cpu")


def is_right(text: Text, by_id: dict[str, Sample]) -> bool:
    return text.text in by_id[text.picture].references


def cosines(pupil: Pupil, samples: list[Sample]) -> list[float]:
    """Of each picture and its caption."""
    found = []
    for chunk in chunks(samples):
        batch = to_device(pupil.collate.images(chunk) | pupil.collate.texts([sample.caption for sample in chunk]), "cpu")
        found += pupil.model.score(batch["images"], batch["input_ids"], batch["attention_mask"]).diagonal().tolist()
    return found


def dropped_by_kind(dropped: list[bool], labels: list[str]) -> dict[str, tuple[float, float]]:
    """kind → (precision, recall), each kind against the right texts."""
    found = {}
    for kind in KINDS:
        caught = sum(d and label == kind for d, label in zip(dropped, labels))
        among = sum(d and label in ("", kind) for d, label in zip(dropped, labels))
        found[kind] = caught / max(1, among), caught / max(1, labels.count(kind))
    return found


def chooses(pupil: Pupil, samples: list[Sample]) -> float:
    """How often the matching head believes the right caption more than each of its versions with one fact wrong."""
    told = [replace(sample, caption=text) for sample in samples for text in (sample.caption, *sample.negatives)]
    beliefs = iter(pupil.belongs(told))
    rows = [[next(beliefs) for _ in (sample.caption, *sample.negatives)] for sample in samples]
    return sum(row[0] > max(row[1:]) for row in rows) / len(rows)


def once(write: Write) -> Write:
    """Sampling is slow, and two of the four data sets hold the same new texts."""
    known: dict[str, list[str]] = {}

    def written(chunk: Sequence[Sample]) -> list[str]:
        if chunk[0].id not in known:
            known[chunk[0].id] = write(chunk)
        return known[chunk[0].id]
    return written


def main() -> None:
    began, world = time.monotonic(), Scenes()
    samples = [world.pooled(WEB, i) for i in range(PICTURES)]
    by_id = {sample.id: sample for sample in samples}
    judge, write = pupil_of("filter"), once(writer(pupil_of("captioner"), RECIPE.makes["bootstrapped"], "question"))
    ways = {"nothing": (None, None), "filter": (None, judge.belongs), "captioner": (write, None), "both": (write, judge.belongs)}
    print(f"{'data set':12}{'texts':>8}{'pictures':>10}{'right':>8}")
    for name, (writes, judges) in ways.items():
        texts = [text for chunk in bootstrap(samples, writes, judges) for text in chunk]
        kept = [text for text in texts if text.kept]
        right, pictures = sum(is_right(text, by_id) for text in kept) / len(kept), len({text.picture for text in kept})
        print(f"{name:12}{len(kept):8}{pictures:10}{right:8.2f}", flush=True)
    for source in ("web", "captioner"):
        own = [text for text in texts if text.source == source]
        right, kept = (sum(which) / len(own) for which in ([is_right(text, by_id) for text in own], [text.kept for text in own]))
        print(f"the {source}'s texts: {right:.2f} are right, {kept:.2f} are kept")

    noisy = world.noisy(PICTURES)
    labels, belongs, alike = [sample.label for sample in noisy], judge.belongs(noisy), cosines(judge, noisy)
    dropped = [belief < 0.5 for belief in belongs]
    least = sorted(alike)[sum(dropped)]
    both = dropped_by_kind(dropped, labels), dropped_by_kind([one < least for one in alike], labels)
    print(f"{'kind of noise':14}{'n':>5}   matching head: precision, recall   cosine: precision, recall")
    for kind in KINDS:
        head, cosine = both[0][kind], both[1][kind]
        print(f"{kind:14}{labels.count(kind):5}{head[0]:26.2f}{head[1]:8.2f}{cosine[0]:20.2f}{cosine[1]:8.2f}")

    held_out = [world.held_out("pairs", i) for i in range(HELD_OUT)]
    for stage in ("pretrain", "retrain"):
        print(f"{stage}: of {HELD_OUT} held-out pictures {chooses(pupil_of(stage), held_out):.2f} tell the caption from those with one fact wrong")
    shown = samples[:12]
    plots.save_verdicts({"what became of them": [
        (sample.images[0], [(f"{text.source}: {text.text} ({text.belongs:.2f})", text.kept) for text in texts if text.picture == sample.id])
        for sample in shown]}, "question_6.png")
    print(f"{time.monotonic() - began:.0f} s; see question_6.png")


if __name__ == "__main__":
    main()
