"""What CapFilt brings: BLIP's Tables 1, 2, 4 and 12 at tiny scale. Every model is trained for as many steps, from the same start.

    none        the web's texts, 40 % of them wrong, each met again and again: Table 12's "web texts repeated", too
    filter      those of them that the filter keeps
    captioner   the web's texts and the captioner's, none dropped
    both        CapFilt: both kinds of texts, filtered
    clean       the same pictures with right texts: what all of this can reach at best

Of two more ways it is told what they make, and no model is trained on it:

    shared      CapFilt by one model, tuned on all three losses at once, in the place of captioner and filter   (Table 4)
    beams       CapFilt whose captioner writes by beam search                                                   (Table 2)

    python -m experiments.blip_capfilt                       seeds 0, 1 and 7; a quarter of the recipe's steps and of its web
    python -m experiments.blip_capfilt --seeds 0 --steps 1   one seed, all steps
    python -m experiments.blip_capfilt --table               print the stored results as Markdown

A seed's world has a web of its own; with fewer steps it has fewer pictures, too, so that each is met as often. Human texts are in every
diet, as in the recipe. Of every new text it is known whether it is right, so the filter is judged on them too: whether it finds a
captioner's own mistakes is what sharing is said to spoil (§4.4, "confirmation bias"). Figures of models: held-out scenes; captions of two
objects, retrieval among 500.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments import seeds
from nanovlm import recipes
from nanovlm.evaluate.judges import evaluate
from nanovlm.evaluate.pupil import Pupil
from nanovlm.making.bootstrap import Bootstrapped, Text, grow
from nanovlm.recipes.blip import ALL
from nanovlm.recipes.stage import CapFilt, Stage, resolve
from nanovlm.runs.cache import Cache
from nanovlm.runs.capfilt import writer
from nanovlm.runs.run import weights_after
from nanovlm.runs.setting import Job, Setting, needs, world_of
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.training.batches import Mixture

NAME = "blip/tiny"
ARMS = ("none", "filter", "captioner", "both", "clean")
MADE = ("both", "shared", "beams")  # texts
FIGURES = ("caption_exact", "caption_cider", "i2t_r1", "t2i_r1")
WEBS = ("web pairs", "unnamed web pairs")

Texts = dict[str, list[Text]]  # of each web


class Experiment:
    """One seed: its world, its web of as many pictures as the steps are fewer, its start, and everybody's training."""

    def __init__(self, seed: int, fraction: float):
        self.recipe = resolve(recipes.get(NAME), real=False, steps=fraction)
        self.world = world_of(self.recipe, seed)
        self.setting = Setting(self.recipe, seed, seeds.CPU, self.world, find_tokenizer(self.recipe, self.world, seed))
        start = needs(Job(self.recipe, self.recipe.stage("pretrain")), self.setting)
        self.finished = {job.stage.name: weights_after(job, self.setting, Cache(self.setting)) for job in start}
        self.web = {name: [self.world.pooled(name, i) for i in range(round(self.world.pool(name) * fraction))] for name in WEBS}

    def train(self, name: str, stage: Stage, texts: Texts) -> Pupil:
        """texts: what stands for the web. Of one stage all begin with the same random numbers and meet pictures in the same order."""
        print(f"seed {self.setting.seed}, {name}: {stage.steps} steps", flush=True)
        made = {name: Bootstrapped(self.world, name, of) for name, of in texts.items()}
        samples = Mixture(self.world, stage, self.setting.seed, made)
        model = seeds.learn(replace(self.recipe, stages=(stage,)), stage, samples, self.setting.seed, self.setting.tokenizer, self.finished)
        self.finished.setdefault(stage.name, {key: tensor.clone() for key, tensor in model.state_dict().items()})  # of the first
        return Pupil(model.eval(), self.recipe, stage, self.setting.tokenizer, seeds.CPU)

    def arm(self, name: str, texts: Texts) -> dict:
        """A new model on these texts, and its figures."""
        pupil = self.train(name, replace(self.recipe.stage("pretrain"), evaluate=("retrieval", "two")), texts)
        found = evaluate(pupil, self.world)
        print({figure: round(found[figure]["value"], 3) for figure in FIGURES}, flush=True)
        return {figure: found[figure] for figure in (*FIGURES, "i2t_r1/itc", "t2i_r1/itc")}

    def texts(self, source: str) -> Texts:
        """Nobody's work: the web's own texts, or for each picture a right one."""
        right = "clean " if source == "clean" else ""
        return {name: [Text(sample.id, self.world.pooled(name.replace("web", f"{right}web"), i).caption, "web", noise=sample.label)
                       for i, sample in enumerate(samples)] for name, samples in self.web.items()}

    def bootstrapped(self, captioner: Pupil, judge: Pupil, how: CapFilt) -> Texts:
        write = writer(captioner, how, str(self.setting.seed))
        return {name: grow(None, samples, write, judge.belongs) for name, samples in self.web.items()}

    def told(self, texts: Texts) -> dict:
        """What is known of the texts: shares of the dropped, and of the captioner's how many are right and which mistakes are found."""
        right = {sample.id: set(sample.references) for samples in self.web.values() for sample in samples}
        every = [text for of in texts.values() for text in of]
        new = [text for text in every if text.source == "captioner"]
        wrong = [text for text in new if text.text not in right[text.picture]]
        web = [text for text in every if text.source == "web"]
        return {
            "dropped of the new": share(new, lambda text: not text.kept), "new and right": 1 - len(wrong) / len(new),
            "kept and right": share([text for text in new if text.kept], lambda text: text.text in right[text.picture]),
            "own mistakes dropped": share(wrong, lambda text: not text.kept), "different": len({text.text for text in new}) / len(new),
            "web dropped": {kind or "right": share([text for text in web if text.noise == kind], lambda text: not text.kept)
                            for kind in sorted({text.noise for text in web})}}


def share(texts: Sequence[Text], which) -> float:
    return sum(map(which, texts)) / max(1, len(texts))


def measure(seed: int, fraction: float) -> dict:
    one = Experiment(seed, fraction)
    captioner, judge = one.recipe.stage("captioner"), one.recipe.stage("filter")
    figures = {"none": one.arm("none", one.texts("web"))}
    writes, judges = one.train("captioner", captioner, {}), one.train("filter", judge, {})  # both go on from it
    joint = one.train("captioner and filter", replace(judge, name="joint", trains=ALL, sizes={}), {})
    both = one.bootstrapped(writes, judges, CapFilt("web pairs"))
    texts = {
        "filter": {name: [text for text in of if text.source == "web"] for name, of in both.items()},
        "captioner": {name: [replace(text, belongs=None) for text in of] for name, of in both.items()},
        "both": both, "clean": one.texts("clean")}
    told = {"both": one.told(both), "shared": one.told(one.bootstrapped(joint, joint, CapFilt("web pairs"))),
            "beams": one.told(one.bootstrapped(writes, judges, CapFilt("web pairs", beams=3)))}
    print(told, flush=True)
    figures |= {name: one.arm(name, of) for name, of in texts.items()}
    return {"steps": [stage.steps for stage in one.recipe.stages], "pictures": sum(map(len, one.web.values())), "figures": figures, "texts": told}


def table(result: dict) -> str:
    """Markdown: figures by arm, the mean over the seeds and from the lowest to the highest; then what is known of the texts."""
    runs = result["runs"]
    lines = [f"| learned from | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 1) + "|"]
    for arm in ARMS:
        cells = [seeds.spread([run["figures"][arm][name]["value"] for run in runs]) for name in FIGURES]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    known = [name for name in runs[0]["texts"]["both"] if name != "web dropped"]
    lines += ["", f"| texts of | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    for arm in MADE:
        lines.append(f"| {arm} | {' | '.join(seeds.spread([run['texts'][arm][name] for run in runs]) for name in known)} |")
    kinds = list(runs[0]["texts"]["both"]["web dropped"])
    lines += ["", f"| of the web's texts dropped | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for arm in ("both", "shared"):
        lines.append(f"| {arm} | {' | '.join(seeds.spread([run['texts'][arm]['web dropped'][kind] for run in runs]) for kind in kinds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    seeds.main(__doc__, "blip_capfilt", NAME, measure, table, fraction=0.25)
