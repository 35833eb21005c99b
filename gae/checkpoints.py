"""A run of training that can't be lost: its whole state in one file, written whole or not at all."""

import hashlib
import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save

from gae.errors import warn
from gae.files import remove_own, replacing, sweep
from gae.processes import from_first

_NAMES = r"[0-9a-f]{32}(\.safetensors)?"  # of checkpoints, and of the folders of their drawings


class Checkpoints:
    """The last checkpoint of one recipe, and a folder for what was drawn until then.

    Parameters
    ----------
    folder : str or Path
        Outside DVC's outputs, which it removes before it runs a stage.
    recipe : str
        Digest of all that the result depends on. Checkpoints of other recipes go when the first of this one is there.
    modules : dict of str to nn.Module
        What to save and restore.
    optimisers : list of torch.optim.Optimizer
    fabric : lightning_fabric.Fabric
        Its first process alone touches the folder, and tells the others what was there.

    Attributes
    ----------
    file, drawings : Path
    """

    def __init__(self, folder, recipe, modules, optimisers, fabric):
        self.folder, self.modules, self.optimisers, self.fabric = Path(folder), modules, optimisers, fabric
        self.file, self.drawings = self.folder / f"{recipe[:32]}.safetensors", self.folder / recipe[:32]

    def resume(self):
        """Restore the last checkpoint.

        Returns
        -------
        dict or None
            The facts saved with it; None where there is none, or it is damaged.

        Raises
        ------
        GaeError
            If it is there and can't be opened: that may pass, and it would be lost to the next.
        """
        facts, tensors = from_first(self.fabric, self._read)
        if facts is None:
            return None
        for name, module in self.modules.items():
            module.load_state_dict(_under(tensors, name))
        for number, optimiser in enumerate(self.optimisers):
            _restore(optimiser, _under(tensors, f"optimiser_{number}"))
        return facts

    def save(self, **facts):
        """Replace the last checkpoint by the present state, with JSON-able `facts`."""
        if not self.fabric.is_global_zero:
            return
        tensors = {f"{name}.{key}": value for name, module in self.modules.items() for key, value in module.state_dict().items()}
        for number, optimiser in enumerate(self.optimisers):
            for weight, entries in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser_{number}.{weight}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        text = json.dumps(facts)
        data = save(tensors, metadata={"gae": text, "sha256": _digest(text, tensors)})
        with replacing(self.file) as partial:
            partial.write_bytes(data)
        remove_own(self.folder, f"(?!{self.drawings.name}){_NAMES}")

    def clear(self):
        """Remove all checkpoints and drawings, and the folder if nothing else is in it: the run has ended well."""
        self.file.unlink(missing_ok=True)  # first: a run that went on from it would miss its drawings
        remove_own(self.folder, _NAMES)

    def _read(self):
        """The facts and the tensors of the last checkpoint, if there is one that is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        if not self.file.exists():
            return None, None
        with open(self.file, "rb"):  # safetensors takes what it may not open for missing
            pass
        try:
            with safetensors.safe_open(self.file, "pt") as file:
                metadata = file.metadata()
            tensors = load_file(self.file)
            if metadata["sha256"] == _digest(metadata["gae"], tensors):
                return json.loads(metadata["gae"]), tensors
        except (safetensors.SafetensorError, KeyError, TypeError):
            pass
        warn(f"{self.file}: damaged; training starts again from the first step")
        return None, None


def _restore(optimiser, tensors):
    """Put back what an optimiser remembers of each weight, {"<number of the weight>.<name>": tensor}."""
    state = optimiser.state_dict()
    state["state"] = {}
    for key, tensor in tensors.items():
        weight, name = key.split(".")
        state["state"].setdefault(int(weight), {})[name] = tensor
    optimiser.load_state_dict(state)


def _digest(text, tensors):
    """SHA-256 of all that a checkpoint holds: half a state is worse than none."""
    held = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        held.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        held.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return held.hexdigest()


def _under(tensors, name):
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(name + ".")}
