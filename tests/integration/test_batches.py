"""User-made batches (tf.data, sequences, generators, DataLoaders) train as in plain Keras."""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tf_keras

import raykeras as rk
from raykeras.data.adapters.adapter import as_batches
from raykeras.data.adapters.epochs import Epochs
from raykeras.data.adapters.transport import BatchChunk, BatchFeeder, receive_chunks
from tests.support.compare import assert_same_training, assert_same_weights
from tests.support.models import (
    CLASS,
    IMAGES,
    IN_PROCESS,
    PACKAGES,
    SCALES,
    SCORE,
    SERIES,
    WEIGHT,
    X,
    Y,
    dense,
    two_inputs,
)

BATCH, STEPS = 16, 5  # of 75 rows; the last batch has 11, an odd number
TWO = rk.Scale(workers=2)
FORMS = ("dataset", "sequence", "generator")

Arrays = tuple[Any, ...]


def slices(arrays: Arrays, index: int) -> Any:
    """Return one batch of nested arrays."""
    return tf.nest.map_structure(lambda array: array[index * BATCH : (index + 1) * BATCH], arrays)


class Slices(keras.utils.PyDataset):
    def __init__(self, arrays: Arrays, fails_at: int = -1, **options: Any) -> None:
        super().__init__(**options)
        self.arrays, self.fails_at = arrays, fails_at
        self.calls: list[Any] = []

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        if index == self.fails_at:
            raise FloatingPointError("in batch three")
        self.calls.append(index)
        return slices(self.arrays, index)


class Hooked(Slices):
    """Changes its labels at the end of each epoch."""

    def on_epoch_begin(self) -> None:
        self.calls.append("begin")

    def on_epoch_end(self) -> None:
        self.calls.append("end")
        self.arrays = (self.arrays[0], np.roll(self.arrays[1], 1))


class LegacySlices(tf_keras.utils.Sequence):
    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        return slices(self.arrays, index)


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return slices((X, Y), index % STEPS)


def generated(arrays: Arrays, num_batches: int | None = None) -> Iterator[Any]:
    """Yield batches in arrays that are overwritten when the next batch is requested."""
    for number in itertools.count() if num_batches is None else range(num_batches):
        batch = tf.nest.map_structure(np.copy, slices(arrays, number % STEPS))
        yield batch
        tf.nest.map_structure(lambda array: array.fill(0), batch)


def made(form: str, package: str, arrays: Arrays, num_batches: int | None = None) -> Any:
    if form == "dataset":
        return tf.data.Dataset.from_tensor_slices(arrays).batch(BATCH)
    if form == "sequence":
        return Slices(arrays) if package == "keras" else LegacySlices(arrays)
    return (slices(arrays, number % STEPS) for number in itertools.islice(itertools.count(), num_batches))


def sources(package: str, arrays: Arrays, forms: Iterable[str] = FORMS) -> list[Callable[[], Any]]:
    """Return functions that create the same batches, each in another form."""
    return [functools.partial(made, form, package, arrays) for form in forms]


def plain_fit(build: Callable[[], Any], package: str, data: Any, **options: Any) -> tuple[dict[str, list[float]], Any]:
    """Train in plain Keras; return the history and the model."""
    importlib.import_module(package).utils.set_random_seed(0)
    model = build()
    return model.fit(data, **{"epochs": 2, "shuffle": False, "verbose": 0, **options}).history, model


def assert_fits_match(
    build: Callable[[], Any],
    every_data: Iterable[Callable[[], Any]],
    expected: tuple[dict[str, list[float]], Any],
    folder: Path,
    scales: Iterable[rk.Scale] = SCALES.values(),
    **options: Any,
) -> None:
    """Train on the data in each form at each scale, and compare with plain Keras.

    Args:
        build: Makes the model.
        every_data: Functions that create the data.
        expected: Return value of `plain_fit`.
        folder: Folder for runs.
        scales: Scales to train at.
        options: Options of `fit`.
    """
    for create, scale in itertools.product(every_data, scales):
        data = create()
        steps = {"steps_per_epoch": STEPS} if inspect.isgenerator(data) else {}
        all_options = {"epochs": 2, "shuffle": False, "verbose": 0, **steps, **options}
        result = rk.fit(build, data, **all_options, scale=scale, run=rk.Run(storage=str(folder)))
        assert_same_training(result, *expected, message=f"{type(data).__name__}, {scale}")


@pytest.fixture
def scales(package: str, request: pytest.FixtureRequest) -> list[rk.Scale]:
    """Return scales of one and two replicas; for tf_keras only two, unless pytest is run with `--exhaustive`."""
    exhaustive = request.config.getoption("--exhaustive")
    return [*SCALES.values()] if package == "keras" or exhaustive else [SCALES["1x2"]]


@PACKAGES
@pytest.mark.parametrize("validation", ["dataset", "sequence"])
def test_fit_with_validation_matches_keras(
    validation: str, package: str, scales: list[rk.Scale], tmp_path: Path
) -> None:
    forms = ["dataset", "generator"] if validation == "dataset" else ["sequence"]
    every_data = sources(package, (X, Y, WEIGHT), forms)
    options: dict[str, Any] = {"validation_data": made(validation, package, (X[::-1].copy(), Y))}
    expected = plain_fit(dense(package), package, every_data[0](), **options)
    ignored = {"batch_size": 64}
    assert_fits_match(dense(package), every_data, expected, tmp_path, scales, **options, **ignored)


@PACKAGES
def test_dicts_of_inputs_outputs_and_weights_match_keras(package: str, scales: list[rk.Scale], tmp_path: Path) -> None:
    x = {"img_input": IMAGES, "ts_input": SERIES}
    y, weights = {"score_output": SCORE, "class_output": CLASS}, {"score_output": WEIGHT, "class_output": WEIGHT[::-1]}
    listed = ((IMAGES, SERIES), (SCORE, CLASS), (WEIGHT, WEIGHT[::-1]))  # Keras 3 accepts these weights only as a list
    expected = plain_fit(two_inputs(package), package, made("dataset", package, listed))
    assert_fits_match(two_inputs(package), sources(package, (x, y, weights)), expected, tmp_path, scales)


@PACKAGES
def test_class_weight_of_one_output_matches_keras(package: str, tmp_path: Path) -> None:
    factor = np.where(np.argmax(CLASS, 1) == 2, 3.0, np.where(np.argmax(CLASS, 1) == 4, 0.5, 1)).astype(np.float32)
    weighted = ((IMAGES, SERIES), (SCORE, CLASS), (np.ones(75, np.float32), factor))
    build = two_inputs(package)
    expected = plain_fit(build, package, made("dataset", package, weighted))
    named = {"score_output": SCORE, "class_output": CLASS}
    for output, y, scale in ((1, (SCORE, CLASS), SCALES["1x2"]), ("class_output", named, SCALES["1x1"])):
        every_data = sources(package, ((IMAGES, SERIES), y), ["sequence"])
        assert_fits_match(build, every_data, expected, tmp_path, [scale], class_weight={output: {2: 3.0, 4: 0.5}})


def test_class_weight_multiplies_with_sample_weight(tmp_path: Path) -> None:
    both = WEIGHT * np.where(Y == 1, 4, 1).astype(np.float32)
    expected = plain_fit(dense("keras"), "keras", made("dataset", "keras", (X, Y, both)))
    every_data = sources("keras", (X, Y, WEIGHT), ["dataset", "generator"])
    assert_fits_match(dense("keras"), every_data, expected, tmp_path, class_weight={1: 4.0})


def test_steps_per_epoch_continues_across_epochs(tmp_path: Path) -> None:
    options = {"steps_per_epoch": 3, "epochs": 4}
    expected = plain_fit(dense("keras"), "keras", made("generator", "keras", (X, Y)), **options)
    every_data = [*sources("keras", (X, Y), ["dataset", "sequence"]), Endless]
    assert_fits_match(dense("keras"), every_data, expected, tmp_path, **options)


def test_sequence_is_reshuffled_each_epoch_and_hooks_are_called(tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data = Hooked((X, Y))
        run = rk.Run(storage=str(tmp_path), name=name, seed=seed)
        rk.fit(dense("keras"), data, epochs=3, verbose=0, run=run)
        assert data.calls[:2] == [0, STEPS - 1]  # to learn shapes and dtypes
        calls = [data.calls[2 + i * (STEPS + 2) :][: STEPS + 2] for i in range(3)]
        assert len(data.calls) == 2 + 3 * (STEPS + 2)
        assert all(epoch[0] == "begin" and epoch[-1] == "end" for epoch in calls)
        orders.append([epoch[1:-1] for epoch in calls])
        assert all(sorted(epoch) == list(range(STEPS)) for epoch in orders[-1])
        assert orders[-1][0] != orders[-1][1]
    assert orders[0] == orders[1] != orders[2]


def test_sequence_hooks_follow_steps_per_epoch(tmp_path: Path) -> None:
    data = Hooked((X, Y))
    run = rk.Run(storage=str(tmp_path))
    rk.fit(dense("keras"), data, epochs=3, steps_per_epoch=2, shuffle=False, verbose=0, run=run)
    assert data.calls[2:] == ["begin", 0, 1, "end", "begin", 2, 3, "end", "begin", 4, 0, "end"]


def test_steps_per_execution_need_not_divide_num_batches(tmp_path: Path) -> None:
    build, every_data = dense("keras", steps_per_execution=2), sources("keras", (X, Y), ["dataset", "sequence"])
    expected = plain_fit(build, "keras", every_data[0]())
    assert_fits_match(build, every_data, expected, tmp_path, [rk.Scale()])


@PACKAGES
def test_steps_per_execution_need_not_divide_steps_per_epoch(
    package: str, scales: list[rk.Scale], tmp_path: Path
) -> None:
    options = {"epochs": 4, "steps_per_epoch": 3}
    # one step per execution, since Keras 3 runs only full executions; a generator, since a dataset would end
    expected = plain_fit(dense(package), package, made("generator", package, (X, Y)), **options)
    build = dense(package, steps_per_execution=2)
    assert_fits_match(build, sources(package, (X, Y)), expected, tmp_path, scales, **options)


def test_sequence_with_workers_keeps_order(tmp_path: Path) -> None:
    expected = plain_fit(dense("keras"), "keras", Slices((X, Y)))
    every_data = [lambda: Slices((X, Y), workers=3, max_queue_size=4)]
    assert_fits_match(dense("keras"), every_data, expected, tmp_path, [rk.Scale()])


@PACKAGES
@pytest.mark.parametrize(("num_batches", "num_epochs"), [(7, 3), (6, 2)])
def test_training_ends_when_generator_is_exhausted(
    package: str, num_batches: int, num_epochs: int, tmp_path: Path
) -> None:
    data = made("generator", package, (X, Y), num_batches)
    _, model = plain_fit(dense(package), package, data, epochs=1, steps_per_epoch=num_batches)
    options: dict[str, Any] = {"steps_per_epoch": 3, "epochs": 9, "verbose": 0}
    for scale in SCALES.values():
        data = made("generator", package, (X, Y), num_batches)
        with pytest.warns(UserWarning, match=f"ended after {num_batches} batches, in epoch {num_epochs} of 9"):
            result = rk.fit(dense(package), data, **options, scale=scale, run=rk.Run(storage=str(tmp_path)))
        assert result.epoch == list(range(num_epochs))
        assert_same_weights(result.model(), model)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # Keras 3 warns at each end
@pytest.mark.parametrize(  # three does not divide the steps of an epoch, and tf_keras refuses it
    ("package", "steps_per_execution"),
    [pytest.param("keras", 1, marks=pytest.mark.exhaustive), ("keras", 3), ("tf_keras", 1)],
)
def test_dataset_of_unknown_length_has_one_pass_per_epoch(
    package: str, steps_per_execution: int, tmp_path: Path
) -> None:
    def data() -> Any:
        signature = (tf.TensorSpec((None, 8)), tf.TensorSpec((None,), tf.int64))
        return tf.data.Dataset.from_generator(
            lambda: (slices((X, Y), i) for i in range(STEPS)), output_signature=signature
        )

    build = dense(package, steps_per_execution=steps_per_execution)
    batches: list[int] = []
    callbacks = importlib.import_module(package).callbacks
    recorder = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    expected = plain_fit(build, package, data(), validation_data=data(), callbacks=[recorder])
    expected_batches = batches.copy()
    assert_fits_match(build, [data], expected, tmp_path, validation_data=data())
    for replicas in (1, 2):
        batches.clear()
        scale, run = rk.Scale(replicas_per_worker=replicas), rk.Run(storage=str(tmp_path), name=f"{replicas}")
        rk.fit(build, data(), epochs=2, verbose=0, callbacks=[recorder], scale=scale, run=run)
        assert batches == expected_batches


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_generator_without_steps_is_one_epoch(tmp_path: Path) -> None:
    data = made("generator", "", (X, Y), STEPS)
    result = rk.fit(dense("keras"), data, epochs=2, verbose=0, run=rk.Run(storage=str(tmp_path)))
    assert result.epoch == [0]


def test_evaluate_counts_every_row_once() -> None:
    keras.utils.set_random_seed(0)
    model = dense("keras")()
    expected = model.evaluate(X, Y, sample_weight=WEIGHT, verbose=0, return_dict=True)
    for form, scale in itertools.product(FORMS, SCALES.values()):
        steps = STEPS if form == "generator" else None
        logs: Any = rk.evaluate(model, made(form, "keras", (X, Y, WEIGHT)), steps=steps, scale=scale)
        assert logs == pytest.approx(expected, rel=1e-5), (form, scale)


ARRAYS = ({"img_input": IMAGES, "ts_input": SERIES}, SCORE, WEIGHT)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_keep_batch_order(form: str, tmp_path: Path) -> None:
    model = two_inputs("keras")()
    predicted = rk.predict(model, made(form, "keras", ARRAYS, STEPS))
    for values, expected in zip(predicted, model.predict((IMAGES, SERIES), verbose=0), strict=True):
        np.testing.assert_allclose(values, expected, atol=1e-5)
    output = str(tmp_path / "out")
    assert rk.predict(model, made(form, "keras", ARRAYS, STEPS), output=output) == output
    assert pq.read_table(output).num_rows == 75


@pytest.mark.parametrize("form", ["dataset", "sequence"])  # made in the driver, made in tasks
def test_predictions_of_two_models_keep_batch_order(form: str) -> None:
    model = two_inputs("keras")()
    predicted = rk.predict(model, made(form, "keras", ARRAYS), scale=rk.Scale(replicas_per_worker=2))
    for values, expected in zip(predicted, model.predict((IMAGES, SERIES), verbose=0), strict=True):
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_torch_data_loader_matches_keras(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))

    def data() -> Any:
        return torch.utils.data.DataLoader(dataset, batch_size=BATCH)

    assert_fits_match(dense("keras"), [data], plain_fit(dense("keras"), "keras", Slices((X, Y))), tmp_path)
    model = dense("keras")()
    np.testing.assert_allclose(rk.predict(model, data()), model.predict(X, verbose=0), atol=1e-5)


def test_text_and_varying_sequence_length_match_keras(tmp_path: Path) -> None:
    words, labels = np.array(["a", "b", "a c", "c"] * 6), np.array([0, 1, 0, 1] * 6)

    def reads_text() -> Any:
        model = keras.Sequential(
            [
                keras.Input((), dtype="string"),
                keras.layers.TextVectorization(vocabulary=["a", "b", "c"], output_sequence_length=2),
                keras.layers.Embedding(6, 2),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        model.compile("sgd", "mse")
        return model

    def text() -> Any:
        return tf.data.Dataset.from_tensor_slices((words, labels)).batch(5)

    assert_fits_match(reads_text, [text], plain_fit(reads_text, "keras", text()), tmp_path, [rk.Scale()])

    def lengths() -> Iterator[Any]:
        for number in itertools.count():
            yield (IMAGES[:16], SERIES[:16, : 4 + number % 3]), (SCORE[:16], CLASS[:16])

    expected = plain_fit(two_inputs("keras"), "keras", lengths(), steps_per_epoch=3)
    assert_fits_match(two_inputs("keras"), [lengths], expected, tmp_path, steps_per_epoch=3)

    def later_lengths() -> Iterator[Any]:  # where plain Keras 3 fails
        for number in itertools.count():
            yield (IMAGES[:16], SERIES[:16, : 4 + number // 2 % 3]), (SCORE[:16], CLASS[:16])

    expected = plain_fit(two_inputs("tf_keras"), "tf_keras", later_lengths(), steps_per_epoch=4)
    assert_fits_match(two_inputs("tf_keras"), [later_lengths], expected, tmp_path, steps_per_epoch=4)


def fails(match: str, x: Any, error: type[Exception] = rk.OptionError, **options: Any) -> rk.RaykerasError:
    with pytest.raises(error, match=match) as caught:
        rk.fit(dense("keras"), x, **{"verbose": 0, "run": rk.Run(storage="/nowhere"), **options})
    return caught.value  # type: ignore[return-value]


def test_invalid_batches_are_refused_before_start() -> None:
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    unknown = data.batch(BATCH).filter(lambda x, y: True)
    fails(r"must be batches, rows first; .* Call `dataset\.batch", data)
    fails("infinite tf.data.Dataset without `steps_per_epoch`", data.batch(BATCH).repeat())
    fails("infinite sequence without `steps_per_epoch`", Endless())
    fails("infinite tf.data.Dataset without `validation_steps`", Slices((X, Y)), validation_data=data.batch(9).repeat())
    fails("of unknown length without `steps_per_epoch`", unknown, scale=TWO)
    fails("of unknown length without `steps_per_epoch`", made("generator", "", (X, Y)), scale=TWO)
    fails("of unknown length without `validation_steps`", Slices((X, Y)), validation_data=unknown, scale=TWO)
    fails("without `validation_steps`", Slices((X, Y)), validation_data=generated((X, Y), 3))
    fails("this one is empty", data.batch(BATCH).take(0))
    fails("must have at least one batch", iter(()))
    fails("got `y` as well", Slices((X, Y)), y=Y)
    fails("`validation_split` is only supported for arrays", Slices((X, Y)), validation_split=0.2)
    fails("got 4 parts", ((X, Y, Y, Y) for _ in range(3)))
    fails("must hold dense tensors", data.ragged_batch(4).map(lambda x, y: (tf.RaggedTensor.from_tensor(x), y)))
    fails(
        r"must be nested like the model's inputs; .* Pass an array, or",
        (({"a": {"b": X}}, Y) for _ in range(3)),
        rk.ModelError,
    )
    fails("batch 0: x 75, y 74", ((X, Y[1:]) for _ in range(3)))
    fails("must name the model's outputs|Outputs: None", Slices((X, Y)), class_weight={"a": {1: 2}})
    with pytest.raises(rk.OptionError, match=r"infinite tf\.data\.Dataset\. Pass `steps`"):
        rk.predict(dense("keras"), data.batch(BATCH).repeat())
    with pytest.raises(rk.OptionError, match="`columns` must be columns of a source"):
        rk.predict(dense("keras"), data.batch(BATCH), output="/nowhere", columns=["id"])


def test_unpicklable_sequence_names_attribute() -> None:
    data = Slices((X, Y))
    data.lock = threading.Lock()
    fails(r"`lock` \(lock\) of Slices cannot be pickled", data, scale=TWO)


@IN_PROCESS
def test_validation_steps_beyond_data_are_an_error(scale: rk.Scale, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path))
    unknown = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH).filter(lambda x, y: True)
    options: dict[str, Any] = {"validation_steps": 9, "scale": scale}
    fails("of 9 steps needs as many", Slices((X, Y)), validation_data=unknown, run=run, **options)
    run = rk.Run(storage=str(tmp_path), name="generator")
    fails("after 7", Slices((X, Y)), validation_data=made("generator", "", (X, Y), 7), run=run, **options)


@IN_PROCESS
def test_inconsistent_batch_is_named(scale: rk.Scale, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path))
    wrong = itertools.chain(generated((X, Y), 3), [(X[:, :5], Y)])
    message = "those of x are 8, but 5 in batch 3"
    fails(message, wrong, steps_per_epoch=4, scale=scale, run=run)


def test_batch_shape_must_match_model_input(tmp_path: Path) -> None:
    run, data = rk.Run(storage=str(tmp_path)), made("dataset", "", (X[:, :5], Y))
    fails("takes 8 per row and x has 5. Change", data, rk.ModelError, run=run)


@IN_PROCESS
def test_user_exception_keeps_user_traceback(scale: rk.Scale, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path))
    error = fails("FloatingPointError: in batch three", Slices((X, Y), 3), rk.UserCodeError, scale=scale, run=run)
    assert "__getitem__" in error.user_traceback  # type: ignore[attr-defined]
    assert "site-packages" not in error.user_traceback  # type: ignore[attr-defined]
    error = fails("FloatingPointError: in batch three", Slices((X, Y), 0), rk.UserCodeError, scale=scale)
    assert "__getitem__" in error.user_traceback  # type: ignore[attr-defined]
    with pytest.raises(rk.UserCodeError, match="in batch three") as caught:
        rk.predict(dense("keras"), Slices((X, Y), 3), scale=scale)
    assert "__getitem__" in caught.value.user_traceback


@pytest.mark.parametrize("form", FORMS)
def test_feeder_splits_batches_over_ranks_in_order(form: str) -> None:
    batches = as_batches(made(form, "keras", (X, Y, WEIGHT), 40), "float32")
    assert batches is not None
    feeder = BatchFeeder(Epochs(batches, shuffle=False, seed=0, steps=None, restart=False), 2)
    try:
        taken = [batches_of(receive_chunks(channel), 12) for channel in feeder.channels]
    finally:
        feeder.close()
    for number, parts in enumerate(zip(*taken, strict=True)):
        for i, whole in enumerate(slices((X, Y, WEIGHT), number % STEPS)):
            np.testing.assert_array_equal(np.concatenate([arrays[i] for arrays, _ in parts]), whole)
            assert all(rows == len(whole) for _, rows in parts)


def batches_of(chunks: Iterator[BatchChunk], num_batches: int) -> list[tuple[list[np.ndarray], int]]:
    taken: list[Any] = []
    while len(taken) < num_batches:
        chunk = next(chunks)
        ends = np.cumsum(chunk.rows)
        for a, b, rows in zip(ends - chunk.rows, ends, chunk.global_rows, strict=True):
            taken.append(([array[a:b] for array in chunk.arrays], int(rows)))
    return taken[:num_batches]


def test_feeder_sends_incomplete_chunk_without_waiting() -> None:
    arrived = threading.Event()

    def slow() -> Iterator[Any]:
        yield from (slices((X, Y), i) for i in range(3))
        if not arrived.wait(60):
            raise TimeoutError("the earlier batches did not arrive")
        yield slices((X, Y), 3)

    batches = as_batches(slow(), "float32")
    assert batches is not None
    feeder = BatchFeeder(Epochs(batches, shuffle=False, seed=0, steps=None, restart=False), 1)
    try:
        chunks = receive_chunks(feeder.channels[0])
        assert len(batches_of(chunks, 2)) == 2
        arrived.set()
        rest = list(chunks)
    finally:
        feeder.close()
    assert [chunk.is_last for chunk in rest][-1]
    assert sum(len(chunk.rows) for chunk in rest) == 2


@pytest.mark.usefixtures("two_workers")
def test_sequence_that_changes_matches_keras_on_two_workers(tmp_path: Path) -> None:
    labels = [np.roll(Y, i) for i in range(3)]
    changing = (slices((X, labels[i // STEPS]), i % STEPS) for i in range(3 * STEPS))
    expected = plain_fit(dense("tf_keras"), "tf_keras", changing, epochs=3, steps_per_epoch=STEPS)
    data = Hooked((X, Y))
    assert_fits_match(dense("tf_keras"), [lambda: data], expected, tmp_path, [TWO], epochs=3)
    assert data.calls.count("end") >= 3


@pytest.mark.usefixtures("two_workers")
def test_generator_end_stops_two_workers(tmp_path: Path) -> None:
    data = made("generator", "keras", (X, Y), 7)
    options: dict[str, Any] = {"epochs": 9, "steps_per_epoch": 3, "verbose": 0}
    result = rk.fit(dense("keras"), data, **options, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert result.epoch == [0, 1, 2]
    assert int(result.model().optimizer.iterations) == 7


@pytest.mark.usefixtures("two_workers")
def test_user_exception_on_two_workers_keeps_user_traceback(tmp_path: Path) -> None:
    options: dict[str, Any] = {"scale": TWO, "run": rk.Run(storage=str(tmp_path)), "epochs": 2}
    error = fails("FloatingPointError: in batch three", Slices((X, Y), 3), rk.UserCodeError, **options)
    assert "__getitem__" in error.user_traceback  # type: ignore[attr-defined]
