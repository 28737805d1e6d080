"""Teachers: from a prompt to a reply, without a look at the picture. One goes by rules, one is somebody's language model.

"Visual Instruction Tuning" (2304.08485) §3: the paper's teacher is GPT-4, which reads text only.

    messages ──► rules(messages)        questions whose answers follow from captions and boxes; free, the same every time
      │
      └────────► Endpoint(messages)     POST …/chat/completions of any OpenAI-compatible server that the user names

A teacher is any function from messages, [{"role", "content"}, …], to a text in the form that `instruct` asks for.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from nanovlm.errors import UserError
from nanovlm.making.symbols import Box, Symbols, from_text

Messages = Sequence[dict[str, str]]
Teacher = Callable[[Messages], str]

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMON = ("dog", "cat", "car", "bicycle", "chair", "person", "boat", "bird", "bench", "umbrella", "horse", "clock")


# --- by rules ---

def rules(messages: Messages) -> str:
    """Which kind is wanted is the last word of the system message; the picture's symbols are the last message."""
    text = messages[-1]["content"]
    symbols, rng = from_text(text), Random(text)
    write = {"conversation": _conversation, "detail": _detail, "reasoning": _reasoning}
    return write[re.findall(r"\w+", messages[0]["content"])[-1]](symbols, rng)


def _blocks(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


def _conversation(symbols: Symbols, rng: Random) -> str:
    if symbols.label:  # one question only: its answer would give away those to the others
        return _blocks([rng.choice(_of_a_class(symbols, rng))])
    first = ("What is in the picture?", _sentence(symbols.captions[0]))
    if not symbols.boxes:
        return _blocks([first])
    counts = Counter(name for name, _ in symbols.boxes)
    alone = [(name, box) for name, box in symbols.boxes if counts[name] == 1]
    name, times = rng.choice(sorted(counts.items()))
    more = [(f"How many things of the kind {_bare(name)} are there?",
             f"There {'is' if times == 1 else 'are'} {_number(times)}.")]
    told = " ".join((*symbols.captions, *counts)).lower()
    if absent := [thing for thing in COMMON if thing not in told and "person" not in thing]:
        missing = rng.choice(absent)
        more.append((f"Is there {_a(missing)}?", f"No, there is no {missing} in the picture."))
    if alone:
        name, box = rng.choice(alone)
        more.append((f"Where is {_the(name)}?", f"{_upper(_the(name))} is {_place(box)}."))
    if len(alone) > 1 and (pair := _apart(rng.sample(alone, 2))):
        left, right = pair
        more.append((f"Which is further to the left, {_the(right)} or {_the(left)}?",
                     f"{_upper(_the(left))} is further to the left."))
    return _blocks([first, *rng.sample(more, len(more))])


def _of_a_class(symbols: Symbols, rng: Random) -> list[tuple[str, str]]:
    right, wrong = symbols.label, [label for label in symbols.labels if label != symbols.label]
    some = rng.sample(wrong, min(3, len(wrong))) + [right]
    asked = right if rng.random() < 0.5 or not wrong else rng.choice(wrong)
    return [("What is it?", right), (f"Is it {_a(asked)}?", "yes" if asked == right else "no"),
            (f"Which of these is it: {', '.join(rng.sample(some, len(some)))}?", right)]


def _detail(symbols: Symbols, rng: Random) -> str:
    if symbols.label:
        return f"What is to be seen here: {symbols.captions[0]}."
    told = [_sentence(max(symbols.captions, key=len))]  # the others say the same once more
    for name, box in symbols.boxes:
        told.append(f"{_upper(_a(name))} is {_place(box)} and takes up about {_share(box)} of it.")
    return " ".join(told)


def _reasoning(symbols: Symbols, rng: Random) -> str:
    """What is said nowhere, but follows; nothing where there are no boxes to reason from."""
    if not symbols.boxes:
        return ""
    things = [(_the(name), box) for name, box in symbols.boxes]
    areas = sorted(_area(box) for _, box in things)
    clear = len({name for name, _ in things}) == len(things) > 1 and areas[-1] > 1.2 * areas[-2]
    if not clear or rng.random() < 0.5:
        side = rng.choice(("left", "right"))
        there = [(name, (box[0] + box[2]) / 2 < 0.5) for name, box in things]
        steps = [f"The middle of {name} lies in the {'left' if left else 'right'} half." for name, left in there]
        lost = [name for name, left in there if left == (side == "left")]
        return _blocks([(f"What would be lost if the {side} half of the picture were cut away?",
                         f"{' '.join(steps)} So {_listed(lost) or 'nothing of it'} would be lost.")])
    largest = max(things, key=lambda thing: _area(thing[1]))[0]
    steps = [f"{_upper(name)} takes up about {_share(box)} of the picture." for name, box in things]
    return _blocks([("If all things in it were equally large, which would be the closest to the viewer?",
                     f"What is closer looks larger. {' '.join(steps)} So {largest} would be the closest.")])


def _sentence(text: str) -> str:
    text = text.strip()
    return _upper(text) + ("" if text.endswith((".", "!", "?")) else ".")


def _upper(text: str) -> str:
    """Only the first letter: "the word ON" keeps its own."""
    return text[0].upper() + text[1:]


def _bare(name: str) -> str:
    return name.removeprefix("the ")


def _the(name: str) -> str:
    return f"the {_bare(name)}"


def _a(name: str) -> str:
    """With its article: a hat, an umbrella; shoes, and what has one, stay as they are."""
    if name.startswith("the ") or (name.endswith("s") and not name.endswith("ss")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _number(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _share(box: Box) -> str:
    return f"{max(1, round(100 * _area(box)))} percent"


def _place(box: Box) -> str:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row = "upper" if y < 1 / 3 else "lower" if y > 2 / 3 else ""
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    if not row and not column:
        return "in the middle of the picture"
    return f"in the {f'{row} {column}'.strip()} part of the picture"


def _apart(pair: Sequence[tuple[str, Box]]) -> list[str]:
    """The names of two things from left to right; none if a tenth of the width does not lie between their middles."""
    ordered = sorted(pair, key=lambda thing: thing[1][0] + thing[1][2])
    (one, a), (two, b) = ordered
    return [one, two] if b[0] + b[2] - a[0] - a[2] > 0.2 else []


# --- by a language model ---

class Endpoint:
    """An OpenAI-compatible server. Failures that may pass (429, 5xx, no answer) are tried again, later and later."""

    def __init__(self, url: str, model: str, key_from: str = "", per_minute: float = 60, timeout: float = 60,
                 tries: int = 5, wait: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic):
        """key_from: the environment variable that holds the key; its value is in the request's header and nowhere else."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"{url} is no address of a server: it must begin with http:// or https://.")
        if per_minute <= 0:
            raise UserError(f"{per_minute:g} requests a minute are none: give a number above 0.")
        self.key = os.environ.get(key_from, "").strip() if key_from else ""
        if key_from and not (self.key.isascii() and self.key.isprintable() and self.key):
            raise UserError(f"The environment variable {key_from}, which is to hold the key, is empty or holds something else.")
        self.url, self.model, self.timeout, self.tries = f"{url.rstrip('/')}/chat/completions", model, timeout, tries
        self.pause, self.wait, self.clock = 60 / per_minute, wait, clock
        self.next = 0.0  # the earliest moment of the next request
        self.calls = self.tokens_in = self.tokens_out = 0

    def __call__(self, messages: Messages) -> str:
        reason = ""
        for number in range(self.tries):
            if number:
                self.wait(later if (later := self.asked_to_wait) else 2.0 ** number)
            self.wait(max(0.0, self.next - self.clock()))
            self.next, self.asked_to_wait = self.clock() + self.pause, 0.0
            try:
                return self.ask(messages)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{self.url} refuses: {reason}. Look at the address, the model's name "
                                    f"({self.model}) and the key.") from error
                self.asked_to_wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # nobody there, too slow, or gone in the middle
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(f"{self.url} gave no answer in {self.tries} tries (the last time: {reason}).")

    def ask(self, messages: Messages) -> str:
        body = json.dumps({"model": self.model, "messages": list(messages)}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        if self.key:  # not sent on to where a server may redirect
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content = response.read()
        self.calls += 1
        try:
            reply = json.loads(content)
            used = reply.get("usage") or {}
            self.tokens_in += used.get("prompt_tokens", 0)
            self.tokens_out += used.get("completion_tokens", 0)
            return str(reply["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError, AttributeError):
            return ""  # an answer, but no reply: `instruct` finds nothing in it, and asks again

    def cost(self, price_in: float, price_out: float) -> float:
        """What was spent so far; prices are of a million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6


def _seconds(header: str | None) -> float:
    return float(header) if header and header.replace(".", "", 1).isdigit() else 0.0
