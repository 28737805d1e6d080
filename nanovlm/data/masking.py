"""Masked words: some words of a text are hidden, and what stood there is to be found from all the others.

"BERT: Pre-training of Deep Bidirectional Transformers" (1810.04805) §3.1, Task 1, and App. A.1

    text       <s>  top   left  :     red     square  .     what  colour  is    the   square  ?     red   </s>
    chosen                            ▲                                               ▲             ▲           15 % of the words
    input_ids  <s>  top   left  :     [MASK]  square  .     what  colour  is    the   square  ?     blue  </s>
    labels     −100 −100  −100  −100  red     −100    −100  −100  −100    −100  −100  square  −100  red   −100

Of the chosen words 80 % become [MASK], 10 % another word drawn from all, and 10 % stay as they are: so a model has to
understand each word of its input, as any may be wrong, and what it has learned is of use where no [MASK] stands.

Here a text is what a sample says: a caption, or what is told, with questions and answers behind it. In an exam the last
answer is hidden, all of it and nothing else.

differs: words are chosen anew whenever a text is met (BERT's were hidden beforehand, in ten ways each); as in the first
BERT, a word of several tokens may be hidden in part.
"""

from random import Random

from nanovlm.data.sample import IMAGE, Sample
from nanovlm.lm_loss import IGNORE
from nanovlm.tokenizer import Tokenizer

CHOSEN, MASKED, EXCHANGED = 0.15, 0.8, 0.1  # of all words; of the chosen ones


def written(sample: Sample, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of what a sample says, up to the last answer and of that answer; of a caption alone, nothing and the caption."""
    if not sample.turns:
        return [], tokenizer.encode(sample.caption)
    told, said = iter(sample.told), []
    for turn in sample.turns:
        first, *others = turn.question.split(IMAGE)
        said += [first + "".join(next(told, "") + other for other in others), turn.answer]
    *before, answer = [text.strip() for text in said]
    return tokenizer.encode(" ".join(filter(None, before))), tokenizer.encode(f" {answer}")


def hide(ids: list[int], tokenizer: Tokenizer, rng: Random) -> tuple[list[int], list[int]]:
    """Words as BERT reads them, and what it is to find: the word that stood there, −100 where none was chosen."""
    read, labels = list(ids), [IGNORE] * len(ids)
    for place, word in enumerate(ids):
        if rng.random() < CHOSEN:
            labels[place], fate = word, rng.random()
            if fate < MASKED:
                read[place] = tokenizer.token_id("[MASK]")
            elif fate < MASKED + EXCHANGED:
                read[place] = rng.randrange(len(tokenizer.specials), len(tokenizer))
    return read, labels
