"""How LLaVA-1.5 is told what form an answer should have, and the sets that its mixture is made of.

"Improved Baselines with Visual Instruction Tuning" (2310.03744) §3.2, Table 7; `llava_v1_5_mix665k.json`, which holds all of
it, sentences included, and is read as any conversations are.

    what colour is the square?                                      red?  It is red.?  B?
    what colour is the square? ⏎ Answer the question using …        red

The sentence stands on a line of its own behind the first question of a conversation. Sets that are read here without theirs
(VQAv2, plain captions) get it where a stage reads "prompted" ones, see records.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanovlm.data.sample import Turn

# As published, to the letter: weights tuned on them expect them.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
REGION = "Provide a short description for this region."
GROUNDING = "Provide the bounding box coordinate of the region this sentence describes."
PROMPTS = (SHORT, LETTER, CAPTION, REGION, GROUNDING)


@dataclass(frozen=True)
class Part:
    name: str
    thousands: int  # conversations, in thousands, as Table 7 has them
    prompts: tuple[str, ...] = ()
    pictures: bool = True


SETS = (
    Part("LLaVA-Instruct", 158), Part("ShareGPT", 40, pictures=False),
    Part("VQAv2", 83, (SHORT,)), Part("GQA", 72, (SHORT,)), Part("OKVQA", 9, (SHORT,)), Part("OCR-VQA", 80, (SHORT,)),
    Part("A-OKVQA", 66, (LETTER,)), Part("TextCaps", 22, (CAPTION,)),
    Part("RefCOCO", 48, (REGION, GROUNDING)), Part("Visual Genome", 86, (REGION, GROUNDING)))


def prompted(turns: Sequence[Turn], prompt: str) -> tuple[Turn, ...]:
    """The conversation with the sentence behind its first question, on a line of its own, unless one of PROMPTS stands there already.

    Without a sentence ("") it stays as it is.
    """
    first, *others = turns
    if not prompt or any(known in first.question for known in PROMPTS):
        return tuple(turns)
    return (replace(first, question=f"{first.question}\n{prompt}"), *others)
