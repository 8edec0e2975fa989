"""The model as it comes, with the library's default attention: what any attribution must run, and nothing else."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from neuroplast.interventions.chunks import Chunk, build_chunk
from neuroplast.models.attention import ATTENTION
from neuroplast.models.network import Network, logits_at, unembedding_of
from neuroplast.tasks.prompts import PromptSet


@contextmanager
def plain_attention(model: Network) -> Generator[None]:
    """The fastest attention that the library has for any model."""
    model.module.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.module.set_attn_implementation(ATTENTION)


class PlainPasses:
    """Forward and backward passes of one batch of prompts, up to the last END; no gradients of weights."""

    def __init__(self, model: Network, prompts: PromptSet) -> None:
        self.model = model
        self.chunk: Chunk = build_chunk(prompts, torch.arange(len(prompts)), model.device)
        self.rows = torch.arange(len(prompts), device=model.device)

    def forward(self, *, counterfactual: bool = False) -> Float[Tensor, "prompt vocab"]:
        """The logits at END."""
        prompts = self.chunk.prompts
        tokens = prompts.counterfactual if counterfactual else prompts.clean
        with plain_attention(self.model), torch.no_grad():
            return logits_at(self.model.module, tokens, self.rows, self.chunk.end)

    def backward(self) -> Float[Tensor, "prompt pos d_model"]:
        """A forward pass on the clean prompts, then the gradient of the logit difference in their embeddings."""
        module, prompts = self.model.module, self.chunk.prompts
        with plain_attention(self.model), torch.enable_grad():
            leaf = module.get_input_embeddings()(prompts.clean).detach().requires_grad_()
            head = unembedding_of(module)
            handle = head.register_forward_pre_hook(lambda _, args: (args[0][self.rows, self.chunk.end][None],))
            try:
                mask = torch.ones_like(prompts.clean)
                logits = module(inputs_embeds=leaf, attention_mask=mask, use_cache=False).logits[0]
            finally:
                handle.remove()
            difference = logits[self.rows, prompts.answer] - logits[self.rows, prompts.foil]
            return torch.autograd.grad(difference.sum(), leaf)[0]
