"""The one place that decides where work over many tracks runs.

A unit of work is a top-level function of plain arguments that writes its own output whole or not at all and returns a
small report. It runs unchanged in processes of this machine and on a Dask cluster that sees the same files, or the same
object store.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from gae.errors import GaeError, reason, warn
from gae.files import PACKAGES, code_digest
from gae.storage import is_url

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PATIENCE = 10  # s to wait for a Dask scheduler
_LONELY = 60  # s without a Dask worker until a line says so
_at_work = False  # whether this process is at a unit of work


def map_tracks(function, items, compute, label, arguments=(), told=None):
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
    told : callable, optional
        Called with an item and its report as soon as that is there: what is kept so outlives an error or Ctrl-C.

    Returns
    -------
    list
        The reports, in the order of `items`.

    Raises
    ------
    GaeError
        If a worker process was killed (Dask's: again and again), no Dask scheduler answers, or a worker does not see this
        machine's files or has other code.
    """
    if not items:
        return []
    reports = [None] * len(items)
    with submitting(compute) as submit:
        futures = {submit(function, item, *arguments): n for n, item in enumerate(items)}
        for future in tqdm(as_completed(futures), total=len(items), desc=label, unit="track", mininterval=0.5):
            n = futures.pop(future)
            reports[n] = future.result()
            if told:
                told(items[n], reports[n])
    return reports


def by_place(files, compute, path=str):
    """Which audio files are worked on where: those of this machine here, if the workers need not see them.

    Parameters
    ----------
    files : sequence
    compute : gae.params.Compute
    path : callable
        Gives the path or URL of one of `files`.

    Returns
    -------
    list of (gae.params.Compute, list)
    """
    here = beside_files(compute)
    if here is compute:
        return [(compute, files)]
    return [(here, [file for file in files if not is_url(path(file))]), (compute, [file for file in files if is_url(path(file))])]


def beside_files(compute):
    """Where work on this machine's files runs: in processes of its own, if what a cluster's workers compute waits at a URL."""
    if not is_url(compute.staging) or runs_here(compute):
        return compute
    return compute.model_copy(update={"scheduler": "local", "cluster": "none", "workers": 0})


@contextmanager
def submitting(compute):
    """Yield ``submit(function, *arguments)``, which starts a unit of work and returns its `concurrent.futures.Future`.

    Relative paths mean there what they mean here, and a worker that sees other files or has other code refuses.

    Parameters
    ----------
    compute : gae.params.Compute

    Raises
    ------
    GaeError
        As `map_tracks`.
    """
    shared, code = not is_url(compute.staging), None if runs_here(compute) else _code()
    with _mark() if shared and code else nullcontext() as mark, _executor(compute) as pool:
        yield partial(pool.submit, _at, os.getcwd() if shared else None, mark, code)


@contextmanager
def _mark():
    """The path of a file in the working folder: who does not see it is in another, be it of the same name."""
    with tempfile.NamedTemporaryFile(dir=os.getcwd(), prefix=".gae-", suffix=".partial") as file:
        yield file.name


@contextmanager
def _executor(compute):
    """Yield a `concurrent.futures.Executor`: processes of this machine, or a Dask cluster's."""
    workers = compute.workers or n_cores()
    if not runs_here(compute):
        with _dask_client(compute, workers) as client:
            from distributed.scheduler import KilledWorker

            try:
                yield client.get_executor(pure=False)
            except KilledWorker:
                raise GaeError("Dask: a track killed its workers (out of memory?); see their logs, then run again") from None
            except CancelledError:
                raise GaeError("Dask: the scheduler went away; start it and run again, it goes on where it was") from None
            except RuntimeError as error:
                if "deserialization of the task graph" not in str(error):
                    raise
                raise GaeError("Dask: the scheduler has no gae, or another; install the same there and start it again") from None
        return
    # children read these when they import numpy: one thread each, as many processes as cores
    with _environment(dict.fromkeys(_THREADS, "1")):
        pool = _Processes(workers, multiprocessing.get_context("spawn"), initializer=_begin)
        try:
            yield pool
        except BrokenProcessPool:
            raise GaeError("a worker process was killed (out of memory?); run again, it goes on where it was") from None
        finally:
            with _undisturbed():
                pool.shutdown(wait=True, cancel_futures=True)


class _Processes(ProcessPoolExecutor):
    """Processes that Ctrl-C does not reach before `_begin` has set them up: it would find them importing, and end in a traceback."""

    def submit(self, function, /, *arguments, **more):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # those that it starts inherit it
        try:
            return super().submit(function, *arguments, **more)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _undisturbed():
    """Ctrl-C waits: it would break off the end of a pool, whose workers then wait for work for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def n_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def keep_memory():
    """Ask glibc to keep what is freed: arrays that come and go with every step or piece cost page faults otherwise."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with suppress(AttributeError, OSError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)
        mallopt(mmap_threshold, 32 << 20)


def give_back_memory():
    """Give the system what glibc keeps in holes too small for the next array: they add up over an hour."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _dask_client(compute, workers):
    """A client of the scheduler that is named, or of a cluster that lives as long as the client."""
    try:
        import distributed
    except ImportError:
        raise GaeError("compute.scheduler, compute.cluster: Dask is not installed; `pip install distributed`") from None
    if compute.scheduler != "local":
        try:
            client = distributed.Client(compute.scheduler, timeout=_PATIENCE)
        except OSError:
            raise GaeError(
                f"compute.scheduler: no Dask scheduler answers at {compute.scheduler}; start one with `dask scheduler`"
            ) from None
        except (TypeError, ValueError) as error:  # no certificate for tls, a port that is none
            raise GaeError(f"compute.scheduler: {compute.scheduler}: {reason(error)}; correct it, or Dask's own configuration") from None
        with client, _company(client, f"start some for {compute.scheduler}, with this gae installed"):
            yield client
        return
    starting = _slurm_cluster(workers) if compute.cluster == "slurm" else _local_cluster(workers)
    with starting as cluster, distributed.Client(cluster) as client, _company(client, "see squeue and slurm-*.out"):
        yield client


@contextmanager
def _company(client, remedy):
    """Say so where a Dask cluster has had no worker for a while: it would wait for one for ever without a word."""
    ended = threading.Event()

    def watch():
        alone = 0
        while not ended.wait(_LONELY / 6):
            with suppress(Exception):  # whatever befalls the scheduler is told elsewhere
                alone = 0 if client.scheduler_info()["workers"] else alone + 1
                if alone == 6:
                    warn(f"Dask: no worker is there, and nothing moves until one comes; {remedy}")

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _local_cluster(workers):
    import distributed

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # its processes inherit it: Ctrl-C is for the one that asked
    try:
        return distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _slurm_cluster(jobs):
    """A Dask cluster whose workers are jobs of SLURM; their cores, memory and queue stand in Dask's own configuration."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise GaeError("compute.cluster: dask-jobqueue is not installed; `pip install dask-jobqueue`") from None
    finally:
        if signal.getsignal(signal.SIGINT) is not interrupt:  # once it is imported, Ctrl-C would end a stage as if it had done its work
            signal.signal(signal.SIGINT, interrupt)
    if not shutil.which("sbatch"):
        raise GaeError("compute.cluster: no sbatch on this machine; run this where SLURM takes jobs, or set it to none")
    try:
        # one process each: of a job of several, whose workers have other names than it, Dask would not see the end
        cluster = SLURMCluster(job_cls=_dispensable(SLURMCluster.job_cls), processes=1)
    except (ValueError, RuntimeError) as error:
        raise GaeError(f"compute.cluster: {reason(error)} Correct ~/.config/dask/jobqueue.yaml: docs/scale.md") from None
    with cluster:
        _taken_by_slurm(cluster.job_script())
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)  # not scale: a job that reaches its time limit is followed by another
        yield cluster


def _dispensable(kind):
    """A class of Dask's jobs of which one that SLURM refuses, as above a user's limit, is told, and leaves the work to the others."""
    from distributed.deploy.spec import ProcessInterface

    class Job(kind):
        async def start(self):
            try:
                await super().start()
            except RuntimeError as error:
                warn(f"SLURM refuses a job, and leaves its work to the others: {reason(error)}")
                await ProcessInterface.start(self)  # not to be started

    return Job


def _taken_by_slurm(job):
    """Have SLURM look at a job before it is submitted: Dask would wait for ever for workers of one that is refused."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(job)
        script.flush()
        tried = subprocess.run(["sbatch", "--test-only", script.name], capture_output=True, text=True)
    if tried.returncode:
        said = reason(tried.stderr)
        raise GaeError(f"compute.cluster: SLURM takes no such job ({said}); change it in ~/.config/dask/jobqueue.yaml: docs/scale.md")


def _begin():
    """Set up a worker process."""
    signal.signal(signal.SIGINT, _break_off)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    keep_memory()
    _end_with_parent()


def _break_off(*_):
    """Ctrl-C in a worker process ends the unit of work that it is at, once, lest copies be left behind; the rest is its parent's."""
    global _at_work
    if _at_work:
        _at_work = False
        raise KeyboardInterrupt


def _end_with_parent():
    """Watch for the parent's death: a worker whose parent was killed would wait for work for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _at(folder, mark, code, function, *arguments):
    """Run a unit of work by the caller's code, where relative paths mean what they mean to the caller, or anywhere if there are none."""
    if code not in (None, _code()):
        raise GaeError(
            f"the worker on {socket.gethostname()} has another gae, or other versions of {', '.join(PACKAGES)}, than this machine; "
            "install the same there and start it again"
        )
    global _at_work
    with _working_folder.at(folder):
        if mark and not os.path.exists(mark):
            raise _unseen(folder, "another of that name is there")
        _at_work = True
        try:
            return function(*arguments)
        finally:
            _at_work = False


class _WorkingFolder:
    """That of this process. Dask's workers may have several threads, and work for several projects: one waits for the other."""

    def __init__(self):
        self._free, self._users = threading.Condition(), 0

    @contextmanager
    def at(self, folder):
        """Be in a folder, together with others who want the same; in any if it is None."""
        if folder is None:
            yield
            return
        with self._free:
            self._free.wait_for(lambda: not self._users or os.getcwd() == os.path.realpath(folder))
            try:
                os.chdir(folder)
            except OSError as error:
                raise _unseen(folder, error.strerror) from None
            self._users += 1
        try:
            yield
        finally:
            with self._free:
                self._users -= 1
                self._free.notify_all()


_working_folder = _WorkingFolder()


def _unseen(folder, why):
    said = f"{folder}: not seen by the worker on {socket.gethostname()} ({why})"
    return GaeError(f"{said}; share it, or name a URL in compute.staging (docs/scale.md)")


def runs_here(compute):
    """Whether work runs in processes of this machine, and on no Dask cluster."""
    return (compute.scheduler, compute.cluster) == ("local", "none")


@cache
def _code():
    """Digest of what a result may depend on: on both sides it must be the same."""
    return code_digest(sorted(file.stem for file in Path(__file__).parent.glob("*.py")), PACKAGES)


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
