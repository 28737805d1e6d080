"""The tokenizers of published language models, with the interface of our own (tokenizer.py): LLaMA and Vicuna, OPT, BERT, T5.

Idea: published weights know the words of one file, tokenizer.json, so their texts must be cut by that file. The optional package
`tokenizers` reads it. This module says what our formats call the file's marks, and encodes a text as it stands where it stands.
Papers: Kudo and Richardson 2018, SentencePiece (arXiv:1808.06226), Section 3.2: a blank is a letter, "▁" (LLaMA, T5); the bytes of
GPT-2 (OPT); WordPiece (BERT).

    kind      words                    "<s>"        "</s>"       "<pad>"      of which paper
    llama     SentencePiece BPE        <s>    1     </s>   2     <unk>  0     LLaVA, LLaVA-1.5: Vicuna
    vicuna    the same file            </s>   2     </s>   2     [PAD]  new   InstructBLIP, whose code gives Vicuna these marks
    opt       BPE of bytes             </s>   2     </s>   2     <pad>  1     BLIP-2
    bert      WordPiece, lower case    [CLS]  101   [SEP]  102   [PAD]  0     BLIP; the Q-Formers of BLIP-2 and InstructBLIP
    t5        SentencePiece unigrams   none         </s>   1     <pad>  0     BLIP-2, InstructBLIP: FlanT5; no line end

"<image>" is no word of these files. It gets the first id behind the model's vocabulary, as the LLaVA recipes have it (the original
code: −200). `bridge` is the tokenizer of a Q-Former that reads: BERT's, while the language model reads its own words.

**The blank before a text.** Files of SentencePiece put "▁" before each text that they are given. Conversations are encoded in pieces,
so that no label can slip; a piece within a text must not get a blank of its own. So `encode` is told what stands before:

    before                       text
    "what? ASSISTANT:"  a text   " red"    ▁red             never a further blank
    <s>                 opens    "USER:"   ▁US ER :         a blank at the text's beginning is left out: OPT's captions begin with "a", not " a"
    <image>             a mark   "\\nwhat"  ▁ <0x0A> what    as LLaVA's code, which encodes the texts between images one by one
    </s> between turns  a mark   "USER:"   ▁US ER : or US ER :    as the file says: prepend_scheme "always" or "first"

The ids are those that the published codes get for the whole text, but for an answer that ends in white space: there the whole text may
have one token for that and the line end or blank that closes the answer ("blip2", "llama_2"). Ours are two, so that generation stops at
the same ids whatever the answer is. Differs in "llama_2" too: later turns begin with "▁[INST]" even where the file's scheme is "first".
"</s>" that people type is ordinary text: as the file stands it would be the stop token, for T5 even where the package is told not to
look for marks, since they are pieces of its model.
"""

import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from nanovlm.errors import UserError
from nanovlm.tokenizer import Tokenizer, utf8

FILE = "tokenizer.json"
ROUNDED = 64  # a published table of words is at most so much longer than its file: OPT's 7, T5's 28


class Marks(NamedTuple):
    """What the file calls "<s>", "</s>" and "<pad>" of our formats; "" where it has none."""

    bos: str
    eos: str
    pad: str


KINDS = {
    "llama": Marks("<s>", "</s>", "<unk>"),
    "vicuna": Marks("</s>", "</s>", "[PAD]"),
    "opt": Marks("</s>", "</s>", "<pad>"),
    "bert": Marks("[CLS]", "[SEP]", "[PAD]"),
    "t5": Marks("", "</s>", "<pad>"),
}


class PublishedTokenizer:
    def __init__(self, file: str, kind: str, image_id: int, bridge: "PublishedTokenizer | None" = None, name: str = FILE):
        """file: the text of a tokenizer.json. kind: one of KINDS. bridge: the Q-Former's, where it reads other words. name: for messages."""
        self.file, self.kind, self.image_id, self.bridge = file, kind, image_id, bridge or self
        try:
            parts = {"model": {}, "added_tokens": [], "normalizer": None, "pre_tokenizer": None, **json.loads(file)}
        except (ValueError, TypeError) as error:
            raise UserError(f"{name} is no JSON object ({error}): download it again.") from error
        self._file = _backend(parts, name)  # to decode, and for what is in it
        texts = without_marks(parts)
        self._whole = _backend(texts, name)
        self._inside = _backend({**texts, **{part: without_blank(texts[part]) for part in ("normalizer", "pre_tokenizer")}}, name)
        self._only_first = '"first"' in json.dumps(parts["pre_tokenizer"])
        marks = KINDS[kind]
        for mark in marks[:2] if kind == "vicuna" else marks:  # whose <pad> is a word that InstructBLIP adds
            if mark and self._file.token_to_id(mark) is None:
                raise UserError(f"{name} has no token {mark!r}, which {kind} needs: is it the tokenizer of another model?")
        self.bos_id, self.eos_id = (self._file.token_to_id(mark) if mark else None for mark in marks[:2])
        pad = self._file.token_to_id(marks.pad)
        self.pad_id = len(self) if pad is None else pad
        known = {token.content: i for i, token in self._file.get_added_tokens_decoder().items() if token.special}
        ours = {"<s>": self.bos_id, "</s>": self.eos_id, "<pad>": self.pad_id, "<image>": image_id}
        self._ids = known | {mark: i for mark, i in ours.items() if i is not None}
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) + ")")

    # ---- text to ids and back

    def encode(self, text: str, specials: bool = False, before: str | int | None = None) -> list[int]:
        """The ids of `text`. Only with specials=True does "</s>" in it mean the mark. before: the text or the mark that it stands behind."""
        ids = []
        for part in self._split.split(text) if specials else [text]:
            if specials and part in self._ids:
                ids.append(self._ids[part])
                before = ids[-1]
            elif part:
                ids += self._encode_text(part, before)
                before = part
        return ids

    def _encode_text(self, text: str, before: str | int | None) -> list[int]:
        utf8(text)  # the package's own message for half a character names no text
        words = self._whole
        if isinstance(before, str):
            words = self._inside
        elif before == self.bos_id or self.bos_id is None:  # behind T5's "</s>" the decoder's text begins
            text = text if before is None else text.removeprefix(" ")
        elif self._only_first and before not in (None, self.image_id):
            words = self._inside
        return words.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """The text of `ids`; marks are dropped unless specials=True. The blank that the file puts before a text is taken off again."""
        added, said = {self.image_id: "<image>", **({self.pad_id: "[PAD]"} if self.pad_id >= len(self) else {})}, ""
        for in_file, run in groupby(ids, key=lambda i: 0 <= i < len(self)):
            run = list(run)
            if not in_file and (strange := [i for i in run if i not in added]):
                raise UserError(f"Token id {int(strange[0])} is outside the vocabulary 0..{len(self) - 1}; "
                                "drop ignored labels (-100) before decoding.")
            if in_file:
                said += self._file.decode(run, skip_special_tokens=not specials)
            elif specials:
                said += "".join(added[i] for i in run)
        return said

    # ---- ids with a meaning

    def __len__(self) -> int:
        """Words in the file, its marks among them."""
        return self._file.get_vocab_size()

    @property
    def specials(self) -> tuple[str, ...]:
        return tuple(self._ids)

    def token_id(self, special: str) -> int:
        if special not in self._ids:
            raise UserError(f"The tokenizer of {self.kind} has no mark {special!r}; it has {', '.join(list(self._ids)[:12])}.")
        return self._ids[special]

    # ---- to plain values, as checkpoints hold them

    def to_dict(self) -> dict:
        bridge = None if self.bridge is self else self.bridge.to_dict()
        return {"file": self.file, "kind": self.kind, "image_id": self.image_id, "bridge": bridge}


def restored(d: dict) -> Tokenizer | PublishedTokenizer:
    """The inverse of both to_dict."""
    if "file" not in d:
        return Tokenizer.from_dict(d)
    return PublishedTokenizer(**{**d, "bridge": d["bridge"] and restored(d["bridge"])})


def find(folder: Path) -> Path:
    """tokenizer.json of a published checkpoint's folder, or a UserError."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no {FILE}: download it; where only tokenizer.model or vocab.json is published, let transformers write it: "
                        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder).")
    return folder / FILE


def read(folder: Path, kind: str, vocab: int, bridge: PublishedTokenizer | None = None) -> PublishedTokenizer:
    """The folder's tokenizer, for a model of so many words."""
    file = find(folder)
    found = PublishedTokenizer(file.read_text(encoding="utf-8"), kind, vocab, bridge, str(file))
    if not vocab - ROUNDED <= len(found) <= vocab:
        raise UserError(f"{file} has {len(found):,} words, but the model has a table of {vocab:,}: it is the tokenizer of another model.")
    return found


def without_marks(parts: dict) -> dict:
    """What encodes texts, in which nothing is a mark; and without what the file puts around a text, or cuts from it."""
    marks = {token["content"] for token in parts["added_tokens"] if token["special"]}
    model = parts["model"]
    if model.get("type") == "Unigram":  # its pieces have no blanks, so that nothing is ever cut into these
        model = {**model, "vocab": [[f" {piece}" if piece in marks else piece, score] for piece, score in model["vocab"]]}
    rest = [token for token in parts["added_tokens"] if not token["special"]]
    return {**parts, "model": model, "added_tokens": rest, "post_processor": None, "truncation": None, "padding": None}


def without_blank(part: object) -> object:
    """A normalizer or pre-tokenizer of tokenizer.json, but for the blank that it puts before a text.

    One that cuts at white space before (T5) stays as it is: there each word has its blank from this part.
    """
    if isinstance(part, list):
        return [without_blank(each) for each in part]
    if not isinstance(part, dict) or any(each.get("type") == "WhitespaceSplit" for each in part.get("pretokenizers", ())):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if kind == "Metaspace":  # add_prefix_space: how older files say it
        return {**{key: value for key, value in part.items() if key != "add_prefix_space"}, "prepend_scheme": "never"}
    return {key: without_blank(value) for key, value in part.items()} | ({"add_prefix_space": False} if kind == "ByteLevel" else {})


def _backend(parts: dict, name: str):
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise UserError("Published tokenizers are read with the package tokenizers: pip install tokenizers") from error
    try:
        return Backend.from_str(json.dumps(parts))
    except Exception as error:  # the package has no exception of its own
        raise UserError(f"{name} is no tokenizer that the package tokenizers can read ({error}): download it again.") from error
