"""A row of a table becomes a sample: a picture with its captions, a conversation, or a question with its answers.

    {"image": "a.jpg", "caption": ["a hat", "a red hat"], "label": "hat"}              pictures by name; places.py finds them
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nhat?"}, {"from": "gpt", "value": "yes"}]}
    {"image": "a.jpg", "question": "What says the sign?", "answer": "stop", "ocr": ["stop", "4th"]}
                        besides "answer", which may be a list of all that is right, a question may have

    options     the answers to choose from, which are read out; "candidates" are not
    ocr         the words that a machine has read in the picture, a list or a text
    context     what is to be known, a text                history     what was said before, a text

Instructions ("InstructBLIP", 2305.06500, §2.1) are made of all of them in templates.py. For "image" there may stand "clip" or "frames",
see clips.py. Whatever is wrong with a row is said in one sentence without a full stop: formats.py puts the record's name before it.
"""

import json
import re
from dataclasses import replace

from nanovlm.data import documents
from nanovlm.data.places import Missing, Places
from nanovlm.data.sample import IMAGE, Sample, Task, Turn, unmarked
from nanovlm.data.shards import Shard
from nanovlm.data.templates import lettered, listed
from nanovlm.errors import UserError

VIDEO = re.compile(r"\A<video>(?!.*</video>)|\n<video>\Z", re.DOTALL)  # at the edge of a question; inside it is talk about HTML


def as_sample(record: str, row: object, places: Places | Shard) -> tuple[Sample, str, list[str]]:
    """The sample, with paths for images, its split, and pictures that it does without."""
    if not isinstance(row, dict):
        raise UserError('the record is no JSON object; write {"image": ..., "caption": ...}')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write it, "\ud83d", but no text can hold it
        raise UserError(f"it holds half of a character ({error.object[error.start]!a}); mend or remove it") from error
    if row.get("video") or row.get("videos"):
        raise Missing('field "video": videos are not read, only pictures are; give some of its frames as pictures')
    split = row.get("split") or ""
    if split not in ("", "train", "val"):
        raise UserError(f'field "split" is {split!r}; it must be "train" or "val"')
    if documents.is_document(row):
        sample, left_out = documents.page(record, row, places.find)
        return sample, split, left_out
    reads = _conversation if "conversations" in row else _question if "question" in row else _captioned
    sample = reads(record, row)
    find = places.clip if "clip" in row else places.find
    images = (tuple(map(find, entry)) if isinstance(entry, tuple) else find(entry) for entry in sample.images)
    return replace(sample, images=tuple(images)), split, []


def shown(row: dict) -> list[str | tuple[str, ...]]:
    """The names of its pictures; those of a clip's frames stand together."""
    if (frames := row.get("frames")) is not None:
        if not isinstance(frames, list) or not frames or not all(isinstance(frame, str) and frame.strip() for frame in frames):
            raise UserError('field "frames": the clip has no frame; write a list of paths, of one at least')
        return [tuple(frames)]
    images = row.get("clip") or row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError('field "image" must be a path or a list of paths')
    return images


def _captioned(record: str, row: dict) -> Sample:
    for key in ("image", "caption"):
        if key not in row and (key == "caption" or not {"clip", "frames"} & set(row)):
            raise UserError(f'field "{key}" is missing; every record needs "image" and "caption" (or "conversations")')
    if not isinstance(row.get("image", ""), str) or len(images := shown(row)) != 1 or not str(images[0]).strip():
        raise UserError('field "image" must be the path of one picture')
    captions = _captions(row["caption"])
    return Sample(record, tuple(images), captions[0], captions, label=str(row.get("label") or ""), task=Task(fields=_fields(row)))


def _captions(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError('field "caption" is empty or no text; write one or remove the record')
    return tuple(map(_one_line, texts))


def _conversation(record: str, row: dict) -> Sample:
    if row.get("id") is not None:
        record = f"{record} (id {row['id']})"
    images = shown(row)
    turns = _turns(row["conversations"])
    marks = sum(turn.question.count(IMAGE) for turn in turns)
    if marks != len(images):
        raise UserError(f'{marks} "{IMAGE}" marks in field "conversations" but {len(images)} pictures in field '
                        '"image"; there must be one mark for each picture')
    # The answer to the question with the picture; of a long one the first sentence names it best, 40 words at most.
    first = next((turn for turn in turns if IMAGE in turn.question), turns[0])
    first_sentence = re.split(r"(?<=[.!?])\s", _one_line(first.answer), maxsplit=1)[0]
    captions = _captions(row["caption"]) if row.get("caption") else (" ".join(first_sentence.split()[:40]),)
    return Sample(record, tuple(images), captions[0], captions if row.get("caption") else (), turns=turns, form=str(row.get("form") or ""))


def _question(record: str, row: dict) -> Sample:
    """Its caption, where the row has none, is the answer; `references` are captions of its own only."""
    images, question = shown(row), row["question"]
    if not isinstance(question, str) or not question.strip():
        raise UserError('field "question" is empty or no text')
    given = row.get("answer", "")
    answers = _texts("answer", given if isinstance(given, list) else [given])
    if not answers or not all(answer.strip() for answer in answers):
        raise UserError('field "answer" is missing or empty; write a text, or a list of all that is right')
    options = _texts("candidates", row.get("candidates")) or _texts("options", row.get("options"))
    if not all(option.strip() for option in options):
        raise UserError("one of the answers to choose from is empty; write or remove it")
    if options and not set(answers) & set(options):
        raise UserError(f'field "answer" is {answers[0]!r}, which is none of the answers to choose from')
    captions = _captions(row["caption"]) if row.get("caption") else ()
    turn = Turn(f"{IMAGE * len(images)}\n{unmarked(question.strip())}".lstrip(), answers[0], str(row.get("kind") or ""), options)
    return Sample(record, tuple(images), captions[0] if captions else answers[0], captions, turns=(turn,), label=str(row.get("label") or ""),
                  form=str(row.get("form", "short")), task=Task(answers=answers, fields=_fields(row)))


def _fields(row: dict) -> tuple[tuple[str, str], ...]:
    """What else a template may say of the record, as it says it."""
    for name in ("context", "history"):
        if not isinstance(row.get(name) or "", str):
            raise UserError(f'field "{name}" must be a text')
    words = row.get("ocr")
    said = {"context": row.get("context"), "history": row.get("history"), "options": lettered(_texts("options", row.get("options"))),
            "ocr": listed(words if isinstance(words, str) else _texts("ocr", words))}
    return tuple((name, unmarked(text)) for name, text in said.items() if text)


def _texts(name: str, value: object) -> tuple[str, ...]:
    """A list of texts, or of numbers; () where there is none."""
    if not isinstance(value or [], list) or not all(isinstance(one, (str, int, float)) for one in value or ()):
        raise UserError(f'field "{name}" must be a list of texts')
    return tuple(map(str, value or ()))


def _turns(messages: object) -> tuple[Turn, ...]:
    """differs: the released code drops a leading gpt turn; here it is an error, since something before it got lost."""
    if not isinstance(messages, list) or not messages:
        raise UserError('field "conversations" must be a list of {"from", "value"}, and not empty')
    for i, message in enumerate(messages):
        speaker, where = ("human", "gpt")[i % 2], f'field "conversations"[{i}]'
        if not isinstance(message, dict) or not isinstance(message.get("value"), str) or "from" not in message:
            raise UserError(f'{where} must be {{"from": "{speaker}", "value": "..."}}')
        if message["from"] != speaker:
            start = "the conversation starts with the assistant: " if i == 0 and message["from"] == "gpt" else ""
            raise UserError(f'{start}{where} is from "{message["from"]}" but must be from "{speaker}"; '
                            "human and gpt take turns, human first")
        if speaker == "human" and VIDEO.search(message["value"].strip()):
            raise Missing(f"{where}: <video>: videos are not read, only pictures are; give some of its frames as pictures")
        if speaker == "gpt" and not message["value"].strip():
            raise UserError(f"{where}: the answer is empty; write one or remove the turn")
    if len(messages) % 2:
        raise UserError(f'field "conversations"[{len(messages) - 1}]: the last question has no answer')
    return tuple(Turn(asked["value"].strip(), said["value"].strip(), str(said.get("kind") or ""))
                 for asked, said in zip(messages[::2], messages[1::2]))


def _one_line(text: str) -> str:
    return " ".join(text.split())
