"""What CapFilt brings: BLIP's Tables 1, 2, 4 and 12 at tiny scale. Every model is trained for as many steps, from the same start.

    none        the web's texts, 40 % of them wrong, each met again and again: Table 12's "web texts repeated", too
    filter      those of them that the filter keeps
    captioner   the web's texts and the captioner's, none dropped
    both        CapFilt: both kinds of texts, filtered
    shared      the same, captioner and filter being one model, tuned on all three losses at once      (Table 4)
    beams       the same as both, the captioner writing by beam search                                (Table 2)
    clean       the same pictures with right texts: what all of this can reach at best

    python -m experiments.blip_capfilt                       seeds 0, 1 and 7; half of the recipe's steps
    python -m experiments.blip_capfilt --seeds 0 --steps 1   one seed, all steps
    python -m experiments.blip_capfilt --table               print the stored results as Markdown

A seed's world has a web of its own. Human texts are in every diet, as in the recipe. Of every captioner it is known which of its texts
are right, so the filter is judged on them too: recall of a captioner's own mistakes is what sharing is said to spoil (§4.4, "confirmation
bias"). Figures of models: held-out scenes; caption_exact of two objects, retrieval among 500.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from experiments import seeds
from nanovlm import recipes
from nanovlm.evaluate.judges import evaluate
from nanovlm.evaluate.pupil import Pupil
from nanovlm.making.bootstrap import Bootstrapped, Text, grow
from nanovlm.recipes.blip import ALL, PLAIN_WEB, WEB
from nanovlm.recipes.stage import CapFilt, Stage, resolve
from nanovlm.runs.cache import Cache
from nanovlm.runs.capfilt import writer
from nanovlm.runs.run import weights_after
from nanovlm.runs.setting import Job, Setting, needs, world_of
from nanovlm.runs.shipped import find_tokenizer
from nanovlm.training.batches import Mixture

NAME = "blip/tiny"
ARMS = ("none", "filter", "captioner", "both", "shared", "beams", "clean")
FIGURES = ("caption_exact", "i2t_r1", "t2i_r1")
POOLS = {"bootstrapped": "web pairs", "unnamed bootstrapped": "unnamed web pairs"}
CLEAN = {web: web.replace("web pairs", "clean web pairs") for web in POOLS.values()}


class Experiment:
    """One seed: its world, its start, and everybody's training by the same steps."""

    def __init__(self, seed: int, fraction: float):
        self.recipe = resolve(recipes.get(NAME), real=False, steps=fraction)
        self.world = world_of(self.recipe, seed)
        self.setting = Setting(self.recipe, seed, seeds.CPU, self.world, find_tokenizer(self.recipe, self.world, seed))
        start = needs(Job(self.recipe, self.recipe.stage("pretrain")), self.setting)
        self.finished = {job.stage.name: weights_after(job, self.setting, Cache(self.setting)) for job in start}
        self.web = {name: [self.world.pooled(name, i) for i in range(self.world.pool(name))] for name in POOLS.values()}

    def train(self, stage: Stage, made: dict[str, Bootstrapped]) -> nn.Module:
        """Nobody goes on from the stage before by chance: `init` says all."""
        print(f"seed {self.setting.seed}, {stage.name}: {stage.steps} steps", flush=True)
        samples = Mixture(self.world, stage, self.setting.seed, made)
        model = seeds.learn(replace(self.recipe, stages=(stage,)), stage, samples, self.setting.seed, self.setting.tokenizer, self.finished)
        self.finished[stage.name] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return model.eval()

    def pupil(self, model: nn.Module, stage: Stage) -> Pupil:
        return Pupil(model, self.recipe, stage, self.setting.tokenizer, seeds.CPU)

    def bootstrapped(self, captioner: Pupil, judge: Pupil, how: CapFilt) -> dict[str, list[Text]]:
        write = writer(captioner, how, str(self.setting.seed))
        return {name: grow(None, self.web[web], write, judge.belongs) for name, web in POOLS.items()}

    def retrain(self, arm: str, texts: dict[str, list[Text]] | None) -> dict:
        """A new model on the arm's texts, and its figures; without texts of its own, on the clean web."""
        last = self.recipe.stages[-1]
        names = {web: name for name, web in POOLS.items()} if texts else CLEAN
        diets = [{names.get(name, name): weight for name, weight in diet.items()} for diet in (WEB, PLAIN_WEB)]
        stage = replace(last, name=arm, lessons=((0.75, diets[0]),), data=diets[1])
        made = {name: Bootstrapped(self.world, POOLS[name], of) for name, of in (texts or {}).items()}
        return self.judged(self.train(stage, made), stage)

    def judged(self, model: nn.Module, stage: Stage) -> dict:
        pupil = self.pupil(model, replace(stage, evaluate=("retrieval", "two")))
        found = evaluate(pupil, self.world)
        print({name: round(found[name]["value"], 3) for name in FIGURES}, flush=True)
        return {name: found[name] for name in (*FIGURES, "i2t_r1/itc", "t2i_r1/itc", "caption_cider")}

    def told(self, texts: dict[str, list[Text]]) -> dict:
        """What is known of the texts: shares of the dropped, and of the captioner's how many are right and which mistakes are found."""
        right = {sample.id: set(sample.references) for samples in self.web.values() for sample in samples}
        every = [text for of in texts.values() for text in of]
        new = [text for text in every if text.source == "captioner"]
        wrong = [text for text in new if text.text not in right[text.picture]]
        web = [text for text in every if text.source == "web"]
        return {
            "noise ratio": share(new, lambda text: not text.kept), "new texts right": 1 - len(wrong) / len(new),
            "new texts right after": share([text for text in new if text.kept], lambda text: text.text in right[text.picture]),
            "own mistakes dropped": share(wrong, lambda text: not text.kept), "different": len({text.text for text in new}) / len(new),
            "web dropped": {kind or "right": share([text for text in web if text.noise == kind], lambda text: not text.kept)
                            for kind in sorted({text.noise for text in web})}}


def share(texts: Sequence[Text], which) -> float:
    return sum(map(which, texts)) / max(1, len(texts))


def measure(seed: int, fraction: float) -> dict:
    one = Experiment(seed, fraction)
    pretrain, captioner, judge, _ = one.recipe.stages
    joint = replace(judge, name="joint", trains=ALL, sizes={})
    models = {stage.name: one.pupil(one.train(stage, {}), stage) for stage in (pretrain, captioner, judge, joint)}
    figures = {"none": one.judged(models["pretrain"].model, pretrain)}
    nucleus, beams = CapFilt("web pairs"), CapFilt("web pairs", beams=3)
    both = one.bootstrapped(models["captioner"], models["filter"], nucleus)
    texts = {
        "filter": {name: [text for text in of if text.source == "web"] for name, of in both.items()},
        "captioner": {name: [replace(text, belongs=None) for text in of] for name, of in both.items()},
        "both": both,
        "shared": one.bootstrapped(models["joint"], models["joint"], nucleus),
        "beams": one.bootstrapped(models["captioner"], models["filter"], beams)}
    for arm, of in texts.items():
        figures[arm] = one.retrain(arm, of)
    figures["clean"] = one.retrain("clean", None)
    return {"steps": [stage.steps for stage in one.recipe.stages], "figures": figures,
            "texts": {arm: one.told(texts[arm]) for arm in ("both", "shared", "beams")}}


def table(result: dict) -> str:
    """Markdown: figures by arm, the mean over the seeds and from the lowest to the highest; then what is known of the texts."""
    runs = result["runs"]
    lines = [f"| learned from | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 1) + "|"]
    for arm in ARMS:
        cells = [spread([run["figures"][arm][name]["value"] for run in runs]) for name in FIGURES]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    known = [name for name in runs[0]["texts"]["both"] if name != "web dropped"]
    lines += ["", f"| texts of | {' | '.join(known)} |", "|---" * (len(known) + 1) + "|"]
    for arm in ("both", "shared", "beams"):
        lines.append(f"| {arm} | {' | '.join(spread([run['texts'][arm][name] for run in runs]) for name in known)} |")
    kinds = list(runs[0]["texts"]["both"]["web dropped"])
    lines += ["", f"| of the web's texts dropped | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for arm in ("both", "shared"):
        lines.append(f"| {arm} | {' | '.join(spread([run['texts'][arm]['web dropped'][kind] for run in runs]) for kind in kinds)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    seeds.main(__doc__, "blip_capfilt", NAME, measure, table, fraction=0.5)
