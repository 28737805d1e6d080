"""InstructBLIP's 26 data sets: of which group of tasks each is, whether it is learned from, how it is answered, how its file is read.

"InstructBLIP" (2305.06500) §2.2, Fig. 2, App. B, Table 4. Four of the eleven groups are held out as a whole, of three others single sets.

    published file ─► raw records (raw_rows) ─► read(raw) ─► rows as rows.py knows them

    A-OKVQA         [{"image_id": 7, "question": …, "choices": […], "correct_choice_idx": 3}]             train2017/000000000007.jpg
    OCR-VQA         {"1": {"imageURL": "….jpg", "questions": […], "answers": […], "split": 1}}            1.jpg
    TextVQA         {"data": [{"image_id": "0a", "question": …, "answers": [ten]}]}                       0a.jpg
    TextCaps        {"data": [{"image_id": "0a", "reference_strs": [five]}]}                              0a.jpg
    GQA             {"1": {"imageId": "2", "question": …, "answer": …}}                                   2.jpg
    VSR             {"image": "7.jpg", "caption": "The cat is on the mat.", "label": 1}, one a line       7.jpg
    IconQA          {"1": {"question": …, "choices": […], "answer": 0, "ques_type": "choose_txt"}}        test/choose_txt/1/image.png
    VizWiz          [{"image": "a.jpg", "question": …, "answers": [{"answer": …}, ten]}]                  a.jpg
    HatefulMemes    {"img": "img/1.png", "text": …, "label": 0}, one a line                               img/1.png
    Visual Dialog   {"data": {"dialogs": […], "questions": […], "answers": […]}}                          VisualDialog_val2018_….jpg
    MSVD-, MSRVTT-QA  [{"video_id": 7, "question": …, "answer": …}]                                       frames in vid7/, video7/

OKVQA has VQAv2's layout, NoCaps and Flickr30K are read as COCO captions where they are in that form (benchmarks.py), LLaVA's files as
conversations. Words that a machine has read come from a table of their own, "ocr" in the mixture (mixture.py). Of ten people's answers
the most frequent one is the truth, as for VQAv2. iVQA is published as CSV, which is not read: give its rows in the form of rows.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from nanovlm.data.benchmarks import Row
from nanovlm.data.templates import ASKING, LLAVA
from nanovlm.errors import UserError


def aokvqa(raw: dict) -> list[dict]:
    return [_picture(f"{raw['image_id']:012}.jpg", raw) | _chosen(raw, raw["correct_choice_idx"])]


def ocr_vqa(raw: dict) -> list[dict]:
    """A row for each question; the answers to some are empty."""
    picture = _picture(f"{raw['key']}{PurePosixPath(raw['imageURL']).suffix or '.jpg'}", raw) | {"split": "train" if raw["split"] == 1 else "val"}
    return [picture | {"question": question, "answer": answer} for question, answer in zip(raw["questions"], raw["answers"], strict=True) if answer]


def textvqa(raw: dict) -> list[dict]:
    return [_picture(f"{raw['image_id']}.jpg", raw) | {"question": raw["question"], "answer": _often(raw["answers"])}]


def textcaps(raw: dict) -> list[dict]:
    return [_picture(f"{raw['image_id']}.jpg", raw) | {"caption": raw["reference_strs"]}]


def gqa(raw: dict) -> list[dict]:
    return [{"image": f"{raw['imageId']}.jpg", "question": raw["question"], "answer": raw["answer"]}]


def vsr(raw: dict) -> list[dict]:
    return [{"image": raw["image"], "question": f"{raw['caption']} Is that true?", "answer": ("no", "yes")[int(raw["label"])]}]


def iconqa(raw: dict) -> list[dict]:
    """Its multiple choice among texts (§2.2); choices that are pictures, and blanks to be filled in, are other tasks."""
    if raw["ques_type"] != "choose_txt":
        return []
    return [{"image": f"{raw.get('split', 'test')}/choose_txt/{raw['key']}/image.png"} | _chosen(raw, raw["answer"])]


def science_qa(raw: dict) -> list[dict]:
    """Its part with pictures (§2.2)."""
    if not raw.get("image"):
        return []
    return [{"image": f"{raw['split']}/{raw['key']}/{raw['image']}", "context": raw.get("hint")} | _chosen(raw, raw["answer"])]


def vizwiz(raw: dict) -> list[dict]:
    return [{"image": raw["image"], "question": raw["question"], "answer": _often([one["answer"] for one in raw["answers"]])}]


def hateful_memes(raw: dict) -> list[dict]:
    return [{"image": raw["img"], "context": f"The picture bears the text: {raw['text']}", "question": "Is it hateful?",
             "answer": ("no", "yes")[int(raw["label"])], "candidates": ["no", "yes"]}]


def visdial(raw: dict) -> list[dict]:
    """A row for each question, with all that was said before; the released files leave question marks out."""
    rows, history = [], []
    for turn in raw["dialog"]:
        question, answer = f"{raw['questions'][turn['question']]}?", raw["answers"][turn["answer"]]
        options = [raw["answers"][i] for i in turn.get("answer_options", ())]
        rows.append({"image": f"VisualDialog_val2018_{raw['image_id']:012}.jpg", "context": raw["caption"], "history": " ".join(history),
                     "question": question, "answer": answer, "candidates": options})
        history.append(f"{question} {answer}.")
    return rows


def msvd_qa(raw: dict) -> list[dict]:
    return [{"clip": f"vid{raw['video_id']}", "question": f"{raw['question'].removesuffix('?')}?", "answer": raw["answer"]}]


def msrvtt_qa(raw: dict) -> list[dict]:
    return [{"clip": f"video{raw['video_id']}", "question": f"{raw['question'].removesuffix('?')}?", "answer": raw["answer"]}]


def _picture(name: str, raw: dict) -> dict:
    return {"image": name, "ocr": raw.get("ocr")}


def _chosen(raw: dict, number: int) -> dict:
    return {"question": raw["question"], "options": raw["choices"], "answer": raw["choices"][number]}


def _often(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]


@dataclass(frozen=True)
class DataSet:
    group: str
    thousands: int = 0  # samples to train on, in thousands (Table 4); of sets that are not learned from none
    read: Callable[[dict], list[dict]] | None = None  # None: formats.py reads the file by itself
    ranked: bool = False  # the likeliest of the answers to choose from is taken (§2.5), not whatever is said

    @property
    def held_out(self) -> bool:
        return not self.thousands


SETS = {
    "COCO Caption": DataSet("captioning", 82), "Web CapFilt": DataSet("captioning", 14_000),
    "NoCaps": DataSet("captioning"), "Flickr30K": DataSet("captioning"),
    "TextCaps": DataSet("captioning with reading", 21, textcaps),
    "GQA": DataSet("visual reasoning", read=gqa), "VSR": DataSet("visual reasoning", read=vsr),
    "IconQA": DataSet("visual reasoning", read=iconqa, ranked=True),
    "VQAv2": DataSet("image QA", 82), "VizWiz": DataSet("image QA", read=vizwiz),
    "OKVQA": DataSet("knowledge QA", 9), "A-OKVQA": DataSet("knowledge QA", 17, aokvqa, ranked=True),
    "ScienceQA": DataSet("knowledge QA", read=science_qa, ranked=True),
    "OCR-VQA": DataSet("QA with reading", 800, ocr_vqa), "TextVQA": DataSet("QA with reading", read=textvqa),
    # the same questions the other way round; which three sets the paper takes, it does not say
    "VQAv2 questions": DataSet(ASKING, 82), "OKVQA questions": DataSet(ASKING, 9), "A-OKVQA questions": DataSet(ASKING, 17, aokvqa),
    "MSVD-QA": DataSet("video QA", read=msvd_qa, ranked=True), "MSRVTT-QA": DataSet("video QA", read=msrvtt_qa, ranked=True),
    "iVQA": DataSet("video QA"),
    "Visual Dialog": DataSet("dialogue", read=visdial, ranked=True),
    "HatefulMemes": DataSet("classification", read=hateful_memes, ranked=True),
    "LLaVA conversation": DataSet(LLAVA, 58), "LLaVA detail": DataSet(LLAVA, 23), "LLaVA reasoning": DataSet(LLAVA, 77)}


def raw_rows(table: list | dict) -> Iterator[Row]:
    """The raw records of a published table, with what messages call each."""
    inside = table.get("data", table) if isinstance(table, dict) else table
    if isinstance(inside, dict) and "dialogs" in inside:
        texts = {name: inside.get(name) for name in ("questions", "answers")}
        inside = [one | texts if isinstance(one, dict) else one for one in inside["dialogs"]]
    if isinstance(inside, dict):
        yield from ((f"record {key}", one | {"key": key} if isinstance(one, dict) else one) for key, one in inside.items())
    else:
        yield from ((f"record {i}", one) for i, one in enumerate(inside))


def rows_of(read: Callable[[dict], list[dict]], raw: object) -> list[dict]:
    """What the set's reader makes of a raw record."""
    try:
        return read(raw)
    except KeyError as error:
        raise UserError(f"field {error} is missing".replace("'", '"')) from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"it is not as this data set is published ({error})") from error
