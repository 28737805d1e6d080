"""Pages, on which one thing after another is shown and said: what a model that learns from its context has read and seen.

"Flamingo" (2204.14198) §2.4 (M3W) and §3.3 (few-shot prompts); naming by example is a task of our own.
First as texts, for the language model: words stand where pictures will.

    names   <red star> Output: dax. <blue square> Output: wug. <red star> Output: dax.     made-up words, other ones on every page:
                                                                                           only the page itself tells what they mean
    shots   <scene> Question: what colour is the square? Answer: blue. <scene> Question: … as in-context examples

Then with pictures. Whoever answers must look at them: the words alone do not say what a picture shows.

    named pages   [red star] Output: dax <EOC> [blue square] Output: wug <EOC> [red star] Output: dax <EOC>

       classes are drawn with replacement from KNOWN, so the one that is asked for was shown in s shots with the
       probability 1 − (3/4)^s: .25 .44 .68 .90 .99 with 1, 2, 4, 8, 16 shots. No model can do better by more than luck.

    web pages     sentence first   a large red star in the top left. [picture] look at this. there is … [picture]
                  picture first    [picture] a large red star in the top left. [picture] look at this. there is …
                  a third of them call things by made-up names: "a large dax in the top left."

    page pairs    [picture] a large red star in the top left.      or, of one object alone,      [picture] red star
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from nanovlm.data.sample import CONTROLS, IMAGE, Sample, Turn, page_turns
from nanovlm.data.source import ONE_WORD, Exam
from nanovlm.world.ask import KINDS, ask
from nanovlm.world.say import DESCRIPTIONS, Wording, caption, description, say
from nanovlm.world.scene import HELD_OUT, PAIRS, Scene, about, random_scene

NAMES = ("dax", "wug", "blik", "toma", "fep", "gorp", "zib", "kesh", "lorn", "mip", "nuz", "pelk", "quim", "rud", "sarf", "tink",
         "vop", "yeb", "bamo", "clon", "dreb", "flim", "grun", "hosk", "jate", "kiv", "lumo", "murk", "plom", "snig", "thop", "wex")
KNOWN = 4  # classes that have names on one page
MOST_SHOTS = 8  # of a page that is told
SHOTS = (0, 1, 2, 4, 8, 16)  # of an exam with pictures
CONTROLLED = (4, 8)  # shots of which the controls are measured too, see data/sample.py
PICTURES = 5  # of a named page in training: the paper trains on five pictures of a page, and is asked with up to 32
SECTIONS = (2, 8)  # of a web page, the fewest and the most
LAYOUTS = ("sentence first", "picture first")
SENTENCES = ("there is {}", "the picture shows {}", "you see {}", "look: {}")
FILLERS = ("look at this.", "there are more.", "that is not all.", "what does this show?", "and again.", "see below.")

Page = tuple[tuple[Turn, ...], tuple[str, ...]]  # turns with a mark each, and what is told in the marks' places


def names(rng: Random, shots: int, asked_known: bool = False) -> Page:
    """`shots` things with their names, then one more, of the KNOWN classes of the page. asked_known: of those already shown."""
    classes = [" ".join(pair) for pair in rng.sample(PAIRS, KNOWN)]
    meant = dict(zip(classes, rng.sample(NAMES, KNOWN)))
    shown = [rng.choice(classes) for _ in range(shots)]
    shown.append(rng.choice(shown if asked_known and shown else classes))
    return tuple(Turn(IMAGE, meant[thing], "names") for thing in shown), tuple(shown)


def shots(scenes: list[Scene], rng: Random, kind: str = "") -> Page:
    """The same kind of question about one scene after another, or their captions; about the last one it is always asked."""
    kind = kind or rng.choice((*KINDS[:-1], "caption"))
    told, turns = [], []
    for scene in scenes:
        asked = None if kind == "caption" else ask(scene, rng, kind) or ask(scene, rng, "colour")
        turns.append(Turn(f"{IMAGE}{asked.turn.question}", asked.turn.answer, asked.turn.kind) if asked
                     else Turn(IMAGE, caption(scene, rng), "caption"))
        told.append(description(scene, rng, DESCRIPTIONS[:1]))
    return tuple(turns), tuple(told)


# ---- as samples. world: Scenes, which draws scenes and pictures of them

def told_names(most: int) -> Callable:
    """Things with their names: two shots on the shortest page, `most` and one more on the longest; then comes what is asked."""
    def make(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
        turns, told = names(rng, rng.randint(2, most + 1))
        return Sample("", told=told, turns=turns, format="flamingo")
    return make


def plain_names(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """Nothing stands between a thing and its name: "red star dax<EOC>blue square wug<EOC>…", and each thing comes again and again.

    So a language model finds out within a few hundred steps what it may take thousands for where "Output:" stands between.
    """
    turns, told = names(rng, rng.randint(5, 12))
    return Sample("", told=told, turns=tuple(replace(turn, answer=f" {turn.answer}") for turn in turns), format="pages")


def page_text(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """A web page or a pair without its pictures: what a language model has read before it sees, as Chinchilla has read the web."""
    page = (web_page if rng.random() < 0.5 else pair)(Unseen(world), scene, rng, pairs)
    return replace(page, turns=tuple(replace(turn, question="") for turn in page.turns))


class Unseen:
    """A world whose scenes nobody draws: a text may tell of pairs that no training picture shows."""

    def __init__(self, world: object):
        self.scene = world.scene

    def picture(self, scene: Scene) -> tuple:
        return ()


def told_shots(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    turns, told = shots([scene, *(world.scene(rng, pairs) for _ in range(rng.choice((0, 0, 1, 2))))], rng)
    return Sample("", told=told, turns=turns, format="flamingo")


def alone(pair: tuple[str, str], rng: Random) -> Scene:
    """An object of this class by itself, anywhere and of any size."""
    return random_scene(rng, (pair,), many=1, signs=0)


def named(world: object, rng: Random, classes: Sequence[tuple], shown: Sequence[tuple]) -> Sample:
    """A picture of each of the classes in `shown`, with the name that its class has on this page; the last one is asked for."""
    meant = dict(zip(classes, rng.sample(NAMES, len(classes))))
    pictures = tuple(picture for pair in shown for picture in world.picture(alone(pair, rng)))
    turns = tuple(Turn(IMAGE, meant[pair], "names") for pair in shown)
    return Sample("", pictures, references=(turns[-1].answer,), turns=turns, format="flamingo")


def named_page(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """An episode to learn from, which asks for the class of the scene."""
    classes = _with_others(about(scene).pair, KNOWN, rng, pairs)
    return named(world, rng, classes, [*rng.choices(classes, k=PICTURES - 1), classes[0]])


def examined(world: object, index: int) -> Sample:
    """An episode of as many shots as there are in any exam, which asks for a held-out class; `last` makes it shorter."""
    rng = Random(f"exam/names/{index}")
    classes = _with_others(HELD_OUT[index % len(HELD_OUT)], KNOWN, rng, PAIRS)
    page = named(world, rng, classes, [*rng.choices(classes, k=SHOTS[-1]), classes[0]])
    return replace(page, id=f"scenes/exam/names/{index}")


def last(page: Sample, shots: int) -> Sample:
    """The page's last question, and so many shots before it."""
    return replace(page, images=page.images[-shots - 1:], turns=page.turns[-shots - 1:])


def exams(episodes: Sequence[Sample]) -> list[Exam]:
    """The same episodes with each number of shots, and of some numbers the controls: "4", "4/no images", "4/text only"."""
    found = []
    for shots in SHOTS:
        asked = [last(page, shots) for page in episodes]
        changed = {f"{shots}/{name}": [change(s) for s in asked] for name, change in CONTROLS.items() if shots in CONTROLLED}
        found += [Exam(name, samples, ("fewshot",), room=ONE_WORD) for name, samples in {str(shots): asked, **changed}.items()]
    return found


def _with_others(pair: tuple, n: int, rng: Random, pairs: tuple) -> list[tuple]:
    """n classes, of which this is the first."""
    return [pair, *rng.sample([other for other in pairs if other != pair], n - 1)]


def web_page(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """Two to eight pictures, a sentence about each, and up to two sentences about nothing."""
    many = rng.randint(*SECTIONS)
    if rng.random() < 1 / 3:
        scenes, sentences = _with_made_up_names(about(scene).pair, many, rng, pairs)
    else:
        scenes = [scene, *(world.scene(rng, pairs, many=rng.choice((1, 1, 2)), signs=0.2) for _ in range(many - 1))]
        sentences = [_sentence(one, rng) for one in scenes]
    layout = rng.choice(LAYOUTS)
    sections = [(text, None) if layout == LAYOUTS[0] else (None, text) for text in sentences]
    for text in rng.sample(FILLERS, rng.randint(0, 2)):
        sections.insert(rng.randint(0, len(sections)), (text,))
    turns = page_turns((part for section in sections for part in section), " ")
    pictures = tuple(picture for one in scenes for picture in world.picture(one))
    return Sample("", pictures, references=tuple(sentences), turns=turns, label=layout, format="pages")


def _sentence(scene: Scene, rng: Random) -> str:
    return caption(scene, rng) if rng.random() < 0.5 else rng.choice(SENTENCES).format(say(scene, Wording("thing first", False)))


def _with_made_up_names(pair: tuple, many: int, rng: Random, pairs: tuple) -> tuple[list[Scene], list[str]]:
    """Scenes of few classes, so that they repeat, and sentences that call each by a name that only this page knows."""
    classes = _with_others(pair, max(1, many // 2), rng, pairs)
    meant = dict(zip(classes, rng.sample(NAMES, len(classes))))
    scenes = [alone(rng.choice(classes), rng) for _ in range(many)]
    return scenes, [_sentence(one, rng).replace(" ".join(about(one).pair), meant[about(one).pair]) for one in scenes]


def pair(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """One picture and its text: a caption, or every third time an object by itself and what it is.

    App. A.3: half of the texts open with a blank, or the model would take the blank for a mark of this kind of data.
    """
    if rng.random() < 1 / 3:
        return thing_pair(world, scene, rng, pairs)
    return _paired(world, scene, caption(scene, rng), (), rng)


def thing_pair(world: object, scene: Scene, rng: Random, pairs: tuple) -> Sample:
    """The shortest pair: "red star"."""
    thing = about(scene)
    text = " ".join(thing.pair)
    return _paired(world, Scene((thing,)), text, (text,), rng)


def _paired(world: object, scene: Scene, text: str, right: tuple[str, ...], rng: Random) -> Sample:
    turn = Turn(IMAGE, rng.choice(("", " ")) + text, "caption")
    return Sample("", world.picture(scene), text, right, turns=(turn,), format="pair")
