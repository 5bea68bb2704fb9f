"""Parallel layers against nn.Linear, nn.Embedding and a whole-vocabulary softmax."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import parallel.megatron  # noqa: F401  imported once here, not in every forked rank
from models.common.norms import HeadNorm
from parallel.context import Axis, ParallelContext
from parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    gather_logits,
    project_together,
)
from parallel.random import initialize
from parallel.sharding import (
    Constant,
    Normal,
    declare_replicated,
    merge,
    sharding_of,
    split,
    sum_partial_gradients,
)
from tests.distributed import run_ranks
from tests.refusals import assert_refused
from tests.tolerance import assert_close, rounding

SEQ, BATCH, HIDDEN, INNER, VOCAB = 8, 2, 12, 20, 37
MODES = [(1, False), (2, False), (2, True), (4, False), (4, True)]


class Block(nn.Module):
    """Every parallel layer once: tokens -> loss per token."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        self.ctx = ctx
        self.embedding = VocabParallelEmbedding(VOCAB, HIDDEN, ctx=ctx, init=Normal(1.0))
        self.single = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx, bias=True, init=Normal(0.3))
        self.left = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx, bias=True, init=Normal(0.3))
        self.right = ColumnParallelLinear(HIDDEN, INNER, ctx=ctx, init=Normal(0.3))
        self.row = RowParallelLinear(INNER, HIDDEN, ctx=ctx, bias=True, init=Normal(0.3))
        self.head = VocabParallelHead(VOCAB, HIDDEN, ctx=ctx, init=Normal(0.5))
        for layer in (self.single, self.left, self.row):
            layer.bias.init = Constant(0.2)
        initialize(self, seed=5, prefix="layer", tensor_rank=ctx.tensor.rank)

    def forward(self, tokens):
        x = self.embedding(tokens).transpose(0, 1)
        left, right = project_together(x, self.left, self.right)
        y = self.row(torch.tanh(self.single(x)) + left * right)
        return self.head(x + y)


class Oracle(nn.Module):
    """The same in nn.Linear and nn.Embedding."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.single, self.left = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)
        self.right = nn.Linear(HIDDEN, INNER, bias=False)
        self.row, self.head = nn.Linear(INNER, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.load_state_dict(block.state_dict())

    def forward(self, tokens):
        x = self.embedding(tokens)
        y = self.row(torch.tanh(self.single(x)) + self.left(x) * self.right(x))
        return self.head(x + y)


def _data():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels[0, 3] = -100
    return tokens, labels


def _parallel_run(tensor: int, sequence_parallel: bool, dtype: torch.dtype = torch.float32):
    ctx = ParallelContext.from_world(tensor=tensor, sequence_parallel=sequence_parallel)
    block = Block(ctx).to(dtype)
    sum_partial_gradients(block, ctx)
    called: list[nn.Module] = []
    for layer in block.children():
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    tokens, labels = _data()
    logits = block(tokens)
    assert len(called) == len(set(called)) == 6, "every layer is called, and once"
    before = logits.detach().clone()
    losses = vocab_parallel_cross_entropy(logits, labels, ctx=ctx)
    losses.sum().backward()
    assert torch.equal(before, logits), "the loss must leave the logits as they are"
    gradients = {}
    for name, parameter in block.named_parameters():
        shards = [torch.empty_like(parameter.grad) for _ in range(tensor)]
        dist.all_gather(shards, parameter.grad.contiguous())
        gradients[name] = merge(shards, sharding_of(name, parameter))
    return gather_logits(before, ctx=ctx)[..., :VOCAB], losses.detach(), gradients


def test_a_frozen_parameter_has_no_gradient_to_sum_over_tensor_ranks():
    ctx = ParallelContext(tensor=Axis(size=2))
    norms = nn.ModuleList(HeadNorm(4, eps=1e-6, ctx=ctx) for _ in range(2))
    norms[0].requires_grad_(False)
    sum_partial_gradients(norms, ctx)
    frozen, trained = (norm.weight for norm in norms)
    assert not frozen._backward_hooks
    assert len(trained._backward_hooks) == 1


@pytest.mark.parametrize(("tensor", "sequence_parallel"), MODES)
def test_parallel_layers_match_unsharded_ones_in_output_loss_and_every_gradient(
    tensor, sequence_parallel
):
    oracle = Oracle(Block(ParallelContext.single()))
    tokens, labels = _data()
    logits = oracle(tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses.sum().backward()
    results = run_ranks(_parallel_run, tensor, tensor, sequence_parallel)
    for parallel_logits, parallel_losses, gradients in results:
        torch.testing.assert_close(parallel_logits.transpose(0, 1), logits.detach())
        torch.testing.assert_close(parallel_losses.T.flatten(), losses.detach())
        for name, parameter in oracle.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_a_padded_vocabulary_never_takes_part_in_the_softmax():
    assert VOCAB % 2, "the vocabulary must need padding for this to test anything"
    for logits, losses, _ in run_ranks(_parallel_run, 2, 2, False):
        labels = _data()[1].T
        whole = torch.log_softmax(logits.double(), -1)
        expected = -whole.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        expected = expected.masked_fill(labels == -100, 0.0)
        assert_close(losses, expected, rounding(torch.float32, depth=1, length=VOCAB))


def _bf16_logits_keep_their_bits():
    return _parallel_run(2, False, torch.bfloat16)[1].dtype


def test_the_loss_of_bf16_logits_is_fp32_and_leaves_them_untouched():
    assert run_ranks(_bf16_logits_keep_their_bits, 2) == [torch.float32] * 2


def test_at_tensor_size_1_the_layers_are_torch_s_own_classes():
    block = Block(ParallelContext.single())
    assert isinstance(block.embedding, nn.Embedding)
    # Exactly: tools look for the type.
    assert {type(x) for x in (block.single, block.left, block.row, block.head)} == {nn.Linear}
    assert set(block.state_dict()) == set(Oracle(block).state_dict())


@pytest.mark.parametrize("init", [Normal(1.0), lambda shape, g: torch.rand(shape, generator=g)])
def test_a_parameter_without_dimensions_is_drawn_as_one_of_one_element(init):
    ctx, scalar, vector = ParallelContext.single(), nn.Module(), nn.Module()
    scalar.scale = declare_replicated(nn.Parameter(torch.empty(())), init, ctx=ctx)
    vector.scale = declare_replicated(nn.Parameter(torch.empty(1)), init, ctx=ctx)
    for module in (scalar, vector):
        initialize(module, seed=3, prefix="layer", tensor_rank=0)
    assert scalar.scale.item() == vector.scale.item() != 0.0


def _changed(kind: str) -> tuple[list[nn.Module], list[torch.Tensor]]:
    """Three layers of which the second has been changed, and what they give one by one."""
    ctx = ParallelContext.single()
    layers = [ColumnParallelLinear(HIDDEN, n, ctx=ctx, init=Normal(0.3)) for n in (5, 7, 3)]
    for i, layer in enumerate(layers):
        initialize(layer, seed=i, prefix="layer", tensor_rank=0)
    second = layers[1]
    if kind == "hook":
        second.register_forward_hook(lambda layer, arguments, output: 2 * output)
    elif kind == "pre-hook":
        second.register_forward_pre_hook(lambda layer, arguments: (2 * arguments[0],))
    elif kind == "forward":
        second.forward = lambda x: 2 * F.linear(x, second.weight)
    elif kind == "parametrization":
        nn.utils.parametrizations.orthogonal(second)
    elif kind == "bias":
        second.bias = nn.Parameter(torch.ones(7))
    elif kind == "sparse":
        second.weight = nn.Parameter(second.weight.to_sparse_csr())
    elif kind == "wrapper":
        layers[1] = nn.Sequential(second, nn.Tanh())
    x = torch.randn(4, 2, HIDDEN, generator=torch.Generator().manual_seed(3))
    return layers, [x, *(layer(x) for layer in layers)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    "kind",
    ["nothing", "hook", "pre-hook", "forward", "parametrization", "bias", "sparse", "wrapper"],
)
def test_one_product_for_several_layers_is_what_each_of_them_gives(kind):
    layers, (x, *expected) = _changed(kind)
    for found, own in zip(project_together(x, *layers, joined=True), expected, strict=True):
        torch.testing.assert_close(found, own)


def test_a_backward_hook_of_a_layer_sees_its_gradient():
    layers, (x, *_) = _changed("nothing")
    seen = []
    layers[2].register_full_backward_hook(lambda layer, before, after: seen.append(after[0]))
    for y in project_together(x.requires_grad_(), *layers, joined=True):
        y.sum().backward()
    assert [g.shape for g in seen] == [(4, 2, 3)]


def _initial_weights(tensor: int):
    ctx = ParallelContext.from_world(tensor=tensor)
    block = Block(ctx)
    merged = {}
    for name, parameter in block.named_parameters():
        shards = [torch.empty_like(parameter) for _ in range(tensor)]
        dist.all_gather(shards, parameter.detach().contiguous())
        merged[name] = merge(shards, sharding_of(name, parameter))
    return merged


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_same_seed_gives_the_same_full_weights_at_any_tensor_size(tensor):
    expected = dict(Block(ParallelContext.single()).named_parameters())
    for weights in run_ranks(_initial_weights, tensor, tensor):
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), name


def test_split_and_merge_are_inverse_and_pad_with_zeros():
    full = torch.arange(35.0).view(7, 5)
    sharding = sharding_of("w", Block(ParallelContext.single()).head.weight)
    sharding = type(sharding)(dim=0, full_size=7)
    shards = [split(full, sharding, size=4, rank=rank) for rank in range(4)]
    assert [s.shape[0] for s in shards] == [2, 2, 2, 2]
    assert torch.equal(shards[3][1], torch.zeros(5))
    assert torch.equal(merge(shards, sharding), full)


def _three_ranks_do_not_divide():
    ctx = ParallelContext.from_world(tensor=2)
    with assert_refused(
        "out_features", value=21, constraint="parallel.tensor=2", remedy="tensor size"
    ):
        ColumnParallelLinear(12, 21, ctx=ctx)
    with assert_refused(
        "in_features", value=21, constraint="parallel.tensor=2", remedy="tensor size"
    ):
        RowParallelLinear(21, 12, ctx=ctx)


def test_sizes_that_the_tensor_size_does_not_divide_are_refused():
    run_ranks(_three_ranks_do_not_divide, 2)
