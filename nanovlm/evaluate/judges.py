"""What a right answer is, and one `measure` for all exams.

    judge    figure          right is
    answer   vqa_accuracy    the answer itself, by the official VQA normalisation
    letter   vqa_accuracy    the letter that it names
    box      vqa_accuracy    a box that covers the right one by half (intersection over union)
    fewshot  fewshot_accuracy  the answer itself, after so many examples
    task     vqa_accuracy    any that counts as right: the answer; a caption; a question whose answer is the given one
    class    vqa_accuracy    the right one of all class names, ranked by likelihood
    exact    caption_exact   any caption that counts as right, up to capitals and blanks
    cider    caption_cider   CIDEr-D against all captions that count as right
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanovlm import metrics
from nanovlm.data.sample import Sample
from nanovlm.data.source import Exam, Source
from nanovlm.evaluate import filtering, retrieval
from nanovlm.evaluate.pupil import Pupil, permuted

Mark = tuple[float, float, float]  # value, chance, shuffled
Truths = Sequence[Sequence[str]]  # of each sample all answers that count as right


@dataclass(frozen=True)
class Judge:
    figure: str
    truths: Callable[[Sample], Sequence[str]]
    score: Callable[[Sequence[str], Truths], Sequence[float]]
    same: Callable[[str], object] = str  # two truths for which this is equal are one answer


def answer(sample: Sample) -> tuple[str]:
    return (sample.turns[-1].answer,)


def captions(sample: Sample) -> tuple[str, ...]:
    return sample.captions


def each(right: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str], Truths], list[float]]:
    return lambda guesses, truths: [float(right(guess, several)) for guess, several in zip(guesses, truths, strict=True)]


JUDGES = {
    "answer": Judge("vqa_accuracy", answer, each(metrics.vqa_accuracy), metrics.normalise_answer),
    "letter": Judge("vqa_accuracy", answer, each(lambda guess, truths: metrics.same_letter(guess, *truths)), metrics.option_letter),
    "box": Judge("vqa_accuracy", answer, each(lambda guess, truths: metrics.box_hit(guess, *truths))),
    "task": Judge("vqa_accuracy", captions, each(metrics.exact_match)),
    "class": Judge("vqa_accuracy", answer, each(lambda guess, truths: guess in truths)),
    "fewshot": Judge("fewshot_accuracy", answer, each(metrics.vqa_accuracy), metrics.normalise_answer),
    "exact": Judge("caption_exact", captions, each(metrics.exact_match)),
    "cider": Judge("caption_cider", captions, metrics.cider_of_each),
}


def marks(pupil: Pupil, exam: Exam) -> dict[str, list[Mark]]:
    """Each judge's marks, one for every sample."""
    said, blind = (pupil.answer(samples, exam.room, exam.ranked) for samples in (exam.samples, permuted(exam.samples)))
    found = {}
    for name in exam.judges:
        judge = JUDGES[name]
        truths = [judge.truths(sample) for sample in exam.samples]
        value, chance, shuffled = (judge.score(guesses, truths) for guesses in (said, [most_common(truths, judge.same)] * len(truths), blind))
        found[name] = list(zip(value, best_guess(exam, chance), shuffled))
    return found


def best_guess(exam: Exam, always: Sequence[float]) -> Sequence[float]:
    """What is had without looking: always the same answer, or, where there are options, one of them by lot; whichever is better."""
    options = [sample.turns[-1].options if exam.ranked else () for sample in exam.samples]
    return max(always, [1 / len(several) if several else mark for several, mark in zip(options, always)], key=sum)


def most_common(truths: Truths, same: Callable[[str], object]) -> str:
    """The answer that is right for most samples."""
    votes = Counter(key for several in truths for key in dict.fromkeys(map(same, several)))
    ((often, _),) = votes.most_common(1)
    return next(text for several in truths for text in several if same(text) == often)


def measure(pupil: Pupil, exam: Exam) -> dict[str, dict[str, float]]:
    """{figure: {"value", "n", "chance", "shuffled"}} of one exam."""
    return {name_of(judge, exam): mean(of_judge) for judge, of_judge in marks(pupil, exam).items()}


def name_of(judge: str, exam: Exam) -> str:
    return f"{JUDGES[judge].figure}/{exam.name}" if exam.name else JUDGES[judge].figure


def evaluate(pupil: Pupil, source: Source) -> dict[str, dict[str, float]]:
    """All figures that the pupil's stage is judged by; `vqa_accuracy` is the mean over all questions about pictures, or over
    those of tasks that were learned from and, apart from them, of others: `vqa_accuracy/held_in`, `vqa_accuracy/held_out`.
    """
    names = pupil.stage.evaluate
    figures = retrieval.measure(pupil, source) if "retrieval" in names else {}
    figures |= filtering.measure(pupil, source) if "noise" in names else {}
    looked: dict[str, list[Mark]] = defaultdict(list)  # of held_in/captions and the like: by what stands before the stroke
    for exam in source.exams(names):
        for judge, of_judge in marks(pupil, exam).items():
            figures[name_of(judge, exam)] = mean(of_judge)
            if JUDGES[judge].figure == "vqa_accuracy" and judge != "class":
                # without a picture there is nothing to exchange: such questions have a row of their own only
                looked[exam.name.rpartition("/")[0]] += [mark for mark, sample in zip(of_judge, exam.samples) if sample.images]
    return figures | {"/".join(filter(None, ("vqa_accuracy", part))): mean(of_part) for part, of_part in looked.items() if of_part}


def mean(of_samples: Sequence[Mark]) -> dict[str, float]:
    value, chance, shuffled = (sum(column) / len(of_samples) for column in zip(*of_samples))
    return {"value": value, "n": len(of_samples), "chance": chance, "shuffled": shuffled}
