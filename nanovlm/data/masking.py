"""Masked words: some words of a text are hidden, and what stood there is to be found from all the others.

"BERT: Pre-training of Deep Bidirectional Transformers" (1810.04805) §3.1, Task 1, and App. A.1

    text       <s>  top   left  :     red     square  .     what  colour  is    the   square  ?     red     </s>
    hidden                            ▲                                         ▲                   ▲
    input_ids  <s>  top   left  :     [MASK]  square  .     what  colour  is    seven square  ?     [MASK]  </s>
    labels     −100 −100  −100  −100  red     −100    −100  −100  −100    −100  the   −100    −100  red     −100

Of a caption 15 % of the words are chosen. Of these 80 % become [MASK], 10 % another word drawn from all, and 10 % stay as they
are: so a model has to understand each word of its input, as any may be wrong, and what it has learned is of use where no [MASK] stands.

Where questions stand behind what is told, 5 % of what is told and asked are chosen like this, and of each answer a share that is
drawn anew, all of it in one case of three; these all become [MASK]. In an exam the last answer is hidden, all of it and nothing else.

differs: the answers' share. The words of a scene are drawn at random, so that most cannot be found from the others; what can be
looked up are the answers, and at 15 % everywhere they were a small part of what was learned. Shares from none to all are what
`generate` meets, which fills an answer word by word.
differs: words are chosen anew whenever a text is met (BERT's were hidden beforehand, in ten ways each); as in the first
BERT, a word of several tokens may be hidden in part.
"""

from random import Random

from nanovlm.data.sample import IMAGE, Sample
from nanovlm.lm_loss import IGNORE
from nanovlm.tokenizer import Tokenizer

CHOSEN, BESIDE_ANSWERS = 0.15, 0.05  # of a caption's words; of those that are told and asked
MASKED, EXCHANGED = 0.8, 0.1  # of the chosen ones
ALL_HIDDEN = 1 / 3  # how often all of an answer is; else its share is as likely 0.1 as 0.9


def written(sample: Sample, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of what a sample says: what is told and asked, its answer, what is asked next, its answer, …; or a caption alone."""
    if not sample.turns:
        return [tokenizer.encode(sample.caption)]
    told, said = iter(sample.told), []
    for turn in sample.turns:
        first, *others = turn.question.split(IMAGE)
        said += [first + "".join(next(told, "") + other for other in others), turn.answer]
    texts = [text.strip() for text in said]
    return [tokenizer.encode(f" {text}" if text and place > 0 else text) for place, text in enumerate(texts)]


def hide(parts: list[list[int]], tokenizer: Tokenizer, rng: Random) -> tuple[list[int], list[int]]:
    """A text in parts, every second one an answer → words as BERT reads them, and what it is to find there, −100 for nothing."""
    read, labels, blank = [], [], tokenizer.token_id("[MASK]")
    for place, ids in enumerate(parts):
        answer = place % 2 == 1
        share = rng.random() / (1 - ALL_HIDDEN) if answer else BESIDE_ANSWERS if len(parts) > 1 else CHOSEN
        for word in ids:
            chosen, fate = rng.random() < share, rng.random()
            labels.append(word if chosen else IGNORE)
            if chosen and (answer or fate < MASKED):
                read.append(blank)
            elif chosen and fate < MASKED + EXCHANGED:
                read.append(rng.randrange(len(tokenizer.specials), len(tokenizer)))
            else:
                read.append(word)
    return read, labels
