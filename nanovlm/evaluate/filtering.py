"""Texts of which some are wrong, and which of them a filter finds: filter/<noise>/precision, …/recall, …/auc.

    pictures with the web's texts, labels hidden ─► matching head ─► P(belongs) < 0.5: dropped

Each kind of noise is judged against the right texts: of those that are of this kind or right, precision is the share of the dropped that
are of this kind, recall the share of this kind that is dropped, auc how often a wrong text is less believed than a right one.
`chance`: a coin that drops every second text. `shuffled`: the same with exchanged pictures.
"""

from collections.abc import Sequence

from nanovlm import metrics
from nanovlm.data.source import Source
from nanovlm.evaluate.pupil import Pupil, permuted


def measure(pupil: Pupil, source: Source) -> dict[str, dict[str, float]]:
    samples = source.noisy()
    believed, blind = pupil.belongs(samples), pupil.belongs(permuted(samples))
    found = {}
    for kind in dict.fromkeys(sample.label for sample in samples if sample.label):
        chosen = [i for i, sample in enumerate(samples) if sample.label in (kind, "")]
        wrong = [samples[i].label == kind for i in chosen]
        value, shuffled = (figures_of([beliefs[i] for i in chosen], wrong) for beliefs in (believed, blind))
        chance = {"precision": sum(wrong) / len(wrong), "recall": 0.5, "auc": 0.5}
        found |= {f"filter/{kind}/{name}": {"value": value[name], "n": len(chosen), "chance": chance[name], "shuffled": shuffled[name]}
                  for name in value}
    return found


def figures_of(believed: Sequence[float], wrong: Sequence[bool]) -> dict[str, float]:
    """believed: P(belongs) of each text."""
    dropped = [belief < 0.5 for belief in believed]
    caught = sum(d and w for d, w in zip(dropped, wrong))
    return {"precision": caught / max(1, sum(dropped)), "recall": caught / sum(wrong),
            "auc": metrics.roc_auc([-belief for belief in believed], wrong)}
