"""The one place that decides where work over many tracks runs.

A unit of work is a top-level function of plain arguments that writes its own output whole or not at all and returns a
small report. It runs unchanged in processes of this machine and on a Dask cluster.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from tqdm import tqdm

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def executor(compute):
    """Yield a `concurrent.futures.Executor` as the parameters ask.

    Parameters
    ----------
    compute : gae.params.Compute
    """
    workers = compute.workers or len(os.sched_getaffinity(0))
    # children import numpy afresh and read these: one thread each, as many processes as cores
    with _environment({name: "1" for name in _THREADS}):
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        pool.shutdown()


def map_tracks(function, items, compute, label, arguments=()):
    """Run ``function(item, *arguments)`` for every item, with a progress bar.

    Parameters
    ----------
    function : callable
        A unit of work.
    items : sequence
    compute : gae.params.Compute
    label : str
        What the bar says.
    arguments : tuple
        Passed on after each item.

    Returns
    -------
    list
        The reports, in the order of `items`.
    """
    if not items:
        return []
    with executor(compute) as pool:
        futures = {pool.submit(function, item, *arguments): n for n, item in enumerate(items)}
        reports = [None] * len(items)
        for future in tqdm(as_completed(futures), total=len(items), desc=label, unit="track", mininterval=0.5):
            reports[futures[future]] = future.result()
    return reports


@contextmanager
def _environment(values):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is None})
    try:
        yield
    finally:
        for name in values:
            if before[name] is None:
                os.environ.pop(name, None)
