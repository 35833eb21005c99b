"""The processes of a training, one or many, through Lightning Fabric: how they start, agree, and end with one line for all."""

import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException

from gae.compute import keep_memory
from gae.errors import GaeError, TrainingError, explained, reason
from gae.locks import alone

PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}  # as Fabric calls them


def launch(train):
    """The `Fabric` that the parameters ask for, its processes started."""
    keep_memory()
    torch.set_float32_matmul_precision("high")
    world = train.devices * train.nodes
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The `srun` command is available")  # a host may have SLURM and train without
    try:
        fabric = Fabric(
            accelerator=_accelerator(train),
            devices=train.devices,
            num_nodes=train.nodes,
            strategy="ddp" if world > 1 else "auto",
            precision=PRECISIONS[train.precision],
        )
        if world > 1 and fabric.is_global_zero:
            _say_whom_it_waits_for(world, train.nodes, fabric.strategy.cluster_environment)
        fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        asked = f"train.accelerator {train.accelerator}, train.devices {train.devices}, train.nodes {train.nodes}"
        raise TrainingError(f"{asked}: {reason(error)}") from None
    return fabric


def _say_whom_it_waits_for(world, nodes, cluster):
    """Others than this host's own processes may never come, and PyTorch waits for half an hour without a word."""
    if nodes > 1 or cluster.creates_processes_externally:
        where = f"{cluster.main_address}:{cluster.main_port}"
        print(f"waiting at {where} for {world} processes in all, started by srun, by torchrun or one a host by hand", file=sys.stderr)


def settled(train):
    """The parameters with the precision that `auto` is here: bf16 where the processor has products for it, fp32 elsewhere."""
    if train.precision != "auto":
        return train
    if _accelerator(train) == "cuda" and torch.cuda.is_available():
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        quick = any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return train.model_copy(update={"precision": "bf16" if quick else "fp32"})


def _accelerator(train):
    """The kind of device that `auto` is here: CUDA where there is any, the processor elsewhere."""
    if train.accelerator != "auto":
        return train.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def alone_with(fabric, checkpoints):
    """Only this training uses the checkpoints: its first process locks them, and all end if it can't."""
    with ExitStack() as held:
        from_first(fabric, lambda: held.enter_context(alone(checkpoints)))
        yield


@contextmanager
def told_once(fabric):
    """Of a `TrainingError` that all processes come upon the first tells. The others end as if well: Lightning would kill it else."""
    try:
        yield
    except TrainingError:
        if fabric.is_global_zero:
            raise
        raise SystemExit(0) from None


def from_first(fabric, action):
    """What `action` gives in the first process, for all of them; where it fails all end, and the first says why in one line."""
    result = refusal = None
    if fabric.is_global_zero:
        try:
            result = action()
        except (GaeError, OSError) as error:
            refusal = explained(error)
    result, refusal = fabric.broadcast((result, refusal))
    if refusal:
        with told_once(fabric):
            raise TrainingError(refusal)
    return result


def agreed(fabric, recipe):
    """All processes train by the same recipe: the weights would be nobody's, as gradients alone are shared."""
    other = torch.tensor(float(fabric.broadcast(recipe) != recipe), device=fabric.device)
    others = fabric.all_reduce(other, reduce_op="sum")
    if others:
        said = f"{int(others)} of the {fabric.world_size} processes have other parameters, frames, code or packages than the first"
        with told_once(fabric):
            raise TrainingError(f"{said}; give all hosts the same, and name train.precision if auto is not the same on all")


@contextmanager
def within_memory(train):
    """One line where memory runs out, the GPU's or the processor's."""
    try:
        yield
    except RuntimeError as error:
        said = "can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED"  # the processor's, and where others fill a GPU
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in said):
            raise
        sizes = f"train.batch ({train.batch}) or train.contrast_frames ({train.contrast_frames}), or the sizes of model"
        raise TrainingError(f"memory does not hold this training; lower {sizes}") from None


@contextmanager
def peers(fabric):
    """One line where another process of this training has ended: PyTorch says at length that it does not answer."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        said = f"another process of this training has ended or does not answer ({reason(error)[:200]})"
        raise TrainingError(f"{said}; see what it says, and run it again to go on") from None


def gatherer(fabric):
    """A function that collects a tensor from all processes, with gradients."""
    if fabric.world_size == 1:
        return lambda tensor: tensor
    warnings.filterwarnings("ignore", ".*all_gather is deprecated")  # Fabric's to mend

    @torch.compiler.disable  # it can't follow; what comes before and after is compiled all the same
    def gather(tensor):
        gathered = fabric.all_gather(tensor, sync_grads=True)
        if gathered.requires_grad:
            gathered.register_hook(torch.Tensor.contiguous)  # gloo deals a gradient out as its bytes lie
        return gathered

    return gather
