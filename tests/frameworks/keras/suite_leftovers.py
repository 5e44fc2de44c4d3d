"""Nothing of a watch stays: not in what is saved, not on the model, not in Keras."""

import copy
import json
import pickle
import zipfile

import keras
import numpy as np
import pytest
from keras import layers
from keras.src.ops.operation import Operation
from watching import watched

from isograd.frameworks.keras import _taps as taps

BACKEND = keras.backend.backend()
TABLE = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
VALUES = TABLE[:, :1]


def trained():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="relu"), layers.BatchNormalization()])
    model.add(layers.Dropout(0.2))
    model.add(layers.Dense(1))
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(TABLE, VALUES, batch_size=8, epochs=2, verbose=0)
    return model


@pytest.fixture(scope="module")
def plain():
    return trained()


@pytest.fixture(scope="class")
def during(plain, tmp_path_factory):
    """A model that has been trained and is still watched; `plain` was trained before, not watched."""
    with watched(tmp_path_factory.mktemp("watch")):
        yield trained()


def values(model):
    return [np.asarray(w) for w in model.get_weights()]


def assert_same_weights(one, other):
    tolerance = 1e-6 if BACKEND == "jax" else 0.0
    for a, b in zip(values(one), values(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def without_identities(config):
    """A part of a configuration without the address that an object had when it was saved."""
    return {key: value for key, value in config.items() if key != "shared_object_id"}


def contents(path):
    """What a saved model holds: its configuration, and the names of its arrays."""
    import h5py

    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"), object_hook=without_identities)
        archive.extract("model.weights.h5", path.parent)
    names = []
    with h5py.File(path.parent / "model.weights.h5") as file:
        file.visit(names.append)
    return config, sorted(names)


class TestWhileWatched:
    def test_saved_models_are_as_if_never_watched(self, plain, during, tmp_path):
        """Configuration and arrays of a saved model are those of an unwatched one, and it can be loaded."""
        for name, model in (("plain", plain), ("during", during)):
            (tmp_path / name).mkdir()
            model.save(tmp_path / name / "model.keras")
            model.save_weights(tmp_path / name / "own.weights.h5")
        assert contents(tmp_path / "plain" / "model.keras") == contents(tmp_path / "during" / "model.keras")
        loaded = keras.models.load_model(tmp_path / "during" / "model.keras")
        assert_same_weights(loaded, plain)
        loaded.load_weights(tmp_path / "during" / "own.weights.h5")
        others = keras.models.load_model(tmp_path / "plain" / "model.keras").optimizer.variables
        assert [v.path for v in loaded.optimizer.variables] == [v.path for v in others]

    def test_state_trees_have_no_more_branches(self, plain, during):
        """The state tree of a watched model has the paths of an unwatched one."""
        expected, found = plain.get_state_tree(), during.get_state_tree()
        assert keras.tree.map_structure(np.shape, expected) == keras.tree.map_structure(np.shape, found)

    def test_watched_models_can_be_copied(self, during):
        """Pickles, copies and clones of a watched model are models of their own, with its weights."""
        pickled, copied = pickle.loads(pickle.dumps(during)), copy.deepcopy(during)
        assert_same_weights(pickled, during)
        assert_same_weights(copied, during)
        clone = keras.models.clone_model(during)
        clone.compile("sgd", "mse")
        for other in (pickled, copied, clone):
            other.fit(TABLE, VALUES, batch_size=12, verbose=0)


def things_of(model):
    return [model, model.optimizer, *model._flatten_layers(include_self=False)]


def test_everything_is_put_back(plain, tmp_path):
    """Behind a watch the attributes of model, optimizer and layers are those of an unwatched one, and so is Keras."""
    call = Operation.__call__
    trainer = taps._trainer()
    make = trainer.make_train_function
    with watched(tmp_path):
        model = trained()
        session = model.train_function
        assert trainer.make_train_function is not make
        assert Operation.__call__ is call  # only while a step is traced
    assert Operation.__call__ is call
    assert trainer.make_train_function is make
    assert model.train_function is not session
    assert type(model.train_function) is type(plain.train_function)
    for one, other in zip(things_of(model), things_of(plain), strict=True):
        assert {name: type(value) for name, value in vars(one).items()} == {
            name: type(value) for name, value in vars(other).items()
        }
        for name in ("train_step", "compute_loss", "apply", "stateless_apply", "activation", "__call__"):
            assert name not in vars(one) or name in vars(other)


def test_an_error_of_the_program_is_its_own(tmp_path):
    """What a layer raises while it is traced reaches the program, once, and everything is put back."""

    class Broken(layers.Layer):
        def call(self, x, training=False):
            if training:
                raise KeyError("the program's own")
            return x

    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), Broken(), layers.Dense(1)])
    model.compile("sgd", "mse")
    call = Operation.__call__
    with watched(tmp_path), pytest.raises(KeyError, match="the program's own"):
        model.fit(TABLE, VALUES, verbose=0)
    assert Operation.__call__ is call
