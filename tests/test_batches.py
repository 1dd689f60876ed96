"""Batches that the user makes, beside plain Keras over the same batches."""

from __future__ import annotations

import importlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tf_keras

import raykeras as rk
from raykeras.batches import as_batches
from raykeras.cluster import connect
from raykeras.orders import BatchOrders
from raykeras.pump import Chunk, Pump, received
from tests.models import CLASS, IMAGES, IN_PROCESS, PACKAGES, SCALES, SCORE, SERIES, WEIGHT, X, Y, dense, two_inputs

BATCH, STEPS = 16, 5  # of 75 rows; the last batch has 11, which does not come out even
TWO = rk.Scale(workers=2)
FORMS = pytest.mark.parametrize("form", ["dataset", "sequence", "generator"])

Arrays = tuple[Any, ...]


def slices(arrays: Arrays, index: int) -> Any:
    """Batch number `index` of nested arrays."""
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
    """Each epoch trains on other labels."""

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
    """Batches in arrays that are overwritten when the next one is asked for."""
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


def assert_as_plain(
    build: Callable[[], Any],
    package: str,
    scale: rk.Scale,
    folder: Path,
    x: Any,
    plain: Any = None,
    **options: Any,
) -> rk.Result:
    """`rk.fit` of `x()` gives what plain `fit` of `plain()`, in its order, gives."""
    keras_ = importlib.import_module(package)
    options = {"epochs": 2, "shuffle": False, "verbose": 0, **options}
    keras_.utils.set_random_seed(0)
    model = build()
    expected = model.fit((plain or x)(), **{k: v() if callable(v) else v for k, v in options.items()}).history
    options = {k: v() if callable(v) else v for k, v in options.items()}
    result = rk.fit(build, x(), **options, scale=scale, run=rk.Run(storage=str(folder)))
    assert_same(result, expected, model)
    return result


def assert_same(result: rk.Result, history: dict[str, list[float]], model: Any) -> None:
    assert set(result.history) == set(history)
    for name, values in history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for ours, theirs in zip(result.model().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@FORMS
@PACKAGES
@IN_PROCESS
def test_batches_train_and_validate_as_in_keras(form: str, package: str, scale: rk.Scale, tmp_path: Path) -> None:
    options = {"steps_per_epoch": STEPS} if form == "generator" else {}
    validation = "dataset" if form == "generator" else form
    assert_as_plain(
        dense(package),
        package,
        scale,
        tmp_path,
        lambda: made(form, package, (X, Y, WEIGHT)),
        validation_data=lambda: made(validation, package, (X[::-1].copy(), Y)),
        batch_size=64,  # ignored
        **options,
    )


@FORMS
@PACKAGES
@IN_PROCESS
def test_dicts_of_inputs_outputs_and_weights(form: str, package: str, scale: rk.Scale, tmp_path: Path) -> None:
    x = {"img_input": IMAGES, "ts_input": SERIES}
    y, weights = {"score_output": SCORE, "class_output": CLASS}, {"score_output": WEIGHT, "class_output": WEIGHT[::-1]}
    listed = ((IMAGES, SERIES), (SCORE, CLASS), (WEIGHT, WEIGHT[::-1]))  # Keras 3 itself wants these weights as a list
    assert_as_plain(
        two_inputs(package),
        package,
        scale,
        tmp_path,
        lambda: made(form, package, (x, y, weights)),
        lambda: made("dataset", package, listed),
        steps_per_epoch=STEPS if form == "generator" else None,
    )


@pytest.mark.parametrize("nested", ["list", "dict"])
@PACKAGES
@IN_PROCESS
def test_class_weight_of_one_output_multiplies(nested: str, package: str, scale: rk.Scale, tmp_path: Path) -> None:
    factor = np.where(np.argmax(CLASS, 1) == 2, 3.0, np.where(np.argmax(CLASS, 1) == 4, 0.5, 1)).astype(np.float32)
    expected = ((IMAGES, SERIES), (SCORE, CLASS), (np.ones(75, np.float32), factor))
    y: Any = (SCORE, CLASS) if nested == "list" else {"score_output": SCORE, "class_output": CLASS}
    name = 1 if nested == "list" else "class_output"
    build, folder = two_inputs(package), tmp_path
    keras_ = importlib.import_module(package)
    keras_.utils.set_random_seed(0)
    model = build()
    history = model.fit(made("dataset", package, expected), epochs=2, verbose=0).history
    data = made("sequence", package, ((IMAGES, SERIES), y))
    options: dict[str, Any] = {"epochs": 2, "shuffle": False, "verbose": 0, "class_weight": {name: {2: 3.0, 4: 0.5}}}
    assert_same(rk.fit(build, data, **options, scale=scale, run=rk.Run(storage=str(folder))), history, model)


@IN_PROCESS
def test_class_weight_multiplies_with_weights(scale: rk.Scale, tmp_path: Path) -> None:
    both = WEIGHT * np.where(Y == 1, 4, 1).astype(np.float32)
    keras.utils.set_random_seed(0)
    model = dense("keras")()
    history = model.fit(made("dataset", "keras", (X, Y, both)), epochs=2, verbose=0).history
    for form in ("dataset", "generator"):
        data = made(form, "keras", (X, Y, WEIGHT))
        options: dict[str, Any] = {"epochs": 2, "verbose": 0, "class_weight": {1: 4.0}, "steps_per_epoch": STEPS}
        run = rk.Run(storage=str(tmp_path), name=form)
        assert_same(rk.fit(dense("keras"), data, **options, scale=scale, run=run), history, model)


@IN_PROCESS
def test_epochs_go_on_where_the_last_one_stopped(scale: rk.Scale, tmp_path: Path) -> None:
    for number, data in enumerate([made("dataset", "", (X, Y)), Slices((X, Y)), Endless()]):
        keras.utils.set_random_seed(0)
        model = dense("keras")()
        plain = model.fit(made("generator", "", (X, Y)), steps_per_epoch=3, epochs=4, verbose=0)
        run = rk.Run(storage=str(tmp_path), name=str(number))
        options: dict[str, Any] = {"steps_per_epoch": 3, "epochs": 4, "verbose": 0, "shuffle": False}
        assert_same(rk.fit(dense("keras"), data, **options, scale=scale, run=run), plain.history, model)


def test_a_sequence_has_a_new_order_each_epoch_and_its_hooks_are_called(tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data = Hooked((X, Y))
        run = rk.Run(storage=str(tmp_path), name=name, seed=seed)
        rk.fit(dense("keras"), data, epochs=3, verbose=0, run=run)
        assert data.calls[:2] == [0, STEPS - 1]  # to learn the layout
        calls = [data.calls[2 + i * (STEPS + 2) :][: STEPS + 2] for i in range(3)]
        assert len(data.calls) == 2 + 3 * (STEPS + 2)
        assert all(epoch[0] == "begin" and epoch[-1] == "end" for epoch in calls)
        orders.append([epoch[1:-1] for epoch in calls])
        assert all(sorted(epoch) == list(range(STEPS)) for epoch in orders[-1])
        assert orders[-1][0] != orders[-1][1]
    assert orders[0] == orders[1] != orders[2]


def test_hooks_are_called_each_epoch_of_steps(tmp_path: Path) -> None:
    data = Hooked((X, Y))
    run = rk.Run(storage=str(tmp_path))
    rk.fit(dense("keras"), data, epochs=3, steps_per_epoch=2, shuffle=False, verbose=0, run=run)
    assert data.calls[2:] == ["begin", 0, 1, "end", "begin", 2, 3, "end", "begin", 4, 0, "end"]


@pytest.mark.parametrize("form", ["dataset", "sequence"])
def test_steps_per_execution_need_not_divide_the_batches(form: str, tmp_path: Path) -> None:
    build, x = dense("keras", steps_per_execution=2), lambda: made(form, "keras", (X, Y))
    assert_as_plain(build, "keras", SCALES["1x1"], tmp_path, x)


@FORMS
@PACKAGES
@IN_PROCESS
def test_steps_per_execution_need_not_divide_the_steps_asked_for(
    package: str, form: str, scale: rk.Scale, tmp_path: Path
) -> None:
    importlib.import_module(package).utils.set_random_seed(0)
    model = dense(package)()
    options = {"epochs": 4, "steps_per_epoch": 3, "shuffle": False, "verbose": 0}
    data, repeated = made(form, package, (X, Y)), made("generator", package, (X, Y))
    history = model.fit(repeated, **options).history  # Keras 3 makes whole executions, and tf.data's end is an end
    run = rk.Run(storage=str(tmp_path))
    result = rk.fit(dense(package, steps_per_execution=2), data, scale=scale, run=run, **options)
    assert_same(result, history, model)


def test_a_sequence_with_workers_keeps_its_order(tmp_path: Path) -> None:
    x, plain = lambda: Slices((X, Y), workers=3, max_queue_size=4), lambda: Slices((X, Y))
    assert_as_plain(dense("keras"), "keras", SCALES["1x1"], tmp_path, x, plain)


@PACKAGES
@IN_PROCESS
def test_training_ends_with_the_generator(package: str, scale: rk.Scale, tmp_path: Path) -> None:
    for number, (batches, epochs) in enumerate([(7, 3), (6, 2)]):
        build = dense(package)
        importlib.import_module(package).utils.set_random_seed(0)
        model = build()
        model.fit(made("generator", package, (X, Y), batches), steps_per_epoch=batches, verbose=0)
        run = rk.Run(storage=str(tmp_path), name=str(number))
        with pytest.warns(UserWarning, match=f"came to its end after {batches} batches, in epoch {epochs} of 9"):
            data = made("generator", package, (X, Y), batches)
            result = rk.fit(build, data, steps_per_epoch=3, epochs=9, verbose=0, scale=scale, run=run)
        assert result.epoch == list(range(epochs))
        for ours, theirs in zip(result.model().get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_data_of_unknown_length_is_one_epoch_a_pass(tmp_path: Path) -> None:
    x = lambda: tf.data.Dataset.from_generator(  # noqa: E731
        lambda: (slices((X, Y), i) for i in range(STEPS)),
        output_signature=(tf.TensorSpec((None, 8)), tf.TensorSpec((None,), tf.int64)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras 3 warns at each end of such a dataset
        assert_as_plain(dense("keras"), "keras", SCALES["1x1"], tmp_path, x, lambda: Slices((X, Y)))
        run = rk.Run(storage=str(tmp_path), name="once")
        result = rk.fit(dense("keras"), made("generator", "", (X, Y), STEPS), epochs=2, verbose=0, run=run)
    assert result.epoch == [0]


@FORMS
@IN_PROCESS
def test_evaluate_counts_every_row_once(form: str, scale: rk.Scale) -> None:
    keras.utils.set_random_seed(0)
    model = dense("keras")()
    expected = model.evaluate(X, Y, sample_weight=WEIGHT, verbose=0, return_dict=True)
    steps = STEPS if form == "generator" else None
    logs: Any = rk.evaluate(model, made(form, "keras", (X, Y, WEIGHT)), steps=steps, scale=scale)
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, err_msg=name)


@FORMS
@IN_PROCESS
def test_predictions_come_in_the_order_of_the_batches(form: str, scale: rk.Scale, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = two_inputs("keras")()
    expected = model.predict((IMAGES, SERIES), verbose=0)
    arrays = ({"img_input": IMAGES, "ts_input": SERIES}, SCORE, WEIGHT)
    predicted = rk.predict(model, made(form, "keras", arrays, STEPS), scale=scale)
    for ours, theirs in zip(predicted, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    output = str(tmp_path / "out")
    assert rk.predict(model, made(form, "keras", arrays, STEPS), scale=scale, output=output) == output
    assert pq.read_table(output).num_rows == 75


def test_a_torch_loader_trains_and_predicts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    x = lambda: torch.utils.data.DataLoader(dataset, batch_size=BATCH)  # noqa: E731
    for name, scale in SCALES.items():
        assert_as_plain(dense("keras"), "keras", scale, tmp_path / name, x, lambda: Slices((X, Y)))
    model = dense("keras")()
    np.testing.assert_allclose(rk.predict(model, x()), model.predict(X, verbose=0), atol=1e-5)


def test_text_and_rows_of_changing_length(tmp_path: Path) -> None:
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

    x = lambda: tf.data.Dataset.from_tensor_slices((words, labels)).batch(5)  # noqa: E731
    assert_as_plain(reads_text, "keras", SCALES["1x1"], tmp_path / "text", x)

    def lengths() -> Iterator[Any]:
        for number in itertools.count():
            yield (IMAGES[:16], SERIES[:16, : 4 + number % 3]), (SCORE[:16], CLASS[:16])

    for name, scale in SCALES.items():
        assert_as_plain(two_inputs("keras"), "keras", scale, tmp_path / name, lengths, steps_per_epoch=3)


def fails(match: str, x: Any, error: type[Exception] = rk.OptionError, **options: Any) -> rk.RaykerasError:
    with pytest.raises(error, match=match) as caught:
        rk.fit(dense("keras"), x, **{"verbose": 0, "run": rk.Run(storage="/nowhere"), **options})
    return caught.value  # type: ignore[return-value]


def test_what_cannot_be_used_is_said_before_anything_starts() -> None:
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    two = rk.Scale(replicas_per_worker=2)
    unknown = data.batch(BATCH).filter(lambda x, y: True)
    fails(r"must be batches, rows first; .* Call `dataset\.batch", data)
    fails("infinite tf.data.Dataset without `steps_per_epoch`", data.batch(BATCH).repeat())
    fails("infinite sequence without `steps_per_epoch`", Endless())
    fails("infinite tf.data.Dataset without `validation_steps`", Slices((X, Y)), validation_data=data.batch(9).repeat())
    fails("of unknown length came without `steps_per_epoch`", unknown, scale=two)
    fails("of unknown length came without `steps_per_epoch`", made("generator", "", (X, Y)), scale=two)
    fails("of unknown length came without `validation_steps`", Slices((X, Y)), validation_data=unknown, scale=two)
    fails("without `validation_steps`", Slices((X, Y)), validation_data=generated((X, Y), 3))
    fails("this one is empty", data.batch(BATCH).take(0))
    fails("must have at least one batch", iter(()))
    fails("got `y` as well", Slices((X, Y)), y=Y)
    fails("`validation_split` is for arrays", Slices((X, Y)), validation_split=0.2)
    fails("got 4 parts", ((X, Y, Y, Y) for _ in range(3)))
    fails("must hold dense tensors", data.ragged_batch(4).map(lambda x, y: (tf.RaggedTensor.from_tensor(x), y)))
    fails("must be an array, or a list or dict of arrays", (({"a": {"b": X}}, Y) for _ in range(3)))
    fails("batch 0: x 75, y 74", ((X, Y[1:]) for _ in range(3)))
    fails("must name the model's outputs|Outputs: None", Slices((X, Y)), class_weight={"a": {1: 2}})
    with pytest.raises(rk.OptionError, match=r"infinite tf\.data\.Dataset\. Take a part of it"):
        rk.predict(dense("keras"), data.batch(BATCH).repeat())
    with pytest.raises(rk.OptionError, match="`columns` are those of a source"):
        rk.predict(dense("keras"), data.batch(BATCH), output="/nowhere", columns=["id"])


def test_a_sequence_that_cannot_be_pickled_names_what_cannot() -> None:
    data = Slices((X, Y))
    data.lock = threading.Lock()
    fails(r"`lock` \(lock\) of Slices cannot be pickled", data, scale=TWO)


@IN_PROCESS
def test_a_validation_longer_than_its_data_is_one_error(scale: rk.Scale, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path))
    unknown = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH).filter(lambda x, y: True)
    options: dict[str, Any] = {"validation_steps": 9, "scale": scale}
    fails("of 9 steps needs as many", Slices((X, Y)), validation_data=unknown, run=run, **options)
    run = rk.Run(storage=str(tmp_path), name="generator")
    fails("after 7", Slices((X, Y)), validation_data=made("generator", "", (X, Y), 7), run=run, **options)


@IN_PROCESS
def test_a_later_batch_unlike_the_others_is_named(scale: rk.Scale, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path))
    wrong = itertools.chain(generated((X, Y), 3), [(X[:, :5], Y)])
    message = "those of x are 8, and 5 in batch 3"
    fails(message, wrong, steps_per_epoch=4, scale=scale, run=run)


def test_batches_of_another_shape_than_the_input_are_named(tmp_path: Path) -> None:
    run, data = rk.Run(storage=str(tmp_path)), made("dataset", "", (X[:, :5], Y))
    fails("takes 8 a row and x gives 5. Change", data, rk.ModelError, run=run)


@IN_PROCESS
def test_exceptions_of_the_users_code_come_with_its_traceback(scale: rk.Scale, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path))
    error = fails("FloatingPointError: in batch three", Slices((X, Y), 3), rk.UserCodeError, scale=scale, run=run)
    assert "__getitem__" in error.user_traceback  # type: ignore[attr-defined]
    assert "site-packages" not in error.user_traceback  # type: ignore[attr-defined]
    error = fails("FloatingPointError: in batch three", Slices((X, Y), 0), rk.UserCodeError, scale=scale)
    assert "__getitem__" in error.user_traceback  # type: ignore[attr-defined]
    with pytest.raises(rk.UserCodeError, match="in batch three") as caught:
        rk.predict(dense("keras"), Slices((X, Y), 3), scale=scale)
    assert "__getitem__" in caught.value.user_traceback


@FORMS
def test_the_pump_gives_each_rank_its_part_in_order(form: str) -> None:
    connect(TWO, in_process=False)
    batches = as_batches(made(form, "keras", (X, Y, WEIGHT), 40), "float32")
    assert batches is not None
    pump = Pump(BatchOrders(batches, batches.layout, batches.num_batches, False, 0, None), 2)
    try:
        taken = [batches_of(received(pipe), 12) for pipe in pump.pipes]
    finally:
        pump.close()
    for number, parts in enumerate(zip(*taken, strict=True)):
        for i, whole in enumerate(slices((X, Y, WEIGHT), number % STEPS)):
            np.testing.assert_array_equal(np.concatenate([arrays[i] for arrays, _ in parts]), whole)
            assert all(rows == len(whole) for _, rows in parts)


def batches_of(chunks: Iterator[Chunk], num_batches: int) -> list[tuple[list[np.ndarray], int]]:
    taken: list[Any] = []
    while len(taken) < num_batches:
        chunk = next(chunks)
        ends = np.cumsum(chunk.rows)
        for a, b, rows in zip(ends - chunk.rows, ends, chunk.global_rows, strict=True):
            taken.append(([array[a:b] for array in chunk.arrays], int(rows)))
    return taken[:num_batches]


def test_no_batch_waits_in_the_pump_for_others_to_fill_a_chunk() -> None:
    connect(TWO, in_process=False)
    arrived = threading.Event()

    def slow() -> Iterator[Any]:
        yield from (slices((X, Y), i) for i in range(3))
        if not arrived.wait(60):
            raise TimeoutError("the batches before did not arrive")
        yield slices((X, Y), 3)

    batches = as_batches(slow(), "float32")
    assert batches is not None
    pump = Pump(BatchOrders(batches, batches.layout, batches.num_batches, False, 0, None), 1)
    try:
        chunks = received(pump.pipes[0])
        assert len(batches_of(chunks, 2)) == 2
        arrived.set()
        rest = list(chunks)
    finally:
        pump.close()
    assert [chunk.is_last for chunk in rest][-1]
    assert sum(len(chunk.rows) for chunk in rest) == 2


@pytest.mark.usefixtures("two_workers")
def test_two_workers_train_on_a_dataset_and_validate_on_a_sequence(tmp_path: Path) -> None:
    assert_as_plain(
        dense("keras"),
        "keras",
        TWO,
        tmp_path,
        lambda: made("dataset", "keras", (X, Y, WEIGHT)),
        validation_data=lambda: Slices((X[::-1].copy(), Y)),
        epochs=3,
    )


@pytest.mark.usefixtures("two_workers")
def test_two_workers_train_on_a_sequence_that_changes(tmp_path: Path) -> None:
    labels = [np.roll(Y, i) for i in range(3)]
    plain = lambda: (slices((X, labels[i // STEPS]), i % STEPS) for i in range(3 * STEPS))  # noqa: E731
    importlib.import_module("tf_keras").utils.set_random_seed(0)
    model = dense("tf_keras")()
    history = model.fit(plain(), epochs=3, steps_per_epoch=STEPS, verbose=0).history
    data = Hooked((X, Y))
    options: dict[str, Any] = {"epochs": 3, "shuffle": False, "verbose": 0}
    result = rk.fit(dense("tf_keras"), data, **options, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert_same(result, history, model)
    assert data.calls.count("end") >= 3


@pytest.mark.usefixtures("two_workers")
def test_two_workers_end_with_the_generator(tmp_path: Path) -> None:
    data = made("generator", "keras", (X, Y), 7)
    options: dict[str, Any] = {"epochs": 9, "steps_per_epoch": 3, "verbose": 0}
    result = rk.fit(dense("keras"), data, **options, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert result.epoch == [0, 1, 2]
    assert int(result.model().optimizer.iterations) == 7


@pytest.mark.usefixtures("two_workers")
def test_an_exception_in_a_batch_reaches_the_user_from_two_workers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"scale": TWO, "run": rk.Run(storage=str(tmp_path)), "epochs": 2}
    error = fails("FloatingPointError: in batch three", Slices((X, Y), 3), rk.UserCodeError, **options)
    assert "__getitem__" in error.user_traceback  # type: ignore[attr-defined]
