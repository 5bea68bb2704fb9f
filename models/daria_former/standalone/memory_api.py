"""Read and write access to the slots of the four memory levels.

Working and episodic memory are state of a generation, one set of slots per block, in its cache.
Persistent memory and the persona are learned rows of the first layer that every block projects
for itself. The banks here are views: they keep nothing of their own.

Shapes: b batch, g key/value heads, d head dimension, m slots, h hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from models.common.history import History
from models.daria_former.cache import BlockCache, MemoryCache, Retrieved, Slots
from models.daria_former.config import DariaFormerConfig
from models.daria_former.memory import concatenated
from models.daria_former.paths import MemoryPath, PersonaPath, Sources
from models.standalone.model import Cache
from parallel.layers import project_replicated

_WORKING, _EPISODIC = 0, 1


class ModelWithMemory(Protocol):
    """The model interface that the banks use: configuration, first layer, blocks."""

    config: DariaFormerConfig
    training: bool

    @property
    def embedding(self) -> Any: ...

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def memory(self) -> MemoryIntegrationSystem: ...

    def __call__(self, input_ids: Tensor, *, kv_cache: Cache) -> Any: ...


class PersistentRows(NamedTuple):
    """Learned rows from which blocks project keys and values: [m, h] each."""

    keys: Tensor
    values: Tensor


class ConsolidationFit(NamedTuple):
    """Quality of consolidated slots over all blocks: mean cosine similarity of the keys, and
    relative error of the values (0: exact)."""

    key_cosine: float
    value_error: float


class SlotMemory:
    """Working or episodic memory: the slots that blocks have pooled from a text, in its cache."""

    def __init__(self, model: ModelWithMemory, level: int) -> None:
        self.model, self.level = model, level
        config = model.config
        self.capacity = (config.working_memory_slots, config.episodic_memory_slots)[level]
        self.stride = (config.working_stride, config.episodic_stride)[level]

    def num_slots(self, kv_cache: Cache) -> int:
        """The number of slots available to the next segment."""
        return min(self.capacity, self._histories(0, kv_cache)[0].length)

    def read_kv(self, layer: int, kv_cache: Cache) -> Slots:
        """The slots of one block, oldest first: [b, g, m, d] (views; valid until the next call)."""
        count = self.num_slots(kv_cache)
        histories = self._histories(layer, kv_cache)
        if count == 0:
            gain = _memory_path(self.model, layer).key_gain  # [g, d]
            empty = gain.new_zeros(1, len(gain), 0, gain.shape[1])
            return Slots(empty, empty)
        return Slots(*(history.last(count) for history in histories))

    def read(self, kv_cache: Cache) -> list[Slots]:
        """The slots of every block."""
        return [self.read_kv(i, kv_cache) for i in range(self.model.config.num_layers)]

    @torch.no_grad()
    def write(
        self,
        layer: int,
        kv_cache: Cache,
        slot: int,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        """Replace the key or the value, [b, g, d], of one slot (0: the oldest) of one block.

        The open segment then retrieves again before it continues.

        Raises:
            ValueError: there is no such slot, or a tensor of another shape.
        """
        slots = self.read_kv(layer, kv_cache)
        _check_index("slot", slot, slots.keys.shape[2])
        for name, stored, given in zip(Slots._fields, slots, (keys, values), strict=True):
            if given is not None:
                target = stored[:, :, slot]
                _check_shape(name, given, target)
                target.copy_(given)
        _memory_cache(layer, kv_cache).retrieved_for = -1

    def _histories(self, layer: int, kv_cache: Cache) -> tuple[History, History]:
        return _memory_cache(layer, kv_cache).levels[self.level]


class PersistentMemory:
    """Learned slots visible to every segment: each is two rows of the bank, for key and value."""

    def __init__(self, model: ModelWithMemory) -> None:
        self.model = model

    def __len__(self) -> int:
        return self.model.config.persistent_memory_slots

    def read(self) -> PersistentRows:
        """The rows that blocks project, without gradient (views)."""
        return PersistentRows(*self.model.embedding.persistent.detach().split(len(self)))

    def read_kv(self, layer: int) -> Slots:
        """Keys and values of one block: [1, g, m, d]."""
        bank = self.model.embedding.persistent.unsqueeze(1)
        return _memory_path(self.model, layer).persistent_slots(Sources(bank=bank))

    @torch.no_grad()
    def write(
        self,
        index: int | Sequence[int],
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        """Replace the rows of slots, [h] or [k, h].

        Later generations use them; one in progress only after `MemoryIntegrationSystem.refresh`.

        Raises:
            ValueError: the model is in training, an index is unknown, or a tensor of another shape.
        """
        indices = torch.tensor([index] if isinstance(index, int) else list(index))
        for number in indices.tolist():
            _check_index("index", number, len(self))
        if self.model.training:
            raise ValueError(
                "persistent memory is written in evaluation alone, because in training its rows "
                "belong to the optimizer; call model.eval() first"
            )
        for name, rows, given in zip(
            PersistentRows._fields, self.read(), (keys, values), strict=True
        ):
            if given is not None:
                given = given.unsqueeze(0) if given.dim() == 1 else given
                _check_shape(name, given, rows[: len(indices)])
                rows[indices.to(rows.device)] = given.to(rows)

    @torch.no_grad()
    def consolidate(
        self, kv_cache: Cache, *, slots: Sequence[int], into: Sequence[int], row: int = 0
    ) -> ConsolidationFit:
        """Write episodic slots of one row of a text into persistent slots, which outlive the text.

        An episodic slot has a key and a value per block; a persistent slot has two rows z from
        which every block projects its own. They are the least-squares fit, over all blocks, of
        `gain * W z` to the keys and of `W z` to the values, which is exact if L g d <= h. Of keys
        only the direction is kept where blocks normalise them (`qk_norm`).

        Raises:
            ValueError: as for `write`, or `slots` and `into` differ in length or are out of range.
        """
        episodic = self.model.memory.episodic
        if len(slots) != len(into) or not slots:
            raise ValueError(
                f"slots={list(slots)} and into={list(into)} must be equally many, and not none"
            )
        for slot in slots:
            _check_index("slots", slot, episodic.num_slots(kv_cache))
        systems = [self._system(i, episodic.read_kv(i, kv_cache), slots, row) for i in self._layers]
        maps, targets = zip(*systems, strict=True)
        rows = [
            torch.linalg.lstsq(torch.cat(a), torch.cat(y), driver="gelsd").solution.T
            for a, y in zip(zip(*maps, strict=True), zip(*targets, strict=True), strict=True)
        ]
        self.write(into, keys=rows[0], values=rows[1])
        return self._fit(episodic.read(kv_cache), slots, into, row)

    @property
    def _layers(self) -> range:
        return range(self.model.config.num_layers)

    def _system(
        self, layer: int, stored: Slots, slots: Sequence[int], row: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The least-squares systems of one block, for keys and for values: the map [g d, h] from
        rows to slots, and its target [g d, k]. In fp64 on the CPU, whose driver allows any rank."""
        path = _memory_path(self.model, layer)
        unit = torch.eye(self.model.config.hidden_dim).to(path.key_gain).unsqueeze(1)
        to_keys, to_values = (
            y.squeeze(1).T.double().cpu()
            for y in project_replicated(unit, path.k_proj, path.v_proj, ctx=path.ctx)
        )
        to_keys = to_keys * path.key_gain.double().cpu().flatten().unsqueeze(1)
        keys, values = (x[row, :, list(slots)].transpose(1, 2).flatten(0, 1) for x in stored)
        return (to_keys, to_values), (keys.double().cpu(), values.double().cpu())

    def _fit(
        self, wanted: Sequence[Slots], slots: Sequence[int], into: Sequence[int], row: int
    ) -> ConsolidationFit:
        cosines, wrong, whole = [], 0.0, 0.0
        for layer, stored in enumerate(wanted):
            found = self.read_kv(layer)
            keys, values = (x[row, :, list(slots)].float() for x in stored)
            own_keys, own_values = (x[0, :, list(into)].float() for x in found)
            cosines.append(torch.cosine_similarity(own_keys, keys, dim=-1).mean())
            wrong += (own_values - values).square().sum().item()
            whole += values.square().sum().item()
        return ConsolidationFit(
            torch.stack(cosines).mean().item(), (wrong / max(whole, 1e-30)) ** 0.5
        )


class PersonaMemory:
    """The slots of the persona path: learned rows, moved by the persona that is given."""

    def __init__(self, model: ModelWithMemory) -> None:
        self.model = model

    def __len__(self) -> int:
        return self.model.config.persona_memory_slots

    def read(self, persona: Tensor | None = None) -> Tensor:
        """`slots + W_p p` [m, b or 1, h], for `persona` [b, persona_dim] or the learned one."""
        embedding = self.model.embedding
        given = embedding.persona.unsqueeze(0) if persona is None else persona
        return embedding.persona_bank(given)

    def read_kv(self, layer: int, persona: Tensor | None = None) -> Slots:
        """Keys and values of one block: [b or 1, g, m + 1, d], the last one the empty slot."""
        path = self.model.layers[layer].attention.paths["persona"]
        assert isinstance(path, PersonaPath)
        return path.slots(Sources(bank=self.read(persona)))


class MemoryIntegrationSystem:
    """All memory of a model, as `model.memory`. `kv_cache`: that of the generation in question.

    `persistent` and `persona` are None where the model has none.

    Raises:
        ValueError: on use, if the model lacks that memory or the text has not begun.
    """

    def __init__(self, model: ModelWithMemory) -> None:
        self.model, config = model, model.config
        self.working, self.episodic = SlotMemory(model, _WORKING), SlotMemory(model, _EPISODIC)
        has_rows = config.has("memory") and config.persistent_memory_slots > 0
        self.persistent = PersistentMemory(model) if has_rows else None
        self.persona = PersonaMemory(model) if config.has("persona") else None

    def get_memory_kv(self, layer: int, kv_cache: Cache) -> Slots:
        """All slots that the memory path of a block chooses from: working, episodic, persistent."""
        parts = [self.working.read_kv(layer, kv_cache), self.episodic.read_kv(layer, kv_cache)]
        if self.persistent is not None:
            parts.append(self.persistent.read_kv(layer))
        return concatenated(parts)

    def get_persona_kv(self, layer: int, persona: Tensor | None = None) -> Slots:
        """The slots that the persona path of a block reads."""
        if self.persona is None:
            raise ValueError("the model has no persona path; add persona to paths before building")
        return self.persona.read_kv(layer, persona)

    def retrieved(self, layer: int, kv_cache: Cache) -> Retrieved | None:
        """The slots that the segment of the latest token reads; None before the first token."""
        return _memory_cache(layer, kv_cache).retrieved

    def encode_and_store_episode(self, input_ids: Tensor, kv_cache: Cache) -> int:
        """Read a text into the memory of a generation; returns the number of new episodic slots."""
        before = self._num_pooled(kv_cache)
        with torch.no_grad():
            self.model(input_ids, kv_cache=kv_cache)
        return self._num_pooled(kv_cache) - before

    def refresh(self, kv_cache: Cache) -> None:
        """Make a generation in progress use the current persistent memory."""
        embedding = kv_cache["embedding"]
        if embedding.bank is not None and self.persistent is not None:
            rows = self.model.embedding.persistent.detach().unsqueeze(1)
            kept = embedding.bank[len(rows) :]
            embedding.bank = torch.cat((rows.expand(-1, embedding.bank.shape[1], -1), kept))
        for layer in range(self.model.config.num_layers):
            block: BlockCache = kv_cache[f"block_{layer}"]
            block.static.pop("memory", None)
            if block.memory is not None:
                block.memory.retrieved_for = -1

    def _num_pooled(self, kv_cache: Cache) -> int:
        return _memory_cache(0, kv_cache).levels[_EPISODIC][0].length


def _memory_path(model: ModelWithMemory, layer: int) -> MemoryPath:
    _check_index("layer", layer, model.config.num_layers)
    paths: Any = model.layers[layer].attention.paths
    if "memory" not in paths:
        raise ValueError("the model has no memory path; add memory to paths before building it")
    path: MemoryPath = paths["memory"]
    return path


def _memory_cache(layer: int, kv_cache: Cache) -> MemoryCache:
    block: BlockCache | None = kv_cache.get(f"block_{layer}")
    if block is None:
        raise ValueError(f"layer={layer} is not in the cache; count blocks from 0")
    if block.memory is None:
        raise ValueError("the model has no memory path; add memory to paths before building it")
    return block.memory


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"{name}={index} is not one of the {count} there are; count from 0")


def _check_shape(name: str, given: Tensor, like: Tensor) -> None:
    if given.shape != like.shape:
        raise ValueError(
            f"{name} of shape {list(given.shape)} must be {list(like.shape)}, the shape of what is "
            "stored; reshape them"
        )
