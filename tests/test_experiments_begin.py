"""Experiments that train are run by hand. That each of their arms still finds all weights it begins with, and something to learn from, is tested."""

import pytest

from experiments import blip2_stage1, llava15_ladder, llava15_tiles, llava_data_mix, seeds
from nanovlm.training.weights import initial_model


@pytest.mark.parametrize(("experiment", "arms"), [(blip2_stage1, 3), (llava_data_mix, 2 + 3), (llava15_ladder, 2 * 7), (llava15_tiles, 3)],
                         ids=("stage 1", "data mix", "ladder", "tiles"))
def test_every_arm_begins(monkeypatch, experiment, arms):
    """On what is shipped, as a person's runs do: which weights a stage finds hangs on what is."""
    begun = []

    def begin(recipe, stage, samples, seed, tokenizer, finished, *_):
        model = initial_model(recipe, stage, seed, finished)
        begun.append((samples[0], model))
        return model

    monkeypatch.delenv("NANOVLM_SHIPPED")
    monkeypatch.setattr(seeds, "learn", begin)
    for module in (llava15_ladder, llava_data_mix):
        monkeypatch.setattr(module, "judged", lambda *_: {})
    experiment.measure(0, 0.3)
    assert len(begun) == arms
