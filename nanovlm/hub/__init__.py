"""Published weights: a Hugging Face checkpoint goes in, our model comes out, with every tensor in its place.

    config.json ───► sizes (configs.py) ─► our model, empty, on the meta device
                                               │
    *.safetensors ─► our names (names.py) ─► filled: nothing is copied, the dtypes stay
      (disk.py)

CLASSES below says which published class becomes which model of ours; `architectures` in config.json names the class.
A tensor that is missing, left over or of another shape is an error that lists all of them: a model that is half loaded
still talks, only worse. What comes back is in eval(): call .train() to train it.

LlavaLlamaForCausalLM, the class of the original code, saves no vision tower in most cases, only its name: then add it,

    load("llava-v1.5-7b", vision="clip-vit-large-patch14-336")                                       from disk
    from_hf({**config, "vision_config": clip_config}, {**tensors, **clip_vision_tensors})            from memory

The model takes over the tensors of `state` themselves, so training it changes them. Where they are of several dtypes
(an original LLaVA in fp16 with its tower in fp32) all take that of the largest tensor.
Differs from Hugging Face in: one id stands for an image in the sequence, not one for each of its tokens.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovlm.bert import Bert
from nanovlm.errors import UserError
from nanovlm.hub import configs, disk, names
from nanovlm.papers.blip import BLIP
from nanovlm.papers.blip2 import BLIP2, BLIP2Stage1
from nanovlm.papers.blip_downstream import BLIPAnswerer
from nanovlm.papers.clip import CLIP
from nanovlm.papers.instructblip import InstructBLIP
from nanovlm.papers.language_model import LanguageModel
from nanovlm.papers.llava import LLaVA
from nanovlm.papers.masked_language_model import MaskedLanguageModel
from nanovlm.vit import ViT

State = dict[str, Tensor]
WITHOUT_KEY_BIAS = ("blip-2", "instructblip")  # in whose vision tower, EVA-CLIP, keys have no bias
TIE = " (or tie_word_embeddings in config.json must be {})"


class Published(NamedTuple):
    kind: str  # model_type in config.json
    model: type[nn.Module]
    config: Callable[[dict], object]
    names: names.Names  # of tensors: what the files say, what we say
    renames: names.Names  # what some files say, what `names` says


CLASSES = {
    "CLIPVisionModel": Published("clip_vision_model", ViT, configs.clip_vision, names.CLIP_VISION, {"^vision_model.": "^"}),
    "ViTModel": Published("vit", ViT, configs.imagenet_vit, names.IMAGENET_VIT, names.OLD_VIT),
    "ViTForImageClassification": Published("vit", ViT, configs.imagenet_vit, names.IMAGENET_VIT, names.OLD_VIT),
    "CLIPModel": Published("clip", CLIP, configs.clip, names.CLIP, {}),
    "LlamaForCausalLM": Published("llama", LanguageModel, configs.llama, names.LLAMA, {}),
    "OPTForCausalLM": Published("opt", LanguageModel, configs.opt_decoder, names.OPT, {"^decoder.": "^model.decoder."}),
    "T5ForConditionalGeneration": Published("t5", LanguageModel, configs.t5, names.T5, {}),
    "BertModel": Published("bert", Bert, configs.bert, names.BERT, {"^bert.": "^", **names.OLD_BERT}),
    "BertForMaskedLM": Published("bert", MaskedLanguageModel, configs.bert, names.MASKED_LM, names.OLD_BERT),
    "BertForPreTraining": Published("bert", MaskedLanguageModel, configs.bert, names.MASKED_LM, names.OLD_BERT),
    "BlipForConditionalGeneration": Published("blip", BLIP, partial(configs.blip, tasks=("lm",)), names.BLIP_CAPTIONS, {}),
    "BlipForQuestionAnswering": Published("blip", BLIPAnswerer, configs.blip_answerer, names.BLIP_ANSWERS, {}),
    "BlipForImageTextRetrieval": Published(  # without temperature, slow copies and queue
        "blip", BLIP, partial(configs.blip, tasks=("itc", "itm")), names.BLIP_RETRIEVAL, {}),
    "Blip2ForConditionalGeneration": Published("blip-2", BLIP2, configs.blip2, names.BLIP2, {}),
    "Blip2ForImageTextRetrieval": Published(  # without word head and temperature
        "blip-2", BLIP2Stage1, partial(configs.blip2, retrieval=True), names.BLIP2_RETRIEVAL, {}),
    "InstructBlipForConditionalGeneration": Published("instructblip", InstructBLIP, configs.instructblip, names.INSTRUCTBLIP, {}),
    "LlavaForConditionalGeneration": Published("llava", LLaVA, configs.llava, names.LLAVA, names.HF_LLAVA),
    "LlavaNextForConditionalGeneration": Published("llava_next", LLaVA, configs.llava_next, names.LLAVA, names.HF_LLAVA),
    "LlavaLlamaForCausalLM": Published("llava_llama", LLaVA, configs.original_llava, names.LLAVA, names.ORIGINAL_LLAVA),
}


def from_hf(config: dict, state: State) -> nn.Module:
    """The content of config.json and the checkpoint's tensors → our model in eval(), see CLASSES."""
    published = CLASSES[class_of(config)]
    try:
        with torch.device("meta"):
            model = published.model(published.config(config))
    except ValueError as error:  # a width that is no multiple of the heads, say
        raise UserError(f"config.json: {error}.") from error
    state = as_ours(state, key_bias=published.kind not in WITHOUT_KEY_BIAS)
    problems = fill(model, state, published.names, published.renames)
    if problems:
        message = f"The tensors do not fit config.json: {'; '.join(problems)}."
        if published.kind == "llava_llama" and "post_layernorm" not in " ".join(state):
            message += " Original LLaVA checkpoints hold no vision tower; add it: load(folder, vision=its_folder)."
        raise UserError(message)
    return model.eval()


def class_of(config: dict) -> str:
    """The class that was saved; where config.json leaves it out, the first of the model_type."""
    kind, saved = config.get("model_type"), config.get("architectures")
    if not saved and kind == "llava" and "mm_vision_tower" in config:  # two codes call themselves "llava"
        return "LlavaLlamaForCausalLM"
    name = (saved or [name for name in CLASSES if CLASSES[name].kind == kind] or [None])[0]
    if name in CLASSES:
        return name
    if saved:
        raise configs.refused("architectures", saved, f"supported: {', '.join(CLASSES)}")
    raise configs.refused("model_type", kind, f"supported: {', '.join({p.kind: 0 for p in CLASSES.values()})}")


def fill(model: nn.Module, state: State, table: names.Names, renames: names.Names) -> list[str]:
    """Put each tensor of `state` in its place; returns what does not fit, and then fills nothing."""
    wanted, found, names_of, problems = model.state_dict(), {}, {}, []
    for name, tensor in state.items():
        mine = names.translate(names.normalise(name, renames), table)
        ours = mine if mine in wanted else names.TIED.get(mine)  # some files hold a tensor twice
        if ours not in wanted:
            problems.append(f"{name} is unused")
        elif ours not in found:
            while tensor.ndim > wanted[ours].ndim and len(tensor) == 1:  # (1, Q, D): ours have no axis for the batch
                tensor = tensor[0]
            found[ours], names_of[ours] = tensor, name
            if tensor.shape != wanted[ours].shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(wanted[ours].shape)}")
        elif not torch.equal(tensor, found[ours]):
            hint = TIE.format("false") if "head" in mine else ""
            problems.append(f"{name} differs from {names_of[ours]}, but in our model they are one{hint}")
    for ours in (name for name in wanted if name not in found):
        theirs = " or ".join(names.originals(ours, table, renames, list(state)))
        problems.append(f"{theirs} is missing{TIE.format('true') if ours in names.TIED else ''}")
    if not problems:
        model.load_state_dict(found, assign=True)
    return problems


def as_ours(state: State, key_bias: bool = True) -> State:
    """Without what is no weight, and with what is the same thing in another form: CLIP's temperature, three maps in one.

    key_bias: whether the keys of three maps in one have a bias; those of EVA-CLIP have none.
    """
    found = {}
    for name, tensor in state.items():
        if name.endswith(names.NOT_OURS):
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise UserError(f"{name} holds {tensor.dtype} numbers; {configs.QUANTIZED}.")
        if name == "logit_scale":  # CLIP multiplies by exp(logit_scale), ours divides by τ
            found[name] = torch.exp(-tensor)
        elif ".qkv." in name:  # the vision towers of BLIP, BLIP-2 and InstructBLIP
            for part, third in zip("qkv", tensor.chunk(3)):
                if key_bias or not name.endswith("bias") or part != "k":
                    found[name.replace("qkv", f"{part}_proj")] = third
                elif third.any():  # EVA-CLIP's keys have no bias: zeros fill the place in LAVIS
                    raise UserError(f"{name}: the key's third is not zero, but the encoder's keys have no bias.")
        else:
            found[name] = tensor
    dtype = max(found.values(), key=Tensor.numel, default=torch.empty(0)).dtype
    return {name: tensor.to(dtype) for name, tensor in found.items()}  # none is copied where all are of one dtype


# --- from disk ---

def load(folder: str | Path, vision: str | Path | None = None) -> nn.Module:
    """The model in a checkpoint's folder: config.json and *.safetensors (`pip install safetensors`).

    vision: the folder of the CLIP tower that an original LLaVA checkpoint was trained with.
    """
    folder = Path(folder)
    config, state = disk.read_json(folder / "config.json"), disk.read_tensors(folder)
    try:
        if vision is not None:
            if class_of(config) != "LlavaLlamaForCausalLM":
                raise UserError("vision= adds the tower that an original LLaVA checkpoint lacks; this is none.")
            eyes, tower = read_tower(Path(vision))
            config, state = {**config, "vision_config": eyes}, {**state, **tower}
        return from_hf(config, state)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def read_tower(folder: Path) -> tuple[dict, State]:
    """A CLIP checkpoint's vision config and tensors."""
    config, state = disk.read_json(folder / "config.json"), disk.read_tensors(folder)
    kind = config.get("model_type")
    if kind == "clip":  # both towers: the text's stays behind
        eyes, _ = configs.clip_section(config, "vision_config", configs.CLIP_VISION)
        return eyes, {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    if kind == "clip_vision_model":
        return config, state
    raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}; a vision tower is clip or clip_vision_model.")
