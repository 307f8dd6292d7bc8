"""Conversion of a checkpoint's ZeRO shards for another number of workers, on the node that restores it.

DeepSpeed splits the fp32 weights and the optimizer states over the workers, and loads them only with the number of workers that
saved them. Its universal checkpoints support only Adam, and under ZeRO-3 give every parameter the weight decay of the first
group. Here each worker copies its slices of the shards into a shard of its own, which DeepSpeed then loads as usual.
"""

import copy
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs.layout import Manifest
from training.checkpoints.store import CheckpointError
from training.world import World
from utils.errors import first_line


@dataclass(frozen=True)
class Slice:
    """A contiguous part of a parameter in a flat tensor."""

    parameter: str
    begin: int
    """First entry of the part in the flattened parameter."""
    length: int
    """Number of entries, without padding."""
    offset: int
    """First entry of the part in the flat tensor."""


Layout = list[list[Slice]]
"""The slices in each flat tensor of one worker: one tensor per group of parameters, or per sub-group under ZeRO-3."""


def flat_layouts(addresses: Sequence[Sequence[Mapping[str, Any]]]) -> list[Layout]:
    """Return the layout of every worker under ZeRO-1 and ZeRO-2, which cut the flat tensor of each group into equal parts.

    Args:
        addresses: `param_slice_mappings` of each worker. They have no position in the parameter: a worker's slice continues
            where that of the previous worker ends.
    """
    taken: defaultdict[str, int] = defaultdict(int)
    layouts: list[Layout] = []
    for groups in addresses:
        layout: Layout = []
        for group in groups:
            slices = []
            for name, address in group.items():
                slices.append(Slice(name, taken[name], address.numel, address.start))
                taken[name] += address.numel
            layout.append(slices)
        layouts.append(layout)
    return layouts


def sharded_layout(shapes: Sequence[Mapping[str, Any]], rank: int, workers: int) -> Layout:
    """Return the layout of a worker under ZeRO-3, which cuts every parameter into equal parts.

    Args:
        shapes: Parameter -> shape in each sub-group, in the order of the flat tensors.
        rank: The worker's rank.
        workers: Number of workers.
    """
    layout: Layout = []
    for group in shapes:
        slices, offset = [], 0
        for name, shape in group.items():
            part = -(-shape.numel() // workers)
            length = max(0, min(part, shape.numel() - rank * part))
            slices.append(Slice(name, rank * part, length, offset))
            offset += part
        layout.append(slices)
    return layout


class Shards:
    """The shards that all workers saved, mapped into memory, so that a worker reads only the slices that it needs."""

    def __init__(self, directory: Path, workers: int, stage: int):
        """Open the shards.

        Args:
            directory: DeepSpeed's local directory of the step.
            workers: Number of workers that saved the checkpoint.
            stage: Their ZeRO stage: 1, 2 or 3.

        Raises:
            ValueError: A shard is missing or cannot be read; the message names it.
            pickle.UnpicklingError: A shard contains objects other than tensors and settings, which were not executed.
        """
        is_partitioned = stage == 3
        self._weights_key = "fp32_flat_groups" if is_partitioned else "single_partition_of_fp32_groups"
        self._optimizer_key = "optimizer_state_dict" if is_partitioned else "base_optimizer_state"
        self._files = [_find(directory, _shard_name(rank)) for rank in range(workers)]
        self._shards = [_member(_load(file), "optimizer_state_dict", file) for file in self._files]
        model_file = _find(directory, _model_name(0, is_partitioned=is_partitioned))
        self.model: dict[str, Any] = _load(model_file)
        if is_partitioned:
            shapes = _member(self.model, "param_shapes", model_file)
            layouts = [sharded_layout(shapes, rank, workers) for rank in range(workers)]
        else:
            layouts = flat_layouts(
                [
                    _member(shard, "param_slice_mappings", file)
                    for shard, file in zip(self._shards, self._files, strict=True)
                ]
            )
        self._slices: defaultdict[str, list[tuple[int, int, Slice]]] = defaultdict(list)
        """Parameter -> (rank, number of the flat tensor, slice)."""
        for rank, layout in enumerate(layouts):
            for number, slices in enumerate(layout):
                for piece in slices:
                    self._slices[piece.parameter].append((rank, number, piece))

    def shard(self, layout: Layout, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the shard of a worker that loads the checkpoint.

        Args:
            layout: The worker's layout.
            own: The state of the worker's new optimizer, as DeepSpeed saves it.
        """
        import torch

        # ZeRO-1 and ZeRO-2 save weights without the padding at the end of the last part, and states with it.
        paddings = own.get("group_paddings", [0] * len(layout))
        sizes = [
            flat.numel() + padding for flat, padding in zip(own[self._weights_key], paddings, strict=True)
        ]
        weights, states = [], {}
        for number, (slices, size) in enumerate(zip(layout, sizes, strict=True)):
            flat = torch.zeros(size)
            self._copy(slices, flat, "")
            weights.append(flat)
            origin = self._of(slices[0].parameter)[0][1] if slices else number
            states[number] = {}
            for name, value in self._states(0, origin).items():
                if torch.is_tensor(value) and value.dim() > 0:
                    states[number][name] = torch.zeros(size, dtype=value.dtype)
                    self._copy(slices, states[number][name], name)
                else:
                    # Several tensors may have the same origin, but must not share its step, which each of them counts.
                    states[number][name] = copy.deepcopy(value)
        saved = _member(self._shards[0], self._optimizer_key, self._files[0])["param_groups"]
        groups = [
            then | {"params": now["params"]}
            for then, now in zip(saved, own[self._optimizer_key]["param_groups"], strict=True)
        ]
        same = {
            name: self._shards[0][name]
            for name in ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
            if name in self._shards[0]
        }
        optimizer = {"state": states, "param_groups": groups}
        return {**own, **same, self._weights_key: weights, self._optimizer_key: optimizer}

    def _copy(self, slices: Sequence[Slice], into: Any, state: str) -> None:
        """Copy slices of a state of the optimizer, or of the fp32 weights if `state` is empty, into a flat tensor."""
        for piece in slices:
            end, copied = piece.begin + piece.length, 0
            for rank, number, source in self._of(piece.parameter):
                begin = max(piece.begin, source.begin)
                length = min(end, source.begin + source.length) - begin
                if length <= 0:
                    continue
                flat = (
                    self._states(rank, number).get(state)
                    if state
                    else self._shards[rank][self._weights_key][number]
                )
                first = source.offset + begin - source.begin
                if flat is None or flat.numel() < first + length:
                    raise ValueError(
                        f"{self._files[rank].name}: {state or 'the weights'} of {piece.parameter} are incomplete"
                    )
                to = piece.offset + begin - piece.begin
                into[to : to + length] = flat[first : first + length]
                copied += length
            if copied != piece.length:
                raise ValueError(
                    f"the shards have {copied:,} of {piece.length:,} values of {piece.parameter}"
                )

    def _states(self, rank: int, number: int) -> dict[str, Any]:
        """Return the optimizer's states of a flat tensor: tensors of its length, and values that all its entries share."""
        optimizer = _member(self._shards[rank], self._optimizer_key, self._files[rank])
        return optimizer["state"].get(number, {})

    def _of(self, parameter: str) -> list[tuple[int, int, Slice]]:
        if parameter not in self._slices:
            raise ValueError(f"no shard has the parameter {parameter}")
        return self._slices[parameter]


def reshard(checkpoint: Path, uri: str, manifest: Manifest, engine: Any, world: World) -> None:
    """Replace DeepSpeed's files in a restored checkpoint by those for this number of workers.

    Every worker calls it once DeepSpeed has split the new optimizer, which defines the slices, and before it loads the checkpoint.

    Args:
        checkpoint: Local directory of the checkpoint, which the workers of a node share.
        uri: The checkpoint, for error messages.
        manifest: Its manifest.
        engine: DeepSpeed's engine.
        world: This worker.

    Raises:
        CheckpointError: A shard is missing, damaged or not that of the model; on every worker if it is so on any.
        pickle.UnpicklingError: See `Shards`.
    """
    world = world.with_long_timeout()
    own = engine.optimizer.state_dict()
    is_partitioned = manifest.zero_stage == 3
    if is_partitioned:
        layout = sharded_layout(engine._get_zero_param_shapes(), world.rank, world.world_size)
    else:
        layout = flat_layouts(world.gather(own["param_slice_mappings"]))[world.rank]
    converted = checkpoint / "resharded"
    problem = None
    try:
        _convert(_saved_directory(checkpoint), converted, manifest, layout, own, world)
    except ValueError as error:
        problem = (
            f"{uri}, which {manifest.world_size} workers saved, cannot be converted for {world.world_size}: {error}. Write num_devices: "
            f"{manifest.world_size}, or name another checkpoint."
        )
    if found := next((each for each in world.gather(problem) if each), None):
        raise CheckpointError(found)
    if world.local_rank == 0:
        saved = _saved_directory(checkpoint)
        shutil.rmtree(saved)
        converted.rename(saved)
    world.gather(None)  # the files of all workers are in place


def _convert(
    saved: Path, converted: Path, manifest: Manifest, layout: Layout, own: Mapping[str, Any], world: World
) -> None:
    """Write this worker's files."""
    import torch

    is_partitioned = manifest.zero_stage == 3
    shards = Shards(saved, manifest.world_size, manifest.zero_stage)
    shard = {"optimizer_state_dict": shards.shard(layout, own)}
    converted.mkdir(exist_ok=True)
    prefix = _find(saved, _shard_name(0)).name.removesuffix(_shard_name(0))
    torch.save(shard, converted / (prefix + _shard_name(world.rank)))
    if is_partitioned or world.local_rank == 0:
        model = shards.model | {"dp_world_size": world.world_size}
        torch.save(model, converted / _model_name(world.rank, is_partitioned=is_partitioned))


def _saved_directory(checkpoint: Path) -> Path:
    """Return the directory with DeepSpeed's files."""
    found = [path for path in checkpoint.glob("global_step*") if path.is_dir()]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} directories global_step* instead of one")
    return found[0]


def _shard_name(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _model_name(rank: int, *, is_partitioned: bool) -> str:
    return (
        f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if is_partitioned else "mp_rank_00_model_states.pt"
    )


def _find(directory: Path, name: str) -> Path:
    """Return the path of a file; DeepSpeed writes `bf16_` before the names of shards with bf16 weights."""
    for path in (directory / name, directory / f"bf16_{name}"):
        if path.is_file():
            return path
    raise ValueError(f"{name} is missing")


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file.name} cannot be read ({first_line(error)})") from error


def _member(content: Any, key: str, file: Path) -> Any:
    if not isinstance(content, Mapping) or key not in content:
        raise ValueError(f"{file.name} has no `{key}`")
    return content[key]
