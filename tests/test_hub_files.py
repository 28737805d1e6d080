"""A checkpoint's folder: which files count, what is broken, and a tower from another folder."""

import json
import pickle
import sys

import pytest
import torch
from oracles import hf_clip, hf_clip_vision, hf_llama, original_llava, ours, same
from safetensors.torch import load_file, save_file

from nanovlm.errors import UserError
from nanovlm.hub import from_hf, load

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """In shards."""
    hf_llama(14).save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def refused(folder) -> str:
    with pytest.raises(UserError) as error:
        load(folder)
    return str(error.value)


# --- which files count ---

def test_a_whole_file_beside_an_index_is_an_error_that_names_both(folder):
    """Whichever of the two is left from another save: nothing is read, and nothing mixed."""
    whole = folder / "model.safetensors"
    hf_llama(15).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").rename(whole)
    said = refused(folder)
    assert f"{folder} has both model.safetensors and {INDEX}" in said and "delete the one that you do not want" in said
    for shard in folder.glob("model-*"):
        shard.unlink()
    assert refused(folder) == said  # a stale index alone
    (folder / INDEX).unlink()
    same(load(folder), ours(hf_llama(15)))


def test_an_index_may_name_the_whole_file(tmp_path):
    hf = hf_llama(14)
    hf.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    same(load(tmp_path), ours(hf))


@pytest.mark.parametrize("variants", [("model.fp16.safetensors",), ("model.bf16.safetensors", "model.fp16.safetensors"),
                                      ("pytorch_model.safetensors",)])
def test_variants_alone_are_not_guessed_from(variants, tmp_path):
    hf = hf_llama(14)
    hf.save_pretrained(tmp_path)
    whole = tmp_path / "model.safetensors"
    for name in variants:
        (tmp_path / name).write_bytes(whole.read_bytes())
    same(load(tmp_path), ours(hf))  # beside model.safetensors they do not count
    whole.unlink()
    said = refused(tmp_path)
    assert f"{tmp_path} has no model.safetensors, only {', '.join(variants)}: rename the file that holds the whole model" in said
    (tmp_path / variants[0]).rename(whole)
    same(load(tmp_path), ours(hf))


def test_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    said = refused(folder)
    assert "only model-00001-of-" in said and f"if these are shards, download {INDEX}" in said


def test_shards_of_two_saves_are_not_mixed(folder):
    """A shard that holds other tensors than the index says: today's and last week's download in one folder."""
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = folder / where["model.norm.weight"]
    tensors = load_file(shard)
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, shard)
    assert f"{shard} and {INDEX} are not of the same save, only one of them has model.extra.weight" in refused(folder)
    tensors.pop("model.norm.weight")
    save_file(tensors, shard)
    assert f"{shard} and {INDEX} are not of the same save, only one of them has model.norm.weight" in refused(folder)


def test_nothing_that_can_run_code_is_opened(folder):
    """A pickle in the folder, under any name, is not unpickled."""
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('unpickled')",)

    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    same(load(folder), ours(hf_llama(14)))
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(pickle.dumps(Trap()))
    assert f"{shard} could not be read" in refused(folder)


# --- what is broken ---

def test_bad_files_are_named(folder):
    index, config = folder / INDEX, folder / "config.json"
    shard = sorted(folder.glob("*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.write_bytes(kept[:1000])
    assert f"{shard} could not be read" in refused(folder)
    shard.unlink()
    assert f"{shard} could not be read" in refused(folder)
    shard.write_bytes(kept)
    kept = index.read_text()
    fewer = {name: file for name, file in json.loads(kept)["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps({"weight_map": fewer}))
    assert "is missing" in refused(folder) and str(folder) in refused(folder)
    for broken in ("{}", '{"weight_map": {"model.norm.weight": 3}}'):
        index.write_text(broken)
        assert f"{index}: the field weight_map" in refused(folder)
    index.write_text("[3]")
    assert f"{index} holds a list" in refused(folder)
    index.write_text(kept)
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": null', 1))
    assert f"{folder}: The tensors do not fit config.json" in refused(folder)  # the default, 32, does not
    config.write_text("{")
    assert f"{config} is not JSON" in refused(folder)
    config.unlink()
    assert f"{config} could not be read" in refused(folder)


def test_a_folder_without_tensors(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no \\*.safetensors; if it has \\*.bin files, let transformers convert them"):
        load(tmp_path)
    with pytest.raises(UserError, match="nowhere/config.json could not be read"):
        load(tmp_path / "nowhere")


def test_without_the_package_safetensors(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load(folder)


# --- a tower from another folder ---

@pytest.mark.parametrize("whole_clip", [True, False])
def test_original_llava_from_disk_with_its_tower(whole_clip, tmp_path):
    """The tower's folder may hold CLIP as a whole (as OpenAI published it) or its vision part only."""
    config, state, eyes, tower = original_llava(1)
    state = {name: t.contiguous() for name, t in state.items()}
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "llava" / "model.safetensors")
    if whole_clip:
        clip = hf_clip(5)
        clip.save_pretrained(tmp_path / "clip")
        eyes, tower = clip.config.to_dict()["vision_config"], dict(clip.vision_model.state_dict())
        written = json.loads((tmp_path / "clip" / "config.json").read_text())  # the second section counts, as in OpenAI's
        written |= {"vision_config_dict": written["vision_config"], "vision_config": {"hidden_size": 99, "num_attention_heads": 9}}
        (tmp_path / "clip" / "config.json").write_text(json.dumps(written))
    else:
        clip = hf_clip_vision(5)
        clip.load_state_dict(tower)
        clip.save_pretrained(tmp_path / "clip")
    model = load(tmp_path / "llava", vision=tmp_path / "clip")
    same(model, from_hf({**config, "vision_config": eyes}, {**state, **tower}))
    with pytest.raises(UserError, match="mm_vision_tower is 'somebody/tiny-tower'.*load\\(folder, vision=its_folder\\)"):
        load(tmp_path / "llava")
    with pytest.raises(UserError, match="clip: vision= adds the tower that an original LLaVA"):
        load(tmp_path / "clip", vision=tmp_path / "clip")
    with pytest.raises(UserError, match="llava/config.json: model_type is 'llava'; a vision tower is"):
        load(tmp_path / "llava", vision=tmp_path / "llava")
