"""DART in one process, under the published names: `compute_loss`, `forward`, `generate`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.base import TokenInputs, num_scored_in
from models.dart.carry import DARTOutput
from models.dart.config import DARTConfig
from models.dart.generation import fill_in
from models.dart.layers import check_length
from models.dart.model import layer_specs, loss
from models.dart.modes import (
    Mode,
    Request,
    check_guidance,
    check_id,
    check_steps,
    continue_rows,
    evaluating,
    row_lengths,
    sampling_of,
)
from models.dart.sampling import Sampling
from models.standalone.model import check_tensor, check_tokens
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from parallel.cross_entropy import IGNORED_LABEL


class DARTGenerateOutput(NamedTuple):
    """`sequences` int64 [b, s]; `sequence_lengths` int64 [b], up to and including the first
    `eos_token_id` after the prompt; `num_passes`: sequential forward passes."""

    sequences: Tensor
    sequence_lengths: Tensor
    num_passes: int


class DART(nn.Module):
    """A DART with the published interface; `body` holds the layers."""

    def __init__(
        self, config: DARTConfig, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.body = SequentialModel(
            layer_specs(config), ParallelContext.single(device=device), seed=seed
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Both streams for tokens [b, s]: `ar_logits` and `diffusion_output` [b, s, V], of the
        token after each, and `timesteps` [b, s], the noise level at which the second was made.

        In training mode blocks have noise; in evaluation all are hidden, and `ar_logits` are those
        of an autoregressive model. `attention_mask` [b, s]: zeros after a row's tokens.

        Raises:
            ValueError: padding before or between tokens, tokens outside the vocabulary, or more of
                them than the model has positions.
        """
        check_tokens(input_ids, vocab_size=self.config.vocab_size)
        _check_mask(input_ids, attention_mask)
        output: DARTOutput = self.body(_inputs(input_ids, attention_mask))
        return {
            "ar_logits": output.logits.transpose(0, 1),
            "diffusion_output": output.draft_logits.transpose(0, 1),
            "timesteps": output.levels,
        }

    def compute_loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """The losses of tokens [b, s + 1], each from those before it, in nats per token.

        `loss` is what to minimise; with `label_smoothing` it contains the smoothed causal loss.
        `ar_loss`, `ar_perplexity` (its exponential), `diffusion_loss` and `draft_loss` are not
        smoothed. `ar_perplexity` is exact in evaluation mode alone, where the other two are 0 and
        that of completely hidden blocks.

        Raises:
            ValueError: see `forward`; fewer than 2 tokens; a smoothing outside of [0, 1).
        """
        check_tokens(input_ids, vocab_size=self.config.vocab_size)
        if input_ids.shape[1] < 2:
            raise ValueError(
                f"input_ids of shape {list(input_ids.shape)} have no token to predict; give rows "
                "of 2 or more"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing={label_smoothing} must be at least 0 and below 1; use 0 for none"
            )
        _check_mask(input_ids, attention_mask)
        labels, rows = input_ids[:, 1:], input_ids[:, :-1].contiguous()
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask[:, 1:] == 0, IGNORED_LABEL)
        output: DARTOutput = self.body(_inputs(rows, attention_mask))
        total, terms = loss(output, labels, config=self.config, ctx=self.body.ctx)
        if label_smoothing:
            scored = (labels != IGNORED_LABEL).T
            logs = output.logits.log_softmax(dim=-1)
            own = logs.gather(-1, labels.T.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            less = ((own - logs.mean(dim=-1)) * scored).sum() / num_scored_in(labels)
            total = total + self.config.ar_weight * label_smoothing * less
        return {
            "loss": total,
            "ar_loss": terms["lm_loss"],
            "ar_perplexity": terms["lm_loss"].exp(),
            "diffusion_loss": terms["diffusion_loss"],
            "draft_loss": terms["draft_loss"],
        }

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        max_length: int | None = None,
        mode: Mode = "ar",
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = 0.9,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,
        num_diffusion_steps: int | None = None,
        guidance_scale: float = 1.0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        return_dict: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor | DARTGenerateOutput:
        """Continue rows `input_ids` int64 [b, s] to `max_length` tokens, the prompt included; None
        begins with `bos_token_id`. Returns int64 [b, max_length], shorter where all rows have
        ended; a row that has produced `eos_token_id`, after the prompt, is filled with it.

        ar: one token per pass. diffusion: blocks of `config.block_size` tokens in
        `num_diffusion_steps` passes each, by default one per token. speculative: the law of ar,
        from drafts of the diffusion stream, row by row. `guidance_scale`: 1 is none; for text 1.2
        to 2 are common, and far larger ones, made for images, leave little but the most guided
        token. `return_dict`: returns a `DARTGenerateOutput`.

        Raises:
            ValueError: a setting out of its range or without effect.
        """
        if input_ids is None:
            if bos_token_id is None:
                raise ValueError("input_ids=None begins with bos_token_id; give one of the two")
            check_id(self.config, "bos_token_id", bos_token_id)
            input_ids = torch.tensor([[bos_token_id]], device=self.body.ctx.device)
        check_tokens(input_ids, vocab_size=self.config.vocab_size)
        sampling = sampling_of(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            do_sample=do_sample,
            generator=generator,
        )
        request = Request(
            mode,
            self.config.max_position_embeddings if max_length is None else max_length,
            sampling,
            guidance_scale,
            eos_token_id,
            num_diffusion_steps,
        )
        generated = continue_rows(self.body, self.config, input_ids, request)
        if not return_dict:
            return generated.tokens
        lengths = row_lengths(generated.tokens, input_ids.shape[1], eos_token_id)
        return DARTGenerateOutput(generated.tokens, lengths, generated.num_passes)

    @torch.no_grad()
    def infill(
        self,
        input_ids: Tensor,
        known: Tensor,
        *,
        num_diffusion_steps: int | None = None,
        sampling: Sampling | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Fill in the tokens of rows int64 [b, s] where `known` bool [b, s] is False; what stands
        there is not read.

        A block sees what comes before it and the known tokens in it; nothing sees later blocks.

        Raises:
            ValueError: the first token is not known, `known` is no such tensor, or a setting is out
                of its range.
        """
        check_tensor("input_ids", input_ids)
        check_tensor("known", known)
        if known.dtype != torch.bool or known.shape != input_ids.shape:
            raise ValueError(
                f"known {str(known.dtype).removeprefix('torch.')}{list(known.shape)} must be "
                f"bool{list(input_ids.shape)}, as input_ids; write known.bool() or ids >= 0"
            )
        input_ids = input_ids.masked_fill(~known, 0)
        check_tokens(input_ids, vocab_size=self.config.vocab_size)
        check_length(self.config, input_ids.shape[1])
        check_guidance(guidance_scale)
        check_steps("diffusion", num_diffusion_steps)
        sampling = sampling or Sampling()
        sampling.check()
        if not bool(known[:, 0].all()):
            raise ValueError(
                "known[:, 0] is False: nothing predicts the first token; put a token that begins "
                "texts before it"
            )
        with evaluating(self.body):
            return fill_in(
                self.body,
                self.config,
                input_ids,
                known,
                num_steps=num_diffusion_steps or self.config.block_size,
                sampling=sampling,
                guidance_scale=guidance_scale,
            ).tokens


def _inputs(tokens: Tensor, mask: Tensor | None) -> TokenInputs:
    """Rows int64 [b, s] of which the mask [b, s or more] shows as many as it has ones."""
    if mask is None:
        return TokenInputs(tokens)
    lengths = (mask != 0).sum(dim=1).clamp(max=tokens.shape[1])
    return TokenInputs(tokens, lengths=lengths)


def _check_mask(tokens: Tensor, mask: Tensor | None) -> None:
    if mask is not None and (
        mask.shape != tokens.shape or bool((mask[:, 1:] > mask[:, :-1]).any())
    ):
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)} must be {list(tokens.shape)} with ones "
            "and then zeros in every row: put padding after the tokens"
        )
