"""Conversations become token ids and labels.

Idea: a format is a table of the texts that stand around questions and answers. Ids and labels are built together, piece
by piece, so no label can slip: each piece of text is encoded once and is either trained whole or not at all.
Paper: Liu et al. 2023, Visual Instruction Tuning (arXiv:2304.08485), Section 4.2: Table 2 (the format v0), Eq. 2 (where
the image stands), Eq. 3 (what carries loss). The later formats are those of the released llava/conversation.py.

    turns       [Turn("<image>\\nwhat colour?", "red"), Turn("sure?", "yes")]
                        │ pieces: template, question, answer, close; neighbours that carry no loss are one text
    v1          <s>  system USER:  <image>  \\nwhat colour? ASSISTANT:  ␣red  </s>  USER: sure? ASSISTANT:  ␣yes  </s>
                        │ encode each piece
    input_ids   1    300 271 288   3        14 290 265 ...          310   2     288 260 ...             322   2
    labels      -100 ...           -100     -100 ...                310   2     -100 ...                322   2

The model puts `image_tokens` embeddings where the one id <image> stands; `max_length` counts them.
What people write is ordinary text: "</s>" in a question or an answer never becomes the stop token.

Differs from the released code in: labels are made with the ids instead of being found again in the encoded text, so no
sample is lost to a mismatch; a "v0" label covers answer and stop only; an empty system prompt leaves no blank behind;
truncation never cuts an image.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat

from nanovlm.data.sample import IMAGE, Turn
from nanovlm.errors import UserError
from nanovlm.lm_loss import IGNORE
from nanovlm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Format:
    """The texts around questions and answers. Only here do "<s>" and "</s>" mean the special tokens.

    begin [around system around] first QUESTION reply lead ANSWER close  later QUESTION reply lead ANSWER close  ...
    """

    begin: str  # opens the conversation
    system: str  # may be empty: then `around` is left out too
    around: tuple[str, str]  # before and after the system text
    first: str  # before the first question
    later: str  # before every other question
    reply: str  # between question and answer
    lead: str  # opens the answer; it belongs to the answer so that " red" is the token it is inside any sentence
    close: str  # ends the answer, and is trained: generation stops here
    forbidden: str = ""  # a text at which generation stops, so no answer may hold it
    marks_only: bool = False  # one turn, of whose question only the "<image>" marks are kept
    image_first: bool = False  # image tokens stand before `begin`, put there by the model
    marks_first: bool = False  # a question's marks stand before `first` or `later`
    unasked: str | None = None  # stands for `first`, question and `reply` where a caption needs no question
    pages: bool = False  # no answers but what stands on a page behind its pictures, which may be nothing
    asked: int = 0  # tokens before the first answer at most; what is longer loses its beginning, where the question does not stand
    bare: bool = False  # candidates are ranked without `close`
    separate: bool = False  # for an encoder-decoder: all but the last answer is read, "</s>" after it, and never learned


# The system sentences are part of the published formats: weights tuned on them expect them to the letter.
_V0 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_V1 = _V0.replace("human", "user")
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
FORMATS = {
    # differs: no "</s>" is ever trained, as published; the line end is what a caption stops at.
    "plain": Format("<s>", "", ("", ""), "", "", "", "", "\n", forbidden="\n", marks_only=True),
    # differs: the released labels of v0 also cover "### Assistant:" and the "##" of the next turn, through counts that
    # drift; here, as the paper intends, answer and stop only. Table 2: STOP is "###", on a line of its own.
    "v0": Format(
        "<s>", _V0, ("", "\n\n"), "### Human: ", " Human: ", "\n### Assistant:", " ", "\n###", forbidden="###"
    ),
    "v1": Format("<s>", _V1, ("", " "), "USER: ", "USER: ", " ASSISTANT:", " ", "</s>"),
    "llama_2": Format(
        "<s>[INST] ", _LLAMA_2, ("<<SYS>>\n", "\n<</SYS>>\n\n"), "", "<s>[INST] ", " [/INST]", " ", " </s>"
    ),
    # BLIP-2 §3.3 and §4.1: [image tokens] <s> caption \n, or [image tokens] <s> Question: ... Answer: ... \n
    "blip2": Format("<s>", "", ("", ""), "Question: ", "Question: ", " Answer:", " ", "\n", forbidden="\n",
                    image_first=True, unasked=""),
    # The same on FlanT5: [image tokens] Question: ... Short answer: </s> is read, ... </s> is written. Its vocabulary has
    # no line end, so earlier turns stand before the question with blanks between them.
    "flan_t5": Format("", "", ("", ""), "Question: ", " Question: ", " Short answer:", " ", "</s>", image_first=True,
                      separate=True, unasked=""),
    # InstructBLIP §2.3 on a decoder: [image tokens] <s> instruction response </s>; the instruction says all that is to be said. It is
    # cut on the left, and candidates are ranked without "</s>", as the released code does both.
    "instructblip": Format("<s>", "", ("", ""), "", "\n", "", " ", "</s>", image_first=True, asked=128, bare=True),
    # The same on FlanT5: [image tokens] instruction </s> is read, response </s> is written, and ranked with its "</s>".
    "instructblip-t5": Format("", "", ("", ""), "", " ", "", " ", "</s>", image_first=True, separate=True, asked=128),
    # Flamingo App. A.2, B.1: <s><image>Question: … Answer: …<EOC><image>Output: …<EOC>, one picture after another.
    "flamingo": Format("<s>", "", ("", ""), "Question: ", "Question: ", " Answer:", " ", "<EOC>", marks_first=True,
                       unasked="Output:"),
    # Flamingo App. A.3.1: <s>title<EOC><image>text<EOC><image>text<EOC>, a page as it is written; all of its texts are learned.
    "pages": Format("<s>", "", ("", ""), "", "", "", "", "<EOC>", pages=True, unasked=""),
    # App. A.3.1: <s><image>caption<EOC></s>, one picture or clip and its text.
    "pair": Format("<s>", "", ("", ""), "", "", "", "", "<EOC></s>", pages=True, unasked=""),
    # §4.2: captions after fine-tuning, [image tokens] <s>a photo of caption \n; only the caption is learned.
    "blip2-caption": Format("<s>a photo of", "", ("", ""), "", "", "", " ", "\n", forbidden="\n", marks_only=True,
                            image_first=True, unasked=""),
    # BLIP §3.2: [CLS] caption [SEP], the decoder having [DEC] for [CLS]; the words are those of the pairs, without a blank before.
    "blip": Format("<s>", "", ("", ""), "", "", "", "", "</s>", marks_only=True, image_first=True, unasked=""),
    # BLIP App. A, captions after fine-tuning: the prompt is given, and only what follows is learned.
    "blip-caption": Format("<s>a picture of", "", ("", ""), "", "", "", " ", "</s>", marks_only=True, image_first=True, unasked=""),
    # BLIP §5.3, questions after fine-tuning: [CLS] question [SEP] is read, the encoder having [ENC] for [CLS], and answer [SEP] written.
    "blip-vqa": Format("<s>", "", ("", ""), "", " ", "", " ", "</s>", image_first=True, separate=True),
    # v1 without its 30 words of system prompt: a tiny model on a CPU has better uses for its context.
    "tiny": Format("<s>", "", ("", " "), "USER: ", "USER: ", " ASSISTANT:", " ", "</s>"),
}


# ---- ids and labels

Piece = tuple[str | int, bool]  # a text, or the id of a special token; is it trained?


def template_texts() -> list[str]:
    """What the formats write around questions and answers: in a tokenizer's corpus it makes role names short.

    Those for an encoder-decoder are left out: all their words but "Short" are there already, and room in a tiny vocabulary is dear.
    """
    return [f"{f.first}{f.reply}{f.lead}{f.close}{f.later}{f.reply}{f.unasked or ''}" for f in FORMATS.values()
            if not f.separate and not f.pages]


def find_format(format: str | Format) -> Format:
    if isinstance(format, Format):
        return format
    if format not in FORMATS:
        raise UserError(f"Unknown conversation format {format!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[format]


def encode(
    turns: Sequence[Turn], tokenizer: Tokenizer, format: str | Format,
    max_length: int | None = None, image_tokens: int | Sequence[int] = 0, name: str = "a conversation",
    told: Sequence[str] = (),
) -> tuple[list[int], list[int]]:
    """Ids and labels of a whole conversation; labels are -100 except on answers and what closes them.

    In a `separate` format only the last answer is learned, and nothing stands behind it: `two_sequences` cuts there.
    image_tokens: embeddings that one <image> becomes, or that each of them does in turn. max_length: counts those too; what is longer loses its end.
    name: what messages call this conversation. told: words in the places of the marks, where there are no pictures. Of a format with `asked` and
    nothing told, what stands before the first answer loses its beginning: see `_last_asked`.
    """
    layout = find_format(format)
    ids, trained = _encode_pieces(_pieces(turns, tokenizer, layout, name, told), tokenizer)
    ids, trained = _last_asked(ids, trained, tokenizer, 0 if told else layout.asked)
    labels = [i if t else IGNORE for i, t in zip(ids, trained)]
    if max_length is not None:
        kept = _fitting(ids, tokenizer.image_id, image_tokens, max_length, name)
        ids, labels = ids[:kept], labels[:kept]
    if all(label == IGNORE for label in labels):
        raise UserError(f"{name}: cut to {max_length} tokens, no answer is left to learn from; "
                        "raise the maximum length or shorten the question.")
    return ids, labels


def prompt(
    turns: Sequence[Turn], tokenizer: Tokenizer, format: str | Format,
    max_length: int | None = None, image_tokens: int | Sequence[int] = 0, name: str = "a conversation",
    told: Sequence[str] = (),
) -> list[int]:
    """The ids up to where the last answer would begin, ready to generate; that turn's own answer is not looked at. They may lose their
    beginning, as in `encode`.
    """
    layout = find_format(format)
    ids, trained = _encode_pieces(_pieces(turns, tokenizer, layout, name, told, open_end=True), tokenizer)
    ids, _ = _last_asked(ids, trained, tokenizer, 0 if told else layout.asked)
    if max_length is not None and sum(places(ids, tokenizer.image_id, image_tokens)) > max_length:
        raise UserError(f"{name}: the question does not fit into {max_length} tokens; shorten it.")
    return ids


def answer_ids(answer: str, tokenizer: Tokenizer, format: str | Format) -> list[int]:
    """An answer exactly as it is trained, with what closes it: what stands after `prompt`."""
    layout = find_format(format)
    return _encode_pieces(_answer_pieces(answer, tokenizer, layout, "the answer"), tokenizer, layout.lead or None)[0]


def candidate_ids(answer: str, tokenizer: Tokenizer, format: str | Format) -> list[int]:
    """The ids to score a candidate by after `prompt`: an answer with what closes it, unless the format ranks without."""
    layout = find_format(format)
    return answer_ids(answer, tokenizer, replace(layout, close="") if layout.bare else layout)


def stop_ids(format: str | Format, tokenizer: Tokenizer) -> list[int]:
    """The ids at which generation stops: "</s>" or "<EOC>" where the format has it, else the whole closing text."""
    pieces = _template(find_format(format).close, tokenizer, trained=True)
    ids, _ = _encode_pieces(pieces, tokenizer, before="an answer")
    return ids if isinstance(pieces[-1][0], str) else ids[-1:]


def two_sequences(ids: Sequence[int], labels: Sequence[int], given: int = 0) -> tuple[list[int], list[int]]:
    """What an encoder reads and what a decoder writes, of a `separate` format's ids and labels.

    given: so many tokens of the answer are read too, before the "</s>", and the answer goes on from there.
    """
    read = [i for i, label in zip(ids, labels) if label == IGNORE]
    written = [label for label in labels if label != IGNORE]
    return [*read[:-1], *written[:given], read[-1]], written[given:]


def places(ids: Sequence[int], image_id: int, image_tokens: int | Sequence[int]) -> list[int]:
    """How many places of the sequence each id takes."""
    each = repeat(image_tokens) if isinstance(image_tokens, int) else iter(image_tokens)
    return [next(each) if i == image_id else 1 for i in ids]


def _pieces(turns: Sequence[Turn], tokenizer: Tokenizer, layout: Format, name: str, told: Sequence[str] = (),
            open_end: bool = False) -> list[Piece]:
    """The conversation in order; with open_end the last answer is left out."""
    if not turns:
        raise UserError(f"{name}: it has no turns; give it at least one question with its answer.")
    if layout.marks_only and len(turns) > 1:
        raise UserError(f"{name}: this format holds one caption, not {len(turns)} turns; use another format.")
    pieces, places = [], iter(told or repeat(tokenizer.image_id))
    if layout.image_first:
        turns = _without_mark(turns, name)
        pieces += [(text, False) for text in told]
    pieces += _template(layout.begin, tokenizer)
    if layout.system:
        pieces += [(layout.around[0], False), (layout.system, False), (layout.around[1], False)]
    for number, turn in enumerate(turns):
        pieces += _asked(turn, layout, layout.first if number == 0 else layout.later, tokenizer, places)
        last = number == len(turns) - 1
        if last and layout.separate:
            pieces.append((tokenizer.eos_id, False))  # T5's tokenizer ends whatever it is given with "</s>"
        if not (open_end and last):
            answer = _answer_pieces(turn.answer, tokenizer, layout, f"{name}: the answer of turn {number + 1}")
            pieces += answer if last or not layout.separate else [(answer[0][0], False)]
    return pieces


def _asked(turn: Turn, layout: Format, before: str, tokenizer: Tokenizer, places: Iterator[str | int]) -> list[Piece]:
    """A question with what stands around it; `places` has what stands where the marks are."""
    if layout.marks_only:
        turn = replace(turn, question=IMAGE * turn.question.count(IMAGE))
    words = turn.question.replace(IMAGE, "").strip()
    if layout.unasked is not None and (not words or turn.kind == "caption" and layout.image_first):
        marks, words, before, reply = turn.question, "", layout.unasked, ""
    elif layout.marks_first:
        marks, reply = turn.question, layout.reply
    else:
        marks, words, reply = "", turn.question, layout.reply
    pieces = [(next(places), False) for _ in range(marks.count(IMAGE))] + _template(before, tokenizer)
    for number, text in enumerate(words.split(IMAGE)):
        pieces += [(next(places), False)] if number else []
        pieces += [(text, False)] if text else []
    return pieces + _template(reply, tokenizer)


def _without_mark(turns: Sequence[Turn], name: str) -> Sequence[Turn]:
    """The turns where the image stands before everything: no mark is left."""
    first = turns[0]
    if sum(turn.question.count(IMAGE) for turn in turns) > min(1, first.question.count(IMAGE)):
        raise UserError(f'{name}: in this format one image stands before everything; "{IMAGE}" may stand once, in '
                        "the first question.")
    return [replace(first, question=first.question.replace(f"{IMAGE}\n", "").replace(IMAGE, "")), *turns[1:]]


def _answer_pieces(answer: str, tokenizer: Tokenizer, layout: Format, where: str) -> list[Piece]:
    if not answer.strip() and not layout.pages:
        raise UserError(f"{where} is empty; give it a text or remove the turn.")
    if layout.forbidden and layout.forbidden in answer:
        raise UserError(f"{where} holds {layout.forbidden!r}, at which generation stops in this format; "
                        "remove it from the answer or choose another format.")
    # Two pieces, never merged: the stop ids are the same whatever the answer ends with.
    return [*[(text, True) for text in (layout.lead + answer,) if text], *_template(layout.close, tokenizer, trained=True)]


def _template(text: str, tokenizer: Tokenizer, trained: bool = False) -> list[Piece]:
    marks = {name: tokenizer.token_id(name) for name in ("<s>", "</s>", "<EOC>") if name in text}
    return _split(text, marks, trained)


def _split(text: str, marks: dict[str, int], trained: bool = False) -> list[Piece]:
    """Cut `text` at the marks: "<image>\\nwhat" → [(image_id, False), ("\\nwhat", False)]."""
    parts = re.split(f"({'|'.join(marks)})", text) if marks else [text]  # the group keeps the marks in the list
    return [(marks.get(part, part), trained) for part in parts if part]


def _encode_pieces(pieces: list[Piece], tokenizer: Tokenizer, before: str | int | None = None) -> tuple[list[int], list[bool]]:
    """Ids, and whether each is trained. before: what stands before the first piece, a text or a mark.

    Neighbouring texts without loss are encoded as one: the blank that ends a template joins the word that follows it.
    """
    joined: list[Piece] = []
    for piece, trained in pieces:
        untrained_text = isinstance(piece, str) and not trained
        if untrained_text and joined and isinstance(joined[-1][0], str) and not joined[-1][1]:
            joined[-1] = (joined[-1][0] + piece, False)
        else:
            joined.append((piece, trained))
    ids, mask = [], []
    for piece, trained in joined:
        new = tokenizer.encode(piece, specials=False, before=before) if isinstance(piece, str) else [piece]
        ids += new
        mask += [trained] * len(new)
        before = piece
    return ids, mask


def _last_asked(ids: list[int], trained: list[bool], tokenizer: Tokenizer, most: int) -> tuple[list[int], list[bool]]:
    """What stands before the first answer loses its beginning, but for "<s>", until it has `most` tokens (0: any number): context and
    read words come first, and what is asked last.
    """
    asked = trained.index(True) if True in trained else len(ids)
    if not most or asked <= most:
        return ids, trained
    kept = int(ids[0] == tokenizer.bos_id)
    start = asked - most + kept
    return ids[:kept] + ids[start:], trained[:kept] + trained[start:]


def _fitting(ids: list[int], image_id: int, image_tokens: int | Sequence[int], max_length: int, name: str) -> int:
    """How many ids fit into max_length. differs: the released code may cut an image in two; here that is an error."""
    ends = list(accumulate(places(ids, image_id, image_tokens)))  # where each id ends
    kept = sum(end <= max_length for end in ends)
    if image_id in ids[kept:]:
        needed = max(end for end, i in zip(ends, ids) if i == image_id)
        raise UserError(f"{name}: cutting it to {max_length} tokens would cut image tokens (its last image ends at "
                        f"token {needed}); raise the maximum length or shorten what stands before the image.")
    return kept
