"""open_flamingo's checkpoints: its resampler, its gated layers and the rows of its two new tokens become ours.

"OpenFlamingo" (2308.01390); names and shapes are those of its code, version 2.0.1

    checkpoint.pt ─► perceiver.*                               ─► resampler
                     lang_encoder.gated_cross_attn_layers.3.*  ─► gated_xattn["3"]     3: the LM's layer that it stands before
                     the LM's embedding, two rows of it        ─► tags
                     everything else belongs to the frozen CLIP and LM, which are published elsewhere

There is no config.json: sizes are read from the shapes, and which layers have a gated one from their names. Only the number of
heads leaves no trace; it is 8 for all that were published.

    bridge = open_flamingo.load("OpenFlamingo-3B-vitl-mpt1b/checkpoint.pt")
    flamingo.resampler, flamingo.gated_xattn = bridge.resampler, bridge.gated_xattn          in any Flamingo of these widths

What differs from Flamingo is in the modules that come back: GELU, an inner width of 512 at every scale, no time embeddings, and the
gated layer stands before the last layer of each group of k, not before the first.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from nanovlm.errors import UserError
from nanovlm.gated_xattn import GatedCrossAttention
from nanovlm.hub import State, as_ours, fill, names
from nanovlm.perceiver_resampler import PerceiverResampler, ResamplerConfig

# lang_encoder.gated_cross_attn_layers.3. or lang_encoder.transformer.blocks.3.gated_cross_attn_layer., and some files have both
GATED = re.compile(r"^lang_encoder\.(?:gated_cross_attn_layers\.(\d+)|.*?\.(\d+)\.gated_cross_attn_layer)\.")
EMBEDDINGS = ("wte.weight", "embed_in.weight", "embed_tokens.weight")  # MPT, GPT-NeoX, LLaMA and OPT


def load(path: str | Path, **how) -> nn.ModuleDict:
    """The file that is published, or one that open_flamingo's training wrote; `how` as in `from_state`. No code in it is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} could not be read as a file of tensors ({type(error).__name__}): download it again.") from error
    state = state.get("model_state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds something else than tensors by name.")
    try:
        return from_state(state, **how)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_state(state: State, tags: tuple[int, int] | None = None, heads: int = 8) -> nn.ModuleDict:
    """Tensors by open_flamingo's names → resampler, gated_xattn and tags, called as in papers/flamingo.py, in eval().

    tags: the ids of <image> and <|endofchunk|> in its tokenizer; without them their embeddings are left behind.
    """
    state, found = {name.removeprefix("module."): tensor for name, tensor in state.items()}, {}  # as DDP saves it
    for name, tensor in state.items():
        mine = GATED.sub(lambda match: f"gated_cross_attn_layers.{match[1] or match[2]}.", name)
        for letter, part in zip("kv", tensor.chunk(2)) if "to_kv" in mine else [("", tensor)]:  # keys stand above the values
            place = mine.replace("to_kv", f"to_{letter}")
            if not torch.equal(part, found.get(place, part)):
                raise UserError(f"{name} differs from the same layer's other copy in this file.")
            if place.startswith(("perceiver.", "gated_cross_attn_layers.")):
                found[place] = part
    if "perceiver.media_time_embs" in found:
        raise UserError("perceiver.media_time_embs numbers the images of a page; Flamingo does not, and no code here reads it.")
    with torch.device("meta"):
        bridge = empty(found, heads)
    problems = fill(bridge, as_ours(found), names.OPEN_FLAMINGO, {})
    if problems:
        raise UserError(f"The tensors are not those of open_flamingo: {'; '.join(problems)}.")
    bridge.tags = None if tags is None else nn.Parameter(rows_of(state, tags))
    return bridge.eval()


def empty(state: State, heads: int) -> nn.ModuleDict:
    """The modules, with the sizes that the shapes tell."""
    def size(name: str, axis: int, parts: int = 1) -> int:
        if name not in state:
            raise UserError(f"{name} is missing: this is no checkpoint of open_flamingo.")
        if (n := state[name].shape[axis]) % parts:
            raise UserError(f"{name} has {n} rows, which are not a multiple of {parts} heads.")
        return n // parts

    layers = len({name.split(".")[2] for name in state if name.startswith("perceiver.layers.")})
    config = ResamplerConfig(size("perceiver.latents", 1), layers, heads, size("perceiver.layers.0.0.to_q.weight", 0, heads),
                             size("perceiver.latents", 0), len(state.get("perceiver.frame_embs", ())), activation="gelu")
    gated = nn.ModuleDict()
    for i in sorted({int(name.split(".")[1]) for name in state if name.startswith("gated_cross_attn_layers.")}):
        query = f"gated_cross_attn_layers.{i}.attn.to_q.weight"
        gated[str(i)] = GatedCrossAttention(size(query, 1), config.width, heads, size(query, 0, heads), "gelu")
    if not gated:
        raise UserError("gated_cross_attn_layers are missing: this is no checkpoint of open_flamingo.")
    return nn.ModuleDict({"resampler": PerceiverResampler(config), "gated_xattn": gated})


def rows_of(state: State, ids: tuple[int, int]) -> Tensor:
    """The embeddings (2, D) of two tokens. Where the LM has a head of its own, open_flamingo does not train the head's rows."""
    tables = [name for name in state if name.endswith(EMBEDDINGS)]
    if len(tables) != 1:
        raise UserError(f"Which table has the tokens' embeddings? Of {' and '.join(EMBEDDINGS)} the file has {len(tables)}.")
    table = state[tables[0]]
    if max(ids) >= len(table):
        raise UserError(f"Token {max(ids)} has no row in {tables[0]}, which has {len(table)}.")
    return table[list(ids)].clone()
