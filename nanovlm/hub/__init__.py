"""Published weights: a Hugging Face checkpoint goes in, our model comes out, with every tensor in its place.

    config.json ───► sizes (configs.py) ─► our model, empty, on the meta device
                                               │
    *.safetensors ─► our names (names.py) ─► filled: nothing is copied, the dtypes stay

    model_type            class that was saved               what comes back
    clip_vision_model     CLIPVisionModel                    vit.ViT
    clip                  CLIPModel                          papers.clip.CLIP
    llama, opt            LlamaForCausalLM, OPTForCausalLM   papers.language_model.LanguageModel
    bert                  BertModel                          bert.Bert
    bert                  BertForMaskedLM, …ForPreTraining   bert.MaskedLM
    blip-2                Blip2ForConditionalGeneration      papers.blip2.BLIP2, on OPT or T5
    blip-2                Blip2ForImageTextRetrieval         papers.blip2.BLIP2Stage1, without word head and temperature
    t5                    T5ForConditionalGeneration         papers.language_model.LanguageModel
    llava                 LlavaForConditionalGeneration      papers.llava.LLaVA, projector of two layers
    llava_next            LlavaNextForConditionalGeneration  papers.llava.LLaVA, with tiles
    llava, llava_llama    LlavaLlamaForCausalLM              papers.llava.LLaVA, projector of one or two layers

A tensor that is missing, left over or of another shape is an error that lists all of them: a model that is half loaded
still talks, only worse.

LlavaLlamaForCausalLM, the class of the original code, saves no vision tower, only its name: the tower must be added,

    load("llava-v1.5-7b", vision="clip-vit-large-patch14-336")                                       from disk
    from_hf({**config, "vision_config": clip_config}, {**tensors, **clip_vision_tensors})            from memory

The model takes over the tensors of `state` themselves, so training it changes them.
Differs from Hugging Face in: one id stands for an image in the sequence, not one for each of its tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovlm.bert import Bert, MaskedLM
from nanovlm.errors import UserError
from nanovlm.hub import configs
from nanovlm.hub.names import LAYOUTS, NOT_OURS, TIED, Names, backwards, translate
from nanovlm.papers.blip2 import BLIP2, BLIP2Stage1
from nanovlm.papers.clip import CLIP
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.llava import LLaVA
from nanovlm.vit import ViT

State = dict[str, Tensor]

BUILD: dict[str, Callable[[dict], nn.Module]] = {
    "clip_vision_model": lambda config: ViT(configs.clip_vision(config)),
    "clip": lambda config: CLIP(configs.clip_both(config)),
    "llama": lambda config: LanguageModel(configs.llama_decoder(config)),
    "opt": lambda config: LanguageModel(configs.opt_decoder(config)),
    "bert": lambda config: Bert(configs.bert(config)),
    "bert (words)": lambda config: MaskedLM(configs.bert(config)),
    "blip-2": lambda config: BLIP2(configs.blip2(config, retrieval=False)),
    "blip-2 (retrieval)": lambda config: BLIP2Stage1(configs.blip2(config, retrieval=True)),
    "t5": lambda config: LanguageModel(configs.t5(config)),
    "llava": lambda config: LLaVA(configs.llava(config)),
    "llava_next": lambda config: LLaVA(configs.llava_next(config)),
    "llava (original)": lambda config: LLaVA(configs.original_llava(config)),
}


def from_hf(config: dict, state: State) -> nn.Module:
    """The content of config.json and the checkpoint's tensors → our model, see the table at the top of the file."""
    kind = kind_of(config)
    if kind not in BUILD:
        known = ", ".join(name for name in BUILD if " " not in name)
        raise UserError(f"config.json: model_type is {kind!r}; the supported ones are {known}.")
    try:
        with torch.device("meta"):
            model = BUILD[kind](config)
    except ValueError as error:  # a width that is no multiple of the heads, say
        raise UserError(f"config.json: {error}.") from error
    state = as_ours(kind, state)
    problems = fill(model, state, LAYOUTS[kind])
    if problems:
        message = f"The tensors do not fit config.json: {'; '.join(problems)}."
        if kind == "llava (original)" and not any(name.endswith("post_layernorm.weight") for name in state):
            message += " Original LLaVA checkpoints hold no vision tower; add it: load(folder, vision=its_folder)."
        raise UserError(message)
    return model


def kind_of(config: dict) -> str | None:
    """model_type, and where one type has several classes with parts of their own, which of them."""
    kind, (saved, *_) = config.get("model_type"), config.get("architectures") or [""]
    if is_original_llava(config):
        return "llava (original)"
    if kind == "bert" and saved in ("BertForMaskedLM", "BertForPreTraining"):
        return "bert (words)"
    return "blip-2 (retrieval)" if kind == "blip-2" and saved == "Blip2ForImageTextRetrieval" else kind


def is_original_llava(config: dict) -> bool:
    """Both codes call their model_type "llava"; only the original one has fields like mm_hidden_size."""
    return config.get("model_type") in ("llava", "llava_llama") and any(name.startswith("mm_") for name in config)


def fill(model: nn.Module, state: State, layouts: tuple[Names, ...]) -> list[str]:
    """Put each tensor of `state` in its place; returns what does not fit, and then fills nothing."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith(NOT_OURS)}
    layout = max(layouts, key=lambda table: sum(translate(name, table) is not None for name in state))
    wanted = model.state_dict()
    found, problems = {}, []
    for name, tensor in state.items():
        ours = translate(name, layout)
        if ours in wanted and ours not in found:
            found[ours] = tensor
            if tensor.shape != wanted[ours].shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(wanted[ours].shape)}")
        elif ours not in TIED or not is_tied(tensor, TIED[ours], state, layout):
            problems.append(f"{name} is unused")
    problems += [f"{translate(ours, backwards(layout))} is missing" for ours in wanted if ours not in found]
    if not problems:
        model.load_state_dict(found, assign=True)
    return problems


def is_tied(tensor: Tensor, original: str, state: State, layout: Names) -> bool:
    """Whether a tensor that our model does without is `original` once more: some files hold it twice."""
    found = [other for name, other in state.items() if translate(name, layout) == original]
    return len(found) == 1 and torch.equal(tensor, found[0])


def as_ours(kind: str, state: State) -> State:
    """What is the same thing in another form: CLIP's temperature, BLIP-2's three maps in one."""
    if "logit_scale" in state:  # CLIP multiplies by exp(logit_scale), ours divides by τ
        return {**state, "logit_scale": torch.exp(-state["logit_scale"])}
    if not kind.startswith("blip-2"):
        return state
    found = {}
    for name, tensor in state.items():
        if ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3)):
                if name.endswith("bias") and part == "k":
                    if third.any():  # EVA-CLIP's keys have no bias: zeros fill the place in LAVIS
                        raise UserError(f"{name}: the key's third is not zero, but the encoder's keys have no bias.")
                    continue
                found[name.replace("qkv", f"{part}_proj")] = third
        else:  # (1, Q, D), (1, 1, D) and (1, 1 + N, D): ours have no axis for the batch
            alone = name.endswith(("query_tokens", "class_embedding", "position_embedding"))
            found[name] = tensor.flatten() if name.endswith("class_embedding") else tensor[0] if alone else tensor
    return found


# --- from disk ---

def load(folder: str | Path, vision: str | Path | None = None) -> nn.Module:
    """The model in a checkpoint's folder: config.json and *.safetensors (`pip install safetensors`).

    vision: the folder of the CLIP tower that an original LLaVA checkpoint was trained with.
    """
    config, state = read_json(Path(folder) / "config.json"), read_tensors(Path(folder))
    if vision is not None:
        if not is_original_llava(config):
            raise UserError(f"{folder}: vision= adds the tower that an original LLaVA checkpoint lacks; this is none.")
        eyes, tower = read_tower(Path(vision))
        config = {**config, "vision_config": eyes}
        state = {**state, **tower}
    try:
        return from_hf(config, state)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def read_tower(folder: Path) -> tuple[dict, State]:
    """A CLIP checkpoint's vision config and tensors, all named `vision_model.…`."""
    config, state = read_json(folder / "config.json"), read_tensors(folder)
    kind = config.get("model_type")
    if kind == "clip":  # both towers: the text's stays behind
        return (config.get("vision_config") or {"model_type": "clip_vision_model"},
                {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")})
    if kind == "clip_vision_model":
        return config, {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in state.items()}
    raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}; a vision tower is clip or clip_vision_model.")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}): a checkpoint's folder must have it.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, where an object with named fields is needed.")
    return value


def read_tensors(folder: Path) -> State:
    """All tensors of a folder by name; where there is an index, it says which files belong together."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError("Published weights are read with the package safetensors: pip install safetensors") from error
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise UserError(f"{index}: the field weight_map (tensor: file) is missing: download it again.")
        files = [folder / name for name in sorted(set(where.values()))]
    else:
        files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors; if it has *.bin files, let transformers convert them: "
                        "AutoModel….from_pretrained(folder).save_pretrained(other_folder).")
    state = {}
    for file in files:
        try:
            state.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} could not be read ({error}): download it again.") from error
    return state
