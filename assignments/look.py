"""What a model does, in numbers: the shipped weights, a few held-out questions, seconds. A copy of this file lies in each bug's folder.

    python look.py answers llava/tiny            right answers of 40 held-out questions, and some of them
    python look.py losses blip2/tiny@stage1      its losses on 32 samples that it knows the kind of
    python look.py filter blip/tiny@filter       of right captions, and of wrong ones, how many does the matching head believe?
    python look.py names flamingo/tiny           made-up names after four examples
    python look.py queue blip/tiny@pretrain      six steps of training: what became of the slow copies and the queue

`nanovlm` is the one beside this file. The weights are those in weights/ beside it, or in the folder that $NANOVLM_SHIPPED names.
"""

import json
import sys
from random import Random

import torch

from nanovlm import recipes
from nanovlm.data.sample import Sample
from nanovlm.evaluate.pupil import Pupil, permuted
from nanovlm.runs.run import trained_model
from nanovlm.training.batches import make_collate
from nanovlm.world import pages
from nanovlm.world.datasets import Scenes

ASKED, SHOWN = 40, 4


def pupil_of(which: str) -> Pupil:
    """"llava/tiny", or "blip/tiny@filter" for another stage than the last."""
    name, _, stage = which.partition("@")
    recipe = recipes.get(name)
    model, tokenizer = trained_model(name, stage or None)
    return Pupil(model, recipe, recipe.stage(stage or None), tokenizer, "cpu")


def world_for(which: str) -> Scenes:
    """With pictures as large as the recipe's."""
    return Scenes(**recipes.get(which.partition("@")[0]).world)


def answers(which: str) -> dict:
    """Of questions of all kinds that the stage is examined in."""
    rows = pupil_of(which).examples(world_for(which), ASKED)
    return {"right": f"{sum(truth == said for _, _, truth, said in rows)} of {len(rows)}",
            "said": [f"{question} → {said or '(nothing)'}   [{truth}]" for _, question, truth, said in rows[::len(rows) // SHOWN][:SHOWN]]}


def losses(which: str) -> dict:
    """Nats, in evaluation: nothing is learned, and dropout is off."""
    pupil = pupil_of(which)
    collate, rng, world = make_collate(pupil.recipe, pupil.stage, pupil.tokenizer, pupil.model.reads), Random(0), world_for(which)
    samples: list[Sample] = [world.held_out(max(pupil.recipe.worldly(pupil.stage.data), key=pupil.stage.data.get), i) for i in range(32)]
    torch.manual_seed(0)  # wrong partners are drawn
    with torch.no_grad():
        return {name: f"{(total / count).item():.3f}" for name, (total, count) in pupil.model.losses(collate(samples, rng)).items()}


def filter_(which: str) -> dict:
    """Right captions, and the same with their pictures exchanged."""
    pupil, samples = pupil_of(which), [Scenes().held_out("human pairs", i) for i in range(ASKED)]
    kept = [sum(belief >= 0.5 for belief in pupil.belongs(those)) for those in (samples, permuted(samples))]
    return {"right captions believed": f"{kept[0]} of {ASKED}", "wrong captions believed": f"{kept[1]} of {ASKED}"}


def names(which: str) -> dict:
    """After four examples; a name that nobody has been told cannot be known."""
    asked = [pages.last(pages.examined(Scenes(), i), 4) for i in range(ASKED)]
    said = pupil_of(which).answer(asked, room=8)
    return {"right": f"{sum(name == page.turns[-1].answer for name, page in zip(said, asked))} of {ASKED}",
            "said": [f"{', '.join(turn.answer for turn in page.turns[:-1])} → {name}   [{page.turns[-1].answer}]"
                     for name, page in [*zip(said, asked)][:SHOWN]]}


def queue(which: str) -> dict:
    """Six small steps, SGD: how far are the slow copies behind, of the way that the encoders went; and how many keys of pairs are in the queue?"""
    pupil, world, rng = pupil_of(which), Scenes(), Random(0)
    model, collate = pupil.model, make_collate(pupil.recipe, pupil.stage, pupil.tokenizer, pupil.model.reads)
    optimiser, start = torch.optim.SGD(model.parameters(), 0.002), [p.detach().clone() for p in model.text_projection.parameters()]
    for _ in range(6):
        batch = collate([world.draw("human pairs", rng) for _ in range(8)], rng)
        optimiser.zero_grad()
        sum(total / count for total, count in model.losses(batch).values()).backward()
        optimiser.step()
    fast, slow = model.text_projection.state_dict().values(), model.momentum.copies["text_projection"].state_dict().values()
    way, behind = (sum((a - b).square().sum() for a, b in zip(fast, other)).sqrt() for other in (start, slow))
    kept = int((model.momentum.images_group >= 0).sum())
    return {"the slow copies are behind by": f"{(behind / way).item():.0%} of the way", "keys of pairs in the queue": f"{kept} of {6 * 8} that were made"}


LOOKS = {"answers": answers, "losses": losses, "filter": filter_, "names": names, "queue": queue}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) != 3 or sys.argv[1] not in LOOKS:
        sys.exit(__doc__)
    print(json.dumps(LOOKS[sys.argv[1]](sys.argv[2]), indent=1, ensure_ascii=False))
