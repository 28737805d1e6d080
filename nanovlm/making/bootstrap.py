"""CapFilt: the captioner writes, the filter judges, and what is left is a better data set than the web gave.

BLIP (2201.12086) §3.3, Fig. 3: CapFilt, captioning and filtering

    a picture of the web ─┬─ T_w  the web's own text ────────────────────┐
                          └─► captioner ─► T_s  a new text               ├─► filter: does it belong? ─► kept │ dropped
                                           (nucleus sampling, §4.3)  ────┘

Both texts are judged apart, so a picture keeps none, one or two. What people wrote is not judged, it is believed. The rule is the
matching head's answer, P(belongs) ≥ 0.5, and nothing else (§3.3: a text is noisy "if the ITM head predicts it as unmatched to the image").

The result is a file with a line for each text, dropped ones too, so that one can see what was done:
    {"picture": "scenes/web pairs/17", "text": "a large red circle in the top left.", "source": "captioner", "belongs": 0.98, "noise": ""}
It grows a chunk of pictures at a time, and whoever was stopped makes the last chunk of the file again. `noise` is the hidden label of
the embedded world's web texts (world/noise.py): nobody who learns or judges ever sees it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from nanovlm.data.sample import Sample
from nanovlm.world.datasets import Scenes

CHUNK = 100  # pictures
SOURCES = ("web", "captioner")

Write = Callable[[Sequence[Sample]], list[str]]  # a new text for each picture
Judge = Callable[[Sequence[Sample]], list[float]]  # how likely each caption is its picture's
Said = Callable[[Sample], Sequence[str]]  # what the web says of a picture


def own_caption(sample: Sample) -> Sequence[str]:
    return (sample.caption,)


@dataclass(frozen=True)
class Text:
    """One text of a picture, and what the filter thinks of it."""

    picture: str  # the id of its sample
    text: str
    source: str  # one of SOURCES
    belongs: float | None = None  # P(belongs) by the filter; None: not judged
    noise: str = ""  # what is wrong with a web text, if anybody knows

    @property
    def kept(self) -> bool:
        """The filter believes it, or nobody has judged it."""
        return self.belongs is None or self.belongs >= 0.5


def bootstrap(samples: Sequence[Sample], write: Write | None, judge: Judge | None, said: Said = own_caption) -> Iterator[list[Text]]:
    """The texts of `samples`, CHUNK pictures at a time, judged and dropped ones too; write: None adds none, judge: None judges none.

    write is asked once for a chunk, and a captioner that says nothing adds no text. judge is given each picture with the text as its
    caption. A hidden label is the web text's alone.
    """
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start:start + CHUNK]
        asked = [(replace(sample, caption=text), "web", sample.label) for sample in chunk for text in said(sample)]
        if write:
            asked += [(replace(sample, caption=text), "captioner", "") for sample, text in zip(chunk, write(chunk)) if text]
        beliefs = judge([sample for sample, _, _ in asked]) if judge else [None] * len(asked)
        yield [Text(sample.id, sample.caption, source, belief, noise) for (sample, source, noise), belief in zip(asked, beliefs)]


def grow(path: Path | None, samples: Sequence[Sample], write: Write | None, judge: Judge | None,
         after: Callable[[int], None] = lambda done: None, said: Said = own_caption) -> list[Text]:
    """All texts of `samples`, from the file as far as it goes, and written to it; after: told how many pictures are done."""
    texts = read(path) if path and path.exists() else []
    # the last chunk of the file is made again: a cut may have left each of its pictures with the web's text and not with the new one
    done = max(0, len({text.picture for text in texts}) - 1) // CHUNK * CHUNK
    whole = {sample.id for sample in samples[:done]}
    texts = [text for text in texts if text.picture in whole]
    if path:
        path.write_text("".join(map(line, texts)), encoding="utf-8")
    for chunk in bootstrap(samples[done:], write, judge, said):
        texts += chunk
        done = min(done + CHUNK, len(samples))
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(map(line, chunk))
        after(done)
    return texts


def line(text: Text) -> str:
    return json.dumps(asdict(text)) + "\n"


def read(path: Path) -> list[Text]:
    """The texts of a file; a torn last line is left out."""
    found = []
    for row in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Text(**json.loads(row)))
        except (ValueError, TypeError):
            break
    return found


class Bootstrapped:
    """A data set of the embedded world's pictures with the texts that were kept; each is drawn as often as any other."""

    def __init__(self, world: Scenes, web: str, texts: Sequence[Text]):
        self.world, self.web = world, web
        self.kept = [text for text in texts if text.kept]

    def draw(self, rng: Random) -> Sample:
        """The picture, whose number in the pool is the last part of its id, with the text as its caption and the noise as its label."""
        text = rng.choice(self.kept)
        return replace(self.world.pooled(self.web, int(text.picture.rpartition("/")[2])), caption=text.text, label=text.noise)


def verdicts(texts: Sequence[Text]) -> dict[str, dict[str, float]]:
    """Per source, and per kind of noise of the web's: how many texts there are and how many of them are dropped."""
    groups: dict[str, list[Text]] = {}
    for text in texts:
        name = text.source if text.source != "web" else f"web/{text.noise or 'right'}"
        groups.setdefault(name, []).append(text)
    return {name: {"n": len(group), "dropped": sum(not text.kept for text in group)} for name, group in groups.items()}
