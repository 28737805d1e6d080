"""How LLaVA's training data are made: `python -m nanovlm.making.instruct SOURCE --out made.json`

"Visual Instruction Tuning" (2304.08485) §3, App. E, Tables 11 to 13. A teacher that cannot see writes about pictures that it is
told of (symbols.py), as if it saw them; what it writes is read as data, checked, and becomes a conversation.

    captions, boxes ─► symbols ─┐
    system message of a kind ───┼─► messages ─► teacher ─► "Question:\\n…\\n===\\nAnswer:\\n…" ─► turns ─► made.json
    examples of that kind ──────┘              (teachers.py)          │ wrong form? asked again, then left out and counted
                                                                      └ one line per reply in made.json.part: nothing is lost

    brief          no teacher: one of 11 requests, the caption                         stage 1
    conversation   several questions that can be answered with certainty               stage 2: 58K of the paper's 158K
    detail         one of 16 requests, a long description                                       23K
    reasoning      one question beyond what is there to be seen, answered step by step          77K

The first turn has the picture before or after its question, as chance wills (Eq. 2); the released code since v1.0.0 has it
always before (`--image-first`). The requests, system messages and examples are our own wording of the paper's.
Differs from the paper in: the default teacher goes by rules and costs nothing; GPT-4, or any other, is called only where an
address is given. For conversations too it is told the boxes, where there are some; the paper's was told captions only.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tqdm import tqdm

from nanovlm.data.sample import unmarked
from nanovlm.errors import UserError
from nanovlm.files import replacing
from nanovlm.making import symbols
from nanovlm.making.symbols import Symbols
from nanovlm.making.teachers import Endpoint, Teacher, rules

KINDS = ("brief", "conversation", "detail", "reasoning")
TRIES = 3  # replies of one teacher about one picture

BRIEF = (  # 11, as many as Table 11 has
    "Say briefly what the picture shows.", "What is this, in short?", "Give a short description of the picture.",
    "Sum the picture up in a sentence.", "Tell me in a few words what you see.", "Describe the picture briefly.",
    "What does the picture show, in one sentence?", "Put the picture into a short sentence.",
    "Name what is to be seen, without details.", "Write a short caption for this picture.",
    "In one line: what is this a picture of?")
DETAILED = (  # 16, as many as Table 12 has
    "Describe the picture in detail.", "Tell me everything that you see.", "Give a full description of the picture.",
    "What is to be seen here? Leave nothing out.", "Explain the picture to somebody who cannot see it.",
    "Walk me through the picture, thing by thing.", "Write down what the picture shows, with all details.",
    "Describe this scene as exactly as you can.", "Please look closely and describe what is there.",
    "What is where in the picture? Take your time.", "Characterise the picture thoroughly.",
    "Give me a long description of what you see.", "Describe what the picture shows and where.",
    "Report all that can be seen in the picture.", "Could you describe the picture at length?",
    "Paint the picture in words.")
SYSTEM = {
    "conversation": "You look at a picture, and somebody asks you about it. Write what is asked and answered: about what there "
    "is, how many, where, what it is like, what goes on. Ask only what can be answered with certainty, because it is surely "
    "there or surely not, and now and then something that needs a thought. Answer in whole sentences, or in a word where a "
    "class is asked for.",
    "detail": "You look at a picture. Describe the whole of it thoroughly, as running text: what there is, what it looks like, "
    "where it stands and how things stand to each other. Use the places that you are given, but say them in words, never in "
    "numbers.",
    "reasoning": "You look at a picture. Think of one question that goes beyond what is to be seen: why, what for, what next, "
    "what if. Do not say in the question what the picture shows. Answer it step by step.",
}
FORM = ("You are given lines that somebody wrote about the picture and, in some cases, its things with their places (left, top, "
        "right, bottom, from 0 to 1). Write as if you saw the picture itself, and never mention these lines or numbers. ")
BLOCKS = 'Write "Question:", on the next line the question, then "===", "Answer:" and the answer, with "===" between any two.'
TEXT = "Write the description and nothing else."

# What a reply looks like: (what is told, the reply). Two examples for conversations, of captions only, three for the others.
EXAMPLES = {
    "conversation": (
        ("a black dog sleeps on a red sofa.\na dog lying on a couch beside a pillow.",
         ("Question:\nWhat animal is in the picture?\n===\nAnswer:\nA dog.\n===\nQuestion:\nWhat is it doing?\n===\nAnswer:\n"
         "It is sleeping on a sofa.\n===\nQuestion:\nIs it standing?\n===\nAnswer:\nNo, it is lying down.")),
        ("two boats on a lake at sunset.\nboats float on calm water in the evening.",
         ("Question:\nHow many boats are there?\n===\nAnswer:\nThere are two boats.\n===\nQuestion:\nIs the water rough?\n===\n"
         "Answer:\nNo, the lake is calm.\n===\nQuestion:\nWhy might the sky be red?\n===\nAnswer:\nThe sun is setting.")),
    ),
    "detail": (
        ("a man waits at a bus stop.\n\nman: [0.10, 0.30, 0.25, 0.95]\nbench: [0.35, 0.60, 0.80, 0.90]",
         ("A man is waiting at a bus stop. He stands at the left edge of the picture, and beside him, to the right, there is a "
         "bench, which nobody sits on.")),
        ("a cup of coffee on a wooden table.\n\ncup: [0.40, 0.40, 0.60, 0.70]",
         "In the middle of a wooden table stands a cup of coffee. It is the only thing on the table."),
        ("a bird on a branch.\n\nbird: [0.60, 0.10, 0.75, 0.30]",
         "A small bird sits on a branch, in the upper right of the picture. Most of the picture is empty around it."),
    ),
    "reasoning": (
        ("a man with an umbrella crosses a wet street.\n\numbrella: [0.40, 0.10, 0.70, 0.40]",
         ("Question:\nWhat does the man expect of the weather?\n===\nAnswer:\nThe street is wet, so it has rained or still does. "
         "He carries an open umbrella, so he expects that it goes on raining.")),
        ("a cake with seven candles on a table.\n\ncake: [0.30, 0.50, 0.70, 0.90]",
         ("Question:\nHow old is the child most likely, whose day it is?\n===\nAnswer:\nA birthday cake carries a candle for each "
         "year. There are seven, so the child is most likely seven years old.")),
        ("skis lean against a wall beside a door.\n\nskis: [0.70, 0.20, 0.80, 0.90]",
         ("Question:\nWhy might the skis stand outside?\n===\nAnswer:\nSkis are wet with snow after they were used. Beside the "
         "door they can drip without harm, and they are at hand for the next time.")),
    ),
}


# --- what a teacher is asked, and what it says ---

def messages(kind: str, told: Symbols) -> list[dict[str, str]]:
    """System message, examples as if they had been said before, then the picture: Table 13."""
    form = TEXT if kind == "detail" else BLOCKS
    said = [{"role": "system", "content": f"{SYSTEM[kind]} {FORM}{form} What is wanted: {kind}"}]
    for seen, reply in EXAMPLES[kind]:
        said += [{"role": "user", "content": seen}, {"role": "assistant", "content": reply}]
    return [*said, {"role": "user", "content": told.as_text()}]


def turns(kind: str, reply: str, rng: Random, captions: Sequence[str] = ()) -> list[tuple[str, str]]:
    """A reply as questions and answers; ValueError says what is wrong with it.

    captions: of the picture. What looks like a mark or a box may be written in the picture, and then it stands in these too.
    """
    reply = reply.strip()
    if not reply:
        raise ValueError("it is empty")
    reply.encode()  # half of a character is a ValueError too
    found = [word[0] for word in re.finditer(r"\b(captions?|bounding box(es)?|coordinates?)\b", reply, re.IGNORECASE)]
    found += [mark for mark in re.findall(r"<image>|\[0?\.\d", reply) if mark not in " ".join(captions)]
    if found:
        raise ValueError(f"it says {found[0]!r}, which gives away that nobody looked at a picture")
    if kind == "detail":
        if "===" in reply or len(reply.split()) < 3:
            raise ValueError("a description is running text of some words")
        return [(rng.choice(DETAILED), reply)]
    blocks = [block.strip() for block in reply.split("===")]
    heads = ("Question:", "Answer:")
    pairs = []
    for i, block in enumerate(blocks):
        head, text = heads[i % 2], block.removeprefix(heads[i % 2]).strip()
        if not block.startswith(head) or not text:
            raise ValueError(f'part {i + 1} is not "{head}" and a text')
        pairs.append(text)
    if len(pairs) % 2 or (kind == "reasoning" and len(pairs) != 2):
        raise ValueError("the last question has no answer" if len(pairs) % 2 else "one question was asked for")
    return list(zip(pairs[::2], pairs[1::2]))


def as_record(told: Symbols, kind: str, pairs: Sequence[tuple[str, str]], base: Path, first: bool, rng: Random) -> dict:
    """LLaVA's JSON. "kind", "caption" and "split" are further fields, which our reader knows and others pass over."""
    conversation, short = [], all(answer in ("yes", "no", *told.labels) for _, answer in pairs)
    for number, (question, answer) in enumerate(pairs):
        question = unmarked(question)
        if number == 0:
            question = f"<image>\n{question}" if first or rng.random() < 0.5 else f"{question}\n<image>"
        said = {"from": "gpt", "value": answer}
        if short:  # for the per-kind table: such a question has one right answer
            said["kind"] = "existence" if answer in ("yes", "no") else "class"
        conversation += [{"from": "human", "value": question}, said]
    record = {"id": f"{told.id}/{kind}", "image": os.path.relpath(told.image, base), "conversations": conversation,
              "caption": told.captions[0]}
    form = {"form": "short"} if short else {}
    return record | form | ({"split": told.split} if told.split else {})


# --- the work ---

def synthesise(told: Sequence[Symbols], teacher: Teacher, kinds: Sequence[str], out: Path, settings: dict,
               image_first: bool = False) -> Counter:
    """Write `out`; what happened, counted. Interrupted, it goes on where it was: `out`.part has a line for each reply."""
    part, why = out.with_name(out.name + ".part"), "nothing was asked"
    done = read_part(part, settings)
    seen = Counter("made" if record else "left out" for record in done.values())
    jobs = [(s, kind) for s in told for kind in kinds if possible(s, kind) and f"{s.id}/{kind}" not in done]
    with open(part, "a", encoding="utf-8") as file:
        if not done and part.stat().st_size == 0:
            file.write(json.dumps(settings) + "\n")
        for s, kind in tqdm(jobs, desc="asking the teacher", unit=" replies", leave=False, disable=None):
            rng = Random(f"{settings['seed']}/{s.id}/{kind}")
            try:
                pairs, failed, why = ask(teacher, s, kind, rng)
            except UserError as error:
                raise UserError(f"{error} What was made so far is kept in {part}: the same command goes on from there.") from error
            record = as_record(s, kind, pairs, out.parent, image_first, rng) if pairs else None
            done[f"{s.id}/{kind}"] = record
            seen.update({"made" if pairs else "left out": 1, "refused replies": failed})
            file.write(json.dumps({"key": f"{s.id}/{kind}", "record": record}, ensure_ascii=False) + "\n")
            file.flush()
    records = [done[key] for s in told for kind in kinds if done.get(key := f"{s.id}/{kind}")]
    if not records:
        raise UserError(f"The teacher's replies were of no use, all {seen['left out']} of them; of the last: {why}.")
    with replacing(out) as beside:
        beside.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.unlink()
    return seen


def possible(told: Symbols, kind: str) -> bool:
    """Whether there is anything to reason from."""
    return kind != "reasoning" or bool(told.boxes)


def ask(teacher: Teacher, told: Symbols, kind: str, rng: Random) -> tuple[list[tuple[str, str]], int, str]:
    """Questions and answers, none if no reply was of use; how many were not, and what was wrong with the last of these."""
    if kind == "brief":
        return [(rng.choice(BRIEF), told.captions[0])], 0, ""
    asked, why = messages(kind, told), ""
    tries = 1 if teacher is rules else TRIES  # rules say the same every time: of a caption that speaks of captions, say
    for failed in range(tries):
        reply = teacher(asked)
        try:
            return turns(kind, reply, rng, told.captions), failed, why
        except ValueError as error:
            why = str(error)
    return [], tries, why


def read_part(part: Path, settings: dict) -> dict[str, dict | None]:
    """What an interrupted run has made; a line that was being written goes, and what was left out is asked for again."""
    if not part.exists():
        return {}
    content = part.read_bytes()
    content = content[:content.rfind(b"\n") + 1]
    os.truncate(part, len(content))
    whole = [json.loads(line) for line in content.splitlines()]
    if whole and whole[0] != settings:
        raise UserError(f"{part} was begun with other settings ({json.dumps(whole[0])}): use the same, or delete it.")
    return {line["key"]: line["record"] for line in whole[1:] if line["record"]}


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may know no Chinese
    try:
        return make(options)
    except (UserError, OSError) as error:  # a full disk, a folder that is read-only
        print(error, file=sys.stderr)
        return 2


def make(options: argparse.Namespace) -> int:
    out, kinds = Path(options.out), options.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise UserError(f"--kinds: {unknown[0]!r} is none; there are {', '.join(KINDS)}.")
    if out.exists():
        raise UserError(f"--out {out} is there already: delete it, or give another name.")
    if bool(options.teacher) != bool(options.model):
        raise UserError("--teacher and --model go together: the address of a server, and the model that it is to use.")
    out.parent.mkdir(parents=True, exist_ok=True)
    told = symbols.read(options.source, options.instances, out.with_name(f"{out.stem}_pictures"), options.seed)
    told = symbols.balanced(told, seed=options.seed) if options.balance else told
    told = told[:options.limit or None]
    endpoint = Endpoint(options.teacher, options.model, options.key_from, options.per_minute, options.timeout) \
        if options.teacher else None
    settings = {"source": options.source, "instances": options.instances, "teacher": [options.teacher, options.model],
                "seed": options.seed, "kinds": kinds, "image_first": options.image_first}
    seen = synthesise(told, endpoint or rules, kinds, out, settings, options.image_first)
    print(f"{out}: {seen['made']:,} conversations about {len(told):,} pictures; {seen['left out']:,} left out, "
          f"{seen['refused replies']:,} replies of the wrong form")
    if endpoint:
        print(f"{endpoint.calls:,} calls, {endpoint.tokens_in:,} tokens in, {endpoint.tokens_out:,} out, "
              f"{endpoint.cost(options.price_in, options.price_out):.2f} spent")
    print(f"next: python train_tiny.py --model llava --data {out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.making.instruct", description="Make LLaVA's kind of training data.",
        epilog="example: python -m nanovlm.making.instruct captions.jsonl --out made.json")
    parser.add_argument("source", help="a .jsonl of captions, a folder, COCO captions .json, or scenes:500")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .json to write")
    parser.add_argument("--kinds", default="conversation,detail,reasoning", help=f"of {', '.join(KINDS)} (default: the last three)")
    parser.add_argument("--instances", metavar="FILE", help="COCO instances .json, for the boxes")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N pictures only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-first", action="store_true", help="the picture always before the first question")
    parser.add_argument("--balance", action="store_true", help="first choose captions by their noun phrases, as for CC-595K")
    parser.add_argument("--teacher", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1; "
                        "without it rules make the data, and nothing is sent anywhere")
    parser.add_argument("--model", metavar="NAME", help="the server's model")
    parser.add_argument("--key-from", default="", metavar="VARIABLE", help="environment variable that holds the key")
    parser.add_argument("--per-minute", type=float, default=60, metavar="N", help="requests at most (default: 60)")
    parser.add_argument("--timeout", type=float, default=60, metavar="S", help="seconds to wait for a reply (default: 60)")
    parser.add_argument("--price-in", type=float, default=0, metavar="P", help="of a million tokens read, to count the cost")
    parser.add_argument("--price-out", type=float, default=0, metavar="P", help="of a million tokens written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
