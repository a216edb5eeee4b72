"""How ranks hold a parameter, and matrices that travel whole to the one rank that works on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from osp_diag.errors import TrainingError

__all__ = ["Placement", "Shipment", "full_rows", "local", "placement_of", "sum_over_shards"]


@dataclass(frozen=True)
class Placement:
    """A parameter's rows are cut over the ranks of one group, and all that is repeated over another.

    Neither group: one process has it all. DDP has replicas alone, FSDP2 shards alone, HSDP both.

    Attributes
    ----------
    shard_group, shards, shard : the ranks that hold the rows together, how many, and which of them this is.
        Each holds ⌈rows / shards⌉ rows, the last ones fewer or none (``torch.chunk``)
    replica_group, replicas, replica : the ranks that hold the same rows
    """

    shard_group: ProcessGroup | None = None
    shards: int = 1
    shard: int = 0
    replica_group: ProcessGroup | None = None
    replicas: int = 1
    replica: int = 0

    @property
    def owners(self) -> int:
        """Ranks that share the work on parameters placed like this."""
        return self.shards * self.replicas

    @property
    def owner(self) -> int:
        """Which of them this rank is."""
        return self.replica * self.shards + self.shard

    def shard_rows(self, rows: int) -> int:
        """Rows of the ranks that have most of them."""
        return -(-rows // self.shards)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placement_of(name: str, parameter: Tensor, process_group: ProcessGroup | None) -> Placement:
    """How the ranks hold ``parameter``.

    Parameters
    ----------
    name : for the message
    parameter : a DTensor that FSDP2 made (one or two mesh dimensions), or a plain tensor
    process_group : of the ranks that repeat plain tensors; None: this process is alone with them

    Raises
    ------
    TrainingError : a DTensor is cut along another dimension than its first, or cut twice
    """
    if not isinstance(parameter, DTensor):
        if process_group is None:
            return Placement()
        size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        return Placement(replica_group=process_group, replicas=size, replica=rank)
    mesh = parameter.device_mesh
    cut_dims = [index for index, kind in enumerate(parameter.placements) if kind == Shard(0)]
    repeated_dims = [index for index, kind in enumerate(parameter.placements) if kind == Replicate()]
    if len(cut_dims) > 1 or len(repeated_dims) > 1 or len(cut_dims) + len(repeated_dims) < mesh.ndim:
        raise TrainingError(
            f"{name} is placed as {tuple(parameter.placements)}; Muon knows parameters cut by rows (FSDP2's "
            "Shard(0)), repeated, or both (HSDP)"
        )
    placement = Placement()
    if cut_dims:
        group = mesh.get_group(cut_dims[0])
        placement = Placement(group, dist.get_world_size(group), dist.get_rank(group))
    if repeated_dims:
        group = mesh.get_group(repeated_dims[0])
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        placement = Placement(placement.shard_group, placement.shards, placement.shard, group, size, rank)
    return placement


@dataclass
class Shipment:
    """Matrices of one shape on their way to their owners and back.

    Every matrix has one owner among ``placement.owners`` ranks: owner o has matrices number
    o − first_owner, o − first_owner + owners, … of them, so that the stacks which don't divide evenly burden
    other ranks each time.

    Parameters
    ----------
    placement : of all the matrices
    count, rows, columns : how many there are, and their whole shape
    first_owner : owner of the first
    """

    placement: Placement
    count: int
    rows: int
    columns: int
    first_owner: int = 0
    _buffer: Tensor = field(init=False, repr=False)
    _work: dist.Work | None = field(init=False, default=None, repr=False)

    @property
    def slots(self) -> int:
        """Matrices of the rank that has most of them."""
        return -(-self.count // self.placement.owners)

    def place(self, number: int) -> tuple[int, int, int]:
        """Replica group, shard and slot of a matrix."""
        slot, _ = divmod(number, self.placement.owners)
        owner = (number + self.first_owner) % self.placement.owners
        return *divmod(owner, self.placement.shards), slot

    @property
    def owned(self) -> list[int]:
        """Numbers of the matrices that this rank works on, by slot."""
        lowest = (self.placement.owner - self.first_owner) % self.placement.owners
        return list(range(lowest, self.count, self.placement.owners))

    def send(self, parts: Sequence[Float[Tensor, "rows columns"]], dtype: torch.dtype) -> None:
        """Start sending this rank's rows of each matrix to its owner, rounded to ``dtype``."""
        placement = self.placement
        if placement.shards == 1:
            matrices = [parts[number] for number in self.owned]
            self._buffer = torch.empty(
                (len(matrices), self.rows, self.columns), dtype=dtype, device=parts[0].device
            )
            _copy(self._buffer.unbind(), matrices)
            return
        shard_rows = placement.shard_rows(self.rows)
        shape = (placement.shards, self.slots, shard_rows, self.columns)
        outgoing = torch.zeros(shape, dtype=dtype, device=parts[0].device)
        targets, sources = [], []
        for number, part in enumerate(parts):
            replica, shard, slot = self.place(number)
            if replica == placement.replica and part.shape[0]:
                targets.append(outgoing[shard, slot, : part.shape[0]])
                sources.append(part)
        _copy(targets, sources)
        self._exchange(outgoing)

    def owned_matrices(self) -> Float[Tensor, "owned row column"]:
        """The whole matrices that this rank owns, once they are here."""
        self._wait()
        if self.placement.shards == 1:
            return self._buffer
        # (shard, slot, rows of a shard, column) → (slot, row, column); what pads the last shards is cut off.
        matrices = self._buffer.movedim(0, 1).reshape(self.slots, -1, self.columns)
        return matrices[: len(self.owned), : self.rows]

    def send_back(self, results: Float[Tensor, "owned row column"]) -> None:
        """Start returning what became of the owned matrices: to every rank the rows that it holds."""
        placement = self.placement
        if placement.owners == 1:
            self._buffer = results[None, None]
            return
        shard_rows = placement.shard_rows(self.rows)
        shape = (self.slots, placement.shards * shard_rows, self.columns)
        padded = results
        if results.shape != shape:
            padded = results.new_zeros(shape)
            padded[: results.shape[0], : self.rows] = results
        if placement.shards == 1:
            self._gather(padded[None])
            return
        cut = padded.view(self.slots, placement.shards, shard_rows, self.columns)
        self._exchange(cut.movedim(1, 0).contiguous())

    def send_to_replicas(self) -> None:
        """Start exchanging, between the groups that hold the same rows, what each of them returned."""
        if self.placement.shards == 1:
            return
        self._wait()
        if self.placement.replicas == 1:
            self._buffer = self._buffer[None]
        else:
            self._gather(self._buffer)

    def result_rows(self) -> Float[Tensor, "replica shard slot rows column"]:
        """This rank's rows of all results, where :meth:`place` says; short shards are padded."""
        self._wait()
        return self._buffer

    def _exchange(self, outgoing: Tensor) -> None:
        self._buffer = torch.empty_like(outgoing)
        group = self.placement.shard_group
        self._work = dist.all_to_all_single(self._buffer, outgoing, group=group, async_op=True)

    def _gather(self, part: Tensor) -> None:
        self._buffer = part.new_empty((self.placement.replicas, *part.shape))
        group = self.placement.replica_group
        # torch 2.13 gave it a new name and warns of the old one.
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        self._work = gather(self._buffer.view(-1), part.reshape(-1), group=group, async_op=True)

    def _wait(self) -> None:
        # On CUDA this makes the stream wait, not the host.
        if self._work is not None:
            self._work.wait()
            self._work = None


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def full_rows(rows: Float[Tensor, " rows"], placement: Placement, count: int) -> Float[Tensor, " row"]:
    """This rank's numbers, one a row, at their places among all ``count`` rows; zeros elsewhere."""
    if placement.shards == 1:
        return rows
    all_rows = rows.new_zeros(count)
    start = placement.shard * placement.shard_rows(count)
    all_rows[start : start + rows.shape[0]] = rows
    return all_rows


def sum_over_shards(parts: Sequence[Tensor], placements: Sequence[Placement]) -> list[Tensor]:
    """Each tensor summed over the ranks that hold the rows of its parameter: one collective per group."""
    summed = list(parts)
    groups: dict[ProcessGroup, list[int]] = {}
    for index, placement in enumerate(placements):
        if placement.shard_group is not None:
            groups.setdefault(placement.shard_group, []).append(index)
    for group, members in groups.items():
        flat = torch.cat([parts[index].reshape(-1) for index in members])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([parts[index].numel() for index in members])
        for index, piece in zip(members, pieces, strict=True):
            summed[index] = piece.view(parts[index].shape)
    return summed
