"""InstructBLIP: the queries of BLIP-2 are told what will be asked before they look.

"InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning" (2305.06500) §2.3, Fig. 3

    image ─► ViT, frozen ─► norm ─► image tokens (B, N, D_v) ─────────────┐ cross-attention: queries only
                                                                          ▼
    "what colour is the star?" ─► [CLS] … [SEP] ─► words (B, T_q, D) ─► Q-Former ─► [queries (B, Q, D) ; words, thrown away]
                     │                               queries (Q, D) ─────▲                 │ projection
                     │                     self-attention: all tokens see all tokens       ▼
                     └► "<s> what colour is the star?" ─► embeddings (B, T, D_lm) ─► [(B, Q, D_lm) ; (B, T, D_lm)] ─► frozen LM ─► "red"

The instruction goes in twice, each time in the reader's own tokens. A few queries cannot carry all that a photograph shows.
Queries that know the question can carry what answers it. With `asks` off they do not read the instruction and bring back the same
for every question: the paper's ablation (Table 2).

    clip of F frames ─► each frame by itself, with the same instruction ─► (B, F · Q, D_lm), frame after frame (§2.5)

It starts from BLIP-2 (§2.3): everything from stage 2, and the Q-Former's text half from stage 1, which stage 2 does not have.
Learning: norm, Q-Former, projection. Loss: the response alone, which stands directly behind its instruction.

Legend: B batch, F frames, Q queries, N image tokens, T and T_q text tokens, D width.
Differs from the released code in: clips are trained on and asked in the same way as pictures; batches may mix clips of several
lengths, the missing frames being padding before the first.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from nanovlm import generation
from nanovlm.attention import KVCache
from nanovlm.contract import Batch, Gather, Reads, alone
from nanovlm.lm_loss import Output
from nanovlm.papers.blip2 import BLIP2, BLIP2Config, answer_loss, most_asked, output, prefill

FRAMES = 4  # of a clip, evenly spread (§2.5)


class InstructBLIP(nn.Module):
    """One picture or clip before each instruction. `config.asks`: the Q-Former reads the instruction, too.

    qformer_input_ids and qformer_attention_mask (B, T_q), padded on the right, are the instruction in the Q-Former's own words, between
    its own [CLS] and [SEP].
    """

    whole_batch = False
    whole_weights = False

    def __init__(self, config: BLIP2Config):
        super().__init__()
        self.config = config
        self.reads = Reads("conversations", question=most_asked(config.qformer) if config.asks else 0, frames=FRAMES)
        blip2 = BLIP2(config)  # the same parts under the same names
        self.vision, self.vision_norm = blip2.vision, blip2.vision_norm
        self.qformer, self.projection, self.language = blip2.qformer, blip2.projection, blip2.language
        self.unheard = blip2.unheard

    def encode_image(self, images: Tensor) -> Tensor:
        """images (n, 3, h, w) → image tokens (n, 1 + N, D_v), normed."""
        return self.vision_norm(self.vision(images))

    def queries(self, images: Tensor, qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None,
                maps: list | None = None, looks: list | None = None) -> Tensor:
        """images (B, 3, h, w), or clips (B, F, 3, h, w) → what the queries bring back: (B, Q, D) or (B, F · Q, D).

        maps, looks: attention weights, see QFormer.forward.
        """
        clips = images if images.ndim == 5 else images[:, None]  # (B, F, 3, h, w): a picture is a clip of one frame
        F = clips.shape[1]
        image_tokens = self.encode_image(clips.flatten(0, 1))  # (B · F, 1 + N, D_v)
        asked = [None if t is None else t.repeat_interleave(F, dim=0) for t in (qformer_input_ids, qformer_attention_mask)]
        found = self.qformer.bring_back(image_tokens, *asked, maps=maps, looks=looks)  # (B · F, Q, D)
        return found.unflatten(0, (-1, F)).flatten(1, 2)  # (B, F · Q, D)

    def image_prefix(self, images: Tensor, qformer_input_ids: Tensor | None = None,
                     qformer_attention_mask: Tensor | None = None) -> Tensor:
        """→ (B, F · Q, D_lm), what the language model reads in place of the picture or clip."""
        return self.projection(self.queries(images, qformer_input_ids, qformer_attention_mask))

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None,
                qformer_input_ids: Tensor | None = None, qformer_attention_mask: Tensor | None = None,
                frames: Tensor | None = None) -> Output:
        """logits: a decoder's (B, F · Q + T, V); an encoder-decoder's (B, T_out + 1, V), the last after the whole answer.

        frames: bool (B, F), which frames there are; all, unless told. The loss where labels are given, without which an
        encoder-decoder has nothing to say.
        """
        prefix = self.image_prefix(images, qformer_input_ids, qformer_attention_mask)
        return output(self.language, prefix, input_ids, attention_mask, labels, self.there(frames))

    def there(self, frames: Tensor | None) -> Tensor | None:
        """Which places of the prefix are no padding: frames bool (B, F) → (B, F · Q)."""
        return None if frames is None else frames.repeat_interleave(self.config.qformer.queries, dim=1)

    def losses(self, batch: Batch, gather: Gather = alone) -> dict[str, tuple[Tensor, Tensor]]:
        """{"lm": (sum over what is to be said, their number)}; batch as made by `Collate.teach`."""
        return {"lm": answer_loss(self.language, self.prefix_of(batch), batch, self.there(batch.get("frames")))}

    def prefix_of(self, batch: Batch) -> Tensor:
        return self.image_prefix(batch["images"], batch.get("qformer_input_ids"), batch.get("qformer_attention_mask"))

    def prefill(self, batch: Batch) -> tuple[Tensor, KVCache]:
        """Read prompts behind their pictures' prefixes: next-token logits (B, V), cache."""
        return prefill(self.language, self.prefix_of(batch), batch, self.there(batch.get("frames")))

    def step(self, ids: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        """Read further words (B, T): logits (B, T, V) and the cache."""
        return self.language.step(ids, cache)

    def generate(self, batch: Batch, room: int, stop: Sequence[int], **how) -> Tensor:
        """New token ids only, int64 (B, n)."""
        return generation.generate(lambda: self.prefill(batch), self.step, room, stop, **how)
