from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from threadpoolctl import threadpool_info, threadpool_limits

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


@pytest.mark.parametrize("transposed", [0, 5])
def test_features_equal_the_networks_mapping(transposed):
    import torch

    model, frames = tiny.model(sizes=tiny.SIZES.model_copy(update={"transposed": transposed})), tiny.frames(5000)
    y = torch.from_numpy(frames)[None]
    x = torch.cat([y[:, :1].expand(-1, model.sizes.reach, -1), y], 1)[:, :-1]
    with torch.inference_mode():
        mapping = model.network.mapping(x, y)[0].numpy()
    assert np.abs(extract_frames(frames, model) - mapping).max() < 1e-5
    assert np.array_equal(extract_frames(frames, model), extract_frames(frames, model.network))


@pytest.mark.parametrize("transposed", [0, 5])
@pytest.mark.parametrize("size", [7, 4095, 4096, 4097, 20000])
def test_features_do_not_depend_on_blocks_or_threads(size, transposed):
    frames, model = tiny.frames(9000), tiny.model(sizes=tiny.SIZES.model_copy(update={"transposed": transposed}))
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


def test_features_never_look_ahead():
    frames = tiny.frames(600)
    changed = frames.copy()
    changed[520:] = tiny.frames(80, seed=1)
    before, after = extract_frames(frames, tiny.model()), extract_frames(changed, tiny.model())
    assert np.abs(before[:520] - after[:520]).max() < 1e-5  # the transform's rounding
    assert (np.abs(before[520:] - after[520:]).max(axis=1) > 1e-3).all()


def test_no_frames_give_no_features():
    assert extract_frames(tiny.frames(0), tiny.model()).shape == (0, 7)


def test_threads_that_extract_together_leave_the_matrix_libraries_as_they_were():
    frames, model = tiny.frames(9000), tiny.model()
    with threadpool_limits(limits=2):
        before = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: extract_frames(frames, model), range(8)))
        assert [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"] == before
    assert all(np.array_equal(result, results[0]) for result in results)


def test_frames_of_another_shape_are_refused():
    for model in (tiny.model(), tiny.model().network):
        with pytest.raises(FormatError, match=r"of shape \(5, 48\); this model takes \(n_frames, 36\)"):
            extract_frames(tiny.frames(5, n_bins=48), model)
