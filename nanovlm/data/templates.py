"""A record becomes an instruction: one of ten to fifteen wordings of its group of tasks, drawn anew each time, with the record's words in it.

"InstructBLIP" (2305.06500) §2.1, App. C and D. The wordings are our own. What they take over from the paper is its forms, and two rules:
some templates of a set with short answers say so ("short", "briefly"), so that nobody learns to be short always; and what else is known
of the picture (read words, context, what was said before) stands before the question.

    record     question "What says the sign?"   answer "stop"   ocr stop, 4th
                  │  template of group "QA with reading", by chance:  "Question: {question} Short answer:"
    turn       "<image>\nOCR tokens: stop, 4th. Question: What says the sign? Short answer:"  →  "stop"

    group                  what is asked          and answered
    captioning …           –                      a caption
    question generation    the answer             the question
    LLaVA                  as it is written, without a template
    all others             the question           the answer

A record whose group nobody has said: a captioned picture is asked for its caption, a question with a short answer is of "image QA", and
any other conversation stays as it is.
"""

import re
from collections.abc import Iterable
from random import Random
from string import Formatter

from nanovlm.data.sample import IMAGE, Sample, Turn
from nanovlm.errors import UserError

FIELDS = ("question", "answer", "options", "ocr", "context", "history")
BEFORE = {"context": "Context: {} ", "history": "Dialogue so far: {} ", "ocr": "OCR tokens: {}. "}  # where a template leaves a field out
OCR_TOKENS = 30  # as the released code has it
BRIEF = re.compile(r"short|brief|few words|one word|a word or two", re.IGNORECASE)
ASKING, LLAVA = "question generation", "LLaVA"

TEMPLATES = {
    "captioning": (
        "A short description:", "Caption of the picture:", "The picture shows", "This is a picture of", "Describe what you see.",
        "Say in one sentence what is shown here.", "Could you tell me briefly what this is?", "Write a short caption for this picture.",
        "What would you write under this picture?", "In few words, what is there to see?", "Give a brief account of the image.",
        "Put the content of this image into a sentence.", "For somebody who cannot see it, the picture is of"),
    "captioning with reading": (
        "A short description that uses the text in the picture:", "Caption, with what is written:", "Together with its text, the picture shows",
        "Describe the picture and what can be read in it.", "Say in one sentence what is shown and what is written there.",
        "Could you describe this briefly, its words included?", "Write a short caption that mentions the writing.",
        "Read the text in the image and describe the image with it.", "What is this, and what does it say?",
        "Give a brief account of the image and of its words."),
    "visual reasoning": (
        "{question}", "Question: {question} Answer:", "Look at where things are. {question}", "{question} Short answer:",
        "Think about the picture before you answer: {question}", "{question} Answer in a word or two.", "From what is shown, {question}",
        'Somebody asks "{question}" The right answer is', "Judge by the picture alone. {question} Be brief.", "Reason about the image. Question: {question}"),
    "image QA": (
        "{question}", "Question: {question}", "Question: {question} Answer:", "Question: {question} Short answer:", "{question} A short answer is",
        "Look at the picture and answer: {question}", "Use the image to answer in few words: {question}", "{question} Please be brief.",
        'What would you reply to "{question}"?', 'The question is "{question}" The answer, in short:'),
    "knowledge QA": (
        "{question}", "Question: {question} Answer:", "Question: {question} Short answer:", "{question} Use what you know.",
        "The picture alone does not tell. {question}", "With the picture and what is commonly known, answer: {question}",
        "{question} Answer briefly.", 'Asked "{question}", somebody who knows would say', "What do you know about this? {question}",
        "Answer from the image and from knowledge of the world, in few words: {question}"),
    "QA with reading": (
        "{question}", "Question: {question} Answer:", "Question: {question} Short answer:", "Read the text in the picture. {question}",
        "The answer is written in the image: {question}", "{question} Give a short answer from what is written.",
        "What is to be read there answers this: {question}", 'Asked "{question}", one reads off the picture:',
        "Look at the words and answer briefly: {question}", "By the writing in the image, {question}"),
    ASKING: (
        "Answer: {answer}. Question:", "Ask something about the picture to which the answer is: {answer}", "Which question does {answer} answer?",
        'Somebody has answered "{answer}". What was the question?', "Make up a question for this image. Its answer: {answer}",
        "Given the picture and the answer {answer}, write the question.", "The answer is {answer}. What could have been asked?",
        "Turn this answer into a question about the image: {answer}", "Question with the answer {answer}:",
        'What has to be asked so that "{answer}" is right?'),
    "video QA": (
        "{question}", "Question: {question} Answer:", "Question: {question} Short answer:", "Watch the frames. {question}",
        "From what happens in the video, {question}", "{question} Answer in a word or two.", 'About this clip somebody asks "{question}" The answer:',
        "After these pictures in a row, answer briefly: {question}", "The video tells. {question}", "See what happens and say: {question}"),
    "dialogue": (
        "{question}", "Question: {question} Answer:", "Question: {question} Short answer:", "Go on with the talk about the picture. {question}",
        "The next question is: {question}", "{question} Reply briefly.", 'Then somebody asks "{question}" The reply:',
        "Knowing what was said, answer: {question}", "Keep to the picture and the talk. {question}", "Now it is asked: {question} Say it in few words."),
    "classification": (
        "{question}", "Question: {question} Answer:", "Question: {question} Short answer:", "Sort this picture. {question}",
        "Choose the right class. {question}", "{question} Name the class only.", 'The answer to "{question}" is the class',
        "Decide by the picture: {question}", "{question} One word or name will do.", "Put the image where it belongs. {question}")}
CAPTIONING = ("captioning", "captioning with reading")
GROUPS = (*TEMPLATES, LLAVA)


def instruction(record: Sample, rng: Random) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The conversation, and all answers to its last question that are right; () where only the one it has is."""
    group = record.task.group or ("captioning" if not record.turns else "image QA" if record.form == "short" else LLAVA)
    fields, right, kind, options = dict(record.task.fields), record.captions, "caption", ()
    if group == LLAVA and record.turns:
        return record.turns, ()
    templates = record.task.templates or TEMPLATES.get(group, TEMPLATES["captioning"])
    if group not in CAPTIONING and record.turns:
        turn = rng.choice(record.turns)
        right, kind, options = record.task.answers or (turn.answer,), turn.kind, turn.options
        fields |= {"question": turn.question.replace(IMAGE, "").strip(), "answer": rng.choice(right)}
        if record.form != "short":
            templates = [one for one in templates if not BRIEF.search(one)] or templates  # a person's may all be brief
    if group == ASKING:
        right, options = (fields["question"],), ()
    answer = fields["answer"] if "answer" in fields and group != ASKING else rng.choice(right)
    asked = filled(rng.choice(templates), fields)
    shown = IMAGE * sum(turn.question.count(IMAGE) for turn in record.turns) if record.turns else IMAGE
    return (Turn(f"{shown}\n{asked}".lstrip(), answer, kind, options),), right


def filled(template: str, fields: dict[str, str]) -> str:
    """The template with the fields that it names in their places, and what it does not name and is known before it, or the options behind
    the question.

    context, history and ocr stand before it in this order, as BEFORE has them; options behind the question as " Options: a, b.". A field
    that the template names and the record lacks is a UserError. Braces in a field's own text are only text.
    """
    named = names(template)
    if lacking := [name for name in named if not fields.get(name)]:
        raise UserError(f'the template "{template}" asks for {{{lacking[0]}}}, which the record does not have')
    if "options" in fields and "options" not in named and "question" in fields:
        fields = fields | {"question": f"{fields['question']} Options: {fields['options']}."}
    before = "".join(cue.format(fields[name]) for name, cue in BEFORE.items() if name in fields and name not in named)
    return before + template.format_map(fields)


def check_template(template: str, group: str) -> None:
    """A template holds what its group asks, and not what would give the answer away."""
    asked = set() if group in CAPTIONING else {"answer"} if group == ASKING else {"question"}
    if {"question", "answer"} & set(names(template)) != asked:
        wanted = "".join(f"{{{name}}}" for name in asked) or "neither"
        raise UserError(f'the template "{template}" must hold, of {{question}} and {{answer}}, {wanted}, as its group is {group}')
    if IMAGE in template:
        raise UserError(f'the template "{template}" must not hold "{IMAGE}": the picture stands before it in any case')


def names(template: str) -> list[str]:
    """The fields that a template names."""
    try:
        parts = [(name, form, how) for _, name, form, how in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f'the template "{template}" cannot be read ({error}); a brace that is meant is written twice') from error
    for name, form, how in parts:
        if name not in FIELDS or form or how:
            raise UserError(f'the template "{template}" has the field {{{name}}}, but there are only {", ".join(FIELDS)}')
    return [name for name, _, _ in parts]


def lettered(options: Iterable[str]) -> str:
    """(a) red (b) blue"""
    return " ".join(f"({chr(ord('a') + i)}) {option}" for i, option in enumerate(options))


def listed(words: Iterable[str] | str) -> str:
    """The first OCR_TOKENS of the words that were read in a picture, with commas between them; a text stays as it is."""
    return words if isinstance(words, str) else ", ".join(map(str, list(words)[:OCR_TOKENS]))
