"""Documents in which texts and pictures alternate become pages.

"Flamingo" (2204.14198) §2.4 and App. A.3.1 (M3W), from the two public collections that are like it:

    OBELICS (2306.16527)   {"texts": ["title", null, "text 1"], "images": [null, "a.jpg", null]}       one of the two at each place
    MMC4    (2304.06939)   {"text_list": ["one", "two"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 1}]}
                                                                                       a picture stands before its sentence

    either ─► ["title", Path("a.jpg"), "text 1"] ─► Turn("", "title"), Turn(IMAGE, "text 1")         sample.page_turns

Texts that follow each other are one. As in M3W, pictures with a side of less than 64 pixels or more than three times as wide as
high (or the other way) are taken out of their page, and the page stays. Differs from M3W in: pages without pictures stay too, and
pictures of one colour; neither the language nor the content of a page is filtered.
"""

from collections.abc import Callable

from PIL import Image

from nanovlm.data.sample import Sample, page_turns
from nanovlm.errors import UserError

LEAST_SIDE, MOST_ASPECT = 64, 3
TITLE = 40  # words at most of a page's first line, which stands for the caption of its only picture
Parts = list[tuple[str, str]]  # pairs such as ("text", …) or ("image", name), in reading order


def is_document(row: dict) -> bool:
    return "texts" in row or "text_list" in row


def page(record: str, row: dict, find: Callable[[str], object]) -> tuple[Sample, list[str]]:
    """The page, and what was wrong with the pictures that it does without. find: from a name to a picture."""
    parts, joint = parts_of(row), "\n" if "texts" in row else " "
    if not parts:
        raise UserError("the page is empty: it has neither a text nor a picture; remove it")
    if not any(kind == "text" for kind, _ in parts):
        raise UserError("the page has pictures but no text to learn from; write one or remove the page")
    kept, images, left_out = [], [], []
    for kind, content in parts:
        if kind == "text":
            kept.append(content)
            continue
        picture = find(content)
        if (said := _unfit(picture)) is None:
            kept.append(None)
            images.append(picture)
        else:
            left_out.append(f"{record}: {content} {said}")
    name = row.get("id") or row.get("url")
    title = next(content for kind, content in parts if kind == "text").strip().split("\n")[0]
    return Sample(f"{record} (id {name})" if name else record, tuple(images), " ".join(title.split()[:TITLE]), turns=page_turns(kept, joint),
                  format="pages"), left_out


def parts_of(row: dict) -> Parts:
    return _obelics(row) if "texts" in row else _mmc4(row)


def _obelics(row: dict) -> Parts:
    texts, images = row["texts"], row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise UserError('fields "texts" and "images" must be lists of the same length, with null in one of them at each place')
    parts = []
    for i, (text, image) in enumerate(zip(texts, images)):
        if (text is None) == (image is None):
            both = "null" if text is None else "given"
            raise UserError(f'field "texts"[{i}] and "images"[{i}] are both {both}; at each place write one and null for the other')
        kind, content = ("text", text) if image is None else ("image", image)
        if not isinstance(content, str):
            raise UserError(f'field "{kind}s"[{i}] must be a {"text" if kind == "text" else "path"} or null')
        parts += [(kind, content)] if content.strip() else []
    return parts


def _mmc4(row: dict) -> Parts:
    texts, pictures = row["text_list"], row.get("image_info", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError('field "text_list" must be a list of texts')
    if not isinstance(pictures, list) or not all(isinstance(picture, dict) for picture in pictures):
        raise UserError('field "image_info" must be a list of {"image_name", "matched_text_index"}')
    before: dict[int, list[str]] = {}
    for i, picture in enumerate(pictures):
        name, at = picture.get("image_name"), picture.get("matched_text_index")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f'field "image_info"[{i}]: "image_name" must be the path of one picture')
        if type(at) is not int or not 0 <= at < len(texts):
            raise UserError(f'field "image_info"[{i}]: "matched_text_index" is {at!r}; it must be the number of one of the {len(texts)} texts')
        before.setdefault(at, []).append(name)
    return [part for i, text in enumerate(texts)
            for part in (*(("image", name) for name in before.get(i, ())), *([("text", text)] if text.strip() else ()))]


def _unfit(picture: object) -> str | None:
    """Why M3W has no such picture; None where it may have it, or where it cannot be opened, which is found out later."""
    try:
        with picture.open("rb") as file, Image.open(file) as image:
            short, long = sorted(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if short < LEAST_SIDE:
        return f"is {image.width} × {image.height} pixels, smaller than {LEAST_SIDE}"
    return f"is {image.width} × {image.height} pixels, thinner than 1 to {MOST_ASPECT}" if long > MOST_ASPECT * short else None
