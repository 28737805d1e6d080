"""InstructBLIP's ablations: how tasks are asked in them, and what their table says. Training itself is tested elsewhere."""

import pytest
import torch
from task_oracle import bare as bared

from experiments import instructblip_ablations as ablations
from nanovlm import recipes
from nanovlm.world import tasks
from nanovlm.world.datasets import Scenes


@pytest.fixture(scope="module")
def exams():
    return {exam.name.split("/")[1]: exam.samples for exam in Scenes().exams(("tasks",), 30)}


@pytest.mark.parametrize("group", tasks.NAMES)
def test_bare_inputs_keep_what_is_asked_and_lose_the_words_around_it(exams, group):
    for sample in exams[group]:
        asked, answer = sample.turns[-1].question.removeprefix("<image>\n"), sample.turns[-1].answer
        left = ablations.bare(sample, group).turns[-1].question.removeprefix("<image>\n")
        assert ablations.bare(sample, group).turns[-1].answer == answer
        if group in ("captions", "signs"):
            assert left == "" or left == asked[:asked.index(".") + 2], "of a caption what is read, if anything"
        elif group in ("questions", "clips"):
            assert left == bared(asked)
        elif group == "asking":
            assert left and left in asked and not left.endswith((":", "?", '"', "."))
        else:
            assert left and all(part in asked for part in left.split(". ", 1))


def test_tags_name_the_group_before_the_bare_input(exams):
    for group, samples in exams.items():
        for sample in samples[:5]:
            want = ablations.bare(sample, group).turns[-1].question.replace("<image>\n", f"<image>\n[{group}] ")
            assert ablations.tagged(sample, group).turns[-1].question == want and want.count("<image>") == 1


def test_arms_change_what_they_say():
    recipe = recipes.get("instructblip/tiny")
    stage = recipe.stages[-1]
    setting = type("Setting", (), {"recipe": recipe})
    changed = {name: change(stage, setting) for name, (change, _, _) in ablations.ARMS.items()}
    for queries in ablations.QUERIES:
        for way in ("aware", "blind"):
            arm = changed[f"{way}, {queries}"]
            model = recipe.build(arm)
            assert model.config.qformer.queries == queries and model.config.asks == (way == "aware") == (model.reads.question > 0)
            assert arm.data == stage.data and ("blip2/tiny@stage1" in str(arm.init)) == (way == "aware")
    assert changed["uniform"].data["tasks/knowledge"] == pytest.approx(1 / 7)
    assert changed["proportional"].data["tasks/captions"] == pytest.approx(32 / 67)


def test_a_set_is_asked_in_the_wording_of_its_group():
    world = Scenes()
    asked = ablations.Asked([world.pooled("tasks/asking", 5), world.pooled("tasks/captions", 5)], ablations.tagged)
    assert asked[0].turns[0].question.startswith("<image>\n[asking] ") and asked[1].turns[0].question == "<image>\n[captions] "


def test_of_the_queries_the_first_are_kept():
    finished = {"stage2": {"qformer.queries": torch.arange(12.0).view(4, 3), "qformer.norm.weight": torch.ones(3)}}
    kept = ablations.cut(finished, 2)["stage2"]
    assert torch.equal(kept["qformer.queries"], torch.arange(6.0).view(2, 3)) and len(kept["qformer.norm.weight"]) == 3


def test_the_table_has_a_row_for_each_arm_and_way_of_asking():
    figure = {"value": 0.5, "shuffled": 0.25, "chance": 0.1}
    ways = {name: dict.fromkeys(("held_in", "held_out", *(f"held_out/{group}" for group in tasks.HELD_OUT_GROUPS)), figure)
            for name in ("instructions", "as trained")}
    runs = [{"arms": {"aware, 1": {"instructions": ways["instructions"]}, "task tags": ways}}] * 2
    lines = ablations.table({"runs": runs}).split("\n")
    assert len(lines) == 2 + 3 and lines[2].startswith("| aware, 1 | 0.50 (0.50–0.50) | 0.25 (0.25–0.25) |")
    assert [line.split(" | ")[0] for line in lines[3:]] == ["| task tags", "| task tags, asked as it was trained"]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
