"""What a person sees of a training while it runs: the bar, the curves, and drawings of the network and the losses."""

import shutil
from pathlib import Path

from dvclive import Live
from tqdm import tqdm

from gae import pictures
from gae.files import remove_own, replacing, sweep, write_json

_DRAWINGS = r"(\w+-\d{7,}|loss)\.png"  # names of drawings of the network and of the losses


class View:
    """What a person sees of a run: the bar, DVCLive's curves, drawings of the network and the losses.

    Drawings are kept beside the checkpoint too: `dvc exp run` first puts back the outputs of the last run that ended.
    """

    def __init__(self, run, curves, drawings):
        self.kept, self.drawings = run.store.drawings, Path(drawings)
        sweep(self.drawings)
        for folder in [self.drawings] if run.step else [self.drawings, self.kept]:
            remove_own(folder, _DRAWINGS)
        for folder in (self.drawings, self.kept):
            folder.mkdir(parents=True, exist_ok=True)
        self._show_kept()
        self.live = _Live(str(curves), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
        for row in run.history:
            self._log(row)
        if run.history:
            self.live.sync()
        self.shown = run.step
        self.bar = tqdm(desc="train", unit="step", initial=run.step, total=run.params.train.steps, mininterval=0.5)
        self.frames = run.shards.read(run.excerpts.lines[0][0].key, 0, 1500)

    def update(self, run):
        """Show a pause: a point of the curves, the bar, and a drawing when it is due."""
        row = run.history[-1]
        self._log(row)
        self.live.sync()
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in row.items() if name != "step"}, refresh=False)
        due = run.step // run.params.plot.interval > self.shown // run.params.plot.interval
        self.bar.update(run.step - self.shown)
        self.shown = run.step
        if due or run.ended:
            pictures.draw_network(run.average, run.shards.cqt, self.frames, self.kept, run.step)
            pictures.draw_losses(run.history, self.kept / "loss.png")
            self._show_kept()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Finish the bar and the curves."""
        self.bar.close()
        self.live.end()

    def _show_kept(self):
        """Copy what is kept to where it is looked for."""
        for drawing in self.kept.glob("*.png"):
            with replacing(self.drawings / drawing.name, durable=False) as partial:
                shutil.copyfile(drawing, partial)

    def _log(self, row):
        self.live.step = row["step"]
        for name, value in row.items():
            if name != "step":
                self.live.log_metric(name, value)


class _Live(Live):
    """DVCLive's curves, with a summary that is whole at any time, in a folder that may hold other things."""

    def _init_cleanup(self):
        """Remove the curves of an earlier run; DVCLive's own way would take a dvc.yaml or params.yaml along."""
        sweep(self.dir)
        remove_own(Path(self.plots_dir) / "metrics", r".+\.tsv")

    def post_data_to_studio(self):
        """Nothing: DVC Studio is no part of this, and each time DVCLive would read all curves from their first step on for it."""

    def make_summary(self):
        self.summary["step"] = self.step
        write_json(self.metrics_file, self.summary, durable=False)
