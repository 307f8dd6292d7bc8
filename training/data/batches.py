"""Batch plan: packing and row order, the same on any number of workers, with each row exactly once per epoch."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler

from configs.schema import FinetuneConfig
from training.data.row_index import IGNORED
from training.models.kernels import Device

PADDING_ROW = -1  # fills the last batch of an epoch; all of its labels are ignored

_MOST_STEPS_A_WINDOW = 50
_LEAST_WINDOWS = 4
_NEIGHBORS = 32


@dataclass(frozen=True)
class BatchShape:
    """The division of sequences (rows or packs) into batches and steps."""

    sequences: int
    batch_size: int
    """Sequences per device (or group of devices that share sequences) and micro-batch."""
    world_size: int
    """Number of such devices or groups."""
    gradient_accumulation_steps: int

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches per worker in an epoch."""
        return -(-self.sequences // (self.batch_size * self.world_size))

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps in an epoch; the last may accumulate fewer micro-batches."""
        return -(-self.batches_per_epoch // self.gradient_accumulation_steps)

    @property
    def sequences_per_step(self) -> int:
        """Return the number of sequences in a full optimizer step, over all workers."""
        return self.batch_size * self.world_size * self.gradient_accumulation_steps


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Pack rows into few sequences by best fit: add the longest row that fits, then close the gap with a pair.

    Sets of lengths are bit masks: bit n is set if a row has n tokens. A shift and an `and` find all pairs with a given sum.

    Args:
        lengths: Tokens of each row, at most `capacity`.
        capacity: Tokens per sequence.

    Returns:
        The row indices of each sequence, deterministic for given lengths.
    """
    lengths = np.asarray(lengths)
    rows_with: defaultdict[int, list[int]] = defaultdict(list)
    for row in range(len(lengths) - 1, -1, -1):
        rows_with[int(lengths[row])].append(row)
    left = sum(1 << length for length in rows_with)
    mirrored = sum(1 << (capacity - length) for length in rows_with)
    negligible = capacity // 100
    packs: list[list[int]] = []
    while left:
        rows, space = [], capacity
        while fitting := left & ((2 << space) - 1):
            longest = fitting.bit_length() - 1
            chosen = [longest]
            if rows and longest < space - negligible <= 2 * longest:
                chosen = _best_pair(rows_with, left, mirrored, capacity, space, negligible) or chosen
            for length in chosen:
                rows.append(rows_with[length].pop())
                space -= length
                if not rows_with[length]:
                    left ^= 1 << length
                    mirrored ^= 1 << (capacity - length)
        packs.append(rows)
    return packs


def _best_pair(
    rows_with: dict[int, list[int]], left: int, mirrored: int, capacity: int, space: int, negligible: int
) -> list[int] | None:
    """Return two lengths, as equal as possible, that fill the space up to `negligible`."""
    for both in range(space, space - negligible - 1, -1):
        half = -(-both // 2)
        pairs = (
            left & (mirrored >> (capacity - both))
        ) >> half  # bit n: lengths half + n and both - half - n
        while pairs:
            longer = half + (pairs & -pairs).bit_length() - 1
            if 2 * longer > both or len(rows_with[longer]) > 1:
                return [longer, both - longer]
            pairs &= pairs - 1
    return None


class BatchPlan:
    """The sequences of each epoch and step, determined by shape, seed and lengths alone."""

    def __init__(
        self,
        shape: BatchShape,
        seed: int,
        *,
        lengths: Sequence[int] | np.ndarray | None = None,
        packs: Sequence[Sequence[int]] | None = None,
    ):
        """Build the plan.

        Args:
            shape: Division of sequences into batches.
            seed: The run's seed.
            lengths: Tokens of each sequence, to group sequences of similar length and reduce padding. None: no grouping.
            packs: Row indices of each sequence, from `pack`. None: each sequence is one row.
        """
        self.shape = shape
        self.seed = seed
        self._lengths = None if lengths is None else torch.as_tensor(np.array(lengths))
        self.packs = packs
        self._epoch: tuple[int, torch.Tensor] | None = None

    def epoch(self, epoch: int) -> list[int]:
        """Return the order of all sequences in an epoch (from 0)."""
        return self._of(epoch).tolist()

    def step(self, step: int) -> list[int]:
        """Return the sequences of an optimizer step (from 1), over all workers."""
        epoch, step_in_epoch = divmod(step - 1, self.shape.steps_per_epoch)
        begin = step_in_epoch * self.shape.sequences_per_step
        return self._of(epoch)[begin : begin + self.shape.sequences_per_step].tolist()

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of an optimizer step (from 1), over all workers."""
        sequences = self.step(step)
        if self.packs is None:
            return sequences
        return [row for sequence in sequences for row in self.packs[sequence]]

    def _of(self, epoch: int) -> torch.Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(self.shape.sequences, generator=generator)
            if self._lengths is not None:
                order = self._group(order, self._lengths, generator)
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _group(self, order: torch.Tensor, lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Sort windows of several steps by length, then shuffle the steps; the short last step stays last."""
        per_step = self.shape.sequences_per_step
        steps = len(order) // per_step
        steps_a_window = min(_MOST_STEPS_A_WINDOW, max(1, steps // _LEAST_WINDOWS))
        place = torch.arange(len(order))
        window = torch.where(place < steps * per_step, place // (per_step * steps_a_window), steps)
        longest_first = torch.argsort(-lengths[order], stable=True)
        order = order[longest_first[torch.argsort(window[longest_first], stable=True)]]
        mixed = order[: steps * per_step].view(steps, per_step)[torch.randperm(steps, generator=generator)]
        return torch.cat([mixed.flatten(), order[steps * per_step :]])


def longest_sequence(lengths: Sequence[int] | np.ndarray, packs: Sequence[Sequence[int]] | None) -> int:
    """Return the index of the sequence with the most tokens.

    Args:
        lengths: Tokens of each row.
        packs: Row indices of each sequence. None: each sequence is one row.
    """
    lengths = np.asarray(lengths)
    return int(np.argmax(lengths if packs is None else [lengths[list(rows)].sum() for rows in packs]))


class TrainBatches(Sampler[list[int]]):
    """A sampler of the micro-batches of one worker (or group), as lists of sequence indices or PADDING_ROW.

    Micro-batch i of all workers together is a contiguous slice of the epoch's order. Thus 1 worker with batch size 4
    and 2 workers with batch size 2 take the same steps.
    """

    def __init__(self, order: BatchPlan, *, rank: int):
        self.order = order
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.shape.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        shape = self.order.shape
        order = self.order.epoch(self.epoch)
        order += [PADDING_ROW] * (len(self) * shape.batch_size * shape.world_size - len(order))
        for batch in range(len(self)):
            begin = (batch * shape.world_size + self.rank) * shape.batch_size
            yield order[begin : begin + shape.batch_size]


def eval_batches(sequences: int, batch_size: int, world_size: int, rank: int) -> list[list[int]]:
    """Return one worker's validation batches; every worker gets the same number, padded with PADDING_ROW."""
    batch_size = min(batch_size, max(1, -(-sequences // world_size)))
    count = -(-sequences // (batch_size * world_size))
    order = list(range(sequences)) + [PADDING_ROW] * (count * batch_size * world_size - sequences)
    return [
        order[(batch * world_size + rank) * batch_size : (batch * world_size + rank + 1) * batch_size]
        for batch in range(count)
    ]


class TokenSequences(Dataset[dict[str, Any]]):
    """A dataset of training sequences: one row or one pack each, or the empty row for PADDING_ROW."""

    def __init__(self, rows: Any, pad_token_id: int, packs: Sequence[Sequence[int]] | None = None):
        self.rows = rows
        self.packs = packs
        self.padding = {"input_ids": [pad_token_id, pad_token_id], "labels": [IGNORED, IGNORED]}

    def __len__(self) -> int:
        return len(self.rows) if self.packs is None else len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sequence; `seq_lengths` holds the tokens of each row in it."""
        if index == PADDING_ROW:
            rows = [self.padding]
        else:
            rows = [self.rows[row] for row in (self.packs[index] if self.packs is not None else [index])]
        return {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            # A row's first token has no context, so it must not be predicted from the previous row of a pack.
            "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
            "seq_lengths": [len(row["input_ids"]) for row in rows],
        }


class PairSequences(Dataset[dict[str, Any]]):
    """A dataset of preference pairs and unpaired rows (which have one response), with the empty pair for PADDING_ROW."""

    def __init__(self, rows: Any, pad_token_id: int, *, with_mismatched: bool):
        """Build the dataset.

        Args:
            rows: Rows with prompt_ids, chosen_ids and rejected_ids.
            pad_token_id: Token of the empty pair.
            with_mismatched: Add the responses of the next row with another prompt as mismatched_chosen_ids and
                mismatched_rejected_ids, from which kto estimates the divergence from the reference; see `pair_losses`.
        """
        self.rows = rows
        self.with_mismatched = with_mismatched
        self.padding = {"prompt_ids": [pad_token_id] * 2, "chosen_ids": [], "rejected_ids": []}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.padding if index == PADDING_ROW else self.rows[index]
        pair = {name: pair[name] for name in self.padding}
        if self.with_mismatched:
            other = self.padding if index == PADDING_ROW else self._mismatched(index)
            pair |= {f"mismatched_{name}": other[name] for name in ("chosen_ids", "rejected_ids")}
        return pair

    def _mismatched(self, index: int) -> dict[str, Any]:
        """Return the next row with another prompt, or the last of its neighbors if all have the same."""
        prompt = self.rows[index]["prompt_ids"]
        other = self.rows[index]
        for distance in range(1, min(len(self.rows), _NEIGHBORS) + 1):
            other = self.rows[(index + distance) % len(self.rows)]
            if other["prompt_ids"] != prompt:
                break
        return other


def pad_to_multiple_of(config: FinetuneConfig, device: Device, longest: int) -> int | None:
    """Return the multiple, in tokens, to which batches are padded; `padding: max_length` pads to the maximum row length.

    Args:
        config: The run's YAML config.
        device: On CUDA the multiple is 8, since matrix multiplications run in tiles.
        longest: Tokens of the longest training row.

    With sequence_parallel_size, each worker's part of a sequence is padded to such a multiple.
    """
    size = config.sequence_parallel_size
    if config.padding == "max_length":
        return padded_length(config.context_length or longest, size)
    multiple = size * (8 if device == "cuda" else 1)
    return multiple if multiple > 1 else None


def padded_length(tokens: int, multiple: int | None) -> int:
    """Return the length of a sequence after padding."""
    return tokens if multiple is None else -(-tokens // multiple) * multiple


def without_mask(collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """Wrap a collator to drop the attention mask, which would make attention compute and store all pairs of tokens.

    Padding is on the right, which causal attention never sees from a real token. Position ids restart at 0 with each packed
    row and separate the rows; transformers uses them only if it gets neither a mask nor a cache.
    """

    def collate_without_mask(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        batch.pop("attention_mask", None)
        # TRL counts position ids when there is no mask.
        batch.setdefault("position_ids", torch.arange(batch["input_ids"].shape[1])[None])
        return batch | {"use_cache": False}

    return collate_without_mask


def with_ends_of_rows(
    collate: Callable[[list[Any]], dict[str, Any]],
) -> Callable[[list[Any]], dict[str, Any]]:
    """Wrap a padding-free collator to add the row boundaries that flash kernels need, which avoids a GPU sync."""

    def collate_with_ends(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        positions = batch["position_ids"][0]
        begins = (positions == 0).nonzero().flatten()
        ends = torch.cat([begins, torch.tensor([len(positions)])]).int()
        longest = int(ends.diff().max())
        return batch | {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    return collate_with_ends


def part_of_sequences(
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]], size: int, rank: int
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Wrap a collator to return one worker's part of each sequence, among the workers that share it.

    The labels are shifted first, as `shift_labels`, since the label of a part's last token is in the next part. Row boundaries
    remain those of the complete sequences.

    Args:
        collate: Returns complete sequences without a mask, with position ids, and padded to a multiple of `size` tokens.
        size: Number of workers that share a sequence.
        rank: The worker's rank among them.
    """

    def collate_part(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        tokens = batch["input_ids"].shape[1] // size
        part = slice(rank * tokens, (rank + 1) * tokens)
        # transformers' loss views them as one line.
        shifted = pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)[:, part].contiguous()
        ours = {name: batch[name][:, part] for name in ("input_ids", "position_ids")}
        return batch | ours | {"labels": shifted, "shift_labels": shifted}

    return collate_part


class EpochDataLoader(DataLoader[Any]):
    """A DataLoader whose `set_epoch`, called by the transformers training loop, reaches the batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the batch sampler; called before each epoch."""
        self.batch_sampler.set_epoch(epoch)  # pyright: ignore
