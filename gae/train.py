"""Training, read from top to bottom: the loop, what it does at each pause, the loss, and how weights are judged.

One process or many (GPUs, hosts) run the same code through Lightning Fabric. The draws of a step follow from the seed and
the step alone (`gae.batches`), so weights, optimiser state and the number of the step are all that a checkpoint needs.
"""

import copy
import math
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gae.batches import Excerpts, long_enough, n_frames_before
from gae.checkpoints import Checkpoints
from gae.compute import give_back_memory
from gae.cqt import transpose
from gae.errors import TrainingError, reason, warn
from gae.files import code_digest, digest, write_json
from gae.measures import invariance_top1, mean_and_error
from gae.model import GatedAutoencoder, contrast, sparsity
from gae.modelfile import save_model
from gae.muon import Muon
from gae.processes import agreed, alone_with, gatherer, launch, peers, settled, told_once, within_memory
from gae.shards import Shards
from gae.view import View

PAUSE_STEPS = 25  # steps between two looks at the loss; all else happens at some of these pauses
VALIDATION_STEPS = 500
_VALIDATION_FRAMES = 1200
_KEPT = ("step", "good_step", "history", "best_score", "best_error", "best_step", "fruitless")  # in a checkpoint, beside weights
_SOUNDING = 0.05  # share of the frames that sound, below which a batch is weighed as if as many did
_RUNTIME = {"accelerator", "devices", "nodes"}  # parameters that leave the result as it is


def train(params, shards, model, metrics, curves, drawings, checkpoints):
    """Train a model, going on from the last checkpoint of the same parameters, data and code.

    Parameters
    ----------
    params : gae.params.Params
        Reads model, train, plot.interval and compute.checkpoint_seconds.
    shards : Path
        Folder of the training list's shards.
    model, metrics : Path
        The model file, and a JSON with the final losses, the steps and the speed.
    curves, drawings : Path
        Folders for DVCLive's curves and for drawings of the network.
    checkpoints : Path
        Folder for checkpoints; gone when training has ended.

    Raises
    ------
    TrainingError
        If there is too little data; if the loss is NaN or diverges, the last good weights being then in `model`; if memory does not
        hold it; or if another of its processes ends early, or has other parameters, frames, code or packages.
    GaeError
        If another training uses these checkpoints.
    """
    params = params.model_copy(update={"train": settled(params.train)})
    fabric = launch(params.train)
    with Shards(shards) as frames, peers(fabric), alone_with(fabric, checkpoints), within_memory(params.train):
        with told_once(fabric):
            run = Run(fabric, params, frames, checkpoints)
        view = View(run, curves, drawings) if fabric.is_global_zero else None
        with view or nullcontext():
            _advance(run, view, model, metrics)
        if view:
            run.write(model, run.best, run.best_step, run.history[-1])
            write_json(metrics, run.metrics())
            run.store.clear()


def _advance(run, view, model, metrics):
    """Train to the end."""
    for batch in run.excerpts.batches(run.step, run.params.train.steps):
        run.update(batch)
        if not run.pauses:
            continue
        trouble = run.look()
        if trouble:
            run.write_good(model, metrics)
            with told_once(run.fabric):
                raise TrainingError(f"{trouble}; {run.remedy(model)}")
        if run.step % VALIDATION_STEPS == 0 or run.ended:
            run.validate()
        if view:
            view.update(run)
        if run.ended:
            break
        run.checkpoint()
        give_back_memory()


class Run:
    """The state of one training run, and what moves it on.

    Attributes
    ----------
    step : int
        Steps done.
    history : list of dict
        A row for each pause: step and mean losses since the last, and the validation's score where there was one.
    model, average, best : GatedAutoencoder
        The weights being trained, their moving average, and the newest average whose score is within an error of the best.
    """

    def __init__(self, fabric, params, shards, checkpoints):
        self.fabric, self.params, self.shards = fabric, params, shards
        n_frames = n_frames_before(params.model.lags[0], params.train) + params.train.block
        usable = long_enough(shards.lines, n_frames)
        if (short := len(shards.lines) - len(usable)) and fabric.is_global_zero:
            least = f"{n_frames * shards.cqt.frame_seconds:.1f} s (train.block and what model.context reaches back)"
            warn(f"{short} of {len(shards.lines)} lines of the training list are shorter than {least} and not trained on")
        dtypes = sorted({track.dtype for track in shards.tracks.values()})
        listed = [[(track.key, track.n_frames) for track in line] for line in shards.lines]
        self.data = digest([listed, shards.cqt.model_dump(), dtypes])
        code = code_digest(["batches", "cqt", "measures", "model", "muon", "processes", "train"], ["numpy", "torch"])
        frames = sorted({track.code for track in shards.tracks.values()})
        recipe = digest([params.model.model_dump(), params.model.readings, recipe_of(params.train), self.data, frames, code])
        agreed(fabric, recipe)
        lines, held_out = split(usable, params.train.validation)
        self.excerpts = Excerpts(shards, lines, params.model.lags, params.train, fabric.global_rank, fabric.world_size)
        self.validation = Validation(shards, held_out, params.model.reach, params.train.seed)
        if params.train.patience and not held_out and fabric.is_global_zero:
            why = "train.validation is 0" if not params.train.validation else "the training list has too few lines"
            warn(f"train.patience does nothing, as no track is held out for validation: {why}")

        torch.manual_seed(params.train.seed)
        self.model = GatedAutoencoder(shards.cqt.n_bins, params.model)
        self.model.set_filter_norm(params.train.filter_norm)
        self.average = copy.deepcopy(self.model).requires_grad_(False).to(fabric.device)
        self.best, self.good = copy.deepcopy(self.average), copy.deepcopy(self.average)
        optimisers = optimisers_of(self.model, params.train)
        objective = Objective(self.model, params.train, gatherer(fabric))
        self.objective, *self.optimisers = fabric.setup(_compiled(objective) if params.train.compile else objective, *optimisers)

        self.step, self.good_step, self.history, self.seconds = 0, 0, [], 0.0
        self.best_score, self.best_error, self.best_step, self.fruitless = -1.0, 0.0, 0, 0
        self._window, self._in_order = [], fabric.world_size == 1
        modules = {"model": self.model, "average": self.average, "best": self.best, "good": self.good}
        self.store = Checkpoints(checkpoints, recipe, modules, optimisers, fabric)
        vars(self).update(self.store.resume() or {})
        self._checkpointed = self._since = time.monotonic()

    @property
    def pauses(self):
        """Whether to look up after this step: the first tells where the loss comes from."""
        return self.step == 1 or self.step % PAUSE_STEPS == 0 or self.ended

    @property
    def ended(self):
        """Whether all steps are done, or validation has seen no progress for long enough."""
        patience = self.params.train.patience
        return self.step >= self.params.train.steps or (patience and self.fruitless >= patience)

    def update(self, batch):
        """One step of the optimiser."""
        train = self.params.train
        for group in [group for optimiser in self.optimisers for group in optimiser.param_groups]:
            group["lr"] = group["initial_lr"] * schedule(self.step, train)
        if not self._in_order:  # DDP puts gradients, and so their sums, in another order after its first
            self._differentiate(batch)
            self._forget_gradients()
            self._in_order = True
        terms = self._differentiate(batch)
        for optimiser in self.optimisers:
            optimiser.step()
        self._forget_gradients()
        self.model.set_filter_norm(train.filter_norm)
        # early weights must not linger in the average: it starts short and grows to its full length
        keep = min(train.averaging, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)
        self._window.append({name: term.detach() for name, term in terms.items()})
        self.step += 1

    def _differentiate(self, batch):
        """The terms of the loss, and the gradients of the weights."""
        tensors = [torch.from_numpy(array).to(self.fabric.device) for array in batch]
        try:
            terms = self.objective(*tensors, contrast_weight(self.step, self.params.train))
            self.fabric.backward(terms["loss"])
        except torch._dynamo.exc.ShortenTraceback as error:  # at the first step; no public name tells it from other failures
            said = reason(str(error).strip().split("\n\n")[0])
            needed = "a C++ compiler" if self.fabric.device.type == "cpu" else "Triton, for a GPU that it serves"
            raise TrainingError(f"train.compile: {said}; install {needed}, or set it to false") from None
        return terms

    def _forget_gradients(self):
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def look(self):
        """Note the mean losses since the last pause; say what is wrong with them, if anything."""
        names = list(self._window[0])
        means = torch.stack([torch.stack([terms[name] for terms in self._window]).mean() for name in names])
        row = dict(zip(names, self.fabric.all_reduce(means, reduce_op="mean").tolist(), strict=True))
        self._window = []
        if not (math.isfinite(row["loss"]) and all(weight.isfinite().all() for weight in self.model.parameters())):
            return f"the loss became NaN or infinite between steps {self.good_step} and {self.step}"
        self.history.append({"step": self.step, **row})
        # the first step may have met a batch of rests, and those after it may have diverged: beside it stands what takes no learning
        present, first = self._weighed(row), max(map(self._weighed, (self.history[0], self._knowing_nothing())))
        diverging = present > 3 * first
        if diverging and (len(self.history) > 8 or self.ended or present > 100 * first):  # a small rise at the very start may pass
            return f"the loss diverges: {present:.3g} at step {self.step}, {first:.3g} at the start"
        if not diverging:
            self.good.load_state_dict(self.average.state_dict())
            self.good_step = self.step
        return None

    def _weighed(self, row):
        """What the loss of a pause would be if the contrast weighed what it does now."""
        train = self.params.train
        weights = {"reconstruction": 1.0, "contrast": contrast_weight(self.step, train), "sparsity": train.sparsity}
        return sum(weight * row.get(term, 0.0) for term, weight in weights.items())

    def _knowing_nothing(self):
        """The losses of silence in the place of every frame, and of mappings that are told apart by chance."""
        if self.params.train.objective == "reconstruction":
            return {"reconstruction": 1 / self.shards.cqt.n_bins}  # the mean square of a frame of norm 1
        return {"reconstruction": 1.0, "contrast": math.log(self.params.train.contrast_frames)}

    def validate(self):
        """Score the averaged weights on the tracks kept for it, and keep the newest that come within a standard error of the best.

        Later weights rebuild better, and what they lose is less than that by which so few tracks may misjudge all music: the
        one-standard-error rule of L. Breiman et al., Classification and Regression Trees, 1984, tracks for folds. Few tracks thus
        keep the newest weights unless they break down; without any the newest are the best. The first process judges for all.
        """
        scored = self.fabric.broadcast(self.validation.score(self.average) if self.fabric.is_global_zero else None)
        if scored:
            score, error = scored
            self.fruitless = 0 if score > self.best_score else self.fruitless + 1
            if score > self.best_score:
                self.best_score, self.best_error = score, error
            self.history[-1]["validation_top1"] = score
        if not scored or score >= self.best_score - self.best_error:
            self.best.load_state_dict(self.average.state_dict())
            self.best_step = self.step

    def checkpoint(self):
        """Save the whole state if the last time is long enough ago."""
        if time.monotonic() - self._checkpointed < self.params.compute.checkpoint_seconds:
            return
        self._checkpointed = time.monotonic()
        self.store.save(seconds=self.elapsed(), **{name: getattr(self, name) for name in _KEPT})

    def elapsed(self):
        """Seconds of training so far, over all the runs that led here."""
        return self.seconds + time.monotonic() - self._since

    def write(self, path, weights, step, metrics):
        """Write the model file: weights of a step, and what was measured when."""
        facts = {"train": recipe_of(self.params.train), "data": self.data, "step": step, "metrics": metrics}
        save_model(path, weights, self.shards.cqt, self.params.train.dtype, **facts)

    def write_good(self, path, metrics):
        """Write the last weights that were sound, if there are any. The metrics of those that were there before go."""
        if self.fabric.is_global_zero and self.good_step:
            Path(metrics).unlink(missing_ok=True)
            self.write(path, self.good, self.good_step, next(row for row in self.history if row["step"] == self.good_step))

    def remedy(self, path):
        """What to do about a loss that diverged: at the first step it is not the rate that is at fault."""
        if not self.good_step:
            return "bring model.input_scale and the weights of the loss (train.contrast, sparsity, weight_decay) near their defaults"
        return f"weights from before are in {path}; lower train.learning_rate and train.muon_rate"

    def metrics(self):
        """What `dvc metrics` shows of training: final losses and validation, the step of the weights kept, speed in frames a second."""
        train = self.params.train
        frames = self.step * train.batch * math.ceil(train.block / train.stride)
        final = {name: round(value, 5) for name, value in self.history[-1].items() if name != "step"}
        return {**final, "step": self.best_step, "steps": self.step, "frames_per_second": round(frames / self.elapsed())}


class Objective(nn.Module):
    """The model with its loss, as one module for Fabric to wrap.

    Parameters
    ----------
    model : GatedAutoencoder
    train : gae.params.Train
    gather : callable
        Collects a tensor from all processes, with gradients.
    """

    def __init__(self, model, train, gather=lambda tensor: tensor):
        super().__init__()
        self.model, self.settings, self.gather = model, train, gather

    def forward(self, x, y, contexts, one_view, weight):
        """The terms of the loss for a `gae.batches.Batch`, its two sides in the same products.

        The original's objective rebuilds the transposed y[1] from the mapping of (x[0], y[0]) and the context x[1]: the mean
        squared error. That of invariance rebuilds each side by the other's mapping, or by its own where the other is another
        view, which no mapping can foresee; the error is a share of the power of y. And it asks that the two mappings of a
        frame be closer to each other than to those of other frames, with a `weight`, a number that may change from step to step.

        Returns
        -------
        dict of str to Tensor
            loss, reconstruction, and where they are used contrast and sparsity.
        """
        settings, model = self.settings, self.model
        factors = model.responses(x.flatten(0, -2), contexts)
        if settings.objective == "reconstruction":
            mapping = model.relate(factors[:1], model.y_factors(y[:1]))
            terms = {"reconstruction": (model.rebuild(mapping, factors[1:]) - y[1:]).square().mean()}
        else:
            mapping = model.relate(factors, model.y_factors(y))
            given = torch.where(one_view[:, None, None], mapping.flip(0), mapping)
            error = (model.rebuild(given, factors) - y).square().sum()
            power = self.gather(y.square().sum()).mean()  # of all processes, as their losses are averaged
            # a frame that sounds has a power of 1: in a batch of rests alone next to nothing is to be rebuilt, and no share of it
            terms = {"reconstruction": error / power.clamp_min(_SOUNDING * y[..., 0].numel())}
            if settings.contrast:
                terms["contrast"] = contrast(*map(self._groups, mapping), settings.temperature)
        if settings.sparsity:
            terms["sparsity"] = sparsity(mapping[0])
        decay = model.filters_x.square().sum() + model.filters_y.square().sum() if settings.weight_decay else 0.0
        loss = (
            terms["reconstruction"]
            + weight * terms.get("contrast", 0.0)
            + settings.sparsity * terms.get("sparsity", 0.0)
            + settings.weight_decay * decay
        )
        return {"loss": loss, **terms}

    def _groups(self, mapping):
        """The frames of all processes in groups (n_groups, about contrast_frames, n_maps), each with frames of every excerpt."""
        mapping = self.gather(mapping.contiguous()).flatten(0, -3)
        n_excerpts, n_frames, n_maps = mapping.shape
        wanted = n_excerpts * n_frames / self.settings.contrast_frames
        divisors = [n for n in range(1, n_frames + 1) if n_frames % n == 0]
        n_groups = sorted(divisors, key=lambda n: abs(math.log(n / wanted)))[0]  # torch.compile can't follow min
        dealt = mapping.unflatten(1, (-1, n_groups))
        return dealt.permute(2, 0, 1, 3).reshape(n_groups, -1, n_maps)


class Validation:
    """Invariance on tracks of the list that training does not see.

    Frames of one view must find themselves among frames of the last view (another sound, where there are views),
    transposed by -6 to 6 semitones but 0.

    Parameters
    ----------
    shards : gae.shards.Shards
    lines : list of list of Track
        May be empty.
    reach : int
        Frames that the features look back.
    seed : int
    """

    def __init__(self, shards, lines, reach, seed):
        rng = np.random.default_rng([seed, 1])
        queries, candidates, self.counts = [], [], []
        for line in lines:
            n_places = min(track.n_frames for track in line) - reach
            # no place twice: of two that are the same neither can be found
            places = rng.choice(n_places, min(n_places, math.ceil(_VALIDATION_FRAMES / len(lines))), replace=False)
            self.counts.append(len(places))
            semitones = int(rng.choice([k for k in range(-6, 7) if k]))
            shift = shards.cqt.bins(semitones) or int(math.copysign(1, semitones))
            for start in places:
                queries.append(shards.read(line[0].key, start, start + reach + 1))
                candidates.append(transpose(shards.read(line[-1].key, start, start + reach + 1), shift))
        self.windows = [torch.from_numpy(np.stack(windows)) for windows in (queries, candidates) if windows]

    def score(self, model):
        """Share of a track's frames whose nearest by cosine is themselves, transposed, and its standard error; None without tracks."""
        if not self.windows:
            return None
        device = model.filters_x.device
        with torch.inference_mode():
            mappings = [model.mapping(w[:, :-1].to(device), w[:, -1:].to(device))[:, 0] for w in self.windows]
        found = invariance_top1(*(mapping.nan_to_num().cpu().numpy() for mapping in mappings))  # weights that broke find nothing
        return mean_and_error(np.split(found, np.cumsum(self.counts)[:-1]))


def split(lines, share):
    """Divide lines into (those to train on, those to validate on), by their content, whatever their order.

    Of five lines or more at least one is kept to validate on, if any share is; fewer are all trained on. A line that shares a
    track with those to validate on is neither trained on nor validated on besides; if all do, all are trained on.
    """
    if not share or len(lines) < 5:
        return lines, []
    count = min(_VALIDATION_FRAMES, max(1, math.floor(share * len(lines))))  # each gives a frame at least
    held_out, keys = [], set()
    for line in sorted(lines, key=lambda line: [digest(track.key) for track in line]):
        own = {track.key for track in line}
        if len(held_out) < count and keys.isdisjoint(own):
            held_out.append(line)
            keys |= own
    training = [line for line in lines if keys.isdisjoint(track.key for track in line)]
    return (training, held_out) if training else (lines, [])


def optimisers_of(model, train):
    """The optimisers of a model's weights, in the precision of `train`: Muon for matrices and Adam for biases, or Adam for all."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and train.optimiser == "muon"]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    optimisers = [torch.optim.Adam(others, lr=train.learning_rate)]
    if matrices:
        muon = partial(torch.optim.Muon, weight_decay=0.0) if train.precision == "bf16" else Muon
        optimisers.append(muon(matrices, lr=train.muon_rate))
    for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
        group["initial_lr"] = group["lr"]
    return optimisers


def schedule(step, train):
    """The share of its peak that the learning rate has: constant, or one cycle of two half cosines, up and down to nothing.

    L. Smith, N. Topin: Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.
    """
    if train.schedule == "constant":
        return 1.0
    rise = max(1.0, train.warmup * train.steps)
    if step < rise:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * step / rise)) / 2
    return max(1e-4, (1 + math.cos(math.pi * (step - rise) / max(1.0, train.steps - rise))) / 2)


def contrast_weight(step, train):
    """The weight of the contrastive term in a step: from `contrast` it falls geometrically to the share `contrast_kept`."""
    return train.contrast * train.contrast_kept ** (step / train.steps)


def recipe_of(train):
    """The parameters on which the weights depend."""
    return train.model_dump(exclude=_RUNTIME)


def _compiled(objective):
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")  # of PyTorch to itself
    return torch.compile(objective)
