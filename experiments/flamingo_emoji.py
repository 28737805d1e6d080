"""Does Flamingo learn names from a few pictures on the page, and know the things again when a stranger has drawn them?

    train     1,412 emoji, each drawn by two artists ─► flamingo/tiny, all stages: eyes, language model, gated layers
              as pairs, and on as many pages of five pictures, each with its name; on every second page names are made up
    asked     150 things that no training picture shows. The examples are by the two artists; the picture that is asked for is by the third

              four things   [noto: panda] Output: panda <EOC> [twemoji: anchor] Output: anchor <EOC> [fluentui: panda] Output: ?
                            up to 8 examples, each of the four drawn twice; with fewer, the thing may not be among them: see the row "shown"
              150 things    8 examples of all that the two artists drew, by chance or those that look most alike (RICES)

    python -m experiments.flamingo_emoji --data ../shared/data/emoji                trains, then asks
    python -m experiments.flamingo_emoji --data ../shared/data/emoji --run FOLDER   asks a finished run, or makes it there
    python -m experiments.flamingo_emoji --table                                    print what is stored

Names are as they are, or made up and bound to things anew in each episode: then only the examples can tell. The answer is one of the
four names (the likeliest), or whatever beam search says. Beside each figure its controls, see evaluate/fewshot.py.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from experiments.capfilt_emoji import write_lines
from experiments.seeds import RESULTS, asked, machine
from nanovlm.data.sample import CONTROLS, IMAGE, Sample, Turn
from nanovlm.data.transforms import load_image
from nanovlm.evaluate.fewshot import ORDERS, Episode, by_chance, features, measure, rices
from nanovlm.evaluate.pupil import Pupil
from nanovlm.runs.run import Options, versions
from nanovlm.world.pages import NAMES, PICTURES

STRANGER, SHOTS, AT_ONCE, TIMES, ROOM = "fluentui", (0, 1, 2, 4, 8), 4, 4, 16

Drawings = dict[str, dict[str, object]]  # name → artist → picture


def without_stranger(data: Path, folder: Path) -> Path:
    """The set to learn from: `folder`/captions.jsonl, with two of the three artists; held-out things stay held out."""
    pairs = [{"image": str((data / row["image"]).resolve()), "caption": row["caption"], "split": row["split"]}
             for row in rows_of(data) if row["artist"] != STRANGER]
    drawn: dict[str, list[str]] = {}
    for pair in pairs:
        if pair["split"] == "train":
            drawn.setdefault(pair["caption"], []).append(pair["image"])
    rng, many = Random(0), sum(map(len, drawn.values()))
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "captions.jsonl", [*pairs, *(page_of(drawn, i % 2 == 1, rng) for i in range(many))])
    return folder


def page_of(drawn: dict[str, list[str]], made_up: bool, rng: Random) -> dict:
    """A document: PICTURES drawings of AT_ONCE things, each with its name, as few-shot prompts have it; so that earlier ones help."""
    things = rng.sample(sorted(drawn), AT_ONCE)
    meant = dict(zip(things, rng.sample(NAMES, AT_ONCE) if made_up else things))
    shown = rng.sample([(image, f"Output: {meant[thing]}") for thing in things for image in drawn[thing]], PICTURES)
    return {"images": [part for image, _ in shown for part in (image, None)], "texts": [part for _, text in shown for part in (None, text)],
            "split": "train"}


def rows_of(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out(data: Path) -> Drawings:
    found: Drawings = {}
    for row in rows_of(data):
        if row["split"] == "val":
            found.setdefault(row["caption"], {})[row["artist"]] = load_image(data / row["image"])
    return found


def drawing(drawings: Drawings, thing: str, artist: str, name: str) -> Sample:
    return Sample(f"{artist}/{thing}", (drawings[thing][artist],), turns=(Turn(IMAGE, name, "caption"),))


def by_known(drawings: Drawings, things: Sequence[str]) -> list[tuple[str, str]]:
    return [(thing, artist) for thing in things for artist in drawings[thing] if artist != STRANGER]


def of_four(drawings: Drawings, made_up: bool, closed: bool, seed: int) -> list[Episode]:
    """Held-out things, four at a time; each four asked TIMES times, with other bindings of the same four names where those are made up."""
    rng, found = Random(seed), []
    things = rng.sample(sorted(drawings), len(drawings) // AT_ONCE * AT_ONCE)
    for start in range(0, len(things), AT_ONCE):
        four = things[start:start + AT_ONCE]
        words = rng.sample(NAMES, AT_ONCE) if made_up else four
        for time in range(TIMES):
            meant = dict(zip(four, rng.sample(words, AT_ONCE) if made_up else words))
            shown = by_known(drawings, four)
            examples = [drawing(drawings, thing, artist, meant[thing]) for thing, artist in rng.sample(shown, len(shown))]
            asked = four[time % AT_ONCE]
            found.append(Episode(drawing(drawings, asked, STRANGER, meant[asked]), examples, tuple(words) if closed else ()))
    return found


def of_all(pupil: Pupil, drawings: Drawings, alike: bool, seed: int) -> list[Episode]:
    """Every held-out thing, to be found among all their names; examples by chance, or those that are most alike."""
    rng = Random(seed)
    support = [drawing(drawings, thing, artist, thing) for thing, artist in by_known(drawings, sorted(drawings))]
    queries = [drawing(drawings, thing, STRANGER, thing) for thing in sorted(drawings)]
    seen, asked = features(pupil, support), features(pupil, queries)
    return [Episode(query, rices(feature, seen, support, SHOTS[-1]) if alike else by_chance(support, SHOTS[-1], rng), tuple(sorted(drawings)))
            for query, feature in zip(queries, asked)]


def ask(pupil: Pupil, drawings: Drawings, seed: int, every: bool = True) -> dict[str, dict]:
    """{task: figures}, and in "shown" how often the thing that is asked for stands among the examples. every: not only one of four names."""
    tasks = {f"{'made-up' if made_up else 'real'} names, {'one of four' if closed else 'any words'}": of_four(drawings, made_up, closed, seed)
             for made_up in (False, True) for closed in ((True, False) if every else (True,))}
    found = {}
    for name, episodes in tasks.items():
        found[name] = {"shown": shown(episodes), **measure(pupil, episodes, SHOTS, room=ROOM)}
        if episodes[0].among and every:
            found[f"{name}, {ORDERS} orders"] = measure(pupil, episodes, SHOTS[-2:], ORDERS, controls={})
    for name, alike in (("one of 150, examples by chance", False), ("one of 150, RICES", True)) if every else ():
        episodes = of_all(pupil, drawings, alike, seed)
        found[name] = {"shown": shown(episodes), **measure(pupil, episodes, (0, *SHOTS[-2:]), controls={})}
    return found


def shown(episodes: Sequence[Episode]) -> dict[str, float]:
    """Of so many shots: how often a model that reads the page perfectly can know the name."""
    there = {shots: [any(example.turns == one.query.turns for example in one.examples[len(one.examples) - shots:]) for one in episodes]
             for shots in SHOTS}
    return {str(shots): sum(found) / len(found) for shots, found in there.items()}


def table(result: dict) -> str:
    """Markdown: rows for each task and its controls, a column for each number of shots; the seeds side by side."""
    runs = result["runs"]
    rows = [["emoji by a stranger", "chance", *(f"{shots} shots" for shots in SHOTS)], ["---"] * (2 + len(SHOTS))]
    for name, first in runs[0]["tasks"].items():
        def cells(end: str, key: str, name: str = name, first: dict = first) -> list[str]:
            figures = [f"fewshot_accuracy/{shots}{end}" for shots in SHOTS]
            return [" / ".join(f"{one['tasks'][name][figure][key]:.2f}" for one in runs) if figure in first else "" for figure in figures]

        chance = next(figure["chance"] for figure in first.values() if "chance" in figure)
        rows += [[f"**{name}**", f"{chance:.2f}", *cells("", "value")], ["all pictures exchanged", "", *cells("", "shuffled")]]
        rows += [[control, "", *row] for control in CONTROLS if any(row := cells(f"/{control}", "value"))]
        rows += [["shown", "", *(f"{share:.2f}" for share in first["shown"].values())]] if "shown" in first else []
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    path = RESULTS / "flamingo_emoji.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder emoji")
    parser.add_argument("--run", type=Path, help="where the run is, or is to be made (default: a folder that is deleted)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="open answers, several orders and one of 150 names, too: half an hour more")
    parser.add_argument("--steps", type=float, help="of each stage, as train_tiny.py takes it (default: all)")
    parser.add_argument("--table", action="store_true", help="print what is stored")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as scratch:
            out = args.run or Path(scratch) / "run"
            learned = without_stranger(args.data, Path(scratch) / "two artists")
            pupil = asked(out, "flamingo/tiny", Options(data=str(learned), seed=args.seed, steps=args.steps))
            tasks = ask(pupil, held_out(args.data), args.seed, args.every)
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        new = {"seed": args.seed, "steps": args.steps, "machine": machine(), "tasks": tasks}
        result = {"recipe": "flamingo/tiny", "data": "emoji", "versions": versions(),
                  "runs": sorted([one for one in runs if one["seed"] != args.seed] + [new], key=lambda one: one["seed"])}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
