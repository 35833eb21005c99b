import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from threadpoolctl import threadpool_info, threadpool_limits

from gae import mapping
from gae.cqt import transpose
from gae.errors import FormatError
from gae.mapping import extract_blocks, extract_frames


def by_the_formula(frames, model, lags):
    """Frame by frame, filter by filter, in float64."""
    w = {name: array.astype(np.float64) for name, array in model.weights.items()}
    w["filters_x"] = w["filters_x"].reshape(model.sizes.n_factors, model.sizes.context, -1)
    values = []
    for t in range(len(frames)):
        factors = np.zeros(model.sizes.n_factors)
        for f in range(model.sizes.n_factors):
            x = sum(w["filters_x"][f, k] @ frames[max(0, t - lag)] for k, lag in enumerate(lags))
            factors[f] = model.sizes.input_scale * x * model.sizes.input_scale * (w["filters_y"][f] @ frames[t])
        hidden = np.tanh(w["map_1.weight"] @ factors + w["map_1.bias"])
        values.append(np.tanh(w["map_2.weight"] @ hidden + w["map_2.bias"]))
    return np.array(values)


@pytest.mark.parametrize(
    ("gaps", "lags"), [({"dilation": 2, "growth": 0}, (9, 7, 5, 3, 1)), ({"dilation": 1, "growth": 1}, (11, 7, 4, 2, 1))]
)
def test_features_follow_the_formula(gaps, lags):
    frames, model = tiny.frames(30), tiny.model(sizes=tiny.SIZES.model_copy(update=gaps))
    assert np.abs(extract_frames(frames, model) - by_the_formula(frames, model, lags)).max() < 1e-5


@pytest.mark.parametrize(("transposed", "stretched"), [(0, 0), (5, 0), (0, 0.5), (5, 0.4), (5, 1)])
def test_features_equal_the_networks_mapping(transposed, stretched):
    import torch

    model = tiny.model(sizes=tiny.SIZES.model_copy(update={"transposed": transposed, "stretched": stretched}))
    frames = tiny.frames(5000)
    y = torch.from_numpy(frames)[None]
    x = torch.cat([y[:, :1].expand(-1, model.sizes.reach, -1), y], 1)[:, :-1]
    with torch.inference_mode():
        expected = model.network.mapping(x, y)[0].numpy()
    assert np.abs(extract_frames(frames, model) - expected).max() < 1e-5
    assert np.array_equal(extract_frames(frames, model), extract_frames(frames, model.network))


@pytest.mark.parametrize(("transposed", "stretched"), [(0, 0), (5, 0), (5, 0.4)])
@pytest.mark.parametrize("size", [7, 4095, 4096, 4097, 20000])
def test_features_do_not_depend_on_blocks_or_threads(size, transposed, stretched):
    frames = tiny.frames(9000)
    model = tiny.model(sizes=tiny.SIZES.model_copy(update={"transposed": transposed, "stretched": stretched}))
    whole = extract_frames(frames, model)
    with threadpool_limits(limits=2):
        blocks = [frames[:0], *(frames[start : start + size] for start in range(0, len(frames), size)), frames[:0]]
        pieces = list(extract_blocks(iter(blocks), model))
    assert whole.dtype == np.float32 and whole.shape == (9000, 7)
    assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("bins", [5, 36, 1000])
def test_features_are_the_mean_over_transpositions(bins):
    frames, plain = tiny.frames(300), tiny.model()
    averaged = tiny.model(sizes=tiny.SIZES.model_copy(update={"transposed": bins}))
    expected = np.mean([extract_frames(transpose(frames, k), plain) for k in (-bins, 0, bins)], axis=0)
    assert np.abs(extract_frames(frames, averaged) - expected).max() < 1e-5


@pytest.mark.parametrize("bins", [0, 5])
def test_contexts_are_read_faster_below_and_slower_above(bins):
    frames, plain = tiny.frames(40), tiny.model()
    stretched = tiny.model(sizes=tiny.SIZES.model_copy(update={"transposed": bins, "stretched": 0.5}))
    readings = [(-bins, (6, 5, 3, 2, 1)), (0, (9, 7, 5, 3, 1)), (bins, (14, 11, 8, 5, 2))]
    expected = np.mean([by_the_formula(transpose(frames, k), plain, lags) for k, lags in readings], axis=0)
    assert np.abs(extract_frames(frames, stretched) - expected).max() < 1e-5


def test_frames_of_a_context_that_is_read_faster_may_coincide():
    model = tiny.model(sizes=tiny.SIZES.model_copy(update={"dilation": 1, "stretched": 1}))
    frames, readings = tiny.frames(40), [(3, 2, 2, 1, 1), (5, 4, 3, 2, 1), (10, 8, 6, 4, 2)]
    expected = np.mean([by_the_formula(frames, model, lags) for lags in readings], axis=0)
    assert np.abs(extract_frames(frames, model) - expected).max() < 1e-5


@pytest.mark.parametrize("stretched", [0, 0.5])
def test_features_never_look_ahead(stretched):
    frames, model = tiny.frames(600), tiny.model(sizes=tiny.SIZES.model_copy(update={"stretched": stretched}))
    changed = frames.copy()
    changed[520:] = tiny.frames(80, seed=1)
    before, after = extract_frames(frames, model), extract_frames(changed, model)
    assert np.abs(before[:520] - after[:520]).max() < 1e-5  # the transform's rounding
    assert (np.abs(before[520:] - after[520:]).max(axis=1) > 1e-3).all()


def test_no_frames_give_no_features():
    assert extract_frames(tiny.frames(0), tiny.model()).shape == (0, 7)


def test_frames_are_mapped_by_one_thread_and_then_matrix_products_have_all_again():
    """Whatever threads extract together. In a process of its own: whoever holds a limit meanwhile, as this one may, hides it."""
    program = """
import tiny
from concurrent.futures import ThreadPoolExecutor
from threadpoolctl import threadpool_info
from gae import mapping
threads = lambda: [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
frames, model, before, made, meanwhile = tiny.frames(20_000), tiny.model().network, threads(), mapping._mapping, []
mapping._mapping = lambda model: lambda frames: meanwhile.extend(threads()) or made(model)(frames)
whole = mapping.extract_frames(frames, model)
with ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda _: mapping.extract_frames(frames, model), range(8)))
    print(before, set(meanwhile), threads(), all((result == whole).all() for result in results))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[2] {1} [2] True\n"


def test_frames_are_mapped_by_one_thread_even_if_the_caller_has_set_another_limit():
    mapping._matrix_libraries.cache_clear()  # it knows those that were loaded when it was first asked: NumPy's, and maybe not SciPy's
    with threadpool_limits(limits=2), mapping._one_thread():
        assert {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"} == {1}


def test_frames_of_another_shape_are_refused():
    for model in (tiny.model(), tiny.model().network):
        with pytest.raises(FormatError, match=r"of shape \(5, 48\); this model takes \(n_frames, 36\)"):
            extract_frames(tiny.frames(5, n_bins=48), model)


def test_features_of_a_network_are_those_of_its_weights_now():
    frames, network = tiny.frames(40), tiny.model().network
    before = extract_frames(frames, network)
    network.filters_y.data.mul_(2)
    after = extract_frames(frames, network)
    assert np.array_equal(after, extract_frames(frames, copy.deepcopy(network))) and not np.allclose(after, before, atol=1e-2)


def test_features_of_a_context_that_reaches_far_follow_the_formula():
    frames, model = tiny.frames(280), tiny.model(sizes=tiny.SIZES.model_copy(update={"dilation": 60}))
    assert np.abs(extract_frames(frames, model) - by_the_formula(frames, model, (241, 181, 121, 61, 1))).max() < 1e-5


@pytest.mark.parametrize("shape", [(36,), (2, 36, 3), ()])
def test_frames_of_more_or_fewer_axes_are_refused(shape):
    with pytest.raises(FormatError, match=r"this model takes \(n_frames, 36\)"):
        extract_frames(np.zeros(shape, np.float32), tiny.model())
